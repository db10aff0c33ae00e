"""A tiny random LLaVA with a real processor, built from configs: every code path without a hub."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cmrm.model.compat import patch_torchvision

patch_torchvision()

import pytest  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: E402

from cmrm import Sample, wrap_vlm  # noqa: E402
from cmrm.model.vlm import VLM  # noqa: E402
from families import llava  # noqa: E402


def tiny_processor() -> LlavaProcessor:
    return llava()[1]


def tiny_model(*, n_layers: int = 3, width: int = 32) -> LlavaForConditionalGeneration:
    return llava(num_hidden_layers=n_layers, hidden_size=width)[0]


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
    """Tests touch neither the user's data nor the user's cache, except for the demo VLM."""
    monkeypatch.delenv("CMRM_DATA", raising=False)
    if request.node.get_closest_marker("demo") is None:
        monkeypatch.setenv("CMRM_CACHE", str(tmp_path))
