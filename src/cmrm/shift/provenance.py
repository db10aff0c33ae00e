"""Where an artifact's tensors come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

from cmrm.model.identity import public_name


@dataclass(frozen=True)
class Provenance:
    """Where an artifact's tensors come from."""

    model_id: str
    """Hub id of the model, or the last part of its local path."""
    revision: str | None
    """Hub commit, where known."""
    architecture: str
    """Class name of the model."""
    hidden_size: int
    """Width d of the residual stream."""
    n_layers: int
    """Number of decoder layers L."""
    config_hash: str = ""
    """Hex sha256 of the config's values that decide states."""
    anchor_hash: str = ""
    """Hex sha256 of the anchor set (`prompts.splits.set_hash`)."""
    n_anchors: int = 0
    """Number of anchors N."""
    text_condition: str = ""
    """Condition of h_t."""
    corruption: str = ""
    """Condition of h_c, such as `blank` or `noise`."""
    seed: int = 0
    """Seed of the corruption."""
    estimator: str = ""
    """`pca`, `mean` or `icv`; of a defence's state its name."""
    norms: tuple[float, ...] = ()
    """Euclidean norm of each layer's vector."""
    explained_ratio: tuple[float, ...] = ()
    """Per layer: share of the uncentred differences' sum of squares along the vector's direction,
    0..1."""
    mean_norms: tuple[float, ...] = ()
    """Euclidean norm of each layer's mean difference."""
    mean_cosine: tuple[float, ...] = ()
    """Cosine of each layer's vector and mean difference, 0..1; near 0 the vector says little of the
    mean."""
    dropped_ratio: tuple[float, ...] = ()
    """Per layer: share of the differences' sum of squares that the sketch left out, 0 where it is
    exact."""
    n_benign: int = 0
    """Number of benign anchors, for direction and gate."""
    benign_hash: str = ""
    """Hex sha256 of those."""
    benign_share: float = 0.0
    """Share of benign anchors among those that the shift was estimated on, 0..1."""
    sequential_layers: tuple[int, ...] = ()
    """Decoder layers that vectors of the schedule `sequential` were estimated for."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions at estimation."""
    licence_note: str = "Derived from the model's activations; the model's own licence applies."
    """What a user has to mind."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_id", public_name(self.model_id))


def library_versions() -> dict[str, str]:
    """Versions that can change a state or a token."""
    return {name: version(name) for name in ("cmrm", "torch", "transformers")}


def provenance_from_json(values: Mapping[str, Any]) -> Provenance:
    """Provenance from a mapping of its fields.

    Raises:
        ValueError, TypeError: a field is unknown, missing, or of another kind.
    """
    known = {entry.name: entry for entry in fields(Provenance)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"the provenance has unknown fields {', '.join(unknown)[:80]}")
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    made: Provenance = Provenance(**plain)
    for name in ("n_layers", "hidden_size", "n_anchors", "n_benign", "seed"):
        if not isinstance(getattr(made, name), int) or isinstance(getattr(made, name), bool):
            raise ValueError(f"the provenance's {name} is no whole number")
    for name in ("norms", "explained_ratio", "mean_norms", "mean_cosine", "dropped_ratio"):
        if not all(isinstance(value, int | float) for value in getattr(made, name)):
            raise ValueError(f"the provenance's {name} are no numbers")
    if not all(isinstance(layer, int) for layer in made.sequential_layers):
        raise ValueError("the provenance's sequential_layers are no decoder layers")
    return made
