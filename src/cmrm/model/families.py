"""Model families that the contract suite covers, and what is particular about each.

Nothing here decides whether a model can be used: decoder layers are found by structure
(`models.find_decoder_layers`), and `cmrm check MODEL` runs the same contract on any checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, covered by the contract suite on a tiny random model."""

    name: str
    """What people call it."""
    key: str
    """Key of its tiny model in the test suite; transformers' `model_type` where that is unique."""
    architecture: str
    """transformers' model class."""
    example: str
    """A checkpoint on the hub, for orientation; it was not downloaded by the suite."""
    note: str = ""
    """What is particular."""


CROSS_ATTENTION = (
    "Images enter by cross-attention layers, not by image tokens. A row is gated by its image "
    "placeholder. Text-only "
    "prompts skip those layers: there the state is what the layer before left, and so is the shift."
)

FAMILIES = (
    Family(
        "LLaVA-1.5, ShareGPT4V",
        "llava",
        "LlavaForConditionalGeneration",
        "llava-hf/llava-1.5-7b-hf",
    ),
    Family(
        "Pixtral 12B",
        "pixtral",
        "LlavaForConditionalGeneration",
        "mistral-community/pixtral-12b",
        "The LLaVA architecture around a Pixtral tower: as many image tokens as the image needs.",
    ),
    Family("ViP-LLaVA", "vipllava", "VipLlavaForConditionalGeneration", "llava-hf/vip-llava-7b-hf"),
    Family(
        "LLaVA-NeXT",
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "Tiles: the number of image tokens depends on the image's size.",
    ),
    Family(
        "LLaVA-OneVision",
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    ),
    Family("Qwen2-VL", "qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen/Qwen2-VL-2B-Instruct"),
    Family(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    Family(
        "Qwen3-VL",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen/Qwen3-VL-4B-Instruct",
        "DeepStack adds image features between early blocks, behind the hooks: a block's output "
        "is taken before that.",
    ),
    Family("GLM-4V", "glm4v", "Glm4vForConditionalGeneration", "zai-org/GLM-4.1V-9B-Thinking"),
    Family(
        "InternVL 3", "internvl", "InternVLForConditionalGeneration", "OpenGVLab/InternVL3-1B-hf"
    ),
    Family("Idefics2", "idefics2", "Idefics2ForConditionalGeneration", "HuggingFaceM4/idefics2-8b"),
    Family(
        "Idefics3",
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "HuggingFaceM4/Idefics3-8B-Llama3",
    ),
    Family(
        "SmolVLM",
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    ),
    Family(
        "Gemma 3",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "google/gemma-3-4b-it",
        "Image tokens attend to each other in both directions.",
    ),
    Family(
        "PaliGemma",
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "google/paligemma2-3b-mix-448",
        "The whole prompt attends in both directions. Its checkpoints ship without a chat "
        "template: set one.",
    ),
    Family(
        "Llama 3.2 Vision (Mllama)",
        "mllama",
        "MllamaForConditionalGeneration",
        "meta-llama/Llama-3.2-11B-Vision-Instruct",
        CROSS_ATTENTION,
    ),
    Family(
        "Mistral Small 3.1",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    ),
    Family(
        "Aya Vision", "aya_vision", "AyaVisionForConditionalGeneration", "CohereLabs/aya-vision-8b"
    ),
    Family("Ovis2", "ovis2", "Ovis2ForConditionalGeneration", "thisisiron/Ovis2-1B-hf"),
    Family("Aria", "aria", "AriaForConditionalGeneration", "rhymes-ai/Aria", "Mixture of experts."),
    Family(
        "DeepSeek-VL",
        "deepseek_vl",
        "DeepseekVLForConditionalGeneration",
        "deepseek-community/deepseek-vl-1.3b-chat",
    ),
)

NOT_COVERED = (
    (
        "BLIP-2, InstructBLIP",
        "no chat template, an image is mandatory, and generation bypasses the model's own forward",
    ),
    (
        "Phi-4-multimodal",
        "its processor wants an audio part, and no tiny one has been built for the suite",
    ),
    (
        "Kimi-VL",
        "not among the architectures of transformers 5.23, but for Kimi K2.5, which has not been "
        "tried",
    ),
)
"""Families that were looked at and left out, and why."""
