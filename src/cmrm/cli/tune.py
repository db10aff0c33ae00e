"""`cmrm tune`: which setting of a defence, on this model, within a budget of time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.prompts.sample import Sample
    from cmrm.tune.sets import Sets

LIBRARIES = ("optuna", "sqlalchemy", "sklearn", *c.RESULTS)
"""Libraries that the command needs."""
UNITS = {"s": 1, "m": 60, "h": 3600}
BATCH, DEMO_BATCH = 16, 48
TOKENS, DEMO_TOKENS = 48, 24


def tune(
    model: c.ModelArgument,
    defense: Annotated[
        str, typer.Option(help="Defence, or a variant of one (`cmrm defenses`).")
    ] = "cmrm_gated",
    anchors: Annotated[
        str | None,
        typer.Option(help="Harmful anchors with images, to fit on: file or named set."),
    ] = None,
    benign_anchors: Annotated[
        str | None,
        typer.Option(
            "--benign-anchors", "--benign", help="Benign anchors, to fit on: file or named set."
        ),
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Comma list of sets that settings are compared on: harmful and benign samples, "
            "and questions with answers; never a test set."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Comma list of sets that are tested later: no overlap is accepted."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for the whole study: 90s, 20m, 2h.")] = "20m",
    out: Annotated[
        Path, typer.Option(help="Folder of the study; the same call continues it.")
    ] = Path("tuned"),
    max_over_refusal_gain: Annotated[
        float, typer.Option(help="Share of over-refusal that a setting may add.")
    ] = 0.05,
    max_accuracy_loss: Annotated[
        float, typer.Option(help="Share of accuracy that a setting may cost.")
    ] = 0.03,
    trials: Annotated[int | None, typer.Option(help="Most trials of the whole study.")] = None,
    judges: Annotated[
        str, typer.Option(help="Comma list; the first one's rates decide (docs/evaluate.md).")
    ] = "small,keyword",
    columns: c.MapOption = None,
    images: c.ImagesOption = None,
    on_error: c.OnErrorOption = "stop",
    partial: c.PartialOption = False,
    batch_size: Annotated[int | None, typer.Option(help="Prompts a batch; 48 on demo.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a reply; 24 on demo, 48 else.")
    ] = None,
    seed: c.SeedOption = 0,
    engine: c.EngineOption = "transformers",
    engine_options: c.EngineOptionsOption = None,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Find the setting with the least unsafe rate within limits on over-refusal and accuracy.

    The defence says what can be varied. Its default setting is measured first; the frontier, the
    chosen setting and the runner-up are printed with 95 % intervals and written to OUT/tune.json.
    `demo` brings its own anchors and dev set. A call that is stopped continues with the same
    command.
    """
    c.need_extra("`cmrm tune`", "tune", LIBRARIES)
    from cmrm.errors import InputError
    from cmrm.judges import make_judge
    from cmrm.tune.choose import Limits
    from cmrm.tune.run import Options, tunable

    demo = model == c.DEMO
    options = Options(
        defense, parsed_budget(budget), Limits(max_over_refusal_gain, max_accuracy_loss), trials
    )
    needs_fit = tunable(defense).needs_fit
    size = batch_size or (DEMO_BATCH if demo else BATCH)
    tokens = max_new_tokens or (DEMO_TOKENS if demo else TOKENS)
    if size < 1 or tokens < 1:
        raise InputError("--batch-size and --max-new-tokens are at least 1")
    made = {name: make_judge(name) for name in c.parse_names(judges, "--judges")}
    sets = study_sets(
        anchors, benign_anchors, dev, test, size, demo=demo, needs_fit=needs_fit, columns=columns,
        images=images,        on_error=on_error, partial=partial, seed=seed,
    )  # fmt: skip
    opened = c.open_engine(
        model, engine, engine_options, revision=revision, dtype=dtype, device_map=device_map,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from cmrm.measure.store import ReplyStore
    from cmrm.tune.measuring import Bench
    from cmrm.tune.remembering import Remembering
    from cmrm.tune.results import tuned, write_tuned
    from cmrm.tune.run import Tuner

    with screen.progress(None) as (say, tick):
        bench = Bench(
            Remembering(opened), made, ReplyStore(out / "replies.db"), size, tokens, seed, tick
        )
        search = Tuner(bench, sets, options, out, say).run()
        result = tuned(search, bench, sets, options, model if demo else None)
        write_tuned(result, search, out)
    if as_json:
        screen.print_json(result)
    else:
        _print(result, out)
    if result["chosen"] is None:
        raise InputError(result["reason"])


def parsed_budget(text: str, option: str = "--budget") -> float:
    """Seconds of `90s`, `20m` or `2h`.

    Raises:
        InputError: it is no such time, or none at all.
    """
    from cmrm.errors import InputError

    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", text.strip())
    seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise InputError(f"{option} is {text[:40]!r}; it is a time such as 90s, 20m or 2h")
    return seconds


def study_sets(
    anchors: str | None,
    benign_anchors: str | None,
    dev: str | None,
    test: str | None,
    batch_size: int,
    *,
    demo: bool,
    needs_fit: bool,
    columns: str | None,
    images: Path | None,
    **options: Any,
) -> Sets:
    """Anchors and dev set of the options, or the demo's own.

    Raises:
        InputError: a set is missing, cannot be used, or overlaps another.
    """
    from cmrm.defenses import FitData
    from cmrm.errors import InputError
    from cmrm.prompts import load_named
    from cmrm.prompts.columns import parse_columns
    from cmrm.tune.sets import Dev, Sets, demo_sets

    if demo and anchors is None and benign_anchors is None and dev is None:
        if test is not None or columns is not None or images is not None:
            raise InputError("--test, --map and --images go with --anchors and --dev")
        return demo_sets(batch_size)
    if dev is None or (anchors is None and needs_fit):
        raise InputError(
            "--anchors and --dev name what the defence is fitted on and what settings are compared "
            "on; name both (`demo` alone brings its own)"
        )

    def read(names: str, option: str) -> list[list[Sample]]:
        loaded = [
            load_named(
                name, {}, limit=None, columns=parse_columns(columns), images=images, **options
            )
            for name in c.parse_names(names, option)
        ]
        for part in loaded:
            screen.print_notes(part)
        return [list(part.samples) for part in loaded]

    harmful, benign, compared = (
        [sample for part in read(names, option) for sample in part] if names is not None else []
        for names, option in (
            (anchors, "--anchors"), (benign_anchors, "--benign-anchors"), (dev, "--dev"),
        )
    )  # fmt: skip
    sets = Sets(FitData(harmful, benign, batch_size), Dev.of(compared))
    sets.check([] if test is None else read(test, "--test"))
    return sets


def _print(result: Mapping[str, Any], out: Path) -> None:
    """The frontier, the choice, the runner-up, and what the proxy was worth."""
    by_number = {row["number"]: row for row in result["trials"]}
    marks = {result["chosen"]: "chosen", result["runner_up"]: "runner-up",
             result["nearest"]: "nearest"}  # fmt: skip
    shown = list(result["frontier"])
    default = next(row["number"] for row in result["trials"] if row["origin"] == "default")
    for number in (result["chosen"], result["runner_up"], result["nearest"], default):
        if number is not None and number not in shown:
            shown.append(number)
    judge = result["judges"][0]
    rows = [["-", "untouched", *_rates(result["untouched"], judge), "-", ""]]
    for number in shown:
        row = by_number[number]
        named = [marks.get(number), "default" if number == default else None]
        mark = ", ".join(name for name in named if name) or "frontier"
        proxy = "-" if row["proxy"] is None else f"{row['proxy']['harmful']:.2f}"
        rows.append([
            str(number), mark, *_rates(row["rates"], judge), proxy,
            setting_text(row["settings"], by_number[default]["settings"]),
        ])  # fmt: skip
    states = [row["state"] for row in result["trials"]]
    screen.print_rows(
        f"{result['defense']} on {result['model']['id']}, dev set: {states.count('finished')} "
        f"settings measured, {states.count('pruned')} stopped on a quarter, "
        f"{states.count('failed')} failed; per cent by {judge}, 95 % Wilson intervals",
        ["trial", "", "unsafe", "over-refusal", "accuracy", "proxy", "setting"],
        rows,
    )
    if result["chosen"] is not None:
        typer.echo(f"chosen: trial {result['chosen']}, {result['reason']}")
        runner = result["runner_up"]
        typer.echo(
            f"runner-up: {'none within the limits' if runner is None else f'trial {runner}'}"
        )
    for figure, row in result["proxy"].items():
        typer.echo(f"rank correlation of the proxy with {figure}: {_correlation(row)}")
    typer.echo(
        f"{result['seconds']:.0f} s of {result['budget']:.0f} s; results: {out / 'tune.json'}"
    )
    for name in result["settings"]:
        shift = "" if result["artifact"] is None else f" --shift {out / result['artifact']}"
        typer.echo(
            f"on a test set: cmrm evaluate ... --defenses {name} --settings "
            f"{out / 'settings.json'}{shift}"
        )


def _rates(rates: Mapping[str, Any], judge: str) -> Sequence[str]:
    from cmrm.report.tables import short_rate

    figures = (rates["judges"][judge]["unsafe"], rates["judges"][judge]["over_refusal"],
               rates["accuracy"])  # fmt: skip
    return ["-" if figure is None else short_rate(figure) for figure in figures]


def setting_text(settings: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """What differs from the default setting, in words."""
    from cmrm.cli.recommendation import layers_in_words

    texts = []
    for name, value in settings.items():
        if value == default.get(name):
            continue
        if isinstance(value, list):
            texts.append(layers_in_words(value))
        else:
            texts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts)


def _correlation(row: Mapping[str, Any]) -> str:
    if row["rho"] is None:
        return f"none: {row['reason']}"
    return f"{row['rho']:.2f} (Spearman, {row['n']} settings, p {row['p_value']:.3g})"
