"""Figures: what is drawn, and that nothing unscored is drawn as a number."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cmrm.report import plots
from report.samples import (
    cell,
    demo_results,
    evaluation_results,
    questions,
    replies_results,
    results,
    sweep,
)


def texts(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def bars(figure: Figure | None) -> list[float]:
    """Lengths of the bars."""
    assert figure is not None
    patches = [patch for axes in figure.axes for patch in axes.patches]
    return [patch.get_width() for patch in patches if isinstance(patch, Rectangle)]


def test_every_figure_of_the_demo_in_both_themes() -> None:
    drawn = plots.pictures(demo_results())
    assert set(drawn) == set(plots.FIGURES) - {"groups"}
    for picture in drawn.values():
        assert picture.light.startswith(b"\x89PNG")
        assert picture.dark.startswith(b"\x89PNG")
        assert picture.light != picture.dark
        assert picture.alt


def test_the_same_results_give_the_same_bytes() -> None:
    first, second = (plots.pictures(demo_results())["categories"] for _ in range(2))
    assert first == second


def test_figures_without_data_are_left_out() -> None:
    assert plots.pictures(results([cell("query", "none", "r")], "diagnosis")) == {}
    evaluation = set(plots.pictures(evaluation_results()))
    assert evaluation == {"unsafe_rate", "frontier", "categories"}


def test_an_input_with_nothing_scored_is_no_bar() -> None:
    figure = plots.unsafe_rates(
        results([cell("query", "none", "uuuu"), cell("original", "none", "crrr")])
    )
    assert any("not scored (4 replies)" in text for text in texts(figure))
    assert bars(figure) == [25.0]


def test_bounds_stand_beside_a_bar_with_unscored_replies() -> None:
    figure = plots.unsafe_rates(
        results([cell("query", "none", "rrrr"), cell("original", "none", "ccuu")])
    )
    assert "100.0 %, 2 unscored: 50 to 100 %" in texts(figure)


def test_a_category_with_nothing_scored_is_no_bar() -> None:
    cells = [cell("query", "none", "crcr"), cell("original", "none", "ucuc")]
    figure = plots.categories(results(cells))
    assert texts(figure) == ["not scored"]
    assert sorted(bars(figure)) == [0.0, 100.0, 100.0]


def test_bars_of_given_replies() -> None:
    figure = plots.group_rates(replies_results())
    assert figure is not None
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["all replies", "model m0", "model m1", "model m2"]
    assert bars(figure) == [20.0, 50.0, 0.0, 0.0]
    assert "0.0 %, 1 unscored: 0 to 50 %" in texts(figure)
    assert plots.group_rates(replies_results(1)) is None


def test_an_alpha_with_nothing_scored_is_no_point() -> None:
    cells = [cell("query", "none", "rr"), cell("original", "none", "cc")]
    figure = plots.alpha_sweep(results(cells, alpha_sweep=sweep(0.5, None, 0.2)))
    assert figure is not None
    line = figure.axes[0].lines[0]
    assert np.array_equal(line.get_xdata(), [0.0, 0.2])
    assert texts(figure) == ["not scored"]
    assert plots.alpha_sweep(results(cells, alpha_sweep=sweep(None))) is None


def test_a_defence_with_nothing_scored_is_named_and_not_drawn() -> None:
    cells = [
        cell("original", "none", "ccrr"), cell("original", "ecso", "uuuu"),
        questions("none", 1, 2), questions("ecso", 1, 2),
    ]  # fmt: skip
    figure = plots.frontier(results(cells, "evaluation"))
    assert figure is not None
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert sorted(labels) == ["ecso: not scored", "untouched"]


@pytest.mark.parametrize("figure", sorted(plots.FIGURES))
def test_no_figure_of_empty_results(figure: str) -> None:
    empty: dict[str, Any] = {**results([cell("query", "none", "r")]), "judges": [], "cells": []}
    assert plots.FIGURES[figure][0](empty | {"outcomes": []}) is None


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import matplotlib as mpl; before = dict(mpl.rcParams)\n"
        "from report.samples import demo_results\n"
        "from cmrm.report.plots import pictures\n"
        "pictures(demo_results())\n"
        "assert dict(mpl.rcParams) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
