"""Mends for libraries that do not fit each other, made only where importing them would fail otherwise."""

from __future__ import annotations

import importlib.util
import sys

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
