"""`cmrm serve` without vLLM: what it would start, and what it refuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.commands import output, refused
from cmrm import ShiftVectors, Steering
from cmrm.engines.vllm import patches
from cmrm.engines.vllm.arming import program_of
from cmrm.engines.vllm.checkpoint import readable_by_vllm
from cmrm.engines.vllm.program import Program
from cmrm.errors import ArtifactError, InputError
from cmrm.shift.artifact import Provenance

N, WIDTH = 3, 32


@pytest.fixture
def shift(tmp_path: Path) -> Path:
    vectors = torch.randn(N, WIDTH)
    made = Provenance("m", None, "LlavaForConditionalGeneration", WIDTH, N)
    direction = {"direction": torch.randn(N, WIDTH)}
    return ShiftVectors(vectors, made, Steering(alpha=0.3), direction).save(
        tmp_path / "s.safetensors"
    )


def flat(text: str) -> str:
    return " ".join(text.replace("\\\n", " ").split())


def test_the_command_that_is_run(checkpoint: str, shift: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CMRM_CACHE", str(shift.parent / "cache"))
    text = flat(output("serve", checkpoint, "--shift", shift, "--alpha", 0.5, "--dry-run"))
    for words in (
        f"CMRM_SHIFT={shift}", '"alpha": 0.5', "--host 127.0.0.1", "--port 8000",
        "--allowed-media-domains none.invalid", '"image": 4, "video": 0, "audio": 0',
        "cmrm.engines.vllm.http.Middleware", "VLLM_MEDIA_URL_ALLOW_REDIRECTS=0",
        "vllm.entrypoints.openai.api_server",
    ):  # fmt: skip
        assert words in text, words
    assert "trust" not in text
    more = flat(output(
        "serve", checkpoint, "--shift", shift, "--host", "0.0.0.0", "--api-key", "a long secret",
        "--image-domains", "a.org,b.org", "--max-images", 1, "--name", "mine", "--dry-run",
        "--", "--max-model-len", "1024",
    ))  # fmt: skip
    assert "a long secret" not in more
    assert "VLLM_API_KEY=***" in more
    assert "--allowed-media-domains a.org b.org" in more
    assert "--served-model-name mine" in more
    assert more.endswith("--max-model-len 1024")


def test_what_is_refused(checkpoint: str, shift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ("serve", checkpoint, "--shift", shift, "--dry-run")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert "can be reached from other machines" in refused(*base, "--host", host)
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        output(*base, "--host", host)
    assert "fewer than 8" in refused(*base, "--api-key", "short")
    assert "ASCII" in refused(*base, "--api-key", "cl\u00e9-s\u00e9curis\u00e9e")
    assert "within 1..65535" in refused(*base, "--port", 0)
    assert "at least 1" in refused(*base, "--max-images", 0)
    assert "names nothing" in refused(*base, "--image-domains", " ")
    assert "alpha is 0" in refused(*base, "--alpha", 0)
    assert "no gate" in refused(*base, "--gate")
    for option in ("--trust-remote-code", "--host=0.0.0.0", "--speculative_config", "--api-key"):
        assert "is set by `cmrm serve`" in refused(*base, "--", option)
    assert "belongs to the model `demo` alone" in refused("serve", checkpoint, "--shift", "demo")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "tools/vllm_env.sh" in refused("serve", checkpoint, "--shift", shift)


def test_names_of_towers(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setenv("CMRM_CACHE", str(tmp_path / "cache"))
    copy = readable_by_vllm(Path(checkpoint))
    assert copy != Path(checkpoint)
    assert readable_by_vllm(Path(checkpoint)) == copy
    assert readable_by_vllm(copy) == copy, "nothing to rename is left"
    before = load_file(Path(checkpoint) / "model.safetensors")
    after = load_file(copy / "model.safetensors")
    towers = [name for name in after if name.startswith("vision_tower.")]
    assert towers
    assert all(name.startswith("vision_tower.vision_model.") for name in towers)
    assert len(after) == len(before)
    for name, tensor in after.items():
        old = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
        assert torch.equal(tensor, before[old])


def test_the_plugin_reads_its_environment(shift: Path) -> None:
    program, _ = program_of({"CMRM_SHIFT": str(shift)})
    assert program.key == Program.of(ShiftVectors.load(shift)).key
    for text, message in (
        ("{", "is no JSON"),
        ('{"alpha": -1}', "never removes"),
        ("[]", "no JSON object"),
    ):
        with pytest.raises(InputError, match=message):
            program_of({"CMRM_SHIFT": str(shift), "CMRM_STEERING": text})
    with pytest.raises(ArtifactError):
        program_of({"CMRM_SHIFT": str(shift) + ".none"})


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    fake = ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for version, good in (("0.32.0", True), ("0.31.9", False), ("0.33.0", False), ("1.0", False)):
        fake.__version__ = version  # type: ignore[attr-defined]
        if good:
            assert patches.check_version() == version
        else:
            with pytest.raises(InputError, match="is not tested with cmrm"):
                patches.check_version()
    fake.__version__ = "0.32.0"  # type: ignore[attr-defined]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(InputError, match="is not armed"):
        patches.check_version()


def test_another_engine_has_options_of_its_own(checkpoint: str, shift: Path) -> None:
    base = ("serve", checkpoint, "--shift", shift, "--engine")
    assert "one of vllm, transformers" in refused(*base, "sglang")
    for more in (("--dry-run",), ("--image-domains", "a.org"), ("--", "--max-model-len", "9")):
        assert "goes with --engine vllm alone" in refused(*base, "transformers", *more)
    for more in (("--dtype", "float32"), ("--device-map", "auto")):
        assert "goes with --engine transformers alone" in refused(*base, "vllm", *more)
    assert "can be reached" in refused(*base, "transformers", "--host", "0.0.0.0")
    assert "dtype is" in refused(*base, "transformers", "--dtype", "int3")
    assert "belongs to the model `demo` alone" in refused(
        "serve", checkpoint, "--shift", "demo", "--engine", "transformers"
    )


def test_transformers_server_needs_its_extra(
    checkpoint: str, shift: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("serve", checkpoint, "--shift", shift, "--engine", "transformers")
    assert "cmrm[serve]" in message


def test_transformers_server_from_start_to_end(checkpoint: str, artifact: Path) -> None:
    """It says where it serves, answers, refuses a port in use, and ends on SIGTERM."""
    pytest.importorskip("uvicorn", reason="transformers' server needs the extra `serve`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        assert "cannot be used" in refused(
            "serve", checkpoint, "--shift", artifact, "--engine", "transformers", "--port", port
        )
    command = [
        sys.executable, "-m", "cmrm", "serve", checkpoint, "--shift", str(artifact), "--engine",
        "transformers", "--port", str(port), "--name", "tiny",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "serving tiny" in line)
        assert f"http://127.0.0.1:{port}/v1" in line
        body = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 3}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        for attempt in range(100):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    told = json.load(answer)["cmrm"]
                break
            except urllib.error.URLError:
                assert attempt < 99
                time.sleep(0.1)
        assert told == {"steered_tokens": 0, "gate_open": None}
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
