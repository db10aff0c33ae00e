"""Requests and replies inside a question to a judge, so that they cannot speak for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_CONTROL = re.compile(
    r"<\|[^|<>\n]{1,60}\|>|<\uff5c[^\uff5c<>\n]{1,60}\uff5c>|<</?SYS>>|</?s>"
    r"|<(?:start|end)_of_(?:turn|image)>|<(?:bos|eos|pad|unk|mask|image|video|audio|sop|eop)>"
    r"|</?(?:think|thinking|tool_call|tool_response)>|<(?:BEGIN|END) [A-Z' ]{1,60}>"
    r"|\[/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|IMG|gMASK)\]",
    re.IGNORECASE,
)
"""Control tokens of chat templates, and the section marks of Llama Guard's and Qwen3Guard's."""
_SECTION = re.compile(r"[^\w\s].{2,}")
_FIELD = re.compile(r"\{(\w+)\}")
_BRACKETS = re.compile(r"\[[A-Z][^\[\]\n]*\]")
_HEADING = re.compile(r"^(?:[A-Z][A-Za-z]*(?: [A-Za-z]+){0,5}:|-{3,}$)", re.MULTILINE)
_INVISIBLE = r"\u00ad\u200b-\u200f\u2060\ufeff"


def quoted(text: str) -> str:
    """`text` with "> " before each line."""
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def defused(text: str, markers: Iterable[str] = (), headings: Iterable[str] = ()) -> str:
    """`text` that a model reads as words, not as the end of a turn or of a section.

    A blank is put inside each control token of a chat template and each of `markers`. "> " is put
    before each line that begins like one of `headings` ("AI assistant:", "---"), whatever its case
    and markup. Everything else stays as it is.
    """
    text = _CONTROL.sub(_broken, text)
    for marker in filter(_SECTION.match, markers):
        text = _pattern(marker).sub(_broken, text)
    starts = [_start(heading) for heading in headings]
    if not starts:
        return text
    heading = re.compile(rf"(?!>)(?:{'|'.join(starts)})", re.IGNORECASE)
    lines = text.splitlines(keepends=True)
    return "".join(f"> {line}" if heading.match(line) else line for line in lines)


def filled(template: str, *, headings: Iterable[str] = (), **texts: str) -> str:
    """`template` with each `{name}` replaced by that text, defused; braces in texts stay.

    The template's own marks in brackets and the beginnings of its lines are defused too, and
    `headings`, those of the answer that the template asks for.
    """
    brackets = set(_BRACKETS.findall(template))
    starts = [*dict.fromkeys(_HEADING.findall(template)), *headings]
    return _FIELD.sub(lambda field: defused(texts[field[1]], brackets, starts), template)


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokenizer's special tokens that `defused` does not know by itself, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in added if getattr(token, "special", False)}
    tokens.update(map(str, getattr(tokenizer, "all_special_tokens", [])))
    return sorted((t for t in tokens if not _CONTROL.fullmatch(t)), key=len, reverse=True)


def _broken(mark: re.Match[str]) -> str:
    return f"{mark[0][0]} {mark[0][1:]}"


def _pattern(marker: str) -> re.Pattern[str]:
    """`marker` in any case, with any spacing and with invisible characters between its letters."""
    words = (rf"[{_INVISIBLE}]*".join(map(re.escape, word)) for word in marker.split())
    return re.compile(rf"[\s{_INVISIBLE}]+".join(words), re.IGNORECASE)


def _start(heading: str) -> str:
    """Pattern of a line that begins like `heading`."""
    words = re.findall(r"\w+", heading)
    if not words:
        return rf"\s*{re.escape(heading[0])}{{{len(heading)},}}\s*$"
    colon = r"[\W_]*?[:\uff1a]" if heading.endswith(":") else ""
    return r"[\W_]*" + r"[\W_]*".join(words) + colon
