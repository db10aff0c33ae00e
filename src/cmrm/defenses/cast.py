"""CAST: a behaviour vector that is added where a condition holds (Lee et al., arXiv 2409.05907)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmrm.defenses.anchors import anchor_states, scaled_layers
from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.space import LayerRange, Real, Space
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.prompts.conditions import Condition, Request
from cmrm.shift.direction import refusal_direction
from cmrm.shift.harm_gate import FALSE_ALARMS, check_false_alarms
from cmrm.shift.other_gates import fit_other_gate
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import Steering

SOURCE_LAYERS = tuple(range(14, 23))
"""Blocks of 32 behind which the released example adds the behaviour vector."""


class Cast(Defense):
    """h <- h + alpha v_l  where  cos(h_c, tanh(p)) > threshold, with p the projection of the state
    h_c of a lower layer on the condition vector.

    The condition is read once, at the last prompt token; the vector is added there and to every
    generated token. The paper's text and the released code were read.

    What differs: the condition vector is fitted on states with an image, harmful against benign,
    at the last token (the source: mean over all tokens), and its threshold is the score that a
    share `false_alarms` of held-out benign anchors exceeds (the source: F1); see
    `shift.other_gates`. v_l is the mean of harmful minus that of benign anchors as text (the
    source: principal direction of refusing against complying replies, set by hand in strength), so
    alpha 1 is its natural length. Prompt tokens before the last one are not steered.
    """

    name = "cast"
    source = "CAST, arXiv 2409.05907; the behaviour vector is the refusal direction"
    needs_fit = True
    fits_on_images = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        layers: Sequence[int] | None = None,
        false_alarms: float = FALSE_ALARMS,
    ) -> None:
        """`alpha`: strength, >= 0; `layers`: 0-based, None: the source's, scaled to the depth;
        `false_alarms`: share of benign anchors that may be steered."""
        super().__init__()
        typed("alpha", alpha, float, "a number, 0 or above")
        check_false_alarms(false_alarms)
        chosen = None if layers is None else tuple(layers)
        self.steering = Steering(alpha, "per_layer", "last", chosen)
        self.false_alarms = false_alarms

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where a layer is none of the model's, or no layer is left below for
        the condition."""
        if self._layers(engine)[0] == 0:
            raise InputError(
                "the condition is read below the layers that are steered; choose layers from 1 on"
            )

    def _layers(self, engine: Engine) -> tuple[int, ...]:
        if self.steering.layers is None:
            return scaled_layers(SOURCE_LAYERS, 32, engine.n_layers)
        return self.steering.chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Strength, layers and the share of false alarms."""
        values = self.steering.to_json()
        return {
            "alpha": values["alpha"], "layers": values["layers"],
            "false_alarms": self.false_alarms,
        }  # fmt: skip

    def space(self, engine: Engine) -> Space:
        """Strength, share of false alarms, and layers above the condition's."""
        return (
            Real("alpha", 0.1, 4.0, log=True), Real("false_alarms", 0.01, 0.3, log=True),
            LayerRange(engine.n_layers - 1, low=1),
        )  # fmt: skip

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """What the condition depends on: its false alarms, and the lowest steered layer."""
        layers = self.steering.layers
        return (self.false_alarms, None if layers is None else min(layers))

    def fit(self, engine: Engine, data: FitData) -> None:
        """Behaviour vectors of every layer, and the condition's gate."""
        self.check(engine)
        size = data.batch_size
        harmful = anchor_states(engine, data.harmful, Condition.ORIGINAL, size)
        benign = anchor_states(engine, data.benign, Condition.ORIGINAL, size)
        self.gate, record = fit_other_gate(
            "cosine", harmful, benign, false_alarms=self.false_alarms,
            highest=self._layers(engine)[0] - 1,
        )  # fmt: skip
        self.records = {"gate": record.to_json()}
        direction = refusal_direction(engine.states, data.harmful, data.benign, size)
        self.state = {"direction": direction}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The addition, in rows with an image whose condition holds."""
        direction = self.fitted("direction")
        steering = Steering(self.steering.alpha, "per_layer", "last", self._layers(engine))
        return [shift_intervention(direction, steering, self.gate)]
