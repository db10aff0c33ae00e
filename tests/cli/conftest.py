"""A set of four labelled samples with images, and an artifact that was estimated on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cli.commands import json_of


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for place, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20 + place, 16), colour).save(folder / f"{colour}.png")
        rows.append(
            {
                "query": f"Tell me about {colour}",
                "image": f"{colour}.png",
                "caption": f"a {colour} wall",
                "label": "benign" if place % 2 else "harmful",
            }
        )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.fixture(scope="session")
def artifact(checkpoint: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shift") / "shift.safetensors"
    json_of(
        "extract",
        checkpoint,
        "--anchors",
        data,
        "-o",
        target,
        "--alpha",
        0.5,
        "--layers",
        "0-1",
        "--json",
    )
    return target
