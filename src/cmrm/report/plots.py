"""PNGs of a results file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from cmrm.files import atomic_path

COLOURS = {
    "original": "#d1495b",
    "blank": "#edae49",
    "noise": "#a06cd5",
    "caption": "#3d7ea6",
    "query": "#2e8b57",
    "none": "#d1495b",
    "cmrm_dataset": "#00798c",
    "cmrm_sample": "#8ec6c5",
}
LABELS = {
    "original": "original image",
    "blank": "blank image",
    "noise": "noise image",
    "caption": "caption + query",
    "query": "query alone",
    "none": "untouched",
    "cmrm_dataset": "CMRM dataset level",
    "cmrm_sample": "CMRM sample level",
}


def write_plots(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """Draw every figure of the report into `out`; return name -> path."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    figures = {
        "unsafe_rate": unsafe_rate(results),
        "alpha_sweep": alpha_sweep(results),
        "distances": distances(results),
        "pca": pca(results),
        "categories": categories(results),
        "shift": shift(results),
    }
    paths = {}
    for name, figure in figures.items():
        paths[name] = out / f"{name}.png"
        with atomic_path(paths[name]) as part:
            figure.savefig(os.fspath(part), format="png", bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return paths


def unsafe_rate(results: dict[str, Any]) -> Figure:
    """Bars with 95 % Wilson intervals: five conditions, then the defences on the original image."""
    rows = [(k, results["conditions"][k]) for k in ("query", "caption", "noise", "blank", "original")]
    rows += [(k, results["defenses"][k]) for k in ("cmrm_dataset", "cmrm_sample")]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for place, (name, cell) in enumerate(rows):
        share = 100 * cell["unsafe_rate"]
        whisker = [[max(0.0, share - 100 * cell["low"])], [max(0.0, 100 * cell["high"] - share)]]
        axes.barh(place, share, color=COLOURS[name], height=0.62)
        axes.errorbar(share, place, xerr=whisker, color="#222222", capsize=3, lw=1.2)
        axes.text(100 * cell["high"] + 1.5, place, f"{share:.1f} %", va="center", fontsize=9)
    axes.set_yticks(
        range(len(rows)), [LABELS[n] + (" (original image)" if n.startswith("cmrm") else "") for n, _ in rows]
    )
    axes.invert_yaxis()
    axes.axhline(4.5, color="#bbbbbb", lw=0.8, ls="--")
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"unsafe rate, % of {rows[0][1]['n']} harmful requests, 95 % Wilson interval")
    return figure


def alpha_sweep(results: dict[str, Any]) -> Figure:
    """Unsafe rate with the original image over alpha, dataset level, with its interval as a band."""
    points = results["alpha_sweep"]
    alphas = [p["alpha"] for p in points]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    axes.fill_between(
        alphas, [100 * p["low"] for p in points], [100 * p["high"] for p in points], color="#00798c", alpha=0.18
    )
    axes.plot(alphas, [100 * p["unsafe_rate"] for p in points], "o-", color="#00798c", label="CMRM dataset level")
    for name in ("original", "query"):
        axes.axhline(
            100 * results["conditions"][name]["unsafe_rate"], color=COLOURS[name], ls="--", lw=1, label=LABELS[name]
        )
    chosen = results["settings"]["cmrm_dataset"]["alpha"]
    axes.axvline(chosen, color="#888888", lw=0.8, ls=":", label=f"chosen alpha {chosen:g}")
    axes.set(xlabel="alpha", ylabel=f"unsafe rate, % (n = {points[0]['n']})", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
    return figure


def distances(results: dict[str, Any]) -> Figure:
    """Distance and cosine of each condition's last-token state to that of the query alone, by decoder layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name in ("original", "blank", "noise", "caption"):
        left.plot(results["geometry"]["relative_distance_to_query"][name], color=COLOURS[name], label=LABELS[name])
        right.plot(results["geometry"]["cosine_to_query"][name], color=COLOURS[name], label=LABELS[name])
    left.set(xlabel="decoder layer (0-based)", ylabel="distance to query / its norm", ylim=(0, None))
    right.set(xlabel="decoder layer (0-based)", ylabel="cosine to query")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def pca(results: dict[str, Any]) -> Figure:
    """Last-prompt-token states in the plane of their first two principal components, for six layers."""
    planes = results["geometry"]["pca"]
    figure, grid = plt.subplots(2, 3, figsize=(9.6, 6))
    for axes, (layer, plane) in zip(grid.flat, planes.items(), strict=False):
        for name, points in plane["points"].items():
            axes.scatter(
                [p[0] for p in points], [p[1] for p in points], s=9, color=COLOURS[name], label=LABELS[name], alpha=0.75
            )
        axes.set_title(f"layer {layer} ({100 * sum(plane['explained']):.0f} % of variance)", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in list(grid.flat)[len(planes) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def categories(results: dict[str, Any]) -> Figure:
    """Unsafe rate per harm category: query alone, untouched with image, and both CMRM levels."""
    cells = ("query", "none", "cmrm_dataset", "cmrm_sample")
    names = sorted(results["per_category"])
    figure, axes = plt.subplots(figsize=(9, 3.8))
    for k, cell in enumerate(cells):
        shares = []
        for name in names:
            entry = results["per_category"][name][cell]
            scored = entry["refused"] + entry["complied"]
            shares.append(100 * entry["complied"] / scored if scored else 0.0)
        label = "query alone" if cell == "query" else LABELS[cell] + ", original image"
        axes.bar([i + (k - 1.5) * 0.2 for i in range(len(names))], shares, 0.19, color=COLOURS[cell], label=label)
    axes.set_xticks(range(len(names)), [n.replace("_", " ") for n in names], rotation=35, ha="right")
    axes.set(ylabel="unsafe rate, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return figure


def shift(results: dict[str, Any]) -> Figure:
    """Norm of the shift and its explained ratio by decoder layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(results["shift"]["norms"], color="#00798c")
    left.set(xlabel="decoder layer (0-based)", ylabel="norm of the shift", ylim=(0, None))
    right.plot(results["shift"]["explained_ratio"], color="#00798c")
    right.set(xlabel="decoder layer (0-based)", ylabel="explained ratio", ylim=(0, 1))
    figure.tight_layout()
    return figure
