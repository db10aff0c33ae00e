"""What an engine is: it answers requests under interventions, whole or piece by piece, and may read
states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from threading import Event
from typing import Any, ClassVar

import torch

from cmrm.errors import CmrmError, InputError
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Artifact, ShiftVectors
from cmrm.shift.estimate import SampleLevel
from cmrm.steering.gate import Gate
from cmrm.steering.intervention import Intervention


@dataclass(frozen=True)
class Reply:
    """One reply."""

    text: str
    """Special tokens removed, white space stripped at both ends."""
    tokens: int
    """Generated tokens, the end-of-turn token included."""
    gate_open: bool | None = None
    """Whether a gate opened for it; None where none decided."""


@dataclass(frozen=True)
class Decoding:
    """How a reply is decoded: greedily, or sampled at a temperature."""

    max_new_tokens: int = 48
    """Length limit of a reply, >= 1."""
    temperature: float = 0.0
    """0: greedy; above, tokens are sampled."""
    top_p: float | None = None
    """Share of the probability that is sampled from; with a temperature alone."""
    top_k: int | None = None
    """Number of tokens that are sampled from; with a temperature alone."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it is at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it is 0 or above")

    @property
    def greedy(self) -> bool:
        """Whether the same request has the same reply."""
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """The fields, for identities and outputs."""
        return asdict(self)


@dataclass(frozen=True)
class Contrast:
    """A second conversation for each request, whose logits are weighed against its own.

    At every step:  logits <- logits + weight (logits of the second conversation - logits). Both
    conversations go on with the token that is chosen.
    """

    requests: tuple[Request | None, ...]
    """The second conversation of each request, row by row; None: the row is decoded as it is."""
    weight: float
    """>= 0; 1 gives the second conversation's own logits, more goes beyond them."""

    def __post_init__(self) -> None:
        if not isfinite(self.weight) or self.weight < 0:
            raise InputError(f"a contrast's weight is {self.weight}; it is a finite number >= 0")

    def select(self, rows: Sequence[int]) -> Contrast | None:
        """The same for some rows of a batch, in the order given; None where none is contrasted."""
        chosen = tuple(self.requests[row] for row in rows)
        return Contrast(chosen, self.weight) if any(chosen) else None


class Engine(ABC):
    """A model that answers requests under interventions. One caller at a time is enforced by the
    engine."""

    name: str = ""
    """In outputs: `transformers`."""
    contrasts: ClassVar[bool] = False
    """Whether `answer` takes a `contrast`."""

    @property
    @abstractmethod
    def n_layers(self) -> int:
        """Number of decoder layers L."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width d of the residual stream."""

    @property
    @abstractmethod
    def model_id(self) -> str:
        """Hub id or path of the model."""

    @abstractmethod
    def context(self) -> dict[str, Any]:
        """Everything but the request that a reply depends on: model identity, dtype, versions,
        decoding defaults."""

    @property
    def served_program(self) -> str | None:
        """Key of the program with which a server steers by itself; None for every other engine."""
        return None

    def facts(self) -> dict[str, Any]:
        """What is known of the model, in the form of `measure.schema.ModelInfo`."""
        return {"id": self.model_id, "architecture": "unknown", "dtype": "unknown"}

    def count_tokens(self, text: str) -> int:
        """Tokens of a text without special ones.

        Raises:
            EngineError: this engine has no tokenizer.
        """
        raise EngineError(f"the engine {self.name!r} has no tokenizer")

    def check_interventions(self, interventions: Sequence[Intervention]) -> None:
        """Refuse what this engine cannot do, before anything is asked.

        Raises:
            EngineError: it cannot do one of them; the reason and the remedy are named.
        """
        return

    @abstractmethod
    def answer(
        self,
        requests: Sequence[Request],
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        batch_size: int = 16,
        on_batch: Callable[[int], None] | None = None,
        contrast: Contrast | None = None,
    ) -> list[Reply]:
        """Replies to conversations, in the order given.

        Rows with and without images are never in one batch. A batch that exhausts the memory is
        halved.

        Args:
            requests: conversations.
            interventions: made in order, on rows with an image alone; those with vectors for each
                row have as many rows as there are requests.
            options: decoding; greedy, 48 tokens, when None.
            batch_size: prompts per batch, >= 1.
            on_batch: called after each batch with its number of replies.
            contrast: second conversations, as many as there are requests; interventions act on
                them too.

        Raises:
            InputError: a request or an option cannot be used. SteeringError: an intervention cannot
                be made. EngineError: this engine cannot decode two conversations side by side.
        """

    @abstractmethod
    def stream(
        self,
        request: Request,
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        cancel: Event | None = None,
    ) -> Generator[str | Reply, None, None]:
        """Pieces of the reply to one conversation as they are generated; at the end the whole
        reply.

        Closing the iterator, or setting `cancel`, ends the generation: the model is untouched
        again, and no thread is left.

        Raises:
            InputError, SteeringError: as `answer`.
        """

    def accept(self, artifact: Artifact | ShiftVectors) -> None:
        """Refuse an artifact of another model.

        Raises:
            ArtifactError: it does not belong to this model. EngineError: this engine cannot tell.
        """
        raise EngineError(
            f"the engine {self.name!r} cannot tell whether an artifact fits its model"
        )

    def first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of the tokens that the texts begin with; see `engines.first_token`.

        Raises:
            EngineError: this engine has no tokenizer.
        """
        raise EngineError(f"the engine {self.name!r} has no tokenizer")

    def first_token_log_odds(
        self,
        requests: Sequence[Request],
        tokens: Sequence[int],
        interventions: Sequence[Intervention] = (),
        contrast: Contrast | None = None,
    ) -> torch.Tensor:
        """Log-odds float32 [N] that the first token of each reply is one of `tokens`.

        The requests are one batch, all with an image or all without.

        Raises:
            InputError, SteeringError: as `answer`. EngineError: this engine gives no probabilities.
        """
        raise EngineError(f"the engine {self.name!r} gives no probabilities")

    def artifact(
        self,
        tensors: Mapping[str, torch.Tensor],
        estimator: str,
        gate: Gate | None = None,
        records: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Fitted tensors of this model, float32 by name, as an artifact, with a gate and records.

        Raises:
            EngineError: this engine does not know its model's identity.
        """
        raise EngineError(f"the engine {self.name!r} does not know its model's identity")

    def states(self, requests: Sequence[Request], *, batch_size: int = 16) -> torch.Tensor:
        """States at the last prompt token: float32 [N, L, d]; `[:, l]` is the output of decoder
        block l.

        Raises:
            EngineError: this engine cannot read states.
        """
        raise EngineError(f"the engine {self.name!r} cannot read states of the residual stream")

    def text_states(self, requests: Sequence[Request]) -> torch.Tensor:
        """States of one batch of requests as text alone, without their images: float32 [N, L, d].

        Raises:
            EngineError: this engine cannot read states.
        """
        return self.states(
            [request.without_images() for request in requests], batch_size=max(1, len(requests))
        )

    def sample_shift(
        self, requests: Sequence[Request], level: SampleLevel, keys: Sequence[str] | None = None
    ) -> torch.Tensor:
        """h_t - h_c of each request: float32 [N, L, d], zero without an image.

        Raises:
            EngineError: this engine cannot read states.
        """
        raise EngineError(f"the engine {self.name!r} cannot read states of the residual stream")

    def estimate_shift(self, anchors: Sequence[Sample], **options: Any) -> ShiftVectors:
        """Dataset-level shift; see `shift.estimate.estimate_shift` for the options.

        Raises:
            EngineError: this engine cannot read states.
        """
        raise EngineError(f"the engine {self.name!r} cannot estimate a shift")


class EngineError(CmrmError):
    """An engine cannot do what was asked of it."""
