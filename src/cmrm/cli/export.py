"""`cmrm export`: a setting as a checkpoint, or as a control vector, for engines without hooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c

if TYPE_CHECKING:
    import torch

    from cmrm.model.vlm import VLM
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.steering.setting import Steering

app = typer.Typer(help="A setting for engines without hooks.", no_args_is_help=True)

ShiftOption = Annotated[
    str, typer.Option(help="Artifact of `cmrm extract` (file, folder, hub id).")
]


@app.command()
def fold(
    model: c.ModelArgument,
    shift: ShiftOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the folded checkpoint.")],
    alpha: c.AlphaOption = None,
    schedule: c.ScheduleOption = None,
    positions: c.PositionsOption = None,
    layers: c.LayersOption = None,
    operator: c.OperatorOption = None,
    gate: c.GateOption = None,
    revision: c.RevisionOption = None,
) -> None:
    """Fold a constant addition into a copy of the checkpoint, for any engine.

    For Llama-type backbones. The copy steers text-only requests and every position too, so that
    the setting has to say so: --positions all.
    """
    vlm, vectors, setting, additions = _additions(
        model, shift, revision, alpha=alpha, schedule=schedule, positions=positions,
        layers=layers, operator=operator, gate=gate,
    )  # fmt: skip
    from cmrm.engines.fold import fold as run

    folder = _folder(vlm)
    run(folder, additions, out, record=_record(vlm, vectors, setting, model))
    typer.echo(
        f"folded checkpoint: {out}\nIt steers every request, text-only ones too, and every "
        "position. Measure it before you deploy it: cmrm evaluate "
        f"{out} --sets ..."
    )


@app.command()
def gguf(
    model: c.ModelArgument,
    shift: ShiftOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .gguf file.")],
    alpha: c.AlphaOption = None,
    schedule: c.ScheduleOption = None,
    positions: c.PositionsOption = None,
    layers: c.LayersOption = None,
    operator: c.OperatorOption = None,
    gate: c.GateOption = None,
    revision: c.RevisionOption = None,
) -> None:
    """Write a control vector for llama.cpp (`--control-vector FILE`).

    llama.cpp adds it at every position of every request, and cannot steer decoder layer 0.
    """
    c.need_extra("`cmrm export gguf`", "gguf", ("gguf",))
    vlm, vectors, setting, additions = _additions(
        model, shift, revision, alpha=alpha, schedule=schedule, positions=positions,
        layers=layers, operator=operator, gate=gate,
    )  # fmt: skip
    from cmrm.engines.gguf import write_control_vector

    architecture = str(vlm.model.config.get_text_config().model_type)
    dropped = write_control_vector(
        out, additions, architecture, record=_record(vlm, vectors, setting, model)
    )
    typer.echo(
        f"control vector: {out}\nllama.cpp has no control vector at decoder layer 0: "
        f"{100 * dropped:.1f} % of the sum of the layers' norms is left out. It steers every "
        "request, text-only ones too, and every position."
    )


def _additions(
    model: str, shift: str, revision: str | None, **named: Any
) -> tuple[VLM, ShiftVectors, Steering, torch.Tensor]:
    """The model, its artifact, the setting, and what it adds to each layer.

    Raises:
        InputError: the setting is no constant addition. ArtifactError: it is another model's.
    """
    from cmrm.engines.fold import constant_additions
    from cmrm.shift.artifact import ShiftVectors
    from cmrm.shift.resolve import settled

    vectors = ShiftVectors.from_pretrained(shift)
    setting = settled(vectors, c.changed(vectors.recommended, **named))
    additions = constant_additions(vectors, setting)
    vlm = c.open_model(
        model, revision=revision, dtype="auto", device_map=None, trust_remote_code=False
    )
    vectors.check(vlm)
    return vlm, vectors, setting, additions


def _folder(vlm: VLM) -> Path:
    """Folder of the checkpoint that the model was loaded from.

    Raises:
        ModelError: it cannot be found.
    """
    from cmrm.errors import ModelError

    place = str(vlm.model.name_or_path)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, revision=vlm.revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelError(f"the files of {place} are not in the cache: {error}") from None


def _record(
    vlm: VLM, vectors: ShiftVectors, setting: Steering, model: str
) -> dict[str, str | float | int | None]:
    """What was exported, for cards and headers."""
    from cmrm import __version__
    from cmrm.model.identity import public_name
    from cmrm.steering.setting import layer_ranges

    made = vectors.provenance
    layers = range(vlm.n_layers) if setting.layers is None else setting.layers
    return {
        "model": model if model == c.DEMO else public_name(vlm.model_id),
        "revision": vlm.revision, "alpha": setting.alpha, "schedule": setting.schedule,
        "layers": layer_ranges(tuple(layers)), "estimator": made.estimator,
        "corruption": made.corruption, "anchors": made.n_anchors,
        "anchor_hash": made.anchor_hash[:12], "cmrm": __version__,
    }  # fmt: skip
