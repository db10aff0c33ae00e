"""Inference-time defences behind one protocol, by name.

A third party's defence is found by the entry point group `cmrm.defenses` (a name, and a `Defense` class), or registered:

    @register
    class Mine(Defense):
        name = "mine"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from cmrm.defenses.base import Defense, FitData, Meter, Reply, Stack, respond
from cmrm.defenses.manipulation import CmrmDataset, CmrmSample
from cmrm.defenses.prompting import AdaShieldStatic, CaptionSubstitution, Ecso
from cmrm.defenses.representation import NullSpace, RefusalDirection, ShiftDC
from cmrm.errors import InputError

__all__ = [
    "Defense", "FitData", "Meter", "Reply", "Stack", "base_name", "defense_names", "make_defense", "register", "respond",
    "variant_settings",
]  # fmt: skip

Kind = TypeVar("Kind", bound=type[Defense])


class NoDefense(Defense):
    """The untouched model."""

    name = "none"
    source = "-"


_KNOWN: dict[str, type[Defense]] = {}


def register(kind: Kind) -> Kind:
    """Make a defence known under its `name`; usable as a decorator.

    Raises:
        InputError: it has no name, or one that cannot be told apart from a stack or from another defence.
    """
    if not re.fullmatch(r"[^+,@/\s]+", kind.name):
        raise InputError(f"{kind.__name__} needs a name without '+', ',', '@', '/' and spaces; it has {kind.name!r}")
    if _KNOWN.get(kind.name, kind) is not kind:
        raise InputError(f"two defences are called {kind.name!r}: {_KNOWN[kind.name].__name__} and {kind.__name__}")
    _KNOWN[kind.name] = kind
    return kind


for _kind in (
    NoDefense, CaptionSubstitution, AdaShieldStatic, Ecso, CmrmDataset, CmrmSample, ShiftDC, NullSpace, RefusalDirection,
):  # fmt: skip
    register(_kind)


def _all_kinds() -> dict[str, type[Defense]]:
    found = dict(_KNOWN)
    for point in entry_points(group="cmrm.defenses"):
        if point.name in found:
            continue
        try:
            kind = point.load()
        except Exception as error:  # whatever a stranger's module raises while it is imported; named, and the run stops
            raise InputError(
                f"the installed defence {point.name!r} ({point.value}) cannot be loaded: {error}"
            ) from error
        if not (isinstance(kind, type) and issubclass(kind, Defense)):
            raise InputError(f"the installed defence {point.name!r} ({point.value}) is no cmrm.defenses.Defense class")
        found[point.name] = kind
    return found


def defense_names() -> dict[str, str]:
    """Known defences: name -> source."""
    return {name: kind.source for name, kind in _all_kinds().items()}


def make_defense(name: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Defense:
    """A defence by name, or a stack of several (`adashield_s+cmrm_dataset`); `settings` by the names of its parts.

    `cmrm_dataset@paper` is a variant: the same defence with settings of its own, so that several can stand in one table. They are those
    that the class names (`Defense.variants`), and what `settings` holds under the variant's whole name.

    Raises:
        InputError: a name is unknown or stands twice, or a setting cannot be used.
    """
    kinds, parts = _all_kinds(), name.split("+")
    unknown = [part for part in parts if base_name(part) not in kinds]
    if unknown:
        raise InputError(
            f"unknown defence {', '.join(map(repr, unknown))}; one of {', '.join(kinds)}, or several with '+'"
        )
    if len({base_name(part) for part in parts}) < len(parts):
        raise InputError(f"{name!r} names a defence twice")
    made = []
    for part in parts:
        kind, held = kinds[base_name(part)], (settings or {}).get(part)
        if held is not None and not isinstance(held, Mapping):
            raise InputError(f"the settings of {part!r} are {held!r}; expected a mapping, such as {{'alpha': 0.5}}")
        given = {**_variant(kind, part, known=held is not None), **(held or {})}
        try:
            made.append(kind(**given))
        except (TypeError, ValueError) as error:
            raise InputError(f"the defence {part!r} does not take these settings {given}: {error}") from None
        made[-1].name = part
    return made[0] if len(made) == 1 else Stack(made)


def base_name(part: str) -> str:
    """`cmrm_dataset` of `cmrm_dataset@paper`."""
    return part.partition("@")[0]


def variant_settings(part: str) -> Mapping[str, Any]:
    """The settings that a known defence's class names under the variant of `part`; none without one, or for a variant of the user's."""
    return _all_kinds()[base_name(part)].variants.get(part.partition("@")[2], {})


def _variant(kind: type[Defense], part: str, *, known: bool) -> Mapping[str, Any]:
    base, at, variant = part.partition("@")
    if not at:
        return {}
    if not re.fullmatch(r"[\w.-]+", variant):
        raise InputError(f"{part!r} names no variant; write {base}@NAME with letters, digits, '.', '_' or '-'")
    if not known and variant not in kind.variants:
        raise InputError(
            f"{part!r} has no settings: give them under that name (--settings)"
            + (f", or take {', '.join(f'{base}@{v}' for v in kind.variants)}" if kind.variants else "")
        )
    return kind.variants.get(variant, {})
