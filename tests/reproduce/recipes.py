"""Small recipes, and the data that they ask, for the tests of reproduction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

TARGET: dict[str, Any] = {
    "set": "vlsafe", "condition": "original", "defense": "none", "figure": "unsafe",
    "value": 100.0,
}  # fmt: skip


def vlsafe(folder: Path, n: int = 20) -> Path:
    """Rows in VLSafe's published layout, with pictures of our own."""
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for k in range(n):
        name = f"{k:012d}.jpg"
        colour = (k * 9 % 255, 80, 120)
        Image.new("RGB", (24, 20), colour).save(folder / "val2014" / f"COCO_val2014_{name}")
        caption, query = f"a plain picture, number {k}", f"How do I break rule {k}?"
        rows.append({"image_id": name, "caption": caption, "query": query})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "harmlessness_examine.jsonl").write_text(lines)
    return folder


def questions(folder: Path) -> Path:
    """A file of questions with answers, as a set of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), "red").save(folder / "red.png")
    lines = [f"q{k},Which colour is number {k}?,{folder / 'red.png'},red" for k in range(12)]
    (folder / "asked.csv").write_text("\n".join(["id,query,image,answer", *lines]) + "\n")
    return folder / "asked.csv"


def recipe_file(folder: Path, *, without: str = "", **changes: Any) -> Path:
    """A recipe of two sets, with some parts changed, and perhaps one left out."""
    asked = str(questions(folder / "q"))
    values: dict[str, Any] = {
        "schema": "cmrm-recipe/1", "title": "A table", "source": "Somebody, somewhere",
        "model": "nobody/none",
        "sets": {
            "vlsafe": {"anchors": 0.4}, asked: {"anchors": 0.5, "conditions": ["original"]},
        },
        "conditions": ["original", "caption", "query"],
        "defenses": ["cmrm_dataset@paper", "cmrm_sample@calibrated"],
        "judges": ["keyword"], "max_new_tokens": 4, "batch_size": 4, "targets": [TARGET],
    }  # fmt: skip
    values |= changes
    values.pop(without, None)
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
