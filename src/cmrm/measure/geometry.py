"""How far conditions lie from the text-only query in the residual stream, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA

PLANES = 6
"""Layers whose states are drawn, evenly spaced from the first to the last."""


def distances(states: Mapping[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Per condition and layer, from last-prompt-token states [N, L, d] of the same samples; `query` must be among them.

    `relative_distance_to_query`: mean over samples of the Euclidean distance to the same sample's query state, over that
    state's norm. `cosine_to_query`: mean cosine likewise.
    """
    text = states["query"]
    scale = text.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "relative_distance_to_query": {
            c: ((s - text).norm(dim=-1) / scale).mean(0).tolist() for c, s in states.items()
        },
        "cosine_to_query": {c: torch.cosine_similarity(s, text, dim=-1).mean(0).tolist() for c, s in states.items()},
    }


def planes(states: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """2-d PCA of all conditions' states together at `PLANES` layers: layer -> explained variance ratios and points."""
    n_layers = next(iter(states.values())).shape[1]
    shown = sorted({round(k * (n_layers - 1) / (PLANES - 1)) for k in range(PLANES)})
    drawn: dict[str, Any] = {}
    for layer in shown:
        stacked = np.concatenate([s[:, layer].numpy() for s in states.values()])
        fitted = PCA(n_components=2, svd_solver="full").fit(stacked)
        drawn[str(layer)] = {
            "explained": [round(float(v), 4) for v in fitted.explained_variance_ratio_],
            "points": {c: fitted.transform(s[:, layer].numpy()).round(3).tolist() for c, s in states.items()},
        }
    return drawn


def compare_shifts(shifts: Mapping[str, torch.Tensor], reference: str) -> dict[str, dict[str, list[float]]]:
    """Shifts [L, d] of several corruptions against `reference`'s: cosine and ratio of norms, per layer."""
    base = shifts[reference]
    scale = base.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        name: {
            "cosine": torch.cosine_similarity(shift, base, dim=-1).tolist(),
            "norm_ratio": (shift.norm(dim=-1) / scale).tolist(),
        }
        for name, shift in shifts.items()
    }
