"""A defence ready to be used on a model, from what a command or `-M` names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, base_name, make_defense, variant_settings
from cmrm.defenses.cmrm import CmrmDataset, CmrmFill, CmrmGated, CmrmSample
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.resolve import settled
from cmrm.steering.setting import Steering

Settings = Mapping[str, Mapping[str, Any]]
"""Settings by the name of the defence."""

TAKERS: dict[str, type[CmrmDataset]] = {
    kind.name: kind for kind in (CmrmDataset, CmrmFill, CmrmGated)
}
"""The defences that take an artifact of `cmrm extract`, by name."""
STEERED = (*TAKERS, CmrmSample.name)
"""The defences that have an alpha of their own."""


_TAKERS = " or ".join(TAKERS)
GATE_KINDS = {"linear": "probe", "cosine": "cosine", "vocabulary": "vocabulary"}
"""`Gate.kind` -> how defences call it."""
STEERING = frozenset(field.name for field in fields(Steering))


def settings_of(values: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Settings by the name of the defence, from a mapping or from JSON.

    Raises:
        InputError: the text is no JSON object.
    """
    if not isinstance(values, str):
        return dict(values or {})
    try:
        document = json.loads(values)
    except ValueError as error:
        raise InputError(f"settings are no JSON: {error}") from None
    if not isinstance(document, dict):
        raise InputError(
            f"settings are {values[:80]!r}; expected a JSON object, settings by the name of the "
            "defence"
        )
    return document


def takes_artifact(part: str) -> bool:
    """Whether a part of a stack is one of `TAKERS`, or a variant of one."""
    return base_name(part) in TAKERS


def shift_settings(names: Iterable[str], settings: Settings, shift: ShiftVectors) -> dict[str, Any]:
    """`settings`, with those of the artifact for every part of `names` that takes it.

    A part has the setting that the artifact recommends, then that of its variant
    (`cmrm_dataset@paper`), then its own; each overrides the one before, and one that makes another
    kind of it (`Steering.changed`) leaves none of its layers. `cmrm_fill` and `cmrm_gated` begin
    with their own setting where the artifact recommends another kind. How the vectors were
    estimated is a fact of the artifact; its gate may stand at another share of its curve.

    Raises:
        InputError: no part takes an artifact, the artifact is a run's fitted state, a part's own
            settings name another estimate, or the artifact does not hold what a part needs.
    """
    parts = [part for name in names for part in name.split("+") if takes_artifact(part)]
    if not parts:
        raise InputError(f"a shift belongs to the defence {_TAKERS}, and none is among those")
    made = shift.provenance
    if takes_artifact(made.estimator):
        raise InputError(
            "the artifact is what a run fitted for its own use; pass what `cmrm extract` writes"
        )
    facts: dict[str, Any] = {
        "estimator": made.estimator, "corruption": made.corruption, "seed": made.seed,
        "mixed": made.benign_share > 0,
    }  # fmt: skip
    if shift.gate is not None:
        facts["gate_kind"] = GATE_KINDS[shift.gate.kind]
    recorded = shift.records.get("gate", {}).get("wanted_false_alarms")
    merged = dict(settings)
    for part in parts:
        changes = {**variant_settings(part), **settings.get(part, {})}
        other = [name for name, value in facts.items() if changes.get(name, value) != value]
        if other:
            raise InputError(
                f"the settings of {part!r} say {other[0]} {changes[other[0]]!r}, the shift was "
                f"estimated with {facts[other[0]]!r}; leave it out, or extract another shift"
            )
        steering = _begun(part, shift).changed(
            {name: value for name, value in changes.items() if name in STEERING}
        )
        rest = {name: value for name, value in changes.items() if name not in STEERING}
        if recorded is not None:
            rest.setdefault("false_alarms", recorded)
        try:
            settled(shift, steering)
        except InputError as error:
            raise InputError(f"{part} cannot use the artifact: {error}") from None
        merged[part] = {**steering.to_json(), **rest, **facts}
    return merged


def _begun(part: str, shift: ShiftVectors) -> Steering:
    """The setting that a part begins with: the artifact's, or its class's of another kind."""
    own = TAKERS[base_name(part)]().steering
    recommended = shift.recommended
    if base_name(part) == CmrmDataset.name:
        return recommended
    return recommended if (recommended.kind, recommended.gate) == (own.kind, own.gate) else own


def adopt(part: CmrmDataset, shift: ShiftVectors) -> None:
    """Give a part the artifact instead of fitting it, its gate at the share of false alarms that
    the part names.

    Raises:
        InputError: that share is not on the gate's curve.
    """
    recorded = shift.records.get("gate", {}).get("wanted_false_alarms")
    if recorded is not None and part.false_alarms != recorded:
        shift = shift.with_false_alarms(part.false_alarms)
    part.use(shift)


def built_defense(
    engine: Engine,
    name: str,
    settings: Settings,
    *,
    fitted: str | Path | None = None,
    shift: str | None = None,
    alpha: float | None = None,
) -> Defense:
    """A defence, or a stack, ready to be used on `engine`; see `CmrmAPI` for the arguments.

    Raises:
        InputError: a defence that has to be fitted is not, or an argument goes with no part.
        ArtifactError: what was fitted belongs to another model.
    """
    make_defense(name, settings)  # refuses unknown names and variants before anything is added
    parts = name.split("+")
    vectors = None
    if shift is not None:
        if not any(map(takes_artifact, parts)):
            raise InputError(f"a shift belongs to the defence {_TAKERS}; use -M defense=NAME")
        vectors = ShiftVectors.from_pretrained(shift)
        engine.accept(vectors)
        settings = shift_settings(parts, settings, vectors)
    if alpha is not None:
        steered = [part for part in parts if base_name(part) in STEERED]
        if not steered:
            raise InputError(
                f"alpha belongs to {', '.join(STEERED)}, and none is among the defences"
            )
        changed = {part: {**settings.get(part, {}), "alpha": alpha} for part in steered}
        settings = {**settings, **changed}
    defense = make_defense(name, settings)
    for part in defense.parts:
        if vectors is not None and isinstance(part, CmrmDataset):
            adopt(part, vectors)
            if vectors.recommended.alpha == 0 and part.steering.alpha == 0:
                warnings.warn(
                    f"the artifact recommends alpha 0, so that {part.name} leaves the model as it "
                    "is; -M alpha=NUMBER steers it",
                    stacklevel=2,
                )
        elif part.needs_fit:
            part.load(_fitted_file(part, fitted), engine)
        part.check(engine)
    return defense


def fitted_file(folder: Path, part: Defense) -> Path:
    """The artifact of a fitted defence in a folder of them."""
    return folder / f"{part.name}.safetensors"


def _fitted_file(part: Defense, folder: str | Path | None) -> Path:
    if folder is None:
        artifact = ", or an artifact (-M shift=FILE)" if isinstance(part, CmrmDataset) else ""
        raise InputError(
            f"the defence {part.name!r} has to be fitted on anchors: pass the folder that "
            f"`cmrm evaluate` fitted it into (-M fitted=DIR){artifact}"
        )
    return fitted_file(Path(folder), part)
