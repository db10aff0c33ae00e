"""Results of given replies: rates by model, category and language, reasons, agreement."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cmrm.measure.agreement import agreement_between, rated_of
from cmrm.measure.environment import machine_info, versions_info
from cmrm.measure.judged import Judgements
from cmrm.measure.outcomes import Cell, Outcome
from cmrm.measure.rates import counts_as, verdict_rate
from cmrm.measure.replies import GivenReply, ReplyFile
from cmrm.measure.schema import checked
from cmrm.measure.table import OUTCOMES, judge_failures

NAMED_MODELS = 3
"""Models that the results name in one line at most."""


def results_of_replies(
    files: Sequence[ReplyFile],
    judgements: Judgements,
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Rates of judged replies, in the form of `measure.schema.Results`.

    All together, and by model, category and language where the files tell several apart.

    Args:
        files: the replies.
        judgements: of the replies of all files, in their order.
        notes: file -> what else a reader has to know of it.
    """
    replies = [reply for file in files for reply in file.replies]
    outcomes = [_outcome(reply, judgements, place) for place, reply in enumerate(replies)]
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    whole = Cell(name, "given", "none", len(outcomes), {o.sample_id: o for o in outcomes})
    models = list(dict.fromkeys(reply.model for reply in replies))
    more = f" and {len(models) - NAMED_MODELS} more" if models[NAMED_MODELS:] else ""
    return checked({
        "kind": "replies",
        "model": {
            "id": ", ".join(models[:NAMED_MODELS]) + more,
            "architecture": "not loaded", "dtype": "not loaded",
        },
        "sets": [_data(file, (notes or {}).get(file.name, ())) for file in files],
        "judges": list(judgements),
        "cells": [], "outcomes": [], "comparisons": [], "gaps": [],
        "groups": _groups(replies, outcomes, list(judgements)),
        "unscored_reasons": unscored_reasons(replies, judgements),
        "judge_failures": judge_failures([whole]),
        "agreement": agreement_between(rated_of([whole])) if len(judgements) > 1 else {},
        "settings": {
            "judges": list(judgements), "columns": {f.name: dict(f.columns) for f in files}
        },
        "seed": 0,
        "versions": versions_info(),
        "machine": machine_info(),
    })  # fmt: skip


def _outcome(reply: GivenReply, judgements: Judgements, place: int) -> Outcome:
    judged = {name: j for name, row in judgements.items() if (j := row[place]) is not None}
    return Outcome(
        reply.id, reply.kind, reply.category, reply.request, reply.reply,
        {name: j.verdict.value for name, j in judged.items()},
        {name: j.reason for name, j in judged.items() if j.reason and not j.failed},
        {name: j.reason for name, j in judged.items() if j.reason and j.failed},
        probabilities={n: pair for n, j in judged.items() if (pair := j.probabilities) is not None},
    )  # fmt: skip


def _data(file: ReplyFile, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "name": file.name,
        "n": len(file.replies),
        "skipped": len(file.left_out),
        "skipped_first": file.left_out[0] if file.left_out else None,
        "labels": dict(Counter(reply.kind for reply in file.replies)),
        "notes": [*notes, *file.notes],
    }


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
    kinds = Counter(outcome.kind for outcome in outcomes)
    return {
        "by": by,
        "name": name,
        "n": len(outcomes),
        "harmful": kinds["harmful"],
        "benign": kinds["benign"],
        "judges": {
            judge: {
                rate: verdict_rate(
                    [outcome.verdict(judge) for outcome in outcomes if outcome.kind == kind],
                    counted,
                ).to_json()
                for rate, kind, counted in OUTCOMES
                if kinds[kind]  # type: ignore[index]
            }
            for judge in judges
        },
    }


_COUNTED = {kind: counted for _, kind, counted in OUTCOMES}
"""Kind of request -> the verdict that its rate counts."""
_FIGURE = re.compile(r" is \d\.\d+,")


def unscored_reasons(
    replies: Sequence[GivenReply], judgements: Judgements
) -> dict[str, dict[str, int]]:
    """Judge -> why replies are unscored in their rate, and how many; the most frequent first.

    Replies on which the judge failed are not among them. Probabilities inside a reason are left
    out, so that like reasons are counted together.
    """
    return {
        name: dict(
            Counter(
                _FIGURE.sub(" is", judgement.reason or "no reason is on record")
                for reply, judgement in zip(replies, row, strict=True)
                if judgement is not None
                and not judgement.failed
                and counts_as(judgement.verdict, _COUNTED[reply.kind]) is None
            ).most_common()
        )
        for name, row in judgements.items()
    }
