"""From differences of states to shift vectors (Liu et al., arXiv 2410.09047, section 4).

The modelling assumption is h_o = h* + alpha (h_c - h_t), hence h* = h_o + alpha (h_t - h_c): a vector points FROM the
corrupted-image state h_c TO the text-only state h_t and is added. (The paper's Eq. 6 prints the opposite sign, against
its own Eq. 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from cmrm.artifact import Provenance, Recommended, ShiftVectors, library_versions
from cmrm.capture import capture
from cmrm.conditions import CORRUPTED, Condition, build_requests
from cmrm.errors import InputError
from cmrm.models import VLM, config_hash
from cmrm.samples import Sample, check_unique, set_hash

Estimator = Literal["pca", "mean", "icv"]


def estimate_shift(
    vlm: VLM,
    anchors: Sequence[Sample],
    *,
    estimator: Estimator = "pca",
    corruption: Condition | str = Condition.BLANK,
    seed: int = 0,
    batch_size: int = 16,
    recommended: Recommended | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> ShiftVectors:
    """Dataset-level shift over `anchors`: two forward passes per anchor, last prompt token, every decoder layer.

    Args:
        vlm: the model.
        anchors: at least two samples with an image; each needs its image only for the size of the corrupted one.
        estimator: see `reduce_differences`.
        corruption: `blank` or `noise`, what stands for the image in h_c.
        seed: seed of the noise.
        batch_size: prompts per forward pass.
        recommended: setting to store with the vectors; the calibrated preset when None.
        on_batch: told the number of prompts of each finished batch, for a progress bar.

    Raises:
        InputError: no anchor, one anchor, two of one id, an unusable image, an unknown corruption or estimator.
    """
    corruption = checked_corruption(corruption)
    check_estimator(estimator)
    if len(anchors) < 2:
        raise InputError(f"{len(anchors)} anchors were given; a dataset-level shift needs at least 2 (the paper: 20 %)")
    check_unique(anchors)
    differences = anchor_differences(
        vlm, anchors, corruption=corruption, seed=seed, batch_size=batch_size, on_batch=on_batch
    )
    vectors, ratio = reduce_differences(differences, estimator)
    provenance = Provenance(
        model_id=vlm.model_id,
        revision=vlm.revision,
        architecture=type(vlm.model).__name__,
        hidden_size=vlm.hidden_size,
        n_layers=vlm.n_layers,
        config_hash=config_hash(vlm),
        anchor_hash=set_hash(anchors),
        n_anchors=len(anchors),
        text_condition=Condition.QUERY.value,
        corruption=corruption.value,
        seed=seed,
        estimator=estimator,
        norms=tuple(round(float(n), 6) for n in vectors.norm(dim=1)),
        explained_ratio=tuple(round(float(r), 6) for r in ratio),
        versions=library_versions(),
    )
    return ShiftVectors(vectors, provenance, recommended or Recommended())


def checked_corruption(corruption: Condition | str) -> Condition:
    """`corruption` as a `Condition`, or an `InputError` that lists the possible ones."""
    if corruption not in CORRUPTED:
        raise InputError(f"corruption is {corruption!r}; one of {', '.join(c.value for c in CORRUPTED)}")
    return Condition(corruption)


def check_estimator(estimator: str) -> None:
    """Raise `InputError` for an unknown estimator."""
    if estimator not in get_args(Estimator):
        raise InputError(f"estimator is {estimator!r}; one of {', '.join(get_args(Estimator))}")


def anchor_differences(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    corruption: Condition,
    seed: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """h_t - h_c of each sample: float32 [N, L, d] on the CPU."""
    text = build_requests(samples, Condition.QUERY)
    corrupted = build_requests(samples, corruption, seed=seed)
    h_t = capture(vlm, text, batch_size=batch_size, on_batch=on_batch)
    h_c = capture(vlm, corrupted, batch_size=batch_size, on_batch=on_batch)
    return h_t - h_c


def reduce_differences(differences: torch.Tensor, estimator: Estimator) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences [N, L, d] to vectors float32 [L, d] and the explained ratio [L]; computed in float64.

    - `pca`: first right singular vector of the UNCENTRED differences, its sign such that their mean projects
      positively, its length that mean projection. (PC1 of centred differences has neither scale nor sign.)
    - `mean`: the mean difference.
    - `icv`: the mean plus the unit first principal component of the centred differences, its sign such that it does
      not point against the mean (in-context vectors, Liu et al., arXiv 2311.06668).

    The ratio is the share of the uncentred sum of squares along the vector's direction.
    """
    check_estimator(estimator)
    vectors, ratios = [], []
    for layer in differences.double().unbind(dim=1):
        mean = layer.mean(dim=0)
        if estimator == "mean":
            vector = mean
        elif estimator == "pca":
            direction = torch.linalg.svd(layer, full_matrices=False).Vh[0]
            vector = direction * (mean @ direction)
        else:
            component = torch.linalg.svd(layer - mean, full_matrices=False).Vh[0]
            vector = mean + component * (1.0 if mean @ component >= 0 else -1.0)
        unit = vector / vector.norm().clamp_min(torch.finfo(torch.float64).tiny)
        ratios.append((layer @ unit).square().sum() / layer.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
        vectors.append(vector)
    return torch.stack(vectors).float(), torch.stack(ratios).float()
