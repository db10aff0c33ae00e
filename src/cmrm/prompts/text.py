"""Text: how files are decoded, the normal form of a query, and short forms for messages."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from cmrm.errors import InputError

SHOWN = 60
"""Characters of a cell, path or id that a message shows."""


def shortened(value: object, limit: int = SHOWN) -> str:
    """`value` on one line in at most `limit` characters; what is left out stands as `...`.

    The end is kept longer than the start, since the end of a path says more. Characters that
    cannot be printed are replaced.
    """
    text = " ".join(str(value).split())
    if len(text) > limit:
        tail = (limit - 3) * 2 // 3
        text = f"{text[: limit - 3 - tail]}...{text[-tail:]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def listed(names: Iterable[object], most: int = 8) -> str:
    """The first names as a comma list, each shortened, and the number of the others."""
    texts = [shortened(name, 30) for name in names]
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest


def normalised(query: str) -> str:
    """The normal form of a query: NFKC, case folded, white space collapsed and stripped.

    Two queries with the same normal form ask the same.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", query).casefold())
    return " ".join(folded.split())


def read_text(path: Path) -> str:
    """The text of a file in UTF-8 (with or without a byte order mark) or UTF-16 with a mark.

    Raises:
        InputError: the file cannot be opened, has another encoding, or holds NUL characters.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    wide = content.startswith(marks) and not content.startswith(codecs.BOM_UTF32_LE)
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} cannot be read: byte {error.start} is not {'UTF-16' if wide else 'UTF-8'}; "
            "save as UTF-8"
        ) from None
    if "\0" in text:
        raise InputError(
            f"{path} cannot be read: it holds NUL characters and is no text in UTF-8; save as UTF-8"
        )
    return text.lstrip("\N{ZERO WIDTH NO-BREAK SPACE}")
