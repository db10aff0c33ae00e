"""`cmrm diagnose`: what an image costs a model on a set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmrm.cli import options as c


def diagnose(
    model: c.ModelArgument,
    data: Annotated[str, typer.Option(help="Named set (`cmrm sets`), file, saved `datasets` folder, or hub id.")],
    path: c.SetPathOption = None,
    columns: c.MapOption = None,
    images: c.ImagesOption = None,
    split: c.SplitOption = None,
    config: c.ConfigOption = None,
    variant: c.VariantOption = None,
    partial: c.PartialOption = False,
    on_error: c.OnErrorOption = "stop",
    limit: c.LimitOption = None,
    label: Annotated[
        str | None, typer.Option(help="What samples are that no column labels: harmful or benign.")
    ] = None,
    corruptions: Annotated[
        str | None,
        typer.Option(help="all, or a list: black,blur,... Each is run, and its shift compared with blank's."),
    ] = None,
    shift: Annotated[
        str | None, typer.Option(help="Run the original condition steered by this artifact (file, folder, hub id) too.")
    ] = None,
    alpha: c.AlphaOption = None,
    batch_size: c.BatchOption = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a reply.")] = 48,
    seed: c.SeedOption = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON into this file.")] = None,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Unsafe rate per input condition (harmful samples), over-refusal (benign ones), and the shift of the residual stream.

    Judge: refusal by its start (keyword lists). Rates carry 95 % Wilson intervals; unscored replies are counted apart.
    """
    from cmrm.measure.diagnose import corruptions_named, labelled, work
    from cmrm.measure.diagnose import diagnose as run
    from cmrm.files import write_json

    wanted = corruptions_named(corruptions)
    loaded = c.open_set(
        data, path=path, columns=columns, images=images, split=split, config=config, variant=variant, partial=partial,
        on_error=on_error, limit=limit, seed=seed,
    )  # fmt: skip
    labelled(loaded, label)
    vlm = c.open_model(
        model, revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    vectors, steering = None, None
    if shift is not None:
        from cmrm.shift.artifact import ShiftVectors
        from cmrm.steering.hooks import Steering

        vectors = ShiftVectors.from_pretrained(shift)
        vectors.check(vlm)
        base = Steering.from_recommended(vectors.recommended)
        steering = c.changed(base, alpha=alpha, schedule=None, positions=None, layers=None)
    elif alpha is not None:
        from cmrm.errors import InputError

        raise InputError("--alpha goes with --shift; without an artifact nothing is steered")
    with c.progress(work(loaded, wanted, steered=vectors is not None)) as (say, tick):
        found = run(
            vlm, loaded, corruptions=wanted, shift=vectors, steering=steering, batch_size=batch_size,
            max_new_tokens=max_new_tokens, seed=seed, label=label, say=say, tick=tick,
        )  # fmt: skip
    if out is not None:
        write_json(out, found)
    if as_json:
        c.print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from cmrm.report.page import rate_text

    layers = found["model"]["layers"]
    shown = sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1})
    distance, cosine = (found["representation"][k] for k in ("relative_distance_to_query", "cosine_to_query"))
    rows = []
    for name, cell in found["conditions"].items():
        far = " ".join(f"{distance[name][k]:.2f}" for k in shown) if name in distance else "-"
        near = " ".join(f"{cosine[name][k]:.2f}" for k in shown) if name in cosine else "-"
        rows.append([name, *(rate_text(cell[k]) if k in cell else "-" for k in ("unsafe", "over_refusal")), far, near])
    at = ", ".join(map(str, shown))
    data = found["data"]
    c.print_rows(
        f"{found['model']['id']} on {data['name']}: {data['n']} samples, {data['skipped']} left out",
        ["condition", "unsafe rate", "over-refusal", f"distance to query at layers {at}", "cosine to query"],
        rows,
    )
    for name, reason in found["left_out"].items():
        typer.echo(f"{name}: not measured, {reason}")
    if "corruptions" in found:
        c.print_rows(
            f"mean shift of each corruption against blank's, at layers {at}",
            ["corruption", "cosine", "ratio of norms"],
            [
                [
                    name,
                    " ".join(f"{v['cosine'][k]:.2f}" for k in shown),
                    " ".join(f"{v['norm_ratio'][k]:.2f}" for k in shown),
                ]
                for name, v in found["corruptions"].items()
            ],
        )
