"""`cmrm evaluate`: a table of sets, defences and judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen
from cmrm.cli.grid import grid_budget, grid_finding, grid_sets, tune_grid
from cmrm.cli.runs import PlacesOption, demo_variants, finish, parsed_places, print_preflight

if TYPE_CHECKING:
    from cmrm.defenses import FitData
    from cmrm.prompts import Loaded

BATCH, DEMO_BATCH = 16, 48
"""Prompts a batch: of any model, and of the demo VLM, as in `cmrm demo`."""


def evaluate(
    model: c.ModelArgument,
    sets: Annotated[
        str,
        typer.Option(help="Comma list: demo, a named set (`cmrm sets`, NAME-VARIANT), or a file."),
    ],
    path: PlacesOption = None,
    columns: Annotated[
        str | None,
        typer.Option("--map", help="Columns of the files: query=instruction,image=img,..."),
    ] = None,
    images: c.ImagesOption = None,
    label: c.LabelOption = None,
    on_error: c.OnErrorOption = "stop",
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Accept named sets whose counts are not as published."),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(help="Draw so many samples of every set (demo: of each kind), by hashed id."),
    ] = None,
    conditions: Annotated[
        str, typer.Option(help="Conditions of the untouched model; defences: original alone.")
    ] = "original,query",
    defenses: Annotated[
        str,
        typer.Option(
            help="Comma list of `cmrm defenses`, all, variants (cmrm_dataset@paper), or stacks: "
            "adashield_s+cmrm_dataset. The demo VLM brings cmrm_dataset@demo, cmrm_sample@demo, "
            "cmrm_gated@demo."
        ),
    ] = "none",
    settings: c.SettingsOption = None,
    shift: Annotated[
        str | None,
        typer.Option(
            help="Artifact of `cmrm extract` (file, folder, hub id) for cmrm_dataset, cmrm_fill, "
            "cmrm_gated and variants, used as it recommends unless --settings says otherwise."
        ),
    ] = None,
    anchors: Annotated[
        Path | None,
        typer.Option(help="File of harmful requests with images to fit on (demo: its own)."),
    ] = None,
    benign_anchors: Annotated[
        Path | None,
        typer.Option(
            "--benign-anchors",
            "--benign",
            help="File of benign requests to fit on (demo: its own); with images for cmrm_fill, "
            "cmrm_gated and other defences that compare images.",
        ),
    ] = None,
    judges: Annotated[
        str,
        typer.Option(
            help="Comma list: small, keyword, ensemble, guard:KIND=MODEL, judgezoo:NAME, "
            "chat:MODEL, openai:MODEL@URL."
        ),
    ] = "small,keyword",
    rater: Annotated[
        str | None,
        typer.Option(
            help="chat:MODEL or openai:MODEL@URL that rates open answers (llava-bench-coco) beside "
            "the reference."
        ),
    ] = None,
    tune_budget: Annotated[
        str | None,
        typer.Option(
            help="Tune every defence alike first, each with so many trials (12) or so much time "
            "(5m); a row NAME@tuned for each. Needs --dev (demo: its own)."
        ),
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Comma list of sets to tune on: harmful, benign, questions; no test set."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for logs, replies, results and report.")] = Path(
        "grid"
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a reply.")] = 48,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts a batch; default 16 (demo: 48); halved when memory runs out."),
    ] = None,
    seed: c.SeedOption = 0,
    engine: c.EngineOption = "transformers",
    engine_options: c.EngineOptionsOption = None,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list what would be run, and stop.")
    ] = False,
    as_json: c.JsonOption = False,
) -> None:
    """Unsafe rate, over-refusal and utility of a model: several defences, judges and sets.

    With --tune-budget every defence that has settings is tuned first, all by the same budget, and
    has a row with its source's settings and one with the tuned ones.

    Runs on Inspect (`inspect view --log-dir OUT/logs/DEFENCE` opens the logs). A run that was
    killed continues with the same command.
    """
    demo = model == c.DEMO
    c.need_inspect()
    budget = None if tune_budget is None else grid_budget(tune_budget)
    c.quiet(offline=demo)
    from cmrm.engines.opening import check_engine, engine_options_of
    from cmrm.errors import InputError
    from cmrm.prompts.columns import parse_columns
    from cmrm.prompts.conditions import FIVE, Condition

    wrong = [name for name in conditions.split(",") if name not in FIVE]
    if wrong:
        raise InputError(f"unknown condition {', '.join(wrong)}; one of {', '.join(FIVE)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    options: dict[str, Any] = {"dtype": c.checked_dtype(dtype), "device_map": device_map}
    if engine != "transformers":
        check_engine(engine)
        options |= {"engine": engine, "engine_options": engine_options_of(engine_options)}
    elif engine_options is not None:
        raise InputError("--engine-options go with --engine vllm or a server's address")
    if not demo:
        options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    if batch_size is None:
        batch_size = DEMO_BATCH if demo else BATCH
    file_options: dict[str, Any] = {
        "columns": parse_columns(columns), "images": images, "on_error": on_error,
    }  # fmt: skip
    set_names = c.parse_names(sets, "--sets")
    _check_files(set_names, anchors, columns, images)
    loaded = _sets(
        set_names, parsed_places(path or []), file_options, label=label,
        limit=limit, seed=seed, partial=partial,
    )  # fmt: skip
    from cmrm.cli.recommendation import print_nothing_recommended
    from cmrm.defenses.cmrm import CmrmDataset
    from cmrm.evaluate.plan import Plan, expanded_defenses
    from cmrm.evaluate.run import evaluate as run
    from cmrm.shift.artifact import ShiftVectors

    variants = demo_variants(model)
    names = expanded_defenses(defenses, tuple(variants))
    if not names:
        raise InputError("--defenses names none; `none` is the untouched model")
    own = c.read_settings(settings, names)
    parts = {part for name in names for part in name.split("+")}
    plan = Plan(
        model=model,
        sets=loaded,
        defenses=names,
        judges=tuple(c.parse_names(judges, "--judges")),
        conditions=tuple(Condition(name) for name in conditions.split(",")),
        anchors=_anchors(anchors, benign_anchors, batch_size, file_options, demo=demo),
        settings={name: variants[name] for name in variants if name in parts} | own,
        shift=None if shift is None else ShiftVectors.from_pretrained(shift),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        model_options=options,
        rater=rater,
        tuned=dict.fromkeys(variants.keys() - own.keys(), "chosen on the demo's anchors"),
    )
    if plan.shift is not None:
        used = {
            part.name: part.steering
            for part in plan.parts()
            if plan.takes_shift(part) and isinstance(part, CmrmDataset)
        }
        print_nothing_recommended(plan.shift, used)
    studied = None
    if budget is not None:
        studied = grid_sets(
            plan, anchors, benign_anchors, dev, demo=demo, columns=columns, images=images,
            on_error=on_error, partial=partial, seed=seed,
        )  # fmt: skip
    elif dev is not None:
        raise InputError("--dev is what --tune-budget tunes on; name both")
    if dry_run:
        findings = [] if studied is None else [grid_finding(plan, studied, tune_budget or "")]
        print_preflight(plan, findings, out, as_json)
        return
    if studied is not None and budget is not None:
        plan = tune_grid(plan, studied, budget, out, demo=demo)
    with screen.progress(plan.replies()) as (say, tick):
        results = run(plan, out, say=say, tick=tick)
    finish(results, out, as_json)


def _check_files(
    names: list[str], anchors: Path | None, columns: str | None, images: Path | None
) -> None:
    """Refuse options for files where there is no file."""
    from cmrm.errors import InputError
    from cmrm.prompts.named_sets import is_named

    if (
        (columns is not None or images is not None)
        and anchors is None
        and all(map(is_named, names))
    ):
        raise InputError("--map and --images go with files; named sets bring their own columns")


def _sets(
    names: list[str],
    places: dict[str, Path],
    file_options: dict[str, Any],
    *,
    label: str | None,
    limit: int | None,
    seed: int,
    partial: bool,
) -> tuple[Loaded, ...]:
    """The sets that `--sets` names.

    Raises:
        InputError: a set cannot be used, no rate can come from it, or an option for files goes
            with named sets alone.
    """
    from cmrm.errors import InputError
    from cmrm.measure.outcomes import kind_of
    from cmrm.prompts import load_named, refuse_unratable
    from cmrm.prompts.named_sets import is_named

    if label is not None and all(map(is_named, names)):
        raise InputError("--label goes with files; named sets bring their own labels")
    sets = []
    for name in names:
        loaded = load_named(
            name, places, limit=limit, seed=seed, partial=partial, label=label, **file_options
        )
        screen.print_notes(loaded)
        refuse_unratable(loaded)
        others = sum(kind_of(sample) == "other" for sample in loaded.samples)
        if others:
            typer.echo(
                f"{loaded.name}: {others} of {len(loaded.samples)} samples have neither a label "
                "harmful or benign nor an answer; they are in no rate",
                err=True,
            )
        sets.append(loaded)
    return tuple(sets)


def _anchors(
    harmful: Path | None,
    benign: Path | None,
    batch_size: int,
    file_options: dict[str, Any],
    *,
    demo: bool,
) -> FitData | None:
    """Anchors of the two files, or the demo's own."""
    from cmrm.defenses import FitData
    from cmrm.errors import InputError
    from cmrm.prompts import load_samples

    if harmful is None and benign is None:
        if not demo:
            return None
        from cmrm.prompts.ours import prompt_samples

        return FitData(
            prompt_samples("anchor", "harmful"), prompt_samples("anchor", "benign"), batch_size
        )
    if harmful is None:
        raise InputError("--benign-anchors go with --anchors")
    side, other = (
        load_samples(path, **file_options).samples if path is not None else ()
        for path in (harmful, benign)
    )
    return FitData(side, other, batch_size)
