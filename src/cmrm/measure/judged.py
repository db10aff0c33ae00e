"""Given replies, judged: verdicts on disk, rates by model, category and language, results."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmrm import __version__
from cmrm.files import atomic_path
from cmrm.judges import Judge, Judgement, Verdict
from cmrm.judges.base import assessed_all
from cmrm.measure.agreement import agreement_between, rated_of
from cmrm.measure.environment import machine_info, versions_info
from cmrm.measure.outcomes import Cell, Outcome
from cmrm.measure.replies import GivenReply
from cmrm.measure.schema import checked
from cmrm.measure.table import cell_row, results_of
from cmrm.store import TextStore

BATCH = 64
"""Replies that a judge is asked about at once."""
GIVEN = "given"
"""Condition of replies that somebody else generated."""
ASKED = ("harmful", "benign")
"""Kinds of requests whose replies are judged."""


def judge_replies(
    replies: Sequence[GivenReply],
    judges: Mapping[str, Judge],
    *,
    store: TextStore | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, list[Judgement | None]]:
    """Judge -> its judgement of each reply; None for replies that are neither harmful nor benign.

    Args:
        replies: what is judged.
        judges: by name.
        store: keeps judgements, so that a run that was stopped continues. A judgement of a judge
            that failed is not kept: the judge is asked again.
        tick: called with the number of verdicts that were given.
    """
    wanted = [k for k, reply in enumerate(replies) if reply.kind in ASKED]
    judgements: dict[str, list[Judgement | None]] = {}
    for name, judge in judges.items():
        given: list[Judgement | None] = [None] * len(replies)
        open_: list[int] = []
        for k in wanted:
            given[k] = _stored(store, name, replies[k])
            if given[k] is None:
                open_.append(k)
        tick(len(wanted) - len(open_))
        for start in range(0, len(open_), BATCH):
            batch = open_[start : start + BATCH]
            results = assessed_all(judge, [(replies[k].request, replies[k].reply) for k in batch])
            for k, judgement in zip(batch, results, strict=True):
                given[k] = judgement
            if store is not None:
                store.put({
                    _key(name, replies[k]): json.dumps(asdict(judgement))
                    for k, judgement in zip(batch, results, strict=True)
                    if not judgement.failed
                })  # fmt: skip
            tick(len(batch))
        judgements[name] = given
    return judgements


def _key(judge: str, reply: GivenReply) -> str:
    parts = (__version__, judge, reply.request, reply.reply)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stored(store: TextStore | None, judge: str, reply: GivenReply) -> Judgement | None:
    text = None if store is None else store.get(_key(judge, reply))
    if text is None:
        return None
    values = json.loads(text)
    return Judgement(**{**values, "verdict": Verdict(values["verdict"])})


def write_verdicts(
    path: Path, replies: Sequence[GivenReply], judgements: Mapping[str, Sequence[Judgement | None]]
) -> None:
    """Write one JSON line per verdict: where the reply stands, and what the judge says of it.

    Requests and replies themselves are not written.
    """
    lines = [
        json.dumps(
            {"file": reply.file, "row": reply.number, "model": reply.model, "kind": reply.kind,
             "category": reply.category, "language": reply.language, "judge": judge,
             "verdict": judgement.verdict.value, "reason": judgement.reason,
             "failed": judgement.failed, "refusal": judgement.refusal,
             "engagement": judgement.engagement},
            ensure_ascii=False,
        )
        for judge, given in judgements.items()
        for reply, judgement in zip(replies, given, strict=True)
        if judgement is not None
    ]  # fmt: skip
    with atomic_path(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def results_of_replies(
    replies: Sequence[GivenReply],
    judgements: Mapping[str, Sequence[Judgement | None]],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Rates of judged replies, in the form of `measure.schema.Results`.

    All together, and by model, category and language where the files tell several apart.
    """
    outcomes = [_outcome(reply, judgements, k) for k, reply in enumerate(replies)]
    files = list(dict.fromkeys(reply.file for reply in replies))
    name = files[0] if len(files) == 1 else f"{len(files)} files"
    whole = _cell(name, outcomes)
    models = list(dict.fromkeys(reply.model for reply in replies))
    rated = rated_of([whole])
    return checked({
        **results_of([whole], seed=seed),
        "kind": "replies",
        "model": {
            "id": ", ".join(models[:4]) + (f" and {len(models) - 4} more" if models[4:] else ""),
            "architecture": "replies as given", "dtype": "not loaded",
        },
        "sets": [_data(file, [r for r in replies if r.file == file]) for file in files],
        "groups": _groups(replies, outcomes, list(judgements)),
        "agreement": agreement_between(rated, {}) if len(judgements) > 1 and rated else {},
        "settings": {"judges": list(judgements)},
        "seed": seed,
        "versions": versions_info(),
        "machine": machine_info(),
    })  # fmt: skip


def _outcome(
    reply: GivenReply, judgements: Mapping[str, Sequence[Judgement | None]], place: int
) -> Outcome:
    given = {name: j for name, row in judgements.items() if (j := row[place]) is not None}
    return Outcome(
        reply.id, reply.kind, reply.category, reply.request, reply.reply,
        {name: j.verdict.value for name, j in given.items()},
        {name: j.reason for name, j in given.items() if j.reason and not j.failed},
        {name: j.reason for name, j in given.items() if j.reason and j.failed},
        probabilities={n: pair for n, j in given.items() if (pair := j.probabilities) is not None},
    )  # fmt: skip


def _cell(name: str, outcomes: Sequence[Outcome]) -> Cell:
    return Cell(name, GIVEN, "none", len(outcomes), {o.sample_id: o for o in outcomes})


def _data(file: str, replies: Sequence[GivenReply]) -> dict[str, Any]:
    labels = Counter(reply.kind for reply in replies)
    notes = []
    if labels["other"]:
        notes.append(
            f"{labels['other']} of {len(replies)} rows are labelled neither harmful nor benign: "
            "they are in no rate"
        )
    empty = sum(not reply.reply.strip() for reply in replies)
    if empty:
        notes.append(f"{empty} replies are empty: they are unscored")
    seen = Counter((reply.model, reply.request, reply.reply) for reply in replies)
    repeated = sum(count - 1 for count in seen.values())
    if repeated:
        notes.append(f"{repeated} rows repeat a request and reply of the same model: each counts")
    return {"name": file, "n": len(replies), "labels": dict(labels), "notes": notes}


def _groups(
    replies: Sequence[GivenReply], outcomes: Sequence[Outcome], judges: Sequence[str]
) -> list[dict[str, Any]]:
    """Rates of all replies, then by each property that tells several groups apart."""
    rows = [_group("all", "all replies", outcomes, judges)]
    for by in ("model", "category", "language"):
        groups: dict[str, list[Outcome]] = {}
        for reply, outcome in zip(replies, outcomes, strict=True):
            groups.setdefault(getattr(reply, by) or "not stated", []).append(outcome)
        if len(groups) > 1:
            rows += [_group(by, name, part, judges) for name, part in sorted(groups.items())]
    return rows


def _group(
    by: str, name: str, outcomes: Sequence[Outcome], judges: Sequence[str]
) -> dict[str, Any]:
    row = cell_row(_cell(name, outcomes), judges)
    return {"by": by, "name": name, "n": len(outcomes), "judges": row["judges"]}


def open_reasons(
    judgements: Mapping[str, Sequence[Judgement | None]],
) -> dict[str, list[tuple[str, int]]]:
    """Judge -> reasons of open questions and their numbers, the most frequent first.

    Figures inside a reason are left out, so that like reasons are counted together.
    """
    counted: dict[str, list[tuple[str, int]]] = {}
    for name, given in judgements.items():
        reasons = Counter(_without_figures(j.reason) for j in given if j is not None and j.reason)
        counted[name] = reasons.most_common()
    return counted


def _without_figures(reason: str) -> str:
    return re.sub(r" is \d\.\d+,", "", reason)
