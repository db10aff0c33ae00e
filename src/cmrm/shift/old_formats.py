"""Artifacts of older formats: they know their model's config, and nothing of its weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from cmrm.model.vlm import VLM
from cmrm.shift.artifact import VECTORS, Artifact
from cmrm.shift.provenance import Provenance, provenance_from_json
from cmrm.steering.setting import Steering

OLD_SHIFT = "cmrm-shift/1"
OLD_DEFENSE = "cmrm-defense/1"


def old_shift(content: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Artifact:
    """An artifact of the first format: vectors, bound to the whole config, without a digest."""
    warnings.warn(
        "this artifact was written by an older cmrm: it knows the model's config, not its weights, "
        "and "
        "has no digest; extract it again to bind it to them",
        stacklevel=4,
    )
    made = provenance_from_json(content["provenance"])
    return Artifact({VECTORS: tensors[VECTORS]}, made, Steering.from_json(content["recommended"]))


_OLD_STATE = {
    "shiftdc": {"safety": "direction"},
    "refusal_direction": {"refusal": "direction"},
    "null_space": {"direction": "modality"},
}
"""Defence -> what its tensors were called in the first format."""


def old_defense(header: str, tensors: dict[str, torch.Tensor]) -> Artifact:
    """The state of a defence in its first format, which names the defence and a hash of the
    config."""
    _, name, hash_of_config = header.split("\n")
    renamed = _OLD_STATE.get(name, {})
    tensors = {renamed.get(key, key): tensor for key, tensor in tensors.items()}
    shape = next((tuple(tensor.shape) for tensor in tensors.values() if tensor.dim() == 2), (0, 0))
    made = Provenance(
        "unknown", None, "unknown", shape[1], shape[0], hash_of_config, estimator=name
    )  # fmt: skip
    return Artifact(tensors, made)


_OLD_VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "_commit_hash",
    "_attn_implementation",
}


def old_config_hash(vlm: VLM) -> str:
    """The hash of the whole config that the older formats were bound to."""

    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stable(v) for k, v in sorted(value.items()) if k not in _OLD_VOLATILE}
        return value

    raw = json.loads(json.dumps(vlm.model.config.to_dict(), default=str))
    return hashlib.sha256(json.dumps(stable(raw), sort_keys=True).encode()).hexdigest()
