"""Comparison of a reply with a reference answer."""

from __future__ import annotations

import re

CORRECT, WRONG = "C", "I"
EXACT = "exact"
"""Name of the comparison among an outcome's scores."""


def matched(text: str, match: str = "exact") -> str | None:
    """What is compared of a reply or a reference answer; None when it says nothing of the asked
    form, which is wrong.

    `exact`: case, white space and a final full stop aside. `letter`: `B`, `B.`, `(B)` or `B) ...`
    at the beginning, and LLaVA's "The answer is B.". `yes_no`: the first sentence, as POPE does,
    but a sentence with neither word is wrong instead of a yes.
    """
    plain = text.strip()
    if match == "letter":
        letter = re.match(r"\(?([A-Z])(?:[.):]|\s*$)", plain) or re.search(
            r"[Tt]he answer is \(?([A-Z])\b", plain
        )
        return letter[1] if letter else None
    if match == "yes_no":
        words = set(re.findall(r"[a-z']+", plain.split(".")[0].lower()))
        return "no" if words & {"no", "not"} else "yes" if "yes" in words else None
    return plain.lower().rstrip(".").strip()


def compared(reply: str, answer: str, match: str) -> str:
    """`C` where the reply is the reference answer, `I` where it is not."""
    given = matched(reply, match)
    return CORRECT if given is not None and given == matched(answer, match) else WRONG
