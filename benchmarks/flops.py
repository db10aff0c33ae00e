"""Floating-point operations of a LLaVA-shaped model, from its shapes: 2 for each multiply-add of a
matrix product."""

from __future__ import annotations

from typing import Any


def block_flops(config: Any, new: int, past: int = 0) -> float:
    """All decoder blocks over `new` tokens that attend to `past` cached ones and, causally, to each
    other."""
    d, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    kept = config.num_key_value_heads * head
    linear = 2 * d * (2 * d + 2 * kept + 3 * config.intermediate_size)
    attended = new * past + new * (new + 1) / 2
    return float(config.num_hidden_layers * (new * linear + 4 * d * attended))


def head_flops(config: Any, tokens: int) -> float:
    """`lm_head` at `tokens` positions."""
    return float(2 * tokens * config.hidden_size * config.vocab_size)


def vision_flops(config: Any, width: int) -> float:
    """Tower and two-layer connector (into `width`) of one image."""
    tower = config
    patches = (tower.image_size // tower.patch_size) ** 2
    d = tower.hidden_size
    seen = patches + 1
    blocks = tower.num_hidden_layers * (
        seen * 2 * d * (4 * d + 2 * tower.intermediate_size) + 4 * d * seen * seen
    )
    embedding = 2 * patches * 3 * tower.patch_size**2 * d
    return float(embedding + blocks + 2 * patches * (d * width + width * width))
