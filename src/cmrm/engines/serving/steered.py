"""A model that answers the requests of a server under an artifact: those with an image are steered.

Requests run one at a time. What is known of a request is said before it runs; of one of which
nothing is known, or something else than its tokens show, there is no answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from cmrm.engines.transformers import TransformersEngine
from cmrm.engines.vllm.board import Row, steered_tokens
from cmrm.errors import InputError, ModelError, SteeringError
from cmrm.model.encode import encode
from cmrm.prompts.conditions import Request
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.capture import capture_inputs
from cmrm.shift.resolve import needs_text, resolved, settled
from cmrm.steering.hooks import Session, intervene
from cmrm.steering.intervention import Intervention
from cmrm.steering.setting import Steering

MOST_OUTCOMES = 10_000
"""Outcomes that wait to be asked for; the oldest ones go first."""
SELF_TEST_TARGET = 1e3
"""Coordinate that `fill` is asked for in the self-test."""


@dataclass(frozen=True)
class Expected:
    """What is known of a request before it runs."""

    has_image: bool
    text: Mapping[str, torch.Tensor] | None = None
    """Model inputs of the same conversation without its images, for `fill`."""
    seed: int | None = None
    """Of what is drawn."""


class Steered:
    """A model, an artifact and a setting, for a server."""

    def __init__(
        self,
        engine: TransformersEngine,
        shift: ShiftVectors,
        steering: Steering | None = None,
    ) -> None:
        """
        Args:
            engine: the model.
            shift: the artifact.
            steering: the setting; the recommended one when None.

        Raises:
            ArtifactError: the artifact is another model's. InputError: it does not hold what the
                setting needs. ModelError: the self-test fails.
        """
        engine.accept(shift)
        self.vlm = engine.vlm
        self.shift, self.steering = shift, settled(shift, steering)
        self.needs_text = needs_text(self.steering)
        self.expected: dict[str, Expected] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.preparing: set[str] = set()
        self.running: set[str] = set()
        self.abandoned: set[str] = set()
        self._lock = threading.Lock()
        self.counts = {"masked": 0, "tokens": 0}
        self._self_test()

    def status(self) -> dict[str, Any]:
        """What `/health` says of the steering."""
        return {
            "armed": True, "program": self.key, "positions": self.steering.positions,
            "layers": len(self.steering.chosen_layers(self.vlm.n_layers)),
            "gated": self.steering.gate, **self.counts,
        }  # fmt: skip

    @property
    def key(self) -> str:
        """Hex sha256 of the artifact's tensors, its gate and the setting."""
        digest = hashlib.sha256(json.dumps(self.steering.to_json(), sort_keys=True).encode())
        shift = self.shift
        tensors = {
            "vectors": shift.vectors, "direction": shift.direction, "sequential": shift.sequential,
        }  # fmt: skip
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            digest.update(f"\x00{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        if self.steering.gate and shift.gate is not None:
            digest.update(shift.gate.key.encode())
        return digest.hexdigest()

    def generate(self, name: str, arguments: Mapping[str, Any]) -> torch.Tensor:
        """Run one request to its end.

        Args:
            name: of the request, under which it is `expected`.
            arguments: of transformers' `generate`; one row.

        Returns:
            int64 [1, prompt and reply].

        Raises:
            SteeringError: it is not known whether the request is to be steered, or steering did not
                reach it. InputError: its prompt is not what it was said to be.
        """
        with self._lock:
            known = self.expected.pop(name, None)
            self.running.add(name)
        try:
            if known is None:
                raise SteeringError("nothing is known of the request; no answer is given")
            if name in self.abandoned:
                raise SteeringError("the client is gone")
            return self._generate(name, known, arguments)
        finally:
            with self._lock:
                self.running.discard(name)
                self.abandoned.discard(name)

    def abandon(self, name: str) -> None:
        """The client of a request has gone away, or has its reply: nothing more is run for it."""
        with self._lock:
            if name in self.running or name in self.expected or name in self.preparing:
                self.abandoned.add(name)

    @property
    def waiting(self) -> int:
        """Requests that run, or wait for it."""
        return len(self.running) + len(self.expected) + len(self.preparing)

    @contextmanager
    def prepared(self, name: str) -> Iterator[None]:
        """A request that is read and rendered in this context.

        Raises:
            SteeringError: its client has gone away meanwhile.
        """
        self.preparing.add(name)
        try:
            yield
        finally:
            with self._lock:
                self.preparing.discard(name)
                gone = name in self.abandoned
                self.abandoned.discard(name)
        if gone:
            raise SteeringError("the client is gone")

    async def outcome(self, name: str) -> dict[str, Any] | None:
        """What was done to a request, once it has ended; forgotten then. None where it failed.

        `{"steered_tokens": n, "gate_open": decision, or None without a gate}`.
        """
        while name in self.running:  # the last words of a stream are sent before it ends
            await asyncio.sleep(0.005)
        return self.outcomes.pop(name, None)

    def _generate(self, name: str, known: Expected, arguments: Mapping[str, Any]) -> torch.Tensor:
        vlm = self.vlm
        placed = {key: self._placed(value) for key, value in arguments.items()}
        ids = placed["input_ids"]
        self._check(known, ids)
        steering: AbstractContextManager[Session | None] = nullcontext()
        with vlm.lock, torch.inference_mode():
            if known.seed is not None:
                torch.manual_seed(known.seed)
            if known.has_image:
                steering = intervene(
                    vlm, *resolved(self.shift, self.steering, self._text_of(known))
                )
            with steering as session:
                out = vlm.model.generate(
                    **placed, stopping_criteria=StoppingCriteriaList([self._gone(name)])
                )
        steered = self._masked(ids, int(out.shape[1])) if known.has_image else 0
        opened = None if session is None or session.opened is None else bool(session.opened[0])
        self.counts["masked"] += steered
        self.counts["tokens"] += int(out.shape[1])
        if len(self.outcomes) >= MOST_OUTCOMES:
            self.outcomes.pop(next(iter(self.outcomes)))
        self.outcomes[name] = {"steered_tokens": steered, "gate_open": opened}
        return torch.as_tensor(out)

    def room(self, name: str, ids: torch.Tensor) -> int:
        """Tokens that a reply may have behind a prompt, int64 [1, T], of an expected request.

        Raises:
            InputError: none, or the prompt holds an image that the request does not, or the
                reverse.
        """
        if name in self.expected:
            self._check(self.expected[name], ids)
        prompt = int(ids.shape[1])
        limit = getattr(self.vlm.model.config.get_text_config(), "max_position_embeddings", None)
        if not limit:
            return 2**31
        if prompt >= limit:
            raise InputError(f"the prompt has {prompt} tokens, the model's context is {limit}")
        return int(limit) - prompt

    def _check(self, known: Expected, ids: torch.Tensor) -> None:
        """Raises InputError where a prompt's tokens are not those of its request."""
        if bool((ids == self.vlm.image_token_id).any()) != known.has_image:
            raise InputError(
                "the prompt's image tokens and the request's images do not agree, and no answer is "
                "given; send images as parts of the type image_url, and no text that stands for one"
            )

    def _gone(self, name: str) -> StoppingCriteria:
        """Ends a generation whose client is gone."""
        abandoned = self.abandoned

        class Gone(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
                rows = input_ids.shape[0]
                return torch.full((rows,), name in abandoned, device=input_ids.device)

        return Gone()

    def _masked(self, ids: torch.Tensor, total: int) -> int:
        """Tokens at steered positions, where the last one of `total` was not run any more; a gate
        may leave them as they are."""
        places = (ids[0] == self.vlm.image_token_id).nonzero()
        row = Row(0, total - 1, int(ids.shape[1]), int(places[-1]) + 1, 0)
        return int(steered_tokens(row, self.steering.positions).sum())

    def _text_of(self, known: Expected) -> Any:
        def states() -> torch.Tensor:
            if known.text is None:
                raise SteeringError("fill has no text of the request; no answer is given")
            return capture_inputs(self.vlm, {k: self._placed(v) for k, v in known.text.items()})

        return states

    def _placed(self, value: Any) -> Any:
        """A tensor on the model's device, floats in its dtype."""
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(
            self.vlm.device, self.vlm.model.dtype if value.is_floating_point() else None
        )

    def _self_test(self) -> None:
        """Show that a request with an image is steered, and that a text is not.

        Raises:
            ModelError: it is not, or it is.
        """
        image = Image.new("RGB", (64, 64), "grey")
        picture, text = Request("Hello", (image,)), Request("Hello")

        def states() -> torch.Tensor:
            return capture_inputs(self.vlm, encode(self.vlm, [text]))

        parts = [_open(part) for part in resolved(self.shift, self.steering, states)]
        for request, moves in ((picture, True), (text, False)):
            plain, steered = self._logits(request, []), self._logits(request, parts)
            if torch.equal(plain, steered) is moves:
                what = "an image request was not" if moves else "a text was"
                raise ModelError(f"the self-test failed: {what} steered; not started")

    def _logits(self, request: Request, parts: list[Intervention]) -> torch.Tensor:
        """Logits of the first two greedy tokens."""
        vlm = self.vlm
        with vlm.lock, torch.inference_mode(), intervene(vlm, *parts):
            out = vlm.model.generate(
                **encode(vlm, [request]), max_new_tokens=2, min_new_tokens=2, do_sample=False,
                num_beams=1, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return torch.stack(out.logits).float()


def _open(part: Intervention) -> Intervention:
    """An intervention without its gate, and with coordinates that `fill` always has to raise."""
    edits = tuple(
        edit
        if edit.target is None
        else replace(edit, target=torch.full_like(edit.target, SELF_TEST_TARGET))
        for edit in part.edits
    )
    return replace(part, edits=edits, gate=None)
