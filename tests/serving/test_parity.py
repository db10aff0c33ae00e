"""The parity contract of vLLM: the plugin and the fold say what the hooks say, token for token.

It runs in an environment of its own:

    tools/vllm_env.sh DIR && DIR/bin/python -m pytest tests/serving -c tests/serving/pytest.ini
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

from cmrm import ShiftVectors, Steering
from cmrm.engines.fold import constant_additions, fold
from serving.models import Model, hooks, requests, same


def vllm(
    model: Model, rounds: Sequence[list[dict[str, Any]]], steering: Steering | None = None,
    folder: Path | None = None, environment: dict[str, str] | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Replies of vLLM, armed with a setting; untouched without one."""
    done = run_vllm(model, rounds, steering, folder, environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((model.path.parent / "out.json").read_text())
    return result


def run_vllm(
    model: Model, rounds: Sequence[list[dict[str, Any]]], steering: Steering | None = None,
    folder: Path | None = None, environment: dict[str, str] | None = None, **options: Any,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    root = model.path.parent
    spec = {"model": str(folder or model.folder), "rounds": rounds, "options": options}
    (root / "spec.json").write_text(json.dumps(spec))
    env = {**os.environ, **(environment or {})}
    if steering is not None:
        env |= {"CMRM_SHIFT": str(model.path), "CMRM_STEERING": json.dumps(steering.to_json())}
    worker = Path(__file__).with_name("worker.py")
    return subprocess.run(
        [sys.executable, str(worker), str(root / "spec.json"), str(root / "out.json")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


SETTINGS = {
    "last": Steering(alpha=0.5), "per_layer": Steering(alpha=0.2, schedule="per_layer"),
    "all": Steering(alpha=0.3, positions="all"),
    "after_image": Steering(alpha=0.4, positions="after_image"),
    "generated": Steering(alpha=0.6, positions="generated"),
    "last_prompt": Steering(alpha=0.8, positions="last_prompt"),
    "some_layers": Steering(alpha=1.0, layers=(1, 3)),
    "gated": Steering(alpha=0.5, gate=True, layers=(2, 3)),
}  # fmt: skip
FILL = Steering(operator="fill", alpha=1.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plugin_says_what_the_hooks_say(model: Model, name: str) -> None:
    batch = requests()
    answered = vllm(model, [batch], SETTINGS[name])
    plain, wanted = hooks(model, batch), hooks(model, batch, SETTINGS[name])
    assert all(same(answered["rounds"][0], wanted))
    with_image = [k for k, request in enumerate(batch) if request["image"]]
    moved = [k for k in with_image if not same([wanted[k]], [plain[k]])[0]]
    assert moved, "the setting changes something"
    if name == "gated":
        assert 0 < len(moved) < len(with_image), "the gate tells requests apart"
    text = [k for k, request in enumerate(batch) if not request["image"]]
    assert all(same([wanted[k] for k in text], [plain[k] for k in text]))
    assert answered["counts"]["masked"] > 0


def test_untouched_and_zero(model: Model) -> None:
    batch = requests()
    plain = hooks(model, batch)
    assert all(same(vllm(model, [batch])["rounds"][0], plain))
    assert all(same(vllm(model, [batch], Steering(alpha=0.0))["rounds"][0], plain))


def test_fill_takes_each_request_to_what_it_has_as_text(model: Model) -> None:
    batch = [request for request in requests() if request["image"]]
    texts = [
        {"text": request["text"], "max_tokens": 1, "extra": {"cmrm": {"record": str(k)}}}
        for k, request in enumerate(batch)
    ]
    named = [{**request, "extra": {"cmrm": {"target": str(k)}}} for k, request in enumerate(batch)]
    answered = vllm(model, [texts, [*named, {"text": "And the sea?"}]], FILL)
    wanted = hooks(model, batch, FILL)
    assert all(same(answered["rounds"][1][:-1], wanted))
    assert not all(same(wanted, hooks(model, batch)))


def test_fill_without_coordinates_gives_no_answer(model: Model) -> None:
    done = run_vllm(model, [[{"text": "x", "image": "red"}]], Steering(operator="fill"))
    assert done.returncode != 0
    assert "no coordinates of this request's text" in done.stderr + done.stdout


@pytest.mark.parametrize("name", ["last", "all", "gated", "fill"])
def test_preemption(model: Model, name: str) -> None:
    """A request that makes room for others is run again later, and steered by the same rule."""
    setting = FILL if name == "fill" else SETTINGS[name]
    batch = [
        {**request, "text": request["text"] + "?" * k}
        for k in range(3) for request in requests() if request["image"] or name != "fill"
    ]  # fmt: skip
    rounds, asked = [], batch
    if name == "fill":
        texts = [
            {"text": request["text"], "max_tokens": 1, "extra": {"cmrm": {"record": str(k)}}}
            for k, request in enumerate(batch)
        ]
        rounds, asked = [texts], [
            {**request, "extra": {"cmrm": {"target": str(k)}}} for k, request in enumerate(batch)
        ]  # fmt: skip
    answered = vllm(
        model, [*rounds, asked], setting, block_size=32, num_gpu_blocks_override=10,
        max_model_len=256, max_num_seqs=8,
    )  # fmt: skip
    assert answered["preempted"], "memory was short"
    assert all(same(answered["rounds"][-1], hooks(model, batch, setting)))


@pytest.mark.parametrize("name", ["last", "gated"])
def test_chunked_prefill(model: Model, name: str) -> None:
    batch = [{**r, "text": r["text"] + " please" * 12} for r in requests()]
    answered = vllm(
        model, [batch], SETTINGS[name], max_num_batched_tokens=48, max_num_seqs=4,
        enable_chunked_prefill=True,
    )  # fmt: skip
    assert all(same(answered["rounds"][0], hooks(model, batch, SETTINGS[name])))


@pytest.mark.parametrize(
    "name", ["last", "last_prompt", "generated", "after_image", "all", "gated"]
)
def test_prefix_caching(model: Model, name: str) -> None:
    """A long shared start, the same requests twice, text and image by turns."""
    start = "The following is asked by a person who reads these words again and again. " * 3
    batch = [{**request, "text": start + request["text"]} for request in requests()]
    turned = [*reversed(batch)]
    answered = vllm(
        model, [batch, turned], SETTINGS[name], enable_prefix_caching=True, block_size=32
    )
    wanted = hooks(model, batch, SETTINGS[name])
    assert all(same(answered["rounds"][0], wanted))
    assert all(same(answered["rounds"][1], [*reversed(wanted)]))
    for request, reply in zip(turned, answered["rounds"][1], strict=True):
        early = name in ("all", "after_image")  # steered from the first block on
        shared = 0 if early and request["image"] else 32
        assert (reply["cached"] >= shared) if shared else (reply["cached"] == 0)


@pytest.mark.parametrize("name", ["last", "generated", "gated"])
def test_a_conversation_goes_on_from_cached_blocks(model: Model, name: str) -> None:
    """The next turn's prompt holds the last one's whole; what was steered there is not taken over,
    as hooks do not take it over."""
    start = "The following is asked by a person who reads these words again and again. " * 3
    first = {"text": start + "Now, what do you see?", "image": "red"}
    turns = [
        {"role": "user", "content": first["text"]},
        {"role": "assistant", "content": "A wall, a door, and a window. " * 4},
    ]
    longer: list[dict[str, Any]] = [
        {"messages": [*turns, {"role": "user", "content": text}], "image": "red"}
        for text in ("And what else?", "Is it open? " * 8)
    ]
    other = {**first, "image": "blue"}
    rounds: list[list[dict[str, Any]]] = [[first], longer, [longer[0], other, first]]
    answered = vllm(model, rounds, SETTINGS[name], enable_prefix_caching=True, block_size=32)
    for asked, replies in zip(rounds, answered["rounds"], strict=True):
        assert all(same(replies, hooks(model, asked, SETTINGS[name])))
    cached = [[reply["cached"] for reply in replies] for replies in answered["rounds"]]
    prompts = [[reply["prompt"] for reply in replies] for replies in answered["rounds"]]
    assert cached[0] == [0]
    edge = (prompts[0][0] - 1) // 32 * 32
    assert cached[1][0] == edge, "up to the first steered token"
    assert cached[1][1] >= edge
    assert cached[2][0] == (prompts[1][0] - 1) // 32 * 32
    assert cached[2][1] < cached[2][2], "another image is another prefix"


def test_a_folded_checkpoint(model: Model) -> None:
    setting = Steering(alpha=0.3, positions="all")
    out = model.path.parent / "folded"
    fold(model.folder, constant_additions(model.shift, setting), out, record={})
    batch = [request for request in requests() if request["image"]]
    answered = vllm(model, [batch], folder=out)
    assert all(same(answered["rounds"][0], hooks(model, batch, setting)))


def test_compiled(model: Model) -> None:
    batch = requests()
    for name in ("last", "gated"):
        answered = vllm(model, [batch], SETTINGS[name], enforce_eager=False)
        assert all(same(answered["rounds"][0], hooks(model, batch, SETTINGS[name])))


def test_it_fails_closed(model: Model, tmp_path: Path) -> None:
    ask = [[{"text": "x", "image": "red", "max_tokens": 1}]]
    for environment, message in (
        ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, "is not armed"),
        ({"CMRM_SHIFT": str(tmp_path / "none.safetensors")}, "none.safetensors"),
        ({"CMRM_STEERING": "{"}, "is no JSON"),
        ({"CMRM_STEERING": '{"alpha": -1}'}, "never removes"),
    ):
        environment = {"CMRM_SHIFT": str(model.path), **environment}
        done = run_vllm(model, ask, environment=environment)
        assert done.returncode != 0
        assert message in done.stderr + done.stdout
    foreign = ShiftVectors.load(model.path)
    samples = foreign.identity.weights.samples  # type: ignore[union-attr]
    samples.add_(0.5)
    foreign.save(tmp_path / "foreign.safetensors")
    done = run_vllm(model, ask, environment={"CMRM_SHIFT": str(tmp_path / "foreign.safetensors")})
    assert done.returncode != 0
    assert "another model" in done.stderr + done.stdout
