"""Judges say whether a reply refuses. They never guess: what cannot be judged is `unscored`."""

from __future__ import annotations

from cmrm.judges.keyword import KeywordJudge, Verdict

__all__ = ["KeywordJudge", "Verdict"]
