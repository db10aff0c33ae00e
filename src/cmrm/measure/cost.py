"""What a defence costs a request: prompts and tokens that are run, seconds, memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmrm.defenses import Defense, respond
from cmrm.engines.base import Decoding
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.packing import PROMPTS_IN_ROW

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What makes Linux forget a process's peak (man 5 proc)."""


@dataclass
class Meter:
    """Counts what passes through the backbone, and the time that it takes.

    A row that holds several packed prompts counts as several.
    """

    prefills: int = 0
    """Prompts, or parts of them behind a cached prefix, that were run."""
    prompt_tokens: int = 0
    """Their tokens, padding included."""
    decoded_tokens: int = 0
    """Tokens that were run one at a time."""
    seconds: float = 0.0
    """Wall-clock time inside `watching`."""
    requests: int = 0
    """Requests that were answered, as the caller says."""
    peak_bytes: int | None = None
    """Most memory above what was there before; None where it cannot be measured."""

    @contextmanager
    def watching(self, vlm: VLM, requests: int) -> Iterator[None]:
        """Count inside the block, for so many requests."""
        handle = vlm.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)
        try:
            with peak_memory(vlm.device) as peak:
                start = time.perf_counter()
                yield
                self.seconds += time.perf_counter() - start
                self.requests += requests
        finally:
            handle.remove()
        if peak.extra is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak.extra)

    def _count(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, width = hidden.shape[:2]
        packed = PROMPTS_IN_ROW.get()
        if width == 1 and packed is None:
            self.decoded_tokens += rows
        else:
            self.prefills += rows if packed is None else packed
            self.prompt_tokens += rows * width

    def per_request(self) -> dict[str, float]:
        """All of it divided by the number of requests."""
        n = max(1, self.requests)
        return {
            "prefills": round(self.prefills / n, 3),
            "prompt_tokens": round(self.prompt_tokens / n, 1),
            "decoded_tokens": round(self.decoded_tokens / n, 1),
            "seconds": round(self.seconds / n, 4),
        }


def cost_of(
    engine: TransformersEngine,
    defense: Defense,
    requests: Sequence[Request],
    options: Decoding,
    *,
    batch_size: int,
    warm_up: int = 2,
) -> dict[str, float | None]:
    """Cost of a defended model, per request, after a warm-up on the first few.

    `state_bytes` is the size of the defence's tensors, `peak_bytes` the peak of memory while
    batches were answered.
    """
    measured = list(requests[warm_up:]) or list(requests)
    respond(engine, defense, requests[:warm_up], Decoding(2))
    meter = Meter()
    with meter.watching(engine.vlm, len(measured)):
        respond(engine, defense, measured, options, batch_size=min(batch_size, len(measured)))
    size = sum(t.numel() * t.element_size() for part in defense.parts for t in part.state.values())
    return {**meter.per_request(), "state_bytes": float(size), "peak_bytes": meter.peak_bytes}


@dataclass
class Peak:
    """Outcome of `peak_memory`."""

    extra: int | None = None
    """Bytes above what was allocated at the beginning, set when the block ends; None where it
    cannot be measured."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak memory of a block: of CUDA's allocator where the model lies on a GPU, else of the
    process on Linux.

    What the C allocator keeps for later is returned first, so that one block does not hide
    another's peak.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.extra = torch.cuda.max_memory_allocated(device) - before
        return
    if not _forget_peak():
        yield peak
        return
    before = _kib("VmRSS")
    yield peak
    peak.extra = max(0, _kib("VmHWM") - before) * 1024


def _forget_peak() -> bool:
    """Return free memory and reset the process's peak; False where the system does not offer it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text(_RESET_PEAK)
    except (
        OSError,
        AttributeError,
        TypeError,
    ):  # no such file, no such function, no C library under no name
        return False
    return True


def _kib(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {name}")
