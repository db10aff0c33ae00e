"""One self-contained HTML page of a results file: no script, no network, images inlined."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from cmrm.files import atomic_path
from cmrm.report.plots import LABELS


def write_report(results: dict[str, Any], plots: dict[str, Path], target: Path) -> Path:
    """Render the page into `target`. Request and reply texts in `results` are cut already and are escaped here."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["rate"] = rate_text
    environment.filters["label"] = lambda name: LABELS.get(name, name)
    source = files("cmrm.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    images = {name: base64.b64encode(path.read_bytes()).decode() for name, path in plots.items()}
    html = environment.from_string(source).render(r=results, images=images, rows=table_rows(results))
    with atomic_path(target) as part:
        part.write_text(html, encoding="utf-8")
    return target


def rate_text(cell: dict[str, Any], name: str = "rate") -> str:
    """`12.5 % [7.1, 20.9]`, or `unscored` where the judge scored nothing; unscored replies are named when there are any."""
    if cell[name] is None:
        return f"unscored ({cell['unscored']})"
    text = f"{100 * cell[name]:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return text + (f", {cell['unscored']} unscored" if cell["unscored"] else "")


def table_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """The paper's table for this model: (row, unsafe rate, gap closed, over-refusal, easy-VQA accuracy)."""
    rows = []
    for name in ("query", "caption", "noise", "blank"):
        over = rate_text(results["over_refusal"]["text"]["none"]) if name == "query" else "-"
        rows.append((LABELS[name], rate_text(results["conditions"][name], "unsafe_rate"), "-", over, "-"))
    for name in ("none", "cmrm_dataset", "cmrm_sample"):
        cell = results["defenses"][name]
        label = LABELS["original"] if name == "none" else f"{LABELS['original']} + {LABELS[name]}"
        closed = "-" if name == "none" or cell["gap_closed"] is None else f"{100 * cell['gap_closed']:.0f} %"
        rows.append(
            (
                label,
                rate_text(cell, "unsafe_rate"),
                closed,
                rate_text(results["over_refusal"]["image"][name]),
                rate_text(results["utility"]["easy_vqa"][name], "accuracy"),
            )
        )
    return rows
