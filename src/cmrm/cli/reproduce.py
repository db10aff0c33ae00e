"""`cmrm reproduce`: a published table as one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen
from cmrm.cli.runs import (
    PlacesOption,
    demo_variants,
    demo_weights,
    finish,
    parsed_places,
    print_findings,
    print_preflight,
)

if TYPE_CHECKING:
    from cmrm.evaluate.weights import Finding
    from cmrm.reproduce.schema import Recipe


def reproduce(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped recipe (paper_llava15_7b).")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of the recipe's: a folder, a hub id, or `demo` (stand-in data, no GPU)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for logs, replies, results, report; default: the recipe's name."),
    ] = None,
    path: PlacesOption = None,
    limit: Annotated[
        int | None, typer.Option(help="Draw so many samples of every set, and so many anchors.")
    ] = None,
    judges: Annotated[
        str | None, typer.Option(help="Comma list instead of the recipe's; the first is compared.")
    ] = None,
    rater: Annotated[
        str | None, typer.Option(help="Judge of open answers instead of the recipe's, or `none`.")
    ] = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Accept sets whose counts are not the published ones; noted in every output.",
        ),
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts a batch instead of the recipe's.")
    ] = None,
    revision: c.RevisionOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16 or float16, instead of the recipe's."),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or another device map; default: an accelerator if any."),
    ] = None,
    trust_remote_code: c.TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check data, models, memory, disk and time, and stop.")
    ] = False,
    as_json: c.JsonOption = False,
) -> None:
    """Run a published table on a model, and print the published figures beside the run's.

    A run that was killed continues with the same command. `--model demo` tries a recipe on the
    demo VLM and stand-in data.
    """
    c.need_inspect()
    demo = model == c.DEMO
    c.quiet(offline=demo)
    from cmrm.errors import InputError
    from cmrm.evaluate.run import evaluate
    from cmrm.evaluate.weights import Finding, model_findings
    from cmrm.files import write_json
    from cmrm.measure.schema import checked
    from cmrm.reproduce.comparison import published, with_comparison
    from cmrm.reproduce.plan import plan_of
    from cmrm.reproduce.schema import read_recipe, recipe_path

    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1")
    if model == "" or out == Path(""):
        raise InputError("--model and --out take a name; leave the option out for the recipe's own")
    file = recipe_path(recipe)
    whole = read_recipe(file)
    if demo:
        whole = whole.for_demo()
    chosen = _changed(whole, judges=judges, rater=rater, batch_size=batch_size, dtype=dtype)
    options: dict[str, Any] = {"device_map": device_map or _accelerator(demo)}
    if not demo:
        options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    source = model or chosen.model
    findings: list[Finding] = []
    plan, troubles = plan_of(
        chosen, places=parsed_places(path or []), limit=limit, partial=partial, model=model,
        model_options=options, variants=demo_variants(source or ""),
        on_set=lambda loaded: findings.append(
            Finding(
                f"set {loaded.name}", True,
                "; ".join([f"{len(loaded.samples)} samples", *loaded.notes]),
            )
        ),
    )  # fmt: skip
    findings += [Finding(f"set {trouble.set}", False, trouble.reason) for trouble in troubles]
    if source is None:
        reason = f"the recipe names none: {' '.join(chosen.notes)} Pass --model FOLDER"
        findings.append(Finding("model", False, reason))
    target = out or Path(file.stem if model is None else f"{file.stem}-{Path(model).name}")
    if dry_run and plan is not None:
        print_preflight(plan, findings, target, as_json)
        return
    if dry_run:
        if source is not None:
            judging = (*chosen.judges, *([chosen.rater] if chosen.rater else []))
            findings += model_findings(
                source, judging, options["device_map"], registered=demo_weights(source)
            )[1]
        print_findings(findings, as_json)
    if troubles or plan is None:
        raise InputError(_refusal(file, findings))
    if not as_json:
        typer.echo(f"{chosen.title} ({chosen.source})")
        for note in chosen.notes:
            typer.echo(f"- {note}")
    with screen.progress(plan.replies()) as (say, tick):
        results = evaluate(plan, target, say=say, tick=tick, recipe=published(whole))
    results = checked(with_comparison(results))
    write_json(target / "results.json", results)
    finish(results, target, as_json)


def _changed(
    recipe: Recipe,
    *,
    judges: str | None,
    rater: str | None,
    batch_size: int | None,
    dtype: str | None,
) -> Recipe:
    """The recipe with the options of the command."""
    changes: dict[str, Any] = {}
    if judges is not None:
        changes["judges"] = tuple(c.parse_names(judges, "--judges"))
    if rater is not None:
        changes["rater"] = None if rater == "none" else rater
    if batch_size is not None:
        changes["batch_size"] = batch_size
    if dtype is not None:
        changes["dtype"] = c.checked_dtype(dtype)
    return recipe.model_copy(update=changes)


def _accelerator(demo: bool) -> str | None:
    """`auto` where there is an accelerator; the demo runs on the CPU."""
    import torch

    return "auto" if not demo and torch.accelerator.is_available() else None


def _refusal(file: Path, findings: list[Finding]) -> str:
    """Why a recipe cannot be run."""
    missing = [finding for finding in findings if finding.good is False]
    if not missing:
        return f"{file} asks nothing: every set is of anchors alone"
    return (
        f"{len(missing)} of the recipe's parts are not there; the first: {missing[0].subject}: "
        f"{missing[0].text[:200]} (--dry-run shows all of them)"
    )
