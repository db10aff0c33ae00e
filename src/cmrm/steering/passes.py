"""One forward pass under steering: its tokens, and what is made of them once for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cmrm.steering.positions import Layout, chosen
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
    addends: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    """What sessions add in such passes, [B, 1, d], by edit."""
    _masks: dict[Positions, torch.Tensor] = field(default_factory=dict)
    _counts: dict[Positions, list[int]] = field(default_factory=dict)
    _factors: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

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


UNSTEERED = Pass((0, 0), None)
"""A pass of another context."""
