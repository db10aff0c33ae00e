"""`cmrm inspect`: the content of an artifact."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmrm.cli import options as c
from cmrm.cli import screen
from cmrm.cli.recommendation import (
    gap_in_words,
    layers_in_words,
    questions_in_words,
    setting_in_words,
    share,
)

if TYPE_CHECKING:
    from cmrm.model.identity import Identity
    from cmrm.shift.artifact import Artifact, ShiftVectors
    from cmrm.steering.gate import Gate

BY_LAYER = {
    "norms": "norm",
    "explained_ratio": "explained ratio",
    "mean_norms": "norm of the mean",
    "mean_cosine": "cosine to the mean",
    "dropped_ratio": "dropped share",
}
"""Fields of the provenance with a figure for each decoder layer, and their titles."""
AUC = "gate AUC"
"""Title of the areas by layer; their bars go from 0.5, which is chance, to 1."""


def inspect(
    artifact: Annotated[str, typer.Argument(help="Artifact: file, folder or hub id.")],
    as_json: c.JsonOption = False,
) -> None:
    """Provenance, recommended setting and why, harm gate, tensors, model identity, and figures by
    decoder layer."""
    from cmrm.shift.artifact import FORMAT, Artifact
    from cmrm.shift.hub import fetch

    content = Artifact.load(fetch(artifact, revision=None, token=None))
    tensors = {name: list(tensor.shape) for name, tensor in content.tensors.items()}
    identity = identity_summary(content.identity)
    if as_json:
        screen.print_json(
            {
                "format": FORMAT,
                "provenance": asdict(content.provenance),
                "recommended": content.recommended.to_json(),
                "gate": None if content.gate is None else gate_summary(content.gate),
                "records": dict(content.records),
                "tensors": tensors,
                "identity": identity,
            }
        )
        return
    rows = [*_facts(content), *_fitted(content)]
    rows += [[f"tensor {name}", " x ".join(map(str, shape))] for name, shape in tensors.items()]
    rows += [[f"identity: {name}", _text(value)] for name, value in (identity or {}).items()]
    if identity is None:
        rows.append(["identity", "none: written by an older version, bound to the config alone"])
    screen.print_rows(f"{artifact} ({FORMAT})", ["field", "value"], rows)
    _print_layers(content)
    screen.next_step(f"cmrm generate MODEL --shift {artifact} --image photo.jpg 'What is it?'")


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


def _shift(content: Artifact) -> ShiftVectors:
    """The artifact's vectors with what stands beside them."""
    from cmrm.shift.artifact import VECTORS, ShiftVectors

    others = dict(content.tensors)
    return ShiftVectors(
        others.pop(VECTORS), content.provenance, content.recommended, others, gate=content.gate,
        records=content.records,
    )  # fmt: skip


def _facts(content: Artifact) -> list[list[str]]:
    """Provenance without the figures by layer, and the setting of artifacts with vectors."""
    facts = asdict(content.provenance)
    if content.provenance.sequential_layers:
        facts["sequential_layers"] = layers_in_words(content.provenance.sequential_layers)
    rows = [[name, _text(value)] for name, value in facts.items() if name not in BY_LAYER]
    if "vectors" in content.tensors:
        rows.append(["recommended", setting_in_words(_shift(content))])
        use = content.recommended
        for name, value in use.to_json().items():
            shown = str(value)
            if name == "layers":
                shown = "by default" if value is None else layers_in_words(value)
            elif name == "schedule" and use.operator == "fill":
                shown = "no effect under fill"
            rows.append([f"recommended {name}", shown])
    return rows


def gate_summary(gate: Gate) -> dict[str, Any]:
    """How a gate decides; its vectors stay in the file."""
    return {
        "kind": gate.kind,
        "layers": list(gate.layers),
        "threshold": gate.threshold,
        "weights": list(gate.weights),
        "bias": gate.bias,
    }


def _fitted(content: Artifact) -> list[list[str]]:
    """How it was tuned, the gap, and the gate with its figures, where the artifact has them."""
    rows = []
    tuned = content.records.get("tune")
    if tuned is not None:
        rows.append(["tuned", f"trial {tuned['trial']} of {tuned['defense']}: {tuned['reason']}"])
    gap, record = content.records.get("gap"), content.records.get("gate")
    if gap is not None:
        rows += [["gap", gap_in_words(gap)], ["gap: reason", gap["reason"]]]
    gate = content.gate
    if gate is None:
        return rows
    rows.append(["gate", f"{gate.kind}, reads {layers_in_words(gate.layers)}"])
    rows.append(["gate: threshold", f"{gate.threshold:.4g}"])
    if record is None:
        return rows
    alarms = (
        f"{share(record['false_alarms'])} of {record['n_benign']} benign anchors, held out; "
        f"{share(record['wanted_false_alarms'])} wanted"
    )
    recall = f"{share(record['recall'])} of {record['n_harmful']} harmful anchors, held out"
    return [
        *rows,
        ["gate: AUC at its layer", f"{record['auc'][record['layer']]:.4f}"],
        ["gate: false alarms", alarms],
        ["gate: recall", recall],
        ["gate: image questions", questions_in_words(record)],
    ]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value in (None, "") else str(value)


def _print_layers(content: Artifact) -> None:
    """Sparklines and a table of the figures by layer, where the artifact has them."""
    figures = {
        title: list(values)
        for name, title in BY_LAYER.items()
        if (values := getattr(content.provenance, name))
    }
    areas = content.records.get("gate", {}).get("auc")
    if areas:
        figures[AUC] = list(areas)
    if not figures:
        return
    width = max(map(len, figures))
    for title, values in figures.items():
        bounds = f"{min(values):.3g} to {max(values):.3g}"
        bars = screen.sparkline(values, 0.5, 1.0) if title == AUC else screen.sparkline(values)
        typer.echo(f"{title:{width}s}  {bars}  {bounds}")
    rows = [
        [str(layer), *(f"{value:.4g}" for value in row)]
        for layer, row in enumerate(zip(*figures.values(), strict=False))
    ]
    screen.print_rows("by decoder layer", ["layer", *figures], rows)
