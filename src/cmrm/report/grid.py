"""The grid as a table and as one self-contained page: sortable, with the safety-utility frontier and replies side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from jinja2 import Environment
from matplotlib.figure import Figure

from cmrm.files import atomic_path
from cmrm.report.page import rate_text

SHOWN_WORDS = 6
"""Words of a request and of a reply that are shown."""
EXAMPLES = 12
"""Requests a defence whose replies are shown side by side."""


def table(
    found: Mapping[str, Any], text: Callable[[dict[str, Any]], str] = rate_text
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for every cell, unsafe rate and over-refusal by every judge; `text` writes a rate."""
    judges = found["judges"]
    header = ["defence", "set", "condition", *(f"unsafe ({j})" for j in judges), *(f"over-refusal ({j})" for j in judges),
              "accuracy", "rating", "perplexity", "generic", "n"]  # fmt: skip
    rows = []
    for cell in found["cells"]:
        outcomes = [cell["judges"][j].get(name) for name in ("unsafe", "over_refusal") for j in judges]
        n = f"{cell['done']} of {cell['expected']}" if cell["missing"] else str(cell["done"])
        rows.append([
            cell["defense"], cell["set"], cell["condition"], *(_or_dash(rate, text) for rate in (*outcomes, cell.get("accuracy"))),
            _or_dash(cell.get("rating"), value_text), _or_dash(cell.get("perplexity"), value_text),
            _or_dash(cell.get("generic"), text), n,
        ])  # fmt: skip
    return _without_empty(header, rows)


def outcome_table(
    found: Mapping[str, Any], text: Callable[[dict[str, Any]], str] = rate_text
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the three outcomes of every defence by every judge, over all sets with their own images."""
    header = [
        "defence",
        "judge",
        *(f"unsafe, harm {WHERE[harm]}" for harm in WHERE),
        "over-refusal",
        "accuracy",
        "generic",
    ]
    rows = []
    for row in found.get("outcomes", ()):
        for judge in found["judges"]:
            unsafe = row["unsafe"][judge]
            rates = [
                *(unsafe.get(harm) for harm in WHERE),
                row["over_refusal"].get(judge),
                row["accuracy"],
                row["generic"],
            ]
            rows.append([row["defense"], judge, *(_or_dash(rate, text) for rate in rates)])
    return _without_empty(header, rows)


WHERE = {"text": "in the text", "image": "in the image", "both": "in both", "unstated": "somewhere"}
"""How a table says where the harm is."""


def _or_dash(held: dict[str, Any] | None, text: Callable[[dict[str, Any]], str]) -> str:
    return text(held) if held else "-"


def _without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Columns in which no row says anything are left out."""
    kept = [k for k in range(len(header)) if not rows or any(row[k] != "-" for row in rows)]
    return [header[k] for k in kept], [[row[k] for k in kept] for row in rows]


def value_text(held: dict[str, Any]) -> str:
    """`12.5 [11.0, 14.2]`, of a figure that is no share."""
    if held["value"] is None:
        return f"unscored ({held['unscored']})"
    unscored = held.get("unscored")
    return f"{held['value']:.1f} [{held['low']:.1f}, {held['high']:.1f}]" + (f" +{unscored}" if unscored else "")


def short_rate(cell: Mapping[str, Any]) -> str:
    """`12.5 [7-21]` in per cent, for narrow tables; `+3` are unscored."""
    if cell["rate"] is None:
        return f"unscored ({cell['unscored']})"
    low, high = round(100 * cell["low"]), round(100 * cell["high"])
    return f"{100 * cell['rate']:.1f} [{low}-{high}]" + (f" +{cell['unscored']}" if cell["unscored"] else "")


def agreement_rows(held: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how far every two judges, or a person and a judge, agree on one question."""
    rows = []
    for pair in held["pairs"]:
        kappa = "not defined" if pair["kappa"] is None else f"{pair['kappa']:.3f}"
        if pair["low"] is not None:
            kappa += f" [{pair['low']:.2f}, {pair['high']:.2f}]"
        if pair["built"]:
            kappa += " by construction"
        same = short_rate(pair["same"]) if pair["n"] else "-"
        rows.append([pair["first"], pair["second"], kappa, same, str(pair["n"]), str(pair["unscored"])])
    return ["", "", "Cohen's kappa", "same, %", "n", "unscored"], rows


def target_rows(targets: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a publication prints, and what the run found."""
    rows = []
    for one in targets:
        if one["found"] is None:
            here, inside = "not measured", "-"
        else:
            here = f"{one['found']:.2f} [{one['low']:.1f}, {one['high']:.1f}], n {one['n']}"
            inside = "yes" if one["inside"] else "no"
        rows.append([one["set"], one["condition"], one["defense"], one["figure"].replace("_", "-"),
                     f"{one['published']:.2f}", here, inside])  # fmt: skip
    return ["set", "condition", "defence", "figure", "published", "here", "published within the interval"], rows


def write_grid_report(found: Mapping[str, Any], out: Path) -> Path:
    """Write `out/report.html` and the PNGs in it; replies are read from the logs in `out/logs`, cut to their first words."""
    figures = {"frontier": frontier(found), "categories": categories(found)}
    images = {}
    for name, figure in figures.items():
        if figure is None:
            continue
        held = io.BytesIO()
        figure.savefig(held, format="png", bbox_inches="tight", metadata={"Software": None}, dpi=110)
        plt.close(figure)
        with atomic_path(out / f"{name}.png") as part:
            part.write_bytes(held.getvalue())
        images[name] = base64.b64encode(held.getvalue()).decode()
    header, rows = table(found)
    summary = outcome_table(found)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = files("cmrm.report").joinpath("grid.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        r=found, header=header, rows=rows, summary=summary, keys=[[_key(v) for v in row] for row in rows], images=images,
        changes=changes(out), agreement=[(q, h, *agreement_rows(h)) for q, h in found.get("agreement", {}).items() if h["pairs"]],
        targets=target_rows(found["recipe"]["targets"]) if found.get("recipe") else None,
        comparisons=[_compared(c) for c in found["comparisons"]],
    )  # fmt: skip
    with atomic_path(out / "report.html") as part:
        part.write_text(page, encoding="utf-8")
    return out / "report.html"


def changes(out: Path) -> dict[str, list[dict[str, str]]]:
    """Per defence: requests whose verdict it changed, reply before and after, cut to their first words."""
    from cmrm.evaluate.grid import read_cells

    cells = {cell.key: cell for cell in read_cells(out / "logs")}
    found: dict[str, list[dict[str, str]]] = {}
    for (name, condition, defense), cell in cells.items():
        base = cells.get((name, condition, "none"))
        if defense == "none" or base is None:
            continue
        for key, after in cell.samples.items():
            before = base.samples.get(key)
            if before is None or after["kind"] not in {"harmful", "benign"}:
                continue
            said = [next(iter(s["verdicts"].values()), "-") for s in (before, after)]
            if said[0] == said[1] or len(found.setdefault(defense, [])) >= EXAMPLES:
                continue
            found[defense].append(
                {
                    "set": name, "kind": after["kind"], "request": first_words(after["request"]),
                    "before": first_words(before["reply"]), "after": first_words(after["reply"]),
                    "verdicts": f"{said[0]} \u2192 {said[1]}",
                }
            )  # fmt: skip
    return found


def first_words(text: str) -> str:
    """The first `SHOWN_WORDS` words."""
    words = text.split()
    return " ".join(words[:SHOWN_WORDS]) + (" \u2026" if len(words) > SHOWN_WORDS else "")


MARKERS = {"text": "o", "image": "s", "both": "^", "unstated": "D"}
"""Of a point, by where the harm is."""


def frontier(found: Mapping[str, Any]) -> Figure | None:
    """Unsafe rate against accuracy over all sets, by the first judge: a point with both intervals for each defence and each place where
    the harm is; None without both."""
    if not found["judges"]:
        return None
    judge = found["judges"][0]
    points = []
    for place, row in enumerate(found["outcomes"]):
        accuracy = row["accuracy"]
        for harm, unsafe in row["unsafe"][judge].items():
            if accuracy and accuracy["rate"] is not None and unsafe["rate"] is not None:
                points.append((place, row["defense"], harm, unsafe, accuracy))
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    shown = {harm for _, _, harm, _, _ in points}
    for place, defense, harm, unsafe, accuracy in points:
        x, y = 100 * accuracy["rate"], 100 * unsafe["rate"]
        axes.errorbar(
            x, y, xerr=[[x - 100 * accuracy["low"]], [100 * accuracy["high"] - x]],
            yerr=[[y - 100 * unsafe["low"]], [100 * unsafe["high"] - y]], fmt=MARKERS[harm], color=f"C{place % 10}", lw=1, capsize=2,
            label=defense + (f", harm {WHERE[harm]}" if len(shown) > 1 else ""),
        )  # fmt: skip
    axes.set_xlabel("accuracy, %")
    axes.set_ylabel(f"unsafe rate, % ({judge})")
    axes.annotate("better", xy=(0.97, 0.03), xycoords="axes fraction", ha="right", color="#666666")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def categories(found: Mapping[str, Any]) -> Figure | None:
    """Unsafe rate by harm category and defence, original image, first judge, of the set with most categories."""
    if not found["judges"]:
        return None
    judge = found["judges"][0]
    cells = [c for c in found["cells"] if c["condition"] == "original" and len(c["judges"][judge]["categories"]) > 1]
    if not cells:
        return None
    chosen = max(cells, key=lambda c: len(c["judges"][judge]["categories"]))["set"]
    cells = [c for c in cells if c["set"] == chosen]
    names = sorted({n for c in cells for n in c["judges"][judge]["categories"]})
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.12 * len(names) * (len(cells) + 1.5)))
    height = 0.85 / len(cells)
    for place, cell in enumerate(cells):
        held = cell["judges"][judge]["categories"]
        shares = []
        for name in names:
            counts = held.get(name, {})
            unsafe = counts.get("complied", 0) + counts.get("unsafe", 0)
            scored = sum(counts.values()) - counts.get("unscored", 0)
            shares.append(100 * unsafe / scored if scored else 0.0)
        axes.barh(
            [k + place * height for k in range(len(names))],
            shares,
            height,
            label=cell["defense"],
            color=f"C{place % 10}",
        )
    axes.set_yticks([k + 0.42 - height / 2 for k in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel(f"unsafe rate on {chosen}, % ({judge})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _key(text: str) -> str:
    """What a column is sorted by: the number that a cell begins with, or its text."""
    first = text.split(" ", 1)[0]
    try:
        return f"{float(first):020.6f}"
    except ValueError:
        return text


def _compared(row: Mapping[str, Any]) -> list[str]:
    change = f"{100 * row['difference']:+.1f} points [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return [row["defense"], row["set"], row["outcome"].replace("_", "-"), row["judge"], change,
            f"{row['only_before']} / {row['only_after']}", f"{row['p_value']:.2g}", f"{row['p_holm']:.2g}", str(row["n"])]  # fmt: skip
