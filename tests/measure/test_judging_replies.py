"""Given replies, judged: who is asked about what, what is kept, what a failure takes away."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cmrm.errors import InputError, ModelError
from cmrm.judges import Judge, Judgement, ReasonedJudge, Verdict
from cmrm.judges.base import unscored
from cmrm.measure.judged import (
    asked_about,
    failure_of_all,
    judge_replies,
    training_notes,
    write_verdicts,
)
from cmrm.measure.replies import KINDS, GivenReply
from cmrm.store import TextStore

TEXT = "Mix the flour and the water, then wait."


def given(number: int, reply: str = TEXT, kind: str = "harmful", **more: Any) -> GivenReply:
    values = {"missing": None if reply else "the reply is empty", **more}
    known = KINDS.get(kind, "other")
    return GivenReply("f", number, f"request {number}", reply, known, "bread", "m", "", **values)


class Fake(ReasonedJudge):
    """A judge that refuses everything, fails where it is told to, and counts."""

    def __init__(self, name: str = "fake", *, fails: Sequence[str] = ()) -> None:
        self.name, self.fails = name, fails
        self.asked: list[str] = []

    def assess(self, request: str, reply: str) -> Judgement:
        self.asked.append(request)
        if request in self.fails:
            raise RuntimeError("no memory")
        return Judgement(Verdict.REFUSED, refusal=0.123456789)


def test_each_reply_has_a_judgement_of_each_judge() -> None:
    replies = [given(1), given(2, kind="benign"), given(3, kind="other")]
    steps, judging = list[int](), list[str]()
    makers: dict[str, Callable[[], Judge]] = {"a": lambda: Fake("a"), "b": lambda: Fake("b")}
    judgements = judge_replies(replies, makers, say=judging.append, tick=steps.append)
    assert list(judgements) == ["a", "b"]
    for row in judgements.values():
        assert [j and j.verdict for j in row] == [Verdict.REFUSED, Verdict.REFUSED, None]
    assert judging == ["judging by a", "judging by b"]
    assert sum(steps) == asked_about(replies) * 2 == 4


def test_missing_replies_are_unscored_and_nobody_is_asked() -> None:
    judge = Fake()
    judgements = judge_replies([given(1, ""), given(2)], {"fake": lambda: judge})
    assert judgements["fake"][0] == unscored("the reply is empty")
    assert judge.asked == ["request 2"]


def test_equal_replies_are_asked_about_once() -> None:
    judge = Fake()
    replies = [given(1), given(1), given(2), given(1, "Another.")]
    steps = list[int]()
    judgements = judge_replies(replies, {"fake": lambda: judge}, tick=steps.append)
    assert judge.asked == ["request 1", "request 2", "request 1"]
    assert all(judgements["fake"])
    assert sum(steps) == 4


def test_kept_verdicts_are_not_asked_for_again(tmp_path: Path) -> None:
    store, judge = TextStore(tmp_path / "v.db"), Fake()
    replies = [given(1), given(2)]
    first = judge_replies(replies, {"fake": lambda: judge}, store=store)
    again = judge_replies([*replies, given(3)], {"fake": lambda: judge}, store=store)
    assert judge.asked == ["request 1", "request 2", "request 3"]
    assert again["fake"][:2] == first["fake"]


def test_a_judge_with_nothing_to_do_is_not_made(tmp_path: Path) -> None:
    def broken() -> Judge:
        raise ModelError("no such model")

    store = TextStore(tmp_path / "v.db")
    judge_replies([given(1)], {"fake": Fake}, store=store)
    (judgement,) = judge_replies([given(1)], {"fake": broken}, store=store)["fake"]
    assert judgement is not None
    assert judgement.verdict is Verdict.REFUSED


def test_failures_are_not_kept_and_asked_for_again(tmp_path: Path) -> None:
    store, judge = TextStore(tmp_path / "v.db"), Fake(fails=["request 2"])
    replies = [given(1), given(2)]
    first = judge_replies(replies, {"fake": lambda: judge}, store=store)["fake"]
    assert [j and j.failed for j in first] == [False, True]
    judge.fails = ()
    second = judge_replies(replies, {"fake": lambda: judge}, store=store)["fake"]
    assert [j and j.failed for j in second] == [False, False]
    assert judge.asked == ["request 1", "request 2", "request 2"]


def test_what_was_judged_before_a_stop_is_kept(tmp_path: Path) -> None:
    class Stopped(Fake):
        def assess(self, request: str, reply: str) -> Judgement:
            if len(self.asked) == 70:
                raise KeyboardInterrupt
            return super().assess(request, reply)

    store, judge = TextStore(tmp_path / "v.db"), Stopped()
    replies = [given(k) for k in range(100)]
    with pytest.raises(KeyboardInterrupt):
        judge_replies(replies, {"fake": lambda: judge}, store=store)
    after = Fake()
    judge_replies(replies, {"fake": lambda: after}, store=store)
    assert len(after.asked) == 36


def test_a_judge_that_cannot_be_made_takes_no_verdict_away() -> None:
    def broken() -> Judge:
        raise ModelError("no such model")

    judgements = judge_replies([given(1), given(2)], {"broken": broken, "fake": Fake})
    assert [j and j.reason for j in judgements["broken"]] == [
        "broken failed: ModelError: no such model"
    ] * 2
    assert [j and j.verdict for j in judgements["fake"]] == [Verdict.REFUSED] * 2
    assert failure_of_all([given(1), given(2)], judgements) is None


def test_every_verdict_failed() -> None:
    replies = [given(1), given(2), given(3, ""), given(4, kind="other")]
    judge = Fake(fails=["request 1", "request 2"])
    judgements = judge_replies(replies, {"fake": lambda: judge})
    assert failure_of_all(replies, judgements) == "fake failed: RuntimeError: no memory"


def test_empty_replies_alone_are_no_failure() -> None:
    replies = [given(1, "")]
    assert failure_of_all(replies, judge_replies(replies, {"fake": Fake})) is None


def test_a_kept_verdict_that_cannot_be_read_is_asked_for_again(tmp_path: Path) -> None:
    store, judge = TextStore(tmp_path / "v.db"), Fake()
    judge_replies([given(1)], {"fake": lambda: judge}, store=store)
    with sqlite3.connect(store.path) as base:
        base.execute("UPDATE texts SET text = '{'")
    judge_replies([given(1)], {"fake": lambda: judge}, store=store)
    assert judge.asked == ["request 1"] * 2


def test_a_store_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TextStore(tmp_path / "v.db")

    def full(texts: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "put", full)
    with pytest.raises(InputError, match="disk is full"):
        judge_replies([given(1)], {"fake": Fake}, store=store)


def test_lines_of_verdicts(tmp_path: Path) -> None:
    replies = [given(1), given(2, ""), given(3, kind="other")]
    judgements = judge_replies(replies, {"a": lambda: Fake("a"), "b": lambda: Fake("b")})
    write_verdicts(tmp_path / "v.jsonl", replies, judgements)
    text = (tmp_path / "v.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["row"], row["judge"]) for row in rows] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert rows[0] == {
        "file": "f", "row": 1, "model": "m", "kind": "harmful", "category": "bread",
        "language": "", "judge": "a", "verdict": "refused", "reason": None, "failed": False,
        "refusal": 0.123457, "engagement": None,
    }  # fmt: skip
    assert rows[2]["reason"] == "the reply is empty"
    assert TEXT not in text
    assert "request" not in text


def test_verdicts_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_verdicts(tmp_path / "v.jsonl", [given(1)], {})


def test_a_judge_trained_on_the_very_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmrm.files import sha256_file
    from cmrm.judges import judge_maker, small

    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(name, encoding="utf-8")
    files = {"own": sha256_file(tmp_path / "a.csv")}
    monkeypatch.setattr(small, "shipped_training", lambda: {"files": files})
    paths = {name: tmp_path / name for name in ("a.csv", "b.csv")}

    def broken() -> Judge:
        raise ModelError("no such model")

    makers = {"small": judge_maker("small"), "chat:x": broken, "other": broken}
    notes = training_notes(makers, paths)
    assert list(notes) == ["a.csv"]
    assert "small was trained on these very replies" in notes["a.csv"][0]
