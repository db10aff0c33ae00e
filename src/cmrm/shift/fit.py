"""What benign anchors add to a shift: refusal direction, harm gate, recommendation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cmrm.model.batching import in_batches
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, build_request
from cmrm.prompts.sample import Sample
from cmrm.shift.capture import capture_inputs
from cmrm.shift.gap import measure_gap, recommended_setting
from cmrm.shift.harm_gate import GateRecord, fit_gate
from cmrm.shift.other_gates import FittedGate, fit_other_gate, refusal_vocabulary
from cmrm.shift.summary import Summary
from cmrm.steering.gate import Gate
from cmrm.steering.setting import Steering


@dataclass(frozen=True, eq=False)
class Fit:
    """Parts of an artifact that are fitted on harmful and benign anchors; empty without benign
    ones."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """`direction`, float32 [L, d]."""
    gate: Gate | None = None
    """The harm gate."""
    records: Mapping[str, Any] = field(default_factory=dict)
    """How well each does, as JSON: `gap` and `gate`."""
    recommended: Steering | None = None
    """By the rule of `shift.gap`."""


def fitted(
    vlm: VLM,
    harmful: Summary,
    benign: Summary,
    *,
    false_alarms: float,
    seed: int,
    recommended: Steering | None = None,
    questions: Sequence[Sample] = (),
    batch_size: int = 16,
    gate_kind: FittedGate = "probe",
    on_batch: Callable[[int], None] | None = None,
) -> Fit:
    """Direction, gate and recommendation from the summaries of both kinds of anchors.

    Where `recommended` has a gate and names its layers, the gate stands below the lowest of them.
    `on_batch` is called after each batch of `questions` with its number of prompts.

    Raises:
        InputError: there are too few anchors.
    """
    direction = (harmful.text_mean - benign.text_mean).float()
    below = None
    if recommended is not None and recommended.gate and recommended.layers is not None:
        below = recommended.layers[0] - 1
    gate, record = _gate(
        vlm, harmful, benign, gate_kind, false_alarms=false_alarms, below=below, seed=seed
    )
    if questions:
        share = _share_opened(vlm, gate, questions, batch_size, on_batch)
        record = replace(record, questions=share, n_questions=len(questions))
    gap = measure_gap(harmful.text, harmful.corrupted, benign.text, seed=seed)
    records = {"gap": gap.to_json(), "gate": record.to_json()}
    setting = recommended_setting(gap, vlm.n_layers)
    return Fit({"direction": direction}, gate, records, setting)


def _gate(
    vlm: VLM,
    harmful: Summary,
    benign: Summary,
    kind: FittedGate,
    *,
    false_alarms: float,
    below: int | None,
    seed: int,
) -> tuple[Gate, GateRecord]:
    """The gate of a kind, from states with a corrupted image."""
    states = (harmful.corrupted, benign.corrupted)
    if kind == "probe":
        return fit_gate(*states, false_alarms=false_alarms, highest=below, seed=seed)
    return fit_other_gate(
        kind,
        *states,
        vocabulary=refusal_vocabulary(vlm) if kind == "vocabulary" else None,
        false_alarms=false_alarms,
        highest=below,
        seed=seed,
    )


def _share_opened(
    vlm: VLM,
    gate: Gate,
    questions: Sequence[Sample],
    batch_size: int,
    on_batch: Callable[[int], None] | None,
) -> float:
    """Share of the questions, with their images, that the gate opens for; images are opened for
    one batch at a time."""
    opened = 0

    def work(batch: list[Sample]) -> torch.Tensor:
        requests = [build_request(sample, Condition.ORIGINAL) for sample in batch]
        return capture_inputs(vlm, encode(vlm, requests))[:, list(gate.layers)]

    with torch.inference_mode():
        for batch, states in in_batches(questions, batch_size, work):
            opened += int(gate.opens(states).sum())
            if on_batch is not None:
                on_batch(len(batch))
    return opened / len(questions)
