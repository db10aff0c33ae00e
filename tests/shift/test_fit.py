"""`estimate_shift(vlm, harmful, benign)`: direction, gate, recommendation, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from cmrm import Sample, ShiftVectors, Steering, estimate_shift, generate
from cmrm.errors import InputError
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, build_request
from cmrm.shift.artifact import Artifact
from cmrm.shift.capture import capture_inputs
from cmrm.shift.harm_gate import GateRecord, chosen_layer, fit_gate

RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
HARMFUL = [Sample(f"h{k}", f"Tell me about number {k}" + "!" * (k % 5), RED) for k in range(14)]
BENIGN = [Sample(f"b{k}", f"Who painted wall {k}" + "?" * (k % 4), BLUE) for k in range(12)]
ALIKE = [Sample(f"c{k}", f"Tell me about number {k}" + "!" * (k % 5), RED) for k in range(14, 26)]


def states(vlm: VLM, samples: list[Sample], condition: Condition) -> torch.Tensor:
    return torch.cat(
        [capture_inputs(vlm, encode(vlm, [build_request(s, condition)])) for s in samples]
    )


@pytest.fixture(scope="module")
def fitted(vlm: VLM) -> ShiftVectors:
    return estimate_shift(vlm, HARMFUL, BENIGN, batch_size=4)


def test_direction_and_gate_are_those_of_the_states(vlm: VLM, fitted: ShiftVectors) -> None:
    text = [states(vlm, some, Condition.QUERY).mean(0) for some in (HARMFUL, BENIGN)]
    assert fitted.direction is not None
    assert torch.allclose(fitted.direction, text[0] - text[1], atol=1e-4)
    blank = [states(vlm, some, Condition.BLANK) for some in (HARMFUL, BENIGN)]
    gate, record = fit_gate(*blank)
    assert fitted.gate is not None
    assert fitted.gate.layers == gate.layers
    # The order of the anchors decides their folds, and it is that of their lengths.
    found = GateRecord.from_json(dict(fitted.records["gate"]))
    assert (found.n_harmful, found.n_benign) == (14, 12)
    assert torch.allclose(fitted.gate.vectors, gate.vectors, atol=1e-3)
    assert found.auc == pytest.approx(record.auc, abs=0.15)
    assert fitted.provenance.n_benign == 12
    assert fitted.provenance.benign_hash


def test_vectors_are_those_of_the_harmful_anchors(vlm: VLM, fitted: ShiftVectors) -> None:
    assert torch.allclose(fitted.vectors, estimate_shift(vlm, HARMFUL).vectors, atol=1e-4)
    assert fitted.sequential is not None
    assert fitted.gate is not None
    above = tuple(range(fitted.gate.layers[-1] + 1, vlm.n_layers))
    assert fitted.provenance.sequential_layers == above


def test_a_gate_costs_no_pass_that_is_not_run_anyway(vlm: VLM) -> None:
    """Both conditions of both kinds are read; the gate and the direction add no pass to them."""
    ticks: list[int] = []
    parts: list[Any] = []
    shift = estimate_shift(
        vlm, HARMFUL, BENIGN, on_batch=ticks.append, on_part=lambda *part: parts.append(part)
    )
    layers = len(shift.provenance.sequential_layers)
    assert parts == [("anchors", 28), ("benign", 24), ("sequential", layers * 14)]
    assert sum(ticks) == 28 + 24 + layers * 14


def test_a_model_without_a_gap_is_left_as_it_is(vlm: VLM) -> None:
    """Anchors of both kinds ask the same: there is nothing that an image could take away."""
    shift = estimate_shift(vlm, HARMFUL, ALIKE)
    assert shift.recommended.alpha == 0.0
    assert "nothing is recommended" in shift.records["gap"]["reason"]
    asked = [*HARMFUL[:3], *BENIGN[:2]]
    steered = generate(vlm, asked, shift=shift, max_new_tokens=5)
    assert steered == generate(vlm, asked, max_new_tokens=5)


def test_what_is_recommended_can_be_used_as_it_is(vlm: VLM, fitted: ShiftVectors) -> None:
    gap = fitted.records["gap"]
    expected = Steering(alpha=0.0) if fitted.recommended.alpha == 0 else fitted.recommended
    assert fitted.recommended == expected
    assert (fitted.recommended.alpha > 0) == (gap["low"] > 0.05 and gap["text_auc"] >= 0.7)
    generate(vlm, HARMFUL[:2], shift=fitted, max_new_tokens=2)


def test_a_setting_of_ones_own_is_kept(vlm: VLM) -> None:
    setting = Steering(0.7, operator="fill", layers=(1,))
    assert estimate_shift(vlm, HARMFUL, BENIGN, recommended=setting).recommended == setting
    gated = Steering(gate=True, layers=(2,))
    shift = estimate_shift(vlm, HARMFUL, BENIGN, recommended=gated)
    assert shift.gate is not None
    expected = chosen_layer(torch.tensor(shift.records["gate"]["auc"]), 0, 1)
    assert shift.gate.layers == (expected,), "by the rule, below the lowest layer that is steered"


def test_questions_say_what_share_the_gate_would_steer(vlm: VLM, fitted: ShiftVectors) -> None:
    ticks: list[int] = []
    shift = estimate_shift(
        vlm, HARMFUL, BENIGN, questions=BENIGN[:5], batch_size=2, on_batch=ticks.append
    )
    assert shift.gate is not None
    assert shift.records["gate"]["n_questions"] == 5
    read = states(vlm, BENIGN[:5], Condition.ORIGINAL)[:, list(shift.gate.layers)]
    share = float(shift.gate.opens(read).double().mean())
    assert shift.records["gate"]["questions"] == pytest.approx(share)
    assert fitted.records["gate"]["questions"] is None


@pytest.mark.parametrize("mixed", [True, False])
def test_without_benign_anchors_there_is_no_gate(vlm: VLM, mixed: bool) -> None:
    if mixed:
        with pytest.raises(InputError, match="mixed anchors need benign anchors"):
            estimate_shift(vlm, HARMFUL, mixed=True)
        return
    for setting in (Steering(operator="fill"), Steering(gate=True)):
        with pytest.raises(InputError, match="need benign anchors beside the harmful"):
            estimate_shift(vlm, HARMFUL, recommended=setting)
    shift = estimate_shift(vlm, HARMFUL)
    assert (shift.gate, shift.direction, shift.sequential) == (None, None, None)
    assert shift.records == {}
    assert (shift.recommended.operator, shift.recommended.gate) == ("add", False)


def test_anchors_that_nothing_can_be_fitted_on_are_refused(vlm: VLM) -> None:
    with pytest.raises(InputError, match="1 anchors stand among the harmful and among the benign"):
        estimate_shift(vlm, HARMFUL, [*BENIGN, replace(HARMFUL[0], id="other name")])
    with pytest.raises(InputError, match="14 harmful and 9 benign anchors were given"):
        estimate_shift(vlm, HARMFUL, BENIGN[:9])
    blind = replace(BENIGN[0], image=None)
    with pytest.raises(InputError, match="1 of 12 benign anchors have no image"):
        estimate_shift(vlm, HARMFUL, [blind, *BENIGN[1:]])
    with pytest.raises(InputError, match="a share between 0 and 1"):
        estimate_shift(vlm, HARMFUL, BENIGN, false_alarms=0)


def test_everything_that_was_fitted_survives_the_file(tmp_path: Any, fitted: ShiftVectors) -> None:
    loaded = ShiftVectors.load(fitted.save(tmp_path / "a.safetensors"))
    assert fitted.gate is not None
    assert loaded.gate is not None
    assert loaded.gate.key == fitted.gate.key
    assert loaded.records == fitted.records
    assert GateRecord.from_json(loaded.records["gate"]) == GateRecord.from_json(
        dict(fitted.records["gate"])
    )
    assert loaded.provenance == fitted.provenance
    assert loaded.recommended == fitted.recommended
    for name in ("direction", "sequential"):
        assert torch.equal(loaded.others[name], fitted.others[name])
    again = loaded.save(tmp_path / "b.safetensors")
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_metric_survives_the_file_too(tmp_path: Any, fitted: ShiftVectors) -> None:
    assert fitted.gate is not None
    width = fitted.vectors.shape[1]
    gate = replace(
        fitted.gate, kind="vocabulary", metric=torch.eye(width), weights=(0.25,), bias=-0.5
    )
    path = replace(fitted, gate=gate).save(tmp_path / "a.safetensors")
    loaded = Artifact.load(path)
    assert loaded.gate is not None
    assert loaded.gate.key == gate.key
    assert set(loaded.tensors) == {"vectors", "direction", "sequential"}
