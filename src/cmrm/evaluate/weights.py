"""Weights of models as far as they can be seen from here: on disk, in the hub's cache, on the hub.

Nothing is downloaded: a hub is asked for sizes alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmrm.judges import judge_model

PATTERNS = ("*.safetensors", "*.bin", "*.gguf")
"""Files of weights; the first pattern with a file counts."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at before a run."""

    subject: str
    """Data, model, memory, disk, time; and of what."""
    good: bool | None
    """Whether it is as it has to be; None: it cannot be known here."""
    text: str
    """What was seen, and the remedy."""


@dataclass(frozen=True)
class Weights:
    """A model's weights."""

    size: int | None
    """Bytes, None where it is not known."""
    local: bool
    """Whether they are on this machine."""
    finding: Finding
    """For the table."""


def model_findings(
    source: str,
    judges: Iterable[str],
    device_map: Any = None,
    *,
    revision: str | None = None,
    registered: Weights | None = None,
) -> tuple[Weights, list[Finding]]:
    """Weights of the model, and what there is to say of them and of the models that judge.

    Args:
        source: the model: a folder, a hub id, or the name of a registered model.
        judges: names of judges.
        device_map: where the model will lie.
        revision: of the hub id.
        registered: weights of a registered model, which only its owner can see.

    Returns:
        The model's weights; findings on them, on judging models, on memory and disk for them all.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    model = registered or weights_of(source, "model", revision=revision)
    judging = dict.fromkeys(name for name in map(judge_model, judges) if name is not None)
    models = [model, *(weights_of(name, "judge") for name in judging)]
    findings = [*(weights.finding for weights in models), _memory(models, device_map)]
    download = sum(weights.size or 0 for weights in models if not weights.local)
    if download:
        findings.append(disk_finding("disk for weights", download, Path(HF_HUB_CACHE)))
    return model, findings


def weights_of(source: str, role: str, *, revision: str | None = None) -> Weights:
    """The weights of a folder or a hub model; `role` stands before its name in the table."""
    subject = f"{role} {source}"
    if Path(source).exists():
        return folder_weights(Path(source), subject)
    return _hub_weights(source, subject, revision)


def folder_weights(folder: Path, subject: str) -> Weights:
    """The weights of a checkpoint on disk."""
    if not (folder / "config.json").is_file():
        return _unusable(subject, f"{folder} has no config.json; name the folder of a checkpoint")
    pattern = next((p for p in PATTERNS if any(folder.glob(p)) or _indices(folder, p)), "")
    missing = _missing_shards(folder, pattern)
    files = list(folder.glob(pattern)) if pattern else []
    if missing or not files:
        state = f"{', '.join(missing[:3])} missing" if missing else "there are no weights"
        return _unusable(subject, f"{folder}: {state}")
    size = sum(file.stat().st_size for file in files)
    return Weights(size, True, Finding(subject, True, f"{gigabytes(size)} on disk"))


def _unusable(subject: str, reason: str, *, local: bool = True) -> Weights:
    return Weights(None, local, Finding(subject, False, reason))


def _indices(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(f"{pattern}.index.json"))


def _missing_shards(folder: Path, pattern: str) -> list[str]:
    for index in _indices(folder, pattern) if pattern else ():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = set(weight_map.values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return [f"a readable {index.name}"]
        return sorted(name for name in names if not (folder / name).is_file())
    return []


def _hub_weights(source: str, subject: str, revision: str | None) -> Weights:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def unusable(reason: str) -> Weights:
        return _unusable(subject, reason, local=False)

    try:
        cached = Path(snapshot_download(source, revision=revision, local_files_only=True))
        weights = folder_weights(cached, subject)
        if weights.finding.good:
            return weights
    except HFValidationError:
        return unusable(f"{source} is neither a folder here nor a hub id")
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        info = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=20)
    except RevisionNotFoundError:
        return unusable(f"the hub has no revision {revision!r} of it")
    except (GatedRepoError, RepositoryNotFoundError):
        return unusable("not on the hub under this id, or gated: accept its licence and log in")
    except Exception as error:  # whatever the network raises, nothing is claimed of the model
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        text = f"not in the cache, and the hub cannot be asked: {reason}"
        return Weights(None, False, Finding(subject, None, text))
    if info.gated and not _may_read(source):
        return unusable(f"gated: accept its licence at huggingface.co/{source} and log in")
    files = [(file.rfilename, file.size or 0) for file in info.siblings or []]
    safe = any(name.endswith(".safetensors") for name, _ in files)
    suffix = ".safetensors" if safe else ".bin"
    size = sum(size for name, size in files if name.endswith(suffix) and "/" not in name)
    text = f"{gigabytes(size)} to be downloaded"
    return Weights(size, False, Finding(subject, True, text))


def _may_read(source: str) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(source)
    except Exception:  # refused, or not to be asked: either way it cannot be downloaded now
        return False
    return True


def _memory(models: Sequence[Weights], device_map: Any) -> Finding:
    sizes = [weights.size for weights in models]
    if any(size is None for size in sizes):
        return Finding("memory", None, "not known: a model's size is not")
    needed = sum(size for size in sizes if size is not None)
    device, free = free_memory(device_map)
    text = f"{gigabytes(needed)} of weights, {gigabytes(free)} free on the {device}"
    if needed > free:
        remedy = "take a smaller dtype, or judge afterwards with `cmrm rescore`"
        return Finding("memory", False, f"{text}; {remedy}")
    return Finding("memory", True, text)


def free_memory(device_map: Any = None) -> tuple[str, int]:
    """Where the model would lie, and the free bytes there.

    Of all accelerators where one is used, else of the machine.
    """
    if torch.cuda.is_available() and device_map not in (None, "cpu"):
        return "GPU", sum(torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count()))
    import psutil

    return "CPU", int(psutil.virtual_memory().available)


def disk_finding(subject: str, needed: int, place: Path) -> Finding:
    """Whether `needed` bytes are free where `place` is or would be."""
    folder = place.expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{gigabytes(needed)} needed, {gigabytes(free)} free at {folder}"
    return Finding(subject, needed <= free, text)


def gigabytes(size: int) -> str:
    """Bytes as GB, small ones as MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
