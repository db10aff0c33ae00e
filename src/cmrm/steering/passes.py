"""One forward pass under steering: its tokens, and what is made of them once for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cmrm.errors import SteeringError
from cmrm.steering.intervention import Intervention
from cmrm.steering.positions import Conversation, Layout, chosen
from cmrm.steering.setting import Positions

if TYPE_CHECKING:
    from cmrm.steering.hooks import Session


@dataclass(eq=False)
class Pass:
    """One forward pass: which sessions steer it, and at which tokens."""

    shape: tuple[int, int]
    """Rows B and columns T."""
    layout: Layout | None
    """None where nothing is steered."""
    sessions: tuple[Session, ...] = ()
    """Those that steer it, in order."""
    decoding: bool = False
    """One generated token a row: the same object serves every such pass of a conversation."""
    conversation: Conversation | None = None
    """What it belongs to; None where nothing is steered."""
    addends: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    """What sessions add in such passes, [B, 1, d], by edit."""
    scores: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """float32 [B] on the CPU: what gates have summed up so far, by session and intervention."""
    _masks: dict[Positions, torch.Tensor] = field(default_factory=dict)
    _counts: dict[Positions, list[int]] = field(default_factory=dict)
    _factors: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    _open_counts: dict[str, list[int]] = field(default_factory=dict)

    def mask(self, positions: Positions) -> torch.Tensor:
        """bool [B, T]: tokens that are steered under `positions`."""
        if positions not in self._masks:
            assert self.layout is not None
            self._masks[positions] = chosen(self.layout, positions)
        return self._masks[positions]

    def count(self, positions: Positions) -> list[int]:
        """Number of steered tokens of each row."""
        if positions not in self._counts:
            self._counts[positions] = self.mask(positions).sum(dim=1).tolist()
        return self._counts[positions]

    def factor(self, positions: Positions, like: torch.Tensor) -> torch.Tensor:
        """1 where a token is steered and 0 elsewhere: [B, T, 1], in dtype and device of `like`."""
        key = (positions, like.device, like.dtype)
        if key not in self._factors:
            self._factors[key] = self.mask(positions)[..., None].to(like.device, like.dtype)
        return self._factors[key]

    def last_prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of each row's last prompt token in this pass, int64 [B], and whether it is there,
        bool [B]."""
        assert self.layout is not None
        places = self.layout.last_prompt - self.layout.start
        inside = (places >= 0) & (places < self.layout.width)
        return places.clamp(0, self.layout.width - 1), inside

    def decision(self, part: Intervention) -> torch.Tensor | None:
        """bool [B] on the CPU: rows that the gate of `part` opens for; None before it decides."""
        return None if self.conversation is None else self.conversation.decisions.get(part.key)

    def decide(
        self, part: Intervention, rows_open: torch.Tensor, inside: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold what a gate decides on rows whose last prompt token is in this pass.

        A row is decided on once a turn: without a cache each pass runs its prompt again.

        Args:
            part: the gated intervention.
            rows_open: bool [B] on the CPU, rows that the gate opens for.
            inside: bool [B] on the CPU, rows whose last prompt token is in this pass.

        Returns:
            Rows that were decided on in this pass, and all that are open, bool [B] each.
        """
        conversation = self.conversation
        assert conversation is not None
        nothing = torch.zeros_like(inside)
        decided = conversation.decided.get(part.key, nothing)
        fresh = inside & ~decided
        before = conversation.decisions.get(part.key, nothing)
        opened = torch.where(fresh, rows_open, before)
        conversation.decided = {**conversation.decided, part.key: decided | inside}
        conversation.decisions = {**conversation.decisions, part.key: opened}
        return fresh, opened

    def open_counts(self, part: Intervention) -> list[int]:
        """Number of tokens of each row at the positions of a gated intervention, 0 where its gate
        is closed.

        Raises:
            SteeringError: there are such tokens, and the gate has not decided.
        """
        if part.key not in self._open_counts:
            counts, rows_open = self.count(part.positions), self.decision(part)
            if rows_open is None:
                if any(counts):
                    raise SteeringError(
                        "the gate has not read this turn's last prompt token: its prompt was run "
                        "outside of this steering. Prefill inside the block"
                    )
                return counts
            opened = rows_open.tolist()
            self._open_counts[part.key] = [
                count if is_open else 0 for count, is_open in zip(counts, opened, strict=True)
            ]
        return self._open_counts[part.key]

    def open_factor(self, part: Intervention, like: torch.Tensor) -> torch.Tensor:
        """`factor` of an intervention's positions, 0 in rows whose gate is closed."""
        if part.gate is None:
            return self.factor(part.positions, like)
        key = (part.key, like.device, like.dtype)
        if key not in self._factors:
            rows_open = self.decision(part)
            assert rows_open is not None
            opened = rows_open.to(like.device, like.dtype)[:, None, None]
            self._factors[key] = self.factor(part.positions, like) * opened
        return self._factors[key]


UNSTEERED = Pass((0, 0), None)
"""A pass of another context."""
