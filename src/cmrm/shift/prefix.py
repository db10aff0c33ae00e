"""States of many prompts that begin alike: what they share is run once.

With a constant corrupted image everything up to and including the image's tokens is the same for every anchor, and so is
the system prompt of the text-only condition. That prefix is run once, its key-value cache is expanded over the batch as a
view, and only the rest of each prompt is run, through the backbone alone (no `lm_head`).

This is exact where tokens behind the prefix cannot change those inside it: causal attention, or attention in both
directions within the image alone. Whether that holds is not read off a model's name: the first prompt is run whole as well, and
where the two disagree (or the model cannot go on from a cache) all prompts are run whole, and the reason is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from cmrm.model.batching import out_of_memory
from cmrm.shift.capture import StateHooks, capture_inputs
from cmrm.model.compat import cache_of, with_cache
from cmrm.prompts.conditions import Request
from cmrm.model.vlm import VLM, encode
from cmrm.shift.packing import Continuations, Kept, expanded, not_packable, packed_states, side_by_side, window_of

TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.05
"""Largest distance between a state by prefix and by a whole forward, over the state's norm: float32, and 16-bit floats."""

JOINT_TOKENS = 96
"""Up to so many tokens behind both prefixes go through in one pass: reading the weights is what so short a pass costs. Beyond it
(`benchmarks/joint.py`) attention over the other condition's prefix costs more than the second reading."""

OTHER_TEXT = "\u2022"
"""Stands for any other request when the shared part is looked for."""

_NOT_BEHIND_A_CACHE = {"attention_mask", "mm_token_type_ids"}
"""Not needed there: everything in the cache is visible, padding stands last, and no image is left."""

_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
"""What models raise that do not go on from a cache, or take no mask for each pair of tokens."""

Encoded = dict[str, torch.Tensor]


KEPT_TOKENS = 32
"""What is kept of the last prompt is used where it saves at least so many tokens: fewer are run again more quickly than a cache is copied."""


class SharedPrefix:
    """Captures states of prompts that begin like the first one; others, and models that cannot, are run whole."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.backbone = backbone_of(vlm)
        self.reason: str | None = None
        """Why prompts are run whole, or None while the prefix is in use."""
        self.unpacked: str | None = None
        """Why what stands behind the prefix is run as a padded batch, or None while it is packed into one row."""
        self.difference: float | None = None
        """Largest relative difference of the probe's states between prefix and whole forward."""
        self.tokens = 0
        """Length of the prefix."""
        self.fresh_tokens = 0
        """Tokens that went through the model, padding included."""
        self.whole_tokens = 0
        """Tokens of all prompts, which a plain forward would have run, without padding."""
        self._kept: Kept | None = None
        self._goes_on = False
        self._ids: torch.Tensor | None = None
        self._extra: Encoded = {}
        self._cache: Any = None
        self._offsets: torch.Tensor | None = None
        self._window: int | None = None

    @torch.inference_mode()
    def states(self, requests: Sequence[Request]) -> torch.Tensor:
        """States float32 [B, L, d] on the CPU of one batch, in the order given.

        The prefix is what the first prompt shares with one of the same image and another text. A batch in which no prompt
        begins with it (images of another size, in models that tile them) starts a new one.
        """
        return self.run(requests, self.encoded(requests))

    def run(self, requests: Sequence[Request], encoded: Sequence[Encoded]) -> torch.Tensor:
        """States of `requests` whose inputs `encoded` gave."""
        together = [k for k, e in enumerate(encoded) if self._fits(e)]
        alone = [k for k in range(len(encoded)) if k not in set(together)]
        found = torch.empty(len(encoded), self.vlm.n_layers, self.vlm.hidden_size)
        if together:
            found[together] = self._suffixes([encoded[k] for k in together])
        if alone:
            found[alone] = self._whole([requests[k] for k in alone])
        return found

    def encoded(self, requests: Sequence[Request]) -> list[Encoded]:
        """Each request's inputs, one row each, with a prefix made ready that at least one of them begins with where there is one."""
        encoded = [encode(self.vlm, [request]) for request in requests]
        self._goes_on = len(requests) == 1 and bool(requests[0].before)
        if self.reason is None and not any(self._fits(e) for e in encoded):
            self._begin(requests[0], encoded[0])
            if self.reason is None and len(encoded) > 1 and not any(self._fits(e) for e in encoded[1:]):
                self._give_up("the prompts of a batch have different images")
        self.whole_tokens += sum(e["input_ids"].shape[1] for e in encoded)
        return encoded

    def _begin(self, request: Request, encoded: Encoded) -> None:
        """Run what `request` shares with others of its image; the first time compare its states with a whole forward."""
        a = encoded["input_ids"][0]
        other = encode(self.vlm, [replace(request, text=OTHER_TEXT)])
        b = other["input_ids"][0]
        shorter = min(len(a), len(b))
        same = int((a[:shorter] == b[:shorter]).int().cumprod(0).sum())
        image = (a == self.vlm.image_token_id).nonzero().flatten()
        length = min(same, len(a) - 1)
        if length <= (int(image.max()) if len(image) else 0):
            self._give_up("the prompts differ before the image ends")
            return
        if len(image) and self.vlm.skippable:
            self._give_up("images enter by cross-attention, not by tokens")
            return
        self._extra = {k: v for k, v in encoded.items() if not self._follows_tokens(v, encoded)}
        self._kept = None
        self._ids = a[:length].clone()
        self.tokens = length
        try:
            prefix = {k: (v[:, :length] if self._follows_tokens(v, encoded) else v) for k, v in encoded.items()}
            self._positions(None)
            self._cache = cache_of(self.backbone(**prefix, use_cache=True))
            self._offsets = getattr(self.backbone, "rope_deltas", None)
            self.fresh_tokens += length
            self._window = window_of(self._cache)
            if not all(isinstance(layer, DynamicLayer) for layer in self._cache.layers):
                self._give_up("the cache holds more than keys and values of attention")
            elif self.difference is None:
                self._probe(encoded, other)
        except _REFUSALS as error:
            if out_of_memory(error):
                self._ids = None  # the smaller batch that follows begins anew
                raise
            self._give_up(f"the model does not go on from a cache: {_in_a_line(error)}")

    def _give_up(self, reason: str) -> None:
        self.reason, self._cache, self._ids, self._kept = reason, None, None, None

    def _probe(self, encoded: Encoded, other: Encoded) -> None:
        """Compare states of `encoded` with a whole forward: packed behind `other`'s, and where that fails in a batch."""
        whole = capture_inputs(self.vlm, encoded)[0]
        self.fresh_tokens += encoded["input_ids"].shape[1]
        tolerance = TOLERANCE.get(self.vlm.model.dtype, HALF_TOLERANCE)
        self.unpacked = not_packable(self.vlm)
        if self.unpacked is None and not self._in_window([encoded, other]):
            self.unpacked = f"attention sees {self._window} tokens back, which prompts exceed"
        if self.unpacked is None:
            try:
                self.difference = _distance(self._packed([other, encoded])[1], whole)
                if self.difference <= tolerance:
                    return
                self.unpacked = f"states differ by {self.difference:.2%}"
            except _REFUSALS as error:
                if out_of_memory(error):
                    raise
                self.unpacked = _in_a_line(error)
        self.difference = _distance(self._padded([encoded])[0], whole)
        if not self.difference <= tolerance:
            self._give_up(f"states differ by {self.difference:.2%}: tokens behind the prefix change those inside it")

    def _positions(self, offsets: torch.Tensor | None) -> None:
        """Models with multi-axis rotary positions keep their offset behind an image on themselves, from run to run."""
        if hasattr(self.backbone, "rope_deltas"):
            self.backbone.rope_deltas = offsets

    def _follows_tokens(self, value: torch.Tensor, encoded: Encoded) -> bool:
        return value.dim() == 2 and value.shape[1] == encoded["input_ids"].shape[1] and value.shape[0] == 1

    def _fits(self, encoded: Encoded) -> bool:
        """Whether this prompt begins with the prefix, with the same image, and goes on behind it."""
        if self.reason is not None or self._ids is None:
            return False
        ids = encoded["input_ids"][0]
        if len(ids) <= self.tokens or not torch.equal(ids[: self.tokens], self._ids):
            return False
        if (ids[self.tokens :] == self.vlm.image_token_id).any():
            return False
        extra = {k: v for k, v in encoded.items() if not self._follows_tokens(v, encoded)}
        return extra.keys() == self._extra.keys() and all(torch.equal(v, self._extra[k]) for k, v in extra.items())

    def start_of(self, encoded: Sequence[Encoded]) -> int:
        """Tokens that are not run again of each of these prompts: the prefix; of a single conversation of several turns all that the last
        single prompt began with, which leaves of its next turn the new tokens alone. Other prompts' states hang on nothing that ran before."""
        if len(encoded) == 1 and self._kept is not None and self._goes_on:
            length = self._kept.shared_with(encoded[0]["input_ids"][0])
            if length >= self.tokens + KEPT_TOKENS:
                return length
        return self.tokens

    def _cache_of(self, start: int) -> Any:
        if start == self.tokens:
            return self._cache
        assert self._kept is not None
        return self._kept.first(start)

    def keep(self, encoded: Sequence[Encoded], cache: Any, spans: Sequence[slice] | None = None) -> None:
        """Remember a single prompt's keys and values (None: all that `cache` holds); nothing of several."""
        if len(encoded) == 1 and self._window is None:
            ids = encoded[0]["input_ids"][0].clone()
            self._kept = Kept(ids, cache, tuple(spans) if spans is not None else (slice(0, len(ids)),))

    def forget(self) -> None:
        """Drop what is kept of the last prompt."""
        self._kept = None

    def _behind(self, encoded: Encoded, start: int) -> Encoded:
        """Inputs by token of what stands behind the first `start` tokens: [n] by name."""
        return {
            name: value[0, start:]
            for name, value in encoded.items()
            if name not in _NOT_BEHIND_A_CACHE and self._follows_tokens(value, encoded)
        }

    def _suffixes(self, encoded: list[Encoded]) -> torch.Tensor:
        """States of prompts behind the prefix, each read at its last token."""
        if self.unpacked is None and self._in_window(encoded):
            return self._packed(encoded)
        return self._padded(encoded)

    def _in_window(self, encoded: list[Encoded]) -> bool:
        """Whether every layer's attention reaches from the end of each prompt to its beginning."""
        return self._window is None or max(one["input_ids"].shape[1] for one in encoded) <= self._window

    def packs(self, encoded: Sequence[Encoded]) -> bool:
        """Whether all of these can be run behind the prefix in one row, beside what stands behind another prefix."""
        return self.unpacked is None and self._window is None and all(self._fits(one) for one in encoded)

    def continuations(self, encoded: Sequence[Encoded]) -> Continuations:
        """What stands behind the prefix in each of `encoded`, about to be run packed."""
        start = self.start_of(encoded)
        tokens = tuple(self._behind(one, start) for one in encoded)
        self.fresh_tokens += sum(len(one["input_ids"]) for one in tokens)
        self._positions(self._offsets)
        return Continuations(self._cache_of(start), start, self._offsets, tokens)

    def _packed(self, encoded: list[Encoded]) -> torch.Tensor:
        used: list[Any] | None = [] if len(encoded) == 1 else None
        found = packed_states(self.vlm, self.backbone, [self.continuations(encoded)], keep=used)[0]
        if used:
            self.keep(encoded, used[0])
        return found

    def _padded(self, encoded: list[Encoded]) -> torch.Tensor:
        start = self.start_of(encoded)
        tokens = [self._behind(one, start) for one in encoded]
        lengths = [len(one["input_ids"]) for one in tokens]
        width, rows = max(lengths), len(encoded)
        inputs = {
            name: torch.stack([torch.nn.functional.pad(one[name], (0, width - len(one[name]))) for one in tokens])
            for name in tokens[0]
        }
        last = torch.tensor(lengths, device=inputs["input_ids"].device) - 1
        self._positions(self._offsets)
        self.fresh_tokens += rows * width
        with StateHooks(self.vlm, last) as hooks:
            used = expanded(self._cache_of(start), rows)
            self.backbone(**inputs, **with_cache(self.backbone, used))
        self.keep(encoded, used)
        return hooks.states()

    def _whole(self, requests: list[Request]) -> torch.Tensor:
        inputs = encode(self.vlm, requests)
        self.fresh_tokens += inputs["input_ids"].numel()
        return capture_inputs(self.vlm, inputs)


class PrefixPair:
    """Text-only and corrupted-image prompts of the same samples; a few tokens behind both prefixes go through in one pass.

    The first such batch is run in both ways; where they disagree the two are run one after the other from then on.
    """

    def __init__(self, vlm: VLM, text: SharedPrefix, corrupted: SharedPrefix) -> None:
        self.vlm = vlm
        self.text = text
        self.corrupted = corrupted
        self.apart: str | None = None
        """Why the two conditions are run one after the other where both could be packed, or None."""
        self.joint_batches = 0
        """Batches of which both conditions went through in one pass."""
        self._probed = False
        self._held: tuple[Any, Any, Any] = (None, None, None)

    @torch.inference_mode()
    def states(self, text: Sequence[Request], corrupted: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        """States float32 [B, L, d] on the CPU of both conditions."""
        runners, requests = (self.text, self.corrupted), (text, corrupted)
        encoded = [runner.encoded(some) for runner, some in zip(runners, requests, strict=True)]
        packs = all(runner.packs(some) for runner, some in zip(runners, encoded, strict=True))
        if self.apart is None and packs and self._fresh(encoded) <= JOINT_TOKENS:
            if not self._probed:
                self._probe([some[:1] for some in encoded])
            if self.apart is None:
                h_t, h_c = self._joint(encoded)
                self.joint_batches += 1
                return h_t, h_c
        return self.text.run(text, encoded[0]), self.corrupted.run(corrupted, encoded[1])

    def _fresh(self, encoded: Sequence[Sequence[Encoded]]) -> int:
        """Tokens that have to be run of both conditions."""
        runners = (self.text, self.corrupted)
        starts = [runner.start_of(some) for runner, some in zip(runners, encoded, strict=True)]
        return sum(
            one["input_ids"].shape[1] - start for some, start in zip(encoded, starts, strict=True) for one in some
        )

    def _joint(self, encoded: Sequence[Sequence[Encoded]]) -> list[torch.Tensor]:
        parts = [self.text.continuations(encoded[0]), self.corrupted.continuations(encoded[1])]
        used: list[Any] | None = [] if len(encoded[0]) == 1 else None
        found = packed_states(self.vlm, self.text.backbone, parts, self._side_by_side(parts), keep=used)
        if used is not None and len(used) == 1:
            at, behind = 0, sum(part.length for part in parts)
            for runner, some, part in zip((self.text, self.corrupted), encoded, parts, strict=True):
                new = len(part.tokens[0]["input_ids"])
                runner.keep(some, used[0], [slice(at, at + part.length), slice(behind, behind + new)])
                at, behind = at + part.length, behind + new
        return found

    def _side_by_side(self, parts: Sequence[Continuations]) -> Any:
        """The parts' caches in one; that of the two prefixes is made once."""
        if any(part.length > runner.tokens for part, runner in zip(parts, (self.text, self.corrupted), strict=True)):
            return side_by_side([part.cache for part in parts])
        if self._held[0] is not parts[0].cache or self._held[1] is not parts[1].cache:
            self._held = (parts[0].cache, parts[1].cache, side_by_side([part.cache for part in parts]))
        return self._held[2]

    def _probe(self, encoded: Sequence[Sequence[Encoded]]) -> None:
        """Run one prompt of each condition in one pass and in two."""
        alone = [self.text.run([], encoded[0])[0], self.corrupted.run([], encoded[1])[0]]
        self.text.forget()
        self.corrupted.forget()
        try:
            joint = self._joint(encoded)
        except _REFUSALS as error:
            if out_of_memory(error):
                raise
            self.apart = _in_a_line(error)
            return
        finally:  # what was kept is of a pass that may turn out wrong
            self.text.forget()
            self.corrupted.forget()
        worst = max(_distance(found[0], expected) for found, expected in zip(joint, alone, strict=True))
        if not worst <= TOLERANCE.get(self.vlm.model.dtype, HALF_TOLERANCE):
            self.apart = f"states differ by {worst:.2%}"
        self._probed = True


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance over layers of states [L, d], over the expected state's norm."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max())


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def backbone_of(vlm: VLM) -> Callable[..., Any]:
    """The model without its `lm_head`, where transformers keeps the two apart; otherwise the whole model."""
    inner = getattr(vlm.model, "model", None)
    if (
        inner is None
        or not hasattr(vlm.model, "lm_head")
        or "input_ids" not in inspect.signature(inner.forward).parameters
    ):
        whole: Callable[..., Any] = vlm.model
        return whole
    found: Callable[..., Any] = inner
    return found


def shared_pair(vlm: VLM, corruption: str) -> PrefixPair:
    """The pair that `vlm` keeps for text-only beside one corruption; a new one when the model's weights have changed since it was made."""
    state = _weights_state(vlm)
    if vlm.memo.get("prefix weights") != state:
        for name in [name for name in vlm.memo if name.startswith("prefix ")]:
            del vlm.memo[name]
        vlm.memo["prefix weights"] = state
    if "prefix query" not in vlm.memo:
        vlm.memo["prefix query"] = SharedPrefix(vlm)
    name = f"prefix pair {corruption}"
    if name not in vlm.memo:
        vlm.memo[name] = PrefixPair(vlm, vlm.memo["prefix query"], SharedPrefix(vlm))
    pair: PrefixPair = vlm.memo[name]
    return pair


def _weights_state(vlm: VLM) -> tuple[int, int]:
    """Changes when parameters are added, removed, or written in place."""
    parameters = list(vlm.model.parameters())
    return len(parameters), sum(0 if p.is_inference() else p._version for p in parameters)
