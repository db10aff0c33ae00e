"""Whether an artifact belongs to a checkpoint that vLLM serves, by sampled weights.

vLLM fuses and renames tensors, so that a whole `model.identity.Identity` cannot be compared. What
it keeps as it is can be: norms in a loaded model, projections in the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cmrm.errors import ArtifactError, ModelError
from cmrm.model.compat import patch_torchvision
from cmrm.model.identity import Identity, summary
from cmrm.model.weights import alike, kind_of, sample_of

_NORM = re.compile(r"\blayers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight$")
_PROJECTION = re.compile(r"\blayers\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)\.weight$")
Place = tuple[int, str]
"""Decoder layer (0-based) and part."""


def check_loaded(layers: dict[int, Any], identity: Identity | None) -> None:
    """Compare the norms of vLLM's decoder layers with those of the artifact's model.

    Raises:
        ArtifactError: they differ, or nothing can be compared.
    """
    parts = ("input_layernorm", "post_attention_layernorm")
    _compare(
        (((n, part), getattr(layer, part).weight) for n, layer in layers.items() for part in parts),
        identity, _NORM,
    )  # fmt: skip


def check_checkpoint(folder: Path, identity: Identity | None) -> None:
    """Compare a checkpoint on disk with the artifact's model: two projections of every decoder
    layer, config, image processing, chat template and vocabulary.

    Raises:
        ArtifactError: they differ, or nothing can be compared. ModelError: the folder cannot be
            read.
    """
    check_files(folder, identity)
    assert identity is not None
    differences = identity.unlike(*config_and_processor(folder))
    if differences:
        raise ArtifactError(f"the artifact was estimated on another model: {summary(differences)}")


def config_and_processor(folder: Path) -> tuple[Any, Any]:
    """transformers' config and processor of a checkpoint.

    Raises:
        ModelError: they cannot be read.
    """
    patch_torchvision()
    from transformers import AutoConfig, AutoProcessor

    try:
        return AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(f"cannot read config and processor of {folder}: {reason}") from error


def check_files(folder: Path, identity: Identity | None) -> None:
    """Compare two projections of every decoder layer on disk with those of the artifact's model.

    Raises:
        ArtifactError: they differ, or nothing can be compared.
    """
    _compare(stored_projections(folder), identity, _PROJECTION)


def stored_projections(folder: Path) -> Iterator[tuple[Place, torch.Tensor]]:
    """Two projections of every decoder layer of a checkpoint, by their place."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  a handle is no mapping
                place = _place(name, _PROJECTION)
                if place is not None:
                    yield place, opened.get_tensor(name)


def _place(name: str, part: re.Pattern[str]) -> Place | None:
    """Where a tensor of the text backbone stands; None for any other."""
    match = part.search(name)
    return None if match is None or "vision" in name else (int(match[1]), match[2])


def _compare(
    tensors: Iterable[tuple[Place, torch.Tensor]], identity: Identity | None, part: re.Pattern[str]
) -> None:
    if identity is None:
        raise ArtifactError("the artifact names no weights; extract it again with this version")
    known = identity.weights
    stored = {
        place: k for k, name in enumerate(known.names) if (place := _place(name, part)) is not None
    }
    compared, different = 0, []
    for place, tensor in tensors:
        k = stored.get(place)
        if k is None or not known.checksums[k]:
            continue
        compared += 1
        here = sample_of(tensor.detach()).float().cpu()
        if not alike(here, kind_of(tensor), known.samples[k], known.kinds[k]):
            different.append(f"decoder layer {place[0]}'s {place[1]}")
    if different or not compared:
        reason = f"{', '.join(different[:3])} differ" if different else "no weight can be compared"
        raise ArtifactError(f"the artifact was estimated on another model: {reason}")
