"""`cmrm extract`: a shift artifact from anchors."""

from __future__ import annotations

from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Annotated

import typer

from cmrm.cli import options as c


def extract(
    model: c.ModelArgument,
    anchors: Annotated[
        str, typer.Option(help="Named set (`cmrm sets`), file, saved `datasets` folder, or hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact file (.safetensors).")],
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
    batch_size: c.BatchOption = 16,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Estimate the dataset-level shift over anchors, by layer: text-only minus corrupted image.

    Anchors need images, not captions. --alpha, --schedule, --positions and --layers are stored as
    the recommended setting. A run that is killed continues from `OUTPUT.partial`.
    """
    from cmrm.shift.estimate import check_estimator, checked_corruption, estimate_shift
    from cmrm.steering.setting import Steering

    check_estimator(estimator)
    checked_corruption(corruption)
    setting = c.changed(
        Steering(), alpha=alpha, schedule=schedule, positions=positions, layers=layers
    )
    check_output(output)
    loaded = c.open_set(
        anchors, path=path, columns=columns, images=images, split=split, config=config,
        variant=variant, partial=partial, on_error=on_error, limit=limit, seed=seed,
    )  # fmt: skip
    vlm = c.open_model(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    setting.chosen_layers(vlm.n_layers)
    checkpoint = output.with_name(f"{output.name}.partial")
    with c.progress(2 * len(loaded.samples)) as (say, tick):
        say("states of anchors")
        shift = estimate_shift(
            vlm,
            loaded.samples,
            estimator=estimator,  # type: ignore[arg-type]
            corruption=corruption,
            seed=seed,
            batch_size=batch_size,
            recommended=setting,
            checkpoint=checkpoint,
            on_batch=tick,
        )
    written = shift.save(output)
    remove_checkpoint(checkpoint)
    if as_json:
        content = {"data": loaded.to_json(), "provenance": asdict(shift.provenance)}
        c.print_json({"artifact": str(written), **content})
    else:
        size = f"{shift.provenance.n_anchors} anchors, {vlm.n_layers} layers"
        typer.echo(f"{written}: {size}; `cmrm inspect` shows it")


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


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove the checkpoints of a finished extraction; each process of several has its own."""
    parts = checkpoint.parent.glob(f"{escape(checkpoint.name)}.*")
    for file in (checkpoint, *(part for part in parts if part.suffix[1:].isdecimal())):
        file.unlink(missing_ok=True)
