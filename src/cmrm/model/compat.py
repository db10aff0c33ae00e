"""Libraries that do not fit each other, and names that differ between versions of transformers."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

_DECLARED: list[torch.library.Library] = []
"""Kept alive for the life of the process: a `Library` withdraws its operators when it is
collected."""


def patch_torchvision() -> None:
    """Make torchvision importable beside a torch build that its compiled operators do not fit.

    PyPI's torchvision is built against CUDA. Beside a CPU-only torch its operator library does not
    load, and importing torchvision fails because the schemas of `nms` and `qnms` are missing (box
    suppression, which no image processor uses). They are declared here without an implementation:
    the transforms work, and a call of `nms` still fails. Does nothing when torchvision is absent,
    imported already, or fits.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _DECLARED.append(library)
        import torchvision  # noqa: F401


CACHE_NAMES = ("cache", "past_key_values")
"""The key-value cache in a model's arguments and output: since transformers 5.24, and before."""


def with_cache(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass `cache` to a model or to its `forward`."""
    parameters = inspect.signature(getattr(forward, "forward", forward)).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache that a model was called with, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in a model's output (an output object or a tuple), or None."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    if not isinstance(output, Mapping):
        return None
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)


def cache_length(cache: Any) -> int:
    """Number of token positions that `cache` covers; 0 for None. A static cache's counter is
    read."""
    return 0 if cache is None else int(cache.get_seq_length())


def backbone_of(model: Any) -> Any:
    """The model without its `lm_head`, where transformers keeps the two apart; otherwise the whole
    model."""
    inner = getattr(model, "model", None)
    if (
        inner is None
        or not hasattr(model, "lm_head")
        or "input_ids" not in inspect.signature(inner.forward).parameters
    ):
        return model
    return inner


def emulates_bfloat16(device_map: Any = None) -> bool:
    """Whether a model would run on a CPU that has no instructions for bfloat16.

    There a product of matrices takes many times as long as in float32. False where the device is
    no CPU, or torch cannot tell.
    """
    on_cpu = device_map in (None, "cpu") or (device_map == "auto" and not torch.cuda.is_available())
    if not on_cpu or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not supported()
