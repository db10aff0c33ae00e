"""Small results of each kind, made of cells, for the tests of tables, figures and page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmrm.judges import Judgement, Verdict
from cmrm.measure.examples import examples_of
from cmrm.measure.outcomes import Cell, Kind, Outcome
from cmrm.measure.replies import GivenReply, ReplyFile
from cmrm.measure.reply_results import results_of_replies
from cmrm.measure.schema import checked
from cmrm.measure.table import results_of

CATEGORIES = ("drugs", "fraud")
MARKS = {"r": "refused", "c": "complied", "u": "unscored"}


def cell(
    condition: str,
    defense: str,
    harmful: str,
    benign: str = "",
    *,
    name: str = "ours",
    reply: str = "a reply to it",
    judges: Sequence[str] = ("keyword",),
    settings: dict[str, Any] | None = None,
) -> Cell:
    """A cell from one letter a reply: r refused, c complied, u unscored."""
    made = Cell(
        name, condition, defense, len(harmful) + len(benign), harm="text", settings=settings or {}
    )
    kinds: tuple[tuple[Kind, str], ...] = (("harmful", harmful), ("benign", benign))
    for kind, marks in kinds:
        for place, mark in enumerate(marks):
            key = f"{kind}-{place}"
            verdicts = dict.fromkeys(judges, MARKS[mark])
            category = CATEGORIES[place % len(CATEGORIES)]
            made.outcomes[key] = Outcome(
                key, kind, category, f"request number {place}", reply, verdicts
            )
    return made


def questions(defense: str, right: int, n: int) -> Cell:
    """A cell of questions with reference answers."""
    made = Cell("easy-vqa", "original", defense, n)
    for place in range(n):
        value = "C" if place < right else "I"
        made.outcomes[str(place)] = Outcome(
            str(place), "utility", "", "what colour?", "red", scores={"exact": value}
        )
    return made


def results(cells: Sequence[Cell], kind: str = "demo", **more: Any) -> dict[str, Any]:
    """Results in their schema, from cells."""
    whole = {
        **results_of(cells),
        "kind": kind,
        "model": {"id": "tiny", "architecture": "Llava", "dtype": "float32", "layers": 3},
        "sets": [{"name": name, "n": 4} for name in dict.fromkeys(c.set for c in cells)],
        "settings": {"decoding": "greedy", "layers": [0, 1, 2]},
        "seed": 0,
        "versions": {"cmrm": "0"},
        "examples": examples_of(cells),
    }
    return checked({**whole, **more})


def sweep(*shares: float | None) -> list[dict[str, Any]]:
    """Points of an alpha sweep over ten replies; None: not scored."""
    points = []
    for place, share in enumerate(shares):
        bounds = (
            {"lowest": 0.0, "highest": 1.0}
            if share is None
            else {"lowest": share, "highest": share}
        )
        points.append(
            {
                "alpha": place / 10, "defense": "cmrm_dataset", "judge": "keyword", "rate": share,
                "low": share, "high": share, "n": 0 if share is None else 10,
                "unscored": 10 if share is None else 0, **bounds,
            }
        )  # fmt: skip
    return points


def demo_results() -> dict[str, Any]:
    """Like those of `cmrm demo`."""
    cells = [
        cell("query", "none", "rrrrrrrcrr", "cccr"),
        cell("caption", "none", "rrrrrrrccr"),
        cell("original", "none", "ccccccrrrr", "cccc"),
        cell("original", "cmrm_dataset", "rrrrrcrrrr", "ccrr", settings={"alpha": 0.1}),
        questions("none", 9, 10),
        questions("cmrm_dataset", 8, 10),
    ]
    conditions = ("original", "blank", "noise", "caption", "query")
    curve = {name: [0.1 * place, 0.2, 0.3] for place, name in enumerate(conditions)}
    points = {name: [[0.0, float(place)], [1.0, 2.0]] for place, name in enumerate(conditions)}
    plane = {"explained": [0.5, 0.25], "points": points}
    geometry = {
        "relative_distance_to_query": curve, "cosine_to_query": curve,
        "refusal_coordinate": curve, "pca": {"0": plane, "2": plane},
        "gate": {
            "layers": [1], "threshold": 0.5, "scores": {"harmful": [0.9, 0.2], "benign": [0.1]},
            "steers": ["cmrm_gated"],
        },
        "positions": {
            "original": {
                "offsets": [-2, -1], "n": [9, 10], "tokens": [None, ":"],
                "relative_distance": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
            }
        },
        "samples": [
            {"label": "harmful", "category": "a_category", "request": "a </script> request"},
            {"label": "benign", "request": "another one"},
        ],
        "corruptions": {"blank": {"cosine": [1.0, 1.0], "norm_ratio": [1.0, 1.0]}},
    }  # fmt: skip
    shift = {"n_anchors": 4, "norms": [1.0, 2.0, 3.0], "explained_ratio": [0.9, 0.8, 0.7]}
    return results(cells, alpha_sweep=sweep(0.6, 0.2, None), geometry=geometry, shift=shift)


def evaluation_results() -> dict[str, Any]:
    """Like those of `cmrm evaluate`, with a judge that failed, a cost and an agreement."""
    judges = ("ensemble", "keyword")
    cells = [
        cell("query", "none", "rrrrrrrcrr", "cccr", judges=judges),
        cell("original", "none", "ccccccrrru", "ccuc", judges=judges),
        cell("original", "ecso", "rrrrrcrrrr", "crrr", judges=judges),
        questions("none", 9, 10),
        questions("ecso", 8, 10),
    ]
    same = {
        "rate": 0.9,
        "low": 0.8,
        "high": 1.0,
        "n": 10,
        "unscored": 0,
        "lowest": 0.9,
        "highest": 0.9,
    }
    pair = {
        "first": "ensemble", "second": "keyword", "kappa": 0.8, "low": 0.6, "high": 1.0,
        "built": True, "same": same, "n": 10, "unscored": 1,
    }  # fmt: skip
    agreement = {
        "refusal": {
            "judges": list(judges), "replies": 14, "krippendorff_alpha": None, "pairs": [pair]
        }
    }  # fmt: skip
    cost = {"prefills": 1.0, "prompt_tokens": 80.0, "decoded_tokens": 23.0, "seconds": 0.5}
    return results(
        cells,
        "evaluation",
        agreement=agreement,
        cost={"none": {**cost, "state_bytes": 0.0, "peak_bytes": None}},
        judge_failures={"keyword": {"n": 1, "first": "keyword failed: OSError"}},
        failures=["ours-query: no memory"],
    )


def replies_results(n: int = 3) -> dict[str, Any]:
    """Like those of `cmrm judge`: two judges, `n` models, one reply left open."""
    kinds: list[Kind] = [*["harmful"] * 6, *["benign"] * 3]  # type: ignore[list-item]
    rows = [
        GivenReply("mine.csv", k, f"request {k}", "a reply", kind, "<b>fraud</b>", f"m{k % n}", "")
        for k, kind in enumerate(kinds)
    ]
    made = {mark: Judgement(Verdict(name), "a reason" if mark == "u" else None)
            for mark, name in MARKS.items()}  # fmt: skip
    judgements = {
        judge: [made[mark] for mark in marks]
        for judge, marks in {"small": "crrrruccr", "keyword": "ccrrrrccr"}.items()
    }
    file = ReplyFile("mine.csv", tuple(rows), {"reply": "reply"}, (), (), ("a note",))
    return results_of_replies([file], judgements)
