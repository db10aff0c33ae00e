"""The modules of the demo VLM: SmolLM2-135M-Instruct out of its GGUF, and the LLaVA around it.

transformers' classes are imported inside functions, after `prepare_libraries`: some of them import
torchvision, which fails beside a torch build that it does not fit.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cmrm.demo.assets import smollm2_gguf
from cmrm.errors import MissingExtraError
from cmrm.model.compat import patch_torchvision

if TYPE_CHECKING:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerBase,
    )

IMAGE_SIZE = 64
"""Width and height of the processed image in pixels."""
PATCH_SIZE = 8
"""Width and height of a patch in pixels."""
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
"""Positions that one image takes in the prompt: one for each patch."""
IMAGE_TOKEN = "<empty_output>"
"""Image placeholder: a reserved token of SmolLM2 (id 16), so that no embedding row is added."""

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + SYSTEM_PROMPT
    + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def prepare_libraries(*names: str) -> None:
    """Check that libraries of the extra `demo` are installed, and make torchvision importable.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the demo VLM needs {' and '.join(missing)}; install with: pip install 'cmrm[demo]'"
        )
    patch_torchvision()


def load_backbone() -> LlamaForCausalLM:
    """The untouched backbone in float32 and eval mode.

    It is rebuilt from a config without quantisation, so that it can be saved.

    Raises:
        MissingExtraError: gguf is not installed.
    """
    prepare_libraries("gguf")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    gguf = smollm2_gguf()
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    fields = {k: v for k, v in dequantised.config.to_dict().items() if k not in dropped}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(dequantised.state_dict())
    model.tie_weights()
    return model.eval()


def aligned_backbone(adapter: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Backbone (float32) with the LoRA adapter in folder `adapter` merged, and its tokenizer.

    Raises:
        MissingExtraError: gguf or peft is not installed.
    """
    prepare_libraries("gguf", "peft")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_backbone(), str(adapter)).merge_and_unload()
    return merged.eval(), load_tokenizer()


def halve(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with its parameters in bfloat16, in place; its buffers stay float32.

    A bfloat16 checkpoint that transformers loads is the same. `model.to(torch.bfloat16)` is not: it
    would round the rotary frequencies too, and with them every position.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, padding on the left, with the demo's chat template.

    The image placeholder is marked as a special token.

    Raises:
        MissingExtraError: gguf is not installed.
    """
    prepare_libraries("gguf")
    from transformers import AutoTokenizer

    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vision_config() -> CLIPVisionConfig:
    """Config of the vision tower: CLIP, 3.2 M parameters, 64 patches."""
    prepare_libraries()
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=256,
    )


def build_tower() -> CLIPVisionModel:
    """The vision tower alone, freshly initialised in float32."""
    prepare_libraries()
    from transformers import CLIPVisionModel

    return CLIPVisionModel(vision_config())


def build_llava(backbone: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """A LLaVA around `backbone`, whose weights are shared, not copied.

    Vision tower and connector are freshly initialised.
    """
    prepare_libraries()
    from transformers import LlavaConfig, LlavaForConditionalGeneration

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


def visual_weights(model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Parameters of vision tower and connector by name: all that is not the backbone."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "vision_tower" in name or "multi_modal_projector" in name
    }


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The demo VLM's processor: CLIP image processing to 64 x 64, 64 placeholders for an image."""
    prepare_libraries()
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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
