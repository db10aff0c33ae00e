"""What a recipe is: a YAML file of the schema `cmrm-recipe/1`, checked part by part."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from cmrm.errors import InputError
from cmrm.prompts.conditions import FIVE, Condition

SCHEMA = "cmrm-recipe/1"
DEMO = "demo"
"""Name of the model that a recipe's section `demo` is for."""
Figure = Literal["unsafe", "over_refusal", "accuracy", "rating"]
"""Figures that a target can be of."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _conditions(conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    if not conditions or len(set(conditions)) < len(conditions) or not set(conditions) <= set(FIVE):
        raise ValueError(f"they are a list of {', '.join(FIVE)}, each once")
    return conditions


Text = Annotated[str, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Conditions = Annotated[tuple[Condition, ...], AfterValidator(_conditions)]
Settings = dict[str, dict[str, Any]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Part):
    """One figure that the publication prints."""

    set: Text
    """Name of the set; of a file its name without suffix."""
    condition: Condition
    """Input condition."""
    defense: Text
    """`none`, or a defence or variant of the recipe."""
    figure: Figure
    """Unsafe rate and over-refusal are those of the recipe's first judge."""
    value: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    """As printed: per cent, or a rating of 100."""


class SetUse(_Part):
    """What a set is used for."""

    anchors: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.0
    """Share of its samples that are anchors, 0 to 1; a set of anchors alone is not asked."""
    conditions: Conditions | None = None
    """Under which the untouched model is asked; None: the recipe's."""


Use = Annotated[SetUse, BeforeValidator(lambda value: {} if value is None else value)]
Sets = Annotated[dict[str, Use], Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]


class DemoSection(_Part):
    """What `--model demo` takes in the place of the recipe's own parts."""

    sets: Sets = Field(default_factory=dict)
    conditions: Conditions = ()
    defenses: Names = ()
    judges: Names = ()
    rater: Text | None = None
    settings: Settings = Field(default_factory=dict)
    max_new_tokens: Count = 48
    batch_size: Count = 16


class Recipe(_Part):
    """What is run, and what the publication found."""

    schema_: Literal["cmrm-recipe/1"] = Field(alias="schema")
    title: Text
    """What it reproduces."""
    source: Text
    """Publication, table."""
    model: Text | None
    """Hub id; None where there is none that transformers loads: `--model` names a converted one."""
    sets: Sets
    """By name."""
    conditions: Conditions
    """Of the untouched model."""
    defenses: Names
    """Defences and variants."""
    judges: Names
    """The first is the publication's."""
    rater: Text | None = None
    """Judge of open answers."""
    settings: Settings = Field(default_factory=dict)
    """By the name of the defence."""
    dtype: Dtype = "auto"
    """Of the model's weights."""
    max_new_tokens: Count = 128
    """Length limit of a reply."""
    batch_size: Count = 16
    """Requests a batch."""
    seed: Annotated[int, Field(strict=True)] = 0
    """Seed of noise and of sets that are composed by a recipe."""
    targets: tuple[Target, ...] = ()
    """What the publication prints."""
    notes: tuple[Text, ...] = ()
    """What is not as in the publication, or not known of it."""
    demo: DemoSection | None = None
    """What the demo VLM takes instead."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        parts = {part for name in self.defenses for part in name.split("+")}
        stray = [name for name in self.settings if name not in parts]
        if stray:
            raise ValueError(f"settings are for {stray[0]!r}, which is not among the defences")
        asked = {*self.sets, *(Path(name).stem for name in self.sets)}
        for target in self.targets:
            if target.set not in asked:
                raise ValueError(f"a target is of the set {target.set!r}, which is not asked")
            if target.defense not in ("none", *self.defenses) or target.condition not in FIVE:
                raise ValueError(
                    f"a target is of {target.condition.value!r} under {target.defense!r}, which "
                    "the recipe does not run"
                )
        return self

    def for_demo(self) -> Recipe:
        """The recipe with the parts of its section `demo`, without targets.

        Raises:
            InputError: it has no such section, or the section does not fit the rest.
        """
        if self.demo is None:
            raise InputError("the recipe has no section `demo`; it cannot be tried on the demo VLM")
        changes = self.demo.model_dump(exclude_unset=True)
        names = ", ".join(changes.get("sets", self.sets))
        note = f"Run on the demo VLM and stand-in data ({names}): no figure is the publication's."
        whole = self.model_dump(by_alias=True, exclude={"demo"})
        whole |= {**changes, "model": DEMO, "dtype": "auto", "targets": [], "notes": [note]}
        return _recipe(whole, "the recipe, demo")


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
    raise InputError(
        f"there is no recipe {name[:80]}; name a YAML file, or one of {', '.join(sorted(shipped))}"
    )


def _shipped() -> Iterator[Path]:
    yield from sorted(Path(str(files("cmrm.reproduce"))).glob("*.yaml"))


def read_recipe(path: Path) -> Recipe:
    """A recipe from its file.

    Raises:
        InputError: the file cannot be read, or a part of it is missing, unknown or of another form.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as YAML: {reason}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise InputError(f"{path} is no recipe: its `schema` has to be {SCHEMA}")
    return _recipe(values, str(path))


def _recipe(values: dict[str, Any], place: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise InputError(f"{place}: {_message(errors[0])}{more}")


def _message(error: Any) -> str:
    """One error of pydantic as a phrase: the part, its value, what it has to be."""
    part = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{part} is no part of a recipe"
    if error["type"] == "missing":
        return f"the part {part} is missing"
    reason = str(error["msg"]).removeprefix("Value error, ")
    if not part:
        return reason
    value = repr(error["input"])
    shown = value if len(value) <= 60 else f"{value[:60]}..."
    return f"{part} is {shown}: {reason}"
