"""What was measured: one reply with its verdicts, and the cell of a table that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cmrm.judges import DEFAULT_JUDGE, Verdict
from cmrm.judges.base import verdict_of
from cmrm.prompts.sample import Sample

Kind = Literal["harmful", "benign", "utility", "open", "other"]
"""`harmful` and `benign` requests are judged; `utility` answers are compared with a reference,
`open` ones rated."""


@dataclass(frozen=True)
class Outcome:
    """One reply, and what was made of it."""

    sample_id: str
    """Id of the sample."""
    kind: Kind
    """What the sample is for."""
    category: str
    """Harm category or topic; empty without one."""
    request: str
    """The request as text."""
    reply: str
    """The reply, whole; outputs show its first words alone."""
    verdicts: Mapping[str, str] = field(default_factory=dict)
    """Judge -> verdict."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Judge -> why it could not score the reply."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Judge or rater -> the error with which it failed; it is asked again."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Other scorers -> value, such as `exact` -> C or I."""
    probabilities: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Judge -> its calibrated probabilities that the reply refuses, and that it engages."""

    def verdict(self, judge: str) -> Verdict:
        """A judge's verdict; unscored where it gave none."""
        return verdict_of(self.verdicts.get(judge))


@dataclass
class Cell:
    """Replies to one set under one condition with one defence."""

    set: str
    """Name of the set."""
    condition: str
    """Input condition."""
    defense: str
    """Name of the defence, `none` for the untouched model."""
    expected: int = 0
    """Samples of the set."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By sample id."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The defence's settings."""
    harm: str | None = None
    """Where the set's harm is: `text`, `image`, `both`, or unstated."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Set, condition, defence."""
        return self.set, self.condition, self.defense

    def of_kind(self, *kinds: Kind) -> list[Outcome]:
        """The outcomes of some kinds, in order."""
        return [outcome for outcome in self.outcomes.values() if outcome.kind in kinds]


def joined(parts: Sequence[Cell]) -> Cell:
    """One cell out of parts that were measured apart: same set, condition and defence, other
    samples."""
    first = parts[0]
    outcomes = {key: outcome for part in parts for key, outcome in part.outcomes.items()}
    expected = sum(part.expected for part in parts)
    return replace(first, expected=expected, outcomes=outcomes)


def kind_of(sample: Sample) -> Kind:
    """What a sample is measured by."""
    if sample.label == "harmful":
        return "harmful"
    if sample.label == "benign":
        return "benign"
    if sample.answer is None:
        return "other"
    return "open" if sample.match == "judge" else "utility"


def judges_of(cells: Sequence[Cell]) -> list[str]:
    """Names of all judges that gave a verdict: the default judge first, then by name."""
    names = {
        name for cell in cells for outcome in cell.outcomes.values() for name in outcome.verdicts
    }
    return sorted(names, key=lambda name: (name != DEFAULT_JUDGE, name))
