"""What `cmrm sweep` reads beside a study's sets: each set by its name, and artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.engines.transformers import TransformersEngine
    from cmrm.prompts.sample import Sample
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.tune.sets import Dev, Sets


def each_set(
    anchors: str | None,
    benign_anchors: str | None,
    dev: str | None,
    batch_size: int,
    limit: int | None,
    **reading: Any,
) -> dict[str, Sets]:
    """Every set of `--anchors` and `--dev` by its name; one that is named on both sides is split by
    content, half of it anchors.

    Raises:
        InputError: a side is missing, a set cannot be used, or two sets ask the same.
    """
    from cmrm.defenses import FitData
    from cmrm.errors import InputError
    from cmrm.measure.outcomes import kind_of
    from cmrm.prompts.splits import refuse_leaks, refuse_overlap, split_by_content
    from cmrm.sweep.setups import UNTOUCHED
    from cmrm.tune.sets import Dev, Sets, demo_sets

    if anchors is None or dev is None:
        raise InputError("--over sets needs --anchors and --dev, a comma list each")
    sides = [c.parse_names(anchors, "--anchors"), c.parse_names(dev, "--dev")]
    reading.pop("demo")
    benign = [] if benign_anchors is None else _samples(benign_anchors, "--benign-anchors", reading)
    empty = Dev((), ())
    sets: dict[str, Sets] = {}
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        key = name if name == c.DEMO else _stem(name)
        if key in sets or key == UNTOUCHED:
            raise InputError(f"another row is called {key!r} too; rename a file")
        if name == c.DEMO:
            both = demo_sets(batch_size)
            fit, asked = both.anchors, both.dev
        else:
            samples = _samples(name, "--anchors", reading)
            first, rest = (
                split_by_content(samples, 0.5, salt="sweep")
                if name in sides[0] and name in sides[1]
                else (samples, samples)
            )
            harmful = [sample for sample in first if kind_of(sample) in ("harmful", "other")]
            own = [sample for sample in first if sample.label == "benign"]
            if name in sides[0] and own and benign:
                raise InputError(
                    f"{key} has benign samples of its own; leave --benign-anchors out, so that "
                    "every row is fitted alike"
                )
            fit = FitData(harmful, own or benign, batch_size)
            asked = Dev.some(rest) if name in sides[1] else empty
            if name in sides[0]:
                refuse_overlap(fit.harmful, fit.benign)
        for side, count, what in (
            (0, len(fit.harmful), "harmful anchors"), (1, len(asked.samples), "dev samples"),
        ):  # fmt: skip
            if name in sides[side] and not count:
                raise InputError(
                    f"{key} leaves no {what}; give a larger set, or one of another kind"
                )
        sets[key] = Sets(
            fit if name in sides[0] else FitData((), (), batch_size),
            asked.drawn(limit) if name in sides[1] else empty,
        )
    for used, one in sets.items():
        for shown, other in sets.items():
            requests = other.dev.samples
            refuse_leaks(
                one.anchors.all, requests, sides=(f"anchors of {used}", f"dev samples of {shown}")
            )
    return sets


def _stem(name: str) -> str:
    from cmrm.prompts.named_sets import is_named

    return name if is_named(name) else Path(name).stem


def _samples(names: str, option: str, reading: Mapping[str, Any]) -> list[Sample]:
    from cmrm.prompts import load_named
    from cmrm.prompts.columns import parse_columns

    options = {**reading, "columns": parse_columns(reading["columns"])}
    samples: list[Sample] = []
    for name in c.parse_names(names, option):
        loaded = load_named(name, {}, limit=None, **options)
        screen.print_notes(loaded)
        samples += loaded.samples
    return samples


def named_shifts(
    names: str | None, engine: TransformersEngine, *, other_weights: bool
) -> dict[str, ShiftVectors]:
    """The artifacts by the stems of their names.

    Raises:
        InputError: two have one name. ArtifactError: one is damaged, or of another model.
    """
    from cmrm.errors import InputError
    from cmrm.shift.artifact import ShiftVectors

    shifts: dict[str, ShiftVectors] = {}
    for name in [] if names is None else c.parse_names(names, "--shifts"):
        shift = ShiftVectors.from_pretrained(name)
        shift.check(engine.vlm, other_weights=other_weights)
        key = Path(name).stem
        if key in shifts:
            raise InputError(f"two artifacts are called {key!r}; rename one")
        shifts[key] = shift
    return shifts


def check_asked(artifacts: Mapping[str, ShiftVectors], dev: Dev, *, checked: bool) -> None:
    """Refuse artifacts that were fitted on the dev set, as far as their hashes tell.

    Raises:
        InputError: one was.
    """
    from cmrm.errors import InputError
    from cmrm.prompts.ours import prompt_samples
    from cmrm.prompts.splits import set_hash

    asked = {set_hash(part): "the dev set" for part in (dev.harmful, dev.benign) if part}
    if any(sample.id.startswith("anchor-") for sample in dev.harmful):
        for label in ("harmful", "benign"):
            asked[set_hash(prompt_samples("anchor", label))] = "all of the demo's anchors"
    for name, shift in artifacts.items():
        for digest in (shift.provenance.anchor_hash, shift.provenance.benign_hash):
            if digest and digest in asked:
                raise InputError(
                    f"{name} was fitted on {asked[digest]}, of which samples are asked here; fit "
                    "it on other anchors"
                )
    if artifacts and not checked:
        typer.echo(
            "cmrm: whether the artifacts were fitted on samples of the dev set was not checked; "
            "name what they were fitted on (--anchors, --benign-anchors)",
            err=True,
        )
