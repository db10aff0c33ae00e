"""What is kept of the anchors' states: sums over all of them, and the states of the first ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cmrm.shift.moments import Moments

KEPT = 256
"""Anchors of each kind whose states are kept for the gate and its cross-validation. On a 7B model
they take some 270 MB a kind."""


class Summary:
    """Moments of h_t - h_c, the sum of h_t, and the first anchors' states under both conditions."""

    def __init__(self, n_layers: int, hidden_size: int, *, keep: int = 0) -> None:
        """`keep`: anchors whose states are kept."""
        self.moments = Moments(n_layers, hidden_size)
        self.keep = keep
        self.text_total = torch.zeros(n_layers, hidden_size, dtype=torch.float64)
        """float64 [L, d]: sum of h_t."""
        self.text = torch.empty(0, n_layers, hidden_size)
        """float32 [K, L, d]: h_t of the first anchors."""
        self.corrupted = torch.empty(0, n_layers, hidden_size)
        """float32 [K, L, d]: h_c of the first anchors."""

    @property
    def count(self) -> int:
        """Anchors taken in."""
        return self.moments.count

    @property
    def text_mean(self) -> torch.Tensor:
        """float64 [L, d]: mean of h_t."""
        return self.text_total / max(1, self.count)

    def update(self, text: torch.Tensor, corrupted: torch.Tensor) -> None:
        """Take in states [B, L, d] of a batch under both conditions.

        Raises:
            InputError: a state holds NaN or infinity.
        """
        self.moments.update(text - corrupted)
        self.text_total += text.double().sum(0)
        room = self.keep - len(self.text)
        if room > 0:
            self.text = torch.cat([self.text, text[:room]])
            self.corrupted = torch.cat([self.corrupted, corrupted[:room]])

    def merge(self, other: Summary) -> None:
        """Take in what another process, or another set of anchors, has summed up."""
        self.moments.merge(other.moments)
        self.text_total += other.text_total
        room = max(0, self.keep - len(self.text))
        self.text = torch.cat([self.text, other.text[:room]])
        self.corrupted = torch.cat([self.corrupted, other.corrupted[:room]])

    def copy(self) -> Summary:
        """The same, for another to be merged into."""
        return Summary.from_dict(self.to_dict())

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint."""
        return {
            **self.moments.to_dict(),
            "text_total": self.text_total,
            "text": self.text,
            "corrupted": self.corrupted,
            "keep": torch.tensor([self.keep]),
        }

    @classmethod
    def from_dict(cls, tensors: Mapping[str, torch.Tensor]) -> Summary:
        """The state that `to_dict` gave.

        Raises:
            KeyError, ValueError: the tensors have another form.
        """
        moments = Moments.from_dict(tensors)
        summary = cls(moments.n_layers, moments.hidden_size, keep=int(tensors["keep"][0]))
        summary.moments = moments
        for name in ("text_total", "text", "corrupted"):
            expected = (moments.n_layers, moments.hidden_size)
            if tuple(tensors[name].shape[-2:]) != expected:
                raise ValueError(f"{name} has another shape than the sums")
            setattr(summary, name, tensors[name].clone())
        return summary
