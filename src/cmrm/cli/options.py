"""Shared by the commands: options, models, sets, progress bars, tables and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import screen

if TYPE_CHECKING:
    from cmrm.engines.base import Engine
    from cmrm.model.vlm import VLM
    from cmrm.prompts import Loaded
    from cmrm.steering.setting import Steering

DEMO = "demo"
"""As MODEL: the demo VLM. (`cmrm.demo.DEMO`, without importing torch for `--help`.)"""

ModelArgument = Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, or `demo`.")]
RevisionOption = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="Where the model answers: transformers, vllm (in this process), or a comma list of "
        "servers with it (http://HOST:PORT/v1); docs/engines.md."
    ),
]
EngineOptionsOption = Annotated[
    str | None,
    typer.Option(help="JSON, or a file of it: options of vllm.LLM, or parallel and timeout."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="auto, cpu, cuda, cuda:1 or another device map of accelerate; default: the CPU."
    ),
]
TrustOption = Annotated[
    bool, typer.Option(help="Run the code that the checkpoint brings. Read it first.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BatchOption = Annotated[int, typer.Option(help="Prompts a batch; halved when memory runs out.")]
SeedOption = Annotated[int, typer.Option(help="Seed of noise, shuffles and draws.")]
SetPathOption = Annotated[Path | None, typer.Option("--path", help="Folder of a named set.")]
MapOption = Annotated[
    str | None,
    typer.Option("--map", help="Columns of a file or hub set: query=instruction,image=img,..."),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(help="Folder where relative image paths start, and others are looked up."),
]
LabelOption = Annotated[
    str | None, typer.Option(help="Label of samples that no column labels: harmful or benign.")
]
SplitOption = Annotated[
    str | None, typer.Option(help="Split of a hub set or of a folder saved by `datasets`.")
]
ConfigOption = Annotated[str | None, typer.Option(help="Configuration of a hub set.")]
VariantOption = Annotated[str | None, typer.Option(help="Variant of a named set.")]
PartialOption = Annotated[
    bool,
    typer.Option(
        "--partial", help="Accept a named set whose counts or checksums are not the published ones."
    ),
]
OnErrorOption = Annotated[str, typer.Option("--on-error", help="Unusable rows: skip or stop.")]
LimitOption = Annotated[int | None, typer.Option(help="Draw so many samples, by hashed id.")]
AlphaOption = Annotated[float | None, typer.Option(help="Strength, >= 0.")]
ScheduleOption = Annotated[
    str | None,
    typer.Option(help="Which vectors are added: telescoped, per_layer or sequential."),
]
OperatorOption = Annotated[
    str | None,
    typer.Option(
        help="add (vectors), or fill: raise the refusal direction to what the request has as text."
    ),
]
GateOption = Annotated[
    bool | None,
    typer.Option("--gate/--no-gate", help="Steer only where the artifact's harm gate opens."),
]
PositionsOption = Annotated[
    str | None, typer.Option(help="last, all, after_image, generated or last_prompt.")
]
LayersOption = Annotated[
    str | None, typer.Option(help="Decoder layers, 0-based: 0-13,20,26; all when left out.")
]


SettingsOption = Annotated[
    Path | None,
    typer.Option(help='JSON: {"cmrm_dataset": {"alpha": 0.3, "layers": [15, 16]}, ...}.'),
]


def read_settings(path: Path | None, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Settings by the name of the defence, from a JSON file; none without one.

    Args:
        path: the file.
        names: the defences and stacks that are run.

    Raises:
        InputError: the file is no such mapping, or names an unknown defence, or one that is not
            run.
    """
    from cmrm.defenses import base_name, defense_names
    from cmrm.errors import InputError

    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    mappings = isinstance(document, dict) and all(isinstance(v, dict) for v in document.values())
    if not mappings:
        raise InputError(f"{path} is no mapping of defence to settings")
    unknown = sorted(name for name in document if base_name(name) not in defense_names())
    if unknown:
        raise InputError(f"{path} has settings for unknown defences: {', '.join(unknown)}")
    parts = {part for name in names for part in name.split("+")}
    stray = [name for name in document if name not in parts]
    if stray:
        raise InputError(
            f"{path} has settings for {', '.join(stray)}, which is not among --defenses"
        )
    return dict(document)


def check_free(path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to write a document over one of something else.

    Args:
        path: of the document.
        wanted: fields that it has to have, where it exists.

    Raises:
        InputError: the document there has other ones; nothing is lost.
    """
    from cmrm.errors import InputError

    if not path.is_file():
        return
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        stored = {name: document.get(name) for name in wanted}
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{path} is damaged; name another folder with --out") from None
    for name, value in wanted.items():
        other = stored[name]
        if isinstance(value, list) and isinstance(other, list):
            other = [part for part in other if part != "none"]
        if other != value:
            raise InputError(
                f"{path} holds another one ({name}: {other}); name another folder with --out"
            )


def quiet(*, offline: bool = False) -> None:
    """Turn off the libraries' own bars and warnings; `offline` also keeps the hub out."""
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import warnings

    from cmrm.model.compat import patch_torchvision

    patch_torchvision()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


RESULTS = ("scipy", "pydantic")
"""Libraries that rates and results need."""
REPORT = ("matplotlib", "jinja2")
"""Libraries that the report needs."""


def need_extra(purpose: str, extra: str, modules: Sequence[str]) -> None:
    """Check that the libraries of an extra are installed, before anything is computed.

    Raises:
        MissingExtraError: one is missing; the message names the command that installs it.
    """
    from importlib.util import find_spec

    from cmrm.errors import MissingExtraError

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {', '.join(missing)}; install it with: pip install 'cmrm[{extra}]'"
        )


def need_inspect() -> None:
    """Check that the extra `eval` is installed.

    Raises:
        MissingExtraError: it is not.
    """
    need_extra("an evaluation", "eval", ("inspect_ai", *RESULTS, *REPORT))


def open_model(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> VLM:
    """The VLM that MODEL names; `demo` is one of the names."""
    checked_dtype(dtype)
    quiet(offline=model == DEMO)
    from cmrm.model.vlm import load_vlm

    return load_vlm(
        model,
        revision=revision,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )


def open_engine(model: str, engine: str, engine_options: str | None, **loading: Any) -> Engine:
    """The engine that `--engine` names, on MODEL."""
    checked_dtype(loading.get("dtype", "auto"))
    quiet(offline=model == DEMO)
    from cmrm.engines import opening

    return opening.open_engine(model, engine, opening.engine_options_of(engine_options), **loading)


def checked_dtype(dtype: str) -> str:
    """`dtype`, checked.

    Raises:
        InputError: it is unknown.
    """
    from cmrm.errors import InputError

    if dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise InputError(f"dtype is {dtype!r}; one of auto, float32, bfloat16, float16")
    return dtype


def open_set(
    data: str,
    *,
    path: Path | None,
    columns: str | None,
    images: Path | None,
    split: str | None,
    config: str | None,
    variant: str | None,
    partial: bool,
    on_error: str,
    limit: int | None,
    seed: int,
    label: str | None = None,
) -> Loaded:
    """The samples that `--data` or `--anchors` names; notes go to standard error."""
    from cmrm.prompts.columns import parse_columns
    from cmrm.prompts.loading import load_samples

    loaded = load_samples(
        data,
        path=path,
        columns=parse_columns(columns),
        images=images,
        label=label,
        split=split,
        config=config,
        variant=variant,
        partial=partial,
        on_error=on_error,  # type: ignore[arg-type]
        limit=limit,
        seed=seed,
    )
    screen.print_notes(loaded)
    return loaded


def parse_names(names: str, option: str) -> list[str]:
    """The names of a comma list, each once.

    Raises:
        InputError: it names nothing.
    """
    from cmrm.errors import InputError

    listed = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not listed:
        raise InputError(f"{option} names nothing")
    return listed


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """`0-13,20` as sorted layer numbers; None for None.

    Raises:
        InputError: a part is neither a number nor a range.
    """
    from cmrm.errors import InputError

    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        numbers = [first, last] if dash else [first]
        if not all(n.isdecimal() and len(n) < 5 for n in numbers) or int(numbers[-1]) < int(first):
            raise InputError(
                f"layers: {part[:40]!r} is neither a layer nor a range such as 0-13; layers count "
                "from 0"
            )
        layers.update(range(int(first), int(numbers[-1]) + 1))
    return tuple(sorted(layers))


def changed(
    base: Steering,
    *,
    alpha: float | None = None,
    schedule: str | None = None,
    positions: str | None = None,
    layers: str | None = None,
    operator: str | None = None,
    gate: bool | None = None,
) -> Steering:
    """`base` with the options that are not None; see `Steering.changed`.

    Raises:
        InputError: an option has a value that it cannot take, or excludes another.
    """
    from cmrm.errors import InputError

    if operator == "fill" and schedule is not None:
        raise InputError(
            "--schedule says which vectors are added, and --operator fill adds none; leave one of "
            "the two out"
        )
    options: dict[str, Any] = {
        "alpha": alpha,
        "schedule": schedule,
        "positions": positions,
        "layers": parse_layers(layers),
        "operator": operator,
        "gate": gate,
    }
    return base.changed({name: value for name, value in options.items() if value is not None})
