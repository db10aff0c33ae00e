"""One setting measured on the dev set, with the loop that every command measures with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cmrm.defenses import Defense
from cmrm.engines.base import Decoding, Engine
from cmrm.errors import InputError
from cmrm.judges import Judge
from cmrm.measure.loop import Answering, measure_cell
from cmrm.measure.outcomes import Cell, joined
from cmrm.measure.store import ReplyStore
from cmrm.measure.table import cell_row
from cmrm.prompts.conditions import Condition
from cmrm.tune.choose import Objectives
from cmrm.tune.sets import Dev

ANSWER_TOKENS = 16
"""Length limit of an answer to a question that has a reference answer."""
OUTCOMES = ("unsafe", "over_refusal", "accuracy")
"""The figures that are objectives, in their order."""


@dataclass(frozen=True)
class Bench:
    """Engine, judges and store of one study."""

    engine: Engine
    """Where the model answers."""
    judges: Mapping[str, Judge]
    """By name; the first one's rates are the objectives."""
    store: ReplyStore | None = None
    """Keeps replies, so that nothing is generated twice."""
    batch_size: int = 16
    """Requests a batch."""
    max_new_tokens: int = 48
    """Length limit of a reply."""
    seed: int = 0
    """Seed of what defences draw."""
    tick: Callable[[int], None] = field(default=lambda n: None)
    """Called after each batch with its number of requests."""

    def cell(self, dev: Dev, defense: Defense, condition: Condition = Condition.ORIGINAL) -> Cell:
        """Judged replies to the samples; harmful, benign and others are never in one batch."""
        return joined([
            measure_cell(
                Answering(self.engine, defense, Decoding(tokens), self.store), part, self.judges,
                name="dev", condition=condition, batch_size=self.batch_size, seed=self.seed,
                on_batch=self.tick,
            )
            for part, tokens in (
                (dev.harmful, self.max_new_tokens), (dev.benign, self.max_new_tokens),
                (dev.questions, min(ANSWER_TOKENS, self.max_new_tokens)),
            )
            if part
        ])  # fmt: skip

    def rates(self, cell: Cell) -> dict[str, Any]:
        """Unsafe rate and over-refusal by judge, accuracy and generic answers, each in the form of
        `measure.rates.Rate`; what has no samples is None."""
        row = cell_row(cell, self.judges)
        by_judge = {
            name: {figure: judged.get(figure) for figure in OUTCOMES[:2]}
            for name, judged in row["judges"].items()
        }
        return {"judges": by_judge, "accuracy": row["accuracy"], "generic": row["generic"]}

    def objectives(self, rates: Mapping[str, Any]) -> Objectives:
        """Unsafe rate, over-refusal and 1 - accuracy of `rates`, by the first judge.

        Unscored replies count as unsafe, and as refusals: a model that a setting breaks must not
        look safe because nothing can be said of its replies.
        """
        figures = rates["judges"][next(iter(self.judges))]
        values = (figures["unsafe"]["highest"], figures["over_refusal"]["highest"])
        if rates["accuracy"] is None:
            return values
        return (*values, round(1.0 - rates["accuracy"]["rate"], 6))

    def check(self, rates: Mapping[str, Any]) -> None:
        """Refuse rates of the untouched model with which nothing can be compared.

        Raises:
            InputError: the first judge scored none of the replies to a kind of requests.
        """
        judge = next(iter(self.judges))
        figures = rates["judges"][judge]
        for figure, kind in (("unsafe", "harmful"), ("over_refusal", "benign")):
            if figures[figure] is None or figures[figure]["rate"] is None:
                raise InputError(
                    f"the judge {judge!r} scores none of the untouched model's replies to {kind} "
                    "requests, so that nothing can be compared; name another one first (--judges)"
                )


def sizes(dev: Dev) -> tuple[int, ...]:
    """Number of samples behind each objective."""
    return tuple(len(part) for part in dev.parts)
