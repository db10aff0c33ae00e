"""Estimators of a shift over a stream of differences, in memory that does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cmrm.errors import InputError

SKETCH = 128
"""Rows that stand for all differences of a layer: up to twice as many are kept as they are, and the results are exact."""


@dataclass
class Moments:
    """Sums and a sketch of differences h_t - h_c, per decoder layer.

    The sketch S [r, d] of a layer keeps S^T S close to D^T D: rows are appended until there are 2 x `SKETCH`, then
    replaced by the leading `SKETCH` scaled right singular vectors. The mean is exact; the first principal direction is that of
    D up to the energy that was dropped, which is recorded.
    """

    n_layers: int
    """Number of decoder layers L."""
    hidden_size: int
    """Width d."""
    count: int = 0
    """Differences seen."""
    total: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float64 [L, d]: sum of differences."""
    squares: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float64 [L]: sum of squared norms."""
    dropped: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float64 [L]: squared norm that compressions left out."""
    sketch: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """float32 [L, rows, d]."""
    limit: int = SKETCH
    """Rows after a compression, which comes when there are twice as many."""

    def __post_init__(self) -> None:
        if not len(self.total):
            self.total = torch.zeros(self.n_layers, self.hidden_size, dtype=torch.float64)
            self.squares = torch.zeros(self.n_layers, dtype=torch.float64)
            self.dropped = torch.zeros(self.n_layers, dtype=torch.float64)
            self.sketch = torch.empty(self.n_layers, 0, self.hidden_size)

    def update(self, differences: torch.Tensor) -> None:
        """Take in differences float32 [B, L, d].

        Raises:
            InputError: a difference holds NaN or infinity.
        """
        if not torch.isfinite(differences).all():
            raise InputError(
                "a state holds NaN or infinity; run the model in float32 or bfloat16, or check the anchors"
            )
        by_layer = differences.transpose(0, 1)
        self.count += by_layer.shape[1]
        self.total += by_layer.double().sum(1)
        self.squares += by_layer.double().square().sum((1, 2))
        self.sketch = torch.cat([self.sketch, by_layer], dim=1)
        if self.sketch.shape[1] > 2 * self.limit:
            self._compress()

    def _compress(self) -> None:
        gram = self.sketch.double() @ self.sketch.double().transpose(1, 2)
        values, vectors = torch.linalg.eigh(gram)
        kept = vectors[:, :, -self.limit :].transpose(1, 2).float() @ self.sketch
        self.dropped += values[:, : -self.limit].clamp_min(0).sum(1)
        self.sketch = kept

    def vectors(self, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors float32 [L, d] and explained ratio [L]; see `shift.reduce_differences` for the estimators."""
        vectors, ratios = [], []
        tiny = torch.finfo(torch.float64).tiny
        for layer in range(self.n_layers):
            rows = self.sketch[layer].double()
            mean = self.total[layer] / self.count
            if estimator == "mean":
                vector = mean
            elif estimator == "pca":
                direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
                vector = direction * (mean @ direction)
            else:
                component = _first_centred_component(rows, mean, self.count)
                vector = mean + component * (1.0 if mean @ component >= 0 else -1.0)
            unit = vector / vector.norm().clamp_min(tiny)
            ratios.append((rows @ unit).square().sum() / self.squares[layer].clamp_min(tiny))
            vectors.append(vector)
        return torch.stack(vectors).float(), torch.stack(ratios).float().clamp(0, 1)

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint."""
        return {"total": self.total, "squares": self.squares, "dropped": self.dropped,
                "sketch": self.sketch.contiguous(), "count": torch.tensor([self.count])}  # fmt: skip

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Moments:
        """The state that `to_dict` gave."""
        n_layers, hidden_size = held["total"].shape
        return cls(
            n_layers,
            hidden_size,
            int(held["count"][0]),
            held["total"],
            held["squares"],
            held["dropped"],
            held["sketch"],
        )

    def merge(self, other: Moments) -> None:
        """Take in what another process has seen."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.dropped += other.dropped
        self.sketch = torch.cat([self.sketch, other.sketch], dim=1)
        if self.sketch.shape[1] > 2 * self.limit:
            self._compress()


def _first_centred_component(rows: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    """First principal component [d] of n differences around their mean, from a sketch with S^T S = D^T D.

    (D - 1 m^T)^T (D - 1 m^T) = S^T S - n m m^T, whose leading eigenvector lies in the span of the rows of S and m.
    """
    basis = torch.linalg.qr(torch.cat([rows, mean[None]]).T).Q
    inside, centre = rows @ basis, mean @ basis
    values, vectors = torch.linalg.eigh(inside.T @ inside - count * torch.outer(centre, centre))
    found: torch.Tensor = basis @ vectors[:, values.argmax()]
    return found
