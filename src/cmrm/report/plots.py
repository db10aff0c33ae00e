"""Figures of results, by matplotlib. Where nothing was scored, they say "not scored"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cmrm.prompts.text import shortened
from cmrm.report.categories import category_cells, unsafe_share
from cmrm.report.drawing import COLOURS, Picture, colour, drawn, whisker
from cmrm.report.headline import headline_cells
from cmrm.report.state_plots import FIGURES as STATE_FIGURES
from cmrm.report.tables import NOT_SCORED, WHERE, Results, input_label, label

# After `drawing`, which names the extra where matplotlib is missing.
import matplotlib as mpl  # isort: skip
from matplotlib.axes import Axes  # isort: skip
from matplotlib.figure import Figure  # isort: skip
from matplotlib.patches import Patch  # isort: skip

MARKERS = {"text": "o", "image": "s", "both": "^", "unstated": "D"}
"""Of a point, by where the harm is."""


def pictures(results: Results) -> dict[str, Picture]:
    """Every figure that the results have data for, by name."""
    return drawn(FIGURES, results)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _ink() -> str:
    return str(mpl.rcParams["text.color"])


def _faint() -> str:
    return str(mpl.rcParams["axes.edgecolor"])


def _name(cell: Mapping[str, Any]) -> str:
    """What gives a cell its colour."""
    return str(cell["condition"] if cell["defense"] == "none" else cell["defense"])


def unsafe_rates(results: Results) -> Figure | None:
    """Bars of the headline set with their intervals, first judge: conditions, then defences."""
    if not results["judges"]:
        return None
    judge = results["judges"][0]
    cells = [cell for cell in headline_cells(results) if cell["judges"][judge]["unsafe"]]
    untouched = sum(cell["defense"] == "none" for cell in cells)
    bars = [
        (input_label(cell), cell["judges"][judge]["unsafe"], colour(_name(cell), place))
        for place, cell in enumerate(cells)
    ]
    return _bars(bars, f"unsafe rate, % ({judge}), 95 % Wilson interval", untouched)


MOST_BARS = 30
"""Groups of given replies that are drawn."""


def group_rates(results: Results) -> Figure | None:
    """Bars of the unsafe rate of given replies, first judge: all, then each group of them."""
    bars = []
    for group in results["groups"]:
        rate = group["judges"][results["judges"][0]]["unsafe"]
        name = f"{'' if group['by'] == 'all' else group['by']} {shortened(group['name'], 36)}"
        if rate:
            bars.append((name.strip(), rate, colour("", GROUPS[group["by"]])))
    text = f"unsafe rate, % ({next(iter(results['judges']), '')}), 95 % Wilson interval"
    return _bars(bars[:MOST_BARS], text, len(bars))


GROUPS = {"all": 6, "model": 0, "category": 2, "language": 3}
"""What groups of given replies have in common -> place of their colour."""


def _bars(bars: Sequence[tuple[str, Mapping[str, Any], str]], text: str, cut: int) -> Figure | None:
    """Rates with intervals from names, rates and colours, a line behind the first `cut`."""
    if len(bars) < 2:
        return None
    figure, axes = _axes(8, 0.8 + 0.42 * len(bars))
    for place, (_, rate, shade) in enumerate(bars):
        if rate["rate"] is None:
            missing = f"{NOT_SCORED} ({rate['unscored']} replies)"
            axes.text(1, place, missing, va="center", style="italic")
            continue
        share = 100 * rate["rate"]
        axes.barh(place, share, color=shade, height=0.62)
        axes.errorbar(share, place, xerr=whisker(rate), color=_ink(), capsize=3, lw=1.2)
        figures = f"{share:.1f} %"
        if rate["unscored"]:
            low, high = 100 * rate["lowest"], 100 * rate["highest"]
            figures += f", {rate['unscored']} unscored: {low:.0f} to {high:.0f} %"
        axes.text(100 * rate["high"] + 1.5, place, figures, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    if cut < len(bars):
        axes.axhline(cut - 0.5, color=_faint(), lw=0.8, ls="--")
    axes.set(xlim=(0, 108), xticks=range(0, 101, 20), xlabel=text)
    return figure


def alpha_sweep(results: Results) -> Figure | None:
    """Unsafe rate with the original image over alpha, with its interval as a band."""
    scored = [point for point in results["alpha_sweep"] if point["rate"] is not None]
    if not scored:
        return None
    first = scored[0]
    alphas = [point["alpha"] for point in scored]
    main = colour(first["defense"])
    figure, axes = _axes(6.4, 3.6)
    low, high = ([100 * point[end] for point in scored] for end in ("low", "high"))
    axes.fill_between(alphas, low, high, color=main, alpha=0.18)
    shares = [100 * point["rate"] for point in scored]
    axes.plot(alphas, shares, "o-", color=main, label=label(first["defense"]))
    for point in results["alpha_sweep"]:
        if point["rate"] is None:
            axes.text(point["alpha"], 2, NOT_SCORED, rotation=90, ha="center", style="italic")
    for cell in headline_cells(results):
        rate = cell["judges"][first["judge"]]["unsafe"]
        scored_line = rate and rate["rate"] is not None
        if scored_line and cell["defense"] == "none" and cell["condition"] in ("query", "original"):
            name = cell["condition"]
            axes.axhline(100 * rate["rate"], color=COLOURS[name], ls="--", lw=1, label=label(name))
        if cell["defense"] == first["defense"] and "alpha" in cell["settings"]:
            chosen = cell["settings"]["alpha"]
            axes.axvline(chosen, color=_faint(), lw=1, ls=":", label=f"chosen alpha {chosen:g}")
    every = [point["alpha"] for point in results["alpha_sweep"]]
    margin = 0.04 * (max(every) - min(every)) or 0.1
    axes.set(
        xlabel="alpha", ylabel=f"unsafe rate, % (n = {first['n']})", ylim=(0, 100),
        xlim=(min(every) - margin, max(every) + margin),
    )  # fmt: skip
    axes.legend()
    return figure


def categories(results: Results) -> Figure | None:
    """Unsafe rate by harm category, first judge: query alone, original image, defences."""
    cells = category_cells(results)
    if not cells:
        return None
    judge = results["judges"][0]
    names = sorted({name for cell in cells for name in cell["judges"][judge]["categories"]})
    height = 0.85 / len(cells)
    figure, axes = _axes(8, 1.0 + len(names) * (0.16 * len(cells) + 0.12))
    handles = []
    for place, cell in enumerate(cells):
        counts = cell["judges"][judge]["categories"]
        shade = colour(_name(cell), place)
        for row, name in enumerate(names):
            at, share = row + place * height, unsafe_share(counts.get(name))
            if share is not None:
                axes.barh(at, 100 * share, height * 0.92, color=shade)
                axes.plot([0, 0], [at - height * 0.4, at + height * 0.4], color=shade, lw=2)
            elif counts.get(name):
                axes.text(0.8, at, NOT_SCORED, va="center", fontsize=6.5, color=shade)
        handles.append(Patch(color=shade, label=input_label(cell)))
    middles = [row + 0.425 - height / 2 for row in range(len(names))]
    axes.set_yticks(middles, [n.replace("_", " ") for n in names])
    axes.set_ylim(len(names) - 0.15 + height / 2, -height)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"unsafe rate on {cells[0]['set']}, % ({judge})")
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncol=2)
    return figure


def frontier(results: Results) -> Figure | None:
    """Unsafe rate (first judge) against accuracy: a point for each defence and place of harm."""
    if not results["judges"]:
        return None
    judge = results["judges"][0]
    rows = [
        (place, row, harm, unsafe)
        for place, row in enumerate(results["outcomes"])
        for harm, unsafe in row["unsafe"].get(judge, {}).items()
        if row["accuracy"]
    ]
    scored = [
        point
        for point in rows
        if point[3]["rate"] is not None and point[1]["accuracy"]["rate"] is not None
    ]
    if not scored:
        return None
    figure, axes = _axes(7.2, 4.4)
    several = len({harm for _, _, harm, _ in rows}) > 1
    for point in rows:
        place, row, harm, unsafe = point
        text = label(row["defense"]) + (f", harm {WHERE[harm]}" if several else "")
        if point not in scored:
            shade, note = colour(row["defense"], place), f"{text}: {NOT_SCORED}"
            axes.plot([], [], MARKERS[harm], color=shade, label=note)
            continue
        accuracy = row["accuracy"]
        x, y = 100 * accuracy["rate"], 100 * unsafe["rate"]
        axes.errorbar(
            x, y, xerr=whisker(accuracy), yerr=whisker(unsafe), fmt=MARKERS[harm],
            color=colour(row["defense"], place), lw=1, capsize=2, label=text,
        )  # fmt: skip
    axes.set_xlabel("accuracy, % (higher is better)")
    axes.set_ylabel(f"unsafe rate, % ({judge}; lower is better)")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


FIGURES: dict[str, tuple[Callable[[Results], Figure | None], str]] = {
    "unsafe_rate": (
        unsafe_rates,
        "Bars: unsafe rate of each input condition and defence, with intervals",
    ),
    "groups": (group_rates, "Bars: unsafe rate by model, category and language, with intervals"),
    "frontier": (frontier, "Points: unsafe rate against accuracy of each defence, with intervals"),
    "categories": (categories, "Bars: unsafe rate by harm category, for each input and defence"),
    "alpha_sweep": (
        alpha_sweep,
        "Line: unsafe rate over the strength alpha, with its interval as a band",
    ),
    **STATE_FIGURES,
}
"""Name -> how it is drawn, and its alternative text."""
