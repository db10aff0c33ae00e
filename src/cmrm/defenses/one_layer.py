"""Defences that steer one decoder layer by one direction: their settings."""

from __future__ import annotations

from typing import Any, ClassVar

from cmrm.defenses.base import Defense, typed
from cmrm.defenses.space import Real, Space, Whole
from cmrm.engines.base import Engine
from cmrm.steering.setting import Steering


class OneLayer(Defense):
    """Layer and strength. Every layer's direction is fitted, so `fit` depends on neither."""

    needs_fit = True
    strengths: ClassVar[tuple[float, float]] = (0.1, 4.0)
    """Range of alpha that is tuned."""

    def __init__(self, *, layer: int | None, alpha: float) -> None:
        """`layer`: 0-based, None: `default_layer`; `alpha`: strength, >= 0."""
        super().__init__()
        if layer is not None:
            typed("layer", layer, int, "a decoder layer, counted from 0")
        typed("alpha", alpha, float, "a number, 0 or above")
        self.layer = layer
        self.alpha = Steering(alpha=alpha).alpha

    def default_layer(self, n_layers: int) -> int:
        """The 0-based layer where none is named, in a model of `n_layers`: the middle."""
        return n_layers // 2

    def chosen_layer(self, engine: Engine) -> int:
        """The layer that is steered.

        Raises:
            InputError: it is none of the model's.
        """
        layer = self.default_layer(engine.n_layers) if self.layer is None else self.layer
        return Steering(layers=(layer,)).chosen_layers(engine.n_layers)[0]

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where the layer is none of the model's."""
        self.chosen_layer(engine)

    @property
    def settings(self) -> dict[str, Any]:
        """Layer and strength."""
        return {"layer": self.layer, "alpha": self.alpha}

    def space(self, engine: Engine) -> Space:
        """Layer and strength."""
        return (Whole("layer", 0, engine.n_layers - 1), Real("alpha", *self.strengths, log=True))

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Nothing: every layer's direction is fitted."""
        return ()
