"""What the playground shows, without a browser: replies, verdicts, and where states lie."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from threading import Event

import torch
from PIL import Image

from cmrm.engines.base import Decoding, Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.judges import Judge
from cmrm.judges.base import assessed
from cmrm.prompts.conditions import Request, Turn
from cmrm.prompts.images import open_picture
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.resolve import resolved
from cmrm.steering.intervention import Intervention
from cmrm.steering.setting import Steering

COLUMNS = ("text only", "with the image", "image + your setting", "image + recommended setting")
"""What stands side by side."""
LONGEST = 4000
"""Characters of a query."""


@dataclass
class Conversation:
    """One column's turns so far."""

    image: Image.Image | None
    """The picture of the first turn; None in the column that has none."""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(query, reply) of the turns that are over."""

    def copy(self) -> Conversation:
        """The same conversation, to be continued on its own."""
        return Conversation(self.image, list(self.turns))

    def request(self, query: str) -> Request:
        """The conversation with a new query."""
        if not self.turns:
            return Request(query, () if self.image is None else (self.image,))
        before: list[Turn] = []
        for k, (asked, answered) in enumerate(self.turns):
            pictures = (self.image,) if k == 0 and self.image is not None else ()
            before += [Turn("user", asked, pictures), Turn("assistant", answered)]
        return Request(query, before=tuple(before))


@dataclass(frozen=True)
class Geometry:
    """Where one request's states lie, by decoder layer (0-based)."""

    distances: dict[str, list[float]]
    """Column -> distance to the text-only state over its norm."""
    coordinates: dict[str, list[float]]
    """Column -> coordinate along the refusal direction; empty without one."""
    gate: str
    """What the harm gate reads, in words; empty without one."""


class Session:
    """A model, an artifact and a judge; what one visitor asks stands in `conversations`."""

    def __init__(
        self, engine: TransformersEngine, shift: ShiftVectors, judge: Judge, max_new_tokens: int
    ) -> None:
        """Refuses an artifact of another model (`ArtifactError`)."""
        engine.accept(shift)
        self.engine, self.shift, self.judge = engine, shift, judge
        self.max_new_tokens = max_new_tokens

    def start(self, image: object) -> list[Conversation]:
        """New conversations, one a column.

        Raises:
            InputError: the image cannot be read.
        """
        picture = None if image is None else open_picture(image, "the upload")  # type: ignore[arg-type]
        return [Conversation(None), *(Conversation(picture) for _ in COLUMNS[1:])]

    def setting(
        self,
        alpha: float,
        first: int,
        last: int,
        schedule: str,
        operator: str,
        gate: bool,
    ) -> Steering:
        """The visitor's setting.

        Raises:
            InputError: its parts exclude each other.
        """
        if first > last:
            raise InputError(f"the first layer is {first} and the last one {last}")
        every = first == 0 and last == self.engine.n_layers - 1
        layers = None if every else tuple(range(first, last + 1))
        return Steering.from_json({
            "alpha": float(alpha), "schedule": schedule, "layers": layers, "operator": operator,
            "gate": gate,
        })  # fmt: skip

    def interventions(self, column: int, request: Request, setting: Steering) -> list[Intervention]:
        """What is done in a column.

        Raises:
            InputError: the artifact does not hold what the setting needs.
        """
        if column < 2 or not request.all_images:
            return []
        used = setting if column == 2 else self.shift.recommended
        return resolved(self.shift, used, lambda: self.engine.text_states([request]))

    def stream(
        self,
        column: int,
        conversation: Conversation,
        query: str,
        setting: Steering,
        cancel: Event,
    ) -> Generator[str, None, str]:
        """The growing reply of one column; returns the whole one, and keeps it as a turn.

        Raises:
            InputError: the query is empty or too long, or the setting cannot be used.
        """
        if not query.strip():
            raise InputError("type a query")
        if len(query) > LONGEST:
            raise InputError(f"the query has {len(query)} characters; {LONGEST} are the most")
        request = conversation.request(query)
        parts = self.interventions(column, request, setting)
        text, reply = "", None
        options = Decoding(max_new_tokens=self.max_new_tokens)
        for piece in self.engine.stream(request, parts, options, cancel=cancel):
            if isinstance(piece, Reply):
                reply = piece
            else:
                text += piece
                yield text
        whole = text if reply is None else reply.text
        conversation.turns.append((query, whole))
        return whole

    def verdict(self, query: str, reply: str) -> str:
        """What the judge says of a reply, with its probabilities where it has some."""
        judged = assessed(self.judge, query, reply)
        words = judged.verdict.value + (f": {judged.reason}" if judged.reason else "")
        parts = [
            f"{name} {value:.0%}"
            for name, value in (("refuses", judged.refusal), ("engages", judged.engagement))
            if value is not None
        ]
        return f"{words} ({', '.join(parts)})" if parts else words

    def geometry(
        self, conversations: Sequence[Conversation], query: str, setting: Steering
    ) -> Geometry:
        """Where the last prompt token's states lie, with the image and under both settings.

        Raises:
            InputError: there is no image, or the setting cannot be used.
        """
        request = conversations[1].request(query)
        if not request.all_images:
            raise InputError("without an image nothing is moved")
        text = self.engine.text_states([request])[0]
        states = {}
        for column, name in enumerate(COLUMNS[1:], 1):
            parts = self.interventions(column, request, setting)
            states[name] = self.engine.prompt_states([request], parts).last[0]
        norms = text.norm(dim=-1).clamp_min(1e-12)
        distances = {
            name: ((state - text).norm(dim=-1) / norms).tolist() for name, state in states.items()
        }
        coordinates = {}
        if self.shift.direction is not None:
            unit = self.shift.direction / self.shift.direction.norm(dim=-1, keepdim=True)
            coordinates = {
                name: (state * unit).sum(-1).tolist()
                for name, state in {COLUMNS[0]: text, **states}.items()
            }
        return Geometry(distances, coordinates, self._gate(states[COLUMNS[1]]))

    def _gate(self, state: torch.Tensor) -> str:
        gate = self.shift.gate
        if gate is None:
            return ""
        score = float(gate.scores(state[None, list(gate.layers)])[0])
        side = "open" if score > gate.threshold else "closed"
        return (
            f"harm gate at layer {gate.layers[-1]}: {score:.2f}, threshold {gate.threshold:.2f}: "
            f"{side}"
        )
