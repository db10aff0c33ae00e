"""The measurement of a sweep: every point on its dev set, with the loop of all commands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from cmrm.defenses import FitData, make_defense
from cmrm.errors import CmrmError, InputError
from cmrm.measure.environment import machine_info, model_info, versions_info
from cmrm.prompts.conditions import Condition
from cmrm.prompts.splits import set_hash
from cmrm.sweep.schema import checked
from cmrm.sweep.setups import UNTOUCHED, Question, Setup
from cmrm.tune.fitting import Fitter
from cmrm.tune.measuring import Bench
from cmrm.tune.sets import Dev

Say = Callable[[str], None]


def sweep(
    question: Question,
    bench: Bench,
    dev: Dev,
    out: Path,
    *,
    name: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure every point; a point that cannot be measured says why.

    Replies are stored by batch in the store of `bench`, and what was fitted lies in `out/fitted`:
    the same call after a stop computes what is missing.

    Args:
        question: axes and points.
        bench: engine, judges, store.
        dev: dev set of the references; also that of the points where the images stay.
        out: folder of what is fitted.
        name: of the model, instead of its id or folder.
        say: receives what is being done.

    Returns:
        The document, in the form of `sweep.schema.Sweep`.

    Raises:
        InputError: no point could be measured, or a judge scores nothing.
    """
    start = monotonic()
    references = _references(question, bench, dev, say)
    fitters: dict[tuple[str, str], Fitter] = {}
    points = []
    for number, setup in enumerate(question.setups, 1):
        say(f"point {number} of {len(question.setups)}: {_place(setup)}")
        points.append(_point(setup, bench, fitters, out, say))
    steered = [point for point in points if point["series"] != UNTOUCHED]
    if all(point["rates"] is None for point in steered):
        raise InputError(f"no point could be measured; the first: {steered[0]['reason']}")
    fits = [setup.data for setup in question.setups if setup.data is not None]
    counts = {
        "harmful": len(dev.harmful), "benign": len(dev.benign), "questions": len(dev.questions),
        "harmful anchors": max((len(data.harmful) for data in fits), default=0),
        "benign anchors": max((len(data.benign) for data in fits), default=0),
    }  # fmt: skip
    return checked({
        "model": model_info(bench.engine, name),
        "over": question.over, "x": question.axes.x, "y": question.axes.y,
        "defenses": list(dict.fromkeys(setup.series for setup in question.setups)),
        "judges": list(bench.judges), "samples": counts, "references": references,
        "points": points, "batch_size": bench.batch_size, "max_new_tokens": bench.max_new_tokens,
        "seed": bench.seed, "seconds": round(monotonic() - start, 3),
        "versions": versions_info(), "machine": machine_info(),
    })  # fmt: skip


def _place(setup: Setup) -> str:
    y = "" if setup.y is None else f", {setup.y}"
    return f"{setup.series} at {setup.x}{y}"


def _references(question: Question, bench: Bench, dev: Dev, say: Say) -> dict[str, Any]:
    """Rates of the untouched model, with images where the points do not hold them, and as text."""
    none = make_defense(UNTOUCHED)
    if question.several_sets:
        return {"image": None, "text": None}
    say("the untouched model as text")
    bare = Dev(dev.harmful, dev.benign)
    text = bench.rates(bench.cell(bare, none, Condition.QUERY))
    if question.untouched:
        return {"image": None, "text": text}
    say("the untouched model with images")
    image = bench.rates(bench.cell(dev, none))
    bench.check(image)
    return {"image": image, "text": text}


def _point(
    setup: Setup, bench: Bench, fitters: dict[tuple[str, str], Fitter], out: Path, say: Say
) -> dict[str, Any]:
    start = monotonic()
    row: dict[str, Any] = {
        "series": setup.series, "x": setup.x, "y": setup.y, "draw": setup.draw,
        "settings": dict(setup.settings), "rates": None, "reason": None,
    }  # fmt: skip
    try:
        dev = setup.measured_on()
        defense = setup.defense()
        row["settings"] = defense.settings
        defense.check(bench.engine)
        if setup.data is not None and defense.needs_fit:
            key = (setup.series, _digest(setup.data))
            if key not in fitters:
                fitters[key] = Fitter(
                    bench.engine, setup.data, out / "fitted" / key[1], defense, say
                )
            fitters[key].fit(defense)
        row["rates"] = bench.rates(bench.cell(dev, defense))
        if setup.series == UNTOUCHED:
            _check_untouched(bench, row["rates"])
    except JudgeError:
        raise
    except CmrmError as error:
        row["reason"] = str(error)
    return row | {"seconds": round(monotonic() - start, 3)}


class JudgeError(InputError):
    """The first judge scores nothing of the untouched model's replies."""


def _check_untouched(bench: Bench, rates: dict[str, Any]) -> None:
    """Raises `JudgeError` where nothing can be compared with the untouched model."""
    judge = next(iter(bench.judges))
    unsafe = rates["judges"][judge]["unsafe"]
    if unsafe is not None and unsafe["rate"] is None:
        raise JudgeError(
            f"the judge {judge!r} scores none of the untouched model's replies to harmful "
            "requests, so that nothing can be compared; name another one first (--judges)"
        )


def _digest(data: FitData) -> str:
    """Identity of what is fitted on, for the name of its folder."""
    sides = f"{set_hash(data.shifted)} {set_hash(data.benign)} {data.batch_size}"
    return hashlib.sha256(sides.encode()).hexdigest()[:16]
