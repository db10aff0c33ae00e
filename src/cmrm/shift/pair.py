"""Prefixes of both conditions of a sample, text-only and corrupted image, and their owner.

`Prefixes` keeps pairs between calls for whoever owns it, and drops them when the model's weights,
adapters or templates are no longer what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cmrm.model.batching import out_of_memory
from cmrm.model.encode import encode
from cmrm.model.identity import State, state_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.capture import capture_inputs
from cmrm.shift.likeness import Reference, alike, distance
from cmrm.shift.packing import Continuations, packed_states, side_by_side
from cmrm.shift.prefix import REFUSALS, Encoded, SharedPrefix, in_a_line
from cmrm.steering.hooks import refuse_inside_steering

JOINT_TOKENS = 96
"""Up to so many tokens behind both prefixes are run in one pass: reading the weights is what so
short a pass costs. Beyond it (`benchmarks/joint.py`) attention over the other condition's prefix
costs more than the second reading."""


class PrefixPair:
    """Text-only and corrupted-image prompts of the same samples.

    A few tokens behind both prefixes are run in one pass. The first such batch is run in both ways;
    where they disagree the two are run one after the other from then on.
    """

    def __init__(self, vlm: VLM, text: SharedPrefix, corrupted: SharedPrefix) -> None:
        self.vlm = vlm
        self.text = text
        self.corrupted = corrupted
        self.apart: str | None = None
        """Why the two conditions are run one after the other where both could be packed, or
        None."""
        self.joint_batches = 0
        """Batches of which both conditions were run in one pass."""
        self.scale: torch.Tensor | None = None
        """float32 [L]: |h_t - h_c| of the first sample, per layer."""
        self._probed = False
        self._joined: tuple[Any, Any, Any] = (None, None, None)

    @torch.inference_mode()
    def states(
        self, text: Sequence[Request], corrupted: Sequence[Request]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States float32 [B, L, d] on the CPU of both conditions.

        Raises:
            SteeringError: this context steers the model. Whatever `encode` raises.
        """
        refuse_inside_steering(self.vlm, "capturing states")
        with self.vlm.lock:
            self._measure_scale(text[0], corrupted[0])
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

    def _measure_scale(self, text: Request, corrupted: Request) -> None:
        """Run the first sample whole under both conditions: what the probes compare with, and
        against what."""
        if self.scale is not None:
            return
        runners = (self.text, self.corrupted)
        encoded = [encode(self.vlm, [request]) for request in (text, corrupted)]
        states = [capture_inputs(self.vlm, inputs)[0] for inputs in encoded]
        self.scale = (states[0] - states[1]).norm(dim=-1)
        for runner, inputs, state in zip(runners, encoded, states, strict=True):
            runner.fresh_tokens += inputs["input_ids"].shape[1]
            runner.reference = Reference(inputs["input_ids"][0], state, self.scale)

    def _fresh(self, encoded: Sequence[Sequence[Encoded]]) -> int:
        """Number of tokens that have to be run of both conditions."""
        starts = [
            runner.start_of(some)
            for runner, some in zip((self.text, self.corrupted), encoded, strict=True)
        ]
        return sum(
            inputs["input_ids"].shape[1] - start
            for some, start in zip(encoded, starts, strict=True)
            for inputs in some
        )

    def _joint(self, encoded: Sequence[Sequence[Encoded]]) -> list[torch.Tensor]:
        parts = [self.text.continuations(encoded[0]), self.corrupted.continuations(encoded[1])]
        used: list[Any] | None = [] if len(encoded[0]) == 1 else None
        states = packed_states(
            self.vlm, self.text.backbone, parts, self._side_by_side(parts), keep=used
        )
        if used is not None and len(used) == 1:
            at, behind = 0, sum(part.length for part in parts)
            for runner, some, part in zip((self.text, self.corrupted), encoded, parts, strict=True):
                new = len(part.tokens[0]["input_ids"])
                runner.keep(
                    some, used[0], [slice(at, at + part.length), slice(behind, behind + new)]
                )
                at, behind = at + part.length, behind + new
        return states

    def _side_by_side(self, parts: Sequence[Continuations]) -> Any:
        """The parts' caches in one; that of the two prefixes is made once."""
        runners = (self.text, self.corrupted)
        if any(part.length > runner.tokens for part, runner in zip(parts, runners, strict=True)):
            return side_by_side([part.cache for part in parts])
        if self._joined[0] is not parts[0].cache or self._joined[1] is not parts[1].cache:
            joined = side_by_side([part.cache for part in parts])
            self._joined = (parts[0].cache, parts[1].cache, joined)
        return self._joined[2]

    def _probe(self, encoded: Sequence[Sequence[Encoded]]) -> None:
        """Run one prompt of each condition in one pass and in two."""
        separate = [self.text.run([], encoded[0])[0], self.corrupted.run([], encoded[1])[0]]
        self.text.forget()
        self.corrupted.forget()
        try:
            joint = self._joint(encoded)
        except REFUSALS as error:
            if out_of_memory(error):
                raise
            self.apart = in_a_line(error)
            return
        finally:  # what was kept is of a pass that may turn out wrong
            self.text.forget()
            self.corrupted.forget()
        scale = self.scale if self.scale is not None else torch.empty(0)
        for states, expected in zip(joint, separate, strict=True):
            if not alike(self.vlm, states[0], expected, scale):
                self.apart = f"states differ by {distance(states[0], expected):.2%}"
        self._probed = True


class Prefixes:
    """Prefix pairs of one model, by corruption, kept between calls as long as the model is what it
    was."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self._state: State | None = None
        self._text: SharedPrefix | None = None
        self._pairs: dict[str, PrefixPair] = {}

    def text(self) -> SharedPrefix:
        """The prefix of text-only prompts; a new one after the model has changed
        (`identity.state_of`)."""
        state = state_of(self.vlm)
        if self._text is None or self._state != state:
            self._state = state
            self._text = SharedPrefix(self.vlm)
            self._pairs = {}
        return self._text

    def pair(self, corruption: str) -> PrefixPair:
        """The pair of text-only beside one corruption."""
        text = self.text()
        if corruption not in self._pairs:
            self._pairs[corruption] = PrefixPair(self.vlm, text, SharedPrefix(self.vlm))
        return self._pairs[corruption]


def text_states(requests: Sequence[Request], prefixes: Prefixes) -> torch.Tensor:
    """States float32 [B, L, d] of one batch of requests as text alone, on the cached prefix.

    One pass over what follows the system prompt; of a single conversation over what is new in it.

    Raises:
        SteeringError: this context steers the model.
    """
    prefixes.vlm.check_eval()
    return prefixes.text().states([request.without_images() for request in requests])
