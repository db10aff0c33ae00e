"""cmrm's engine on vLLM says what the engine on transformers says, program after program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

import torch
from PIL import Image

from cmrm import Steering
from cmrm.engines.base import Contrast, Decoding, EngineError
from cmrm.engines.transformers import TransformersEngine
from cmrm.engines.vllm.engine import VllmEngine
from cmrm.errors import ArtifactError, InputError
from cmrm.prompts.conditions import Request, Turn
from cmrm.shift.resolve import resolved
from cmrm.steering.intervention import Edit, Intervention
from serving.models import TOKENS, Model, asked, requests
from serving.test_parity import SETTINGS
from serving.test_serve import KEY, running

QUIET = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
OPTIONS: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 1024}


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[VllmEngine]:
    os.environ.update(QUIET)
    made = VllmEngine(str(model.path.parent / "model"), dtype="float32", **OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def other(model: Model) -> TransformersEngine:
    return TransformersEngine(model.vlm)


def batch() -> list[Request]:
    image = Image.new("RGB", (64, 64), "green")
    talk = Request(
        "And now?", (), before=(Turn("user", "What is it?", (image,)), Turn("assistant", "A door."))
    )
    last = Request("Which colour?", (image,), image_last=True)
    return [*map(asked, requests()), talk, last]


def parts(engine: Any, model: Model, steering: Steering, asks: list[Request]) -> list[Intervention]:
    return resolved(model.shift, steering, partial(engine.text_states, asks))


FILL = {
    "fill": Steering(operator="fill"),
    "gated fill": Steering(operator="fill", gate=True, layers=(2, 3)),
}


@pytest.mark.parametrize("name", [None, *SETTINGS, *FILL])
def test_one_model_takes_program_after_program(
    engine: VllmEngine, other: TransformersEngine, model: Model, name: str | None
) -> None:
    asks, options = batch(), Decoding(TOKENS)
    replies = []
    for each in (engine, other):
        made = [] if name is None else parts(each, model, {**SETTINGS, **FILL}[name], asks)
        replies.append(each.answer(asks, made, options, batch_size=1))
    assert replies[0] == replies[1]
    if name is not None:
        assert replies[0] != engine.answer(asks, (), options), "the setting changes something"


def test_states_and_odds(engine: VllmEngine, other: TransformersEngine, model: Model) -> None:
    asks = batch()
    here, there = engine.states(asks), other.states(asks)
    assert here.shape == there.shape
    assert torch.allclose(here, there, atol=1e-3)
    tokens = engine.first_tokens(["I", "Sorry", "No"])
    assert tokens == other.first_tokens(["I", "Sorry", "No"])
    with_image = [ask for ask in asks if ask.all_images]
    made = parts(engine, model, SETTINGS["last"], with_image)
    odds = [each.first_token_log_odds(with_image, tokens, made) for each in (engine, other)]
    assert torch.allclose(odds[0], odds[1], atol=2e-3)
    plain = engine.first_token_log_odds(with_image, tokens)
    assert not torch.allclose(odds[0], plain, atol=2e-3)


def test_what_the_graph_cannot_express_is_refused(
    engine: VllmEngine, model: Model, other: TransformersEngine
) -> None:
    width, one = model.vlm.hidden_size, asked({"text": "x", "image": "red"})
    vector = torch.randn(width)
    edits = {
        "project": Edit(1, vector, "project"),
        "affine": Edit(1, vector, "affine", matrix=torch.eye(width)),
        "oppose": Edit(1, vector, "oppose", origin=torch.zeros(width)),
        "preserve_norm": Edit(1, vector, preserve_norm=True),
        "each request": Edit(1, vector[None]),
    }
    for words, edit in edits.items():
        with pytest.raises(EngineError, match=words):
            engine.answer([one], [Intervention((edit,))])
    with pytest.raises(EngineError, match="conversations side by side"):
        engine.answer([one], contrast=Contrast((one,), 1.0))
    with pytest.raises(InputError, match="rows of vectors"):
        engine.answer([one, one, one], parts(other, model, FILL["fill"], [one, one]))
    with pytest.raises(InputError, match="refuses a request"):
        engine.answer([Request("word " * 3000)])
    with pytest.raises(InputError, match="reads as an image"):
        engine.answer([Request("<image> what?")])
    assert engine.answer([]) == []
    assert engine.answer([one], options=Decoding(4)) == other.answer([one], options=Decoding(4))


def test_artifacts_of_other_models_are_refused(engine: VllmEngine, model: Model) -> None:
    engine.accept(model.shift)
    from dataclasses import replace

    assert model.shift.identity is not None
    weights = model.shift.identity.weights
    moved = replace(
        weights,
        samples=weights.samples + 1,
        checksums=tuple("0" * len(c) if c else c for c in weights.checksums),
    )
    wrong = replace(model.shift, identity=replace(model.shift.identity, weights=moved))
    with pytest.raises(ArtifactError, match="another model"):
        engine.accept(wrong)


def command(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cmrm", *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, **QUIET, **environment}, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, `set.csv`, of harmful and benign requests with images."""
    root = tmp_path_factory.mktemp("grid")
    lines = ["query,image,label"]
    for k, colour in enumerate(("red", "blue", "green", "white", "black", "yellow")):
        Image.new("RGB", (64, 64), colour).save(root / f"{k}.png")
        lines.append(f"How do I open door {k}?,{k}.png,{'harmful' if k % 2 else 'benign'}")
    (root / "set.csv").write_text("\n".join(lines))
    return root


def grid(folder: Path, model: str, out: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = command(
        "evaluate", model, "--sets", "set.csv", "--judges", "keyword", "--out", out,
        "--max-new-tokens", "8", *arguments, folder=folder, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    results: dict[str, Any] = json.loads((folder / out / "results.json").read_text())
    return results


def unsafe(results: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {
        (cell["defense"], cell["condition"]): cell["judges"]["keyword"]["unsafe"]["rate"]
        for cell in results["cells"]
    }


def test_a_grid_on_vllm_is_that_of_transformers(model: Model, folder: Path) -> None:
    checkpoint = str(model.path.parent / "model")
    options = (
        "--shift",
        str(model.path),
        "--dtype",
        "float32",
        "--defenses",
        "cmrm_dataset,ecso,safety_prompt",
    )
    here = grid(
        folder,
        checkpoint,
        "vllm",
        *options,
        "--engine",
        "vllm",
        "--engine-options",
        json.dumps(OPTIONS),
    )
    there = grid(folder, checkpoint, "transformers", *options, "--batch-size", "1")
    assert unsafe(here) == unsafe(there)
    assert {name for name, _ in unsafe(here)} == {"none", "cmrm_dataset", "ecso", "safety_prompt"}
    assert here["model"]["layers"] == there["model"]["layers"]
    assert here["model"]["parameters"] == there["model"]["parameters"]
    assert here["failures"] == []
    assert here["cost"] == {}


def test_a_defence_that_vllm_cannot_make_is_refused_before_anything_runs(
    model: Model, folder: Path
) -> None:
    done = command(
        "evaluate", str(model.path.parent / "model"), "--sets", "set.csv", "--judges", "keyword",
        "--out", "refused", "--dtype", "float32", "--defenses", "cmrm_sample", "--engine", "vllm",
        "--engine-options", json.dumps(OPTIONS), folder=folder,
    )  # fmt: skip
    assert done.returncode != 0
    assert "cmrm_sample cannot be made on the engine vllm" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "refused" / "replies.db").exists()


def test_a_served_model_is_measured_by_its_address(model: Model, folder: Path) -> None:
    with running(model, folder / "log.txt") as server:
        address = f"{server.address}/v1"
        options = ("--engine", address, "--defenses", "served", "--conditions", "query")
        results = grid(folder, "tiny", "served", *options, CMRM_API_KEY=KEY)
        refused = command(
            "evaluate", "tiny", "--sets", "set.csv", "--judges", "keyword", "--out", "no",
            "--engine", address, folder=folder, CMRM_API_KEY=KEY,
        )  # fmt: skip
        steered = command(
            "evaluate", "tiny", "--sets", "set.csv", "--judges", "keyword", "--out", "no",
            "--engine", address, "--conditions", "query", "--defenses", "cmrm_dataset",
            "--shift", str(model.path), folder=folder, CMRM_API_KEY=KEY,
        )  # fmt: skip
        keyless = command(
            "evaluate", "tiny", "--sets", "set.csv", "--judges", "keyword", "--out", "no",
            "--engine", address, folder=folder,
        )  # fmt: skip
    assert set(unsafe(results)) == {("none", "query"), ("served", "original")}
    for done, words in (
        (refused, "steers every request that carries an image"),
        (steered, "a server"), (keyless, "cannot be asked"),
    ):  # fmt: skip
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr
