"""Judges of third parties, found by their entry point."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

import cmrm.judges as judges
from cmrm.errors import InputError
from cmrm.judges import Judgement, ReasonedJudge, Verdict, judge_maker, judge_names, make_judge


class ShortJudge(ReasonedJudge):
    name = "short"

    def assess(self, request: str, reply: str) -> Judgement:
        return Judgement(Verdict.REFUSED if len(reply) < 9 else Verdict.COMPLIED)


class Nameless:
    name = "another"


def broken() -> Any:
    raise RuntimeError("no weights")


def install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, "cmrm.judges")
    monkeypatch.setattr(judges, "entry_points", lambda group: [point])


def test_it_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown judge 'short'"):
        make_judge("short")
    install(monkeypatch, "short", f"{__name__}:ShortJudge")
    judge = make_judge("short")
    assert (judge.judge("x", "no"), judge.judge("x", "of course")) == (
        Verdict.REFUSED,
        Verdict.COMPLIED,
    )
    assert "short" in judge_names()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere_at_all:Judge", "cannot be loaded"), (f"{__name__}:Missing", "cannot be loaded"),
        (f"{__name__}:broken", "no weights"), (f"{__name__}:Nameless", "no method `judge`"),
    ],
)  # fmt: skip
def test_one_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    install(monkeypatch, "short", value)
    with pytest.raises(InputError, match=words):
        judge_maker("short")()


def test_own_names_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "keyword", f"{__name__}:ShortJudge")
    assert make_judge("keyword").name == "keyword"
