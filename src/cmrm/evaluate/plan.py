"""What a run of `cmrm evaluate` measures: sets, defences, judges, and the cells that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cmrm.defenses import Defense, FitData, base_name, defense_names, make_defense
from cmrm.defenses.cmrm import CmrmDataset
from cmrm.errors import InputError
from cmrm.evaluate.defended import Settings, shift_settings
from cmrm.evaluate.scorers import check_rater
from cmrm.judges import judge_maker
from cmrm.prompts import Loaded, refuse_unratable
from cmrm.prompts.conditions import Condition
from cmrm.prompts.splits import refuse_leaks
from cmrm.shift.artifact import ShiftVectors
from cmrm.shift.estimate import check_anchors


@dataclass(frozen=True)
class Plan:
    """What a run measures. Everything that needs no model is checked when it is made.

    Raises:
        InputError: a part cannot be used, no rate can come from a set, or anchors are asked.
    """

    model: str
    """Folder, hub id, or `demo`."""
    sets: tuple[Loaded, ...]
    """What is asked."""
    defenses: tuple[str, ...]
    """Names, or stacks with `+`; `none` is always among them."""
    judges: tuple[str, ...]
    """Names of judges."""
    conditions: tuple[Condition, ...] = (Condition.ORIGINAL, Condition.QUERY)
    """Of the untouched model; a defence is measured under `original` alone."""
    anchors: FitData | None = None
    """What defences are fitted on."""
    settings: Settings = field(default_factory=dict)
    """Settings by the name of the defence."""
    shift: ShiftVectors | None = None
    """Artifact for `cmrm_dataset`, `cmrm_fill`, `cmrm_gated` and their variants, which are not
    fitted then."""
    max_new_tokens: int = 48
    """Length limit of a reply."""
    batch_size: int = 16
    """Requests a batch."""
    seed: int = 0
    """Seed of noise and of the bootstrap."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Of `load_vlm`."""
    rater: str | None = None
    """Chat model that rates open answers (LLaVA-Bench): `chat:MODEL` or `openai:MODEL@URL`."""
    set_conditions: Mapping[str, tuple[Condition, ...]] = field(default_factory=dict)
    """Conditions of single sets, by their name, instead of `conditions`."""
    tuned: Mapping[str, str] = field(default_factory=dict)
    """Defences whose settings a search chose, and what the tables say of it."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is at least 1")
        names = [loaded.name for loaded in self.sets]
        if not names or len(set(names)) < len(names):
            raise InputError(f"sets are {names}; name at least one, each once")
        if len(set(self.conditions)) < len(self.conditions):
            raise InputError(f"conditions are {', '.join(self.conditions)}; name each once")
        for part in self.parts():
            self._check_anchors(part)
        if not self.judges:
            raise InputError("name at least one judge")
        for name in self.judges:
            judge_maker(name)
        if self.rater is not None:
            check_rater(self.rater)
        for loaded in self.sets:
            refuse_unratable(loaded)
            if self.anchors is not None:
                refuse_leaks(self.anchors.all, loaded.samples)

    def _check_anchors(self, part: Defense) -> None:
        if self.anchors is None or not part.fits_on_images or self.takes_shift(part):
            return
        if isinstance(part, CmrmDataset) and part.needs_benign:
            anchors, benign = part.anchors_of(self.anchors)
            check_anchors(anchors, benign or ())
        blind = [sample.id for sample in self.anchors.shifted if sample.image is None]
        if blind:
            raise InputError(
                f"{len(blind)} anchors have no image, which {part.name!r} is fitted on (the "
                f"first: {blind[0]!r})"
            )

    @property
    def all_defenses(self) -> tuple[str, ...]:
        """`none` first."""
        return ("none", *(name for name in self.defenses if name != "none"))

    @cached_property
    def effective_settings(self) -> dict[str, Any]:
        """Settings as the run uses them: with those of the artifact, as JSON values."""
        settings = self.settings
        if self.shift is not None:
            settings = shift_settings(self.all_defenses, settings, self.shift)
        return {name: plain(values) for name, values in settings.items()}

    def defense(self, name: str) -> Defense:
        """One of the defences, not fitted."""
        return make_defense(name, self.effective_settings)

    def parts(self) -> list[Defense]:
        """The parts of all defences, each name once, not fitted."""
        parts = (part for name in self.all_defenses for part in self.defense(name).parts)
        return list({part.name: part for part in parts}.values())

    def origins(self) -> dict[str, str]:
        """Where each defence's settings are from, in words."""
        return {
            name: " + ".join(dict.fromkeys(self._origin(part) for part in name.split("+")))
            for name in self.all_defenses
            if name != "none"
        }

    def _origin(self, part: str) -> str:
        if part in self.tuned:
            return self.tuned[part]
        if part in self.settings:
            return "given"
        if self.takes_shift(make_defense(part)):
            return "the artifact's"
        return "source's default" if part == base_name(part) else "named variant"

    def takes_shift(self, part: Defense) -> bool:
        """Whether the part uses the vectors of the plan instead of being fitted."""
        return self.shift is not None and isinstance(part, CmrmDataset)

    def conditions_of(self, loaded: Loaded) -> tuple[Condition, ...]:
        """Of the untouched model on one set."""
        return self.set_conditions.get(loaded.name, self.conditions)

    def cells(self) -> list[tuple[str, Loaded, Condition]]:
        """(defence, set, condition) of every cell that can be asked; see `possible`."""
        return [
            (defense, loaded, condition)
            for defense in self.all_defenses
            for loaded in self.sets
            for condition in (
                self.conditions_of(loaded) if defense == "none" else (Condition.ORIGINAL,)
            )
            if possible(loaded, condition)
        ]

    def replies(self) -> int:
        """Number of replies of all cells."""
        return sum(len(loaded.samples) for _, loaded, _ in self.cells())


def plain(value: Any) -> Any:
    """Settings as JSON values: tuples become lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def expanded_defenses(names: str, variants: Sequence[str] = ()) -> tuple[str, ...]:
    """A comma list of defences and stacks; `all` is every known one, and `variants`."""
    known = (*defense_names(), *variants)
    listed = [name.strip() for name in names.split(",") if name.strip()]
    return tuple(
        dict.fromkeys(each for name in listed for each in (known if name == "all" else [name]))
    )


def possible(loaded: Loaded, condition: Condition) -> bool:
    """Whether every sample of a set can be put under a condition."""
    if condition.has_image:
        return all(sample.image is not None for sample in loaded.samples)
    return condition is not Condition.CAPTION or all(sample.caption for sample in loaded.samples)
