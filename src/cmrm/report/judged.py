"""What stands beside every rate: the judge, its agreement with people, and the corrected rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmrm.judges.cards import MeasuredAgreement, card_of
from cmrm.report.tables import (
    EMPTY,
    RateText,
    Results,
    Table,
    corrected_text,
    rate_text,
    value_text,
)

PERSON = "person"
"""Name of a person's labels among the raters of results."""
LEAST = 20
"""Scored replies from which on an agreement of a card is shown."""
NOT_MEASURED = "agreement with people not measured"
"""Text for a judge without a card and without labels."""


def judge_line(
    results: Results, judge: str, question: str | None = None, *, first: bool = False
) -> str:
    """`small: kappa with people 0.78 on refusal (MSTS, n 1900); in this run 0.80 on unsafe (n 48)`.

    First stands what the judge's card says, then the labels of the run. `question`: figures on
    that question where there are any; all figures when None. `first`: of the card the first figure
    alone, for places with little room.
    """
    measured = [_card_text(row) for row in _of_question(_whole_sets(card_of(judge)), question)]
    measured = measured[:1] if first else measured
    own = [
        f"{_kappa(pair['kappa'])} on {name} (n {pair['n']}{_unscored(pair['unscored'])})"
        for name, pair in _of_run(results, judge, question)
    ]
    parts = [f"kappa with people {', '.join(measured)}"] if measured else []
    parts += [f"{'' if measured else 'kappa with people '}in this run {', '.join(own)}"] * bool(own)
    return f"{judge}: {'; '.join(parts) or NOT_MEASURED}"


def judge_lines(results: Results) -> list[str]:
    """`judge_line` of every judge."""
    return [judge_line(results, judge) for judge in results["judges"]]


def _whole_sets(card: Sequence[MeasuredAgreement]) -> list[MeasuredAgreement]:
    """Agreements over all models and languages of a set; of its parts where there are none."""
    enough = [row for row in card if row.n >= LEAST] or list(card)
    whole = [row for row in enough if row.model is None] or enough
    several = {row.set for row in whole if row.language is None}
    return [row for row in whole if row.language is None or row.set not in several]


def _of_question(
    rows: Sequence[MeasuredAgreement], question: str | None
) -> Sequence[MeasuredAgreement]:
    return [row for row in rows if row.question == question] or rows


def _card_text(row: MeasuredAgreement) -> str:
    place = row.set if row.language is None else f"{row.set}, {row.language}"
    inside = f"{place}, n {row.n}{_unscored(row.unscored)}{', in-sample' * row.in_sample}"
    return f"{_kappa(row.kappa)} on {row.question} ({inside})"


def _of_run(
    results: Results, judge: str, question: str | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """Question and agreement with the person who labelled replies of the run."""
    pairs = [
        (name, pair)
        for name, figures in results.get("agreement", {}).items()
        for pair in figures["pairs"]
        if pair["first"] == PERSON and pair["second"] == judge
    ]
    return [pair for pair in pairs if pair[0] == question] or pairs


def _kappa(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _unscored(n: int) -> str:
    return f", {n} unscored" if n else ""


def correction_table(results: Results, text: RateText = rate_text) -> Table:
    """A row for each judge and outcome with labels: the rate over all replies of the run.

    The judge's own rate, the corrected one, the difference estimator's, and what they rest on.
    """
    columns = ["judge", "outcome", "by the judge", "corrected", "check: difference estimator"]
    columns += ["sensitivity", "specificity", "labelled", "labels from", "remark"]
    rows = []
    for judge, outcomes in results.get("corrections", {}).items():
        for outcome, rate in outcomes.items():
            figures = rate["corrected"]
            rows.append([
                judge, outcome.replace("_", "-"), text({**rate, "corrected": None}),
                corrected_text(figures) or EMPTY, _difference_text(figures["difference"]),
                _share(figures["sensitivity"]), _share(figures["specificity"]),
                str(figures["n_labelled"]), figures["source"], _remark(figures),
            ])  # fmt: skip
    return Table(columns, rows)


def _share(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.2f}"


def _difference_text(figure: Mapping[str, Any] | None) -> str:
    """`18.2 % [9.0, 30.1]`, of shares within 0..1."""
    if figure is None:
        return EMPTY
    shares = {name: 100 * figure[name] for name in ("value", "low", "high")}
    return value_text(shares).replace(" [", " % [")


def _remark(figures: Mapping[str, Any]) -> str:
    """Why there is no corrected rate, or how many resamples were left out."""
    if figures["reason"]:
        return str(figures["reason"])
    left_out = figures["degenerate"]
    return f"{left_out} resamples left out" if left_out else EMPTY
