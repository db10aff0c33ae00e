"""From differences of states to shift vectors (Liu et al., arXiv 2410.09047, section 4).

The modelling assumption is h_o = h* + alpha (h_c - h_t), hence h* = h_o + alpha (h_t - h_c): a vector points FROM the
corrupted-image state h_c TO the text-only state h_t and is added. (The paper's Eq. 6 prints the opposite sign, against
its own Eq. 3.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmrm.shift.artifact import Provenance, Recommended, ShiftVectors, library_versions
from cmrm.model.batching import in_batches
from cmrm.shift.capture import capture_inputs
from cmrm.prompts.conditions import CORRUPTED, Condition, build_request, choose_donors
from cmrm.errors import InputError
from cmrm.files import atomic_path
from cmrm.model.vlm import VLM, config_hash, encode
from cmrm.shift.moments import Moments
from cmrm.shift.prefix import PrefixPair, SharedPrefix
from cmrm.prompts.sample import Sample, SetHash

Estimator = Literal["pca", "mean", "icv"]


POOL = 8
"""Anchors are sorted by length within so many batches, so that little is padded and memory does not grow with the set."""


def estimate_shift(
    vlm: VLM,
    anchors: Iterable[Sample],
    *,
    estimator: Estimator = "pca",
    corruption: Condition | str = Condition.BLANK,
    seed: int = 0,
    batch_size: int = 16,
    recommended: Recommended | None = None,
    reuse_prefix: bool = True,
    checkpoint: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> ShiftVectors:
    """Dataset-level shift over `anchors`: last prompt token, every decoder layer, text-only minus corrupted image.

    Memory does not grow with the number of anchors (`moments.Moments`). Where prompts begin alike (a constant corrupted image, the
    system prompt) the shared part is run once (`prefix.SharedPrefix`). Under `torch.distributed` (such as `accelerate
    launch`) each process takes its share of the batches, and every one returns the shift over all of them.

    Args:
        vlm: the model.
        anchors: at least two samples with an image; each needs its image only for the size of the corrupted one. Read
            once, as they are needed; the corruption `other` alone holds them all.
        estimator: see `reduce_differences`.
        corruption: what stands for the image in h_c; see `conditions`.
        seed: seed of noise, shuffles and donors.
        batch_size: prompts per forward pass.
        recommended: setting to store with the vectors; the calibrated preset when None.
        reuse_prefix: run what prompts share once; off runs every prompt whole.
        checkpoint: file that holds the state after every batch, so that a killed run goes on there; removed at the end.
        on_batch: told the number of prompts of each finished batch, for a progress bar.

    Raises:
        InputError: no anchor, one anchor, two of one id, an unusable image, an unknown corruption or estimator, a checkpoint of
            another run.
    """
    corruption = checked_corruption(corruption)
    check_estimator(estimator)
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
            return capture_inputs(vlm, encode(vlm, text)) - capture_inputs(vlm, encode(vlm, corrupted))
        h_t, h_c = pair.states(text, corrupted)
        return h_t - h_c

    rank, world = _process()
    if checkpoint is not None and world > 1:
        checkpoint = checkpoint.with_name(f"{checkpoint.name}.{rank}")
    key = f"{config_hash(vlm)} {corruption.value} {seed} {rank}/{world}"
    progress = Progress.resume(vlm, checkpoint, key)
    skipped = progress.moments.count
    members = SetHash()
    source = iter(anchors)
    while pool := list(islice(source, POOL * batch_size * world)):
        for sample in pool:
            members.add(sample)
        mine = sorted(pool, key=lambda s: len(s.query))[rank::world]
        again, mine = mine[:skipped], mine[skipped:]
        skipped -= len(again)
        progress.check(again, at_the_end=skipped == 0)
        if again and on_batch is not None:
            on_batch(2 * len(again))
        for batch, found in in_batches(mine, batch_size, differences):
            progress.take(batch, found)
            if on_batch is not None:
                on_batch(2 * len(batch))
    if members.count < 2:
        raise InputError(
            f"{members.count} anchors were given; a dataset-level shift needs at least 2 (the paper: 20 %)"
        )
    if skipped:
        raise InputError(f"{checkpoint} was written for more anchors than these; remove it to start anew")
    moments = _merged(progress.moments)
    vectors, ratio = moments.vectors(estimator)
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
        norms=tuple(round(float(n), 6) for n in vectors.norm(dim=1)),
        explained_ratio=tuple(round(float(r), 6) for r in ratio),
        versions=library_versions(),
    )
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return ShiftVectors(vectors, provenance, recommended or Recommended())


class Progress:
    """What an extraction has taken in so far, and the file that it goes on from after a kill."""

    def __init__(self, moments: Moments, chain: str, path: Path | None, key: str) -> None:
        """`chain` is a hash over the ids taken in, in order; `key` names model, corruption and share."""
        self.moments = moments
        self.chain = chain
        self.path = path
        self.key = key
        self._replayed = ""

    @classmethod
    def resume(cls, vlm: VLM, path: Path | None, key: str) -> Progress:
        """From `path` where it is there and whole, otherwise from nothing.

        Raises:
            InputError: the file belongs to another run.
        """
        fresh = cls(Moments(vlm.n_layers, vlm.hidden_size), "", path, key)
        if path is None or not path.exists():
            return fresh
        try:
            with safe_open(str(path), "pt") as handle:
                held = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            moments = Moments.from_dict(tensors)
        except (SafetensorError, OSError, KeyError, ValueError):
            return fresh
        if held.get("key") != key:
            raise InputError(
                f"{path} was written by another run (model, corruption, seed or share); remove it to start anew"
            )
        return cls(moments, held.get("chain", ""), path, key)

    def take(self, batch: Sequence[Sample], differences: torch.Tensor) -> None:
        """Take in a batch, and write the state where there is a file for it."""
        self.moments.update(differences)
        for sample in batch:
            self.chain = _link(self.chain, sample)
        if self.path is not None:
            try:
                with atomic_path(self.path) as part:
                    save_file(self.moments.to_dict(), str(part), metadata={"key": self.key, "chain": self.chain})
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error}") from None

    def check(self, again: Sequence[Sample], *, at_the_end: bool) -> None:
        """Follow samples that were taken in before the kill; when they end they must be those of the file."""
        for sample in again:
            self._replayed = _link(self._replayed, sample)
        if again and at_the_end and self._replayed != self.chain:
            raise InputError(f"{self.path} was written for other anchors, or in another order; remove it to start anew")


def _link(chain: str, sample: Sample) -> str:
    return hashlib.sha256(f"{chain}\x00{sample.id}\x00{sample.query}".encode()).hexdigest()


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
    parts = [Moments.from_dict(held) for held in gathered]
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]


def checked_corruption(corruption: Condition | str) -> Condition:
    """`corruption` as a `Condition`, or an `InputError` that lists the possible ones."""
    if corruption not in CORRUPTED:
        raise InputError(f"corruption is {corruption!r}; one of {', '.join(c.value for c in CORRUPTED)}")
    return Condition(corruption)


def check_estimator(estimator: str) -> None:
    """Raise `InputError` for an unknown estimator."""
    if estimator not in get_args(Estimator):
        raise InputError(f"estimator is {estimator!r}; one of {', '.join(get_args(Estimator))}")


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
    moments = Moments(differences.shape[1], differences.shape[2], limit=max(1, len(differences)))
    moments.update(differences.float())
    return moments.vectors(estimator)
