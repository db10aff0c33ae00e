"""`cmrm extract`: anchors to a shift artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cmrm.cli import options as c


def extract(
    model: c.ModelArgument,
    anchors: Annotated[str, typer.Option(help="Named set (`cmrm sets`), file, saved `datasets` folder, or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the artifact goes (.safetensors).")],
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
    corruption: Annotated[str, typer.Option(help="What stands for the image: blank, noise, black, ...")] = "blank",
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
    """Estimate the dataset-level shift (text-only minus corrupted-image state, per decoder layer) over anchor samples.

    A run that is killed goes on from `OUTPUT.partial`. Anchors need images, not captions. --alpha, --schedule, --positions and --layers are stored as the recommended use.
    """
    from cmrm.shift.artifact import Recommended
    from cmrm.shift.estimate import check_estimator, checked_corruption, estimate_shift
    from cmrm.steering.hooks import Steering

    check_estimator(estimator)
    checked_corruption(corruption)
    setting = c.changed(Steering(), alpha=alpha, schedule=schedule, positions=positions, layers=layers)
    loaded = c.open_set(
        anchors, path=path, columns=columns, images=images, split=split, config=config, variant=variant,
        partial=partial, on_error=on_error, limit=limit, seed=seed,
    )  # fmt: skip
    vlm = c.open_model(
        model, revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    setting.chosen_layers(vlm.n_layers)
    with c.progress(2 * len(loaded.samples)) as (say, tick):
        say("states of anchors")
        shift = estimate_shift(
            vlm, loaded.samples, estimator=estimator, corruption=corruption, seed=seed, batch_size=batch_size,  # type: ignore[arg-type]
            recommended=Recommended(**asdict(setting)), checkpoint=output.with_name(f"{output.name}.partial"), on_batch=tick,
        )  # fmt: skip
    written = shift.save(output)
    if as_json:
        c.print_json({"artifact": str(written), "data": loaded.to_json(), "provenance": asdict(shift.provenance)})
    else:
        typer.echo(f"{written}: {shift.provenance.n_anchors} anchors, {vlm.n_layers} layers; `cmrm inspect` shows it")
