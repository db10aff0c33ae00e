"""Requests and replies inside a question to a judge, so that they cannot speak for it."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)
_SECTION = re.compile(r"[^\w\s].{2,}")
_FIELD = re.compile(r"\{(\w+)\}")
_HEADING = re.compile(r"\[[A-Z][^\[\]\n]*\]")


def quoted(text: str) -> str:
    """`text` with "> " before each line."""
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def defused(text: str, markers: Iterable[str] = ()) -> str:
    """`text` with a blank inside each control token of a chat template and each of `markers`.

    The model then reads them as words, not as the end of a turn or of a section.
    """
    text = _CONTROL.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)
    for marker in filter(_SECTION.match, markers):
        text = re.sub(re.escape(marker), f"{marker[0]} {marker[1:]}", text, flags=re.IGNORECASE)
    return text


def filled(template: str, **texts: str) -> str:
    """`template` with each `{name}` replaced by that text, defused; braces in texts stay."""
    headings = set(_HEADING.findall(template))
    return _FIELD.sub(lambda field: defused(texts[field[1]], headings), template)
