"""What the commands share: options, quiet libraries, progress bars, loading a model and a set, tables and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cmrm.model.vlm import VLM
    from cmrm.prompts import Loaded
    from cmrm.steering.hooks import Steering

DEMO = "demo"
"""As MODEL: the demo VLM, assembled on first use. (`cmrm.demo.DEMO`, without importing torch for `--help`.)"""

ModelArgument = Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, or `demo`.")]
RevisionOption = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or another device map of accelerate; the CPU when left out.")
]
TrustOption = Annotated[bool, typer.Option(help="Run the code that the checkpoint brings. Read it first.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BatchOption = Annotated[int, typer.Option(help="Prompts a batch; halved by itself when memory runs out.")]
SeedOption = Annotated[int, typer.Option(help="Seed of noise, shuffles and draws.")]
SetPathOption = Annotated[Path | None, typer.Option("--path", help="Where a named set lies on this machine.")]
MapOption = Annotated[
    str | None, typer.Option("--map", help="Columns of a file or hub set: query=instruction,image=img,...")
]
ImagesOption = Annotated[Path | None, typer.Option(help="Folder that relative image paths start from.")]
SplitOption = Annotated[str | None, typer.Option(help="Split of a hub set or of a folder saved by `datasets`.")]
ConfigOption = Annotated[str | None, typer.Option(help="Configuration of a hub set.")]
VariantOption = Annotated[str | None, typer.Option(help="Variant of a named set.")]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Accept a named set whose counts or checksums are not the published ones.")
]
OnErrorOption = Annotated[str, typer.Option("--on-error", help="skip or stop: what to do with unusable rows.")]
LimitOption = Annotated[int | None, typer.Option(help="Draw so many samples, by hashed id.")]
AlphaOption = Annotated[float | None, typer.Option(help="Strength, >= 0.")]
ScheduleOption = Annotated[str | None, typer.Option(help="telescoped or per_layer.")]
PositionsOption = Annotated[str | None, typer.Option(help="last, all, after_image, generated or last_prompt.")]
LayersOption = Annotated[str | None, typer.Option(help="Decoder layers, 0-based: 0-13,20,26; all when left out.")]


def quiet(*, offline: bool = False) -> None:
    """No library chatter: the bars are our own. `offline` keeps the hub out as well."""
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import warnings

    from cmrm.model.compat import mend_torchvision

    mend_torchvision()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")


def need_inspect() -> None:
    """Raise `InputError` where the extra `eval` is not installed."""
    from importlib.util import find_spec

    from cmrm.errors import InputError

    if find_spec("inspect_ai") is None:
        raise InputError("evaluation needs inspect_ai, which is not installed: pip install 'cmrm[eval]'")


def open_model(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> VLM:
    """The VLM that MODEL names, `demo` among them."""
    checked_dtype(dtype)
    quiet(offline=model == DEMO)
    from cmrm.demo.vlm import load_named_vlm

    source: dict[str, Any] = {} if model == DEMO else {"revision": revision, "trust_remote_code": trust_remote_code}
    return load_named_vlm(model, dtype=dtype, device_map=device_map, **source)


def checked_dtype(dtype: str) -> str:
    """`dtype`, or an `InputError` that lists the possible ones."""
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
) -> Loaded:
    """The samples that `--data` or `--anchors` names; what was left out is said on standard error."""
    from cmrm.prompts.loading import load_samples, parse_columns

    loaded = load_samples(
        data, path=path, columns=parse_columns(columns), images=images, split=split, config=config, variant=variant,
        partial=partial, on_error=on_error, limit=limit, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    for note in loaded.notes:
        typer.echo(f"{loaded.name}: {note}", err=True)
    if loaded.skipped:
        typer.echo(
            f"{loaded.name}: {len(loaded.skipped)} samples left out; the first: {loaded.skipped[0].reason}", err=True
        )
    return loaded


def parse_layers(given: str | None) -> tuple[int, ...] | None:
    """`0-13,20` as sorted layer numbers; None for None.

    Raises:
        InputError: a part is neither a number nor a range.
    """
    from cmrm.errors import InputError

    if given is None:
        return None
    layers: set[int] = set()
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise InputError(f"layers: {part!r} is neither a layer nor a range such as 0-13; layers count from 0")
        layers.update(range(int(first), int(last) + 1 if dash else int(first) + 1))
    return tuple(sorted(layers))


def changed(
    base: Steering, *, alpha: float | None, schedule: str | None, positions: str | None, layers: str | None
) -> Steering:
    """`base` with the options that were given."""
    from dataclasses import replace

    given: dict[str, Any] = {
        "alpha": alpha,
        "schedule": schedule,
        "positions": positions,
        "layers": parse_layers(layers),
    }
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=1))


FILE_COLUMNS = 180
"""Width of a table that goes into a file or a pipe."""


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; cells fold instead of being cut."""
    from rich.console import Console
    from rich.table import Table

    free = sys.stdout.isatty() or "COLUMNS" in os.environ
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if free else FILE_COLUMNS).print(table)


def progress_bar(console: Any) -> Any:
    """Our progress bar: what is going on, how far, since when."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar on standard error over `total` prompts: (say what is going on, advance by n)."""
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)
        yield (lambda text: bar.update(task, description=text)), (lambda n: bar.advance(task, n))


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of bars from zero to the largest."""
    top = max(values, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * v / top))] if top > 0 and v > 0 else "▁" for v in values)
