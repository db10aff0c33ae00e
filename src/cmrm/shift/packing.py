"""Many short continuations of cached prefixes in ONE row: nothing is padded, and no cache is
expanded over a batch.

A row of T new tokens holds the continuations one behind the other. A mask lets each see its own
prefix and, causally, itself; positions count on from its prefix. Several prefixes (text-only and
corrupted image) may stand side by side in one cache. Attention is then over all of them, the rest
of each block over T tokens alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from cmrm.model.compat import with_cache
from cmrm.model.vlm import VLM
from cmrm.shift.capture import StateHooks, Steps

PACKABLE = {"sdpa", "eager"}
"""Attention implementations that take a mask for each pair of tokens."""

LEAST_TOKENS = 512
"""A row takes at least this many new tokens, and as many as its prefixes hold where they are
longer: attention among continuations that do not see each other then costs at most what attention
to the prefixes does."""

PROMPTS_IN_ROW: ContextVar[int | None] = ContextVar("cmrm_prompts_in_row", default=None)
"""Number of prompts in the row that is being run, for whoever counts them; None: one in each
row."""


@dataclass(frozen=True)
class Continuations:
    """Continuations of one prefix."""

    cache: Any
    """Keys and values of the prefix, one row; left as it is."""
    length: int
    """Tokens of the prefix."""
    offset: torch.Tensor | None
    """What multi-axis rotary positions add behind the prefix (transformers' `rope_deltas`, [1, 1]);
    None for plain positions."""
    tokens: tuple[dict[str, torch.Tensor], ...]
    """For each continuation its inputs by token: int64 [n] by name, `input_ids` among them."""


@dataclass(frozen=True)
class Kept:
    """The last prompt that was run on its own: a conversation's next turn begins with it."""

    ids: torch.Tensor
    """int64 [n], the whole prompt."""
    cache: Any
    """Keys and values, one row."""
    spans: tuple[slice, ...]
    """Their places in the cache, in order."""

    def shared_with(self, ids: torch.Tensor) -> int:
        """Number of tokens that another prompt begins with too; its last one is left to be run."""
        shorter = min(len(ids) - 1, len(self.ids))
        return int((ids[:shorter] == self.ids[:shorter]).int().cumprod(0).sum())

    def first(self, length: int) -> Any:
        """A cache of the first `length` tokens."""
        spans = []
        for span in self.spans:
            size = min(length, span.stop - span.start)
            spans.append(slice(span.start, span.start + size))
            length -= size
        return spans_of(self.cache, spans)


def not_packable(vlm: VLM) -> str | None:
    """Why continuations of a prefix cannot share a row in this model, or None."""
    configs = (vlm.model.config, vlm.model.config.get_text_config())
    attention = {getattr(config, "_attn_implementation", None) for config in configs}
    others = ", ".join(sorted(str(name) for name in attention - PACKABLE))
    return f"the attention implementation {others} takes no such mask" if others else None


def window_of(cache: Any) -> int | None:
    """Tokens in the narrowest attention window of a cache's layers; None: every layer sees
    everything.

    A prompt longer than the window cannot be packed.
    """
    windows = [
        layer.sliding_window for layer in cache.layers if getattr(layer, "is_sliding", False)
    ]
    return min(windows, default=None)


def packed_states(
    vlm: VLM,
    backbone: Callable[..., Any],
    parts: Sequence[Continuations],
    cache: Any = None,
    keep: list[Any] | None = None,
    steps: Steps | None = None,
) -> list[torch.Tensor]:
    """States float32 [N, L, d] on the CPU at the last token of each continuation, for each of
    `parts`.

    Args:
        vlm: the model.
        backbone: the model without its `lm_head`.
        parts: prefixes with their continuations.
        cache: `side_by_side` of the parts' caches, where it has been made.
        keep: takes the cache of each pass, which holds its row behind the prefixes.
        steps: what is added to those states on the way.

    Raises:
        KeyError: the parts have not the same inputs by token. Whatever the model raises.
    """
    least = max(LEAST_TOKENS, sum(part.length for part in parts))
    waiting = [(k, tokens) for k, part in enumerate(parts) for tokens in part.tokens]
    if cache is None:
        cache = side_by_side([part.cache for part in parts])
    states: list[list[torch.Tensor]] = [[] for _ in parts]
    while waiting:
        taken, size = 0, 0
        while taken < len(waiting) and (
            taken == 0 or size + len(waiting[taken][1]["input_ids"]) <= least
        ):
            size += len(waiting[taken][1]["input_ids"])
            taken += 1
        row, waiting = waiting[:taken], waiting[taken:]
        states_of_row, used = _one_row(vlm, backbone, parts, cache, row, steps)
        if keep is not None:
            keep.append(used)
        for (k, _), state in zip(row, states_of_row, strict=True):
            states[k].append(state)
    return [torch.stack(of_part) for of_part in states]


@dataclass(frozen=True)
class Row:
    """Continuations of one prefix that were run packed into one row, and what they left."""

    part: Continuations
    """The prefix with the row's continuations."""
    cache: Any
    """Keys and values of the row's tokens, without those of the prefix."""

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def rows_of(part: Continuations) -> list[Continuations]:
    """The same continuations, split so that each part is one row."""
    least = max(LEAST_TOKENS, part.length)
    rows: list[list[dict[str, torch.Tensor]]] = []
    size = 0
    for tokens in part.tokens:
        length = len(tokens["input_ids"])
        if not rows or size + length > least:
            rows.append([])
            size = 0
        rows[-1].append(tokens)
        size += length
    return [replace(part, tokens=tuple(tokens)) for tokens in rows]


def last_token_states(
    vlm: VLM, backbone: Callable[..., Any], row: Row, steps: Steps | None
) -> torch.Tensor:
    """States float32 [N, L, d] at the last token of each continuation, with `steps` added on the
    way; those last tokens alone are run, on the keys and values of all others.

    Exact where a token's keys and values depend on no later token, which is what a shared prefix
    is tested for (`prefix.SharedPrefix`).
    """
    part, device, dtype = row.part, vlm.device, vlm.model.dtype
    lengths = [len(tokens["input_ids"]) for tokens in part.tokens]
    n, past, width = len(lengths), part.length, sum(lengths)
    hidden = torch.finfo(dtype).min
    mask = torch.full((1, 1, n, past + width + n), hidden, dtype=dtype, device=device)
    mask[..., :past] = 0
    at = past
    for k, length in enumerate(lengths):
        mask[..., k, at : at + length - 1] = 0
        mask[..., k, past + width + k] = 0
        at += length
    positions = torch.tensor(lengths, device=device) + (past - 1)
    if part.offset is not None:
        positions = positions + part.offset.to(device).flatten()[0]
    inputs = {
        name: torch.cat([tokens[name][-1:] for tokens in part.tokens])[None].to(device)
        for name in part.tokens[0]
    }
    inputs |= {"attention_mask": mask, "position_ids": _by_axis(positions, [part])}
    used = expanded(side_by_side([part.cache, row.cache]), 1)
    return _run(vlm, backbone, inputs, used, torch.arange(n, device=device), steps)


def _one_row(
    vlm: VLM,
    backbone: Callable[..., Any],
    parts: Sequence[Continuations],
    cache: Any,
    row: Sequence[tuple[int, dict[str, torch.Tensor]]],
    steps: Steps | None = None,
) -> tuple[torch.Tensor, Any]:
    """States [len(row), L, d] of one forward pass, and the cache that it filled.

    `row` holds (number of its part, inputs by token).
    """
    starts = [sum(part.length for part in parts[:k]) for k in range(len(parts) + 1)]
    past, lengths = starts[-1], [len(tokens["input_ids"]) for _, tokens in row]
    width, device, dtype = sum(lengths), vlm.device, vlm.model.dtype
    hidden = torch.finfo(dtype).min
    mask = torch.full((1, 1, width, past + width), hidden, dtype=dtype, device=device)
    longest = torch.full((max(lengths), max(lengths)), hidden, dtype=dtype, device=device).triu(1)
    positions, at = [], 0
    for (k, _), length in zip(row, lengths, strict=True):
        mask[..., at : at + length, starts[k] : starts[k + 1]] = 0
        mask[..., at : at + length, past + at : past + at + length] = longest[:length, :length]
        counted = torch.arange(parts[k].length, parts[k].length + length, device=device)
        offset = parts[k].offset
        positions.append(counted if offset is None else counted + offset.to(device).flatten()[0])
        at += length
    inputs = {
        name: torch.cat([tokens[name] for _, tokens in row])[None].to(device) for name in row[0][1]
    }
    inputs |= {"attention_mask": mask, "position_ids": _by_axis(torch.cat(positions), parts)}
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    used = expanded(cache, 1)
    return _run(vlm, backbone, inputs, used, last, steps), used


def _by_axis(positions: torch.Tensor, parts: Sequence[Continuations]) -> torch.Tensor:
    """Positions int64 [T] of a row as a model takes them: [1, T], or [3, 1, T] where they have
    three axes."""
    axes = any(part.offset is not None for part in parts)
    return positions[None].expand(3, 1, -1) if axes else positions[None]


def _run(
    vlm: VLM,
    backbone: Callable[..., Any],
    inputs: dict[str, torch.Tensor],
    cache: Any,
    places: torch.Tensor,
    steps: Steps | None,
) -> torch.Tensor:
    """States float32 [N, L, d] at N places of one row that is run behind `cache`."""
    token = PROMPTS_IN_ROW.set(len(places))
    try:
        with StateHooks(vlm, places, torch.zeros_like(places), steps) as hooks:
            backbone(**inputs, **with_cache(backbone, cache))
    finally:
        PROMPTS_IN_ROW.reset(token)
    return hooks.states()


def expanded(cache: Any, rows: int) -> Any:
    """A cache over `rows` rows whose keys and values are views of a cache of one row, which is left
    as it is."""
    copied = copy.copy(cache)
    copied.layers = []
    for layer in cache.layers:
        layer = copy.copy(layer)
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4:
                setattr(layer, name, tensor.expand(rows, -1, -1, -1))
        copied.layers.append(layer)
    return copied


def side_by_side(caches: Sequence[Any]) -> Any:
    """One cache with the keys and values of `caches` one behind the other; each [1, heads, tokens,
    width]."""
    if len(caches) == 1:
        return caches[0]
    joined = expanded(caches[0], 1)
    for index, layer in enumerate(joined.layers):
        if layer.keys is None:  # a layer that text alone skips
            continue
        layer.keys = torch.cat([cache.layers[index].keys for cache in caches], dim=2)
        layer.values = torch.cat([cache.layers[index].values for cache in caches], dim=2)
    return joined


def spans_of(cache: Any, spans: Sequence[slice]) -> Any:
    """A cache of one row with the keys and values of `spans` of tokens alone; the original is left
    as it is."""
    selected = expanded(cache, 1)
    for layer in selected.layers:
        if layer.keys is None:
            continue
        layer.keys = torch.cat([layer.keys[:, :, span] for span in spans], dim=2)
        layer.values = torch.cat([layer.values[:, :, span] for span in spans], dim=2)
    return selected
