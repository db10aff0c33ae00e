"""`cmrm inspect`: the content of an artifact."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c

if TYPE_CHECKING:
    from cmrm.model.identity import Identity
    from cmrm.shift.artifact import Artifact

BY_LAYER = {
    "norms": "norm",
    "explained_ratio": "explained ratio",
    "mean_norms": "norm of the mean",
    "mean_cosine": "cosine to the mean",
    "dropped_ratio": "dropped share",
}
"""Fields of the provenance with a figure for each decoder layer, and their titles."""


def inspect(
    artifact: Annotated[str, typer.Argument(help="Artifact: file, folder or hub id.")],
    as_json: c.JsonOption = False,
) -> None:
    """Provenance, recommended setting, tensors, model identity, and figures by decoder layer."""
    from cmrm.shift.artifact import FORMAT, Artifact
    from cmrm.shift.hub import fetch

    content = Artifact.load(fetch(artifact, revision=None, token=None))
    tensors = {name: list(tensor.shape) for name, tensor in content.tensors.items()}
    identity = identity_summary(content.identity)
    if as_json:
        c.print_json(
            {
                "format": FORMAT,
                "provenance": asdict(content.provenance),
                "recommended": content.recommended.to_json(),
                "tensors": tensors,
                "identity": identity,
            }
        )
        return
    rows = _facts(content)
    rows += [[f"tensor {name}", " x ".join(map(str, shape))] for name, shape in tensors.items()]
    rows += [[f"identity: {name}", _text(value)] for name, value in (identity or {}).items()]
    if identity is None:
        rows.append(["identity", "none: written by an older version, bound to the config alone"])
    c.print_rows(f"{artifact} ({FORMAT})", ["field", "value"], rows)
    _print_layers(content)


def identity_summary(identity: Identity | None) -> dict[str, Any] | None:
    """What an artifact is bound to: architecture, hashes, and how many tensors of which dtype."""
    if identity is None:
        return None
    return {
        "architecture": identity.architecture,
        "tensors": len(identity.weights.names),
        "dtypes": dict(sorted(Counter(identity.weights.kinds).items())),
        "config_values": len(identity.config),
        "processor_values": len(identity.processor),
        "chat_template": identity.template[:12],
        "vocabulary": identity.vocabulary[:12],
    }


def _facts(content: Artifact) -> list[list[str]]:
    """Provenance without the figures by layer, and the setting of artifacts with vectors."""
    facts = asdict(content.provenance)
    rows = [[name, _text(value)] for name, value in facts.items() if name not in BY_LAYER]
    if "vectors" in content.tensors:
        for name, value in content.recommended.to_json().items():
            rows.append([f"recommended {name}", "all" if value is None else str(value)])
    return rows


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return "-" if value in (None, "") else str(value)


def _print_layers(content: Artifact) -> None:
    """Sparklines and a table of the figures by layer, where the artifact has them."""
    figures = {
        title: list(values)
        for name, title in BY_LAYER.items()
        if (values := getattr(content.provenance, name))
    }
    if not figures:
        return
    width = max(map(len, figures))
    for title, values in figures.items():
        bounds = f"{min(values):.3g} to {max(values):.3g}"
        typer.echo(f"{title:{width}s}  {c.sparkline(values)}  {bounds}")
    rows = [
        [str(layer), *(f"{value:.4g}" for value in row)]
        for layer, row in enumerate(zip(*figures.values(), strict=False))
    ]
    c.print_rows("by decoder layer", ["layer", *figures], rows)
