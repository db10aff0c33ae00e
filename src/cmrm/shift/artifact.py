"""Shift vectors with their provenance, as one safetensors file (never a pickle)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmrm.errors import ArtifactError
from cmrm.files import atomic_path
from cmrm.model.vlm import VLM, config_hash

FORMAT = "cmrm-shift/1"


@dataclass(frozen=True)
class Provenance:
    """Where shift vectors come from."""

    model_id: str
    """Hub id or path of the model that they were estimated on."""
    revision: str | None
    """Hub commit, where known."""
    architecture: str
    """Class name of the model."""
    hidden_size: int
    """Width d of the residual stream."""
    n_layers: int
    """Number of decoder layers L."""
    config_hash: str
    """Hex sha256 of the model's config (`models.config_hash`)."""
    anchor_hash: str
    """Hex sha256 of the anchor set (`samples.set_hash`)."""
    n_anchors: int
    """Number of anchors N."""
    text_condition: str
    """Condition of h_t."""
    corruption: str
    """Condition of h_c: `blank` or `noise`."""
    seed: int
    """Seed of the corruption."""
    estimator: str
    """`pca`, `mean` or `icv`."""
    norms: tuple[float, ...]
    """Euclidean norm of each layer's vector."""
    explained_ratio: tuple[float, ...]
    """Per layer: share of the uncentred differences' sum of squares along the vector's direction, 0..1."""
    versions: dict[str, str]
    """Library versions at estimation."""
    licence_note: str = "Derived from the model's activations; the model's own licence applies."
    """What a user has to mind."""


@dataclass(frozen=True)
class Recommended:
    """How the vectors are meant to be used: the setting that was chosen on the anchor split."""

    alpha: float = 1.0
    """Strength, >= 0."""
    schedule: str = "telescoped"
    """`telescoped` or `per_layer`."""
    positions: str = "last"
    """`last`, `all`, `after_image`, `generated` or `last_prompt`."""
    layers: tuple[int, ...] | None = None
    """0-based decoder layers, or None for all."""
    preserve_norm: bool = False
    """Rescale each state to the norm that it had."""


@dataclass(frozen=True, eq=False)
class ShiftVectors:
    """Dataset-level shift per decoder layer, pointing FROM the corrupted-image TO the text-only state."""

    vectors: torch.Tensor
    """float32 [L, d]; row l belongs to the output of decoder block l and is ADDED there, times alpha >= 0."""
    provenance: Provenance
    """Where they come from."""
    recommended: Recommended
    """Setting to use them with."""

    def __post_init__(self) -> None:
        shape = (self.provenance.n_layers, self.provenance.hidden_size)
        if tuple(self.vectors.shape) != shape or self.vectors.dtype != torch.float32:
            raise ArtifactError(
                f"vectors are {self.vectors.dtype} {tuple(self.vectors.shape)}, the provenance says float32 {shape}"
            )
        bad = (~torch.isfinite(self.vectors)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ArtifactError(f"vectors hold NaN or infinity at decoder layers {bad}; extract them anew")

    def save(self, path: str | Path) -> Path:
        """Write the artifact; the file appears under its name only when it is whole. Same content, same bytes.

        Raises:
            ArtifactError: the place cannot be written to.
        """
        target = Path(path)
        content = {"format": FORMAT, "provenance": asdict(self.provenance), "recommended": asdict(self.recommended)}
        # One key alone: safetensors writes several in an order that changes from run to run.
        header = {"cmrm": json.dumps(content, sort_keys=True)}
        try:
            with atomic_path(target) as part:
                save_file({"vectors": self.vectors.contiguous()}, str(part), metadata=header)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"cannot write {target}: {error}") from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> ShiftVectors:
        """Read an artifact.

        Raises:
            ArtifactError: the file is missing, broken, of another format, or holds NaN.
        """
        source = Path(path)
        if not source.is_file():
            raise ArtifactError(f"there is no shift artifact at {source}")
        try:
            with safe_open(str(source), "pt") as handle:
                header = json.loads((handle.metadata() or {}).get("cmrm", "{}"))
                if header.get("format") != FORMAT:
                    raise ArtifactError(f"{source} has format {header.get('format')!r}, this version reads {FORMAT!r}")
                vectors = handle.get_tensor("vectors")
            provenance = _build(Provenance, header["provenance"])
            recommended = _build(Recommended, header["recommended"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{source} is not a whole shift artifact: {error}") from error
        return cls(vectors, provenance, recommended)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> ShiftVectors:
        """Load from a file, from a folder that holds `shift.safetensors`, or from a hub repository.

        Raises:
            ArtifactError: nothing is there, or it is no whole artifact.
        """
        from cmrm.shift.hub import fetch

        return cls.load(fetch(source, revision=revision, token=token))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload shift vectors",
    ) -> str:
        """Upload to a hub repository (made if need be) as `shift.safetensors` with a generated card; returns the commit.

        Raises:
            ArtifactError: the hub refuses, or cannot be reached.
        """
        from cmrm.shift.hub import push

        return push(self, repo_id, private=private, token=token, message=commit_message)

    def check(self, vlm: VLM) -> None:
        """Refuse a model that these vectors do not belong to.

        Raises:
            ArtifactError: layer count, width, architecture or config differ; the mismatch is named.
        """
        held = self.provenance
        pairs = {
            "decoder layers": (held.n_layers, vlm.n_layers),
            "hidden size": (held.hidden_size, vlm.hidden_size),
            "architecture": (held.architecture, type(vlm.model).__name__),
            "config hash": (held.config_hash[:12], config_hash(vlm)[:12]),
        }
        wrong = [f"{name} {ours} there, {theirs} here" for name, (ours, theirs) in pairs.items() if ours != theirs]
        if wrong:
            raise ArtifactError(
                f"this shift was estimated on {held.model_id} and does not fit {vlm.model_id}: {'; '.join(wrong)}; "
                "estimate one for this model"
            )


def library_versions() -> dict[str, str]:
    """Versions that can change a state or a token."""
    return {name: version(name) for name in ("cmrm", "torch", "transformers")}


def _build(kind: type[Any], data: dict[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise ValueError(f"unknown fields {unknown}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
