"""CMRM (Liu et al., arXiv 2410.09047) as defences: dataset level and sample level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, ClassVar

from cmrm.prompts.conditions import Request
from cmrm.defenses.base import Defense, FitData, layer_numbers, typed
from cmrm.engines.transformers import SampleLevel, sample_vectors
from cmrm.model.vlm import VLM
from cmrm.shift.estimate import Estimator, check_estimator, checked_corruption, estimate_shift
from cmrm.steering.hooks import PRESETS, Positions, Schedule, Steering, steer


class _Steered(Defense):
    """What both levels are set to."""

    source = "CMRM, arXiv 2410.09047"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {name: asdict(preset) for name, preset in PRESETS.items()}

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        schedule: Schedule = "telescoped",
        positions: Positions = "last",
        layers: Sequence[int] | None = None,
        preserve_norm: bool = False,
        corruption: str = "blank",
        seed: int = 0,
    ) -> None:
        super().__init__()
        typed("alpha", alpha, float, "a number, 0 or above")
        typed("preserve_norm", preserve_norm, bool, "true or false")
        typed("seed", seed, int, "a whole number")
        self.setting = Steering(alpha, schedule, positions, layer_numbers(layers), preserve_norm)
        self.level = SampleLevel(checked_corruption(corruption), seed)

    def check(self, vlm: VLM) -> None:
        """Raise `InputError` where a layer is none of the model's."""
        self.setting.chosen_layers(vlm.n_layers)

    @property
    def settings(self) -> dict[str, Any]:
        """Steering, and what stands for the image."""
        return {**asdict(self.setting), "corruption": self.level.corruption.value, "seed": self.level.seed}


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
        """Estimator, corruption and seed: variants that differ in their steering alone are fitted once."""
        return (self.estimator, self.level.corruption, self.level.seed)

    def fit(self, vlm: VLM, data: FitData) -> None:
        """`shift.estimate_shift` on the harmful anchors, and those that are added to them."""
        shift = estimate_shift(
            vlm, data.shifted, estimator=self.estimator, corruption=self.level.corruption, seed=self.level.seed,
            batch_size=data.batch_size,
        )  # fmt: skip
        self.state = {"vectors": shift.vectors}

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """Every row with an image by the same vectors."""
        return steer(vlm, self.fitted("vectors"), self.setting)


class CmrmSample(_Steered):
    """Each row by its own shift: two extra passes, on cached prefixes where the model allows it."""

    name = "cmrm_sample"

    def steering(self, vlm: VLM, requests: Sequence[Request], keys: Sequence[str]) -> AbstractContextManager[None]:
        """Nothing to do where no row has an image."""
        if not any(request.all_images for request in requests):
            return nullcontext()
        return steer(vlm, sample_vectors(vlm, requests, self.level, keys=keys), self.setting)
