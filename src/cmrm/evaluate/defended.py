"""A defence ready to be used on a model, from what a command or `-M` says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, base_name, make_defense, variant_settings
from cmrm.errors import InputError
from cmrm.model.vlm import VLM


def settings_of(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Settings by the name of the defence, from a mapping or from JSON.

    Raises:
        InputError: the text is no JSON object.
    """
    if not isinstance(given, str):
        return dict(given or {})
    try:
        held = json.loads(given)
    except ValueError as error:
        raise InputError(f"settings are no JSON: {error}") from None
    if not isinstance(held, dict):
        raise InputError(f"settings are {given!r}; expected a JSON object, settings by the name of the defence")
    return held


def built_defense(
    vlm: VLM,
    name: str,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    fitted: str | Path | None = None,
    shift: str | None = None,
    alpha: float | None = None,
) -> Defense:
    """A defence, or a stack, ready to be used on `vlm`; see `CmrmAPI` for the arguments.

    Raises:
        InputError: a defence that has to be fitted is not; ArtifactError: what was fitted belongs to another model.
    """
    from cmrm.shift.artifact import ShiftVectors

    make_defense(name, settings)  # names and variants are those of what is asked for, before anything is added
    artifact = None
    parts = name.split("+")
    merged: dict[str, dict[str, Any]] = {part: dict(settings[part]) for part in parts if part in settings}
    if shift is not None:
        taking = [part for part in parts if base_name(part) == "cmrm_dataset"]
        if not taking:
            raise InputError("a shift belongs to the defence cmrm_dataset; name it with -M defense=cmrm_dataset")
        artifact = ShiftVectors.from_pretrained(shift)
        artifact.check(vlm)
        held = artifact.recommended
        recommended = {"alpha": held.alpha, "schedule": held.schedule, "positions": held.positions, "layers": held.layers,
                       "preserve_norm": held.preserve_norm}  # fmt: skip
        for part in taking:
            merged[part] = recommended | dict(variant_settings(part)) | merged.get(part, {})
    if alpha is not None:
        steered = [part for part in parts if base_name(part) in {"cmrm_dataset", "cmrm_sample"}]
        if not steered:
            raise InputError("alpha belongs to cmrm_dataset and cmrm_sample; neither is among the defences")
        for part in steered:
            merged[part] = merged.get(part, {}) | {"alpha": alpha}
    made = make_defense(name, merged)
    for one in made.parts:
        if base_name(one.name) == "cmrm_dataset" and artifact is not None:
            one.state = {"vectors": artifact.vectors}
        elif one.needs_fit:
            if fitted is None:
                raise InputError(
                    f"the defence {one.name!r} has to be fitted on anchors: pass the folder that `cmrm evaluate` fitted it "
                    "into (-M fitted=DIR)"
                    + (", or an artifact (-M shift=FILE)" if base_name(one.name) == "cmrm_dataset" else "")
                )
            one.load(Path(fitted) / f"{one.name}.safetensors", vlm)
    return made
