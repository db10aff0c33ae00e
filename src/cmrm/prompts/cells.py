"""Cells of a table: text, ids, and images in every form that other tools write."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from cmrm.errors import InputError
from cmrm.prompts.images import (
    Picture,
    array_picture,
    base64_image,
    decode_data_uri,
    is_data_uri,
)
from cmrm.prompts.tables import is_absent

DEEPEST_LIST = 4
"""Lists within lists of images that are read."""


def text_cell(cell: Any, place: str, field: str, *, strict: bool = True) -> str | None:
    """A cell as text; None where it holds nothing. A whole number has no decimal point.

    Args:
        cell: text, a number, a truth value, a date; under `strict` no list and no object.
        place: which row, for messages.
        field: what the cell is read as, for messages.
        strict: refuse lists and objects; without it they become JSON.

    Raises:
        InputError: the cell holds something else, or half of a surrogate pair.
    """
    if isinstance(cell, np.generic):
        cell = cell.item()
    if isinstance(cell, bytes):
        cell = _utf8(cell)
    if is_absent(cell) or (isinstance(cell, str) and not cell.strip()):
        return None
    if isinstance(cell, list | tuple | dict) and not strict:
        text = json.dumps(cell, ensure_ascii=False, default=str)
    elif isinstance(cell, list | tuple | dict | set | bytes | np.ndarray | Image.Image):
        raise InputError(
            f"{place}: its {field} is {type(cell).__name__}, expected text; map what is inside by "
            f"a dotted name such as {field}.0 or {field}.text"
        )
    elif isinstance(cell, float) and cell.is_integer():
        text = str(int(cell))
    else:
        text = str(cell)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: its {field} holds half of a surrogate pair, which is no character"
        ) from None
    return text


def image_cell(
    cell: Any, folder: Path | None, place: str, *, search: bool = False
) -> Picture | tuple[Picture, ...] | None:
    """The picture or pictures of a cell; None where it holds nothing.

    Args:
        cell: a path, a `data:` URI, an image file as bytes or base64, a PIL image, an array
            [H, W] or [H, W, C], the `{"bytes", "path"}` of `datasets`, or a list of these, also
            as text in JSON.
        folder: where relative paths start; None: the working directory.
        place: which row, for messages.
        search: whether an absolute path that does not exist here is looked up in `folder` by its
            longest tail that does.

    Raises:
        InputError: the cell holds something else.
    """
    pictures = _pictures(cell, folder, place, search, DEEPEST_LIST)
    if len(pictures) == 1 and not isinstance(cell, list | tuple):
        return pictures[0]
    return tuple(pictures) or None


def _pictures(
    cell: Any, folder: Path | None, place: str, search: bool, depth: int
) -> list[Picture]:
    if isinstance(cell, np.ndarray) and cell.dtype.kind in "OUS":
        cell = cell.tolist()
    if isinstance(cell, np.ndarray):
        return [array_picture(cell, place)]
    if isinstance(cell, Image.Image):
        return [cell]
    if isinstance(cell, bytes | bytearray | memoryview):
        return [bytes(cell)]
    if is_absent(cell):
        return []
    if isinstance(cell, Path):
        return [_image_path(str(cell), folder, search)]
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        content = cell.get("bytes")
        empty = is_absent(content) or (isinstance(content, bytes) and not content)
        return _pictures(cell.get("path") if empty else content, folder, place, search, 0)
    if isinstance(cell, list | tuple):
        if depth == 0:
            raise InputError(f"{place}: its image is nested too deep; expected one list of images")
        return [
            picture
            for inner in cell
            for picture in _pictures(inner, folder, place, search, depth - 1)
        ]
    if isinstance(cell, str):
        return _text_pictures(cell, folder, place, search, depth)
    raise InputError(
        f"{place}: its image is {type(cell).__name__}; expected a path, a data URI, an image file "
        "as bytes or base64, or a list of these"
    )


def _text_pictures(
    text: str, folder: Path | None, place: str, search: bool, depth: int
) -> list[Picture]:
    text = text.strip()
    if not text:
        return []
    if is_data_uri(text):
        return [decode_data_uri(text, place)]
    content = base64_image(text)
    if content is not None and not os.path.isfile(_image_path(text, folder, search)):
        return [content]
    if "://" in text:
        return [text]  # open_picture says that nothing is fetched
    if text.startswith("[") and text.endswith("]"):
        cells = list_in(text)
        if cells is not None:
            return _pictures(cells, folder, place, search, depth)
    return [_image_path(text, folder, search)]


def list_in(text: str) -> list[Any] | None:
    """The list that a text holds in JSON, or as Python prints one; None where it holds none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            cells = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return cells if isinstance(cells, list) else None
    return None


def _image_path(text: str, folder: Path | None, search: bool) -> Path:
    """The path of an image file; an absolute one of another machine by its tail in `folder`."""
    path = Path(text)
    if folder is None or os.path.isfile(folder / path):
        return path if folder is None else folder / path
    windows = PureWindowsPath(text)
    if not windows.anchor:
        return folder.joinpath(*windows.parts) if "\\" in text else folder / path
    if not search:
        return path
    parts = windows.parts if windows.drive or "\\" in text else PurePosixPath(text).parts
    return _by_tail(parts[1:], folder) or path


def _by_tail(parts: Sequence[str], folder: Path) -> Path | None:
    """The file in `folder` under the longest tail of `parts` that is there."""
    for start in range(len(parts)):
        tail = parts[start:]
        if ".." not in tail and os.path.isfile(folder.joinpath(*tail)):
            return folder.joinpath(*tail)
    return None


def _utf8(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content
