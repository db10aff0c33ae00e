"""Figures of a sweep: lines over a number, points over names, heat maps over two axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from cmrm.report.drawing import Picture, colour, drawn, whisker
from cmrm.report.tables import label

# After `drawing`, which names the extra where matplotlib is missing.
from matplotlib.figure import Figure  # isort: skip

Sweep = Mapping[str, Any]
"""What `sweep.schema.checked` returns."""
FIGURES = {
    "unsafe": "unsafe rate, %", "over_refusal": "over-refusal, %", "accuracy": "accuracy, %",
    "generic": "generic answers, %",
}  # fmt: skip
"""What is drawn of each point."""
WIDE = 20.0
"""A ratio of the largest to the median value above which an axis is logarithmic."""


def sweep_pictures(document: Sweep) -> dict[str, Picture]:
    """The figures of one sweep by name: one, or one for each defence where there are two axes."""
    if document["y"] is not None:
        series = [name for name in document["defenses"] if name != "none"]
        return drawn(
            {f"sweep_{name}": (_heat_of(name), _alt(document, name)) for name in series}, document
        )
    numbers = all(isinstance(point["x"], int | float) for point in document["points"])
    return drawn({"sweep": (_lines if numbers else _names, _alt(document, None))}, document)


def rate_of(rates: Mapping[str, Any] | None, figure: str, judge: str) -> Mapping[str, Any] | None:
    """One rate of a point by the first judge; None where it was not measured or not scored."""
    if rates is None:
        return None
    rate = rates[figure] if figure in ("accuracy", "generic") else rates["judges"][judge][figure]
    return None if rate is None or rate["rate"] is None else rate


def shown_figures(document: Sweep) -> dict[str, str]:
    """The figures that at least one point has, with their words."""
    judge = document["judges"][0]
    return {
        figure: words
        for figure, words in FIGURES.items()
        if any(rate_of(point["rates"], figure, judge) for point in document["points"])
    }


def _alt(document: Sweep, name: str | None) -> str:
    figures = ", ".join(words.split(",")[0] for words in shown_figures(document).values())
    of = "" if name is None else f" of {label(name)}"
    against = "" if document["y"] is None else f" and {document['y']}"
    return f"{figures}{of} by {document['x']}{against}"


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _lines(document: Sweep) -> Figure | None:
    """A panel for each figure: a line for each defence with its interval as a band, the mean of the
    draws where there are several, and the untouched model as level lines."""
    figures, judge = shown_figures(document), document["judges"][0]
    if not figures:
        return None
    figure, panels = _panels(len(figures), 4.6, 3.1)
    names = [name for name in document["defenses"] if name != "none"]
    places = sorted({float(point["x"]) for point in document["points"]})
    for axes, (key, words) in zip(panels, figures.items(), strict=True):
        for place, name in enumerate(names):
            points = [point for point in document["points"] if point["series"] == name]
            _line(axes, points, key, judge, name, colour(name, place))
        for kind, text, style in (("image", "untouched", "--"), ("text", "as text", ":")):
            rate = rate_of(document["references"][kind], key, judge)
            if rate is not None:
                shade = colour("none" if kind == "image" else "query")
                axes.axhline(100 * rate["rate"], color=shade, ls=style, lw=1.2, label=text)
        _scale(axes, places)
        axes.set(xlabel=document["x"], ylabel=words, ylim=(-3, 103))
    _legend(figure, panels[0])
    figure.tight_layout()
    return figure


def _line(
    axes: Any, points: Sequence[Mapping[str, Any]], key: str, judge: str, name: str, shade: str
) -> None:
    places = sorted({float(point["x"]) for point in points})
    rates: dict[float, list[Mapping[str, Any]]] = {x: [] for x in places}
    for point in points:
        rate = rate_of(point["rates"], key, judge)
        if rate is not None:
            rates[float(point["x"])].append(rate)
    if not any(rates.values()):
        return
    missing = float("nan")
    means = [100 * mean(rate["rate"] for rate in rates[x]) if rates[x] else missing for x in places]
    axes.plot(places, means, color=shade, marker="o", ms=3, lw=1.4, label=label(name))
    gone = [x for x in places if not rates[x]]
    if gone:
        axes.plot(gone, [-1] * len(gone), ls="", marker="x", ms=5, color=shade)
    if max(map(len, rates.values())) == 1:
        for ends, strength in ((("lowest", "highest"), 0.07), (("low", "high"), 0.15)):
            low, high = (
                [100 * rates[x][0][end] if rates[x] else missing for x in places] for end in ends
            )
            axes.fill_between(places, low, high, color=shade, alpha=strength, lw=0)
        return
    for x in places:
        shares = [100 * rate["rate"] for rate in rates[x]]
        axes.plot([x] * len(shares), shares, ls="", marker="x", ms=5, color=shade, alpha=0.7)


def _scale(axes: Any, places: Sequence[float]) -> None:
    """A logarithmic axis beyond twice the median where few values are far out."""
    middle = places[len(places) // 2]
    if middle > 0 and places[0] >= 0 and places[-1] / middle > WIDE:
        axes.set_xscale("symlog", linthresh=2 * middle, linscale=2)
        ticks = sorted({places[0], round(middle, 6), 2 * middle, *places[-2:]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(places[0] - 0.1 * middle, 1.2 * places[-1])


def _names(document: Sweep) -> Figure | None:
    """A panel for each figure: a row for each name, a point with its interval for each defence."""
    figures, judge = shown_figures(document), document["judges"][0]
    if not figures:
        return None
    rows = list(dict.fromkeys(str(point["x"]) for point in document["points"]))
    figure = Figure(figsize=(3.1 * len(figures) + 1.4, 0.34 * len(rows) + 1.5))
    panels = figure.subplots(1, len(figures), squeeze=False, sharey=True)[0]
    names = document["defenses"]
    for axes, (key, words) in zip(panels, figures.items(), strict=True):
        for place, name in enumerate(names):
            offset = 0.6 * ((place + 0.5) / len(names) - 0.5)
            labelled = False
            for point in document["points"]:
                rate = rate_of(point["rates"], key, judge)
                if point["series"] != name or rate is None:
                    continue
                share = 100 * rate["rate"]
                if rate["unscored"]:
                    axes.plot(
                        [100 * rate["lowest"], 100 * rate["highest"]],
                        [rows.index(str(point["x"])) + offset] * 2, color=colour(name, place),
                        lw=5, alpha=0.2, solid_capstyle="butt",
                    )  # fmt: skip
                axes.errorbar(
                    share, rows.index(str(point["x"])) + offset, xerr=whisker(rate), fmt="o",
                    ms=3.5, lw=1, color=colour(name, place),
                    label=None if labelled else label(name),
                )  # fmt: skip
                labelled = True
        axes.set(xlabel=words, xlim=(-3, 103))
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(axis="y", lw=0.3)
    panels[0].invert_yaxis()
    _legend(figure, panels[0])
    figure.tight_layout()
    return figure


def _legend(figure: Figure, axes: Any) -> None:
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=min(4, len(texts) or 1)
    )


def _heat_of(name: str) -> Callable[[Sweep], Figure | None]:
    def draw(document: Sweep) -> Figure | None:
        return _heat(document, name)

    return draw


def _heat(document: Sweep, name: str) -> Figure | None:
    """A panel for each figure: both axes, the rate of every cell in it.

    The untouched model has a row of its own where the points hold it.
    """
    figures, judge = shown_figures(document), document["judges"][0]
    points = [point for point in document["points"] if point["series"] in (name, "none")]
    if not figures or not any(point["rates"] for point in points):
        return None
    columns = list(dict.fromkeys(point["x"] for point in points))
    rows = list(dict.fromkeys(point["y"] for point in points))
    width = max(3.6, 0.62 * len(columns) + 1.6)
    figure, panels = _panels(len(figures), width, max(2.4, 0.42 * len(rows) + 1.5))
    for axes, (key, words) in zip(panels, figures.items(), strict=True):
        values = [[float("nan")] * len(columns) for _ in rows]
        open_cells = set()
        for point in points:
            rate = rate_of(point["rates"], key, judge)
            if rate is not None:
                row, column = rows.index(point["y"]), columns.index(point["x"])
                values[row][column] = 100 * rate["rate"]
                if rate["unscored"]:
                    open_cells.add((row, column))
        good = key == "accuracy"
        axes.imshow(
            values, vmin=0, vmax=100, cmap="YlGnBu" if good else "OrRd", aspect="auto", alpha=0.85
        )
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:
                    star = "*" if (row, column) in open_cells else ""
                    axes.text(
                        column, row, f"{value:.0f}{star}", ha="center", va="center", fontsize=8,
                        color="white" if value > 60 else "#1d2733",
                    )  # fmt: skip
        slanted = any(isinstance(text, str) for text in columns)
        axes.set_xticks(
            range(len(columns)), [f"{text}" for text in columns], rotation=30 if slanted else 0,
            ha="right" if slanted else "center",
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_row_text(text) for text in rows])
        axes.set(xlabel=document["x"], ylabel=document["y"], title=words)
    figure.tight_layout()
    return figure


def _row_text(value: object) -> str:
    return "untouched" if value == "none" else str(value)
