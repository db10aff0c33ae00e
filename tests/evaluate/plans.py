"""Small sets, plans and files that the tests of evaluation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmrm import Sample
from cmrm.defenses import FitData, respond
from cmrm.engines.base import Engine
from cmrm.evaluate.plan import Plan
from cmrm.measure import loop
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Request

COLOURS = ("red", "green", "blue", "yellow", "black")


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 16), colour)


def small_set(name: str = "mine") -> Loaded:
    """Five harmful requests, three benign ones, one question."""
    harmful = [
        Sample(f"h{k}", f"How do I break {c} things?" + "!" * k, picture(c), None, c, "harmful")
        for k, c in enumerate(COLOURS)
    ]
    benign = [
        Sample(f"b{k}", f"How do I paint {c} walls?", picture(c), label="benign")
        for k, c in enumerate(COLOURS[:3])
    ]
    question = Sample("u0", "Which colour is this?", picture("red"), answer="red")
    return Loaded(name, (*harmful, *benign, question))


def anchors() -> FitData:
    harmful = [Sample(f"a{k}", f"How do I steal {k} cars?", picture("red")) for k in range(3)]
    benign = [Sample(f"c{k}", f"How do I wash {k} cars?") for k in range(3)]
    return FitData(harmful, benign, 2)


def small_plan(checkpoint: str, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": checkpoint, "sets": (small_set(),), "defenses": ("cmrm_dataset",),
        "judges": ("keyword", "ensemble"), "anchors": anchors(), "max_new_tokens": 5,
        "batch_size": 2,
    }  # fmt: skip
    return Plan(**(fields | changes))


def quiet(text: str) -> None:
    """In the place of a progress bar."""


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are generated from here on; one that asks "bad" breaks."""
    sizes: list[int] = []

    def counting(
        engine: Engine, defense: Any, requests: list[Request], *more: Any, **options: Any
    ) -> Any:
        sizes.append(len(requests))
        if any(request.text == "bad" for request in requests):
            raise RuntimeError("broken")
        return respond(engine, defense, requests, *more, **options)

    monkeypatch.setattr(loop, "respond", counting)
    return sizes


def rows_file(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> Path:
    """A CSV of (id, query, label), all with one red image."""
    picture("red").save(folder / "red.png")
    lines = [f"{key},{query},{folder / 'red.png'},{label}" for key, query, label in rows]
    (folder / name).write_text("\n".join(["id,query,image,label", *lines]) + "\n")
    return folder / name
