"""What stands between a client and an unsteered answer: weights, bodies, paths, settings."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import families
from cli.commands import output
from cmrm import ShiftVectors, Steering, load_vlm
from cmrm.engines.serving import front
from cmrm.engines.vllm import http
from cmrm.engines.vllm.arming import program_of
from cmrm.engines.vllm.checkpoint import readable_by_vllm
from cmrm.engines.vllm.http import refused_body
from cmrm.engines.vllm.matching import check_checkpoint, check_files, check_loaded
from cmrm.engines.vllm.program import Program
from cmrm.engines.vllm.starting import with_cache
from cmrm.errors import ArtifactError, ModelError
from cmrm.model.identity import identity_of
from cmrm.shift.artifact import Provenance
from cmrm.steering.gate import Gate

N, WIDTH = 3, 32


def test_other_towers_are_left_as_they_are(checkpoint: str, tmp_path: Path) -> None:
    model, _ = families.pixtral()
    model.save_pretrained(tmp_path / "pixtral")
    assert readable_by_vllm(tmp_path / "pixtral") == tmp_path / "pixtral"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"no config\.json"):
        readable_by_vllm(tmp_path / "bad")
    config = (Path(checkpoint) / "config.json").read_text()
    (tmp_path / "bad" / "config.json").write_text(config)
    with pytest.raises(ModelError, match="cannot be read"):
        readable_by_vllm(tmp_path / "bad")


def test_weights_on_disk_are_the_artifacts(checkpoint: str, tmp_path: Path) -> None:
    vlm = load_vlm(checkpoint)
    identity, layers = identity_of(vlm), dict(enumerate(vlm.layers))
    check_files(Path(checkpoint), identity)
    check_loaded(layers, identity)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "down_proj" in name or "layernorm" in name:
                parameter.mul_(1.05)
    vlm.model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ArtifactError, match="another model"):
        check_files(tmp_path / "tuned", identity)
    with pytest.raises(ArtifactError, match="layernorm"):
        check_loaded(layers, identity)
    with pytest.raises(ArtifactError, match="names no weights"):
        check_loaded(layers, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no weight can be compared"):
        check_files(tmp_path / "empty", identity)


def test_a_checkpoint_with_another_template_or_processor_is_another_model(
    checkpoint: str, tmp_path: Path
) -> None:
    identity = identity_of(load_vlm(checkpoint))
    check_checkpoint(Path(checkpoint), identity)

    def changed(name: str, file: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        document = json.loads((folder / file).read_text())
        change(document)
        (folder / file).write_text(json.dumps(document))
        return folder

    folder = tmp_path / "template"
    shutil.copytree(checkpoint, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ArtifactError, match="another chat template"):
        check_checkpoint(folder, identity)
    normed = changed("config", "config.json", lambda d: d["text_config"].update(rms_norm_eps=0.1))
    with pytest.raises(ArtifactError, match=r"config text_config\.rms_norm_eps"):
        check_checkpoint(normed, identity)
    scaled = changed(
        "pixels", "processor_config.json",
        lambda d: d["image_processor"].update(image_mean=[0.9, 0.9, 0.9]),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="image_mean"):
        check_checkpoint(scaled, identity)


def test_a_recommended_fill_is_served(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMRM_CACHE", str(tmp_path / "cache"))
    vectors, direction, sequential = (torch.randn(N, WIDTH) for _ in range(3))
    sequential[0] = 0
    made = Provenance(
        "m", None, "LlavaForConditionalGeneration", WIDTH, N, sequential_layers=(1, 2)
    )
    others = {"direction": direction, "sequential": sequential}
    gate = Gate("linear", (0,), torch.randn(1, WIDTH), 0.0)
    artifact = ShiftVectors(vectors, made, Steering(operator="fill"), others, gate=gate)
    path = artifact.save(tmp_path / "s.safetensors")
    text = " ".join(output("serve", checkpoint, "--shift", path, "--dry-run").split())
    assert '"operator": "fill"' in text
    assert '"gate": false' in text
    gated = ("--operator", "add", "--schedule", "sequential", "--gate", "--dry-run")
    text = " ".join(output("serve", checkpoint, "--shift", path, *gated).split())
    assert '"operator": "add"' in text
    assert '"gate": true' in text


def test_bodies_that_would_move_where_steering_begins() -> None:
    cases: tuple[tuple[Any, str], ...] = (
        ({"use_beam_search": True}, "use_beam_search"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"chat_template": "{{ x }}"}, "chat_template"), ([], "not a JSON object"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"truncation_side": "right"}, "truncation_side"),
    )  # fmt: skip
    for body, reason in cases:
        assert reason in str(refused_body(json.dumps(body).encode()))
    assert "not JSON" in str(refused_body(b"{"))
    assert "not JSON" in str(refused_body(b"[" * 100_000))
    fine = {"use_beam_search": False, "add_generation_prompt": True, "messages": []}
    assert refused_body(json.dumps(fine).encode()) is None


class Client:
    """In the place of vLLM's engine client."""

    program = "right"

    async def collective_rpc(self, name: str, timeout: float) -> list[dict[str, Any]]:
        assert name == "cmrm_status"
        if self.program == "silent":
            await asyncio.sleep(60)
        counts = dict.fromkeys(front.COUNTERS, 1)
        return [{"armed": True, "program": self.program, **counts}]


def test_paths_that_clients_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but three paths, and nothing before every worker is armed."""
    reached: list[str] = []
    client = Client()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def ask(path: str, method: str = "POST", body: bytes = b"{}") -> int:
        codes: list[int] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                codes.append(message["status"])

        state = type("State", (), {"engine_client": client})()
        scope = {
            "type": "http", "path": path, "method": method,
            "app": type("App", (), {"state": state})(),
        }  # fmt: skip
        asyncio.run(http.Middleware(app)(scope, receive, send))
        return codes[0]

    monkeypatch.setattr(http, "expected_program", lambda: "right")
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert ask(path) == 200
    assert ask("/v1/models", "GET", b"") == 200
    assert ask("/health", "GET") == ask("/live", "GET") == 200
    for path in (
        "/invocations", "/tokenize", "/pooling", "/v1/responses", "/collective_rpc", "/",
        "/v1/embeddings", "/docs", "/v1/chat/completions/", "/sleep",
    ):  # fmt: skip
        assert ask(path) == 404
    assert ask("/v1/chat/completions", "GET") == ask("/health") == 405
    assert ask("/v1/chat/completions", body=b'{"use_beam_search": true}') == 400
    monkeypatch.setattr(front, "MOST_BYTES", 10)
    assert ask("/v1/chat/completions", body=b"{}" + b" " * 20) == 413
    monkeypatch.setattr(front, "MOST_BYTES", 1000)
    reached.clear()
    for client.program in ("wrong", "silent"):
        assert ask("/v1/chat/completions") == 503
        assert ask("/health", "GET") == 503
        assert ask("/live", "GET") == 200
    assert set(reached) == {"/health"}


def test_a_cpu_gives_a_quarter_of_its_memory_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = {"SC_PHYS_PAGES": 24 * 2**18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert with_cache({}, ["--dtype", "float32"]) == {"VLLM_CPU_KVCACHE_SPACE": "6"}
    pages["SC_PHYS_PAGES"] = 1000 * 2**18
    assert with_cache({}, []) == {"VLLM_CPU_KVCACHE_SPACE": "16"}
    pages["SC_PHYS_PAGES"] = 2**17
    assert with_cache({}, []) == {"VLLM_CPU_KVCACHE_SPACE": "1"}
    assert with_cache({"VLLM_CPU_KVCACHE_SPACE": "40"}, []) == {}
    for option in (
        "--gpu-memory-utilization=0.5",
        "--kv_cache_memory_bytes",
        "gpu_memory_utilization",
    ):
        assert with_cache({}, [option]) == {}


def test_what_the_environment_does_not_name_stays_as_recommended(tmp_path: Path) -> None:
    recommended = Steering(alpha=0.7, schedule="per_layer", layers=(1, 2))
    shift = ShiftVectors(
        torch.ones(N, WIDTH), Provenance("m", None, "x", WIDTH, N), recommended
    )  # fmt: skip
    path = str(shift.save(tmp_path / "shift.safetensors"))
    for text, expected in (
        ("", recommended), ('{"alpha": 0.2}', replace(recommended, alpha=0.2)),
        ('{"layers": [0]}', replace(recommended, layers=(0,))),
        (json.dumps(recommended.to_json()), recommended),
    ):  # fmt: skip
        program, _ = program_of({"CMRM_SHIFT": path, "CMRM_STEERING": text})
        assert program.key == Program.of(shift, expected).key
