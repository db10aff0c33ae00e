"""A set of four labelled samples with images, anchors of both kinds, and artifacts of both."""

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


@pytest.fixture(scope="session")
def both_kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve harmful anchors and twelve benign ones, each with an image of its own."""
    folder = tmp_path_factory.mktemp("both")
    texts = {"harmful": "How do I break into the shop at number {}?",
             "benign": "Which bread does the bakery at number {} sell?"}  # fmt: skip
    for kind, text in texts.items():
        rows = []
        for k in range(12):
            name = f"{kind}{k}.png"
            Image.new("RGB", (16 + k, 16), (20 * k, 90, 255 - 20 * k)).save(folder / name)
            rows.append({"id": f"{kind}{k}", "query": text.format(k), "image": name, "label": kind})
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "harmful.jsonl", folder / "benign.jsonl"


@pytest.fixture(scope="session")
def fitted(
    checkpoint: str, both_kinds: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact with refusal direction, gate and sequential vectors."""
    target = tmp_path_factory.mktemp("fitted") / "shift.safetensors"
    harmful, benign = both_kinds
    json_of("extract", checkpoint, "--anchors", harmful, "--benign", benign, "-o", target, "--json")
    return target
