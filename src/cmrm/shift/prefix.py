"""States of many prompts that begin alike: what they share is run once.

With a constant corrupted image everything up to and including the image's tokens is the same for
every anchor, and so is the system prompt of the text-only condition. That prefix is run once, its
key-value cache is expanded over the batch as a view, and only the rest of each prompt is run,
through the backbone alone (no `lm_head`).

This is exact where tokens behind the prefix cannot change those inside it: causal attention, or
attention in both directions within the image alone. Whether that holds is not read off a model's
name. The first prompt is run whole as well; where the two disagree (or the model cannot continue
from a cache) all prompts are run whole, and the reason is recorded.

A prefix belongs to the object that runs it, never to the model (`shift.pair.Prefixes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from cmrm.model.batching import out_of_memory
from cmrm.model.compat import backbone_of, cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.capture import StateHooks, Steps, capture_inputs
from cmrm.shift.likeness import Reference, alike, distance
from cmrm.shift.packing import (
    Continuations,
    Kept,
    Row,
    expanded,
    last_token_states,
    not_packable,
    packed_states,
    spans_of,
    window_of,
)
from cmrm.steering.hooks import refuse_inside_steering

OTHER_TEXT = "\u2022"
"""Stands for any other request when the shared part is searched for."""

KEPT_TOKENS = 32
"""The last prompt is used again where it saves at least so many tokens: fewer are run again more
quickly than a cache is copied."""

LONGEST_PAUSE = 64
"""After batches whose prompts share nothing, so many batches at most are run whole before the next
search."""

_NOT_BEHIND_A_CACHE = {"attention_mask", "mm_token_type_ids"}
"""Not needed there: everything in the cache is visible, padding stands last, and no image is
left."""

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
"""What models raise that do not continue from a cache, or take no mask for each pair of tokens."""

Encoded = dict[str, torch.Tensor]


class SharedPrefix:
    """Captures states of prompts that begin like the first one; others, and models that cannot, are
    run whole."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.backbone: Callable[..., Any] = backbone_of(vlm.model)
        self.reason: str | None = None
        """Why this model's prompts are always run whole, or None."""
        self.unpacked: str | None = None
        """Why continuations are run as a padded batch, or None while they are packed into one
        row."""
        self.unshared: str | None = None
        """Why the last batch was run whole although the model could share a prefix, or None."""
        self.difference: float | None = None
        """Largest relative difference of the probe's states between prefix and whole forward."""
        self.tokens = 0
        """Length of the prefix."""
        self.fresh_tokens = 0
        """Tokens that went through the model, padding included."""
        self.whole_tokens = 0
        """Tokens of all prompts, which a plain forward would have run, without padding."""
        self.reference: Reference | None = None
        """A whole forward that somebody has run already, for the probe."""
        self._kept: Kept | None = None
        self._in_conversation = False
        self._ids: torch.Tensor | None = None
        self._constants: Encoded = {}
        self._cache: Any = None
        self._offsets: torch.Tensor | None = None
        self._window: int | None = None
        self._pause = 0
        self._next_pause = 1

    @torch.inference_mode()
    def states(self, requests: Sequence[Request], steps: Steps | None = None) -> torch.Tensor:
        """States float32 [B, L, d] on the CPU of one batch, in the order given.

        `steps` are added to those states on the way.

        The prefix is what the first prompt shares with a prompt of the same image and another text.
        A batch in which no prompt begins with it (images of another size, in models that tile them)
        starts a new one.

        Raises:
            SteeringError: this context steers the model. Whatever `encode` raises.
        """
        refuse_inside_steering(self.vlm, "capturing states")
        with self.vlm.lock:
            return self.run(requests, self.encoded(requests), steps)

    def run(
        self,
        requests: Sequence[Request],
        encoded: Sequence[Encoded],
        steps: Steps | None = None,
    ) -> torch.Tensor:
        """States of `requests`, whose inputs are those that `encoded` gave."""
        together = [k for k, inputs in enumerate(encoded) if self._fits(inputs)]
        alone = [k for k in range(len(encoded)) if k not in set(together)]
        until = None if steps is None else steps.until
        n_layers = self.vlm.n_layers if until is None else until + 1
        states = torch.empty(len(encoded), n_layers, self.vlm.hidden_size)
        if together:
            states[together] = self._suffixes([encoded[k] for k in together], steps)
        if alone:
            states[alone] = self._whole([requests[k] for k in alone], steps)
        return states

    def encoded(self, requests: Sequence[Request]) -> list[Encoded]:
        """Each request's inputs, one row each; a prefix is made ready where at least one of them
        begins with one."""
        encoded = [encode(self.vlm, [request]) for request in requests]
        self._in_conversation = len(requests) == 1 and bool(requests[0].before)
        if self.reason is None and not any(self._fits(inputs) for inputs in encoded):
            if self._pause > 0:
                self._pause -= 1
            else:
                self._search(requests, encoded)
        self.whole_tokens += sum(inputs["input_ids"].shape[1] for inputs in encoded)
        return encoded

    def _search(self, requests: Sequence[Request], encoded: Sequence[Encoded]) -> None:
        """Begin a prefix with the first prompt; where it serves no other one, the next batches are
        run whole."""
        self.unshared = None
        self._begin(requests[0], encoded[0])
        useful = len(encoded) == 1 or any(self._fits(inputs) for inputs in encoded[1:])
        if self.reason is None and self._ids is not None and not useful:
            self._forget("the prompts of the batch have different images")
        if self.unshared is None:
            self._next_pause = 1
        else:
            self._pause = self._next_pause
            self._next_pause = min(LONGEST_PAUSE, 2 * self._next_pause)

    def _begin(self, request: Request, encoded: Encoded) -> None:
        """Run what `request` shares with others of its image; the first time compare its states
        with a whole forward."""
        ids = encoded["input_ids"][0]
        other = encode(self.vlm, [replace(request, text=OTHER_TEXT)])
        other_ids = other["input_ids"][0]
        shorter = min(len(ids), len(other_ids))
        same = int((ids[:shorter] == other_ids[:shorter]).int().cumprod(0).sum())
        image = (ids == self.vlm.image_token_id).nonzero().flatten()
        length = min(same, len(ids) - 1)
        if len(image) and self.vlm.skippable:
            self._give_up("images enter by cross-attention, not by tokens")
            return
        if length <= (int(image.max()) if len(image) else 0):
            self._forget("the prompts differ before the image ends")
            return
        self._constants = {k: v for k, v in encoded.items() if not self._follows_tokens(v, encoded)}
        self._kept = None
        self._ids = ids[:length].clone()
        self.tokens = length
        try:
            prefix = {
                k: (v[:, :length] if self._follows_tokens(v, encoded) else v)
                for k, v in encoded.items()
            }
            self._set_offsets(None)
            self._cache = cache_of(self.backbone(**prefix, use_cache=True, return_dict=True))
            self._offsets = getattr(self.backbone, "rope_deltas", None)
            self.fresh_tokens += length
            self._window = window_of(self._cache)
            if not all(isinstance(layer, DynamicLayer) for layer in self._cache.layers):
                self._give_up("the cache holds more than keys and values of attention")
            elif self.difference is None:
                self._probe(encoded, other)
        except REFUSALS as error:
            if out_of_memory(error):
                self._ids = None  # the smaller batch that follows begins again
                raise
            self._give_up(f"the model does not continue from a cache: {in_a_line(error)}")

    def _give_up(self, reason: str) -> None:
        """Run all prompts of this model whole from here on."""
        self.reason = reason
        self._drop()

    def _forget(self, reason: str) -> None:
        """Run this batch whole."""
        self.unshared = reason
        self._drop()

    def _drop(self) -> None:
        self._cache, self._ids, self._kept = None, None, None

    def _probe(self, encoded: Encoded, other: Encoded) -> None:
        """Compare states of `encoded` with a whole forward: packed behind `other`'s, and where that
        fails in a batch."""
        reference = self.reference
        if reference is None or not torch.equal(reference.ids, encoded["input_ids"][0]):
            reference = Reference(
                encoded["input_ids"][0], capture_inputs(self.vlm, encoded)[0], torch.empty(0)
            )
            self.fresh_tokens += encoded["input_ids"].shape[1]
        self.unpacked = not_packable(self.vlm)
        if self.unpacked is None and not self._in_window([encoded, other]):
            self.unpacked = f"attention sees {self._window} tokens back, which prompts exceed"
        if self.unpacked is None:
            try:
                states = self._packed([other, encoded])[1]
                self.difference = distance(states, reference.states)
                if alike(self.vlm, states, reference.states, reference.scale):
                    return
                self.unpacked = f"states differ by {self.difference:.2%}"
            except REFUSALS as error:
                if out_of_memory(error):
                    raise
                self.unpacked = in_a_line(error)
        states = self._padded([encoded])[0]
        self.difference = distance(states, reference.states)
        if not alike(self.vlm, states, reference.states, reference.scale):
            self._give_up(
                f"states differ by {self.difference:.2%}: tokens behind the prefix change those "
                "inside it"
            )

    def _set_offsets(self, offsets: torch.Tensor | None) -> None:
        """Models with multi-axis rotary positions keep their offset behind an image themselves,
        from run to run."""
        if hasattr(self.backbone, "rope_deltas"):
            self.backbone.rope_deltas = offsets

    def _follows_tokens(self, value: torch.Tensor, encoded: Encoded) -> bool:
        return (
            value.dim() == 2
            and value.shape[1] == encoded["input_ids"].shape[1]
            and value.shape[0] == 1
        )

    def _fits(self, encoded: Encoded) -> bool:
        """Whether this prompt begins with the prefix, with the same image, and is longer than
        it."""
        if self.reason is not None or self._ids is None:
            return False
        ids = encoded["input_ids"][0]
        if len(ids) <= self.tokens or not torch.equal(ids[: self.tokens], self._ids):
            return False
        if (ids[self.tokens :] == self.vlm.image_token_id).any():
            return False
        constants = {k: v for k, v in encoded.items() if not self._follows_tokens(v, encoded)}
        same_names = constants.keys() == self._constants.keys()
        return same_names and all(torch.equal(v, self._constants[k]) for k, v in constants.items())

    def start_of(self, encoded: Sequence[Encoded]) -> int:
        """Number of first tokens of these prompts that are not run again.

        It is the prefix. Of a single conversation of several turns it is all that the last single
        prompt began with, which leaves of its next turn the new tokens alone. Other prompts' states
        depend on nothing that ran before.
        """
        if len(encoded) == 1 and self._kept is not None and self._in_conversation:
            length = self._kept.shared_with(encoded[0]["input_ids"][0])
            if length >= self.tokens + KEPT_TOKENS:
                return length
        return self.tokens

    def _cache_of(self, start: int) -> Any:
        if start == self.tokens:
            return self._cache
        assert self._kept is not None
        return self._kept.first(start)

    def keep(
        self, encoded: Sequence[Encoded], cache: Any, spans: Sequence[slice] | None = None
    ) -> None:
        """Keep a single prompt's keys and values (spans None: all that `cache` holds); nothing of
        several."""
        if len(encoded) == 1 and self._window is None:
            ids = encoded[0]["input_ids"][0].clone()
            self._kept = Kept(
                ids, cache, tuple(spans) if spans is not None else (slice(0, len(ids)),)
            )

    def forget(self) -> None:
        """Drop the last prompt's keys and values."""
        self._kept = None

    def _behind(self, encoded: Encoded, start: int) -> Encoded:
        """Inputs by token behind the first `start` tokens: [n] by name."""
        return {
            name: value[0, start:]
            for name, value in encoded.items()
            if name not in _NOT_BEHIND_A_CACHE and self._follows_tokens(value, encoded)
        }

    def _suffixes(self, encoded: list[Encoded], steps: Steps | None) -> torch.Tensor:
        """States of prompts behind the prefix, each read at its last token."""
        if self.unpacked is None and self._in_window(encoded):
            return self._packed(encoded, steps)
        return self._padded(encoded, steps)

    def _in_window(self, encoded: list[Encoded]) -> bool:
        """Whether every layer's attention reaches from the end of each prompt to its beginning."""
        longest = max(inputs["input_ids"].shape[1] for inputs in encoded)
        return self._window is None or longest <= self._window

    def packs(self, encoded: Sequence[Encoded]) -> bool:
        """Whether all of these can be run behind the prefix in one row, beside continuations of
        another prefix."""
        return self.unpacked is None and self._window is None and all(map(self._fits, encoded))

    def continuations(self, encoded: Sequence[Encoded]) -> Continuations:
        """What follows the prefix in each of `encoded`, about to be run packed."""
        start = self.start_of(encoded)
        tokens = tuple(self._behind(inputs, start) for inputs in encoded)
        self.fresh_tokens += sum(len(rest["input_ids"]) for rest in tokens)
        self._set_offsets(self._offsets)
        return Continuations(self._cache_of(start), start, self._offsets, tokens)

    def packed(self, part: Continuations, steps: Steps | None = None) -> torch.Tensor:
        """States float32 [N, L, d] of continuations that `continuations` gave, run once more."""
        self._set_offsets(part.offset)
        return packed_states(self.vlm, self.backbone, [part], steps=steps)[0]

    def row(self, part: Continuations) -> Row:
        """Run continuations that fit into one row, and keep what they leave."""
        self._set_offsets(part.offset)
        used: list[Any] = []
        packed_states(self.vlm, self.backbone, [part], keep=used)
        width = sum(len(tokens["input_ids"]) for tokens in part.tokens)
        return Row(part, spans_of(used[0], [slice(part.length, part.length + width)]))

    def last_tokens(self, row: Row, steps: Steps) -> torch.Tensor:
        """States float32 [N, L, d] of a row's continuations; their last tokens alone are run."""
        self._set_offsets(row.part.offset)
        return last_token_states(self.vlm, self.backbone, row, steps)

    def _packed(self, encoded: list[Encoded], steps: Steps | None = None) -> torch.Tensor:
        used: list[Any] | None = [] if len(encoded) == 1 and steps is None else None
        parts = [self.continuations(encoded)]
        states = packed_states(self.vlm, self.backbone, parts, keep=used, steps=steps)[0]
        if used:
            self.keep(encoded, used[0])
        return states

    def _padded(self, encoded: list[Encoded], steps: Steps | None = None) -> torch.Tensor:
        start = self.start_of(encoded)
        tokens = [self._behind(inputs, start) for inputs in encoded]
        lengths = [len(rest["input_ids"]) for rest in tokens]
        width, rows = max(lengths), len(encoded)
        inputs = {
            name: torch.stack(
                [
                    torch.nn.functional.pad(rest[name], (0, width - len(rest[name])))
                    for rest in tokens
                ]
            )
            for name in tokens[0]
        }
        last = torch.tensor(lengths, device=inputs["input_ids"].device) - 1
        self._set_offsets(self._offsets)
        self.fresh_tokens += rows * width
        used = expanded(self._cache_of(start), rows)
        with StateHooks(self.vlm, last, steps=steps) as hooks:
            self.backbone(**inputs, **with_cache(self.backbone, used))
        if steps is None:
            self.keep(encoded, used)
        return hooks.states()

    def _whole(self, requests: list[Request], steps: Steps | None = None) -> torch.Tensor:
        inputs = encode(self.vlm, requests)
        self.fresh_tokens += inputs["input_ids"].numel()
        return capture_inputs(self.vlm, inputs, steps)


def in_a_line(error: BaseException) -> str:
    """Class and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
