"""What the page's layer explorer shows: the figures of states, as data for its script."""

from __future__ import annotations

from typing import Any

from cmrm.report.drawing import colour
from cmrm.report.headline import in_order
from cmrm.report.state_plots import token_labels
from cmrm.report.tables import Results, label


def explorer_data(results: Results) -> dict[str, Any] | None:
    """Lines, planes, gate and positions by decoder layer (0-based); None without states.

    `names` are the conditions and defences in their order, each with words and a colour; everything
    else is by their keys.
    """
    geometry = results["geometry"]
    if not geometry or not geometry["relative_distance_to_query"]:
        return None
    gate = geometry.get("gate")
    lines = geometry["relative_distance_to_query"]
    names = in_order(lines)
    return {
        "layers": len(lines[names[0]]),
        "names": [
            {"key": name, "label": label(name), "colour": colour(name, place)}
            for place, name in enumerate(names)
        ],
        "lines": [
            {"title": title, "values": values}
            for title, values in (
                ("Distance to the text-only state / its norm", lines),
                ("Cosine to the text-only state", geometry["cosine_to_query"]),
                ("Refusal coordinate", geometry.get("refusal_coordinate")),
            )
            if values
        ],
        "planes": geometry.get("pca") or {},
        "samples": [
            ", ".join(filter(None, (s["label"], s["category"].replace("_", " "), s["request"])))
            for s in geometry.get("samples", ())
        ],
        "gate": gate,
        "steers": " and ".join(map(label, gate.get("steers", ()))) if gate else "",
        "positions": {
            name: {
                "labels": token_labels(shift),
                "n": shift["n"],
                "values": shift["relative_distance"],
            }
            for name, shift in geometry.get("positions", {}).items()
            if shift["offsets"]
        },
    }
