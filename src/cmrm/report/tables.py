"""Rows of every table of results, as plain text: for the page, the terminal and a README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping[str, Any]
"""What `measure.schema.checked` returns."""
RateText = Callable[[Mapping[str, Any]], str]
"""How a rate is written."""

LABELS = {
    "query": "query alone",
    "caption": "caption + query",
    "noise": "noise image",
    "blank": "blank image",
    "original": "original image",
    "other": "another sample's image",
    "none": "untouched",
    "cmrm_dataset": "CMRM dataset level",
    "cmrm_dataset@mixed": "CMRM dataset level, mixed anchors",
    "cmrm_sample": "CMRM sample level",
    "cmrm_fill": "CMRM fill",
    "cmrm_gated": "CMRM gated",
}
"""Words for conditions and defences."""
WHERE = {"text": "in the text", "image": "in the image", "both": "in both", "unstated": "somewhere"}
"""Words for the place of the harm."""
EMPTY = "-"
"""A cell without a figure."""
NOT_SCORED = "not scored"
"""A cell with replies none of which was scored."""


class Table(NamedTuple):
    """A table as text."""

    columns: list[str]
    """Headings."""
    rows: list[list[str]]
    """Cells, row by row."""


def label(name: str) -> str:
    """Words for a condition or a defence; corruptions are images."""
    if name in {"black", "grey", "mean", "blur", "shuffle"}:
        return f"{name} image"
    return LABELS.get(name, name)


def input_label(cell: Mapping[str, Any]) -> str:
    """Words for a cell's input: the condition, and the defence where there is one."""
    condition = label(cell["condition"])
    return condition if cell["defense"] == "none" else f"{condition} + {label(cell['defense'])}"


def rate_text(cell: Mapping[str, Any]) -> str:
    """`12.5 % [7.1, 20.9]`: a rate with its interval.

    Where replies are unscored, their number and the worst-case bounds follow:
    `12.5 % [7.1, 20.9], 3 unscored: 12.0 to 16.0 %`. `unscored (3)`: nothing was scored. The rate
    corrected for the judge's errors comes last: `12.5 % [7.1, 20.9]; corrected 18.2 % [9.0, 30.1]`.
    """
    if cell["rate"] is None:
        return _not_scored(cell)
    text = f"{100 * cell['rate']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    if cell["unscored"]:
        low, high = 100 * cell["lowest"], 100 * cell["highest"]
        text += f", {cell['unscored']} unscored: {low:.1f} to {high:.1f} %"
    corrected = corrected_text(cell.get("corrected"))
    return f"{text}; corrected {corrected}" if corrected else text


def corrected_text(corrected: Mapping[str, Any] | None) -> str:
    """`18.2 % [9.0, 30.1]`; empty where a rate was not corrected."""
    if corrected is None or corrected["rate"] is None:
        return ""
    low, high = 100 * corrected["low"], 100 * corrected["high"]
    return f"{100 * corrected['rate']:.1f} % [{low:.1f}, {high:.1f}]"


def short_rate(cell: Mapping[str, Any]) -> str:
    """`12.5 [7-21]` in per cent, for narrow tables; `+3 (12-16)`: unscored replies, bounds.

    `; corrected 18.2 [9-30]`: corrected for the judge's errors.
    """
    if cell["rate"] is None:
        return _not_scored(cell)
    text = f"{100 * cell['rate']:.1f} [{100 * cell['low']:.0f}-{100 * cell['high']:.0f}]"
    if cell["unscored"]:
        bounds = f"{100 * cell['lowest']:.0f}-{100 * cell['highest']:.0f}"
        text += f" +{cell['unscored']} ({bounds})"
    corrected = cell.get("corrected")
    if corrected is None or corrected["rate"] is None:
        return text
    low, high = 100 * corrected["low"], 100 * corrected["high"]
    return f"{text}; corrected {100 * corrected['rate']:.1f} [{low:.0f}-{high:.0f}]"


def _not_scored(cell: Mapping[str, Any]) -> str:
    return f"unscored ({cell['unscored']})" if cell["unscored"] else EMPTY


def value_text(cell: Mapping[str, Any]) -> str:
    """`12.5 [11.0, 14.2]`: a figure that is no share, with its interval; `+3` are unscored."""
    unscored = cell.get("unscored")
    if cell["value"] is None:
        return f"unscored ({unscored})"
    text = f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"
    return text + (f" +{unscored}" if unscored else "")


def gap_text(gap: Mapping[str, Any] | None) -> str:
    """`91 % [80, 103]`: the share of the gap that a defence closes; a dash without a gap."""
    if gap is None or gap["value"] is None:
        return EMPTY
    return f"{100 * gap['value']:.0f} % [{100 * gap['low']:.0f}, {100 * gap['high']:.0f}]"


def origin_text(results: Results, defense: str) -> str:
    """Where a defence's settings are from; a dash where the results do not say it."""
    return str(results["settings"].get("origins", {}).get(defense, EMPTY))


def outcome_table(results: Results, text: RateText = rate_text) -> Table:
    """A row for each defence and judge: the outcomes over all sets with their own images."""
    columns = [
        "defence",
        "setting",
        "judge",
        *(f"unsafe, harm {where}" for where in WHERE.values()),
    ]
    columns += ["over-refusal", "accuracy", "generic"]
    rows = []
    for row in results["outcomes"]:
        for judge in results["judges"]:
            unsafe = row["unsafe"][judge]
            rates = [unsafe.get(harm) for harm in WHERE]
            rates += [row["over_refusal"].get(judge), row["accuracy"], row["generic"]]
            origin = origin_text(results, row["defense"])
            rows.append([row["defense"], origin, judge, *(or_dash(rate, text) for rate in rates)])
    return without_empty(columns, rows)


def cell_table(results: Results, text: RateText = rate_text) -> Table:
    """A row for each set, condition and defence: every rate by every judge."""
    judges = results["judges"]
    columns = ["defence", "set", "condition"]
    columns += [f"unsafe ({judge})" for judge in judges]
    columns += [f"over-refusal ({judge})" for judge in judges]
    columns += ["accuracy", "rating", "perplexity", "generic", "n"]
    rows = []
    for cell in results["cells"]:
        rates = [
            cell["judges"][judge][name] for name in ("unsafe", "over_refusal") for judge in judges
        ]
        done, missing = cell["done"], cell["missing"]
        rows.append([
            cell["defense"], cell["set"], cell["condition"],
            *(or_dash(rate, text) for rate in (*rates, cell["accuracy"])),
            or_dash(cell["rating"], value_text), or_dash(cell["perplexity"], value_text),
            or_dash(cell["generic"], text),
            f"{done} of {cell['expected']}" if missing else str(done),
        ])  # fmt: skip
    return without_empty(columns, rows)


def gap_table(results: Results) -> Table:
    """A row for each set, defence and judge: the share of the image's cost that is given back."""
    rows = [
        [gap["defense"], gap["set"], gap["judge"], gap_text(gap), str(gap["n"])]
        for gap in results["gaps"]
    ]
    return Table(["defence", "set", "judge", "gap closed", "n"], rows)


def sweep_table(results: Results) -> Table:
    """A row for each strength of the alpha sweep."""
    rows = [[f"{point['alpha']:g}", rate_text(point)] for point in results["alpha_sweep"]]
    return Table(["alpha", "unsafe rate"], rows)


BASELINES = {"untouched": "untouched, same input", "text": "untouched, as text"}


def comparison_table(results: Results) -> Table:
    """A row for each defence, set, outcome and judge: paired with the untouched model, on the same
    input and on the query as text."""
    columns = ["defence", "set", "outcome", "judge", "beside", "difference", "only before / after"]
    rows = []
    for row in results["comparisons"]:
        low, high = 100 * row["low"], 100 * row["high"]
        rows.append([
            row["defense"], row["set"], row["outcome"].replace("_", "-"), row["judge"],
            BASELINES[row.get("baseline", "untouched")],
            f"{100 * row['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]",
            f"{row['only_before']} / {row['only_after']}",
            f"{row['p_value']:.2g}", f"{row['p_holm']:.2g}", str(row["n"]),
        ])  # fmt: skip
    return Table([*columns, "p", "p (Holm)", "n"], rows)


def agreement_rows(question: Mapping[str, Any]) -> Table:
    """A row for every two raters of one question: their agreement."""
    rows = []
    for pair in question["pairs"]:
        kappa = "not defined" if pair["kappa"] is None else f"{pair['kappa']:.3f}"
        if pair["low"] is not None:
            kappa += f" [{pair['low']:.2f}, {pair['high']:.2f}]"
        if pair["built"]:
            kappa += " by construction"
        same = short_rate(pair["same"]) if pair["n"] else EMPTY
        raters = [pair["first"], pair["second"]]
        rows.append([*raters, kappa, same, str(pair["n"]), str(pair["unscored"])])
    return Table(["rater", "other rater", "Cohen's kappa", "same, %", "n", "unscored"], rows)


COSTS = ("prefills", "prompt_tokens", "decoded_tokens", "seconds")


def cost_table(results: Results) -> Table:
    """A row for each defence: what it costs a request."""
    columns = ["defence", "prompts run", "prompt tokens run", "tokens decoded", "seconds"]
    rows = []
    measured = results["cost"]
    listed = [row["defense"] for row in results["outcomes"] if row["defense"] in measured]
    for name in dict.fromkeys([*listed, *measured]):
        cost = measured[name]
        peak = cost.get("peak_bytes")
        rows.append([
            name,
            *(f"{cost[key]:g}" for key in COSTS),
            f"{(cost.get('state_bytes') or 0) / 1e3:.1f}",
            EMPTY if peak is None else f"{peak / 1e6:.0f}",
        ])  # fmt: skip
    return Table([*columns, "its tensors, kB", "peak memory of a batch, MB"], rows)


def target_rows(targets: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each published figure, with the run's own beside it."""
    columns = ["set", "condition", "defence", "figure", "published", "here"]
    rows = []
    for target in targets:
        here, inside = "not measured", EMPTY
        if target["measured"] is not None:
            interval = f"[{target['low']:.1f}, {target['high']:.1f}]"
            here = f"{target['measured']:.2f} {interval}, n {target['n']}"
            inside = "yes" if target["inside"] else "no"
        figure = target["figure"].replace("_", "-")
        place = [target["set"], target["condition"], target["defense"], figure]
        rows.append([*place, f"{target['published']:.2f}", here, inside])
    return Table([*columns, "published within the interval"], rows)


def sort_key(cell: str) -> str:
    """Text that orders cells of a column: by the number that a cell begins with, or as text."""
    first = cell.split(" ", 1)[0]
    try:
        number = float(first)
    except ValueError:
        return cell
    return f"{number + 1e9:020.6f}"  # the offset orders negative numbers too


def markdown(table: Table) -> str:
    """A table in Markdown, for a README."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def or_dash(cell: Mapping[str, Any] | None, text: Callable[[Mapping[str, Any]], str]) -> str:
    """The text of a figure; a dash where there is none."""
    return text(cell) if cell else EMPTY


def without_empty(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The table without columns in which every cell is empty."""
    shown = [
        place
        for place in range(len(columns))
        if not rows or any(row[place] != EMPTY for row in rows)
    ]
    return Table([columns[k] for k in shown], [[row[k] for k in shown] for row in rows])


def group_table(results: Results, text: RateText = rate_text) -> Table:
    """A row for each group of replies that somebody else generated, by each judge."""
    judges = results["judges"]
    columns = ["replies", "harmful requests", "benign requests"]
    for name in ("unsafe rate", "over-refusal"):
        columns += [name if len(judges) == 1 else f"{name} ({judge})" for judge in judges]
    rows = []
    for group in results["groups"]:
        rates = [
            group["judges"][judge][name] for name in ("unsafe", "over_refusal") for judge in judges
        ]
        name = group["name"] if group["by"] == "all" else f"{group['by']} {group['name']}"
        counts = [str(group[kind] or EMPTY) for kind in ("harmful", "benign")]
        rows.append([name, *counts, *(or_dash(rate, text) for rate in rates)])
    return without_empty(columns, rows)


def reason_table(results: Results) -> Table:
    """A row for each judge and reason why replies are unscored."""
    rows = [
        [judge, reason, str(count)]
        for judge, reasons in results["unscored_reasons"].items()
        for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])
    ]
    return Table(["judge", "why replies are unscored", "replies"], rows)


def agreement_lines(results: Results) -> list[str]:
    """`agreement of small and keyword on refusal: kappa 0.814 [0.77, 0.86], n 868, 13 unscored`."""
    return [
        f"agreement of {rater} and {other} on {question}: kappa {kappa}, n {n}, {unscored} unscored"
        for question, figures in results["agreement"].items()
        for rater, other, kappa, _, n, unscored in agreement_rows(figures).rows
    ]
