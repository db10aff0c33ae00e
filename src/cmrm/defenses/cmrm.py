"""CMRM (Liu et al., arXiv 2410.09047) as defences: dataset level and sample level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from cmrm.defenses.base import Defense, FitData, typed
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Request
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.estimate import Estimator, SampleLevel, check_estimator
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import PRESETS, Steering


class _Steered(Defense):
    """Settings of both levels: those of `Steering`, the corruption and its seed."""

    source = "CMRM, arXiv 2410.09047"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: asdict(preset) for name, preset in PRESETS.items()
    }

    def __init__(self, *, corruption: str = "blank", seed: int = 0, **steering: Any) -> None:
        super().__init__()
        typed("seed", seed, int, "a whole number")
        self.steering = Steering.from_json(steering)
        self.level = SampleLevel(corruption, seed)  # type: ignore[arg-type]

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where a layer is none of the model's."""
        self.steering.chosen_layers(engine.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Steering, and what stands for the image."""
        level = {"corruption": self.level.corruption.value, "seed": self.level.seed}
        return {**self.steering.to_json(), **level}


class CmrmDataset(_Steered):
    """Vectors that are estimated once, on anchors; no extra pass."""

    name = "cmrm_dataset"
    needs_fit = True
    fits_on_images = True

    def __init__(self, *, estimator: Estimator = "pca", **setting: Any) -> None:
        super().__init__(**setting)
        check_estimator(estimator)
        self.estimator: Estimator = estimator

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the steering, and the estimator."""
        return {**super().settings, "estimator": self.estimator}

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """Estimator, corruption and seed: variants that differ in their steering alone are fitted
        once."""
        return (self.estimator, self.level.corruption, self.level.seed)

    def fit(self, engine: Engine, data: FitData) -> None:
        """`shift.estimate.estimate_shift` on the harmful anchors, and those that are added to
        them."""
        shift = engine.estimate_shift(
            data.shifted,
            estimator=self.estimator,
            corruption=self.level.corruption,
            seed=self.level.seed,
            batch_size=data.batch_size,
        )
        self.state = {"vectors": shift.vectors}

    def use(self, shift: ShiftVectors) -> None:
        """Take the vectors of an artifact instead of fitting."""
        self.state = {"vectors": shift.vectors}
        self.estimator = shift.provenance.estimator or self.estimator  # type: ignore[assignment]

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """Every row with an image by the same vectors."""
        return [shift_intervention(self.fitted("vectors"), self.steering)]


class CmrmSample(_Steered):
    """Each row by its own shift: two extra passes, on cached prefixes where the model allows it."""

    name = "cmrm_sample"

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """Nothing where no row has an image."""
        if not any(request.all_images for request in requests):
            return []
        return [shift_intervention(engine.sample_shift(requests, self.level, keys), self.steering)]
