"""An engine that remembers states: the passes of a fit, and those that a defence runs for each
request, are the same for every setting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from cmrm.engines.transformers import TransformersEngine
from cmrm.measure.store import request_key
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.shift.estimate import SampleLevel

MOST_BYTES = 2**30
"""States that are kept; the oldest ones go first."""


class Remembering(TransformersEngine):
    """The engine on transformers, which keeps the states of batches that it has read.

    A batch is known by its requests and their order, so that what is given back is bit for bit what
    would be computed.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__(vlm)
        self._kept: OrderedDict[tuple[str, ...], torch.Tensor] = OrderedDict()
        self._bytes = 0

    def states(self, requests: Sequence[Request], *, batch_size: int = 16) -> torch.Tensor:
        """See `Engine.states`."""
        return self._once(
            ("states", str(batch_size)),
            requests,
            lambda: super(Remembering, self).states(requests, batch_size=batch_size),
        )

    def text_states(self, requests: Sequence[Request]) -> torch.Tensor:
        """See `Engine.text_states`."""
        return self._once(
            ("text",), requests, lambda: super(Remembering, self).text_states(requests)
        )

    def sample_shift(
        self, requests: Sequence[Request], level: SampleLevel, keys: Sequence[str] | None = None
    ) -> torch.Tensor:
        """See `Engine.sample_shift`."""
        return self._once(
            ("shift", repr(level), *(keys or ())),
            requests,
            lambda: super(Remembering, self).sample_shift(requests, level, keys),
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
