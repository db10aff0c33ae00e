"""A gate as data: which rows an intervention acts on, read from the residual stream itself.

A gate reads a row's state at the last prompt token, behind one or several decoder layers. Where its
score is above its threshold, the row is steered in the layers above. It decides once a turn; the
decision holds for all tokens that are generated in that turn.

| kind | score of a layer, h the state [d], u the gate's vector | source |
|---|---|---|
| `linear` | h . u | a linear probe |
| `cosine` | cos(h, tanh(p)), p = u (h . u) / (u . u) | CAST, arXiv 2409.05907 |
| `vocabulary` | h . u / sqrt(h' G h), G a metric [d, d] | HiddenDetect, arXiv 2502.14744 |

The score of a row is the weighted sum over the gate's layers, plus the bias.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch

from cmrm.errors import InputError
from cmrm.steering.setting import layer_numbers

GateKind = Literal["linear", "cosine", "vocabulary"]

TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Gate:
    """See the module. Rows with a score above `threshold` are steered; no other row is touched."""

    kind: GateKind
    """How a state is scored; see the module's table."""
    layers: tuple[int, ...]
    """0-based decoder layers that are read, in ascending order; edits stand above the last one."""
    vectors: torch.Tensor
    """float32 [n, d], one for each of `layers`."""
    threshold: float
    """A row is steered where its score is above this."""
    weights: tuple[float, ...] = (1.0,)
    """What the score of each layer counts."""
    bias: float = 0.0
    """Added to the sum."""
    metric: torch.Tensor | None = None
    """float32 [d, d], positive semi-definite, for the kind `vocabulary` alone."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GateKind):
            raise InputError(f"the gate's kind is {self.kind!r}; one of {_KINDS}")
        object.__setattr__(self, "layers", layer_numbers(self.layers))
        shape, n = tuple(self.vectors.shape), len(self.layers)
        if len(shape) != 2 or shape[0] != n or len(self.weights) != n:
            raise InputError(
                f"a gate that reads {n} layers needs vectors [{n}, width] and {n} weights; it has "
                f"{shape} and {len(self.weights)}"
            )
        if (self.kind == "vocabulary") != (self.metric is not None):
            raise InputError("a metric goes with the kind `vocabulary`, which needs one")
        if self.metric is not None and tuple(self.metric.shape) != (shape[1], shape[1]):
            raise InputError(
                f"the gate's metric is {tuple(self.metric.shape)}; expected {(shape[1], shape[1])}"
            )
        tensors = [self.vectors] if self.metric is None else [self.vectors, self.metric]
        numbers = (self.threshold, self.bias, *self.weights)
        if not all(map(isfinite, numbers)) or not all(
            bool(torch.isfinite(tensor).all()) for tensor in tensors
        ):
            raise InputError("the gate holds NaN or infinity; fit it again")

    @property
    def key(self) -> str:
        """Hex sha256 of everything: equal for gates that decide the same."""
        text = f"{self.kind} {self.layers} {self.weights} {self.bias!r} {self.threshold!r}"
        digest = hashlib.sha256(text.encode())
        for tensor in (self.vectors, self.metric):
            if tensor is not None:
                digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def layer_score(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B] of states [B, d] of the layer `layers[place]`."""
        h = states.float()
        u = self.vectors[place].to(h.device)
        along = h @ u
        if self.kind == "linear":
            return along
        if self.kind == "cosine":
            projected = torch.tanh(along[:, None] * u / u.square().sum().clamp_min(TINY))
            return torch.nn.functional.cosine_similarity(h, projected, dim=-1)
        assert self.metric is not None
        squared = (h @ self.metric.to(h.device) * h).sum(-1)
        return along / squared.clamp_min(TINY).sqrt()

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Scores float32 [B] of states [B, n, d] of the gate's layers, in their order."""
        total = torch.full((states.shape[0],), self.bias, device=states.device)
        for place, weight in enumerate(self.weights):
            total = total + weight * self.layer_score(place, states[:, place])
        return total

    def opens(self, states: torch.Tensor) -> torch.Tensor:
        """bool [B]: rows to be steered, from states [B, n, d] of the gate's layers."""
        return self.scores(states) > self.threshold


_KINDS = ", ".join(get_args(GateKind))
