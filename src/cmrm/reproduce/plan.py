"""The run that a recipe describes.

Of every set that gives anchors a share of what is asked is drawn by its content: defences are
fitted on it, and it is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cmrm.defenses import FitData
from cmrm.errors import CmrmError
from cmrm.evaluate.plan import Plan
from cmrm.prompts import Loaded, load_named
from cmrm.prompts.conditions import Condition
from cmrm.prompts.sample import Sample
from cmrm.prompts.splits import drawn_by_hash, split_by_content
from cmrm.reproduce.schema import Recipe

SALT = "recipe anchors"
"""Of the hash that decides which requests are anchors."""


@dataclass(frozen=True)
class Trouble:
    """A set that cannot be used."""

    set: str
    """Its name."""
    reason: str
    """Why, and the remedy."""


def plan_of(
    recipe: Recipe,
    *,
    places: Mapping[str, Path] | None = None,
    limit: int | None = None,
    partial: bool = False,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    on_set: Callable[[Loaded], None] = lambda loaded: None,
) -> tuple[Plan | None, list[Trouble]]:
    """The run of a recipe, and the sets that cannot be used.

    Args:
        recipe: what is run.
        places: set -> its folder.
        limit: so many samples of every set, and so many of its anchors.
        partial: take sets whose counts or checksums are not the published ones, with a note.
        model: instead of the recipe's.
        model_options: of `load_vlm`.
        variants: settings of variants that the model brings (`cmrm_dataset@demo`).
        on_set: called with every set as it was read.

    Returns:
        The plan, None where nothing is left to ask or no model is named; and the troubles.

    Raises:
        InputError: the recipe cannot be run as it is, whatever the data.
    """
    asked: list[Loaded] = []
    conditions: dict[str, tuple[Condition, ...]] = {}
    pools: dict[str, list[Sample]] = {"harmful": [], "benign": [], "more": []}
    troubles: list[Trouble] = []
    for name, use in recipe.sets.items():
        drawn = limit if use.anchors in (0.0, 1.0) else None
        try:
            whole = load_named(name, places or {}, limit=drawn, seed=recipe.seed, partial=partial)
        except CmrmError as error:
            troubles.append(Trouble(name, str(error)))
            continue
        on_set(whole)
        anchors, rest = split_by_content(whole.samples, use.anchors, salt=SALT)
        for sample in drawn_by_hash(anchors, limit):
            side = sample.label if sample.label in ("harmful", "benign") else "more"
            if side == "benign" or sample.image is not None:
                pools[side].append(replace(sample, id=f"{name}/{sample.id}"))
        if rest:
            if use.conditions is not None:
                conditions[whole.name] = use.conditions
            asked.append(_asked(whole, rest, limit))
    chosen = model or recipe.model
    if not asked or chosen is None:
        return None, troubles
    parts = {part for name in recipe.defenses for part in name.split("+")}
    own = {name: values for name, values in (variants or {}).items() if name in parts}
    plan = Plan(
        model=chosen, sets=tuple(asked), defenses=recipe.defenses, judges=recipe.judges,
        conditions=recipe.conditions,
        anchors=FitData(
            pools["harmful"], pools["benign"], recipe.batch_size, more=pools["more"]
        ),
        settings={**own, **recipe.settings}, max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.batch_size, seed=recipe.seed,
        model_options={"dtype": recipe.dtype, **(model_options or {})}, rater=recipe.rater,
        set_conditions=conditions,
    )  # fmt: skip
    return plan, troubles


def _asked(whole: Loaded, rest: list[Sample], limit: int | None) -> Loaded:
    """The part of a set that is asked, with notes on what is not."""
    kept = drawn_by_hash(rest, limit)
    notes = list(whole.notes)
    n_anchors = len(whole.samples) - len(rest)
    if n_anchors:
        notes.append(f"{n_anchors} of {len(whole.samples)} samples are anchors and not asked")
    if len(kept) < len(rest):
        notes.append(f"{len(kept)} of {len(rest)} samples")
    return replace(whole, samples=tuple(kept), notes=tuple(notes))
