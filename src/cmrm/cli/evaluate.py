"""`cmrm evaluate`, `cmrm rescore` and `cmrm defenses`: the grid of sets, defences and judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c

if TYPE_CHECKING:
    from cmrm.defenses import FitData
    from cmrm.evaluate.preflight import Finding
    from cmrm.evaluate.run import Plan


BATCH, DEMO_BATCH = 16, 48
"""Prompts a batch: of any model, and of the demo VLM, which `cmrm demo` runs so too."""


def evaluate(
    model: c.ModelArgument,
    sets: Annotated[str, typer.Option(help="Comma list: demo, a named set (`cmrm sets`, NAME-VARIANT), or a file.")],
    defenses: Annotated[
        str,
        typer.Option(
            help="Comma list of `cmrm defenses`, all, variants (cmrm_dataset@paper), or stacks: adashield_s+cmrm_dataset."
        ),
    ] = "none",
    judges: Annotated[
        str,
        typer.Option(help="Comma list: keyword, regression, ensemble, guard:KIND=MODEL, chat:MODEL, openai:MODEL@URL."),
    ] = "keyword,ensemble",
    rater: Annotated[
        str | None,
        typer.Option(
            help="chat:MODEL or openai:MODEL@URL that rates open answers (llava-bench-coco) beside the reference."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for logs, replies, results and report.")] = Path("grid"),
    conditions: Annotated[
        str, typer.Option(help="Conditions of the untouched model; defences are run under original.")
    ] = "original,query",
    path: Annotated[
        list[str] | None,
        typer.Option("--path", help="NAME=DIR: where a named set lies; once for each. Otherwise below CMRM_DATA."),
    ] = None,
    anchors: Annotated[
        Path | None, typer.Option(help="File of harmful requests with images, to fit defences on (demo: its own).")
    ] = None,
    benign_anchors: Annotated[Path | None, typer.Option(help="File of benign requests, likewise.")] = None,
    settings: Annotated[
        Path | None, typer.Option(help='JSON: {"cmrm_dataset": {"alpha": 0.3, "layers": [15, 16]}, ...}.')
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Draw so many samples of every set (demo: of each kind), by hashed id.")
    ] = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial", help="Accept named sets whose counts are not the published ones; noted in every output."
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a reply.")] = 48,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts a batch, 16 when left out (demo: 48); halved by itself when memory runs out."),
    ] = None,
    seed: c.SeedOption = 0,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be run, and stop.")
    ] = False,
    as_json: c.JsonOption = False,
) -> None:
    """Unsafe rate, over-refusal and utility of a model under several defences, by several judges, on several sets.

    Runs on Inspect (`inspect view --log-dir OUT/logs/DEFENCE` opens the logs). Killed at any moment, the same command goes on.
    """
    from cmrm.cli.options import quiet
    from cmrm.errors import InputError

    c.need_inspect()
    quiet(offline=model == c.DEMO)
    from cmrm.prompts.conditions import FIVE, Condition
    from cmrm.evaluate.run import Plan, expanded_defenses
    from cmrm.evaluate.run import evaluate as run
    from cmrm.evaluate.sets import load_named

    wrong = [n for n in conditions.split(",") if n not in FIVE]
    if wrong:
        raise InputError(f"unknown condition {', '.join(wrong)}; one of {', '.join(FIVE)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    places = parsed_places(path or [])
    options: dict[str, Any] = {"dtype": c.checked_dtype(dtype), "device_map": device_map}
    if model != c.DEMO:
        options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    if batch_size is None:
        batch_size = DEMO_BATCH if model == c.DEMO else BATCH
    chosen = expanded_defenses(defenses)
    if not chosen:
        raise InputError("--defenses names none; `none` is the untouched model")
    given = _settings(settings, chosen, demo=model == c.DEMO)
    plan = Plan(
        model=model,
        sets=tuple(
            load_named(name.strip(), places, limit=limit, seed=seed, partial=partial)
            for name in sets.split(",")
            if name.strip()
        ),
        defenses=chosen,
        judges=tuple(dict.fromkeys(n.strip() for n in judges.split(",") if n.strip())),
        conditions=tuple(Condition(n) for n in conditions.split(",")),
        anchors=_anchors(anchors, benign_anchors, batch_size, demo=model == c.DEMO),
        settings=given,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        model_options=options,
        rater=rater,
    )
    cells = plan.cells()
    total = sum(len(loaded.samples) for _, loaded, _ in cells)
    if dry_run:
        print_preflight(plan, [], out, as_json)
        return
    with c.progress(total) as (say, tick):
        found = run(plan, out, say=say, tick=tick)
    finish(found, out, as_json)


def finish(found: dict[str, Any], out: Path, as_json: bool) -> None:
    """Write the report, print the tables, and raise where a sample was not answered."""
    from cmrm.errors import InputError
    from cmrm.report.grid import write_grid_report

    page = write_grid_report(found, out)
    c.print_json(found) if as_json else _print(found)
    for judge, held in found["judge_failures"].items():
        typer.echo(
            f"{judge}: {held['n']} verdicts are missing, counted as unscored; the first: {held['first']}. The same command asks again",
            err=True,
        )
    if not as_json:
        typer.echo(f"results: {out / 'results.json'}   report: {page}")
    if found["failures"] or any(cell["missing"] for cell in found["cells"]):
        raise InputError(
            "not every sample was answered: "
            + "; ".join(found["failures"] or ["see `missing` in the results"])
            + ". Run the same command again to go on"
        )


def rescore(
    out: Annotated[Path, typer.Argument(help="Folder of `cmrm evaluate`.")],
    judges: Annotated[str, typer.Option(help="Comma list of judges; their verdicts are added to the logs.")] = "",
    rater: Annotated[str | None, typer.Option(help="chat:MODEL or openai:MODEL@URL that rates open answers.")] = None,
    as_json: c.JsonOption = False,
) -> None:
    """Judge the replies of a finished run anew, without generating anything."""
    from cmrm.files import write_json

    c.need_inspect()
    c.quiet()
    from cmrm.evaluate.rescore import rescore_logs
    from cmrm.evaluate.results import read_results, refreshed
    from cmrm.report.grid import write_grid_report

    read_results(out)
    missing = rescore_logs(out, [n.strip() for n in judges.split(",") if n.strip()], rater=rater)
    if missing.told():
        typer.echo(missing.told(), err=True)
    found = refreshed(out)
    write_json(out / "results.json", found)
    write_grid_report(found, out)
    if as_json:
        c.print_json(found)
        return
    if found.get("recipe"):
        print_targets(found["recipe"])
    _print(found)


def print_targets(held: dict[str, Any]) -> None:
    """A recipe's published figures beside the run's."""
    from cmrm.report.grid import target_rows

    if held["targets"]:
        header, rows = target_rows(held["targets"])
        c.print_rows(
            f"published, and found here with 95 % intervals; unsafe and over-refusal by {held['judge']}", header, rows
        )


def defenses(as_json: c.JsonOption = False) -> None:
    """Defences that `cmrm evaluate --defenses` takes, and where each comes from."""
    from cmrm.defenses import defense_names

    known = defense_names()
    if as_json:
        c.print_json(known)
    else:
        c.print_rows("defences", ["name", "source"], [[name, source] for name, source in known.items()])


def parsed_places(given: list[str]) -> dict[str, Path]:
    """`NAME=DIR` pairs as a mapping.

    Raises:
        InputError: one is no such pair, or names no set.
    """
    from cmrm.errors import InputError
    from cmrm.prompts.catalogue import NAMED

    found = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or not name or not folder:
            raise InputError(f"--path {one!r} is no NAME=DIR")
        if not any(name == known or name.startswith(f"{known}-") for known in NAMED):
            raise InputError(f"--path {one!r}: there is no named set {name!r}; one of {', '.join(NAMED)}")
        found[name] = Path(folder)
    return found


def _anchors(harmful: Path | None, benign: Path | None, batch_size: int, *, demo: bool) -> FitData | None:
    from cmrm.defenses import FitData
    from cmrm.errors import InputError
    from cmrm.prompts.loading import load_samples

    if harmful is None and benign is None:
        if not demo:
            return None
        from cmrm.prompts.ours.samples import prompt_samples

        return FitData(prompt_samples("anchor", "harmful"), prompt_samples("anchor", "benign"), batch_size)
    if harmful is None:
        raise InputError("--benign-anchors go with --anchors")
    held = [load_samples(p).samples if p is not None else () for p in (harmful, benign)]
    return FitData(held[0], held[1], batch_size)


def _settings(path: Path | None, defenses: tuple[str, ...], *, demo: bool) -> dict[str, dict[str, Any]]:
    from dataclasses import asdict

    from cmrm.errors import InputError

    held: dict[str, dict[str, Any]] = {}
    if demo:
        from cmrm.demo.settings import DATASET_STEERING, SAMPLE_STEERING

        held = {"cmrm_dataset": asdict(DATASET_STEERING), "cmrm_sample": asdict(SAMPLE_STEERING)}
    if path is None:
        return held
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
        raise InputError(f"{path} is no mapping of defence to settings")
    from cmrm.defenses import base_name, defense_names

    unknown = sorted(name for name in given if base_name(name) not in defense_names())
    if unknown:
        raise InputError(f"{path} has settings for unknown defences: {', '.join(unknown)}")
    run = {part for name in defenses for part in name.split("+")}
    stray = [name for name in given if name not in run]
    if stray:
        raise InputError(f"{path} has settings for {', '.join(stray)}, which is not among --defenses")
    return held | given


def print_preflight(plan: Plan, findings: list[Finding], out: Path, as_json: bool) -> None:
    """What would be run, and whether everything is there; raises where something is not. `findings` come before our own."""
    from dataclasses import asdict

    from cmrm.errors import InputError
    from cmrm.evaluate.preflight import preflight

    cells = plan.cells()
    findings = [*findings, *preflight(plan, out)]
    if as_json:
        c.print_json(
            {
                "model": plan.model,
                "cells": [
                    [defense, loaded.name, condition.value, len(loaded.samples)] for defense, loaded, condition in cells
                ],
                "findings": [asdict(one) for one in findings],
            }
        )
    else:
        c.print_rows(
            plan.model, ["defence", "set", "condition", "samples"],
            [[defense, loaded.name, condition.value, str(len(loaded.samples))] for defense, loaded, condition in cells],
        )  # fmt: skip
        print_findings(findings)
    bad = [one.what for one in findings if one.good is False]
    if bad:
        raise InputError(f"not everything is there: {', '.join(bad)}; see the table")


def print_findings(findings: list[Finding], as_json: bool = False) -> None:
    """What was looked at, as a table or as JSON."""
    from dataclasses import asdict

    if as_json:
        c.print_json({"findings": [asdict(one) for one in findings]})
        return
    marks = {True: "yes", False: "NO", None: "?"}
    c.print_rows("Is everything there?", ["what", "", ""], [[one.what, marks[one.good], one.says] for one in findings])


def _print(found: dict[str, Any]) -> None:
    from cmrm.report.grid import outcome_table, short_rate, table

    header, rows = outcome_table(found, short_rate)
    if rows:
        c.print_rows(
            f"{found['model']['id']}, every set with its own images: per cent, 95 % Wilson intervals; +k: unscored",
            header,
            rows,
        )
    header, rows = table(found, short_rate)
    c.print_rows(f"{found['model']['id']}: per cent, 95 % Wilson intervals; +k: unscored by that judge", header, rows)
