"""Whether states that were computed in a shorter way are those of a whole forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cmrm.model.vlm import VLM

TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.05
"""Largest distance between a state by prefix and by a whole forward, over the state's norm:
float32, 16-bit floats."""

SHIFT_TOLERANCE = {torch.float32: 1e-3}
HALF_SHIFT_TOLERANCE = 0.4
"""The same distance over |h_t - h_c| of the layer, which is what is used. 16-bit rounding alone
makes 0.05 to 0.15 of it on the demo VLM, between two batch sizes as between prefix and whole
forward."""


@dataclass(frozen=True, eq=False)
class Reference:
    """States of one prompt from a whole forward, and the differences that are to be measured."""

    ids: torch.Tensor
    """int64 [n], the prompt."""
    states: torch.Tensor
    """float32 [L, d]."""
    scale: torch.Tensor
    """float32 [L]: |h_t - h_c| of the layer."""


def distance(states: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance over layers of states [L, d], over the expected state's norm."""
    return float(((states - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max())


def alike(vlm: VLM, states: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether states [L, d] are those expected, relative to the state and to the difference that is
    measured.

    `scale` is float32 [L]: |h_t - h_c| of each layer; empty where it is not known.
    """
    dtype = vlm.model.dtype
    if not distance(states, expected) <= TOLERANCE.get(dtype, HALF_TOLERANCE):
        return False
    if not len(scale):
        return True
    error = (states - expected).norm(dim=-1)
    allowed = SHIFT_TOLERANCE.get(dtype, HALF_SHIFT_TOLERANCE) * scale
    return bool((error <= allowed + 1e-6 * expected.norm(dim=-1)).all())
