"""Checkpoints under the tensor names that vLLM reads.

transformers 5 saves the vision tower of LLaVA-like models as `vision_tower.encoder...`. vLLM reads
`vision_tower.vision_model.encoder...`, as checkpoints on the hub have it. Others stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmrm.errors import InputError, ModelError
from cmrm.files import atomic_path, cache_dir

TOWER = "vision_tower."
"""How names of the vision tower begin."""
READ = "vision_tower.vision_model."
"""How vLLM reads them."""


def readable_by_vllm(folder: Path) -> Path:
    """The folder itself, or a copy in the cache with the names that vLLM reads.

    Raises:
        ModelError: its tensors cannot be read. InputError: the copy cannot be written.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not _has_clip_tower(folder):
        return folder
    try:
        names = {file: _names(file) for file in files}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the checkpoint in {folder} cannot be read: {error}") from None
    old = [name for listed in names.values() for name in listed if _renamed(name) != name]
    if not old:
        return folder
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()[:16]
    target = cache_dir() / "vllm" / key
    if (target / "config.json").is_file():
        return target
    try:
        with atomic_path(target) as part:
            part.mkdir(parents=True)
            for file in sorted(folder.iterdir()):
                if file in names:
                    _copy_renamed(file, part / file.name)
                elif file.name.endswith(".index.json"):
                    index = json.loads(file.read_text(encoding="utf-8"))
                    mapping = index["weight_map"]
                    index["weight_map"] = {_renamed(name): at for name, at in mapping.items()}
                    (part / file.name).write_text(json.dumps(index), encoding="utf-8")
                elif file.is_file():
                    shutil.copyfile(file, part / file.name)
    except OSError as error:
        raise InputError(f"cannot write a copy for vLLM to {target}: {error}") from None
    return target


def stored_tensors(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every stored tensor, without its values.

    Raises:
        ModelError: a file cannot be read.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  a handle is no mapping
                    yield name, list(stored.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the checkpoint in {folder} cannot be read: {error}") from None


def _has_clip_tower(folder: Path) -> bool:
    """Whether the vision tower is one whose names vLLM reads in the older form."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no config.json that can be read: {error}") from None
    kind = str((config.get("vision_config") or {}).get("model_type", ""))
    return config.get("model_type", "").startswith("llava") and kind.startswith(("clip", "siglip"))


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def _renamed(name: str) -> str:
    bare = name.startswith(TOWER) and not name.startswith(READ)
    return READ + name.removeprefix(TOWER) if bare else name


def _copy_renamed(file: Path, target: Path) -> None:
    with safe_open(file, framework="pt") as stored:
        tensors = {_renamed(name): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        save_file(tensors, target, metadata=stored.metadata() or {"format": "pt"})
