"""`cmrm generate`: one reply, steered or not, as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmrm.cli import options as c


def generate(
    model: c.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The request.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given several times.")] = None,
    shift: Annotated[str | None, typer.Option(help="Shift artifact (file, folder or hub id): dataset level.")] = None,
    sample_level: Annotated[
        bool, typer.Option("--sample-level", help="Sample level: two extra passes over this very prompt.")
    ] = False,
    alpha: c.AlphaOption = None,
    schedule: c.ScheduleOption = None,
    positions: c.PositionsOption = None,
    layers: c.LayersOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the reply.")] = 256,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Answer one prompt (greedy) and stream the reply. Without an image nothing is steered."""
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.errors import InputError
    from cmrm.prompts.sample import Sample, open_images
    from cmrm.steering.hooks import Steering

    if not prompt.strip() and not image:
        raise InputError("the prompt is empty, and there is no image either")
    if shift is not None and sample_level:
        raise InputError("--shift is the dataset level, --sample-level the other one; choose one")
    if shift is None and not sample_level and any(v is not None for v in (alpha, schedule, positions, layers)):
        raise InputError("--alpha, --schedule, --positions and --layers go with --shift or --sample-level")
    sample = Sample("prompt", prompt, tuple(image) if image else None)
    if image:
        open_images(sample)
    vectors = ShiftVectors.from_pretrained(shift) if shift is not None else None
    base = Steering.from_recommended(vectors.recommended) if vectors is not None else Steering()
    setting = c.changed(base, alpha=alpha, schedule=schedule, positions=positions, layers=layers)
    vlm = c.open_model(
        model, revision=revision, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )

    from cmrm.engines.transformers import Generation, SampleLevel, stream

    level = SampleLevel() if sample_level else vectors
    used = level if image else None
    said: Generation | None = None
    for piece in stream(vlm, sample, shift=used, steering=setting, max_new_tokens=max_new_tokens):
        if isinstance(piece, Generation):
            said = piece
        elif not as_json:
            typer.echo(piece, nl=False)
    assert said is not None
    if as_json:
        from dataclasses import asdict

        c.print_json(
            {"reply": said.text, "tokens": said.tokens, "images": len(image or []),
             "steering": asdict(setting) if used is not None else None,
             "level": None if used is None else "sample" if sample_level else "dataset"}
        )  # fmt: skip
    else:
        typer.echo()
