"""Refusal-direction addition at one layer (Arditi et al., arXiv 2406.11717)."""

from __future__ import annotations

from collections.abc import Sequence

from cmrm.defenses.base import FitData
from cmrm.defenses.one_layer import OneLayer
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Request
from cmrm.shift.direction import refusal_direction
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Steering


class RefusalDirection(OneLayer):
    """Adds the difference in means of harmful and benign text states at one layer, at every
    position."""

    name = "refusal_direction"
    source = "refusal-direction addition, arXiv 2406.11717"

    def __init__(self, *, layer: int | None = None, alpha: float = 1.0) -> None:
        """`layer`: 0-based, None: at 60 % of the depth; `alpha`: strength, >= 0 (never taken
        away)."""
        super().__init__(layer=layer, alpha=alpha)

    def default_layer(self, n_layers: int) -> int:
        """The layer at 60 % of the depth."""
        return round(0.6 * (n_layers - 1))

    def fit(self, engine: Engine, data: FitData) -> None:
        """The refusal direction of every layer."""
        direction = refusal_direction(engine.states, data.harmful, data.benign, data.batch_size)
        self.state = {"direction": direction}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The addition, in rows with an image."""
        steering = Steering(self.alpha, "per_layer", "all", (self.chosen_layer(engine),))
        return [shift_intervention(self.fitted("direction"), steering)]
