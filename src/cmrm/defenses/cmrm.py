"""CMRM (Liu et al., arXiv 2410.09047) as defences: dataset level, sample level, fill and gated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar

from cmrm.defenses.base import Defense, FitData, typed
from cmrm.defenses.space import Choice, LayerRange, Real, Space
from cmrm.engines.base import Engine
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Provenance, ShiftVectors
from cmrm.shift.estimate import Estimator, SampleLevel, check_estimator
from cmrm.shift.harm_gate import FALSE_ALARMS, RATES, check_false_alarms
from cmrm.shift.other_gates import FittedGate, check_gate_kind
from cmrm.shift.resolve import nonzero_layers, resolved
from cmrm.steering.intervention import Intervention, shift_intervention
from cmrm.steering.setting import PRESETS, Steering


class _Steered(Defense):
    """Settings of every level: those of `Steering`, the corruption and its seed."""

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
    """Vectors that are estimated once, on anchors; no extra pass.

    Under a setting with `fill` or a gate, the refusal direction and the gate are fitted with them.
    """

    name = "cmrm_dataset"
    needs_fit = True
    fits_on_images = True

    def __init__(
        self,
        *,
        estimator: Estimator = "pca",
        mixed: bool = False,
        false_alarms: float = FALSE_ALARMS,
        gate_kind: FittedGate = "probe",
        **setting: Any,
    ) -> None:
        """`mixed`: the shift is that of harmful and benign anchors together; `false_alarms`: share
        of benign requests that a gate may take for harmful ones; `gate_kind`: `probe`, or
        `cosine` or `vocabulary` of `shift.other_gates`."""
        super().__init__(**setting)
        check_estimator(estimator)
        typed("mixed", mixed, bool, "true or false")
        check_false_alarms(false_alarms)
        check_gate_kind(gate_kind)
        self.gate_kind: FittedGate = gate_kind
        self.estimator: Estimator = estimator
        self.mixed = mixed
        self.false_alarms = false_alarms

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the steering, and of the estimate."""
        made = {"estimator": self.estimator, "mixed": self.mixed, "false_alarms": self.false_alarms}
        return {**super().settings, **made, "gate_kind": self.gate_kind}

    def space(self, engine: Engine) -> Space:
        """What fits to the kind of the setting: strength, and layers, or the share of false alarms
        where a gate stands below the layers."""
        gated = self.steering.gate
        moves: Space = (Choice("false_alarms", RATES),) if gated else ()
        if not gated and self.steering.schedule != "sequential":
            moves = (LayerRange(engine.n_layers - 1),)
        if self.steering.operator == "fill":
            return (Real("alpha", 0.25, 2.0, log=True), *moves)
        if self.steering.schedule == "sequential":
            mixed: Space = (Choice("mixed", (False, True)),) if self.needs_benign else ()
            return (Real("alpha", 0.25, 2.0, log=True), *mixed, *moves)
        positions = ("last", "last_prompt") if gated else ("last", "last_prompt", "all")
        return (
            Real("alpha", 0.05, 2.0, log=True), Choice("schedule", ("telescoped", "per_layer")),
            Choice("positions", positions), Choice("estimator", ("pca", "mean")), *moves,
        )  # fmt: skip

    @property
    def needs_benign(self) -> bool:
        """Whether benign anchors are read with their images."""
        return self.steering.gate or self.mixed or self.steering.operator == "fill"

    @property
    def fitted_by(self) -> tuple[object, ...]:
        """What decides the estimate: variants that differ in how it is used are fitted once."""
        made = (self.estimator, self.level.corruption, self.level.seed, self.mixed)
        if not self.needs_benign and self.steering.schedule != "sequential":
            return made
        steering = replace(self.steering, alpha=1.0)
        return (*made, self.false_alarms, self.gate_kind, steering)

    def anchors_of(self, data: FitData) -> tuple[Sequence[Sample], Sequence[Sample] | None]:
        """Anchors of the estimate, and benign ones; None where the setting asks for none."""
        if not self.needs_benign:
            return data.shifted, None
        return data.harmful, (*data.benign, *data.more) if self.mixed else data.benign

    def fit(self, engine: Engine, data: FitData) -> None:
        """`shift.estimate.estimate_shift` on the harmful anchors, and those that are added to
        them (`FitData.more`).

        Where the setting asks for benign anchors, direction and gate tell them from the harmful
        ones alone: `more` then counts among the benign ones under `mixed`, and is left out
        without it.
        """
        anchors, benign = self.anchors_of(data)
        shift = engine.estimate_shift(
            anchors,
            benign=benign,
            estimator=self.estimator,
            corruption=self.level.corruption,
            seed=self.level.seed,
            mixed=self.mixed,
            false_alarms=self.false_alarms,
            gate_kind=self.gate_kind,
            recommended=self.steering,
            batch_size=data.batch_size,
        )
        self._take(shift)

    def use(self, shift: ShiftVectors) -> None:
        """Take an artifact instead of fitting.

        Raises:
            InputError: it does not hold what the setting needs.
        """
        self.estimator = shift.provenance.estimator or self.estimator  # type: ignore[assignment]
        self.mixed = shift.provenance.benign_share > 0
        record = shift.records.get("gate", {})
        self.false_alarms = record.get("wanted_false_alarms", self.false_alarms)
        self._take(shift)

    def _take(self, shift: ShiftVectors) -> None:
        """Hold what the setting uses, and nothing that its replies do not depend on."""
        used = {"sequential": self.steering.kind == "sequential"}
        used["direction"] = self.steering.operator == "fill"
        others = {name: tensor for name, tensor in shift.others.items() if used.get(name, False)}
        self.state = {"vectors": shift.vectors, **others}
        self.gate = shift.gate if self.steering.gate else None
        self.records = dict(shift.records) if used["direction"] or self.steering.gate else {}

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """Every row with an image by the same vectors; under `fill` one pass over the texts."""
        if not any(request.all_images for request in requests):
            return []
        return resolved(self._artifact(), self.steering, partial(engine.text_states, requests))

    def _artifact(self) -> ShiftVectors:
        """What was fitted, in the form that settings are resolved from."""
        vectors = self.fitted("vectors")
        others = {name: tensor for name, tensor in self.state.items() if name != "vectors"}
        sequential = others.get("sequential")
        layers = () if sequential is None else nonzero_layers(sequential)
        n_layers, width = vectors.shape
        made = Provenance("", None, "unknown", width, n_layers, sequential_layers=layers)
        return ShiftVectors(vectors, made, self.steering, others, gate=self.gate)


class CmrmFill(CmrmDataset):
    """Raises the refusal coordinate to what the request has as text, once, in the upper half of the
    layers; one extra pass over the text, on a cached prefix."""

    name = "cmrm_fill"
    source = "CMRM (arXiv 2410.09047) along the refusal direction (arXiv 2406.11717)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gated": {"gate": True}}

    def __init__(self, *, operator: str = "fill", **setting: Any) -> None:
        """See `CmrmDataset`; `layers` None: the upper half."""
        super().__init__(operator=operator, **setting)


class CmrmGated(CmrmDataset):
    """Sequential vectors above a harm gate, for the rows that it opens for; no extra pass."""

    name = "cmrm_gated"
    source = "CMRM (arXiv 2410.09047), sequential, gated (after CAST, arXiv 2409.05907)"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cosine": {"gate_kind": "cosine"},
        "vocabulary": {"gate_kind": "vocabulary"},
    }

    def __init__(self, *, schedule: str = "sequential", gate: bool = True, **setting: Any) -> None:
        """See `CmrmDataset`; `layers` None: all above the gate."""
        super().__init__(schedule=schedule, gate=gate, **setting)


class CmrmSample(_Steered):
    """Each row by its own shift: two extra passes, on cached prefixes where the model allows it."""

    name = "cmrm_sample"

    def space(self, engine: Engine) -> Space:
        """Strength, schedule, positions and layers."""
        return (
            Real("alpha", 0.02, 1.0, log=True), Choice("schedule", ("telescoped", "per_layer")),
            Choice("positions", ("last", "last_prompt", "all")), LayerRange(engine.n_layers - 1),
        )  # fmt: skip

    def intervene(
        self, engine: Engine, requests: Sequence[Request], keys: Sequence[str]
    ) -> list[Intervention]:
        """Nothing where no row has an image."""
        if not any(request.all_images for request in requests):
            return []
        return [shift_intervention(engine.sample_shift(requests, self.level, keys), self.steering)]
