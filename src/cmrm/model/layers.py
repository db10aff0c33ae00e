"""Decoder layers of a vision-language model, found by structure. Layers are numbered here and
nowhere else.

Layer `l` (0-based, 0..L-1) is the output of decoder block `l` of the language backbone: the
residual stream behind the block, before the final norm. The embedding output is not a layer.
transformers' `hidden_states[-1]` is taken AFTER the final norm and is therefore not layer L-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cmrm.errors import ModelError, SteeringError

LAYER_OVERRIDES: dict[str, Callable[[Any], Sequence[nn.Module]]] = {}
"""Model class name -> its decoder blocks, for classes whose structure misleads
`find_decoder_layers`."""


def register_layers(architecture: str, find: Callable[[Any], Sequence[nn.Module]]) -> None:
    """Name the decoder blocks of a model class: `find(model)` returns blocks 0..L-1 in order.

    Needed only where `find_decoder_layers` refuses a model or `cmrm check` finds its layers wrong.
    """
    LAYER_OVERRIDES[architecture] = find


def find_decoder_layers(model: Any) -> tuple[tuple[nn.Module, ...], int]:
    """Decoder blocks of the language backbone, and the width of its residual stream.

    Searched for: an `nn.ModuleList` inside `model.get_decoder()` (or else the whole model) whose
    length is the text config's `num_hidden_layers` and whose blocks hold attention, outside of
    vision and audio parts. A model class that was given to `register_layers` is not searched.

    Raises:
        ModelError: no list or several lists fit, or one block stands at two places of the list.
    """
    text = model.config.get_text_config()
    count, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not count or not width:
        raise ModelError(
            f"{type(text).__name__} names no num_hidden_layers or hidden_size; no decoder can be "
            "found"
        )
    override = LAYER_OVERRIDES.get(type(model).__name__)
    blocks = tuple(override(model)) if override is not None else _by_structure(model, int(count))
    first_place: dict[int, int] = {}
    for layer, block in enumerate(blocks):
        other = first_place.setdefault(id(block), layer)
        if other != layer:
            raise ModelError(
                f"decoder layers {other} and {layer} are the same module: their states cannot be "
                "told apart, "
                "and steering would be applied twice; cmrm needs a module of its own for each layer"
            )
    return blocks, int(width)


def _by_structure(model: Any, count: int) -> tuple[nn.Module, ...]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    root = decoder if isinstance(decoder, nn.Module) else model
    candidates = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all("attn" in " ".join(n for n, _ in block.named_children()) for block in module)
        and not any(word in name for word in ("vision", "visual", "audio"))
    ]
    if len(candidates) != 1:
        names = [name for name, _ in candidates] or "none"
        raise ModelError(
            f"looked for one list of {count} attention blocks in {type(root).__name__}, found "
            f"{names}; "
            "name the decoder layers of the language backbone with "
            "cmrm.model.layers.register_layers"
        )
    return tuple(candidates[0][1])


def hidden_of(output: Any) -> torch.Tensor:
    """Residual stream [B, T, d] in a decoder block's output: the tensor itself, or the first of a
    tuple.

    Raises:
        SteeringError: the output has another form.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        raise SteeringError(
            f"a decoder block returned {type(output).__name__}, expected states [batch, tokens, "
            "width]"
        )
    return hidden
