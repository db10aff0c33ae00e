"""SmolLM2-135M-Instruct as transformers modules, out of its GGUF, and the LLaVA around it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cmrm.demo.assets import smollm2_gguf

IMAGE_SIZE = 64
PATCH_SIZE = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_TOKEN = "<empty_output>"
"""A reserved token of SmolLM2's vocabulary (id 16), taken as image placeholder so that no embedding row is added."""

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_backbone() -> LlamaForCausalLM:
    """The untouched backbone in float32, eval mode, rebuilt from a config without quantisation so that it can be saved."""
    gguf = smollm2_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    raw = loaded.config.to_dict()
    kept = {k: v for k, v in raw.items() if k not in {"quantization_config", "_name_or_path", "_model_name_or_path"}}
    model = LlamaForCausalLM(LlamaConfig(**kept))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model.eval()


def halve(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Parameters to bfloat16 in place; buffers stay float32, as when transformers loads a bfloat16 checkpoint.

    `model.to(torch.bfloat16)` would round the rotary frequencies too, and with them every position.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with the image placeholder marked special, left padding, and the demo's chat template."""
    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vision_config() -> CLIPVisionConfig:
    """A CLIP vision transformer of 3.2 M parameters: 64 x 64 pixels, 8 x 8 patches, 64 image tokens."""
    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=256,
    )


def build_llava(backbone: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """A LLaVA around `backbone` (weights shared, not copied); tower and connector are freshly initialised."""
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=backbone.config,
        image_token_index=16,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=backbone.config.pad_token_id,
        eos_token_id=backbone.config.eos_token_id,
        bos_token_id=backbone.config.bos_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model = backbone.model
    model.lm_head = backbone.lm_head
    model.tie_weights()
    model.generation_config.pad_token_id = backbone.config.pad_token_id
    model.generation_config.eos_token_id = backbone.config.eos_token_id
    return model.eval()


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The processor of the demo VLM: CLIP image processing to 64 x 64, 64 placeholders an image."""
    size: dict[str, Any] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True, resample=3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
