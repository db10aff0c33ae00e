"""The rule that chooses the demo's steering setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cmrm.demo.settings import DATASET_STEERING, QUICK, SAMPLE_STEERING
from cmrm.demo.train import tune
from cmrm.demo.train import tune_gate as gate_module
from cmrm.demo.train.tune import Candidate, Level, Result, candidates, choose
from cmrm.demo.train.tune_gate import GateResult, choose_false_alarms
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.vlm import wrap_vlm
from cmrm.prompts.ours import prompt_samples
from cmrm.steering.setting import Steering
from tiny import tiny_model


def result(
    level: Level, alpha: float, unsafe: float | None, over: float, accuracy: float
) -> Result:
    return Result(Candidate(level, "pca", Steering(alpha)), unsafe, over, accuracy)


RESULTS = [
    result("none", 0, 0.8, 0.0, 0.9),
    result("dataset", 0.5, 0.4, 0.02, 0.9),
    result("dataset", 1.0, 0.2, 0.04, 0.88),
    result("dataset", 1.5, 0.1, 0.20, 0.88),
    result("dataset", 2.0, 0.0, 0.04, 0.50),
    result("dataset", 2.5, None, 0.04, 0.88),
    result("sample", 1.0, 0.0, 0.5, 0.1),
]


def test_the_choice_stays_within_the_cost() -> None:
    assert choose(RESULTS, "dataset") == RESULTS[2]


def test_over_refusal_may_be_compared_with_that_of_text() -> None:
    assert choose(RESULTS, "dataset", over_refusal_base=0.18) == RESULTS[3]


def test_nothing_is_chosen_where_every_candidate_costs_too_much() -> None:
    assert choose(RESULTS, "sample") is None


def test_equal_unsafe_rates_are_decided_by_the_lowest_alpha() -> None:
    weaker = result("dataset", 0.7, 0.2, 0.04, 0.88)
    assert choose([*RESULTS, weaker], "dataset") == weaker


def gated(share: float, unsafe: float, over_refusal: float) -> GateResult:
    return GateResult("gated", False, share, unsafe, over_refusal)


def test_the_gate_is_chosen_within_its_cost() -> None:
    untouched = GateResult("none", False, None, 0.5, 0.02)
    cheap, best, dear = gated(0.05, 0.3, 0.02), gated(0.1, 0.2, 0.05), gated(0.2, 0.1, 0.06)
    assert choose_false_alarms([untouched, cheap, best, dear]) == best
    assert choose_false_alarms([untouched, dear]) is None


def test_equal_gaps_are_decided_by_the_fewer_false_alarms() -> None:
    untouched = GateResult("none", False, None, 0.5, 0.02)
    assert choose_false_alarms([untouched, gated(0.2, 0.2, 0.02), gated(0.1, 0.2, 0.04)]) == gated(
        0.1, 0.2, 0.04
    )


def test_the_settings_of_the_demo_are_among_the_candidates() -> None:
    measured = [(c.level, c.steering) for c in candidates()]
    assert ("dataset", DATASET_STEERING) in measured
    assert ("sample", SAMPLE_STEERING) in measured


def test_no_candidate_is_measured_twice() -> None:
    measured = candidates()
    assert len(set(measured)) == len(measured)


def test_the_whole_choice_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: object
) -> None:
    """Every level is measured, by the loop that the demo measures with; a second run is free."""
    few = [
        Candidate("none", "pca", Steering(0.0)),
        Candidate("dataset", "mean", Steering(0.2)),
        Candidate("sample", "pca", Steering(0.1)),
    ]
    vlm = wrap_vlm(tiny_model(), processor)
    monkeypatch.setattr(tune, "candidates", lambda: few)
    monkeypatch.setattr(tune, "load_demo", lambda: vlm)
    monkeypatch.setattr(tune, "QUICK", replace(QUICK, max_new_tokens=2))
    monkeypatch.setattr(tune, "QUESTIONS", 8)
    anchors = {label: prompt_samples("anchor", label)[:6] for label in ("harmful", "benign")}
    monkeypatch.setattr(tune, "prompt_samples", lambda split, label: anchors[label])
    more = {label: prompt_samples("anchor", label)[:24] for label in ("harmful", "benign")}
    monkeypatch.setattr(gate_module, "prompt_samples", lambda split, label: more[label])
    monkeypatch.setattr(gate_module, "FOLDS", 2)
    monkeypatch.setattr(gate_module, "RATES", (0.05, 0.3))
    lines: list[str] = []
    rows = tune.tune_demo(tmp_path, say=lines.append)
    assert [row["level"] for row in rows[:3]] == ["none", "dataset", "sample"]
    assert [row["name"] for row in rows[3:]] == ["text", "none", "fill", *4 * ["gated"]]
    assert [row["mixed"] for row in rows[6:]] == [False, False, True, True]
    assert lines[-1].startswith("chosen: ")
    assert rows[1]["estimator"] == "mean"
    assert all(0 <= row["accuracy"] <= 1 for row in rows[:3])
    assert (tmp_path / "tries.json").exists()
    assert "anchor split, query alone" in lines[0]

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a reply was generated again")

    monkeypatch.setattr(TransformersEngine, "answer", never)
    assert tune.tune_demo(tmp_path, say=lines.append) == rows
