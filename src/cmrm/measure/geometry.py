"""Distance of conditions from the text-only query in the residual stream, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cmrm.engines.base import Engine
from cmrm.errors import MissingExtraError
from cmrm.model.batching import in_batches
from cmrm.prompts.conditions import Condition, build_request, choose_donors
from cmrm.prompts.sample import Sample

PLANES = 6
"""Layers whose states are drawn, evenly spaced from the first to the last."""


@dataclass
class Representation:
    """Last-prompt-token states of samples under several conditions, summed up over batches."""

    drawing: bool = False
    """Whether states are kept for `planes`."""
    n: int = 0
    """Samples so far."""
    totals: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Figure of `distances` -> condition -> [L], sums over samples."""
    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    """Condition -> sum of h_query - h_condition, float32 [L, d]."""
    drawn: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Condition -> states [B, PLANES, d] of each batch at `drawn_layers`; empty unless
    `drawing`."""

    def add(self, states: Mapping[str, torch.Tensor]) -> None:
        """Take in a batch: condition -> float32 [B, L, d] of the same samples, `query` among
        them."""
        text = states["query"]
        self.n += len(text)
        for figure, by_condition in distances(states).items():
            totals = self.totals.setdefault(figure, {})
            for name, means in by_condition.items():
                totals[name] = totals.get(name, np.zeros(len(means))) + len(text) * np.asarray(
                    means
                )
        layers = drawn_layers(text.shape[1])
        for name, captured in states.items():
            shift = (text - captured).sum(0)
            self.shifts[name] = self.shifts[name] + shift if name in self.shifts else shift
            if self.drawing:
                self.drawn.setdefault(name, []).append(captured[:, layers])

    def to_json(self) -> dict[str, Any]:
        """The figures of `distances`, as means over all samples."""
        return {
            figure: {name: (total / self.n).tolist() for name, total in by_condition.items()}
            for figure, by_condition in self.totals.items()
        }

    def mean_shift(self, condition: str) -> torch.Tensor:
        """Mean of h_query - h_condition, float32 [L, d]."""
        return self.shifts[condition] / self.n

    def planes(self, n_layers: int) -> dict[str, Any]:
        """2-d PCA of all states at `drawn_layers`; see `planes`."""
        states = {name: torch.cat(parts) for name, parts in self.drawn.items()}
        return planes(states, drawn_layers(n_layers))


def represent(
    engine: Engine,
    samples: Sequence[Sample],
    conditions: Sequence[Condition],
    *,
    batch_size: int,
    seed: int,
    drawing: bool = False,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Representation:
    """States of samples under `conditions`, one batch in memory at a time.

    Args:
        engine: where the model runs; it can read states.
        samples: at least one, each usable under every condition.
        conditions: `query` among them.
        batch_size: prompts a pass.
        seed: seed of noise, shuffles and donors.
        drawing: keep the states of a few layers, which `Representation.planes` needs.
        on_batch: called after each batch with its number of prompts.

    Raises:
        InputError: a sample cannot be put under a condition. EngineError: the engine reads no
            states.
    """
    donors = choose_donors(samples, seed=seed) if Condition.OTHER in conditions else None

    def work(batch: list[Sample]) -> dict[str, torch.Tensor]:
        states = {}
        for condition in conditions:
            requests = [build_request(s, condition, seed=seed, donors=donors) for s in batch]
            states[condition.value] = engine.states(requests, batch_size=len(batch))
        return states

    representation = Representation(drawing)
    for batch, states in in_batches(samples, batch_size, work):
        representation.add(states)
        on_batch(len(batch) * len(conditions))
    return representation


def distances(states: Mapping[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Per condition and layer, from last-prompt-token states [N, L, d] of the same samples.

    `query` is one of the conditions. `relative_distance_to_query`: mean over samples of the
    Euclidean distance to the same sample's query state, over that state's norm. `cosine_to_query`:
    mean cosine likewise.
    """
    text = states["query"]
    scale = text.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "relative_distance_to_query": {
            name: ((state - text).norm(dim=-1) / scale).mean(0).tolist()
            for name, state in states.items()
        },
        "cosine_to_query": {
            name: torch.cosine_similarity(state, text, dim=-1).mean(0).tolist()
            for name, state in states.items()
        },
    }


def drawn_layers(n_layers: int) -> list[int]:
    """Layers whose states are drawn: up to `PLANES`, ascending."""
    return sorted({round(k * (n_layers - 1) / (PLANES - 1)) for k in range(PLANES)})


def planes(states: Mapping[str, torch.Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """2-d PCA of all conditions' states [N, len(layers), d]: layer -> explained ratios and points.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError:
        raise MissingExtraError(
            "planes of states need scikit-learn; pip install 'cmrm[demo]' brings it"
        ) from None

    drawn: dict[str, Any] = {}
    for place, layer in enumerate(layers):
        stacked = np.concatenate([state[:, place].numpy() for state in states.values()])
        fitted = PCA(n_components=2, svd_solver="full").fit(stacked)
        drawn[str(layer)] = {
            "explained": [round(float(v), 4) for v in fitted.explained_variance_ratio_],
            "points": {
                name: fitted.transform(state[:, place].numpy()).round(3).tolist()
                for name, state in states.items()
            },
        }
    return drawn


def compare_shifts(
    shifts: Mapping[str, torch.Tensor], reference: str
) -> dict[str, dict[str, list[float]]]:
    """Shifts [L, d] of several corruptions against `reference`'s: cosine and ratio of norms by
    layer."""
    base = shifts[reference]
    scale = base.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        name: {
            "cosine": torch.cosine_similarity(shift, base, dim=-1).tolist(),
            "norm_ratio": (shift.norm(dim=-1) / scale).tolist(),
        }
        for name, shift in shifts.items()
    }
