"""Recipes: a whole published table as one run, with the figures that the publication prints beside those of the run.

A recipe is a YAML file (`recipes/` in the repository; schema `cmrm-recipe/1`, docs/recipes.md). Of every set that gives anchors a
share of the requests is drawn by hash for the defences to be fitted on, and never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from math import isinf, isnan
from pathlib import Path
from typing import Any

import yaml

from cmrm.prompts.conditions import FIVE, Condition
from cmrm.defenses import FitData
from cmrm.demo import DEMO
from cmrm.errors import CmrmError, InputError
from cmrm.evaluate.results import compared
from cmrm.evaluate.run import Plan
from cmrm.evaluate.sets import load_named
from cmrm.prompts.sample import Sample, split_by_hash
from cmrm.prompts import Loaded
from cmrm.prompts.loading import drawn_by_hash

SCHEMA = "cmrm-recipe/1"
FIGURES = ("unsafe", "over_refusal", "accuracy", "rating")
"""What a target can be of."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
SALT = "recipe anchors"
"""Of the hash that decides which requests are anchors."""


@dataclass(frozen=True)
class Target:
    """One figure that the publication prints."""

    set: str
    """Name of the set; of a file its name without suffix."""
    condition: str
    """Input condition."""
    defense: str
    """`none`, or a defence or variant of the recipe."""
    figure: str
    """One of `FIGURES`; unsafe rate and over-refusal by the recipe's first judge."""
    value: float
    """As printed: per cent, or a rating of 100."""


@dataclass(frozen=True)
class SetUse:
    """What a set is used for."""

    anchors: float = 0.0
    """Share of its samples that are anchors, 0 to 1; a set of anchors alone is not asked."""
    conditions: tuple[Condition, ...] | None = None
    """Under which the untouched model is asked; None: the recipe's."""


@dataclass(frozen=True)
class Recipe:
    """What is run, and what the publication found."""

    title: str
    """What it reproduces."""
    source: str
    """Publication, table."""
    model: str | None
    """Hub id; None where there is none that transformers loads: `--model` names a converted one."""
    sets: Mapping[str, SetUse]
    """By name."""
    conditions: tuple[Condition, ...]
    """Of the untouched model."""
    defenses: tuple[str, ...]
    """Defences and variants."""
    judges: tuple[str, ...]
    """The first is the publication's."""
    rater: str | None = None
    """Judge of open answers."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By the name of the defence."""
    dtype: str = "auto"
    """Of the model's weights."""
    max_new_tokens: int = 128
    """Length limit of a reply."""
    batch_size: int = 16
    """Requests a batch."""
    seed: int = 0
    """Seed of noise and of recipes that compose a set."""
    targets: tuple[Target, ...] = ()
    """What the publication prints."""
    notes: tuple[str, ...] = ()
    """What is not as in the publication, or not known of it."""


_REQUIRED = {"schema", "title", "source", "model", "sets", "conditions", "defenses", "judges"}
_OPTIONAL = {"rater", "settings", "dtype", "max_new_tokens", "batch_size", "seed", "targets", "notes", "demo"}
_DEMO = {"sets", "conditions", "defenses", "judges", "rater", "settings", "max_new_tokens", "batch_size"}


def recipe_path(name: str) -> Path:
    """A recipe's file: a path, or the name of one that ships with cmrm (`paper_llava15_7b`).

    Raises:
        InputError: there is none.
    """
    try:
        if Path(name).is_file():
            return Path(name)
    except OSError as error:
        raise InputError(f"{name[:80]} cannot be a recipe's file: {error.strerror}") from None
    shipped = {path.stem: path for path in _shipped()}
    if name in shipped:
        return shipped[name]
    raise InputError(f"there is no recipe {name}; name a YAML file, or one of {', '.join(sorted(shipped))}")


def _shipped() -> Iterator[Path]:
    yield from sorted(Path(str(files("cmrm.reproduce"))).glob("*.yaml"))


def read_recipe(path: Path, *, demo: bool = False) -> Recipe:
    """A recipe from its file; with `demo` the parts that its section `demo` replaces, and no targets: they are another model's.

    Raises:
        InputError: the file cannot be read, or a part of it is missing, unknown or of another form.
    """
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML: {said}") from None
    if not isinstance(held, dict) or held.get("schema") != SCHEMA:
        raise InputError(f"{path} is no recipe: its `schema` has to be {SCHEMA}")
    _known(held, _REQUIRED | _OPTIONAL, str(path))
    missing = sorted(_REQUIRED - set(held))
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    section = held.pop("demo", None)
    if demo:
        if not isinstance(section, dict):
            raise InputError(f"{path} has no section `demo`; it cannot be tried on the demo VLM")
        _known(section, _DEMO, f"{path}, demo")
        asked = section.get("sets") or held["sets"]
        if not isinstance(asked, dict):
            raise InputError(f"{path}, demo: sets are {asked!r}; expected a mapping")
        asked = ", ".join(map(str, asked))
        note = f"Run on the demo VLM and stand-in data ({asked}): no figure is the publication's."
        held |= {**section, "model": DEMO, "dtype": "auto", "targets": [], "notes": [note]}
    try:
        return _recipe(held)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a part has another form than the schema's: {error}") from None


def _known(held: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in set(held) - known)
    if unknown:
        raise InputError(f"{where} has unknown parts: {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _recipe(held: dict[str, Any]) -> Recipe:
    for listed in ("defenses", "judges", "notes", "targets"):
        if not isinstance(held.get(listed) or [], list):
            raise ValueError(f"{listed} is {held[listed]!r}; it is a list")
    sets = {str(name): _set_use(str(name), given or {}) for name, given in held["sets"].items()}
    targets = tuple(Target(**{**one, "value": float(one["value"])}) for one in held.get("targets") or ())
    wrong = [one.figure for one in targets if one.figure not in FIGURES]
    if wrong:
        raise ValueError(f"a target is of {wrong[0]!r}; one of {', '.join(FIGURES)}")
    called = {*sets, *(Path(name).stem for name in sets)}
    strange = [one.set for one in targets if one.set not in called]
    if strange:
        raise ValueError(f"a target is of the set {strange[0]!r}, which the recipe does not ask")
    defenses = tuple(map(str, held["defenses"]))
    settings = dict(held.get("settings") or {})
    stray = [name for name in settings if name not in {part for one in defenses for part in one.split("+")}]
    if stray:
        raise ValueError(f"settings are given for {stray[0]!r}, which is not among the defences")
    for one in targets:
        if one.defense not in ("none", *defenses) or one.condition not in FIVE:
            raise ValueError(f"a target is of {one.condition!r} under {one.defense!r}, which the recipe does not run")
    whole = {name: held[name] for name in ("max_new_tokens", "batch_size", "seed") if name in held}
    for key, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{key} is {value!r}; it is a whole number")
    for part in ("model", "rater"):
        if not isinstance(held.get(part), str | None):
            raise ValueError(f"{part} is {held[part]!r}; it is a text or null")
    if str(held.get("dtype", "auto")) not in DTYPES:
        raise ValueError(f"dtype is {held['dtype']!r}; one of {', '.join(DTYPES)}")
    if any(isnan(one.value) or isinf(one.value) for one in targets):
        raise ValueError("a target's value is no number")
    return Recipe(
        title=str(held["title"]), source=str(held["source"]), sets=sets,
        model=None if held["model"] is None else str(held["model"]),
        conditions=_conditions(held["conditions"]), defenses=defenses,
        judges=tuple(map(str, held["judges"])), rater=held.get("rater"), settings=settings,
        dtype=str(held.get("dtype", "auto")), targets=targets, notes=tuple(map(str, held.get("notes") or ())), **whole,
    )  # fmt: skip


def _set_use(name: str, given: Mapping[str, Any]) -> SetUse:
    if unknown := sorted(set(given) - {"anchors", "conditions"}):
        raise ValueError(f"sets.{name} has unknown parts: {', '.join(unknown)}")
    share = float(given.get("anchors", 0.0))
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"sets.{name}.anchors is {share}; it is a share between 0 and 1")
    return SetUse(share, _conditions(given["conditions"]) if "conditions" in given else None)


def _conditions(given: Sequence[Any]) -> tuple[Condition, ...]:
    if isinstance(given, str) or not given or not set(given) <= set(FIVE) or len(set(given)) < len(given):
        raise ValueError(f"conditions are {given}; they are a list of {', '.join(FIVE)}, each once")
    return tuple(Condition(name) for name in given)


@dataclass(frozen=True)
class Trouble:
    """A set that cannot be used."""

    set: str
    """Its name."""
    reason: str
    """Why, and the mend."""


def plan_of(
    recipe: Recipe,
    *,
    places: Mapping[str, Path] | None = None,
    limit: int | None = None,
    partial: bool = False,
    model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    loaded: Callable[[Loaded], None] = lambda one: None,
) -> tuple[Plan | None, list[Trouble]]:
    """The run that a recipe describes, and the sets that cannot be used; None where nothing is left to ask or no model is named.

    Args:
        recipe: what is run.
        places: set -> where it lies.
        limit: so many samples of every set, and so many of its anchors.
        partial: take sets whose counts or checksums are not the published ones, and say so.
        model: instead of the recipe's.
        model_options: of `load_vlm`.
        loaded: told every set as it was read.

    Raises:
        InputError: the recipe cannot be run as it is, whatever the data.
    """
    asked: list[Loaded] = []
    own: dict[str, tuple[Condition, ...]] = {}
    pools: dict[str, list[Sample]] = {"harmful": [], "benign": [], "more": []}
    troubles: list[Trouble] = []
    for name, use in recipe.sets.items():
        try:
            whole = load_named(
                name,
                places or {},
                limit=limit if use.anchors in (0.0, 1.0) else None,
                seed=recipe.seed,
                partial=partial,
            )
        except CmrmError as error:
            troubles.append(Trouble(name, str(error)))
            continue
        loaded(whole)
        anchors, rest = _split(whole.samples, use.anchors)
        for sample in drawn_by_hash(anchors, limit):
            kind = sample.label if sample.label in {"harmful", "benign"} else "more"
            if kind == "benign" or sample.image is not None:
                pools[kind].append(replace(sample, id=f"{name}/{sample.id}"))
        if rest:
            kept = drawn_by_hash(rest, limit)
            notes = [f"{len(anchors)} of {len(whole.samples)} samples are anchors and not asked"] if anchors else []
            notes += [f"{len(kept)} of {len(rest)} samples"] if len(kept) < len(rest) else []
            if use.conditions is not None:
                own[whole.name] = use.conditions
            asked.append(replace(whole, samples=tuple(kept), notes=(*whole.notes, *notes)))
    chosen = model or recipe.model
    if not asked or chosen is None:
        return None, troubles
    options = {"dtype": recipe.dtype, **(model_options or {})}
    plan = Plan(
        model=chosen, sets=tuple(asked), defenses=recipe.defenses, judges=recipe.judges, conditions=recipe.conditions,
        anchors=FitData(pools["harmful"], pools["benign"], recipe.batch_size, more=pools["more"]), settings=recipe.settings,
        max_new_tokens=recipe.max_new_tokens, batch_size=recipe.batch_size, seed=recipe.seed, model_options=options,
        rater=recipe.rater,
        set_conditions=own,
    )  # fmt: skip
    return plan, troubles


def _split(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """(anchors, rest) by the hash of the request: samples that ask the same stand on one side, so that no anchor is asked."""
    chosen, _ = split_by_hash([Sample(query, query) for query in {s.query: None for s in samples}], share, salt=SALT)
    held = {sample.query for sample in chosen}
    return [s for s in samples if s.query in held], [s for s in samples if s.query not in held]


def told(recipe: Recipe, found: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into results: title, source, notes, the publication's judge first among `judges`, and the comparison."""
    held: dict[str, Any] = {
        "title": recipe.title, "source": recipe.source, "notes": list(recipe.notes), "judges": list(recipe.judges),
        "targets": [
            {"set": t.set, "condition": t.condition, "defense": t.defense, "figure": t.figure, "published": t.value}
            for t in recipe.targets
        ],
    }  # fmt: skip
    return held | compared(held, found)
