"""Fixtures that every folder of tests shares; the tiny model behind them is in `tiny.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from PIL import Image

# Several workers with several threads each starve each other; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from cmrm import Sample, wrap_vlm
from cmrm.model.vlm import VLM
from tiny import tiny_model, tiny_processor

if TYPE_CHECKING:
    from transformers import LlavaProcessor


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return tiny_processor()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model, saved."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_models_left() -> Iterator[None]:
    """Inspect's provider keeps models for the life of the process; a test starts without any."""
    yield
    from cmrm.evaluate import provider

    provider._ENGINES.clear()


@pytest.fixture(scope="session")
def vlm(processor: LlavaProcessor) -> VLM:
    return wrap_vlm(tiny_model(), processor, model_id="tiny")


@pytest.fixture(scope="session")
def anchors() -> list[Sample]:
    colours = ["red", "green", "blue", "yellow", "black", "white"]
    return [
        Sample(
            id=f"a{k}",
            query=f"Tell me about {c} paint" + "!" * k,
            image=Image.new("RGB", (20 + k, 16), c),
            caption=f"a {c} wall",
        )
        for k, c in enumerate(colours)
    ]


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Tests touch neither the user's data nor the user's cache, except for the demo VLM, and print
    as wide as into a pipe."""
    monkeypatch.delenv("CMRM_DATA", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    if request.node.get_closest_marker("demo") is None:
        monkeypatch.setenv("CMRM_CACHE", str(tmp_path))
