"""What all figures share: colours, the two themes, pictures, intervals as whiskers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cmrm.errors import MissingExtraError

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError(
        f"the report needs {error.name}; pip install 'cmrm[eval]' (or 'cmrm[demo]') brings it"
    ) from None

COLOURS = {
    "query": "#2e8b57", "caption": "#3d7ea6", "noise": "#a06cd5", "blank": "#d99a2b",
    "original": "#d1495b", "none": "#d1495b", "cmrm_dataset": "#00899e", "cmrm_sample": "#6fb7b6",
    "cmrm_fill": "#6a3d9a", "cmrm_gated": "#e07b00", "cmrm_dataset@mixed": "#8c6d4f",
    "black": "#8a6d3b", "grey": "#8c8c8c", "mean": "#c77cba", "blur": "#5f9ed1",
    "shuffle": "#b5bd4c", "other": "#e0785a",
}  # fmt: skip
"""Of conditions and defences."""
FURTHER = ("#4e79a7", "#b07aa1", "#9c755f", "#59a14f", "#f28e2b", "#76b7b2", "#bab0ac", "#e15759")
"""Of other defences, in their order."""
LIGHT, DARK = ("#1d2733", "#8d99a6", "#ffffff"), ("#e4e9ee", "#7d8894", "#161b21")
"""Ink, faint ink and paper of the two themes."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    name: str
    """File name without suffix, and key in the page."""
    alt: str
    """What is to be seen, for readers who do not see it."""
    light: bytes
    """PNG on white paper."""
    dark: bytes
    """The same on dark paper."""


def drawn(
    figures: Mapping[str, tuple[Callable[[Any], Figure | None], str]], document: Any
) -> dict[str, Picture]:
    """Every figure that a document has data for, by name, on light and on dark paper.

    Args:
        figures: name -> how it is drawn (None without data), and its alternative text.
        document: what it is drawn from.
    """
    made = {}
    for name, (draw, alt) in figures.items():
        images = []
        for ink, faint, paper in (LIGHT, DARK):
            with mpl.rc_context(style(ink, faint, paper)):
                figure = draw(document)
                images.append(None if figure is None else _png(figure))
        light, dark = images
        if light is not None and dark is not None:
            made[name] = Picture(name, alt, light, dark)
    return made


def style(ink: str, faint: str, paper: str) -> Any:
    """matplotlib's settings of a figure in a theme (`LIGHT`, `DARK`)."""
    colours = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    return {
        **dict.fromkeys(colours, ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), faint),
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper,
        "text.parse_math": False, "font.size": 10,
        "font.family": "DejaVu Sans", "axes.spines.top": False,
        "axes.spines.right": False, "figure.dpi": 130, "legend.frameon": False,
        "legend.fontsize": 8.5,
    }  # fmt: skip


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def colour(name: str, place: int = 0) -> str:
    """Colour of a condition or defence; `place` is its place among the defences."""
    return COLOURS.get(name, FURTHER[place % len(FURTHER)])


def whisker(rate: Mapping[str, Any]) -> list[list[float]]:
    """What reaches below and above a rate, in per cent, as `errorbar` takes it."""
    share = 100 * rate["rate"]
    return [[max(0.0, share - 100 * rate["low"])], [max(0.0, 100 * rate["high"] - share)]]
