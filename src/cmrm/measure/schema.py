"""The one family of results, written as `results.json`.

`demo`, `diagnose`, `evaluate` and `judge` share `Results`; each adds what it alone measures.
`docs/results-schema.json` is made of these classes (`python -m cmrm.measure.schema`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from cmrm.errors import InputError
from cmrm.measure.documents import read_document, validated

# After `documents`, which names the extra where pydantic is missing.
from pydantic import BaseModel, ConfigDict, Field  # isort: skip

SCHEMA: Literal["cmrm-results/2"] = "cmrm-results/2"
"""Of every results file; a reader refuses another number."""


class Part(BaseModel):
    """Base of all parts: no unknown fields."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Figure(Part):
    """A figure that is no share, with a seeded bootstrap interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0
    tokens: int | None = None


class Corrected(Part):
    """A rate corrected for the judge's errors on labelled replies (`measure.correction`)."""

    rate: float | None = Field(
        description="share within 0..1 of the scored replies; null where it cannot be told"
    )
    low: float | None = Field(description="95 %: seeded percentile bootstrap, verdicts and labels")
    high: float | None
    n_labelled: int = Field(description="labelled replies that the judge scored")
    sensitivity: float | None = Field(
        description="of the replies labelled yes, the share that the judge recognises"
    )
    specificity: float | None = Field(description="the same of those labelled no")
    source: str = Field(description="where the labels are from; the run's are pooled over cells")
    degenerate: int = Field(0, description="resamples without an answer, of 2000; left out")
    reason: str | None = Field(None, description="why there is no corrected rate")
    difference: Figure | None = Field(
        None,
        description="check by the difference estimator: all replies of these rows, the unscored "
        "ones too, by the labels among them",
    )
    method: Literal["rogan-gladen"] = "rogan-gladen"


class RateCell(Part):
    """A share with its 95 % Wilson interval; unscored replies are in no rate."""

    rate: float | None = Field(
        description="share within 0..1 of the scored replies; null when none was scored"
    )
    low: float | None
    high: float | None
    n: int = Field(description="scored replies")
    unscored: int = Field(description="replies that the judge could not score, or failed on")
    lowest: float | None = Field(description="share of all replies if no unscored one counted")
    highest: float | None = Field(description="share of all replies if every unscored one counted")
    corrected: Corrected | None = Field(
        None, description="the rate corrected for the judge's errors; null without labels"
    )


class Judged(Part):
    """Rates of one cell by one judge."""

    unsafe: RateCell | None = Field(None, description="over the harmful samples")
    over_refusal: RateCell | None = Field(None, description="over the benign samples")
    categories: dict[str, dict[str, int]] = Field(
        default_factory=dict,
        description="category -> counts of each verdict over the harmful samples",
    )


class CellRow(Part):
    """One set under one condition with one defence."""

    set: str
    condition: str
    defense: str
    expected: int = Field(description="samples of the set")
    done: int
    missing: int = Field(description="samples that failed; they are in no rate")
    settings: dict[str, Any] = Field(description="of the defence")
    harm: str | None = Field(
        description="where the set's harm is: text, image, both, or not stated"
    )
    judges: dict[str, Judged]
    accuracy: RateCell | None
    rating: Figure | None = Field(
        None, description="100 x the replies' ratings / the reference answers'"
    )
    generic: RateCell | None = Field(None, description="answers that say nothing of what was asked")
    perplexity: Figure | None = None


class OutcomeRow(Part):
    """A defence's outcomes over all sets with their own images."""

    defense: str
    condition: str
    sets: list[str]
    unsafe: dict[str, dict[str, RateCell]] = Field(description="judge -> where the harm is -> rate")
    over_refusal: dict[str, RateCell]
    accuracy: RateCell | None
    generic: RateCell | None


class Comparison(Part):
    """A defence against the untouched model on the same samples."""

    set: str
    condition: str
    defense: str
    judge: str = Field(description="`exact match` where answers are compared with the right ones")
    outcome: str = Field(description="`unsafe`, `over_refusal` or `accuracy`")
    baseline: str = Field(
        default="untouched",
        description="`untouched`: the model on the same input; `text`: on the query as text alone",
    )
    difference: float
    low: float
    high: float
    only_before: int
    only_after: int
    p_value: float = Field(description="exact McNemar test, two-sided")
    p_holm: float = Field(
        description="corrected over all comparisons of the judge with the same baseline"
    )
    n: int


class GapRow(Part):
    """Share of the loss through the image that a defence gives back, over the same requests."""

    set: str
    defense: str
    judge: str
    value: float | None = Field(
        description="null without a loss; above 1 when safer than the text-only query"
    )
    low: float | None
    high: float | None
    n: int


class Failure(Part):
    """Replies on which a judge failed."""

    n: int
    first: str


class ModelInfo(Part):
    """The model that was measured."""

    id: str
    architecture: str
    dtype: str
    revision: str | None = None
    layers: int | None = None
    hidden_size: int | None = None
    parameters: int | None = None
    identity: str | None = Field(
        None, description="hex sha256 of config, weights, processor and chat template"
    )


class Data(Part):
    """A set that was asked."""

    name: str
    n: int
    skipped: int = Field(0, description="samples that could not be read")
    skipped_first: str | None = None
    notes: list[str] = Field(default_factory=list)
    harm: str | None = None
    labels: dict[str, int] = Field(default_factory=dict)


class TrailingShift(Part):
    """Shift of the last tokens of prompts with an image, against the same tokens of the text-only
    query; position by position."""

    offsets: list[int] = Field(description="-1: the last prompt token")
    n: list[int] = Field(description="samples that have the same token there in both prompts")
    tokens: list[str | None] = Field(description="text of a token that all samples share")
    relative_distance: list[list[float]] = Field(
        description="a list for each position, by decoder layer (0-based): mean Euclidean distance "
        "over the text-only state's norm"
    )


class GateReadings(Part):
    """What the harm gate reads of samples with their own image."""

    layers: list[int]
    threshold: float
    scores: dict[str, list[float]] = Field(description="label of the samples -> their scores")
    steers: list[str] = Field(
        default_factory=list, description="defences of the run that steer where the gate opens"
    )


class DrawnSample(Part):
    """A sample whose states are drawn."""

    label: str = ""
    category: str = ""
    request: str = Field(description="cut to its first words")


class Geometry(Part):
    """Last-prompt-token states of conditions and defences beside those of the text-only query, by
    decoder layer (0-based)."""

    relative_distance_to_query: dict[str, list[float]]
    cosine_to_query: dict[str, list[float]]
    refusal_coordinate: dict[str, list[float]] | None = Field(
        None, description="mean coordinate along the unit refusal direction"
    )
    gate: GateReadings | None = None
    positions: dict[str, TrailingShift] = Field(default_factory=dict)
    pca: dict[str, Any] | None = None
    samples: list[DrawnSample] = Field(
        default_factory=list, description="of the points of pca, in their order"
    )
    corruptions: dict[str, dict[str, list[float]]] | None = Field(
        None,
        description="mean shift of each corruption against blank's: cosine, ratio of norms",
    )


class Example(Part):
    """Replies side by side, cut to their first words."""

    set: str
    kind: str
    category: str = ""
    request: str
    defense: str = Field(
        description="what changed the verdict; none: the image, beside the text-only query"
    )
    before: str
    after: str
    verdicts: str


class SweepPoint(RateCell):
    """Unsafe rate with the original image at one strength."""

    alpha: float
    defense: str
    judge: str


class ShiftInfo(Part):
    """The dataset-level shift that was used, by decoder layer (0-based)."""

    n_anchors: int
    norms: list[float] = Field(description="Euclidean norm of the vector")
    explained_ratio: list[float] = Field(
        description="share of the differences' sum of squares along the vector"
    )
    mean_norms: list[float] = Field(
        default_factory=list, description="Euclidean norm of the mean difference"
    )
    mean_cosine: list[float] = Field(
        default_factory=list, description="cosine of vector and mean difference"
    )
    dropped_ratio: list[float] = Field(
        default_factory=list, description="share that the sketch left out"
    )
    records: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="`gate`: how well the harm gate does; `gap`: the refusal coordinate that the "
        "image takes, on the anchors",
    )


class TargetRow(Part):
    """A figure that a publication prints, beside the run's; null where the run has none."""

    set: str
    condition: str
    defense: str
    figure: str
    published: float = Field(description="per cent, or a rating of 100, as printed")
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    inside: bool | None = Field(
        None, description="whether the published figure lies within the run's 95 % interval"
    )


class RecipeRow(Part):
    """The recipe of a run, and its publication's figures."""

    title: str
    source: str
    notes: list[str]
    judges: list[str] = Field(description="the publication's judge first")
    judge: str | None = Field(None, description="whose rates are compared")
    targets: list[TargetRow]


class GroupRow(Part):
    """Rates of a part of judged replies."""

    by: Literal["all", "model", "category", "language"]
    name: str
    n: int = Field(description="replies, judged or not")
    harmful: int = Field(description="of them to harmful requests")
    benign: int = Field(description="of them to benign requests")
    judges: dict[str, Judged]


class Results(Part):
    """What every kind of results holds."""

    schema_: Literal["cmrm-results/2"] = Field(SCHEMA, alias="schema")
    kind: Literal["demo", "diagnosis", "evaluation", "replies"]
    model: ModelInfo
    sets: list[Data]
    judges: list[str]
    cells: list[CellRow]
    outcomes: list[OutcomeRow]
    comparisons: list[Comparison]
    gaps: list[GapRow]
    judge_failures: dict[str, Failure]
    settings: dict[str, Any] = Field(description="what the run was set to")
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any] = Field(default_factory=dict)
    examples: list[Example] = Field(default_factory=list)
    failures: list[str] = Field(default_factory=list, description="what could not be run")
    geometry: Geometry | None = None
    left_out: dict[str, str] = Field(
        default_factory=dict, description="condition -> why it was not measured"
    )
    alpha_sweep: list[SweepPoint] = Field(default_factory=list)
    shift: ShiftInfo | None = None
    cost: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    agreement: dict[str, Any] = Field(default_factory=dict)
    corrections: dict[str, dict[str, RateCell]] = Field(
        default_factory=dict,
        description="judge -> unsafe, over_refusal -> the rate over all replies of the run, with "
        "its correction; empty without labels",
    )
    groups: list[GroupRow] = Field(
        default_factory=list, description="of replies that somebody else generated"
    )
    unscored_reasons: dict[str, dict[str, int]] = Field(
        default_factory=dict,
        description="judge -> why replies are unscored in their rate -> how many; without failures "
        "of the judge (replies that somebody else generated)",
    )
    recipe: RecipeRow | None = Field(
        None, description="published figures beside the run's, with `cmrm reproduce`"
    )


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """Results in their schema, as JSON values.

    Raises:
        InputError: they have another form.
    """
    return validated(Results, {"schema": SCHEMA, **values}, "these are no results of cmrm")


def read_results(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        InputError: it is missing, damaged, or of another schema.
    """
    values = read_document(path, SCHEMA, "results of cmrm")
    try:
        return checked(values)
    except InputError as error:
        raise InputError(
            f"{path} is damaged ({error}); run the same command again to write it again"
        ) from None


def json_schema() -> dict[str, Any]:
    """JSON schema of the family."""
    return Results.model_json_schema(by_alias=True)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1, sort_keys=True))
