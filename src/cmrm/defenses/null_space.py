"""Null-space projection of the modality direction (arXiv 2603.14825)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmrm.defenses.base import Defense, FitData
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Request
from cmrm.steering.intervention import Edit, Intervention
from cmrm.steering.setting import Positions, Steering


class NullSpace(Defense):
    """Projects states onto the null space of the modality direction:  h <- h - (h . u) u, one pass.

    u is the unit direction of the mean shift, text minus blank image, of each layer.
    """

    name = "null_space"
    source = "null-space projection, arXiv 2603.14825"
    needs_fit = True
    fits_on_images = True

    def __init__(
        self, *, layers: Sequence[int] | None = None, positions: Positions = "all"
    ) -> None:
        """`layers`: 0-based, None: all; `positions` as in `steering.setting`."""
        super().__init__()
        self.steering = Steering(
            layers=None if layers is None else tuple(layers), positions=positions
        )

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where a layer is none of the model's."""
        self.steering.chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Layers and positions."""
        values = self.steering.to_json()
        return {name: values[name] for name in ("layers", "positions")}

    def fit(self, engine: Engine, data: FitData) -> None:
        """The modality direction."""
        mean = engine.estimate_shift(
            data.shifted, estimator="mean", batch_size=data.batch_size
        ).vectors
        self.state = {"modality": mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """The projection, in rows with an image."""
        direction = self.fitted("modality")
        layers = self.steering.chosen_layers(engine.n_layers)
        edits = tuple(Edit(layer, direction[layer], "project") for layer in layers)
        return [Intervention(edits, self.steering.positions)]
