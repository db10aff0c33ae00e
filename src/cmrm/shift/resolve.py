"""From an artifact and a setting to what is done to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from cmrm.errors import InputError
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.gap import upper_half
from cmrm.steering.gate import Gate
from cmrm.steering.intervention import Intervention, fill_intervention, shift_intervention
from cmrm.steering.setting import Steering, layer_ranges

REMEDY = "give benign anchors (estimate_shift(vlm, harmful, benign), cmrm extract --benign)"


def needs_text(steering: Steering) -> bool:
    """Whether a setting needs the states that each request has as text."""
    return steering.operator == "fill" and steering.alpha > 0


def resolved(
    shift: ShiftVectors,
    steering: Steering | None = None,
    text_states: Callable[[], torch.Tensor] | None = None,
) -> list[Intervention]:
    """Interventions of an artifact under a setting; none where alpha is 0 and nothing is read.

    Args:
        shift: the artifact.
        steering: the setting; the recommended one when None.
        text_states: gives the states float32 [R, L, d] of the batch's requests as text, for `fill`;
            called only where they are needed.

    Raises:
        InputError: the artifact does not hold what the setting needs; what is missing and how to
            get it is named.
    """
    steering = settled(shift, steering)
    gate = gate_of(shift, steering)
    if steering.kind == "sequential":
        assert shift.sequential is not None
        return [shift_intervention(shift.sequential, steering, gate)]
    if steering.operator == "add":
        return [shift_intervention(shift.vectors, steering, gate)]
    if not needs_text(steering):
        return []
    if text_states is None:
        raise InputError(
            "fill needs what each request has as text: say which requests are answered, "
            "steer(vlm, shift, requests=[...]), or use generate() or stream()"
        )
    assert shift.direction is not None
    return [fill_intervention(shift.direction, text_states(), steering, gate)]


def settled(shift: ShiftVectors, steering: Steering | None = None) -> Steering:
    """A setting as it is used with an artifact: its layers are named where they depend on what the
    artifact holds. No model is needed.

    Args:
        shift: the artifact.
        steering: the setting; the recommended one when None.

    Raises:
        InputError: the artifact does not hold what the setting needs; what is missing and how to
            get it is named.
    """
    steering = steering or shift.recommended
    gate = gate_of(shift, steering)
    n_layers = len(shift.vectors)
    if steering.kind == "sequential":
        if shift.sequential is None:
            raise InputError(
                "the artifact holds no vectors of the schedule sequential; extract it with "
                "schedule sequential, or with benign anchors"
            )
        steering = _sequential(shift, steering)
    elif gate is not None:
        steering = replace(steering, layers=_above(gate, steering, n_layers))
    elif steering.operator == "fill" and steering.layers is None:
        steering = replace(steering, layers=upper_half(n_layers))
    if steering.operator == "fill" and shift.direction is None:
        raise InputError(f"the artifact holds no refusal direction, which fill needs; {REMEDY}")
    lowest = steering.chosen_layers(n_layers)[0]
    if gate is not None and lowest <= gate.layers[-1]:
        remedy = f"steer layers from {gate.layers[-1] + 1} on"
        if steering.kind == "sequential":
            remedy = "extract sequential vectors for the layers above it, with a gated setting"
        raise InputError(
            f"the gate reads decoder layer {gate.layers[-1]}, and layer {lowest} does not stand "
            f"above it; {remedy}"
        )
    return steering


def gate_of(shift: ShiftVectors, steering: Steering) -> Gate | None:
    """The gate that a setting asks for; None where it asks for none.

    Raises:
        InputError: the artifact holds none.
    """
    if not steering.gate:
        return None
    if shift.gate is None:
        raise InputError(f"the artifact holds no gate; {REMEDY}")
    return shift.gate


def _above(gate: Gate, steering: Steering, n_layers: int) -> tuple[int, ...]:
    """Chosen layers, by default all that stand above the gate."""
    if steering.layers is None:
        return tuple(range(gate.layers[-1] + 1, n_layers))
    return steering.chosen_layers(n_layers)


def _sequential(shift: ShiftVectors, steering: Steering) -> Steering:
    """The setting with the layers that the sequential vectors were estimated for.

    Raises:
        InputError: it names others. The first of them alone can be used: lower layers were steered
            when higher ones were estimated.
    """
    estimated = shift.provenance.sequential_layers
    if steering.layers is None:
        return replace(steering, layers=estimated)
    if steering.layers != estimated[: len(steering.layers)]:
        raise InputError(
            "the sequential vectors were estimated for decoder layers "
            f"{layer_ranges(estimated)}, each with the lower ones steered; they cannot be used for "
            f"{layer_ranges(steering.layers)}. Name the first ones of them, or extract again with "
            "these layers"
        )
    return steering


def nonzero_layers(vectors: torch.Tensor) -> tuple[int, ...]:
    """Layers whose vector [L, d] is not zero."""
    return tuple(vectors.any(dim=-1).nonzero().flatten().tolist())
