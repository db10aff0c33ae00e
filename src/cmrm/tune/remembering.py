"""An engine that remembers states: the passes of a fit, and those that a defence runs for each
request, are the same for every setting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from cmrm.engines.base import Engine, Reply
from cmrm.measure.store import request_key
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Artifact, ShiftVectors
from cmrm.shift.estimate import SampleLevel
from cmrm.steering.intervention import Intervention

MOST_BYTES = 2**30
"""States that are kept; the oldest ones go first."""


class Remembering(Engine):
    """Another engine, which keeps the states of batches that it has read.

    A batch is known by its requests and their order, so that what is given back is bit for bit what
    would be computed.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.name
        self._kept: OrderedDict[tuple[str, ...], torch.Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def contrasts(self) -> bool:  # type: ignore[override]
        """Whether `answer` takes a `contrast`."""
        return self.engine.contrasts

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return self.engine.n_layers

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return self.engine.hidden_size

    @property
    def model_id(self) -> str:
        """Hub id or path of the model."""
        return self.engine.model_id

    def context(self) -> dict[str, Any]:
        """See `Engine.context`."""
        return self.engine.context()

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""
        return self.engine.facts()

    def count_tokens(self, text: str) -> int:
        """See `Engine.count_tokens`."""
        return self.engine.count_tokens(text)

    def check_interventions(self, interventions: Sequence[Intervention]) -> None:
        """See `Engine.check_interventions`."""
        self.engine.check_interventions(interventions)

    def answer(self, requests: Sequence[Request], *arguments: Any, **options: Any) -> list[Reply]:
        """See `Engine.answer`."""
        return self.engine.answer(requests, *arguments, **options)

    def stream(
        self, request: Request, *arguments: Any, **options: Any
    ) -> Generator[str | Reply, None, None]:
        """See `Engine.stream`."""
        return self.engine.stream(request, *arguments, **options)

    def accept(self, artifact: Artifact | ShiftVectors) -> None:
        """See `Engine.accept`."""
        self.engine.accept(artifact)

    def artifact(self, *arguments: Any, **options: Any) -> Artifact:
        """See `Engine.artifact`."""
        return self.engine.artifact(*arguments, **options)

    def estimate_shift(self, anchors: Sequence[Sample], **options: Any) -> ShiftVectors:
        """See `Engine.estimate_shift`."""
        return self.engine.estimate_shift(anchors, **options)

    def first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """See `Engine.first_tokens`."""
        return self.engine.first_tokens(texts)

    def first_token_log_odds(
        self, requests: Sequence[Request], *arguments: Any, **options: Any
    ) -> torch.Tensor:
        """See `Engine.first_token_log_odds`."""
        return self.engine.first_token_log_odds(requests, *arguments, **options)

    def states(self, requests: Sequence[Request], *, batch_size: int = 16) -> torch.Tensor:
        """See `Engine.states`."""
        return self._once(
            ("states", str(batch_size)),
            requests,
            lambda: self.engine.states(requests, batch_size=batch_size),
        )

    def text_states(self, requests: Sequence[Request]) -> torch.Tensor:
        """See `Engine.text_states`."""
        return self._once(("text",), requests, lambda: self.engine.text_states(requests))

    def sample_shift(
        self, requests: Sequence[Request], level: SampleLevel, keys: Sequence[str] | None = None
    ) -> torch.Tensor:
        """See `Engine.sample_shift`."""
        return self._once(
            ("shift", repr(level), *(keys or ())),
            requests,
            lambda: self.engine.sample_shift(requests, level, keys),
        )

    def _once(
        self,
        kind: tuple[str, ...],
        requests: Sequence[Request],
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        key = (*kind, *(request_key({}, request, "") for request in requests))
        if key not in self._kept:
            states = compute()
            self._kept[key] = states
            self._bytes += states.nbytes
            while self._bytes > MOST_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return self._kept[key].clone()
