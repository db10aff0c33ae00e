"""A slow reference for steering: every step runs the whole sequence again, and hooks add by
absolute position.

It shares nothing with `cmrm.steering`: the test says where each turn's prompt ends, which rows hold
an image, and the columns that are steered follow from that alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cmrm.model.vlm import VLM


@dataclass
class Turn:
    """Columns of one turn: its prompt ends at `prompt_end`, and its generated tokens were run up to
    `end`."""

    start: int
    prompt_end: int
    end: int | None = None


@dataclass
class Script:
    """What the reference knows of a conversation; columns count padding too."""

    gate: list[bool]
    turns: list[Turn]
    last_image: list[int]
    real: list[list[bool]] = field(default_factory=list)
    """By row: whether a prompt column is no padding; columns beyond are real."""

    def steered(self, row: int, column: int, positions: str) -> bool:
        if not self.gate[row]:
            return False
        padding = self.real and column < len(self.real[row]) and not self.real[row][column]
        if padding:
            return False
        turn = next(t for t in reversed(self.turns) if column >= t.start)
        generated = column >= turn.prompt_end
        prompt = [
            c
            for c in range(turn.start, turn.prompt_end)
            if not self.real or c >= len(self.real[row]) or self.real[row][c]
        ]
        last = bool(prompt) and column == prompt[-1]
        return {
            "all": True,
            "after_image": column > self.last_image[row],
            "generated": generated,
            "last_prompt": last,
            "last": last or generated,
        }[positions]

    def mask(self, width: int, positions: str, rows: int) -> torch.Tensor:
        times = rows // len(self.gate)
        table = [
            [self.steered(row, c, positions) for c in range(width)] for row in range(len(self.gate))
        ]
        return torch.tensor(table).repeat_interleave(times, dim=0)


@contextmanager
def recomputed(
    vlm: VLM, deltas: dict[int, torch.Tensor], script: Script, positions: str
) -> Iterator[None]:
    """Inside, every pass has to hold whole sequences; `deltas[l]` [d] is added at the script's
    columns."""

    def hook_of(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            mask = script.mask(hidden.shape[1], positions, hidden.shape[0])
            edited = torch.where(mask[..., None], hidden + deltas[layer].to(hidden.dtype), hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    handles = [vlm.layers[layer].register_forward_hook(hook_of(layer)) for layer in deltas]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def telescoped(vectors: torch.Tensor, alpha: float) -> dict[int, torch.Tensor]:
    """alpha (v_l - v_(l-1)) by layer."""
    previous = torch.zeros_like(vectors[0])
    deltas = {}
    for layer, vector in enumerate(vectors):
        deltas[layer], previous = alpha * (vector - previous), vector
    return deltas
