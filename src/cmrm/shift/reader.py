"""Reads the states of anchors under both conditions, batch after batch, with checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch

from cmrm.errors import InputError
from cmrm.model.batching import in_batches
from cmrm.model.encode import encode
from cmrm.model.identity import identity_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Condition, Request, build_request, choose_donors
from cmrm.prompts.sample import Sample
from cmrm.prompts.splits import SetHash
from cmrm.shift.capture import capture_inputs
from cmrm.shift.checkpoint import Progress
from cmrm.shift.pair import PrefixPair
from cmrm.shift.prefix import SharedPrefix
from cmrm.shift.processes import gathered, process
from cmrm.shift.sequential import sequential_vectors
from cmrm.shift.summary import Summary

POOL = 8
"""Anchors are sorted by length within so many batches, so that little is padded and memory does not
grow with the set."""


class Reader:
    """One extraction on one model: its prefixes, its checkpoints, its corruption."""

    def __init__(
        self,
        vlm: VLM,
        corruption: Condition,
        *,
        seed: int,
        batch_size: int,
        reuse_prefix: bool,
        checkpoint: Path | None,
        checkpoint_seconds: float,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        """See `estimate.estimate_shift` for the arguments."""
        self.vlm = vlm
        self.corruption = corruption
        self.seed = seed
        self.batch_size = batch_size
        self.checkpoint_seconds = checkpoint_seconds
        self.on_batch = on_batch
        self.identity = identity_of(vlm)
        self.pair = PrefixPair(vlm, SharedPrefix(vlm), SharedPrefix(vlm)) if reuse_prefix else None
        rank, world = process()
        self.key = f"{self.identity.key} {corruption.value} {seed} {rank}/{world}"
        if checkpoint is not None and world > 1:
            checkpoint = checkpoint.with_name(f"{checkpoint.name}.{rank}")
        self.checkpoint = checkpoint

    def _file(self, part: str) -> Path | None:
        """The checkpoint of a part of the extraction."""
        if self.checkpoint is None or not part:
            return self.checkpoint
        return self.checkpoint.with_name(f"{self.checkpoint.name}.{part}")

    def read(
        self, samples: Iterable[Sample], part: str, *, keep: int, least: int
    ) -> tuple[Summary, SetHash]:
        """The summary of all samples, and their hash.

        Args:
            samples: anchors of one kind.
            part: names their checkpoint; empty for the first kind.
            keep: anchors whose states are kept.
            least: fewest samples.

        Raises:
            InputError: there are fewer; see `estimate.estimate_shift` for the rest.
        """
        donors = None
        if self.corruption is Condition.OTHER:
            samples = list(samples)
            donors = choose_donors(samples, seed=self.seed)

        def work(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
            text = [build_request(s, Condition.QUERY) for s in batch]
            corrupted = [
                build_request(s, self.corruption, seed=self.seed, donors=donors) for s in batch
            ]
            if self.pair is not None:
                return self.pair.states(text, corrupted)
            vlm = self.vlm
            h_t, h_c = (capture_inputs(vlm, encode(vlm, some)) for some in (text, corrupted))
            return h_t, h_c

        rank, world = process()
        progress = Progress.resume(
            Summary(self.vlm.n_layers, self.vlm.hidden_size, keep=keep),
            self._file(part),
            f"{self.key} {part} {keep}".rstrip(),
            seconds=self.checkpoint_seconds,
            clock=time.monotonic,
        )
        skipped = progress.summary.count
        members = SetHash()
        source = iter(samples)
        with progress:
            while pool := list(islice(source, POOL * self.batch_size * world)):
                for sample in pool:
                    members.add(sample)
                share = sorted(pool, key=lambda s: len(s.query))[rank::world]
                again, share = share[:skipped], share[skipped:]
                skipped -= len(again)
                progress.replay(again, at_the_end=skipped == 0)
                if again:
                    self._tick(2 * len(again))
                for batch, (h_t, h_c) in in_batches(share, self.batch_size, work):
                    progress.take(batch, h_t, h_c)
                    self._tick(2 * len(batch))
        if members.count < least:
            kind = f"{part} anchors" if part else "anchors"
            raise InputError(
                f"{members.count} {kind} were given; a dataset-level shift needs at least {least} "
                "(the paper: 20 % of a set)"
            )
        if skipped:
            raise InputError(
                f"{self._file(part)} was written for more anchors than these; remove it to start "
                "again"
            )
        return _merged(progress.summary), members

    def sequential(
        self, samples: Sequence[Sample], text_mean: torch.Tensor, layers: Sequence[int]
    ) -> torch.Tensor:
        """Vectors of the schedule `sequential`; see `sequential.sequential_vectors`."""
        donors = None
        if self.corruption is Condition.OTHER:
            donors = choose_donors(samples, seed=self.seed)

        def corrupted(sample: Sample) -> Request:
            return build_request(sample, self.corruption, seed=self.seed, donors=donors)

        members = SetHash()
        for sample in samples:
            members.add(sample)
        return sequential_vectors(
            self.vlm,
            samples,
            corrupted,
            text_mean,
            layers,
            runner=None if self.pair is None else self.pair.corrupted,
            batch_size=self.batch_size,
            checkpoint=self._file("sequential"),
            key=f"{self.key} {members.hexdigest()}",
            seconds=self.checkpoint_seconds,
            on_batch=self.on_batch,
        )

    def _tick(self, prompts: int) -> None:
        if self.on_batch is not None:
            self.on_batch(prompts)


def _merged(summary: Summary) -> Summary:
    """The summary of all processes, in every one of them."""
    parts = gathered(summary.to_dict())
    if len(parts) == 1:
        return summary
    merged, *others = [Summary.from_dict(tensors) for tensors in parts]
    for other in others:
        merged.merge(other)
    return merged
