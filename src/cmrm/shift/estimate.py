"""From differences of states to shift vectors (Liu et al., arXiv 2410.09047, section 4).

The modelling assumption is h_o = h* + alpha (h_c - h_t), hence h* = h_o + alpha (h_t - h_c): a
vector points FROM the corrupted-image state h_c TO the text-only state h_t and is added. (The
paper's Eq. 6 prints the opposite sign, against its own Eq. 3.)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cmrm.errors import InputError
from cmrm.model.batching import in_batches
from cmrm.model.encode import encode
from cmrm.model.identity import config_hash, identity_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import CORRUPTED, Condition, Request, build_request, choose_donors
from cmrm.prompts.sample import Sample
from cmrm.prompts.splits import SetHash
from cmrm.shift.artifact import Provenance, ShiftVectors, library_versions
from cmrm.shift.capture import capture_inputs
from cmrm.shift.checkpoint import Progress
from cmrm.shift.moments import Estimate, Moments
from cmrm.shift.pair import Prefixes, PrefixPair
from cmrm.shift.prefix import SharedPrefix
from cmrm.steering.hooks import refuse_inside_steering
from cmrm.steering.setting import Steering

Estimator = Literal["pca", "mean", "icv"]

POOL = 8
"""Anchors are sorted by length within so many batches, so that little is padded and memory does not
grow with the set."""

CHECKPOINT_SECONDS = 30.0
"""Seconds between two writings of a checkpoint. On a 7B model each writes some 140 MB."""

LEAST_COSINE = 0.5
"""Below this cosine of a `pca` vector and the mean difference a warning is given."""


def estimate_shift(
    vlm: VLM,
    anchors: Iterable[Sample],
    *,
    estimator: Estimator = "pca",
    corruption: Condition | str = Condition.BLANK,
    seed: int = 0,
    batch_size: int = 16,
    recommended: Steering | None = None,
    reuse_prefix: bool = True,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    on_batch: Callable[[int], None] | None = None,
) -> ShiftVectors:
    """Dataset-level shift over `anchors`: last prompt token, every decoder layer, text-only minus
    corrupted image.

    Memory does not grow with the number of anchors (`moments.Moments`). Where prompts begin alike
    (a constant corrupted image, the system prompt) the shared part is run once
    (`prefix.SharedPrefix`). Under `torch.distributed` (such as `accelerate launch`) each process
    takes its share of the batches, and every one returns the shift over all of them.

    Args:
        vlm: the model.
        anchors: at least two samples with an image; most corruptions use its size alone. Read once,
            as they are needed; the corruption `other` alone reads them all at first.
        estimator: see `reduce_differences`.
        corruption: what stands for the image in h_c; see `conditions`.
        seed: seed of noise, shuffles and donors.
        batch_size: prompts per forward pass.
        recommended: setting to store with the vectors; the calibrated preset when None.
        reuse_prefix: run what prompts share once; off runs every prompt whole.
        checkpoint: file that records the state of the run, so that a killed run continues there. It
            stays: remove it when the artifact has been saved.
        checkpoint_seconds: least time between two writings of it; an interruption writes it too.
        on_batch: called after each batch with its number of prompts, for a progress bar.

    Raises:
        InputError: no anchor, one anchor, two of one id, an unusable image, an unknown corruption
            or estimator, a checkpoint of another run. SteeringError: this context steers the model.
    """
    corruption = checked_corruption(corruption)
    check_estimator(estimator)
    refuse_inside_steering(vlm, "estimating a shift")
    vlm.check_eval()
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it is at least 1")
    donors = None
    if corruption is Condition.OTHER:
        anchors = list(anchors)
        donors = choose_donors(anchors, seed=seed)
    pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm)) if reuse_prefix else None

    def differences(batch: list[Sample]) -> torch.Tensor:
        text = [build_request(s, Condition.QUERY) for s in batch]
        corrupted = [build_request(s, corruption, seed=seed, donors=donors) for s in batch]
        if pair is None:
            return capture_inputs(vlm, encode(vlm, text)) - capture_inputs(
                vlm, encode(vlm, corrupted)
            )
        h_t, h_c = pair.states(text, corrupted)
        return h_t - h_c

    identity = identity_of(vlm)
    rank, world = _process()
    if checkpoint is not None and world > 1:
        checkpoint = checkpoint.with_name(f"{checkpoint.name}.{rank}")
    key = f"{identity.key} {corruption.value} {seed} {rank}/{world}"
    progress = Progress.resume(
        Moments(vlm.n_layers, vlm.hidden_size),
        checkpoint,
        key,
        seconds=checkpoint_seconds,
        clock=time.monotonic,
    )
    skipped = progress.moments.count
    members = SetHash()
    source = iter(anchors)
    with progress:
        while pool := list(islice(source, POOL * batch_size * world)):
            for sample in pool:
                members.add(sample)
            share = sorted(pool, key=lambda s: len(s.query))[rank::world]
            again, share = share[:skipped], share[skipped:]
            skipped -= len(again)
            progress.replay(again, at_the_end=skipped == 0)
            if again and on_batch is not None:
                on_batch(2 * len(again))
            for batch, batch_differences in in_batches(share, batch_size, differences):
                progress.take(batch, batch_differences)
                if on_batch is not None:
                    on_batch(2 * len(batch))
    if members.count < 2:
        raise InputError(
            f"{members.count} anchors were given; a dataset-level shift needs at least 2 (the "
            "paper: 20 % of a set)"
        )
    if skipped:
        raise InputError(
            f"{checkpoint} was written for more anchors than these; remove it to start again"
        )
    estimate = _merged(progress.moments).estimate(estimator)
    _warn_of_small_cosines(estimate, estimator)
    provenance = Provenance(
        model_id=vlm.model_id,
        revision=vlm.revision,
        architecture=type(vlm.model).__name__,
        hidden_size=vlm.hidden_size,
        n_layers=vlm.n_layers,
        config_hash=config_hash(vlm),
        anchor_hash=members.hexdigest(),
        n_anchors=members.count,
        text_condition=Condition.QUERY.value,
        corruption=corruption.value,
        seed=seed,
        estimator=estimator,
        norms=_rounded(estimate.vectors.norm(dim=1)),
        explained_ratio=_rounded(estimate.explained),
        mean_norms=_rounded(estimate.mean_norms),
        mean_cosine=_rounded(estimate.mean_cosine),
        dropped_ratio=_rounded(estimate.dropped),
        versions=library_versions(),
    )
    return ShiftVectors(estimate.vectors, provenance, recommended or Steering(), identity=identity)


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def _warn_of_small_cosines(estimate: Estimate, estimator: str) -> None:
    small = (estimate.mean_cosine < LEAST_COSINE).nonzero().flatten().tolist()
    if estimator == "pca" and small:
        warnings.warn(
            f"at decoder layers {small} the first principal direction has little to do with the "
            "mean difference (cosine "
            f"down to {float(estimate.mean_cosine.min()):.2f}): the vector is much shorter than "
            "the mean shift. Consider "
            "estimator='mean', or more anchors",
            stacklevel=3,
        )


def _process() -> tuple[int, int]:
    """(rank, number of processes) of `torch.distributed`; (0, 1) without."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _merged(moments: Moments) -> Moments:
    """The moments of all processes, in every one of them."""
    _, world = _process()
    if world == 1:
        return moments
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, moments.to_dict())
    merged, *parts = [Moments.from_dict(tensors) for tensors in gathered]
    for part in parts:
        merged.merge(part)
    return merged


def checked_corruption(corruption: Condition | str) -> Condition:
    """`corruption` as a `Condition`, or an `InputError` that lists the possible ones."""
    if corruption not in CORRUPTED:
        raise InputError(
            f"corruption is {corruption!r}; one of {', '.join(c.value for c in CORRUPTED)}"
        )
    return Condition(corruption)


def check_estimator(estimator: str) -> None:
    """Raise `InputError` for an unknown estimator."""
    if estimator not in get_args(Estimator):
        raise InputError(f"estimator is {estimator!r}; one of {', '.join(get_args(Estimator))}")


def reduce_differences(
    differences: torch.Tensor, estimator: Estimator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences [N, L, d] to vectors float32 [L, d] and the explained ratio [L]; computed in
    float64.

    - `pca`: first right singular vector of the UNCENTRED differences, its sign such that their mean
      projects positively, its length that mean projection. (PC1 of centred differences has neither
      scale nor sign.)
    - `mean`: the mean difference.
    - `icv`: the mean plus the unit first principal component of the centred differences, its sign
      such that it does not point against the mean (in-context vectors, Liu et al., arXiv
      2311.06668).

    The ratio is the share of the uncentred sum of squares along the vector's direction.
    """
    check_estimator(estimator)
    moments = Moments(differences.shape[1], differences.shape[2], limit=max(1, len(differences)))
    moments.update(differences.float())
    estimate = moments.estimate(estimator)
    return estimate.vectors, estimate.explained


@dataclass(frozen=True)
class SampleLevel:
    """Sample-level CMRM: each row is steered by its own v = h_t - h_c, from two extra forward
    passes."""

    corruption: Condition = Condition.BLANK
    """What stands for the image in h_c; every corruption but `other`."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        corruption = checked_corruption(self.corruption)
        if corruption is Condition.OTHER:
            raise InputError(
                "the sample level has a single sample, and none that lends it an image; choose "
                "another corruption"
            )
        object.__setattr__(self, "corruption", corruption)


def sample_vectors(
    vlm: VLM,
    requests: Sequence[Request],
    level: SampleLevel,
    *,
    keys: Sequence[str] | None = None,
    prefixes: Prefixes | None = None,
) -> torch.Tensor:
    """Sample-level vectors of one batch: float32 [B, L, d], row i is h_t - h_c of `requests[i]`;
    zero without an image.

    Args:
        vlm: the model.
        requests: one batch.
        level: corruption and seed.
        keys: seeds of the corruption of each row's images; its text where None.
        prefixes: keeps the shared beginnings of prompts between calls; None: nothing is kept.

    Raises:
        SteeringError: this context steers the model.
    """
    vectors = torch.zeros(len(requests), vlm.n_layers, vlm.hidden_size)
    rows = [k for k, request in enumerate(requests) if request.all_images]
    if rows:
        vlm.check_eval()
        text = [requests[k].without_images() for k in rows]
        corrupted = [
            requests[k].corrupted(
                level.corruption, seed=level.seed, key=keys[k] if keys else requests[k].text
            )
            for k in rows
        ]
        pair = (prefixes or Prefixes(vlm)).pair(level.corruption.value)
        h_t, h_c = pair.states(text, corrupted)
        vectors[rows] = h_t - h_c
    return vectors
