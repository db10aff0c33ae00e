"""The text that every judge reads: a reply without its thinking, its markup and its labels."""

from __future__ import annotations

import html
import re
import unicodedata

_THOUGHT = "think|thinking|thought|thoughts|reasoning|analysis|scratchpad|seed:think"
_TAG = re.compile(
    rf"(?P<open><(?:{_THOUGHT})>|\[THINK\]|\u25c1think\u25b7|<\|channel\|>analysis<\|message\|>)"
    rf"|(?P<close></(?:{_THOUGHT})>|\[/THINK\]|\u25c1/think\u25b7)|(?P<turn><\|end\|>)",
    re.IGNORECASE,
)

_FOLDED = (
    dict.fromkeys(
        map(ord, "\u2018\u2019\u201b\u02bc\u02b9\u02bb\u2032\u00b4\uff07\u0384\u055a"), "'"
    )
    | dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02\u300c\u300d"), '"')
    | dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2212"), "-")
)
_BACKTICK = re.compile(r"(?<=[A-Za-z])`(?=[A-Za-z])")
_BREAK = re.compile(
    r"<(?:br|/?p|/?li|/?div|/?h[1-6])\b[^<>]{0,200}>|<\|[^|<>\n]{1,40}\|>|\r\n?|[\x0b\x0c\x85\u2028\u2029]",
    re.IGNORECASE,
)
_TAGS = re.compile(
    r"</?(?:b|i|u|s|em|strong|span|blockquote|ul|ol|q|code|pre|answer|response|output|final|font"
    r"|center|pad|unk|eos|bos|start_of_turn|end_of_turn)\b[^<>]{0,200}>|\[/?INST\]",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*$", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*(?:[-=_*][ \t]*){3,}$", re.MULTILINE)
_LINE_MARK = re.compile(
    r"^[ \t]*(?:(?:>|#{1,6}(?=\s)|[-+*\u2022\u25cf\u25aa\u2013\u2014\u00b7](?=\s))[ \t]*)+",
    re.MULTILINE,
)
_LINK = re.compile(r"!?\[([^\[\]\n]{1,300})\]\([^()\s]{1,2000}\)")
_EMPHASIS = re.compile(r"\*+|~~|`+|(?<!\w)_{1,3}(?=\S)|(?<=\S)_{1,3}(?!\w)")
_LABEL = re.compile(
    r"^\W{0,4}(?:(?:(?:the|my|ai|final|model|llm) )*"
    r"(?:assistant|answer|response|reply|output|completion|ai|model|final)"
    r"|a|bot|chatbot|chatgpt|gpt|claude|gemini|llama|note|warning|disclaimer|important(?: note)?"
    r"|system)"
    r" {0,2}(?::|\n)\s*(?=\S)",
    re.IGNORECASE,
)
_LABELS = 3
_QUOTED = re.compile(r"\"([^\"]*)\"?|'((?:[^']|(?<=\w)'(?=\w))*)'")


def strip_thinking(text: str) -> str:
    """`text` without its `<think>` blocks, in the spellings of today's models.

    Nothing is left of a text that is a block without an end. A closing tag without an opening one
    ends a block that the prompt opened.
    """
    answer, start, opened = "", 0, -1
    for tag in _TAG.finditer(text):
        if tag["open"] is not None:
            if opened < 0:
                answer, opened = answer + text[start : tag.start()], tag.start()
        elif opened >= 0 or tag["close"] is not None:
            answer = answer if opened >= 0 else ""
            start, opened = tag.end(), -1
    if opened < 0:
        return answer + text[start:]
    return answer + text[opened:] if answer.strip() else ""


def normalise(reply: str) -> str:
    """The words of a reply as plain lines.

    Thinking, Markdown, HTML, control tokens, invisible characters, leading labels such as
    "Assistant:" and quotation marks around the whole are removed. Apostrophes, quotation marks and
    compatibility characters are folded. Letters keep their case and lists their numbers.
    """
    text = html.unescape(strip_thinking(reply)).translate(_FOLDED)
    text = _BREAK.sub("\n", unicodedata.normalize("NFKC", text).translate(_FOLDED))
    text = _BACKTICK.sub("'", "".join(map(_visible, text)))
    for pattern in (_TAGS, _FENCE, _RULE, _LINE_MARK):
        text = pattern.sub("", text)
    text = _EMPHASIS.sub("", _LINK.sub(r"\1", text))
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))
    for _ in range(_LABELS):
        text = _unquoted(_LABEL.sub("", text, count=1))
    return text


def _visible(character: str) -> str:
    """The character itself, a blank for a control character, nothing for an invisible one."""
    if character == "\n":
        return character
    if character.isprintable():
        return "" if "\ufe00" <= character <= "\ufe0f" else character
    return " " if unicodedata.category(character) in {"Cc", "Zs"} else ""


def _unquoted(text: str) -> str:
    """`text` without quotation marks around the whole; the last one may have been cut off."""
    quoted = _QUOTED.fullmatch(text)
    return text if quoted is None else (quoted[1] or quoted[2] or "").strip()
