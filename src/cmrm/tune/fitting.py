"""A defence's fitted state for each setting, with nothing computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, FitData
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.engines.base import Engine
from cmrm.errors import CmrmError
from cmrm.shift.artifact import ShiftVectors


class Fitter:
    """Gives a study's defences what was fitted on its anchors.

    Settings that are fitted alike (`Defense.fitted_by`) share one fit. Artifacts of CMRM are kept
    on disk, and extracted once for all settings that only use them in another way.
    """

    def __init__(
        self,
        engine: Engine,
        data: FitData,
        folder: Path,
        default: Defense,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`default`: the defence at its default setting, for which CMRM's gate and sequential
        vectors are estimated."""
        self.engine = engine
        self.data = data
        self.folder = folder
        self.default = default
        self.say = say
        self._alike: dict[object, Defense] = {}
        self._shifts: dict[str, ShiftVectors] = {}

    def fit(self, defense: Defense) -> None:
        """Fit a defence, or give it what was fitted before.

        Raises:
            InputError: the anchors do not suffice, or the setting does not suit the model.
        """
        defense.check(self.engine)
        if not defense.needs_fit:
            return
        if isinstance(defense, CmrmDataset):
            defense.use(self.artifact(defense))
            return
        made = defense.fitted_by
        key = json.dumps(defense.settings, sort_keys=True) if made is None else made
        alike = self._alike.get(key)
        if alike is None:
            self.say(f"fitting {defense.name}")
            defense.fit(self.engine, self.data)
            self._alike[key] = defense
        else:
            defense.state, defense.gate = alike.state, alike.gate
            defense.records = alike.records

    def artifact(self, defense: CmrmDataset) -> ShiftVectors:
        """The artifact that a setting of CMRM uses; its gate at the setting's share of false
        alarms, the setting itself as the recommended one."""
        made = self._extracted(defense)
        if defense.steering.gate:
            made = made.with_false_alarms(defense.false_alarms)
        return replace(made, recommended=defense.steering)

    def _extracted(self, defense: CmrmDataset) -> ShiftVectors:
        default = self.default
        assert isinstance(default, CmrmDataset)
        benign = list(self.data.benign) if defense.needs_benign else None
        wanted: dict[str, Any] = {
            "estimator": defense.estimator, "corruption": defense.level.corruption.value,
            "seed": defense.level.seed, "mixed": defense.mixed,
        }  # fmt: skip
        if defense.needs_benign:
            wanted |= {"gate_kind": defense.gate_kind, "false_alarms": default.false_alarms}
        sequential = default.steering.kind == "sequential"
        fixed = default.steering if benign is not None or sequential else None
        kind = None if fixed is None else replace(fixed, alpha=1.0).to_json()
        text = json.dumps([wanted, kind], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        if digest in self._shifts:
            return self._shifts[digest]
        file = self.folder / f"shift-{digest}.safetensors"
        shift = self._stored(file)
        if shift is None:
            self.say(f"extracting vectors for {defense.name}")
            self.folder.mkdir(parents=True, exist_ok=True)
            shift = self.engine.estimate_shift(
                self.data.shifted, benign=benign, recommended=fixed,
                batch_size=self.data.batch_size, **wanted,
            )  # fmt: skip
            shift.save(file)
        self._shifts[digest] = shift
        return shift

    def _stored(self, file: Path) -> ShiftVectors | None:
        """The artifact of an earlier call of the same study; None where it is missing or broken."""
        if not file.is_file():
            return None
        try:
            shift = ShiftVectors.load(file)
            self.engine.accept(shift)
        except CmrmError:
            return None
        return shift
