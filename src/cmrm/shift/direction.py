"""Refusal direction: what distinguishes harmful from benign requests in the states of text alone.

r_l = mean state of harmful minus mean state of benign requests at decoder layer l, last prompt
token, text-only (difference in means; Arditi et al., arXiv 2406.11717).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cmrm.errors import InputError
from cmrm.prompts.conditions import Condition, Request, build_request
from cmrm.prompts.sample import Sample

States = Callable[[Sequence[Request]], torch.Tensor]
"""States float32 [N, L, d] of requests, such as `Engine.states`."""


def mean_text_state(states: States, samples: Sequence[Sample], batch_size: int) -> torch.Tensor:
    """Mean state float32 [L, d] at the last prompt token of the requests as text alone.

    Raises:
        InputError: no sample was given.
    """
    if not samples:
        raise InputError("harmful and benign anchors are both needed; one of the two sets is empty")
    total: torch.Tensor | float = 0.0
    for at in range(0, len(samples), batch_size):
        batch = [build_request(s, Condition.QUERY) for s in samples[at : at + batch_size]]
        total = total + states(batch).sum(0)
    assert isinstance(total, torch.Tensor)
    return total / len(samples)


def refusal_direction(
    states: States, harmful: Sequence[Sample], benign: Sequence[Sample], batch_size: int = 16
) -> torch.Tensor:
    """Mean state of harmful minus that of benign requests, as text: float32 [L, d].

    Raises:
        InputError: one of the sets is empty.
    """
    return mean_text_state(states, harmful, batch_size) - mean_text_state(
        states, benign, batch_size
    )
