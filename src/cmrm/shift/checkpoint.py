"""The state of an extraction on disk: a killed run continues where its last checkpoint stands."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmrm.errors import InputError
from cmrm.files import atomic_path
from cmrm.prompts.sample import Sample, content_key
from cmrm.shift.summary import Summary


class Progress:
    """Summary of the anchors that were taken in, and the file that records it. Context manager: an
    interruption writes the file."""

    def __init__(
        self,
        summary: Summary,
        chain: str,
        path: Path | None,
        key: str,
        *,
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        """`chain`: hash over the anchors taken in, in order; `key`: model, corruption, seed and
        share."""
        self.summary = summary
        self.chain = chain
        self.path = path
        self.key = key
        self.seconds = seconds
        self.clock = clock
        self._replayed = ""
        self._written = clock()
        self._unwritten = False

    @classmethod
    def resume(
        cls,
        empty: Summary,
        path: Path | None,
        key: str,
        *,
        seconds: float,
        clock: Callable[[], float],
    ) -> Progress:
        """The progress that `path` records; from nothing where there is no file, or a damaged one.

        Raises:
            InputError: the file belongs to another run.
        """
        fresh = cls(empty, "", path, key, seconds=seconds, clock=clock)
        if path is None:
            return fresh
        stored = read_state(path, key)
        if stored is None:
            return fresh
        metadata, tensors = stored
        try:
            summary = Summary.from_dict(tensors)
        except (KeyError, ValueError, RuntimeError, TypeError):
            return fresh
        return cls(summary, metadata.get("chain", ""), path, key, seconds=seconds, clock=clock)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._unwritten:
            self.write()

    def take(self, batch: Sequence[Sample], text: torch.Tensor, corrupted: torch.Tensor) -> None:
        """Take in a batch's states; the file is written where the last writing is long ago."""
        self.summary.update(text, corrupted)
        for sample in batch:
            self.chain = _link(self.chain, sample)
        self._unwritten = self.path is not None
        if self._unwritten and self.clock() - self._written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: the place cannot be written to.
        """
        assert self.path is not None
        metadata = {"key": self.key, "chain": self.chain}
        write_state(self.path, metadata, self.summary.to_dict())
        self._written = self.clock()
        self._unwritten = False

    def replay(self, again: Sequence[Sample], *, at_the_end: bool) -> None:
        """Follow anchors that were taken in before the interruption; at the end they must be those
        of the file.

        Raises:
            InputError: they are others, or in another order.
        """
        for sample in again:
            self._replayed = _link(self._replayed, sample)
        if again and at_the_end and self._replayed != self.chain:
            raise InputError(
                f"{self.path} was written for other anchors, or in another order; remove it to "
                "start again"
            )


def read_state(path: Path, key: str) -> tuple[dict[str, str], dict[str, torch.Tensor]] | None:
    """Metadata and tensors of a checkpoint; None where there is no file, or a damaged one.

    Raises:
        InputError: the file belongs to another run.
    """
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if metadata.get("digest") != _digest(metadata, tensors):
            return None
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, TypeError):
        return None
    if metadata.get("key") != key:
        raise InputError(
            f"{path} was written by another run (model, corruption, seed or share, or with other "
            "kinds of anchors); remove it to start again"
        )
    return metadata, tensors


def write_state(path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        InputError: the place cannot be written to.
    """
    digest = _digest(metadata, tensors)
    try:
        with atomic_path(path) as part:
            save_file(tensors, str(part), metadata={**metadata, "digest": digest})
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove the checkpoints of all parts of a finished extraction; each process of several has its
    own."""
    ending = re.compile(re.escape(checkpoint.name) + r"(\.\d+)?(\.benign|\.sequential)?")
    for file in checkpoint.parent.iterdir():
        if ending.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _link(chain: str, sample: Sample) -> str:
    return hashlib.sha256(f"{chain}\x00{sample.id}\x00{content_key(sample)}".encode()).hexdigest()


def _digest(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{metadata.get('key')}\x00{metadata.get('chain')}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\x00{name}\x00{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
