"""A tiny random LLaVA with a real processor, built from configs: every code path without a hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cmrm.model.compat import patch_torchvision

patch_torchvision()

from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: E402

from cmrm.engines.base import Engine  # noqa: E402
from cmrm.engines.transformers import TransformersEngine  # noqa: E402
from cmrm.model.vlm import VLM  # noqa: E402
from families import llava  # noqa: E402


def tiny_processor() -> LlavaProcessor:
    return llava()[1]


def tiny_model(*, n_layers: int = 3, width: int = 32) -> LlavaForConditionalGeneration:
    return llava(num_hidden_layers=n_layers, hidden_size=width)[0]


def vlm_of(engine: Engine) -> VLM:
    """The model of an engine on transformers, or of one that remembers its states."""
    inner = getattr(engine, "engine", engine)
    assert isinstance(inner, TransformersEngine)
    return inner.vlm
