"""`cmrm reproduce`: a published table as one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli.evaluate import finish, parsed_places, print_findings, print_preflight, print_targets


def reproduce(
    recipe: Annotated[
        str, typer.Argument(help="A recipe: YAML file, or the name of one in recipes/ (paper_llava15_7b).")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Instead of the recipe's: a folder, a hub id, or `demo` (its stand-in data, no GPU)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for logs, replies, results and report; the recipe's name.")
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option("--path", help="NAME=DIR: where a named set lies; once for each. Otherwise below CMRM_DATA."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Draw so many samples of every set, and so many of its anchors.")
    ] = None,
    judges: Annotated[
        str | None, typer.Option(help="Comma list instead of the recipe's; the first is compared.")
    ] = None,
    rater: Annotated[
        str | None, typer.Option(help="Judge of open answers instead of the recipe's; `none` for none.")
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Accept sets whose counts are not the published ones; noted in every output."),
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a batch instead of the recipe's.")] = None,
    revision: c.RevisionOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16, instead of the recipe's.")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or another device map; auto where there is an accelerator when left out."),
    ] = None,
    trust_remote_code: c.TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check data, models, memory, disk and time, and stop.")
    ] = False,
    as_json: c.JsonOption = False,
) -> None:
    """Run a published table on a model, and print the published figures beside the run's.

    Killed at any moment, the same command goes on. `--model demo` tries a recipe on the demo VLM and stand-in data.
    """
    from dataclasses import replace

    from cmrm.errors import InputError

    c.need_inspect()
    demo = model == c.DEMO
    c.quiet(offline=demo)
    from cmrm.evaluate.preflight import Finding
    from cmrm.reproduce.recipes import plan_of, read_recipe, recipe_path, told
    from cmrm.evaluate.run import evaluate
    from cmrm.files import write_json

    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    if model == "" or out == Path(""):
        raise InputError("--model and --out take a name; leave the option out for the recipe's own")
    file = recipe_path(recipe)
    published = chosen = read_recipe(file, demo=demo)
    if judges is not None:
        names = tuple(dict.fromkeys(n.strip() for n in judges.split(",") if n.strip()))
        chosen = replace(chosen, judges=names)
    if rater is not None:
        chosen = replace(chosen, rater=None if rater == "none" else rater)
    if batch_size is not None:
        chosen = replace(chosen, batch_size=batch_size)
    if dtype is not None:
        chosen = replace(chosen, dtype=c.checked_dtype(dtype))
    import torch

    if device_map is None and not demo and torch.accelerator.is_available():
        device_map = "auto"
    options: dict[str, Any] = {"device_map": device_map}
    if not demo:
        options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    findings: list[Finding] = []
    plan, troubles = plan_of(
        chosen, places=parsed_places(path or []), limit=limit, partial=partial, model=model, model_options=options,
        loaded=lambda one: findings.append(
            Finding(f"set {one.name}", True, "; ".join([f"{len(one.samples)} samples", *one.notes]))
        ),
    )  # fmt: skip
    findings += [Finding(f"set {one.set}", False, one.reason) for one in troubles]
    if (model or chosen.model) is None:
        findings.append(Finding("model", False, f"the recipe names none: {' '.join(chosen.notes)} Pass --model FOLDER"))
    target = out or Path(file.stem if model is None else f"{file.stem}-{Path(model).name}")
    if dry_run:
        if plan is not None:
            print_preflight(plan, findings, target, as_json)
            return
        from cmrm.evaluate.preflight import model_findings

        judging = (*chosen.judges, *([chosen.rater] if chosen.rater else []))
        if (model or chosen.model) is not None:
            findings += model_findings(str(model or chosen.model), judging, device_map)[1]
        print_findings(findings, as_json)
    if troubles or plan is None:
        bad = [one for one in findings if one.good is False]
        raise InputError(
            f"{len(bad)} of the recipe's parts are not there; the first: {bad[0].what}: {bad[0].says} "
            "(--dry-run shows all of them)"
            if bad
            else f"{file} asks nothing: every set is of anchors alone"
        )
    if not as_json:
        typer.echo(f"{chosen.title} ({chosen.source})")
        for note in chosen.notes:
            typer.echo(f"- {note}")
    with c.progress(sum(len(loaded.samples) for _, loaded, _ in plan.cells())) as (say, tick):
        found = evaluate(plan, target, say=say, tick=tick)
    found["recipe"] = told(published, found)
    write_json(target / "results.json", found)
    if not as_json:
        print_targets(found["recipe"])
    finish(found, target, as_json)
