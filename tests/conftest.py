"""A tiny random LLaVA with a real processor, built from configs: every code path without a hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cmrm import Sample, wrap_vlm
from cmrm.models import VLM

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_processor() -> LlavaProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: k for k, token in enumerate(SPECIAL + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def tiny_model(*, n_layers: int = 3, width: int = 32, seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
        ),
        text_config=LlamaConfig(
            vocab_size=260, hidden_size=width, intermediate_size=64, num_hidden_layers=n_layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=3,
        vision_feature_layer=-1,
        pad_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return tiny_processor()


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
def own_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tests never touch the user's cache, except those that ask for the assembled demo VLM."""
    if "demo" not in request.keywords:
        monkeypatch.setenv("CMRM_CACHE", str(tmp_path))
