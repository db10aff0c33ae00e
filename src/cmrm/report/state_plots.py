"""Figures of states and of the shift, by decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cmrm.report.drawing import COLOURS, colour
from cmrm.report.headline import in_order
from cmrm.report.tables import Results, label

# After `drawing`, which names the extra where matplotlib is missing.
import numpy as np  # isort: skip
from matplotlib.axes import Axes  # isort: skip
from matplotlib.figure import Figure  # isort: skip

PLANES = 6
"""Layers whose planes are drawn, evenly spaced from the first to the last."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""Of the points of conditions and defences, in their order."""


def distances(results: Results) -> Figure | None:
    """Distance and cosine of each condition's state to that of the query alone, by layer."""
    geometry = results["geometry"] or {}
    panels = {
        "distance to query / its norm": geometry.get("relative_distance_to_query", {}),
        "cosine to query": geometry.get("cosine_to_query", {}),
    }
    return _curves(
        {
            title: {name: values for name, values in by_condition.items() if name != "query"}
            for title, by_condition in panels.items()
        }
    )


def corruptions(results: Results) -> Figure | None:
    """Mean shift of each corruption against blank's: cosine and ratio of norms, by layer."""
    compared = (results["geometry"] or {}).get("corruptions") or {}
    return _curves(
        {
            "norm / norm of blank's shift": {n: by["norm_ratio"] for n, by in compared.items()},
            "cosine to blank's shift": {n: by["cosine"] for n, by in compared.items()},
        }
    )


def _curves(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure | None:
    """Two plots over the decoder layers, a line for each name; the first begins at zero."""
    if not all(panels.values()):
        return None
    figure = Figure(figsize=(9, 3.4))
    both = figure.subplots(1, 2)
    for axes, (title, lines) in zip(both, panels.items(), strict=True):
        for place, name in enumerate(in_order(lines)):
            axes.plot(lines[name], color=colour(name, place), label=label(name))
        axes.set(xlabel="decoder layer (0-based)", ylabel=title)
    both[0].set_ylim(0, None)
    both[1].legend()
    figure.tight_layout()
    return figure


def pca(results: Results) -> Figure | None:
    """States in the plane of their first two principal components, a plot for some layers."""
    every = (results["geometry"] or {}).get("pca")
    if not every:
        return None
    layers = sorted(every, key=int)
    drawn = {round(k * (len(layers) - 1) / (PLANES - 1)) for k in range(PLANES)}
    planes = {layers[k]: every[layers[k]] for k in sorted(drawn)}
    rows = -(-len(planes) // 3)
    figure = Figure(figsize=(9.6, 0.6 + 2.7 * rows))
    grid = figure.subplots(rows, 3, squeeze=False)
    for axes, layer in zip(grid.flat, planes, strict=False):
        plane = planes[layer]
        for place, name in enumerate(in_order(plane["points"])):
            x, y = zip(*plane["points"][name], strict=True)
            axes.scatter(
                x, y, s=9, marker=MARKERS[place % len(MARKERS)], color=colour(name, place),
                label=label(name), alpha=0.75,
            )  # fmt: skip
        share = 100 * sum(plane["explained"])
        axes.set_title(f"layer {layer} ({share:.0f} % of variance)", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in list(grid.flat)[len(planes) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5)
    figure.tight_layout(rect=(0, 0.2 / rows**0.5 / 2, 1, 1))
    return figure


def coordinates(results: Results) -> Figure | None:
    """Mean coordinate along the refusal direction, by layer."""
    lines = (results["geometry"] or {}).get("refusal_coordinate")
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    for place, name in enumerate(in_order(lines)):
        axes.plot(lines[name], color=colour(name, place), label=label(name))
    axes.set(xlabel="decoder layer (0-based)", ylabel="refusal coordinate")
    axes.legend()
    return figure


def gate(results: Results) -> Figure | None:
    """What the harm gate reads of each sample with its own image, beside its threshold."""
    readings = (results["geometry"] or {}).get("gate")
    if not readings or not any(readings["scores"].values()):
        return None
    scores = {name: values for name, values in readings["scores"].items() if values}
    figure = Figure(figsize=(6.4, 0.9 + 0.6 * len(scores)))
    axes = figure.subplots()
    shades = {"harmful": COLOURS["original"], "benign": COLOURS["query"]}
    for place, (name, values) in enumerate(scores.items()):
        spread = np.linspace(-0.22, 0.22, 7)[np.arange(len(values)) % 7]
        axes.scatter(
            values, place + spread, s=14, marker=MARKERS[place % len(MARKERS)], alpha=0.75,
            color=shades.get(name, colour("", place)),
        )  # fmt: skip
    axes.axvline(readings["threshold"], ls="--", lw=1.2, color=COLOURS["cmrm_dataset"])
    axes.text(
        readings["threshold"], len(scores) - 0.45, " opens above", fontsize=8.5, va="bottom",
        color=COLOURS["cmrm_dataset"],
    )  # fmt: skip
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_ylim(-0.6, len(scores) - 0.1)
    layers = ", ".join(map(str, readings["layers"]))
    axes.set_xlabel(f"reading of the harm gate at decoder layer {layers}")
    return figure


def positions(results: Results) -> Figure | None:
    """Shift of the last tokens of the prompt, layer by layer: the untouched model's, and that under
    the defences."""
    every = (results["geometry"] or {}).get("positions") or {}
    shifts = {name: shift for name, shift in every.items() if shift["offsets"]}
    if not shifts:
        return None
    names = in_order(shifts)
    maps = {name: np.array(shifts[name]["relative_distance"]).T for name in names}
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(9.6, 0.5 + 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    top = max(float(values.max()) for values in maps.values())
    for axes, name in zip(grid.flat, names, strict=False):
        mesh = axes.imshow(maps[name], aspect="auto", origin="lower", vmin=0, vmax=top)
        axes.set_title(label(name), fontsize=9)
        texts = token_labels(shifts[name])
        axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize=7)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("decoder layer (0-based)")
    figure.colorbar(mesh, ax=grid, label="distance to the text-only state / its norm")
    return figure


def token_labels(shift: Mapping[str, Sequence[object]]) -> list[str]:
    """Names of positions: the token where all samples have the same one, else its place."""
    return [
        str(offset) if text is None else f"{offset} {text!r}"
        for offset, text in zip(shift["offsets"], shift["tokens"], strict=True)
    ]


def shift(results: Results) -> Figure | None:
    """Norm of the shift, its explained ratio and its cosine to the mean difference."""
    used = results["shift"]
    if not used or not used["norms"]:
        return None
    figure = Figure(figsize=(9, 3))
    left, right = figure.subplots(1, 2)
    _line(left, used["norms"], "vector", "cmrm_dataset")
    _line(left, used["mean_norms"], "mean difference", "blank")
    _line(right, used["explained_ratio"], "explained ratio", "cmrm_dataset")
    _line(right, used["mean_cosine"], "cosine to the mean difference", "blank")
    left.set(xlabel="decoder layer (0-based)", ylabel="norm", ylim=(0, None))
    right.set(xlabel="decoder layer (0-based)", ylim=(0, 1.05))
    left.legend()
    right.legend()
    figure.tight_layout()
    return figure


def _line(axes: Axes, values: Sequence[float], text: str, name: str) -> None:
    if values:
        axes.plot(
            values, color=COLOURS[name], label=text, ls="-" if name == "cmrm_dataset" else "--"
        )


FIGURES: dict[str, tuple[Callable[[Results], Figure | None], str]] = {
    "distances": (
        distances,
        "Lines: distance and cosine of states to the text-only state, by decoder layer",
    ),
    "coordinates": (coordinates, "Lines: coordinate along the refusal direction, by decoder layer"),
    "gate": (gate, "Points: reading of the harm gate for each sample, beside its threshold"),
    "positions": (
        positions,
        "Map: shift of the last tokens of the prompt, by decoder layer and position",
    ),
    "corruptions": (
        corruptions,
        "Lines: cosine and norm of each corruption's shift against blank's, by layer",
    ),
    "pca": (
        pca,
        "Points: states of the conditions in the plane of two principal components, by layer",
    ),
    "shift": (shift, "Lines: norm and explained ratio of the shift, by decoder layer"),
}
"""Name -> how it is drawn, and its alternative text."""
