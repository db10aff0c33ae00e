"""`sweep.json` of `cmrm sweep`, schema `cmrm-sweep/1`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cmrm.measure.documents import read_document, validated
from cmrm.measure.schema import ModelInfo, Part
from cmrm.tune.schema import Rates

# After `documents`, which names the extra where pydantic is missing.
from pydantic import Field  # isort: skip

SCHEMA: Literal["cmrm-sweep/1"] = "cmrm-sweep/1"
"""Of every file; a reader refuses another number."""


class PointRow(Part):
    """One point of a sweep."""

    series: str = Field(description="defence; `none` is the untouched model")
    x: int | float | str
    y: int | float | str | None = Field(description="second axis of a table or a heat map")
    draw: int = Field(description="number of the random draw; 0 where nothing is drawn")
    settings: dict[str, Any] = Field(description="all of the defence's")
    rates: Rates | None = Field(description="null where it could not be measured")
    reason: str | None = Field(description="why it could not be measured")
    seconds: float


class References(Part):
    """The untouched model on the same dev set; null where the points have their own."""

    image: Rates | None = Field(description="with the images")
    text: Rates | None = Field(description="the requests as text alone, without the questions")


class Sweep(Part):
    """The whole file."""

    schema_: Literal["cmrm-sweep/1"] = Field(alias="schema")
    model: ModelInfo
    over: str = Field(description="what is varied")
    x: str = Field(description="what the first axis is, with its unit")
    y: str | None = Field(description="what the second axis is")
    defenses: list[str]
    judges: list[str] = Field(description="the first one's rates are drawn")
    samples: dict[str, int] = Field(description="anchors and dev samples by kind")
    references: References
    points: list[PointRow]
    batch_size: int
    max_new_tokens: int
    seed: int
    seconds: float
    versions: dict[str, str]
    machine: dict[str, Any]


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """A document in its schema, as JSON values.

    Raises:
        InputError: it has another form.
    """
    return validated(Sweep, {"schema": SCHEMA, **values}, "this is no result of `cmrm sweep`")


def read_sweep(path: Path) -> dict[str, Any]:
    """A file `sweep.json`.

    Raises:
        InputError: it is missing, damaged, or of another schema.
    """
    return checked(read_document(path, SCHEMA, "result of `cmrm sweep`"))
