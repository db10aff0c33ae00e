"""A defence's space as Optuna's distributions, and a point of it as the defence's settings."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from cmrm.defenses.space import Choice, LayerRange, Real, Space, Whole

ENDS = (".first", ".last")
"""What the two ends of a range of layers are called; they may come in either order."""
DIGITS = 4
"""Significant digits of a setting that is a number."""


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each parameter; a range of layers has two parameters."""
    made: dict[str, BaseDistribution] = {}
    for part in space:
        if isinstance(part, Real):
            made[part.name] = FloatDistribution(part.low, part.high, log=part.log)
        elif isinstance(part, Whole):
            made[part.name] = IntDistribution(part.low, part.high)
        elif isinstance(part, Choice):
            made[part.name] = CategoricalDistribution(part.values)
        else:
            for end in ENDS:
                made[part.name + end] = IntDistribution(part.low, part.high)
    return made


def settings_of(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a point, as the defence's class takes them."""
    settings: dict[str, Any] = {}
    for part in space:
        if isinstance(part, LayerRange):
            first, last = sorted(int(params[part.name + end]) for end in ENDS)
            settings[part.name] = list(range(first, last + 1))
        elif isinstance(part, Real):
            rounded = float(f"{params[part.name]:.{DIGITS}g}")
            settings[part.name] = min(max(rounded, part.low), part.high)
        else:
            settings[part.name] = params[part.name]
    return settings


def drawn(space: Space, rng: random.Random) -> dict[str, Any]:
    """A random point of the space, as parameters: each is uniform, on its own scale."""
    params: dict[str, Any] = {}
    for name, distribution in distributions(space).items():
        if isinstance(distribution, FloatDistribution):
            low, high = distribution.low, distribution.high
            share = rng.random()
            params[name] = (
                low * (high / low) ** share if distribution.log else (low + share * (high - low))
            )
        elif isinstance(distribution, IntDistribution):
            params[name] = rng.randint(distribution.low, distribution.high)
        else:
            assert isinstance(distribution, CategoricalDistribution)
            params[name] = rng.choice(distribution.choices)
    return params


def space_json(space: Space) -> list[dict[str, Any]]:
    """The space as JSON values, for outputs and identities."""
    return [{"kind": type(part).__name__, **vars(part)} for part in space]
