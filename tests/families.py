"""Tiny random models of every covered family, with real processors: no hub is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

Built = tuple[Any, Any]

SIZE = 16
PATCH = 8
SQUARE = {"height": SIZE, "width": SIZE}


def byte_tokenizer(**extra: str) -> Any:
    """A byte-level tokenizer with the special tokens `extra`, name -> token, also as attributes."""
    special = ["<pad>", "<s>", "</s>", *dict.fromkeys(extra.values())]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={token: k for k, token in enumerate(special + alphabet)}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=extra,
        model_input_names=["input_ids", "attention_mask"],
    )


def template(image: str) -> str:
    """A chat template that puts `image` where an image part stands."""
    return (
        "{% for m in messages %}<s>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        + image
        + "{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )


def text_settings(**changes: Any) -> dict[str, Any]:
    """Settings of a three-layer text model that most configs understand."""
    return {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **changes,
    }  # fmt: skip


def vision_settings(**changes: Any) -> dict[str, Any]:
    """Settings of a two-layer vision transformer on 16 x 16 pixels."""
    return {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE, "patch_size": PATCH, **changes,
    }  # fmt: skip


def finish(model: Any, processor: Any) -> Built:
    model = model.eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model, processor


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def clip_pixels() -> Any:
    return CLIPImageProcessorPil(
        size=SQUARE, crop_size=SQUARE, do_center_crop=False, do_convert_rgb=True
    )


def siglip_pixels() -> Any:
    return SiglipImageProcessorPil(size=SQUARE, do_convert_rgb=True)


def _llava_like(
    config_class: Any, model_class: Any, text: dict[str, Any] | None = None, **more: Any
) -> Built:
    tokenizer = byte_tokenizer(image_token="<image>")
    processor = tf.LlavaProcessor(
        image_processor=clip_pixels(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    config = config_class(
        vision_config=tf.CLIPVisionConfig(**vision_settings()),
        text_config=tf.LlamaConfig(**text_settings(**(text or {}))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        **more,
    )
    return finish(seeded(lambda: model_class(config)), processor)


def llava(**text: Any) -> Built:
    return _llava_like(
        tf.LlavaConfig, tf.LlavaForConditionalGeneration, text, vision_feature_layer=-1
    )


def vipllava() -> Built:
    return _llava_like(
        tf.VipLlavaConfig, tf.VipLlavaForConditionalGeneration, vision_feature_layers=[-1, -2]
    )


def llava_next(**text: Any) -> Built:
    tokenizer = byte_tokenizer(image_token="<image>")
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    processor = tf.LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size=SQUARE,
            image_grid_pinpoints=grid,
            do_convert_rgb=True,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**vision_settings()),
        text_config=tf.LlamaConfig(**text_settings(**text)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
        pad_token_id=0,
    )
    return finish(seeded(lambda: tf.LlavaNextForConditionalGeneration(config)), processor)


def llava_onevision() -> Built:
    tokenizer = byte_tokenizer(image_token="<image>", video_token="<video>")
    grid = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    processor = tf.LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(
            size=SQUARE, image_grid_pinpoints=grid, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        video_processor=tf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_settings()),
        text_config=tf.Qwen2Config(**text_settings()),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return finish(seeded(lambda: tf.LlavaOnevisionForConditionalGeneration(config)), processor)


QWEN_SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>")


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_SPECIAL.items()}
    return {
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
    }


def _qwen_pixels() -> Any:
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
    )


MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def qwen2_vl() -> Built:
    tokenizer = byte_tokenizer(**QWEN_SPECIAL)
    processor = tf.Qwen2VLProcessor(
        _qwen_pixels(), tokenizer, tf.Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE
    )
    config = tf.Qwen2VLConfig(
        text_config=text_settings(rope_parameters=MROPE),
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return finish(seeded(lambda: tf.Qwen2VLForConditionalGeneration(config)), processor)


def qwen2_5_vl(**text: Any) -> Built:
    tokenizer = byte_tokenizer(**QWEN_SPECIAL)
    processor = tf.Qwen2_5_VLProcessor(
        _qwen_pixels(), tokenizer, tf.Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE
    )
    config = tf.Qwen2_5_VLConfig(
        text_config=text_settings(**{"rope_parameters": MROPE, **text}),
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": text.get("hidden_size", 32),
            "intermediate_size": 32, "num_heads": 2,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "in_channels": 3,
            "window_size": 32, "fullatt_block_indexes": [1],
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return finish(seeded(lambda: tf.Qwen2_5_VLForConditionalGeneration(config)), processor)


def qwen3_vl() -> Built:
    tokenizer = byte_tokenizer(**QWEN_SPECIAL)
    processor = tf.Qwen3VLProcessor(
        _qwen_pixels(), tokenizer, tf.Qwen3VLVideoProcessor(), chat_template=QWEN_TEMPLATE
    )
    config = tf.Qwen3VLConfig(
        text_config=text_settings(head_dim=8, rope_parameters=MROPE),
        vision_config={
            "depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    return finish(seeded(lambda: tf.Qwen3VLForConditionalGeneration(config)), processor)


def glm4v() -> Built:
    tokenizer = byte_tokenizer(
        image_token="<|image|>",
        video_token="<|video|>",
        image_start="<|begin_of_image|>",
        image_end="<|end_of_image|>",
        video_start="<|begin_of_video|>",
        video_end="<|end_of_video|>",
    )
    ids = tokenizer.convert_tokens_to_ids
    processor = tf.Glm4vProcessor(
        Glm4vImageProcessorPil(
            patch_size=PATCH,
            temporal_patch_size=2,
            merge_size=2,
            size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32 * 2},
        ),
        tokenizer,
        tf.Glm4vVideoProcessor(),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    config = tf.Glm4vConfig(
        text_config=text_settings(rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
        vision_config={
            "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "image_size": SIZE,
        },
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
    )  # fmt: skip
    return finish(seeded(lambda: tf.Glm4vForConditionalGeneration(config)), processor)


def internvl() -> Built:
    tokenizer = byte_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = tf.InternVLProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False),
        tokenizer,
        tf.InternVLVideoProcessor(),
        image_seq_length=1,
        chat_template=template("<IMG_CONTEXT>"),
    )
    config = tf.InternVLConfig(
        vision_config=vision_settings(image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH]),
        text_config=tf.Qwen2Config(**text_settings()),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return finish(seeded(lambda: tf.InternVLForConditionalGeneration(config)), processor)


def _idefics3_tokens() -> dict[str, str]:
    tiles = {f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)}
    return {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        **tiles,
    }


def _idefics3_config(config_class: Any, tokenizer: Any) -> Any:
    return config_class(
        vision_config=vision_settings(),
        text_config=tf.LlamaConfig(**text_settings()),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def idefics3() -> Built:
    tokenizer = byte_tokenizer(**_idefics3_tokens())
    pixels = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIZE},
        max_image_size={"longest_edge": SIZE},
        do_image_splitting=True,
    )
    processor = tf.Idefics3Processor(
        pixels, tokenizer, image_seq_len=1, chat_template=template("<image>")
    )
    config = _idefics3_config(tf.Idefics3Config, tokenizer)
    return finish(seeded(lambda: tf.Idefics3ForConditionalGeneration(config)), processor)


def smolvlm() -> Built:
    tokenizer = byte_tokenizer(**_idefics3_tokens(), video_token="<video>")
    pixels = SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * SIZE},
        max_image_size={"longest_edge": SIZE},
        do_image_splitting=True,
    )
    processor = tf.SmolVLMProcessor(
        pixels,
        tokenizer,
        tf.SmolVLMVideoProcessor(),
        image_seq_len=1,
        chat_template=template("<image>"),
    )
    config = _idefics3_config(tf.SmolVLMConfig, tokenizer)
    return finish(seeded(lambda: tf.SmolVLMForConditionalGeneration(config)), processor)


def idefics2() -> Built:
    tokenizer = byte_tokenizer(
        image_token="<image>", image_boundary_token="<fake_token_around_image>"
    )
    pixels = Idefics2ImageProcessorPil(
        size={"shortest_edge": SIZE, "longest_edge": SIZE}, do_image_splitting=False
    )
    processor = tf.Idefics2Processor(
        pixels, tokenizer, image_seq_len=2, chat_template=template("<image>")
    )
    config = tf.Idefics2Config(
        vision_config=vision_settings(),
        perceiver_config={
            "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1, "hidden_size": 32,
        },
        text_config=tf.MistralConfig(**text_settings(sliding_window=None)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )  # fmt: skip
    return finish(seeded(lambda: tf.Idefics2ForConditionalGeneration(config)), processor)


def gemma3() -> Built:
    tokenizer = byte_tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    ids = tokenizer.convert_tokens_to_ids
    processor = tf.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE, image_seq_length=4),
        tokenizer,
        chat_template=template("<start_of_image>"),
        image_seq_length=4,
    )
    config = tf.Gemma3Config(
        vision_config=vision_settings(vision_use_head=False),
        text_config=text_settings(head_dim=8, query_pre_attn_scalar=8, sliding_window=512),
        mm_tokens_per_image=4,
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
    )

    def make() -> Any:
        model = tf.Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(
            model.model.multi_modal_projector.mm_input_projection_weight
        )  # starts at zero
        return model

    return finish(seeded(make), processor)


def paligemma() -> Built:
    tokenizer = byte_tokenizer(image_token="<image>")
    pixels = siglip_pixels()
    pixels.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(pixels, tokenizer, chat_template=template("<image>"))
    config = tf.PaliGemmaConfig(
        vision_config=vision_settings(projection_dim=32),
        text_config={**text_settings(head_dim=8, vocab_size=1700), "model_type": "gemma"},
        projection_dim=32,
        hidden_size=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return finish(seeded(lambda: tf.PaliGemmaForConditionalGeneration(config)), processor)


def mllama() -> Built:
    tokenizer = byte_tokenizer(image_token="<|image|>", python_tag="<|python_tag|>")
    processor = tf.MllamaProcessor(
        MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2),
        tokenizer,
        chat_template=template("<|image|>"),
    )
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 16, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1,
            "intermediate_size": 32, "vision_output_dim": 32, "image_size": SIZE,
            "patch_size": PATCH,
            "intermediate_layers_indices": [0], "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config=text_settings(
            num_hidden_layers=4, cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip

    def make() -> Any:
        model = tf.MllamaForConditionalGeneration(config)
        for layer in (
            1,
            3,
        ):  # their gates start at zero: without this the image would change nothing
            block = model.model.language_model.layers[layer]
            block.cross_attn_attn_gate.data.fill_(0.7)
            block.cross_attn_mlp_gate.data.fill_(0.7)
        return model

    return finish(seeded(make), processor)


def _pixtral_processor(tokenizer: Any, merge: int) -> Any:
    return tf.PixtralProcessor(
        image_processor=PixtralImageProcessorPil(
            size={"longest_edge": 4 * PATCH},
            patch_size={"height": PATCH * merge, "width": PATCH * merge},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=merge,
        chat_template=template("[IMG]"),
    )


PIXTRAL_SPECIAL = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}


def pixtral() -> Built:
    tokenizer = byte_tokenizer(**PIXTRAL_SPECIAL)
    config = tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**vision_settings(image_size=4 * PATCH, head_dim=8)),
        text_config=tf.MistralConfig(**text_settings(sliding_window=None)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return finish(
        seeded(lambda: tf.LlavaForConditionalGeneration(config)), _pixtral_processor(tokenizer, 1)
    )


def mistral3() -> Built:
    tokenizer = byte_tokenizer(**PIXTRAL_SPECIAL)
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**vision_settings(image_size=4 * PATCH, head_dim=8)),
        text_config=tf.MistralConfig(**text_settings(sliding_window=None)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return finish(
        seeded(lambda: tf.Mistral3ForConditionalGeneration(config)),
        _pixtral_processor(tokenizer, 2),
    )


def aya_vision() -> Built:
    tokenizer = byte_tokenizer(
        image_token="<image>",
        start_of_img="<|START_OF_IMG|>",
        end_of_img="<|END_OF_IMG|>",
        img_patch="<|IMG_PATCH|>",
        img_line_break="<|IMG_LINE_BREAK|>",
    )
    processor = tf.AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        img_size=SIZE,
        downsample_factor=2,
        chat_template=template("<image>"),
    )
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**vision_settings(vision_use_head=False)),
        text_config=tf.Cohere2Config(**text_settings(sliding_window=512, head_dim=8)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        vision_feature_layer=-1,
    )
    return finish(seeded(lambda: tf.AyaVisionForConditionalGeneration(config)), processor)


def ovis2() -> Built:
    indicators = {f"indicator_{k}": f"<ind{k}>" for k in range(5)}
    tokenizer = byte_tokenizer(image_token="<image>", atom="<IMG_ATOM>", **indicators)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in indicators.values()]
    processor = tf.Ovis2Processor(
        Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=False),
        tokenizer,
        chat_template=template("<image>"),
        image_seq_length=1,
    )
    config = tf.Ovis2Config(
        vision_config=vision_settings(
            vocab_size=20, hidden_stride=2, num_visual_indicator_tokens=5
        ),
        text_config=tf.Qwen2Config(**text_settings()),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=ids,
        vocab_size=400,
        hidden_size=32,
    )
    return finish(seeded(lambda: tf.Ovis2ForConditionalGeneration(config)), processor)


def aria() -> Built:
    tokenizer = byte_tokenizer(image_token="<image>")
    processor = tf.AriaProcessor(
        AriaImageProcessorPil(),
        tokenizer,
        chat_template=template("<image>"),
        size_conversion={490: 2, 980: 4},
    )
    config = tf.AriaConfig(
        vision_config=vision_settings(image_size=980, patch_size=70, model_type="idefics3_vision"),
        text_config=tf.AriaTextConfig(
            **text_settings(moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1)
        ),
        projector_patch_to_query_dict={196: 4},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return finish(seeded(lambda: tf.AriaForConditionalGeneration(config)), processor)


def deepseek_vl() -> Built:
    tokenizer = byte_tokenizer(image_token="<image_placeholder>")
    processor = tf.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size=SQUARE, min_size=8),
        tokenizer,
        chat_template=template("<image_placeholder>"),
        num_image_tokens=4,
    )
    config = tf.DeepseekVLConfig(
        vision_config=tf.SiglipVisionConfig(**vision_settings(vision_use_head=False)),
        text_config=tf.LlamaConfig(**text_settings()),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    return finish(seeded(lambda: tf.DeepseekVLForConditionalGeneration(config)), processor)


FAMILIES: dict[str, Callable[[], Built]] = {
    "llava": llava,
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "glm4v": glm4v,
    "internvl": internvl,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "mllama": mllama,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "aya_vision": aya_vision,
    "ovis2": ovis2,
    "aria": aria,
    "deepseek_vl": deepseek_vl,
}
