"""A defence ready to be used on a model, from what a command or `-M` names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, base_name, make_defense, variant_settings
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.engines.base import Engine
from cmrm.errors import InputError
from cmrm.shift.artifact import ShiftVectors

Settings = Mapping[str, Mapping[str, Any]]
"""Settings by the name of the defence."""

DATASET = CmrmDataset.name
"""The defence that takes shift vectors."""
STEERED = {DATASET, "cmrm_sample"}
"""The defences that have an alpha of their own."""


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


def shift_settings(names: Iterable[str], settings: Settings, shift: ShiftVectors) -> dict[str, Any]:
    """`settings`, with those of the artifact for every part of `names` that takes its vectors.

    A part has the setting that the artifact recommends, then that of its variant
    (`cmrm_dataset@paper`), then its own; each overrides the one before. How the vectors were
    estimated is a fact of the artifact.

    Raises:
        InputError: no part takes vectors, the artifact is a run's fitted state, or a part's own
            settings name another estimate.
    """
    parts = [part for name in names for part in name.split("+") if base_name(part) == DATASET]
    if not parts:
        raise InputError(f"a shift belongs to the defence {DATASET}, which is not among those")
    made = shift.provenance
    if base_name(made.estimator) == DATASET:
        raise InputError(
            "the artifact is what a run fitted for its own use; pass what `cmrm extract` writes"
        )
    facts = {"estimator": made.estimator, "corruption": made.corruption, "seed": made.seed}
    merged = dict(settings)
    for part in parts:
        own = dict(settings.get(part, {}))
        other = [name for name, value in facts.items() if own.get(name, value) != value]
        if other:
            raise InputError(
                f"the settings of {part!r} say {other[0]} {own[other[0]]!r}, the shift was "
                f"estimated with {facts[other[0]]!r}; leave it out, or extract another shift"
            )
        merged[part] = {**shift.recommended.to_json(), **variant_settings(part), **own, **facts}
    return merged


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
        if not any(base_name(part) == DATASET for part in parts):
            raise InputError(f"a shift belongs to the defence {DATASET}; use -M defense={DATASET}")
        vectors = ShiftVectors.from_pretrained(shift)
        engine.accept(vectors)
        settings = shift_settings(parts, settings, vectors)
    if alpha is not None:
        steered = [part for part in parts if base_name(part) in STEERED]
        if not steered:
            raise InputError(
                f"alpha belongs to {' and '.join(sorted(STEERED))}; neither is among the defences"
            )
        changed = {part: {**settings.get(part, {}), "alpha": alpha} for part in steered}
        settings = {**settings, **changed}
    defense = make_defense(name, settings)
    for part in defense.parts:
        if vectors is not None and isinstance(part, CmrmDataset):
            part.use(vectors)
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
