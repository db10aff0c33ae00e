"""Inference-time defences behind one protocol, by name.

A third party's defence is found by the entry point group `cmrm.defenses` (a name, and a `Defense`
class), or registered:

    @register
    class Mine(Defense):
        name = "mine"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from cmrm.defenses.adashield import AdaShieldStatic
from cmrm.defenses.alphasteer import AlphaSteer
from cmrm.defenses.astra import Astra
from cmrm.defenses.base import Defense, FitData, NoDefense, Stack, respond
from cmrm.defenses.caption import CaptionSubstitution
from cmrm.defenses.cast import Cast
from cmrm.defenses.cmrm import CmrmDataset, CmrmFill, CmrmGated, CmrmSample
from cmrm.defenses.coca import CoCA
from cmrm.defenses.ecso import Ecso
from cmrm.defenses.jrs_rem import JrsRem
from cmrm.defenses.null_space import NullSpace
from cmrm.defenses.refusal_direction import RefusalDirection
from cmrm.defenses.safety_prompt import SafetyPrompt
from cmrm.defenses.served import Served
from cmrm.defenses.shiftdc import ShiftDC
from cmrm.errors import InputError

__all__ = [
    "Defense",
    "FitData",
    "Stack",
    "base_name",
    "defense_names",
    "make_defense",
    "register",
    "respond",
    "variant_settings",
]

Kind = TypeVar("Kind", bound=type[Defense])

_KNOWN: dict[str, type[Defense]] = {}


def register(kind: Kind) -> Kind:
    """Make a defence known under its `name`; usable as a decorator.

    Raises:
        InputError: it has no name, or a name that cannot be told apart from a stack or from another
            defence.
    """
    if not re.fullmatch(r"[^+,@/\s]+", kind.name):
        raise InputError(
            f"{kind.__name__} needs a name without '+', ',', '@', '/' and spaces; it has "
            f"{kind.name!r}"
        )
    if _KNOWN.get(kind.name, kind) is not kind:
        other = _KNOWN[kind.name].__name__
        raise InputError(f"two defences are called {kind.name!r}: {other} and {kind.__name__}")
    _KNOWN[kind.name] = kind
    return kind


for _kind in (
    NoDefense,
    CaptionSubstitution,
    SafetyPrompt,
    AdaShieldStatic,
    Ecso,
    CoCA,
    CmrmDataset,
    CmrmSample,
    CmrmFill,
    CmrmGated,
    ShiftDC,
    NullSpace,
    RefusalDirection,
    Astra,
    JrsRem,
    AlphaSteer,
    Cast,
    Served,
):
    register(_kind)


def _all_kinds() -> dict[str, type[Defense]]:
    kinds = dict(_KNOWN)
    for point in entry_points(group="cmrm.defenses"):
        if point.name in kinds:
            continue
        place = f"the installed defence {point.name!r} ({point.value})"
        try:
            kind = point.load()
        except (
            Exception
        ) as error:  # whatever a stranger's module raises while it is imported; it is named
            raise InputError(f"{place} cannot be loaded: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Defense)):
            raise InputError(f"{place} is no cmrm.defenses.Defense class")
        kinds[point.name] = kind
    return kinds


def defense_names() -> dict[str, str]:
    """Known defences that can be made on a model in this process: name -> source."""
    return {name: kind.source for name, kind in _all_kinds().items() if kind.local}


def make_defense(name: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Defense:
    """A defence by name, or a stack of several (`adashield_s+cmrm_dataset`).

    `cmrm_dataset@paper` is a variant: the same defence with settings of its own, so that several
    can stand in one table. They are those that the class names (`Defense.variants`), and what
    `settings` has under the variant's whole name.

    Args:
        name: see above.
        settings: settings by the names of the parts.

    Raises:
        InputError: a name is unknown or stands twice, or a setting cannot be used.
    """
    kinds, parts = _all_kinds(), name.split("+")
    unknown = [part for part in parts if base_name(part) not in kinds]
    if unknown:
        shown = ", ".join(map(repr, unknown))
        raise InputError(f"unknown defence {shown}; one of {', '.join(kinds)}, or several with '+'")
    if len({base_name(part) for part in parts}) < len(parts):
        raise InputError(f"{name!r} names a defence twice")
    defenses = []
    for part in parts:
        kind, own = kinds[base_name(part)], (settings or {}).get(part)
        if own is not None and not isinstance(own, Mapping):
            raise InputError(
                f"the settings of {part!r} are {own!r}; expected a mapping, such as "
                f"{{'alpha': 0.5}}"
            )
        values = {**_variant(kind, part, known=own is not None), **(own or {})}
        try:
            defense = kind(**values)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the defence {part!r} does not take these settings {values}: {error}"
            ) from None
        defense.name = part
        defenses.append(defense)
    return defenses[0] if len(defenses) == 1 else Stack(defenses)


def base_name(part: str) -> str:
    """`cmrm_dataset` of `cmrm_dataset@paper`."""
    return part.partition("@")[0]


def variant_settings(part: str) -> Mapping[str, Any]:
    """The settings that a known defence's class names under the variant of `part`; empty without
    such a variant."""
    return _all_kinds()[base_name(part)].variants.get(part.partition("@")[2], {})


def _variant(kind: type[Defense], part: str, *, known: bool) -> Mapping[str, Any]:
    base, at, variant = part.partition("@")
    if not at:
        return {}
    if not re.fullmatch(r"[\w.-]+", variant):
        raise InputError(
            f"{part!r} names no variant; write {base}@NAME with letters, digits, '.', '_' or '-'"
        )
    if not known and variant not in kind.variants:
        others = ", ".join(f"{base}@{v}" for v in kind.variants)
        raise InputError(
            f"{part!r} has no settings: pass them under that name (--settings)"
            + (f", or use {others}" if others else "")
        )
    return kind.variants.get(variant, {})
