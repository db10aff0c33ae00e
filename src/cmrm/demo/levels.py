"""The demo's levels of CMRM as defences, and the artifact that they are built on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, make_defense
from cmrm.defenses.cmrm import CmrmDataset, CmrmFill, CmrmGated, CmrmSample
from cmrm.demo.settings import (
    CORRUPTION,
    ESTIMATOR,
    FALSE_ALARMS,
    FILL_STEERING,
    GATED_STEERING,
    QUICK,
    Budget,
)
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import CmrmError
from cmrm.files import cache_dir
from cmrm.prompts.ours import prompt_samples
from cmrm.prompts.sample import Sample
from cmrm.prompts.splits import set_hash
from cmrm.shift.artifact import ShiftVectors, library_versions
from cmrm.shift.checkpoint import remove_checkpoint
from cmrm.steering.setting import Steering


def untouched() -> Defense:
    """The model as it is."""
    return make_defense("none")


def dataset_level(shift: ShiftVectors, steering: Steering) -> CmrmDataset:
    """CMRM at dataset level with fitted vectors."""
    defense = CmrmDataset(corruption=CORRUPTION, **steering.to_json())
    defense.use(shift)
    return defense


def mixed_level(shift: ShiftVectors, steering: Steering) -> CmrmDataset:
    """CMRM at dataset level with vectors of harmful and benign anchors together."""
    defense = dataset_level(shift, steering)
    defense.name = f"{defense.name}@mixed"
    return defense


def fill_level(shift: ShiftVectors) -> CmrmFill:
    """Fill along the refusal direction, at the setting that the anchors recommend."""
    defense = CmrmFill(corruption=CORRUPTION, **FILL_STEERING.to_json())
    defense.use(shift)
    return defense


def gated_level(shift: ShiftVectors) -> CmrmGated:
    """Sequential vectors above the harm gate."""
    defense = CmrmGated(
        corruption=CORRUPTION, false_alarms=FALSE_ALARMS, **GATED_STEERING.to_json()
    )
    defense.use(shift)
    return defense


def sample_level(steering: Steering) -> CmrmSample:
    """CMRM at sample level."""
    return CmrmSample(corruption=CORRUPTION, **steering.to_json())


def shift_of_run(
    engine: TransformersEngine,
    budget: Budget,
    anchors: Sequence[Sample],
    lookalikes: Sequence[Sample],
    state: Path,
    *,
    mixed: bool = False,
) -> ShiftVectors:
    """What a run fits on the anchors; from the folder `state` where it is."""
    file = state / ("shift-mixed.safetensors" if mixed else "shift.safetensors")
    wanted = {
        "estimator": ESTIMATOR, "corruption": CORRUPTION, "seed": budget.seed,
        "anchor_hash": set_hash(anchors), "benign_hash": set_hash(lookalikes),
        "versions": library_versions(),
    }  # fmt: skip
    stored = _stored_shift(file, engine, wanted, mixed=mixed)
    if stored is not None:
        return stored
    identity = str(engine.context()["identity"])
    checkpoint = state / f"{file.stem}-{identity[:8]}-{str(wanted['anchor_hash'])[:8]}.partial"
    shift = fitted_shift(
        engine, anchors, lookalikes, mixed=mixed, budget=budget, checkpoint=checkpoint
    )
    shift.save(file)
    remove_checkpoint(checkpoint)
    return shift


def shift_of_cache(engine: TransformersEngine) -> ShiftVectors:
    """The artifact of `cmrm demo`, fitted once and kept in the user's cache."""
    anchors, lookalikes = (prompt_samples("anchor", label) for label in ("harmful", "benign"))
    return shift_of_run(engine, QUICK, anchors, lookalikes, cached_shift().parent)


def cached_shift() -> Path:
    """Where `shift_of_cache` keeps its artifact."""
    return cache_dir() / "demo-shift" / "shift.safetensors"


def fitted_shift(
    engine: TransformersEngine,
    anchors: Sequence[Sample],
    lookalikes: Sequence[Sample],
    *,
    mixed: bool = False,
    budget: Budget = QUICK,
    checkpoint: Path | None = None,
) -> ShiftVectors:
    """The demo's artifact: vectors, refusal direction, gate and sequential vectors.

    `anchors` are harmful, `lookalikes` benign; `mixed`: the shift is that of both together.
    """
    return engine.estimate_shift(
        anchors,
        benign=lookalikes,
        estimator=ESTIMATOR,
        corruption=CORRUPTION,
        mixed=mixed,
        false_alarms=FALSE_ALARMS,
        seed=budget.seed,
        batch_size=budget.batch_size,
        checkpoint=checkpoint,
    )


def _stored_shift(
    file: Path, engine: TransformersEngine, wanted: Mapping[str, Any], *, mixed: bool
) -> ShiftVectors | None:
    """The vectors in `file`, where they are this model's and have the wanted provenance."""
    if not file.is_file():
        return None
    try:
        shift = ShiftVectors.load(file)
        engine.accept(shift)
    except CmrmError:
        return None
    made = {name: getattr(shift.provenance, name) for name in wanted}
    alarms = shift.records.get("gate", {}).get("wanted_false_alarms")
    same = made == wanted and (shift.provenance.benign_share > 0) is mixed
    return shift if same and alarms == FALSE_ALARMS else None
