"""A tiny random LLaVA with a real processor, built from configs: every code path without a hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cmrm.model.compat import patch_torchvision

patch_torchvision()

from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: E402

from families import llava  # noqa: E402


def tiny_processor() -> LlavaProcessor:
    return llava()[1]


def tiny_model(*, n_layers: int = 3, width: int = 32) -> LlavaForConditionalGeneration:
    return llava(num_hidden_layers=n_layers, hidden_size=width)[0]
