"""Several processes that estimate together, under `torch.distributed`."""

from __future__ import annotations

from typing import Any

import torch


def process() -> tuple[int, int]:
    """(rank, number of processes) of `torch.distributed`; (0, 1) without."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(value: Any) -> list[Any]:
    """`value` of every process, in every one of them."""
    _, world = process()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    torch.distributed.all_gather_object(values, value)
    return values


def total_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    return torch.stack(gathered(tensor)).sum(0)
