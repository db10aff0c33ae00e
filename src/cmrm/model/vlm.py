"""A VLM as the method sees it: model, processor, decoder layers, prompts. Layers are numbered here and nowhere else.

Layer `l` (0-based, 0..L-1) is the output of decoder block `l` of the language backbone: the residual stream after the
block, before the final norm. The embedding output is not a layer. transformers' `hidden_states[-1]` is taken AFTER the
final norm and is therefore not layer L-1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import nn

from cmrm.model.compat import mend_torchvision
from cmrm.prompts.conditions import Request
from cmrm.errors import InputError, ModelError

_NEEDS_AN_IMAGE = {"PaliGemmaProcessor"}
"""Processors that refuse text alone: its tokenizer is used then, with the newline that ends a PaliGemma prompt."""

_WANTS_PIL = {"MllamaProcessor"}
"""Processors whose torchvision image processing fails on a batch in which a row has no image (transformers 5.23)."""

HASHED_VALUES = 16
"""Values of a parameter that `weights_hash` looks at."""

_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_commit_hash", "_attn_implementation"}


@dataclass(frozen=True, eq=False)
class VLM:
    """A model with its processor, ready for capture and steering. Made by `load_vlm` or `wrap_vlm`."""

    model: Any
    """A transformers image-text-to-text model."""
    processor: Any
    """Its processor: chat template, tokenizer, image processor."""
    layers: tuple[nn.Module, ...]
    """Decoder blocks 0..L-1 of the language backbone."""
    hidden_size: int
    """Width d of the residual stream."""
    image_token_id: int
    """Token id whose positions carry the image."""
    model_id: str
    """Hub id or path that it was loaded from."""
    revision: str | None
    """Hub commit, where known."""
    skippable: frozenset[int] = frozenset()
    """Layers that run only where the prompt holds an image (Mllama's cross-attention layers)."""
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    """What is kept between calls, such as the key-value caches of prefixes; may be cleared at any time."""

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embeddings, or where they run when accelerate has offloaded them."""
        embeddings = self.model.get_input_embeddings()
        weight: torch.Tensor = embeddings.weight
        if weight.device.type != "meta":
            return weight.device
        hook = getattr(embeddings, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer


def load_vlm(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    image_backend: str | None = None,
) -> VLM:
    """Load a VLM from a local folder or a hub id through transformers' auto classes.

    Args:
        model: folder with a checkpoint, or hub id.
        revision: hub branch, tag or commit.
        dtype: as transformers takes it; "auto" is the checkpoint's own.
        device_map: as accelerate takes it; None loads on the CPU.
        trust_remote_code: run Python code that the checkpoint brings; off unless you have read it.
        image_backend: `pil` or `torchvision`, whose resizing differs by a few grey levels; None leaves it to transformers,
            which takes torchvision where it is installed.

    Raises:
        ModelError: the checkpoint cannot be loaded, is no VLM, or has no decoder layers that can be found.
    """
    mend_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        backend = {} if image_backend is None else {"backend": image_backend}
        processor = AutoProcessor.from_pretrained(str(model), **backend, **source)
        if image_backend is None and type(processor).__name__ in _WANTS_PIL:
            processor = AutoProcessor.from_pretrained(str(model), backend="pil", **source)
        loaded = AutoModelForImageTextToText.from_pretrained(str(model), dtype=dtype, device_map=device_map, **source)
    except ImportError as error:
        needed = " ".join(str(error).split())
        raise ModelError(
            f"cannot load {model}: its processor or model needs a library that is not there; "
            f"pip install 'cmrm[families]' brings the common ones. {needed[:200]}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith("Unrecognized configuration class"):
            lines = ["transformers knows its architecture as no vision-language model; is it a text-only one?"]
        raise ModelError(f"cannot load a vision-language model from {model}: {lines[0]}") from error
    return wrap_vlm(loaded.eval(), processor, model_id=str(model), revision=revision)


def wrap_vlm(model: Any, processor: Any, *, model_id: str | None = None, revision: str | None = None) -> VLM:
    """Use a transformers model and processor that you hold already. Neither is changed.

    Raises:
        ModelError: what is missing is named: a language backbone, its decoder layers, an image token, a tokenizer or a
            chat template.
    """
    if not hasattr(processor, "tokenizer") or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{type(processor).__name__} has no tokenizer or no image processor; pass the VLM's processor")
    if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
        raise ModelError("the processor has no chat template; set `processor.chat_template` to the model's own")
    config = model.config
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        image_token_id = getattr(config, "image_token_index", None)
    if image_token_id is None:
        raise ModelError(f"{type(config).__name__} names no image_token_id; this does not look like a VLM's config")
    layers, hidden_size = find_decoder_layers(model)
    return VLM(
        model=model,
        processor=processor,
        layers=layers,
        hidden_size=hidden_size,
        image_token_id=int(image_token_id),
        model_id=model_id or getattr(config, "_name_or_path", "") or type(model).__name__,
        revision=revision or getattr(config, "_commit_hash", None),
        skippable=frozenset(k for k, block in enumerate(layers) if hasattr(block, "cross_attn")),
    )


LAYER_OVERRIDES: dict[str, Callable[[Any], Sequence[nn.Module]]] = {}
"""Model class name -> its decoder blocks, for classes whose structure misleads `find_decoder_layers`."""


def register_layers(architecture: str, find: Callable[[Any], Sequence[nn.Module]]) -> None:
    """Tell cmrm where the decoder blocks of a model class are: `find(model)` returns blocks 0..L-1 in order.

    Needed only where `find_decoder_layers` refuses a model or `cmrm check` finds its layers wrong.
    """
    LAYER_OVERRIDES[architecture] = find


def find_decoder_layers(model: Any) -> tuple[tuple[nn.Module, ...], int]:
    """Decoder blocks of the language backbone, and the width of its residual stream; by structure, not by name.

    Looked for: an `nn.ModuleList` inside `model.get_decoder()` (or else the whole model) whose length is the text
    config's `num_hidden_layers` and whose blocks hold attention, outside of vision and audio parts. A model class that
    was given to `register_layers` is not searched.

    Raises:
        ModelError: none or several fit.
    """
    text = model.config.get_text_config()
    count, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not count or not width:
        raise ModelError(f"{type(text).__name__} names no num_hidden_layers or hidden_size; no decoder can be found")
    override = LAYER_OVERRIDES.get(type(model).__name__)
    if override is not None:
        return tuple(override(model)), int(width)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    root = decoder if isinstance(decoder, nn.Module) else model
    found = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all("attn" in " ".join(n for n, _ in block.named_children()) for block in module)
        and not any(word in name for word in ("vision", "visual", "audio"))
    ]
    if len(found) != 1:
        raise ModelError(
            f"looked for one list of {count} attention blocks in {type(root).__name__}, found "
            f"{[name for name, _ in found] or 'none'}; cmrm needs the decoder layers of the language backbone: name them "
            "with cmrm.model.vlm.register_layers"
        )
    return tuple(found[0][1]), int(width)


def config_hash(vlm: VLM) -> str:
    """Hex sha256 of the model's config without fields that change with library version, path or dtype."""

    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stable(v) for k, v in sorted(value.items()) if k not in _VOLATILE}
        return value

    raw = json.loads(json.dumps(vlm.model.config.to_dict(), default=str))
    return hashlib.sha256(json.dumps(stable(raw), sort_keys=True).encode()).hexdigest()


def weights_hash(vlm: VLM) -> str:
    """Hex sha256 over the first `HASHED_VALUES` values of every parameter: tells apart trainings of one architecture, at no cost.

    Parameters that are offloaded, or held in a quantised form of their own, count by name and shape alone.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(vlm.model.named_parameters()):
        digest.update(f"\x00{name}\x00{tuple(parameter.shape)}\x00".encode())
        if type(parameter.data) is torch.Tensor and parameter.device.type != "meta":
            shown = parameter.detach().flatten()[:HASHED_VALUES]
            digest.update(shown.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _turn(role: str, text: str, images: int, *, image_last: bool = False) -> dict[str, Any]:
    pictures: list[dict[str, str]] = [{"type": "image"}] * images
    said: list[dict[str, str]] = [{"type": "text", "text": text}]
    return {"role": role, "content": said + pictures if image_last else pictures + said}


def encode(vlm: VLM, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """Model inputs of a batch of prompts, LEFT-padded, on the model's device.

    Each conversation passes through the model's own chat template with the generation prompt. Rows with and without images
    may be mixed. Returns at least `input_ids` and `attention_mask`, int64 [B, T]; `pixel_values` in the model's dtype
    where any row has an image; whatever else the model's forward takes.

    Raises:
        InputError: the batch is empty, the chat template refuses a conversation, or a prompt is longer than the model's context.
    """
    if not requests:
        raise InputError("no prompts were given")
    texts = []
    for request in requests:
        turns = [_turn(turn.role, turn.text, len(turn.images)) for turn in request.before]
        turns.append(_turn("user", request.text, len(request.images), image_last=request.image_last))
        try:
            texts.append(vlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except (TemplateError, TypeError) as error:
            raise InputError(f"the model's chat template does not take this conversation: {error}") from error
    nested = [list(request.all_images) for request in requests]
    tokenizer = vlm.tokenizer
    bos = tokenizer.bos_token
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        special = not (bos and texts[0].startswith(bos))
        if not any(nested) and type(vlm.processor).__name__ in _NEEDS_AN_IMAGE:
            batch = tokenizer(
                [f"{text}\n" for text in texts], padding=True, return_tensors="pt", add_special_tokens=special,
                return_token_type_ids=True,
            )  # fmt: skip
        else:
            batch = vlm.processor(
                text=texts,
                images=nested if any(nested) else None,
                padding=True,
                return_tensors="pt",
                add_special_tokens=special,
            )
    finally:
        tokenizer.padding_side = side
    limit = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit and batch["input_ids"].shape[1] > limit:
        raise InputError(
            f"a prompt has {batch['input_ids'].shape[1]} tokens, the model's context is {limit}; shorten it"
        )
    dtype = vlm.model.dtype
    return {
        key: value.to(vlm.device, dtype if value.is_floating_point() else None)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and key != "labels"
    }
