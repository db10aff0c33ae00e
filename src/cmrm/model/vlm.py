"""A vision-language model (VLM) as cmrm sees it: model, processor, decoder layers, and its lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn

from cmrm.errors import ModelError
from cmrm.model.compat import patch_torchvision
from cmrm.model.layers import find_decoder_layers

REGISTERED = {"demo": "cmrm.demo.vlm:load_demo"}
"""Models that have a name of their own: name -> `module:function`, a loader that returns a
`VLM`."""

CHECKPOINTS = {"demo": "cmrm.demo.vlm:demo_checkpoint"}
"""The same -> a function that returns the checkpoint's folder."""

_WANTS_PIL = {"MllamaProcessor"}
"""Processors whose torchvision image processing fails on a batch in which a row has no image."""

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


@dataclass(frozen=True, eq=False)
class VLM:
    """A model with its processor, ready for capture and steering. Made by `load_vlm` or
    `wrap_vlm`."""

    model: Any
    """A transformers image-text-to-text model, without PEFT or torch.compile wrappers."""
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
    placeholders: frozenset[str] = frozenset()
    """Texts that the processor turns into image or video tokens; a request must not hold them as
    text."""

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the inputs: that of the input embeddings, or where accelerate runs them."""
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

    @property
    def lock(self) -> Any:
        """Re-entrant lock of the model, shared by every `VLM` around it: one caller at a time."""
        with _LOCKS_GUARD:
            return _LOCKS.setdefault(self.model, threading.RLock())

    def check_eval(self) -> None:
        """Refuse a model in training mode: dropout would make its states random.

        Raises:
            ModelError: a module is in training mode.
        """
        check_eval(self.model)


def load_vlm(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    image_backend: str | None = None,
) -> VLM:
    """Load a VLM from a local folder or a hub id through transformers' auto classes, or a
    registered one.

    Args:
        model: folder with a checkpoint, hub id, or a name in `REGISTERED` such as `demo`.
        revision: hub branch, tag or commit.
        dtype: as transformers takes it; "auto" is the checkpoint's own.
        device_map: as accelerate takes it; None loads on the CPU.
        trust_remote_code: run Python code that the checkpoint brings; off unless you have read it.
        image_backend: `pil` or `torchvision`, whose resizing differs by a few grey levels; None
            leaves it to transformers, which takes torchvision where it is installed.

    Raises:
        ModelError: the checkpoint cannot be loaded, is no VLM, or has no decoder layers that can be
            found.
    """
    if str(model) in REGISTERED:
        if revision is not None or trust_remote_code or image_backend not in (None, "pil"):
            raise ModelError(
                f"{model} is a registered model; revision, trust_remote_code and image_backend do "
                "not go with it"
            )
        return _registered(str(model))(dtype=dtype, device_map=device_map)
    patch_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        backend = {} if image_backend is None else {"backend": image_backend}
        processor = AutoProcessor.from_pretrained(str(model), **backend, **source)
        if image_backend is None and type(processor).__name__ in _WANTS_PIL:
            processor = AutoProcessor.from_pretrained(str(model), backend="pil", **source)
        loaded = AutoModelForImageTextToText.from_pretrained(
            str(model), dtype=dtype, device_map=device_map, **source
        )
    except ImportError as error:
        needed = " ".join(str(error).split())
        raise ModelError(
            f"cannot load {model}: its processor or model needs a library that is not installed; "
            f"pip install 'cmrm[families]' brings the common ones. {needed[:200]}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith("Unrecognized configuration class"):
            lines = [
                "transformers does not know its architecture as a VLM; is it a text-only model?"
            ]
        raise ModelError(f"cannot load a vision-language model from {model}: {lines[0]}") from error
    return wrap_vlm(loaded.eval(), processor, model_id=str(model), revision=revision)


def _registered(name: str) -> Callable[..., VLM]:
    module, _, function = REGISTERED[name].partition(":")
    loader: Callable[..., VLM] = getattr(import_module(module), function)
    return loader


def checkpoint_folder(model: str, *, revision: str | None = None) -> Path:
    """Folder with the checkpoint of `model`: a folder, a hub id, or a name in `REGISTERED`.

    Raises:
        ModelError: it is no folder, and cannot be fetched.
    """
    if model in CHECKPOINTS:
        module, _, function = CHECKPOINTS[model].partition(":")
        return Path(getattr(import_module(module), function)())
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{model} is no folder, and cannot be fetched: {reason}") from None


def wrap_vlm(
    model: Any, processor: Any, *, model_id: str | None = None, revision: str | None = None
) -> VLM:
    """Use a transformers model and processor that you have loaded yourself. Neither is changed.

    Wrappers of PEFT, torch.compile and DistributedDataParallel are taken off: calling the wrapper
    inside `steer` is steered as calling the model itself is.

    Raises:
        ModelError: what is missing is named (a language backbone, its decoder layers, an image
            token, a tokenizer, a chat template), or the model is in training mode.
    """
    model = unwrapped(model)
    if not hasattr(processor, "tokenizer") or getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"{type(processor).__name__} has no tokenizer or no image processor; pass the VLM's "
            "processor"
        )
    if not (
        getattr(processor, "chat_template", None)
        or getattr(processor.tokenizer, "chat_template", None)
    ):
        raise ModelError(
            "the processor has no chat template; set `processor.chat_template` to the model's own"
        )
    config = model.config
    image_token_id = image_token_of(config)
    check_eval(model)
    layers, hidden_size = find_decoder_layers(model)
    return VLM(
        model=model,
        processor=processor,
        layers=layers,
        hidden_size=hidden_size,
        image_token_id=image_token_id,
        model_id=model_id or getattr(config, "_name_or_path", "") or type(model).__name__,
        revision=revision or getattr(config, "_commit_hash", None),
        skippable=frozenset(k for k, block in enumerate(layers) if hasattr(block, "cross_attn")),
        placeholders=placeholders_of(processor, image_token_id),
    )


def image_token_of(config: Any) -> int:
    """Id of the token whose positions carry the image, by the model's config.

    Raises:
        ModelError: it names none.
    """
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ModelError(f"{type(config).__name__} names no image_token_id; this is not a VLM's config")


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT, torch.compile or DistributedDataParallel wrappers.

    Raises:
        ModelError: the wrapper changes prompts (PEFT's prompt learning) or copies the model
            (DataParallel).
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ModelError(
                "DataParallel copies the model for every pass; pass its `.module` instead"
            )
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            active = getattr(model, "active_peft_config", None)
            if getattr(active, "is_prompt_learning", False):
                raise ModelError(
                    f"{type(active).__name__} changes the prompt outside of the model; cmrm takes "
                    "adapters in "
                    "the model's layers, such as LoRA"
                )
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def check_eval(model: nn.Module) -> None:
    """Refuse a model in training mode; see `VLM.check_eval`."""
    for name, module in model.named_modules():
        if not module.training or not _acts_in_training(module, name):
            continue
        where = f"its part {name}" if name else type(module).__name__
        raise ModelError(
            f"{where} is in training mode, where dropout makes states random; call model.eval() "
            "first"
        )


def _acts_in_training(module: nn.Module, name: str) -> bool:
    """Whether training mode can change what the module computes."""
    if not name:
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._NormBase) or hasattr(
        module, "attention_dropout"
    )


def placeholders_of(processor: Any, image_token_id: int) -> frozenset[str]:
    """Texts of the processor's image and video tokens, with the marks around them."""
    tokenizer = processor.tokenizer
    texts = {tokenizer.convert_ids_to_tokens(image_token_id)}
    for owner in (processor, tokenizer):
        attributes: Mapping[str, Any] = getattr(owner, "__dict__", {})
        for name, value in attributes.items():
            kind = name.lower()
            visual = any(word in kind for word in ("image", "video", "boi", "eoi", "vision"))
            if (
                visual
                and ("token" in kind or "tag" in kind)
                and isinstance(value, str)
                and value.strip()
            ):
                texts.add(value)
    known = {text for text in texts if isinstance(text, str)}
    vocabulary = tokenizer.get_vocab()
    return frozenset(text for text in known if text in vocabulary)
