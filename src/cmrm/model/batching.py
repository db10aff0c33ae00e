"""Batches that shrink when memory runs out, instead of a run that dies."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

from cmrm.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Iterable[Item], size: int, work: Callable[[list[Item]], Result]
) -> Iterator[tuple[list[Item], Result]]:
    """Results of `work` on consecutive lists of up to `size` items, as (batch, result), in order.

    Items are read as they are needed. Where memory runs out, the batch is halved and stays halved
    for the rest; a warning says so once. Out of memory on a single item is raised as it is.

    Raises:
        InputError: `size` is below 1.
    """
    if size < 1:
        raise InputError(f"batch_size is {size}; it is at least 1")
    source = iter(items)
    waiting: list[Item] = []
    warned = False
    while waiting := waiting + list(islice(source, max(0, size - len(waiting)))):
        batch = waiting[:size]
        exhausted = False
        try:
            result = work(batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
            exhausted = True
        if exhausted:  # outside of the handler, whose traceback would keep the failed batch alive
            size = len(batch) // 2
            release_memory()
            if not warned:
                warnings.warn(
                    f"out of memory with a batch of {len(batch)}; smaller batches from here",
                    stacklevel=2,
                )
                warned = True
            continue
        waiting = waiting[len(batch) :]
        yield batch, result


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an accelerator's or the machine's memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Return what a failed batch left behind to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
