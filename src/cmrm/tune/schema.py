"""The form of `tune.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cmrm.measure.documents import read_document, validated
from cmrm.measure.schema import ModelInfo, Part, RateCell

SCHEMA: Literal["cmrm-tune/1"] = "cmrm-tune/1"
"""Of every file; a reader refuses another number."""


class JudgeRates(Part):
    """Rates of one setting by one judge."""

    unsafe: RateCell | None = Field(description="over the harmful dev samples")
    over_refusal: RateCell | None = Field(description="over the benign ones")


class Rates(Part):
    """What was measured of one setting on the dev set."""

    judges: dict[str, JudgeRates]
    accuracy: RateCell | None = Field(description="over the questions; null without any")
    generic: RateCell | None = Field(description="generic answers among those that do not refuse")


class ProxyOdds(Part):
    """How probable it is that a reply begins like a refusal; one forward pass a request."""

    harmful: float = Field(description="mean log-odds over harmful dev samples")
    benign: float = Field(description="mean log-odds over benign ones")
    apart: float = Field(description="mean probability over harmful minus that over benign ones")


class TrialRow(Part):
    """One setting."""

    number: int = Field(description="of the trial; numbers may be missing between two")
    state: Literal["finished", "pruned", "failed"]
    origin: Literal["default", "proxy", "search"] = Field(
        description="the defence's default; chosen by the proxy out of random points; the sampler's"
    )
    settings: dict[str, Any] = Field(description="all of the defence's")
    rates: Rates | None = Field(description="on the whole dev set; null where it is not finished")
    partial: list[float] | None = Field(description="objectives on the partial set")
    proxy: ProxyOdds | None
    seconds: float
    reason: str | None = Field(description="why it was pruned, or failed")


class Correlation(Part):
    """Spearman's rank correlation of the proxy and a rate over finished trials."""

    rho: float | None
    p_value: float | None
    n: int
    reason: str | None = Field(description="why there is none")


class LimitsRow(Part):
    """What a setting may cost beside the untouched model, as shares."""

    over_refusal_gain: float
    accuracy_loss: float


class Tuned(Part):
    """The whole file."""

    schema_: Literal["cmrm-tune/1"] = Field(alias="schema")
    model: ModelInfo
    defense: str
    judges: list[str] = Field(description="the first one's rates are the objectives")
    objectives: list[str] = Field(description="each to be small; unscored replies count against")
    limits: LimitsRow
    space: list[dict[str, Any]] = Field(description="settings that were varied, and their ranges")
    samples: dict[str, int] = Field(description="anchors and dev samples by kind")
    untouched: Rates = Field(description="the model with the image and without the defence")
    trials: list[TrialRow]
    frontier: list[int] = Field(description="trials that no other one dominates, safest first")
    chosen: int | None = Field(description="trial; null where none meets the limits")
    runner_up: int | None
    nearest: int | None = Field(description="where none meets the limits, the one nearest to it")
    reason: str
    proxy: dict[Literal["unsafe", "over_refusal"], Correlation] = Field(
        description="log-odds on harmful samples and the unsafe rate; on benign ones and "
        "over-refusal"
    )
    settings: dict[str, dict[str, Any]] = Field(
        description="the chosen setting under NAME@tuned, as `cmrm evaluate --settings` takes it"
    )
    artifact: str | None = Field(description="file beside this one; null where there is none")
    seconds: float = Field(description="of the whole study")
    budget: float | None = Field(
        description="seconds that the last call was given for the whole study; null: no limit"
    )
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any]


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """A document in its schema, as JSON values.

    Raises:
        InputError: it has another form.
    """
    return validated(Tuned, {"schema": SCHEMA, **values}, "this is no result of `cmrm tune`")


def read_tuned(path: Path) -> dict[str, Any]:
    """A file `tune.json`.

    Raises:
        InputError: it is missing, damaged, or of another schema.
    """
    return checked(read_document(path, SCHEMA, "result of `cmrm tune`"))
