"""`cmrm generate`: one reply, steered or not, piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen


def generate(
    model: c.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The request.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file; repeat it for several.")
    ] = None,
    shift: Annotated[
        str | None, typer.Option(help="Shift artifact (file, folder or hub id), as it recommends.")
    ] = None,
    sample_level: Annotated[
        bool,
        typer.Option("--sample-level", help="Sample level: two extra passes over this prompt."),
    ] = False,
    alpha: c.AlphaOption = None,
    schedule: c.ScheduleOption = None,
    positions: c.PositionsOption = None,
    layers: c.LayersOption = None,
    operator: c.OperatorOption = None,
    gate: c.GateOption = None,
    false_alarms: Annotated[
        float | None,
        typer.Option(help="The gate at another share of false alarms on its curve, such as 0.1."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the reply.")] = 256,
    revision: c.RevisionOption = None,
    dtype: c.DtypeOption = "auto",
    device_map: c.DeviceOption = None,
    trust_remote_code: c.TrustOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Answer one prompt (greedy) and print the reply as it is generated.

    Without an image nothing is steered. Options change the setting that the artifact recommends;
    where they make another kind of it (--operator, --schedule sequential), the others have their
    defaults.
    """
    from cmrm.cli.recommendation import print_nothing_recommended
    from cmrm.errors import InputError
    from cmrm.prompts.sample import Sample, open_images
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.shift.resolve import settled
    from cmrm.steering.setting import Steering

    if not prompt.strip() and not image:
        raise InputError("the prompt is empty, and there is no image either")
    if shift is not None and sample_level:
        raise InputError("--shift is the dataset level, --sample-level the other one; choose one")
    named: dict[str, Any] = {
        "alpha": alpha, "schedule": schedule, "positions": positions, "layers": layers,
        "operator": operator, "gate": gate,
    }  # fmt: skip
    _check_options(named, false_alarms, shift=shift is not None, sample_level=sample_level)
    sample = Sample("prompt", prompt, tuple(image) if image else None)
    if image:
        open_images(sample)
    vectors = ShiftVectors.from_pretrained(shift) if shift is not None else None
    setting = c.changed(vectors.recommended if vectors is not None else Steering(), **named)
    if vectors is not None:
        if false_alarms is not None:
            vectors = vectors.with_false_alarms(false_alarms)
        setting = settled(vectors, setting)
        if false_alarms is not None and not setting.gate:
            raise InputError(
                "--false-alarms moves the threshold of the gate, and the setting has none; add "
                "--gate, or leave it out"
            )
        print_nothing_recommended(vectors, {"--shift": setting})
    vlm = c.open_model(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )

    from cmrm.engines.generation import Generation, stream
    from cmrm.shift.estimate import SampleLevel

    level = SampleLevel() if sample_level else vectors
    used = level if image else None
    reply: Generation | None = None
    for piece in stream(vlm, sample, shift=used, steering=setting, max_new_tokens=max_new_tokens):
        if isinstance(piece, Generation):
            reply = piece
        elif not as_json:
            typer.echo(piece, nl=False)
    if not as_json:
        typer.echo()
    elif reply is not None:
        screen.print_json(
            {
                "reply": reply.text,
                "tokens": reply.tokens,
                "images": len(image or []),
                "steering": setting.to_json() if used is not None else None,
                "level": None if used is None else "sample" if sample_level else "dataset",
                "gate_open": reply.gate_open,
            }
        )


def _check_options(
    named: dict[str, Any], false_alarms: float | None, *, shift: bool, sample_level: bool
) -> None:
    """Refuse options of steering where nothing is steered, or by what has no gate.

    Raises:
        InputError: there is such an option.
    """
    from cmrm.errors import InputError

    if not shift and not sample_level and any(value is not None for value in named.values()):
        raise InputError(
            "--alpha, --schedule, --positions, --layers, --operator and --gate go with --shift or "
            "--sample-level"
        )
    of_artifacts = {
        "--gate": named["gate"],
        "--false-alarms": false_alarms is not None,
        "--operator fill": named["operator"] == "fill",
        "--schedule sequential": named["schedule"] == "sequential",
    }
    options = [option for option, there in of_artifacts.items() if there]
    if options and not shift:
        raise InputError(
            f"{' and '.join(options)} take what is fitted on anchors; name an artifact with --shift"
        )
