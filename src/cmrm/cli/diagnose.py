"""`cmrm diagnose`: what an image costs a model on a set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen


def diagnose(
    model: c.ModelArgument,
    data: Annotated[
        str, typer.Option(help="Named set (`cmrm sets`), file, saved `datasets` folder, or hub id.")
    ],
    path: c.SetPathOption = None,
    columns: c.MapOption = None,
    images: c.ImagesOption = None,
    label: c.LabelOption = None,
    split: c.SplitOption = None,
    config: c.ConfigOption = None,
    variant: c.VariantOption = None,
    partial: c.PartialOption = False,
    on_error: c.OnErrorOption = "stop",
    limit: c.LimitOption = None,
    judges: Annotated[
        str, typer.Option(help="Comma list of judges; see docs/evaluate.md.")
    ] = "small,keyword",
    corruptions: Annotated[
        str | None,
        typer.Option(help="all, or a comma list such as black,blur: further corrupted images."),
    ] = None,
    shift: Annotated[
        str | None,
        typer.Option(
            help="Artifact (file, folder, hub id): the original image is also run steered."
        ),
    ] = None,
    alpha: c.AlphaOption = None,
    batch_size: c.BatchOption = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a reply.")] = 48,
    seed: c.SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="File for the results as JSON.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, figures and results; its replies are reused."),
    ] = None,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Unsafe rate by input condition, over-refusal, accuracy, and the shift of the residual stream.

    Rates carry 95 % Wilson intervals; unscored replies are in no rate. With --report, a run that is
    stopped continues with the same command.
    """
    c.need_extra("`cmrm diagnose`", "eval", (*c.RESULTS, "sklearn"))
    if report is not None:
        c.need_extra("`cmrm diagnose --report`", "eval", c.REPORT)
    from cmrm.errors import InputError
    from cmrm.files import write_json
    from cmrm.judges import make_judge
    from cmrm.measure.diagnose import corruptions_named, passes
    from cmrm.measure.diagnose import diagnose as run
    from cmrm.prompts import refuse_unratable

    chosen = corruptions_named(corruptions)
    names = c.parse_names(judges, "--judges")
    if alpha is not None and shift is None:
        raise InputError("--alpha goes with --shift; without an artifact nothing is steered")
    loaded = c.open_set(
        data, path=path, columns=columns, images=images, split=split, config=config,
        variant=variant, partial=partial, on_error=on_error, limit=limit, seed=seed, label=label,
    )  # fmt: skip
    refuse_unratable(loaded)
    made = {name: make_judge(name) for name in names}
    vectors, steering = None, None
    if shift is not None:
        from cmrm.cli.recommendation import print_nothing_recommended
        from cmrm.shift.artifact import ShiftVectors
        from cmrm.shift.resolve import settled

        vectors = ShiftVectors.from_pretrained(shift)
        steering = settled(vectors, c.changed(vectors.recommended, alpha=alpha))
        print_nothing_recommended(vectors, {"--shift": steering})
    vlm = c.open_model(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    from cmrm.engines.transformers import TransformersEngine
    from cmrm.measure.store import ReplyStore

    store = None if report is None else ReplyStore(report / "replies.db")
    with screen.progress(passes(loaded, chosen, steered=vectors is not None)) as (say, tick):
        results = run(
            TransformersEngine(vlm), loaded, judges=made, corruptions=chosen, shift=vectors,
            steering=steering, store=store, name=model if model == c.DEMO else None,
            batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed, say=say, tick=tick,
        )  # fmt: skip
    if out is not None:
        write_json(out, results)
    if report is not None:
        from cmrm.report.page import write_report

        write_json(report / "results.json", results)
        page = write_report(results, report)
        typer.echo(f"report: {page}", err=as_json)
    if as_json:
        screen.print_json(results)
    else:
        _print(results)
        screen.next_step(f"cmrm extract {model} --anchors harmful.csv --benign benign.csv -o FILE")


def _print(results: dict[str, Any]) -> None:
    from cmrm.report.headline import headline_cells, headline_table
    from cmrm.report.tables import short_rate

    layers = results["model"]["layers"]
    shown = sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1})
    numbers = ", ".join(map(str, shown))
    geometry = results["geometry"]
    columns, rows = headline_table(results, short_rate)
    for row, cell in zip(rows, headline_cells(results), strict=True):
        for figure in ("relative_distance_to_query", "cosine_to_query"):
            by_layer = (
                geometry[figure].get(cell["condition"]) if cell["defense"] == "none" else None
            )
            row.append(_at(by_layer, shown) if by_layer else "-")
    data = results["sets"][0]
    screen.print_rows(
        f"{results['model']['id']} on {data['name']}: {data['n']} samples, "
        f"{data['skipped']} left out; per cent, 95 % intervals, +k: unscored, and the bounds",
        [*columns, f"distance to query at layers {numbers}", "cosine to query"],
        rows,
    )
    screen.print_judges(results)
    for note in data["notes"]:
        typer.echo(f"{data['name']}: {note}")
    for name, reason in results["left_out"].items():
        typer.echo(f"{name}: not measured, {reason}")
    for judge, failure in results["judge_failures"].items():
        typer.echo(
            f"{judge} failed on {failure['n']} replies; the first: {failure['first']}", err=True
        )
    if geometry["corruptions"]:
        screen.print_rows(
            f"mean shift of each corruption compared with blank's, at layers {numbers}",
            ["corruption", "cosine", "ratio of norms"],
            [
                [name, _at(by_layer["cosine"], shown), _at(by_layer["norm_ratio"], shown)]
                for name, by_layer in geometry["corruptions"].items()
            ],
        )


def _at(by_layer: list[float], layers: list[int]) -> str:
    return " ".join(f"{by_layer[layer]:.2f}" for layer in layers)
