"""`cmrm extract`: a shift artifact from anchors."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.prompts import Loaded
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.steering.setting import Steering

PARTS = {
    "anchors": "states of anchors",
    "benign": "states of benign anchors",
    "questions": "states of image questions",
    "sequential": "sequential vectors",
}
"""Parts of an extraction, as the progress bar calls them."""


def extract(
    model: c.ModelArgument,
    anchors: Annotated[
        str, typer.Option(help="Named set (`cmrm sets`), file, saved `datasets` folder, or hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact file (.safetensors).")],
    benign: Annotated[
        str | None,
        typer.Option(
            "--benign",
            "--benign-anchors",
            help="Benign look-alikes with images, of any kind of set (NAME-VARIANT below CMRM_DATA,"
            " or a file): adds refusal direction, harm gate, sequential vectors, recommendation.",
        ),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="The shift of harmful and benign anchors together (paper)."),
    ] = False,
    false_alarms: Annotated[
        float | None,
        typer.Option(help="Share of benign requests that the gate may open for; default 0.05."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Image questions, as --benign: the share that the gate would touch."),
    ] = None,
    path: c.SetPathOption = None,
    columns: c.MapOption = None,
    images: c.ImagesOption = None,
    split: c.SplitOption = None,
    config: c.ConfigOption = None,
    variant: c.VariantOption = None,
    partial: c.PartialOption = False,
    on_error: c.OnErrorOption = "stop",
    limit: c.LimitOption = None,
    estimator: Annotated[str, typer.Option(help="pca, mean or icv.")] = "pca",
    corruption: Annotated[
        str, typer.Option(help="Stands for the image: blank, noise, black, ...")
    ] = "blank",
    seed: c.SeedOption = 0,
    alpha: c.AlphaOption = None,
    schedule: c.ScheduleOption = None,
    positions: c.PositionsOption = None,
    layers: c.LayersOption = None,
    operator: c.OperatorOption = None,
    gate: c.GateOption = None,
    batch_size: c.BatchOption = 16,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Estimate the dataset-level shift over anchors, by layer: text-only minus corrupted image.

    Anchors need images, not captions. --alpha, --schedule, --positions, --layers, --operator and
    --gate are stored as the recommended setting. Without them it follows from the anchors where
    benign ones are given, and is a cautious one else; --gate alone adds the gate to it. --map,
    --images, --on-error, --partial and --limit are for all three sets, the other options of sets
    for --anchors. A run that is killed continues from `OUTPUT.partial` and files beside it.
    """
    from cmrm.shift.checkpoint import remove_checkpoint
    from cmrm.shift.estimate import (
        check_anchors,
        check_estimator,
        checked_corruption,
        estimate_shift,
    )
    from cmrm.shift.harm_gate import FALSE_ALARMS, check_false_alarms
    from cmrm.steering.setting import Steering

    check_estimator(estimator)
    checked_corruption(corruption)
    wanted = FALSE_ALARMS if false_alarms is None else false_alarms
    check_false_alarms(wanted)
    setting = _named_setting(alpha, schedule, positions, layers, operator, gate)
    if benign is None:
        _refuse_without_benign(
            mixed=mixed, false_alarms=false_alarms, questions=questions, gate=gate, setting=setting
        )
    check_output(output)
    of_files = _for_files(anchors, benign, questions, columns, images)
    loaded = c.open_set(
        anchors, path=path, columns=of_files[0], images=of_files[1], split=split, config=config,
        variant=variant, partial=partial, on_error=on_error, limit=limit, seed=seed,
    )  # fmt: skip
    more: dict[str, Loaded] = {
        name: _open_more(
            source, columns=columns, images=images, partial=partial, on_error=on_error, limit=limit,
            seed=seed, places={} if path is None else {anchors: path},
        )
        for name, source in (("benign", benign), ("questions", questions))
        if source is not None
    }  # fmt: skip
    if benign is not None:
        check_anchors(loaded.samples, more["benign"].samples)
        _check_labels(loaded, more["benign"])
    _check_questions(more.get("questions"))
    vlm = c.open_model(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    (setting or Steering()).chosen_layers(vlm.n_layers)
    checkpoint = output.with_name(f"{output.name}.partial")
    with screen.progress_in_parts() as (begin, tick):
        shift = estimate_shift(
            vlm,
            loaded.samples,
            more["benign"].samples if benign is not None else None,
            estimator=estimator,  # type: ignore[arg-type]
            corruption=corruption,
            seed=seed,
            batch_size=batch_size,
            recommended=setting,
            mixed=mixed,
            false_alarms=wanted,
            questions=more["questions"].samples if questions is not None else (),
            checkpoint=checkpoint,
            on_batch=tick,
            on_part=lambda part, prompts: begin(PARTS[part], prompts),
        )
    if gate and setting is None:
        shift = replace(shift, recommended=shift.recommended.changed({"gate": True}))
    written = shift.save(output)
    remove_checkpoint(checkpoint)
    if as_json:
        screen.print_json(
            {
                "artifact": str(written),
                "data": loaded.to_json(),
                **{name: part.to_json() for name, part in more.items()},
                "provenance": asdict(shift.provenance),
                "recommended": shift.recommended.to_json(),
                "records": dict(shift.records),
            }
        )
    else:
        _print(written, shift, named=setting is not None or bool(gate))


def _named_setting(
    alpha: float | None,
    schedule: str | None,
    positions: str | None,
    layers: str | None,
    operator: str | None,
    gate: bool | None,
) -> Steering | None:
    """The setting that the options name; None where they name none, or the gate alone."""
    from cmrm.steering.setting import Steering

    setting = c.changed(
        Steering(), alpha=alpha, schedule=schedule, positions=positions, layers=layers,
        operator=operator, gate=gate,
    )  # fmt: skip
    others = (alpha, schedule, positions, layers, operator)
    return None if all(option is None for option in others) else setting


def _refuse_without_benign(
    *,
    mixed: bool,
    false_alarms: float | None,
    questions: str | None,
    gate: bool | None,
    setting: Steering | None,
) -> None:
    """Refuse options that take benign anchors, where there are none.

    Raises:
        InputError: there is such an option.
    """
    from cmrm.errors import InputError

    needing = {
        "--mixed": mixed,
        "--false-alarms": false_alarms is not None,
        "--questions": questions is not None,
        "--gate": bool(gate),
        "--operator fill": setting is not None and setting.operator == "fill",
    }
    options = [option for option, there in needing.items() if there]
    if options:
        verb = "needs" if len(options) == 1 else "need"
        raise InputError(
            f"{' and '.join(options)} {verb} benign anchors beside the harmful ones; name them "
            "with --benign SET"
        )


def _for_files(
    anchors: str,
    benign: str | None,
    questions: str | None,
    columns: str | None,
    images: Path | None,
) -> tuple[str | None, Path | None]:
    """--map and --images as they go with --anchors: not with a named set that stands beside a
    file, for which they are meant."""
    from cmrm.prompts.named_sets import is_named

    files = [
        source for source in (benign, questions) if source is not None and not is_named(source)
    ]
    return (None, None) if is_named(anchors) and files else (columns, images)


def _open_more(source: str, *, places: dict[str, Path], columns: str | None, **options: Any) -> Any:
    """The set that `--benign` or `--questions` names; a named set of the anchors' kind is looked
    for in the same folder."""
    from cmrm.prompts import load_named
    from cmrm.prompts.columns import parse_columns

    loaded = load_named(source, places, columns=parse_columns(columns), **options)
    screen.print_notes(loaded)
    return loaded


def _check_labels(harmful: Loaded, benign: Loaded) -> None:
    """Refuse anchors whose label says the other kind.

    Raises:
        InputError: there are such anchors.
    """
    from cmrm.errors import InputError

    for loaded, option, other in (
        (harmful, "--anchors", "benign"),
        (benign, "--benign", "harmful"),
    ):
        wrong = [sample.id for sample in loaded.samples if sample.label == other]
        if wrong:
            raise InputError(
                f"{len(wrong)} of {len(loaded.samples)} samples of {option} {loaded.name} are "
                f"labelled {other} (the first: {wrong[0]!r}); keep harmful and benign anchors in "
                "sets of their own"
            )


def _check_questions(loaded: Loaded | None) -> None:
    """Refuse image questions without an image.

    Raises:
        InputError: there are such questions.
    """
    from cmrm.errors import InputError

    blind = [sample.id for sample in loaded.samples if sample.image is None] if loaded else []
    if loaded is not None and blind:
        raise InputError(
            f"{len(blind)} of {len(loaded.samples)} questions of {loaded.name} have no image (the "
            f"first: {blind[0]!r}); --questions takes questions about images"
        )


def _print(written: Path, shift: ShiftVectors, *, named: bool) -> None:
    """What was written, and what it recommends."""
    from cmrm.cli.recommendation import sentences

    made = shift.provenance
    count = f"{made.n_anchors} anchors"
    if made.n_benign:
        count = f"{made.n_anchors} harmful and {made.n_benign} benign anchors"
    typer.echo(f"{written}: {count}, {made.n_layers} layers; `cmrm inspect` shows it")
    for line in sentences(shift, named=named):
        typer.echo(line)
    screen.next_step(
        f"cmrm evaluate MODEL --sets test.csv --defenses cmrm_dataset --shift {written}",
        f"cmrm serve MODEL --shift {written}",
    )


def check_output(output: Path) -> None:
    """Check that an artifact can be written, before anything is computed.

    Raises:
        ArtifactError: the name is a folder's, or its folder cannot be made.
    """
    from cmrm.errors import ArtifactError

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot write {output}: {error}; name another file") from None
    if output.is_dir():
        raise ArtifactError(f"cannot write {output}: it is a folder; name a file")
