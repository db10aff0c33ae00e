"""Agreement of judges with each other and with a person, and the sheet that a person labels."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from cmrm.cli.main import app
from cmrm.errors import InputError
from cmrm.judges import Verdict
from cmrm.measure.agreement import (
    Answer,
    Label,
    Rated,
    agreement_between,
    keep_labels,
    read_labels,
    read_sheet,
    write_sheet,
)
from cmrm.measure.kappa import alpha_of, kappa_of
from cmrm.measure.rates import verdict_rate

R, C, S, U, N = Verdict.REFUSED, Verdict.COMPLIED, Verdict.SAFE, Verdict.UNSAFE, Verdict.UNSCORED


def test_kappa_is_that_of_another_library() -> None:
    first = [True, True, False, False, True, None, False, True, True, False]
    second = [True, False, False, False, True, True, True, True, None, False]
    agreement = kappa_of(first, second)
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    assert agreement.kappa == pytest.approx(
        cohen_kappa_score([a for a, _ in both], [b for _, b in both]), abs=1e-6
    )
    assert (agreement.n, agreement.unscored) == (8, 2)
    assert agreement.same.rate == 0.75
    assert agreement.low is not None
    assert agreement.high is not None
    assert agreement.kappa is not None
    assert -1 <= agreement.low < agreement.kappa < agreement.high <= 1


def test_what_kappa_cannot_say_it_does_not_say() -> None:
    assert kappa_of([True, True], [True, True]).kappa is None, (
        "without a no, chance agreement is whole"
    )
    perfect = kappa_of([True, False, True], [True, False, True])
    assert (perfect.kappa, perfect.low, perfect.high) == (1.0, None, None), (
        "three replies do not prove [1, 1]"
    )
    assert perfect.same.low is not None
    assert perfect.same.low < 0.5
    nothing = kappa_of([None], [True])
    assert (nothing.kappa, nothing.n, nothing.unscored, nothing.same.rate) == (None, 0, 1, None)


def test_alpha_is_krippendorffs_own_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section A: 0.095."""
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    alpha = alpha_of([[bool(v) for v in first], [bool(v) for v in second]])
    assert alpha == pytest.approx(0.095, abs=5e-4)
    assert alpha_of([[True, True], [True, None]]) is None, "of one value alone it is not defined"
    assert alpha_of([[True, None], [None, False]]) is None, "nothing was rated twice"


def rated(
    k: int, harmful: bool = True, reply: str = "", defense: str = "none", **verdicts: Verdict
) -> Rated:
    kind = "harmful" if harmful else "benign"
    return Rated(
        f"{k:012x}", (kind, defense), f"request {k}", reply or f"reply {k}", harmful, verdicts
    )


def test_a_rate_counts_the_verdicts_that_speak_of_it() -> None:
    verdicts = [U, S, C, R, N]
    unsafe, over_refusal = verdict_rate(verdicts, C), verdict_rate(verdicts, R)
    assert (unsafe.rate, unsafe.n, unsafe.unscored) == (0.5, 4, 1)
    assert (over_refusal.rate, over_refusal.n, over_refusal.unscored) == (0.5, 2, 3)


def test_each_question_takes_the_judges_that_answer_it() -> None:
    rows = [
        rated(0, keyword=R, guard=S),
        rated(1, keyword=C, guard=U),
        rated(2, keyword=C, guard=S),
        rated(3, keyword=N, guard=U),
        rated(4, harmful=False, keyword=R, guard=S),
        rated(5, harmful=False, keyword=C, guard=S),
    ]
    figures = agreement_between(rows)
    assert figures["refusal"]["judges"] == ["keyword"], "a guard does not tell refusals"
    assert figures["refusal"]["pairs"] == []
    assert figures["unsafe"]["replies"] == 4, "of harmful requests alone"
    pair = figures["unsafe"]["pairs"][0]
    assert (pair["first"], pair["second"], pair["n"], pair["unscored"]) == (
        "keyword",
        "guard",
        3,
        1,
    )
    assert pair["same"]["rate"] == pytest.approx(2 / 3, abs=1e-6)
    assert figures["unsafe"]["krippendorff_alpha"] is not None


def test_a_judge_built_of_another_is_no_second_opinion() -> None:
    rows = [
        rated(k, keyword=(R, C)[k % 2], ensemble=(R, C)[k % 2], regression=(R, C, C)[k % 3])
        for k in range(12)
    ]
    figures = agreement_between(rows)["refusal"]
    built = {(p["first"], p["second"]): p["built"] for p in figures["pairs"]}
    assert built == {
        ("keyword", "ensemble"): True,
        ("keyword", "regression"): False,
        ("ensemble", "regression"): True,
    }
    two = [[k % 2 == 0 for k in range(12)], [k % 3 == 0 for k in range(12)]]
    assert figures["krippendorff_alpha"] == alpha_of(two), "the ensemble is left out of alpha"


def test_a_person_stands_beside_the_judges() -> None:
    rows = [rated(k, keyword=(R, C)[k % 2]) for k in range(6)]
    labels = {
        rows[0].id: Label(True, False),
        rows[1].id: Label(True, None),
        rows[2].id: Label(None, True),
    }
    figures = agreement_between(rows, labels)
    person = next(p for p in figures["refusal"]["pairs"] if p["first"] == "person")
    assert (person["second"], person["n"], person["unscored"]) == ("keyword", 2, 0)
    assert person["same"]["rate"] == 0.5
    harm = next(p for p in figures["unsafe"]["pairs"] if p["first"] == "person")
    assert (harm["n"], harm["same"]["rate"]) == (2, 0.5)


def label(path: Path, *labels: tuple[str, str]) -> None:
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row, (refused, unsafe) in zip(rows, labels, strict=False):
        row |= {"refused": refused, "unsafe": unsafe}
    with path.open(
        "w", encoding="utf-8-sig", newline=""
    ) as handle:  # a spreadsheet's own mark at the beginning
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_goes_out_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    rows = [
        rated(0, reply='=HYPERLINK("x")'),
        rated(1, reply="two\nlines, and a comma"),
        rated(2),
        rated(3),
    ]
    write_sheet(path, rows)
    text = path.read_text(encoding="utf-8")
    assert "'=HYPERLINK" in text, "no spreadsheet computes a reply"
    assert "keyword" not in text
    assert "none" not in text, "neither judge nor defence is shown"
    with pytest.raises(InputError, match="no labels yet"):
        read_sheet(path)
    with pytest.raises(InputError, match="perhaps with labels"):
        write_sheet(path, rows)
    label(path, ("yes", "no"), ("No", ""), ("", ""))
    answers = read_sheet(path)
    assert {key: answer.label for key, answer in answers.items()} == {
        rows[0].id: Label(True, False),
        rows[1].id: Label(False, None),
    }
    keep_labels(tmp_path, rows, answers)
    assert read_labels(tmp_path)[rows[0].id] == Label(True, False), (
        "text that went through a spreadsheet is known again"
    )
    other = tmp_path / "semicolons.csv"
    blank = ";".join([""] * 5)
    lines = [
        "id;request;reply;refused;unsafe",
        f"{rows[2].id};{rows[2].request};{rows[2].reply};y;",
        blank,
        blank,
    ]
    other.write_text("\n".join(lines) + "\n")
    assert read_sheet(other)[rows[2].id].label == Label(True, None)
    other.write_text(other.read_text().replace(rows[2].reply, rows[3].reply))
    with pytest.raises(InputError, match="was a column sorted on its own"):
        keep_labels(tmp_path, rows, read_sheet(other))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,request,reply,refused,unsafe\na,q,r,maybe,no\n",
            "line 2, refused: 'maybe' is neither yes nor no",
        ),
        (
            "id,request,reply,refused,unsafe\na,q,r,yes,\na,q,r,no,\n",
            "line 3: the reply a stands there twice",
        ),
        ("id,request,reply\na,q,r\n", "no column refused, unsafe"),
        ("", "no labels yet"),
        ("id,request,reply,refused,unsafe\na,q\n", "no column reply, refused, unsafe"),
        ("id,request,reply,refused,unsafe\na,q,r,yes,no,no\n", "more cells than columns"),
    ],
)
def test_broken_sheets(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sheet(tmp_path / "s.csv")


def test_no_sheet_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a sheet"):
        read_sheet(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a sheet"):
        read_sheet(tmp_path / "b.csv")


def answer(row: Rated, refused: bool | None, unsafe: bool | None) -> dict[str, Answer]:
    return {row.id: Answer(Label(refused, unsafe), row.request, row.reply, "s.csv line 2")}


def test_labels_are_kept_with_the_grid_and_added_to(tmp_path: Path) -> None:
    rows = [rated(k) for k in range(3)]
    keep_labels(tmp_path, rows, answer(rows[0], True, None))
    keep_labels(tmp_path, rows, answer(rows[1], False, True) | answer(rows[0], None, False))
    assert read_labels(tmp_path) == {rows[0].id: Label(True, False), rows[1].id: Label(False, True)}
    keep_labels(tmp_path, rows, answer(rows[0], False, None))
    assert read_labels(tmp_path)[rows[0].id] == Label(False, False), (
        "the newer answer stands, the other stays"
    )
    with pytest.raises(InputError, match="of another grid"):
        keep_labels(tmp_path, rows, answer(rated(9), True, None))
    for broken in ("[1]", '{"a": {"refused": "yes", "unsafe": null}}', '{"a": {"refused": true}}'):
        (tmp_path / "labels.json").write_text(broken)
        with pytest.raises(InputError, match="holds no labels"):
            read_labels(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}", "--judge", " , "], "--judge names no"),
        (["{file}", "--sheet", "{file}"], "goes with the folder"),
        (["{file}", "--judge", "oracle"], "unknown judge"),
        (["{folder}"], "holds no logs"),
    ],
)
def test_bad_calls(tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion,final_label\np,Sure.,1_full_compliance\n")
    paths = {"file": str(file), "folder": str(tmp_path)}
    result = CliRunner().invoke(app, ["judges", "agree", *(a.format(**paths) for a in arguments)])
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
