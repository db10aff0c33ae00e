"""The model, the shift, the versions and the machine of a run, as results state them."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from cmrm.model.identity import public_name
from cmrm.shift.artifact import ShiftVectors, library_versions

if TYPE_CHECKING:
    from cmrm.engines.base import Engine


def model_info(engine: Engine, name: str | None = None) -> dict[str, Any]:
    """The model, in the form of `measure.schema.ModelInfo`; `name` instead of its id or folder."""
    return {**engine.facts(), "id": name or public_name(engine.model_id)}


def shift_info(shift: ShiftVectors) -> dict[str, Any]:
    """A shift by layer, in the form of `measure.schema.ShiftInfo`."""
    made = shift.provenance
    return {
        "n_anchors": made.n_anchors,
        "norms": list(made.norms),
        "explained_ratio": list(made.explained_ratio),
        "mean_norms": list(made.mean_norms),
        "mean_cosine": list(made.mean_cosine),
        "dropped_ratio": list(made.dropped_ratio),
        "records": {name: dict(record) for name, record in shift.records.items()},
    }


def versions_info() -> dict[str, str]:
    """Versions of cmrm, of the libraries that decide a token, and of Python."""
    return library_versions() | {"python": platform.python_version()}


def machine_info() -> dict[str, Any]:
    """Processor and number of threads."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads()}
