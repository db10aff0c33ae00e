"""What every page shares: the templates' environment, and how a page is written."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cmrm.errors import InputError, MissingExtraError
from cmrm.files import atomic_path
from cmrm.report import tables

if TYPE_CHECKING:
    from jinja2 import Environment

_FIGURE = re.compile(r"\S+(?: %| points)? \[[^\]]*\]|\S+ %")
"""`12.5 % [7.1, 20.9]`, `16.0 %`."""


def environment() -> Environment:
    """Jinja's environment with the templates of this folder and their filters.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError:
        raise MissingExtraError(
            "the report needs jinja2; pip install 'cmrm[eval]' (or 'cmrm[demo]') brings it"
        ) from None

    made = Environment(
        loader=PackageLoader("cmrm", "report"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "base64": _base64, "sort_key": tables.sort_key, "label": tables.label, "tied": tied
    }  # fmt: skip
    return made


def write_page(page: str, images: Mapping[str, bytes], out: Path, name: str) -> Path:
    """Write `out/NAME.html` and its figures as PNG files; return the page.

    Raises:
        InputError: `out` cannot be written to.
    """
    path = out / f"{name}.html"
    try:
        for key, png in images.items():
            with atomic_path(out / f"{key}.png") as part:
                part.write_bytes(png)
        with atomic_path(path) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report into {out}: {error}") from None
    return path


def tied(cell: str) -> str:
    """A cell whose figure is not parted from its interval at the end of a line."""
    return _FIGURE.sub(lambda match: match[0].replace(" ", "\u00a0"), cell)


def plain_text(value: object) -> str:
    """A setting as text: `alpha 0.37, layers 0 to 20`."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name.replace('_', ' ')} {plain_text(part)}" for name, part in value.items()
        )
    if isinstance(value, list):
        whole = [part for part in value if isinstance(part, int)]
        if (
            len(value) > 2
            and len(whole) == len(value)
            and whole == list(range(whole[0], whole[-1] + 1))
        ):
            return f"{whole[0]} to {whole[-1]}"
        return ", ".join(map(plain_text, value))
    return str(value) if isinstance(value, str) else json.dumps(value)


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
