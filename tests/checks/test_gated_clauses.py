"""The clauses about gate, fill and sequential vectors find what is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cmrm import estimate_shift
from cmrm.checks import gated
from cmrm.checks.clauses import Broken
from cmrm.model.vlm import VLM
from cmrm.steering import hooks
from cmrm.steering.gate import Gate
from cmrm.steering.passes import Pass


def test_a_gate_that_is_always_open_is_found(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Gate, "layer_score", lambda self, place, states: torch.full((len(states),), 9.0)
    )
    with pytest.raises(Broken, match="a closed gate is not the untouched model"):
        gated.gate(vlm)


def test_a_gate_that_is_forgotten_while_decoding_is_found(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Pass.open_factor

    def forgotten(self: Pass, part: Any, like: torch.Tensor) -> torch.Tensor:
        kept = part.gate is None or not self.decoding
        return held(self, part, like) * kept

    monkeypatch.setattr(Pass, "open_factor", forgotten)
    with pytest.raises(Broken, match="an open gate is not steering without a gate"):
        gated.gate(vlm)


def test_fill_that_lowers_a_coordinate_is_found(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "relu", lambda values: values)
    with pytest.raises(Broken, match="the coordinate is"):
        gated.fill(vlm)


def test_fill_of_half_the_distance_is_found(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = hooks._moved

    def half(edit: Any, *rest: Any) -> torch.Tensor:
        return moved(replace(edit, strength=0.5 * edit.strength), *rest)

    monkeypatch.setattr(hooks, "_moved", half)
    with pytest.raises(Broken, match="as text"):
        gated.fill(vlm)


def test_vectors_that_were_not_estimated_under_steering_are_found(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_loop(*args: Any, **options: Any) -> Any:
        shift = estimate_shift(*args, **options)
        return replace(shift, others={"sequential": shift.vectors})

    monkeypatch.setattr("cmrm.checks.gated.estimate_shift", open_loop)
    with pytest.raises(Broken, match="mean state differs by"):
        gated.sequential(vlm)
