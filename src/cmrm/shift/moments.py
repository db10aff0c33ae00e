"""Estimators of a shift over a stream of differences, in memory that does not grow with their
number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cmrm.errors import InputError

SKETCH = 128
"""Rows that stand for all differences of a layer. Up to twice as many are stored as they are, and
the results are exact."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Vectors of an estimator, and how well they describe the differences."""

    vectors: torch.Tensor
    """float32 [L, d]."""
    explained: torch.Tensor
    """float32 [L]: share of the uncentred sum of squares along each vector's direction, 0..1."""
    mean_norms: torch.Tensor
    """float32 [L]: Euclidean norm of the mean difference."""
    mean_cosine: torch.Tensor
    """float32 [L]: cosine of vector and mean difference."""
    dropped: torch.Tensor
    """float32 [L]: share of the sum of squares that compressions left out, 0..1."""


class Moments:
    """Sums and a sketch of differences h_t - h_c, per decoder layer.

    The sketch S [r, d] of a layer keeps S^T S close to D^T D: rows are appended until there are 2 x
    `SKETCH`, then replaced by the leading `SKETCH` scaled right singular vectors (frequent
    directions without shrinkage). The mean is exact. The first principal direction is that of D up
    to the energy that was dropped.
    """

    def __init__(self, n_layers: int, hidden_size: int, *, limit: int = SKETCH) -> None:
        """`limit`: rows after a compression, which comes when there are twice as many."""
        self.n_layers = n_layers
        self.hidden_size = hidden_size
        self.limit = limit
        self.count = 0
        """Differences taken in."""
        self.total = torch.zeros(n_layers, hidden_size, dtype=torch.float64)
        """float64 [L, d]: sum of differences."""
        self.squares = torch.zeros(n_layers, dtype=torch.float64)
        """float64 [L]: sum of squared norms."""
        self.dropped = torch.zeros(n_layers, dtype=torch.float64)
        """float64 [L]: squared norm that compressions left out."""
        self._rows = 0
        self._buffer = torch.empty(n_layers, 0, hidden_size)

    @property
    def sketch(self) -> torch.Tensor:
        """float32 [L, rows, d]."""
        return self._buffer[:, : self._rows]

    def update(self, differences: torch.Tensor) -> None:
        """Take in differences float32 [B, L, d].

        Raises:
            InputError: a difference holds NaN or infinity.
        """
        if not torch.isfinite(differences).all():
            raise InputError(
                "a state holds NaN or infinity; run the model in float32 or bfloat16, or check the "
                "anchors"
            )
        by_layer = differences.transpose(0, 1)
        self.count += by_layer.shape[1]
        self.total += by_layer.double().sum(1)
        self.squares += by_layer.double().square().sum((1, 2))
        self._append(by_layer)

    def _append(self, rows: torch.Tensor) -> None:
        """Add sketch rows [L, n, d] in place; the buffer is made once and compressed where it is
        full."""
        needed = self._rows + rows.shape[1]
        if needed > self._buffer.shape[1]:
            size = max(
                needed, min(2 * self.limit, 2 * max(1, self._buffer.shape[1])) + rows.shape[1]
            )
            grown = torch.empty(self.n_layers, size, self.hidden_size)
            grown[:, : self._rows] = self.sketch
            self._buffer = grown
        self._buffer[:, self._rows : needed] = rows
        self._rows = needed
        if self._rows > 2 * self.limit:
            self._compress()

    def _compress(self) -> None:
        rows = self.sketch
        gram = rows.double() @ rows.double().transpose(1, 2)
        values, vectors = torch.linalg.eigh(gram)
        leading = vectors[:, :, -self.limit :].transpose(1, 2).float() @ rows
        self.dropped += values[:, : -self.limit].clamp_min(0).sum(1)
        self._rows = self.limit
        self._buffer[:, : self.limit] = leading

    def estimate(self, estimator: str) -> Estimate:
        """Vectors by `pca`, `mean` or `icv`; see `estimate.reduce_differences` for the
        estimators."""
        vectors, explained, cosines = [], [], []
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
            explained.append((rows @ unit).square().sum() / self.squares[layer].clamp_min(tiny))
            cosines.append((unit @ mean) / mean.norm().clamp_min(tiny))
            vectors.append(vector)
        return Estimate(
            torch.stack(vectors).float(),
            torch.stack(explained).float().clamp(0, 1),
            (self.total / self.count).norm(dim=1).float(),
            torch.stack(cosines).float().clamp(-1, 1),
            (self.dropped / self.squares.clamp_min(tiny)).float().clamp(0, 1),
        )

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint."""
        return {
            "total": self.total,
            "squares": self.squares,
            "dropped": self.dropped,
            "sketch": self.sketch.contiguous(),
            "count": torch.tensor([self.count]),
        }

    @classmethod
    def from_dict(cls, tensors: Mapping[str, torch.Tensor]) -> Moments:
        """The state that `to_dict` gave.

        Raises:
            KeyError, ValueError: the tensors have another form.
        """
        n_layers, hidden_size = tensors["total"].shape
        moments = cls(n_layers, hidden_size)
        sketch = tensors["sketch"]
        if sketch.dim() != 3 or (sketch.shape[0], sketch.shape[2]) != (n_layers, hidden_size):
            raise ValueError("the sketch has another shape than the sums")
        moments.count = int(tensors["count"][0])
        moments.total, moments.squares, moments.dropped = (
            tensors[name].clone() for name in ("total", "squares", "dropped")
        )
        moments._append(sketch)
        return moments

    def merge(self, other: Moments) -> None:
        """Take in the differences of another process."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.dropped += other.dropped
        self._append(other.sketch)


def _first_centred_component(rows: torch.Tensor, mean: torch.Tensor, count: int) -> torch.Tensor:
    """First principal component [d] of n differences around their mean, from a sketch with S^T S =
    D^T D.

    (D - 1 m^T)^T (D - 1 m^T) = S^T S - n m m^T, whose leading eigenvector lies in the span of the
    rows of S and m.
    """
    basis = torch.linalg.qr(torch.cat([rows, mean[None]]).T).Q
    inside, centre = rows @ basis, mean @ basis
    values, vectors = torch.linalg.eigh(inside.T @ inside - count * torch.outer(centre, centre))
    component: torch.Tensor = basis @ vectors[:, values.argmax()]
    return component
