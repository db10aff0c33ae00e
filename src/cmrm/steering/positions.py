"""Which tokens of a forward pass are steered: pure functions of positions in the conversation.

A COLUMN is a token's place in the KV cache of its conversation, padding included: the first token
that a cache takes in has column 0. A pass runs columns start .. start + width - 1. A column below
`prompt_end` is a prompt token of the current turn, or of an earlier turn; from `prompt_end` on
tokens are generated. Nothing here depends on how many passes the columns are run in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cmrm.steering.setting import Positions

NOWHERE = -1
"""Column of a token that is not there."""


@dataclass(eq=False)
class Conversation:
    """The rows behind one KV cache: which hold an image, and where their prompt ends."""

    length: int
    """Columns that have been run."""
    prompt_end: int
    """First generated column of the current turn."""
    gate: torch.Tensor
    """bool [B]: rows that hold an image."""
    last_prompt: torch.Tensor
    """int64 [B]: column of the last prompt token of the current turn, padding aside."""
    last_image: torch.Tensor
    """int64 [B]: column of the last image token of the prompt, `NOWHERE` without one."""
    first_image: torch.Tensor
    """int64 [B]: column of the first image token, `NOWHERE` without one."""
    real: torch.Tensor | None = None
    """bool [B, prompt_end]: prompt tokens that are no padding; None: all."""
    images_seen: bool = True
    """Whether the image tokens themselves were seen; False: the caller said which rows hold an
    image."""
    unsteered: bool = False
    """Whether columns of it were run that no steering saw, or another one."""
    steered_by: str | None = None
    """Key of the interventions that its columns were run under."""
    decisions: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """bool [B] on the CPU by the key of a gated intervention: rows whose gate is open in this turn.
    Replaced when a gate decides, never changed in place."""
    decided: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """bool [B] on the CPU by the same key: rows that it has decided on in this turn."""
    decoding: object | None = field(default=None, repr=False)
    """What the tracker keeps between passes of one generated token each."""

    @property
    def rows(self) -> int:
        """Rows B."""
        return len(self.gate)

    def changed(self, **changes: Any) -> Conversation:
        """A copy with other values; nothing is decoded of it yet."""
        return replace(self, decoding=None, **changes)

    def expanded(self, rows: int) -> Conversation | None:
        """The conversation with each row repeated, as beams and several return sequences do.

        None where the rows do not divide.
        """
        if rows == self.rows:
            return self
        if rows % self.rows:
            return None
        names = ("gate", "last_prompt", "last_image", "first_image", "real")
        tensors = {name: getattr(self, name) for name in names}
        times = rows // self.rows
        repeated = {
            name: None if tensor is None else tensor.repeat_interleave(times, dim=0)
            for name, tensor in tensors.items()
        }
        by_key = {
            name: {key: each.repeat_interleave(times, dim=0) for key, each in held.items()}
            for name, held in (("decisions", self.decisions), ("decided", self.decided))
        }
        return self.changed(**by_key, **repeated)


@dataclass(frozen=True, eq=False)
class Layout:
    """Columns of one pass, and what the conversation says of them."""

    start: int
    """First column."""
    width: int
    """Number of columns T."""
    prompt_end: int
    """First generated column."""
    gate: torch.Tensor
    """bool [B]: rows that hold an image."""
    last_prompt: torch.Tensor
    """int64 [B]: column of the last prompt token."""
    last_image: torch.Tensor
    """int64 [B]: column of the last image token, `NOWHERE` without one."""
    real: torch.Tensor | None
    """bool [B, T]: tokens that are no padding; None: all."""

    @classmethod
    def of(
        cls,
        conversation: Conversation,
        start: int,
        width: int,
        mask: torch.Tensor | None,
        device: torch.device,
    ) -> Layout:
        """Columns start .. start + width - 1 of a conversation.

        `mask`: bool [B, columns], the pass's own attention mask; without one the prompt's is used.
        """
        real = None
        end = start + width
        if mask is not None and mask.shape[1] >= end:
            real = mask[:, start:end]
        elif conversation.real is not None:
            prompt = conversation.real[:, start:end]
            real = torch.ones(prompt.shape[0], width, dtype=torch.bool, device=prompt.device)
            real[:, : prompt.shape[1]] = prompt
        return cls(
            start,
            width,
            conversation.prompt_end,
            conversation.gate.to(device),
            conversation.last_prompt.to(device),
            conversation.last_image.to(device),
            None if real is None else real.to(device),
        )


def chosen(layout: Layout, positions: Positions) -> torch.Tensor:
    """bool [B, T]: the tokens of a pass that are steered under `positions`."""
    columns = torch.arange(layout.start, layout.start + layout.width, device=layout.gate.device)[
        None
    ]
    generated = columns >= layout.prompt_end
    if positions == "all":
        mask = torch.ones_like(generated)
    elif positions == "after_image":
        mask = columns > layout.last_image[:, None]
    elif positions == "generated":
        mask = generated
    elif positions == "last_prompt":
        mask = columns == layout.last_prompt[:, None]
    else:
        mask = generated | (columns == layout.last_prompt[:, None])
    mask = mask & layout.gate[:, None]
    return mask if layout.real is None else mask & layout.real


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """int64 [B]: place of the last True in each row of bool [B, T]; `NOWHERE` where there is
    none."""
    if not mask.shape[1]:
        return torch.full((mask.shape[0],), NOWHERE, device=mask.device)
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, places, NOWHERE).amax(dim=1)


def first_true(mask: torch.Tensor) -> torch.Tensor:
    """int64 [B]: place of the first True in each row of bool [B, T]; `NOWHERE` where there is
    none."""
    if not mask.shape[1]:
        return torch.full((mask.shape[0],), NOWHERE, device=mask.device)
    first = mask.int().argmax(dim=1)
    return torch.where(mask.any(dim=1), first, NOWHERE)


def shifted(columns: torch.Tensor, start: int) -> torch.Tensor:
    """Places within a pass as columns; `NOWHERE` stays."""
    return torch.where(columns == NOWHERE, NOWHERE, columns + start)


def prompt_of(
    is_image: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    start: int,
    end: int,
    before: Conversation | None = None,
) -> Conversation:
    """A conversation whose current turn ends at column `end`.

    Args:
        is_image: bool [B, end - start], image tokens among the prompt's columns from `start` on.
        mask: bool [B, end], real tokens of all columns up to `end`; None: no padding.
        start: first column that `is_image` tells of.
        end: number of prompt columns, those of earlier turns among them.
        before: what is known of the columns before `start`.
    """
    rows, device = is_image.shape[0], is_image.device
    last_image = shifted(last_true(is_image), start)
    first_image = shifted(first_true(is_image), start)
    if before is not None:
        last_image = torch.maximum(last_image, before.last_image.to(device))
        earlier = before.first_image.to(device)
        first_image = torch.where(earlier == NOWHERE, first_image, earlier)
    if mask is None:
        last_prompt = torch.full((rows,), end - 1, dtype=torch.long, device=device)
    else:
        last_prompt = last_true(mask)
    gate = first_image != NOWHERE
    opened = False
    if before is not None:
        gate = gate | before.gate.to(device)
        opened = bool((gate & ~before.gate.to(device)).any())
    return Conversation(
        start,
        end,
        gate,
        last_prompt,
        last_image,
        first_image,
        mask,
        images_seen=before is None or before.images_seen,
        unsteered=before is not None and (before.unsteered or opened),
        steered_by=None if before is None else before.steered_by,
    )
