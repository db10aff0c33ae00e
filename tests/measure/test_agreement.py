"""Agreement of judges with each other and with a person, and the sheet that a person labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from cmrm.cli.main import app
from cmrm.errors import InputError
from cmrm.measure.agreement import (
    Answer,
    Label,
    Rated,
    agreement_between,
    agreement_on_files,
    draw,
    keep_labels,
    read_labels,
    read_sheet,
    write_sheet,
)
from cmrm.measure.rates import alpha_of, kappa_of
from cmrm.judges import KeywordJudge, Verdict, make_judge
from cmrm.measure.labelled import agreement_of_files, judged_files, layout_of

R, C, S, U, N = Verdict.REFUSED, Verdict.COMPLIED, Verdict.SAFE, Verdict.UNSAFE, Verdict.UNSCORED


def test_kappa_is_that_of_another_library() -> None:
    first = [True, True, False, False, True, None, False, True, True, False]
    second = [True, False, False, False, True, True, True, True, None, False]
    found = kappa_of(first, second)
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    assert found.kappa == pytest.approx(cohen_kappa_score([a for a, _ in both], [b for _, b in both]), abs=1e-6)
    assert (found.n, found.unscored) == (8, 2)
    assert found.same.rate == 0.75
    assert found.low is not None
    assert found.high is not None
    assert found.kappa is not None
    assert -1 <= found.low < found.kappa < found.high <= 1


def test_what_kappa_cannot_say_it_does_not_say() -> None:
    assert kappa_of([True, True], [True, True]).kappa is None, "without a no, chance agreement is whole"
    perfect = kappa_of([True, False, True], [True, False, True])
    assert (perfect.kappa, perfect.low, perfect.high) == (1.0, None, None), "three replies do not prove [1, 1]"
    assert perfect.same.low is not None
    assert perfect.same.low < 0.5
    nothing = kappa_of([None], [True])
    assert (nothing.kappa, nothing.n, nothing.unscored, nothing.same.rate) == (None, 0, 1, None)


def test_alpha_is_krippendorffs_own_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section A: two observers, nominal, two values: 0.095."""
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = alpha_of([[bool(v) for v in first], [bool(v) for v in second]])
    assert found == pytest.approx(0.095, abs=5e-4)
    assert alpha_of([[True, True], [True, None]]) is None, "of one value alone it is not defined"
    assert alpha_of([[True, None], [None, False]]) is None, "nothing was rated twice"


def rated(k: int, harmful: bool = True, reply: str = "", defense: str = "none", **said: Verdict) -> Rated:
    kind = "harmful" if harmful else "benign"
    return Rated(f"{k:012x}", (kind, defense), f"request {k}", reply or f"reply {k}", harmful, said)


def test_each_question_takes_the_judges_that_answer_it() -> None:
    rows = [
        rated(0, keyword=R, guard=S), rated(1, keyword=C, guard=U), rated(2, keyword=C, guard=S), rated(3, keyword=N, guard=U),
        rated(4, harmful=False, keyword=R, guard=S), rated(5, harmful=False, keyword=C, guard=S),
    ]  # fmt: skip
    found = agreement_between(rows)
    assert found["refusal"]["judges"] == ["keyword"], "a guard does not tell refusals"
    assert found["refusal"]["pairs"] == []
    assert found["unsafe"]["replies"] == 4, "of harmful requests alone"
    pair = found["unsafe"]["pairs"][0]
    assert (pair["first"], pair["second"], pair["n"], pair["unscored"]) == ("keyword", "guard", 3, 1)
    assert pair["same"]["rate"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["unsafe"]["krippendorff_alpha"] is not None


def test_a_judge_built_of_another_is_no_second_opinion() -> None:
    rows = [rated(k, keyword=(R, C)[k % 2], ensemble=(R, C)[k % 2], regression=(R, C, C)[k % 3]) for k in range(12)]
    found = agreement_between(rows)["refusal"]
    built = {(p["first"], p["second"]): p["built"] for p in found["pairs"]}
    assert built == {
        ("keyword", "ensemble"): True,
        ("keyword", "regression"): False,
        ("ensemble", "regression"): True,
    }
    two = [[k % 2 == 0 for k in range(12)], [k % 3 == 0 for k in range(12)]]
    assert found["krippendorff_alpha"] == alpha_of(two), "the ensemble is left out of alpha"


def test_a_person_stands_beside_the_judges() -> None:
    rows = [rated(k, keyword=(R, C)[k % 2]) for k in range(6)]
    labels = {rows[0].id: Label(True, False), rows[1].id: Label(True, None), rows[2].id: Label(None, True)}
    found = agreement_between(rows, labels)
    person = next(p for p in found["refusal"]["pairs"] if p["first"] == "person")
    assert (person["second"], person["n"], person["unscored"]) == ("keyword", 2, 0)
    assert person["same"]["rate"] == 0.5
    harm = next(p for p in found["unsafe"]["pairs"] if p["first"] == "person")
    assert (harm["n"], harm["same"]["rate"]) == (2, 0.5)


def test_a_draw_is_even_seeded_and_without_repetition() -> None:
    rows = [rated(k, defense=("none", "cmrm")[k % 10 == 0], harmful=k % 3 > 0) for k in range(90)]
    rows += [rated(200 + k, defense="none", reply="same") for k in range(3)]
    drawn = draw(rows, 12, seed=1)
    assert [r.id for r in drawn] == [r.id for r in draw(list(reversed(rows)), 12, seed=1)]
    assert [r.id for r in drawn] != [r.id for r in draw(rows, 12, seed=2)]
    counts = {group: sum(r.group == group for r in drawn) for group in {r.group for r in rows}}
    assert set(counts.values()) == {3}, "as many of each kind and defence, though there are fewer of one"
    one = [Rated(f"{k}", ("harmful",), "q", "the same", True) for k in range(4)]
    assert len(draw(one, 3)) == 1
    with pytest.raises(InputError, match="at least 1"):
        draw(rows, 0)
    with pytest.raises(InputError, match="no replies"):
        draw([], 5)


def label(path: Path, *said: tuple[str, str]) -> None:
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row, (refused, unsafe) in zip(rows, said, strict=False):
        row |= {"refused": refused, "unsafe": unsafe}
    with path.open("w", encoding="utf-8-sig", newline="") as handle:  # a spreadsheet's own mark at the beginning
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_goes_out_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    rows = [rated(0, reply='=HYPERLINK("x")'), rated(1, reply="two\nlines, and a comma"), rated(2), rated(3)]
    write_sheet(path, rows)
    text = path.read_text(encoding="utf-8")
    assert "'=HYPERLINK" in text, "no spreadsheet computes what a model said"
    assert "keyword" not in text
    assert "none" not in text, "neither judge nor defence is told"
    with pytest.raises(InputError, match="no labels yet"):
        read_sheet(path)
    with pytest.raises(InputError, match="perhaps with labels"):
        write_sheet(path, rows)
    label(path, ("yes", "no"), ("No", ""), ("", ""))
    answers = read_sheet(path)
    assert {key: one.label for key, one in answers.items()} == {
        rows[0].id: Label(True, False),
        rows[1].id: Label(False, None),
    }
    keep_labels(tmp_path, rows, answers)
    assert read_labels(tmp_path)[rows[0].id] == Label(True, False), (
        "text that went through a spreadsheet is known again"
    )
    other = tmp_path / "semicolons.csv"
    blank = ";".join([""] * 5)
    lines = ["id;request;reply;refused;unsafe", f"{rows[2].id};{rows[2].request};{rows[2].reply};y;", blank, blank]
    other.write_text("\n".join(lines) + "\n")
    assert read_sheet(other)[rows[2].id].label == Label(True, None)
    other.write_text(other.read_text().replace(rows[2].reply, rows[3].reply))
    with pytest.raises(InputError, match="was a column sorted on its own"):
        keep_labels(tmp_path, rows, read_sheet(other))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,request,reply,refused,unsafe\na,q,r,maybe,no\n", "line 2, refused: 'maybe' is neither yes nor no"),
        ("id,request,reply,refused,unsafe\na,q,r,yes,\na,q,r,no,\n", "line 3: the reply a stands there twice"),
        ("id,request,reply\na,q,r\n", "no column refused, unsafe"),
        ("", "no labels yet"),
        ("id,request,reply,refused,unsafe\na,q\n", "no column reply, refused, unsafe"),
        ("id,request,reply,refused,unsafe\na,q,r,yes,no,no\n", "more cells than columns"),
    ],
)
def test_broken_sheets(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        read_sheet(tmp_path / "s.csv")


def test_no_sheet_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as a sheet"):
        read_sheet(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a sheet"):
        read_sheet(tmp_path / "b.csv")


def answer(one: Rated, refused: bool | None, unsafe: bool | None) -> dict[str, Answer]:
    return {one.id: Answer(Label(refused, unsafe), one.request, one.reply, "s.csv line 2")}


def test_labels_are_kept_with_the_grid_and_added_to(tmp_path: Path) -> None:
    rows = [rated(k) for k in range(3)]
    keep_labels(tmp_path, rows, answer(rows[0], True, None))
    keep_labels(tmp_path, rows, answer(rows[1], False, True) | answer(rows[0], None, False))
    assert read_labels(tmp_path) == {rows[0].id: Label(True, False), rows[1].id: Label(False, True)}
    keep_labels(tmp_path, rows, answer(rows[0], False, None))
    assert read_labels(tmp_path)[rows[0].id] == Label(False, False), "the newer answer stands, the other stays"
    with pytest.raises(InputError, match="of another grid"):
        keep_labels(tmp_path, rows, answer(rated(9), True, None))
    for broken in ("[1]", '{"a": {"refused": "yes", "unsafe": null}}', '{"a": {"refused": true}}'):
        (tmp_path / "labels.json").write_text(broken)
        with pytest.raises(InputError, match="holds no labels"):
            read_labels(tmp_path)


def labelled_file(folder: Path) -> Path:
    rows = [("p1", "I'm sorry, I can't.", "2_full_refusal"), ("p2", "Sure, here it is.", "1_full_compliance"),
            ("p3", "That would be unwise.", "3_partial_refusal"), ("p4", "First, mix flour.", "1_full_compliance")]  # fmt: skip
    with (folder / "x.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([("prompt", "completion", "final_label"), *rows])
    return folder / "x.csv"


def test_agreement_on_labelled_files(tmp_path: Path) -> None:
    path = labelled_file(tmp_path)
    judged = judged_files([path], {"keyword": KeywordJudge(), "regression": make_judge("regression")})
    found = agreement_on_files(judged)
    pairs = {(p["first"], p["second"]): p for p in found["refusal"]["pairs"]}
    assert pairs["person", "keyword"]["same"]["rate"] == 0.75
    result = CliRunner().invoke(app, ["judges", "agree", str(path), "--judge", "keyword,regression", "--json"])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line.get("judge") for line in lines] == ["keyword", "regression", None]
    assert lines[-1]["between"]["refusal"]["replies"] == 4


def test_a_judge_that_tells_no_refusals_is_not_compared_with_labels_of_refusal(tmp_path: Path) -> None:
    class Guard:
        name = "guard"

        def judge(self, request: str, reply: str) -> Verdict:
            if "unwise" in reply:
                raise RuntimeError("no memory")
            return Verdict.SAFE

    failures: list[str] = []
    judged = judged_files([labelled_file(tmp_path)], {"guard": Guard()}, failed=failures.append)
    assert failures == ["guard failed: RuntimeError: no memory"]
    assert [one.said["guard"] for one in judged] == [S, S, N, S]
    with pytest.raises(InputError, match="tell safe from unsafe, which these labels do not"):
        agreement_of_files(judged, "guard")


def test_any_csv_by_its_columns_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text('question,answer,verdict\nHow?,"Sorry, no.",1\nWhy?,Because.,0\nWho?,Sorry me.,0\n')
    layout = layout_of("prompt=question,completion=answer,label=verdict", "1", "0")
    judged = judged_files([path], {"keyword": KeywordJudge()}, layout=layout)
    assert [one.refused for one in judged] == [True, False, False]
    assert agreement_of_files(judged, "keyword")["mine.csv"].precision == 0.5
    arguments = [
        "--map",
        "prompt=question,completion=answer,label=verdict",
        "--refused",
        "1",
        "--complied",
        "0",
        "--json",
    ]
    done = CliRunner().invoke(app, ["judges", "agree", str(path), *arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["n"] == 3
    with pytest.raises(InputError, match=r"unknown labels \['0'\].*--refused"):
        judged_files([path], {}, layout=layout_of("prompt=question,completion=answer,label=verdict", "1", "2"))


@pytest.mark.parametrize(
    ("columns", "refused", "complied", "said"),
    [
        ("query=q", None, None, "'query=q' is none of prompt=COLUMN"),
        ("prompt", None, None, "is none of prompt=COLUMN"),
        (None, "no", None, "say both"),
        (None, "no", "no,yes", "cannot be both"),
    ],
)
def test_layouts_that_cannot_be(columns: str | None, refused: str | None, complied: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        layout_of(columns, refused, complied)


def test_two_files_of_one_name_are_both_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [labelled_file(tmp_path / "a"), labelled_file(tmp_path / "b")]
    found = agreement_of_files(judged_files(paths, {"keyword": KeywordJudge()}), "keyword")
    assert [one.n for one in found.values()] == [4, 4, 8]
    with pytest.raises(InputError, match="named twice"):
        judged_files([paths[0], paths[0]], {"keyword": KeywordJudge()})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{file}", "--judge", " , "], "names no judge"),
        (["{file}", "--sheet", "{file}"], "goes with the folder"),
        (["{file}", "--judge", "oracle"], "unknown judge"),
        (["{folder}"], "holds no logs"),
    ],
)
def test_bad_calls(tmp_path: Path, arguments: list[str], said: str) -> None:
    held = {"file": str(labelled_file(tmp_path)), "folder": str(tmp_path)}
    result = CliRunner().invoke(app, ["judges", "agree", *(a.format(**held) for a in arguments)])
    assert isinstance(result.exception, InputError), result.output
    assert said in str(result.exception)
