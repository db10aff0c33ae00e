"""Put the demo VLM together once, in the user's cache: backbone from its wheel, our adapter, our tower and connector."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from cmrm.demo import DEMO
from cmrm.demo.assets import WHEEL_SHA256
from cmrm.errors import CmrmError
from cmrm.files import atomic_path, cache_dir, sha256_file
from cmrm.model.vlm import VLM, load_vlm

CHECKSUMS = "checksums.json"
IMAGE_BACKEND = "pil"
"""The demo's image processing does not hang on whether torchvision is installed."""


def weights_dir() -> Path:
    """The weights that ship with cmrm: `adapter/` (LoRA) and `visual.safetensors` (tower and connector)."""
    return Path(str(files("cmrm.demo").joinpath("weights")))


def demo_checkpoint(weights: Path | None = None) -> Path:
    """Folder of the assembled checkpoint (transformers format, bfloat16), built on the first call.

    The folder's name carries the hashes of everything that it is made of, and its files are checked against the sums
    written at assembly; a damaged one is built anew.

    Raises:
        CmrmError: the backbone cannot be fetched, or the weights are missing.
    """
    weights = weights or weights_dir()
    target = checkpoint_path(weights)
    if not intact(target):
        with atomic_path(target) as folder:
            _assemble(weights, folder)
            sums = {f.name: sha256_file(f) for f in sorted(folder.iterdir())}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    return target


def checkpoint_path(weights: Path) -> Path:
    """Where the checkpoint that is assembled with `weights` lies, or will.

    Raises:
        CmrmError: a part of the weights is missing.
    """
    parts = [weights / "adapter" / "adapter_model.safetensors", weights / "visual.safetensors"]
    for part in parts:
        if not part.is_file():
            raise CmrmError(f"the demo's weights are incomplete: {part} is missing; install cmrm anew")
    key = "-".join([WHEEL_SHA256[:8], *(sha256_file(part)[:8] for part in parts)])
    return cache_dir() / "demo-vlm" / key


def intact(folder: Path) -> bool:
    """Whether every file of an assembled checkpoint has the sum that was written at assembly."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(sums) and all(sha256_file(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def _assemble(weights: Path, folder: Path) -> None:
    from cmrm.demo.train.align import aligned_backbone
    from cmrm.demo.backbone import build_llava, build_processor
    from cmrm.demo.train.connect import load_visual, visual_weights

    backbone, tokenizer = aligned_backbone(weights / "adapter")
    model = build_llava(backbone)
    loaded = model.load_state_dict(load_visual(weights / "visual.safetensors"), strict=False)
    wrong = [*loaded.unexpected_keys, *(k for k in loaded.missing_keys if k in visual_weights(model))]
    if wrong:
        raise CmrmError(f"the demo's weights do not fit the model: {wrong[:3]}; install cmrm anew")
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def load_demo_vlm(weights: Path | None = None) -> VLM:
    """The demo VLM in bfloat16, assembled if need be."""
    return load_vlm(demo_checkpoint(weights), dtype=torch.bfloat16, image_backend=IMAGE_BACKEND)


def load_named_vlm(model: str, **options: Any) -> VLM:
    """The VLM that `model` names: a folder, a hub id, or `demo`; `options` are those of `load_vlm`."""
    if model == DEMO:
        return load_vlm(demo_checkpoint(), **(options | {"image_backend": IMAGE_BACKEND}))
    return load_vlm(model, **options)
