"""Mends for libraries that do not fit each other, and names that differ between the versions of transformers that cmrm runs on."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

_DECLARED: list[torch.library.Library] = []
"""Kept alive for the life of the process: a `Library` withdraws its operators when it is collected."""


def mend_torchvision() -> None:
    """Let torchvision be imported beside a torch build that its compiled operators do not fit.

    PyPI's torchvision is built against CUDA; beside a CPU-only torch its operator library does not load, and importing
    torchvision fails because the schemas of `nms` and `qnms` (box suppression, which no image processor uses) are not
    there. They are declared here without an implementation, so that the transforms work and a call of `nms` still
    fails. Does nothing when torchvision is absent, imported already, or imports as it is.
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
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _DECLARED.append(library)
        import torchvision  # noqa: F401


CACHE_NAMES = ("cache", "past_key_values")
"""The key-value cache among a model's arguments and in its output: since transformers 5.24, and before."""


def with_cache(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand `cache` to a model or to its `forward`."""
    taken = inspect.signature(getattr(forward, "forward", forward)).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache, "use_cache": True}


def cache_given(arguments: Mapping[str, Any]) -> Any:
    """The cache that a model was called with, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None."""
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
