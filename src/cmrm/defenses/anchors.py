"""States of anchors that several defences are fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.prompts.conditions import Condition, build_request
from cmrm.prompts.sample import Sample


def anchor_states(
    engine: Engine,
    samples: Sequence[Sample],
    condition: Condition,
    batch_size: int,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """States float32 [N, n, d] at the last prompt token of `samples` under a condition.

    `layers`: 0-based decoder layers that are kept, n of them; None: all.

    Raises:
        InputError: there is no sample, or one cannot be put under the condition.
    """
    if not samples:
        raise InputError("harmful and benign anchors are both needed; one of the two sets is empty")
    kept = list(range(engine.n_layers)) if layers is None else list(layers)
    states = []
    for at in range(0, len(samples), batch_size):
        batch = [build_request(sample, condition) for sample in samples[at : at + batch_size]]
        states.append(engine.states(batch, batch_size=batch_size)[:, kept])
    return torch.cat(states)


def scaled_layers(source: Sequence[int], depth: int, n_layers: int) -> tuple[int, ...]:
    """A source's 0-based layers of a model of `depth` layers, at the same share of `n_layers`."""
    return tuple(sorted({min(n_layers - 1, round(k * n_layers / depth)) for k in source}))
