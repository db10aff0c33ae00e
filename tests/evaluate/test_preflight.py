"""What is looked at before a run starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm import Sample
from cmrm.evaluate import preflight as module
from cmrm.evaluate import weights as weights_module
from cmrm.evaluate.plan import Plan
from cmrm.evaluate.preflight import preflight, time_a_batch
from cmrm.evaluate.weights import Finding, Weights, free_memory, model_findings, weights_of
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Condition
from evaluate.plans import picture, small_plan

pytestmark = pytest.mark.usefixtures("no_models_left")


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_dry_run_starts_nothing(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time_a_batch", lambda plan: (2.0, 4))
    monkeypatch.setattr(weights_module, "free_memory", lambda device_map: ("CPU", 10**12))
    plan = small_plan(checkpoint)
    out = tmp_path / "out"
    findings = by_subject(preflight(plan, out))
    assert all(finding.good for finding in findings.values())
    assert f"{plan.replies()} replies" in findings["cells"].text
    assert findings["time"].text.startswith(f"about {plan.replies() / 2:.0f} s of generation")
    assert not out.exists()
    assert "3 harmful, 3 benign" in findings["anchors"].text
    without = by_subject(preflight(replace(plan, anchors=None), out))["anchors"]
    assert without.good is False
    assert "cmrm_dataset has to be fitted" in without.text


def test_a_model_that_does_not_answer_or_does_not_fit(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: Plan) -> tuple[float, int]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(module, "time_a_batch", broken)
    plan = small_plan(checkpoint)
    failed = by_subject(preflight(plan, tmp_path / "out"))["time"]
    assert (failed.good, "no kernel image" in failed.text) == (False, True)
    monkeypatch.setattr(weights_module, "free_memory", lambda device_map: ("CPU", 10))
    short = by_subject(preflight(plan, tmp_path / "out"))
    assert short["memory"].good is False
    assert short["time"].good is None, "a model that does not fit is not loaded to be timed"


def test_the_time_is_that_of_a_real_batch(checkpoint: str) -> None:
    samples = [Sample(f"h{k}", f"How {k}?", picture("red"), label="harmful") for k in range(3)]
    ticks = iter([10.0, 14.0])
    plan = small_plan(checkpoint, sets=(Loaded("mine", tuple(samples)),), max_new_tokens=2)
    assert time_a_batch(plan, clock=lambda: next(ticks)) == (4.0, 2)


def test_cells_that_cannot_be_asked_are_named(checkpoint: str, tmp_path: Path) -> None:
    text = Loaded("text", (Sample("s", "How?", label="harmful"),))
    plan = small_plan(checkpoint, sets=(text,), defenses=(), batch_size=1)
    assert "text under original" in by_subject(preflight(plan, tmp_path / "o"))["cells"].text
    blind = replace(plan, conditions=(Condition.ORIGINAL,))
    findings = by_subject(preflight(blind, tmp_path / "o"))
    assert (findings["cells"].good, findings["time"].good) == (False, None)


def test_a_folder_that_is_a_file(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    findings = by_subject(preflight(small_plan(checkpoint), tmp_path / "out"))
    assert findings["--out"].good is False


def test_a_registered_models_weights_come_from_its_owner(tmp_path: Path) -> None:
    seen = Weights(300, False, Finding("model demo", True, "will be fetched"))
    model, findings = model_findings("demo", ["keyword"], registered=seen)
    assert model is seen
    assert findings[0] is seen.finding


def test_weights_on_disk(checkpoint: str, tmp_path: Path) -> None:
    whole = weights_of(checkpoint, "model")
    assert whole.local
    assert whole.finding.good
    assert whole.size == (Path(checkpoint) / "model.safetensors").stat().st_size
    (tmp_path / "empty").mkdir()
    empty = weights_of(str(tmp_path / "empty"), "model").finding
    assert empty.text.endswith("name the folder of a checkpoint")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text("{}")
    index = json.dumps({"weight_map": {"a": "one.safetensors"}})
    (torn / "model.safetensors.index.json").write_text(index)
    missing = weights_of(str(torn), "judge")
    assert (missing.finding.good, missing.size) == (False, None)
    assert "one.safetensors missing" in missing.finding.text
    (torn / "model.safetensors.index.json").write_text("[]")
    assert "a readable model" in weights_of(str(torn), "judge").finding.text
    strange = weights_of("no such/thing at all", "model").finding
    assert strange.good is False
    assert "neither a folder here nor a hub id" in strange.text


@pytest.mark.parametrize(
    "error", [OSError("offline mode is enabled"), Exception("ConnectError of some client")]
)
def test_a_hub_that_cannot_be_asked_does_not_make_a_model_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from huggingface_hub import HfApi

    def offline(self: HfApi, *arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "model_info", offline)
    weights = weights_of("llava-hf/llava-1.5-7b-hf", "model")
    assert (weights.finding.good, weights.local) == (None, False)
    judges = ["keyword", "chat:meta-llama/Meta-Llama-3-8B-Instruct"]
    _, findings = model_findings("llava-hf/llava-1.5-7b-hf", judges)
    assert [finding.subject for finding in findings] == [
        "model llava-hf/llava-1.5-7b-hf", "judge meta-llama/Meta-Llama-3-8B-Instruct", "memory",
    ]  # fmt: skip
    assert findings[-1].good is None


def test_hub_sizes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    files = [
        ("model-1.safetensors", 9 * 10**9), ("model-2.safetensors", 5 * 10**9),
        ("pytorch_model.bin", 14 * 10**9), ("onnx/model.safetensors", 10**9),
    ]  # fmt: skip
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files]

    def answer(gated: object) -> Any:
        info = SimpleNamespace(gated=gated, siblings=siblings)
        return lambda self, *arguments, **options: info

    monkeypatch.setattr(HfApi, "model_info", answer(False))
    weights = weights_of("somebody/model", "model")
    assert (weights.size, weights.local, weights.finding.good) == (14 * 10**9, False, True)
    monkeypatch.setattr(weights_module, "_may_read", lambda source: False)
    monkeypatch.setattr(HfApi, "model_info", answer("manual"))
    assert "gated" in weights_of("somebody/model", "model").finding.text


def test_free_memory_is_that_of_the_machine() -> None:
    device, free = free_memory(None)
    assert device == "CPU"
    assert free > 0
