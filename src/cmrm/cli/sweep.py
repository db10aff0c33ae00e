"""`cmrm sweep`: one thing is varied, everything else stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen
from cmrm.cli.runs import demo_variants
from cmrm.cli.sweep_sets import check_asked, each_set, named_shifts
from cmrm.cli.tune import BATCH, DEMO_BATCH, DEMO_TOKENS, LIBRARIES, TOKENS, study_sets

if TYPE_CHECKING:
    from cmrm.defenses import FitData
    from cmrm.engines.base import Engine
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.sweep.setups import Question
    from cmrm.tune.sets import Dev

KINDS = ("layers", "anchors", "images", "corruptions", "sets", "shifts")
"""What can be varied beside a setting of the defences."""
CORRUPTIONS = ("blank", "noise", "mean", "blur", "shuffle")
"""Corrupted images of the default sweep over them."""


def sweep(
    model: c.ModelArgument,
    over: Annotated[
        str,
        typer.Option(
            help="What is varied: a number of the defences (alpha, threshold, ...), layers, "
            "anchors (their number), images (perturbed), corruptions, sets, shifts."
        ),
    ],
    defenses: Annotated[
        str, typer.Option(help="Comma list of defences, or of variants (`cmrm defenses`).")
    ] = "cmrm_dataset",
    values: Annotated[
        str | None,
        typer.Option(
            help="Comma list of points: numbers (alpha, anchors), first layers of parts (layers), "
            "jpeg:20 or jpeg (images), blank,noise (corruptions). Default: see docs/sweep.md."
        ),
    ] = None,
    anchors: Annotated[
        str | None,
        typer.Option(help="Comma list of sets of harmful anchors; with `sets` each stands alone."),
    ] = None,
    benign_anchors: Annotated[
        str | None,
        typer.Option("--benign-anchors", "--benign", help="Comma list of sets of benign anchors."),
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Comma list of sets that are asked: harmful, benign, questions; with `sets` each "
            "stands alone."
        ),
    ] = None,
    shifts: Annotated[
        str | None, typer.Option(help="Comma list of artifacts (over shifts).")
    ] = None,
    other_weights: Annotated[
        bool,
        typer.Option(
            "--other-weights",
            help="Accept artifacts of another checkpoint of the same architecture (over shifts).",
        ),
    ] = False,
    settings: c.SettingsOption = None,
    limit: Annotated[
        int | None, typer.Option(help="Dev samples of each kind, drawn by hashed id.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random draws of each number of anchors.")] = 3,
    judges: Annotated[
        str, typer.Option(help="Comma list; the first one's rates are drawn (docs/evaluate.md).")
    ] = "small,keyword",
    out: Annotated[Path, typer.Option(help="Folder for replies, results and report.")] = Path(
        "sweep"
    ),
    columns: c.MapOption = None,
    images: c.ImagesOption = None,
    on_error: c.OnErrorOption = "stop",
    partial: c.PartialOption = False,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a batch; 48 on demo.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a reply; 24 on demo, 48 else.")
    ] = None,
    seed: c.SeedOption = 0,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Measure defences while one thing is varied, on a dev set, and draw it.

    Writes OUT/sweep.json, OUT/sweep.html and the figures. A call that is stopped continues with the
    same command. `demo` brings its own anchors and dev set.
    """
    c.need_extra("`cmrm sweep`", "tune", (*LIBRARIES, *c.REPORT))
    demo = model == c.DEMO
    from cmrm.defenses import make_defense
    from cmrm.errors import InputError
    from cmrm.judges import make_judge

    names = c.parse_names(defenses, "--defenses")
    stacks = [name for name in names if "+" in name]
    if stacks:
        raise InputError(f"{stacks[0]!r} is a stack; sweep one defence at a time")
    known = demo_variants(model) | c.read_settings(settings, names)
    c.check_free(out / "sweep.json", {"over": over, "defenses": names})
    needs_fit = any(make_defense(name, known).needs_fit for name in names)
    points = None if values is None else c.parse_names(values, "--values")
    _check(over, points, shifts, other_weights, limit, draws)
    size = batch_size or (DEMO_BATCH if demo else BATCH)
    tokens = max_new_tokens or (DEMO_TOKENS if demo else TOKENS)
    if size < 1 or tokens < 1:
        raise InputError("--batch-size and --max-new-tokens are at least 1")
    made = {name: make_judge(name) for name in c.parse_names(judges, "--judges")}
    reading: dict[str, Any] = {
        "demo": demo, "columns": columns, "images": images, "on_error": on_error,
        "partial": partial, "seed": seed,
    }  # fmt: skip
    if over == "sets":
        by_name = each_set(anchors, benign_anchors, dev, size, limit, **reading)
    else:
        read = study_sets(
            anchors, benign_anchors, dev, None, size, needs_fit=needs_fit and over != "shifts",
            **reading,
        )  # fmt: skip
        by_name = {}
    vlm = c.open_model(
        model, revision=revision, dtype=dtype, device_map=device_map,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from cmrm.engines.transformers import TransformersEngine
    from cmrm.measure.store import ReplyStore
    from cmrm.report.sweep_page import write_sweep_report
    from cmrm.sweep.run import sweep as run
    from cmrm.sweep.setups import over_sets
    from cmrm.tune.measuring import Bench
    from cmrm.tune.remembering import Remembering

    engine = TransformersEngine(vlm)
    remembering = Remembering(engine)
    if over == "sets":
        fits = {name: sets.anchors for name, sets in by_name.items() if sets.anchors.harmful}
        devs = {name: sets.dev for name, sets in by_name.items() if sets.dev.samples}
        whole = next(iter(devs.values()))
        question = over_sets(names, known, fits, devs)
    else:
        whole = read.dev.drawn(limit)
        artifacts = named_shifts(shifts, engine, other_weights=other_weights)
        check_asked(artifacts, whole, checked=anchors is not None)
        question = _question(
            over, remembering, names, known, read.anchors, whole, points, artifacts, draws, seed
        )
    from cmrm.files import write_json

    with screen.progress(None) as (say, tick):
        bench = Bench(remembering, made, ReplyStore(out / "replies.db"), size, tokens, seed, tick)
        result = run(question, bench, whole, out, name=model if demo else None, say=say)
    write_json(out / "sweep.json", result)
    page = write_sweep_report(result, out)
    if as_json:
        screen.print_json(result)
        return
    _print(result, page, out)


def _check(
    over: str,
    points: Sequence[str] | None,
    shifts: str | None,
    other_weights: bool,
    limit: int | None,
    draws: int,
) -> None:
    """Refuse options that contradict each other, before anything is read.

    Raises:
        InputError: they do.
    """
    from cmrm.errors import InputError

    if (over == "shifts") != (shifts is not None):
        raise InputError("--shifts names the artifacts of --over shifts; name both")
    if other_weights and over != "shifts":
        raise InputError("--other-weights goes with --over shifts")
    if points is not None and over in ("sets", "shifts"):
        raise InputError(f"--values does not go with --over {over}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; it is at least 1")
    if draws < 1:
        raise InputError(f"--draws is {draws}; it is at least 1")


def _question(
    over: str,
    engine: Engine,
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    data: FitData,
    dev: Dev,
    points: Sequence[str] | None,
    shifts: Mapping[str, ShiftVectors],
    draws: int,
    seed: int,
) -> Question:
    """The sweep that the options ask for.

    Raises:
        InputError: a point is no number, or the defences cannot be varied so.
    """
    from cmrm.prompts.perturbed import all_perturbations, parsed_perturbations
    from cmrm.sweep import setups

    if over == "shifts":
        return setups.over_shifts(names, settings, shifts, dev)
    if over == "images":
        chosen = all_perturbations() if points is None else parsed_perturbations(points)
        return setups.over_images(names, settings, data, dev, chosen, seed=seed)
    if over == "corruptions":
        named = list(CORRUPTIONS) if points is None else list(points)
        return setups.over_corruptions(names, settings, data, dev, named, seed=seed)
    numbers = None if points is None else [_number(point) for point in points]
    if over in ("layers", "anchors"):
        whole = None if numbers is None else [_whole(number) for number in numbers]
        if over == "layers":
            return setups.over_layers(engine, names, settings, data, dev, whole)
        return setups.over_anchors(names, settings, data, dev, whole, draws=draws, seed=seed)
    return setups.over_setting(engine, over, names, settings, data, dev, numbers)


def _number(text: str) -> float:
    from math import isfinite

    from cmrm.errors import InputError

    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise InputError(f"--values has {text[:40]!r}, which is no number")
    return number


def _whole(number: float) -> int:
    from cmrm.errors import InputError

    if number != int(number):
        raise InputError(f"--values has {number:g}; whole numbers are expected here")
    return int(number)


def _print(result: Mapping[str, Any], page: Path, out: Path) -> None:
    """Every point, and where the figures are."""
    from cmrm.report.sweep_page import sweep_table, sweep_title
    from cmrm.report.tables import short_rate

    screen.print_rows(
        f"{sweep_title(result)}, {result['model']['id']}, dev set: per cent, 95 % Wilson intervals",
        *sweep_table(result, short_rate),
    )
    failed = [point for point in result["points"] if point["rates"] is None]
    if failed:
        typer.echo(f"{len(failed)} points could not be measured; see the table", err=True)
    typer.echo(f"results: {out / 'sweep.json'}   report: {page}")
    screen.next_step("cmrm tune (choose a setting within limits)")
