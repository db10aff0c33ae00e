"""Given replies, judged: each asked about once, verdicts kept on disk."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from cmrm import __version__
from cmrm.errors import InputError
from cmrm.files import atomic_path
from cmrm.judges import DEFAULT_JUDGE, Judge, Judgement, Verdict
from cmrm.judges.base import assessed_all, failure, unscored
from cmrm.measure.labelled import trained_on
from cmrm.measure.replies import KINDS, GivenReply
from cmrm.store import TextStore

BATCH = 64
"""Replies that a judge is asked about at once."""

Judgements = Mapping[str, Sequence[Judgement | None]]
"""Judge -> its judgement of each reply; None for replies that are not judged."""


def asked_about(replies: Sequence[GivenReply]) -> int:
    """How many of the replies are judged: those to harmful and benign requests."""
    return sum(reply.kind in KINDS for reply in replies)


def judge_replies(
    replies: Sequence[GivenReply],
    makers: Mapping[str, Callable[[], Judge]],
    *,
    store: TextStore | None = None,
    say: Callable[[str], None] = lambda text: None,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, list[Judgement | None]]:
    """Judge -> its judgement of each reply; None for replies to requests of no known label.

    Equal replies to equal requests are asked about once, missing ones never. A judge is made when
    it is its turn. One that cannot be made has failed on all replies; the others are not touched.

    Args:
        replies: what is judged.
        makers: what makes each judge, by name.
        store: keeps judgements, so that a run that was stopped continues. A judgement of a judge
            that failed is not kept: the judge is asked again.
        say: called with the name of each judge.
        tick: called with the number of replies that have a verdict.

    Raises:
        InputError: the store cannot be written to.
    """
    judgements = {}
    for name, make in makers.items():
        say(f"judging by {name}")
        judgements[name] = _judged(replies, name, make, store, tick)
    return judgements


def _judged(
    replies: Sequence[GivenReply],
    name: str,
    make: Callable[[], Judge],
    store: TextStore | None,
    tick: Callable[[int], None],
) -> list[Judgement | None]:
    """The judgements of one judge."""
    judgements: list[Judgement | None] = [None] * len(replies)
    places: dict[tuple[str, str], list[int]] = {}
    for place, reply in enumerate(replies):
        if reply.kind not in KINDS:
            continue
        if reply.missing is not None:
            judgements[place] = unscored(reply.missing)
            tick(1)
        else:
            places.setdefault((reply.request, reply.reply), []).append(place)

    def fill(pair: tuple[str, str], judgement: Judgement) -> None:
        for place in places[pair]:
            judgements[place] = judgement
        tick(len(places[pair]))

    remaining = []
    for pair in places:
        kept = None if store is None else _kept(store, name, pair)
        if kept is None:
            remaining.append(pair)
        else:
            fill(pair, kept)
    judge = _made(name, make) if remaining else None
    for start in range(0, len(remaining), BATCH):
        batch = remaining[start : start + BATCH]
        if isinstance(judge, Judgement):
            answers = [judge] * len(batch)
        else:
            assert judge is not None
            answers = assessed_all(judge, batch)
        if store is not None:
            _keep(store, name, batch, answers)
        for pair, judgement in zip(batch, answers, strict=True):
            fill(pair, judgement)
    return judgements


def _made(name: str, make: Callable[[], Judge]) -> Judge | Judgement:
    """The judge, or the failed judgement of all replies where it cannot be made."""
    try:
        return make()
    except Exception as error:  # no model, no memory, no library
        return Judgement(Verdict.UNSCORED, failure(name, error), failed=True)


def _key(judge: str, pair: tuple[str, str]) -> str:
    made_of = _weights(judge)
    return hashlib.sha256(json.dumps((__version__, judge, made_of, *pair)).encode()).hexdigest()


@cache
def _weights(judge: str) -> str:
    """Hex sha256 of the weights of the default judge; empty for others."""
    if judge != DEFAULT_JUDGE:
        return ""
    from cmrm.judges.small import SHIPPED

    content = files("cmrm.judges").joinpath("weights", SHIPPED).read_bytes()
    return hashlib.sha256(content).hexdigest()


def _kept(store: TextStore, judge: str, pair: tuple[str, str]) -> Judgement | None:
    """A judgement of an earlier run; None where there is none that can be read."""
    try:
        values = json.loads(store.get(_key(judge, pair)) or "null")
        return (
            None
            if values is None
            else Judgement(**{**values, "verdict": Verdict(values["verdict"])})
        )
    except (sqlite3.Error, ValueError, TypeError, LookupError):
        return None


def _keep(
    store: TextStore,
    judge: str,
    pairs: Sequence[tuple[str, str]],
    judgements: Sequence[Judgement],
) -> None:
    """Store verdicts; what is unscored is asked again, since another answer may be readable."""
    texts = {
        _key(judge, pair): json.dumps(asdict(judgement))
        for pair, judgement in zip(pairs, judgements, strict=True)
        if judgement.verdict is not Verdict.UNSCORED
    }
    try:
        store.put(texts)
    except sqlite3.Error as error:
        raise InputError(
            f"verdicts cannot be kept in {store.path}: {error}; those kept so far are not lost"
        ) from None


def failure_of_all(replies: Sequence[GivenReply], judgements: Judgements) -> str | None:
    """The first reason where every verdict that was asked for failed; None where one did not.

    Replies that are missing are not asked about.
    """
    asked = [
        judgement
        for row in judgements.values()
        for reply, judgement in zip(replies, row, strict=True)
        if judgement is not None and reply.missing is None
    ]
    return asked[0].reason if asked and all(judgement.failed for judgement in asked) else None


def training_notes(
    makers: Mapping[str, Callable[[], Judge]], paths: Mapping[str, Path]
) -> dict[str, list[str]]:
    """Name of a file -> which of the package's judges were trained on this very file.

    `paths`: of the files, by name.
    """
    notes: dict[str, list[str]] = {}
    for name, make in makers.items():
        judge = None if ":" in name else _made(name, make)  # a colon names somebody's model
        if judge is None or isinstance(judge, Judgement):
            continue
        for file, path in paths.items():
            if trained_on(judge, [path]):
                notes.setdefault(file, []).append(
                    f"{name} was trained on these very replies: its rates are flattered here"
                )
    return notes


def write_verdicts(path: Path, replies: Sequence[GivenReply], judgements: Judgements) -> None:
    """Write one JSON line per reply and judge: where the reply is, and what the judge says of it.

    Requests and replies themselves are not written.

    Raises:
        InputError: the file cannot be written.
    """
    lines = [
        json.dumps(_verdict_line(reply, judge, judgement), ensure_ascii=False)
        for place, reply in enumerate(replies)
        for judge, row in judgements.items()
        if (judgement := row[place]) is not None
    ]
    try:
        with atomic_path(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None


def _verdict_line(reply: GivenReply, judge: str, judgement: Judgement) -> dict[str, Any]:
    return {
        "file": reply.file, "row": reply.number, "model": reply.model, "kind": reply.kind,
        "category": reply.category, "language": reply.language, "judge": judge,
        "verdict": judgement.verdict.value, "reason": judgement.reason,
        "failed": judgement.failed, "refusal": _rounded(judgement.refusal),
        "engagement": _rounded(judgement.engagement),
    }  # fmt: skip


def _rounded(probability: float | None) -> float | None:
    return None if probability is None else round(probability, 6)
