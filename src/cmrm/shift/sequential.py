"""The sequential schedule: each layer's vector is estimated with all lower chosen layers steered.

For the chosen layers in ascending order:  delta_l = mean over anchors of (h_t,l - h'_c,l), h'_c the
corrupted-image state with the deltas of all lower chosen layers added. With alpha 1.0 the anchors'
mean state equals the text mean at every chosen layer exactly, not to first order as under
`telescoped` (closed-loop estimation, as in JRS-Rem, arXiv 2603.17372, and MARS, arXiv 2606.31876).

Only the last prompt token is moved. Each layer costs one pass over the anchors' last tokens, on the
keys and values of what stands before them, and the pass ends at that layer. Of anchors beyond
`MOST_BYTES` of keys and values the whole text behind the cached prefix is run, so memory does not
grow with their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cmrm.model.batching import in_batches, out_of_memory
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.capture import Steps, capture_inputs
from cmrm.shift.checkpoint import read_state, write_state
from cmrm.shift.likeness import alike
from cmrm.shift.packing import Continuations, Row, rows_of
from cmrm.shift.prefix import SharedPrefix
from cmrm.shift.processes import gathered, process, total_over_processes

MOST_BYTES = 2**30
"""Keys and values of anchors' texts that are kept between the layers' passes."""


def sequential_vectors(
    vlm: VLM,
    anchors: Sequence[Sample],
    corrupted: Callable[[Sample], Request],
    text_mean: torch.Tensor,
    layers: Sequence[int],
    *,
    runner: SharedPrefix | None,
    batch_size: int,
    checkpoint: Path | None,
    key: str,
    seconds: float,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """delta_l of the chosen layers: float32 [L, d], zero elsewhere.

    Args:
        vlm: the model.
        anchors: all anchors, in the same order in each process.
        corrupted: a sample's request with its corrupted image.
        text_mean: float64 [L, d], mean of h_t over all anchors.
        layers: chosen decoder layers, ascending.
        runner: shared prefix of the corrupted prompts; None: every prompt is run whole.
        batch_size: prompts per pass.
        checkpoint: file that records finished layers and the sum of the one that is run.
        key: identifies the run.
        seconds: least time between two writings of the checkpoint.
        on_batch: called after each batch with its number of prompts.

    Raises:
        InputError: the checkpoint belongs to another run.
    """
    rank, world = process()
    share = sorted(anchors, key=lambda sample: len(sample.query))[rank::world]
    states_of = _Passes(vlm, runner, corrupted)
    deltas = torch.zeros(vlm.n_layers, vlm.hidden_size)
    total = torch.zeros(vlm.hidden_size, dtype=torch.float64)
    finished, seen = 0, 0
    key = f"sequential {key} {','.join(map(str, layers))}"
    stored = read_state(checkpoint, key) if checkpoint is not None else None
    if stored is not None:
        tensors = stored[1]
        deltas, total = tensors["deltas"].clone(), tensors["total"].clone()
        finished, seen = (int(value) for value in tensors["progress"])
    common = min(gathered(finished))
    if finished > common:  # this process wrote later than another one: all go on with one layer
        finished, seen = common, 0
        total = torch.zeros_like(total)
    written = time.monotonic()

    def record() -> None:
        nonlocal written
        if checkpoint is not None:
            progress = torch.tensor([finished, seen])
            tensors = {"deltas": deltas, "total": total, "progress": progress}
            write_state(checkpoint, {"key": key, "chain": ""}, tensors)
            written = time.monotonic()

    if on_batch is not None and (finished or seen):
        on_batch(finished * len(share) + seen)
    try:
        for layer in layers[finished:]:
            added = {below: deltas[below] for below in layers[:finished]}
            steps = Steps(added, until=layer)

            def work(batch: list[Sample], steps: Steps = steps) -> torch.Tensor:
                return states_of(batch, steps)[:, -1].double().sum(0)

            for batch, subtotal in in_batches(share[seen:], batch_size, work):
                total += subtotal
                seen += len(batch)
                if on_batch is not None:
                    on_batch(len(batch))
                if time.monotonic() - written >= seconds:
                    record()
            mean = total_over_processes(total) / len(anchors)
            deltas[layer] = (text_mean[layer] - mean).float()
            finished, seen = finished + 1, 0
            total = torch.zeros_like(total)
    except BaseException:
        record()
        raise
    return deltas


class _Passes:
    """Passes over the same batches, once for each layer: prompts behind a cached prefix are
    encoded once."""

    def __init__(
        self, vlm: VLM, runner: SharedPrefix | None, corrupted: Callable[[Sample], Request]
    ) -> None:
        self.vlm = vlm
        self.runner = runner
        self.corrupted = corrupted
        self._prepared: dict[tuple[int, ...], list[Continuations | Row]] = {}
        self._cache: Any = None
        self._bytes = 0
        self._rows: bool | None = None

    def __call__(self, batch: Sequence[Sample], steps: Steps) -> torch.Tensor:
        """States float32 [B, until + 1, d] of a batch."""
        runner, key = self.runner, tuple(map(id, batch))
        if runner is None:
            requests = [self.corrupted(sample) for sample in batch]
            return capture_inputs(self.vlm, encode(self.vlm, requests), steps)
        try:
            return self._behind_the_prefix(runner, batch, key, steps)
        except RuntimeError as error:
            if out_of_memory(error):  # nothing is held from here on, and the batch is run again
                self._prepared.clear()
                self._bytes = MOST_BYTES + 1
            raise

    @torch.inference_mode()
    def _behind_the_prefix(
        self, runner: SharedPrefix, batch: Sequence[Sample], key: tuple[int, ...], steps: Steps
    ) -> torch.Tensor:
        with self.vlm.lock:
            if key in self._prepared:
                return torch.cat([self._again(part, steps) for part in self._prepared[key]])
            requests = [self.corrupted(sample) for sample in batch]
            encoded = runner.encoded(requests)
            if not runner.packs(encoded):
                return runner.run(requests, encoded, steps)
            part = runner.continuations(encoded)
            if self._cache is not part.cache:  # keys and values of one prefix alone are held
                self._prepared.clear()
                self._cache, self._bytes = part.cache, 0
            self._prepared[key] = [self._kept(runner, row) for row in rows_of(part)]
            return torch.cat([self._again(part, steps) for part in self._prepared[key]])

    def _kept(self, runner: SharedPrefix, part: Continuations) -> Continuations | Row:
        """What later passes run again: the last tokens alone while there is room for the keys and
        values of the others, all of them beyond it.

        The first row is run in both ways; where they disagree, whole texts are run from then on.
        """
        if self._bytes > MOST_BYTES or self._rows is False:
            return part
        row = runner.row(part)
        if self._rows is None:
            states = runner.last_tokens(row, Steps())
            pairs = zip(states, runner.packed(part), strict=True)
            self._rows = all(alike(self.vlm, a, b, torch.empty(0)) for a, b in pairs)
            if not self._rows:
                return part
        self._bytes += row.size
        return row

    def _again(self, part: Continuations | Row, steps: Steps) -> torch.Tensor:
        assert self.runner is not None
        if isinstance(part, Row):
            return self.runner.last_tokens(part, steps)
        return self.runner.packed(part, steps)
