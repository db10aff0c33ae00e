"""`docs/results-schema.json` is made of the classes; `docs/results-schema.md` names every field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cmrm.measure.schema import (
    CellRow,
    DrawnSample,
    GateReadings,
    Geometry,
    Results,
    TrailingShift,
    json_schema,
)

DOCS = Path(__file__).parents[2] / "docs"


def test_the_json_schema_is_up_to_date() -> None:
    stored = json.loads((DOCS / "results-schema.json").read_text(encoding="utf-8"))
    remedy = "python -m cmrm.measure.schema > docs/results-schema.json"
    assert stored == json_schema(), remedy


def test_the_module_prints_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cmrm.measure.schema"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (DOCS / "results-schema.json").read_text(encoding="utf-8")


def test_the_page_on_the_schema_names_every_field() -> None:
    text = (DOCS / "results-schema.md").read_text(encoding="utf-8")
    for model in (Results, CellRow, Geometry, TrailingShift, GateReadings, DrawnSample):
        for name in model.model_fields:
            assert f"`{name.removesuffix('_')}" in text or f".{name.removesuffix('_')}" in text, (
                name
            )
