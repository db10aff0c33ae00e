"""Training the judge `small`, and the table of what was held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from joblib import parallel_config
from typer.testing import CliRunner

from cmrm.cli.main import app
from cmrm.errors import InputError
from cmrm.files import sha256_file
from cmrm.judges import Verdict
from cmrm.judges.base import Judgement
from cmrm.judges.small import SHIPPED, SmallJudge, SmallModel, shipped_training
from cmrm.judges.small_fit import Example, fit_small
from cmrm.measure.labelled import judged_files
from cmrm.measure.layouts import MSTS, MSTS_LANGUAGES, XSTEST, Labelled, read_files, read_labelled
from cmrm.measure.training import (
    HeldOut,
    between_people,
    calibration_error,
    cells_of,
    held_out,
    measured,
    table_of,
    train_small,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
FILES = [
    SHARED / "msts" / "english.csv", SHARED / "msts" / "other_languages.csv",
    *(SHARED / "xstest" / f"completions_{m}.csv" for m in ("gpt4", "llama2new", "mistralguard")),
]  # fmt: skip
needs_data = pytest.mark.skipif(not FILES[0].exists(), reason="the labelled data is not here")


def row(model: str, case: int, text: str, refused: bool, unsafe: bool | None) -> Labelled:
    return Labelled(
        "f.csv", case, "mine", model, f"case {case}", "english", f"may I do {case}?", text, None,
        refused, unsafe,
    )  # fmt: skip


def rows(models: tuple[str, ...] = ("a", "b")) -> list[Labelled]:
    kinds = [("No, never do that", True, False), ("Yes, go on", False, True),
             ("The picture shows a house", False, False)]  # fmt: skip
    return [
        row(model, case, f"{text} {case % 5}", refused, unsafe)
        for model in models
        for case in range(24)
        for text, refused, unsafe in kinds
    ]


def test_every_row_is_in_one_cell_with_its_model_and_fold() -> None:
    data = rows()
    cells = list(cells_of(data, 3))
    assert sorted(k for cell in cells for k in cell) == list(range(len(data)))
    assert len(cells) == 6
    assert all(len({data[k].model for k in cell}) == 1 for cell in cells)


def test_held_out_replies_are_judged_by_what_saw_neither_model_nor_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[set[str], set[str]]] = []
    original = fit_small

    def fit(examples: list[Example]) -> SmallModel:
        seen.append(({e.group for e in examples}, {e.text for e in examples}))
        return original(examples)

    monkeypatch.setattr("cmrm.measure.training.fit_small", fit)
    data = rows()
    with parallel_config(backend="sequential"):
        results = held_out(data, folds=2)
    assert [result.row for result in results] == data
    for cell, (groups, _) in zip(cells_of(data, 2), seen, strict=True):
        assert not groups & {data[k].case for k in cell}
    scored = [r for r in results if r.judgement.verdict.is_refusal is not None]
    assert len(scored) > 0.8 * len(data)
    assert all(r.judgement.verdict.is_refusal == r.row.refused for r in scored)


def test_one_model_alone_is_told_apart_by_cases() -> None:
    data = rows(("a",))
    assert len(held_out(data, folds=2)) == len(data)


def test_without_another_case_nothing_can_be_held_out() -> None:
    data = [
        row(m, 0, t, r, u) for m in "ab" for t, r, u in (("no", True, False), ("y", False, True))
    ]
    with pytest.raises(InputError, match="no labelled reply of another model"):
        held_out(data)


def results_of(*pairs: tuple[bool, Verdict, float]) -> list[HeldOut]:
    return [
        HeldOut(
            row("a", k, "x", refused, None),
            Judgement(verdict, "open" if verdict is Verdict.UNSCORED else None, refusal=p),
        )
        for k, (refused, verdict, p) in enumerate(pairs)
    ]


def test_counts_against_people() -> None:
    results = results_of(
        (True, Verdict.REFUSED, 0.9),
        (True, Verdict.COMPLIED, 0.1),
        (False, Verdict.DEFLECTED, 0.1),
        (False, Verdict.REFUSED, 0.9),
        (True, Verdict.UNSCORED, 0.5),
        (False, Verdict.COMPLIED, 0.1),
    )
    line = measured("refusal", results, "command")
    assert (line.tp, line.fn, line.tn, line.fp) == (1, 1, 2, 1)
    assert (line.n, line.unscored) == (5, 1)
    assert line.kappa == pytest.approx(1 / 6, abs=1e-5)


def test_a_collection_without_labels_of_harm_has_no_line_of_it() -> None:
    table = table_of(results_of((True, Verdict.REFUSED, 1.0), (False, Verdict.COMPLIED, 0.0)), "c")
    assert {line.question for line in table} == {"refusal"}


def test_calibration_error_by_hand() -> None:
    results = results_of(
        (True, Verdict.REFUSED, 0.95),
        (False, Verdict.REFUSED, 0.95),
        (False, Verdict.COMPLIED, 0.05),
    )
    assert calibration_error(results, "refusal") == pytest.approx((2 * 0.45 + 0.05) / 3, abs=1e-4)
    assert calibration_error(results, "unsafe") is None


@needs_data
def test_layouts_are_recognised_by_their_columns() -> None:
    names = [read_labelled(file)[0].collection for file in FILES]
    assert names == [MSTS.name, MSTS_LANGUAGES.name, XSTEST.name, XSTEST.name, XSTEST.name]
    data = read_files(FILES)
    assert len(data) == 3350
    assert sum(bool(r.unsafe) for r in data if r.collection == MSTS.name) == 36
    assert {r.language for r in data if r.collection == MSTS_LANGUAGES.name} == {
        "arabic", "chinese", "french", "german", "spanish",
    }  # fmt: skip


@needs_data
def test_people_among_themselves() -> None:
    kappas = between_people(read_files(FILES))
    assert {question: (round(k or 0, 2), n) for question, (k, n) in kappas.items()} == {
        "refusal": (0.86, 1000), "unsafe": (0.76, 1000),
    }  # fmt: skip


def test_without_two_people_nothing_is_said_of_them() -> None:
    assert between_people(rows()) == {}


@needs_data
@pytest.mark.slow
def test_the_command_rebuilds_the_shipped_judge(tmp_path: Path) -> None:
    """Its terms exactly, its weights and verdicts up to how a processor rounds."""
    import cmrm.judges

    out = tmp_path / SHIPPED
    result = CliRunner().invoke(app, ["judges", "train", *map(str, FILES), "--out", str(out)])
    assert result.exit_code == 0, result.output
    shipped = Path(cmrm.judges.__file__).parent / "weights" / SHIPPED
    if sha256_file(out) == sha256_file(shipped):
        return
    new, old = SmallModel.load(out), SmallModel.load(shipped)
    for one, other in ((new.refusal, old.refusal), (new.engagement, old.engagement)):
        assert one.weights.shape == other.weights.shape
        assert np.corrcoef(one.weights, other.weights)[0, 1] > 0.999
    judges = [SmallJudge(model) for model in (new, old)]
    replies = read_files(FILES)[::10]
    verdicts = [[judge.judge(r.prompt, r.text) for r in replies] for judge in judges]
    same = sum(one is other for one, other in zip(*verdicts, strict=True))
    assert same >= 0.99 * len(replies)


@needs_data
def test_the_shipped_judge_was_trained_on_these_files() -> None:
    assert shipped_training()["files"] == {path.name: sha256_file(path) for path in sorted(FILES)}


def test_training_needs_both_kinds(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,completion,final_label\na,b,2_full_refusal\n", encoding="utf-8")
    with pytest.raises(InputError, match="one kind is missing"):
        train_small([file], tmp_path / "out")


@needs_data
def test_other_judges_are_measured_on_the_same_rows() -> None:
    from cmrm.judges import KeywordJudge

    completions = judged_files([FILES[0]], {"keyword": KeywordJudge()})
    assert len(completions) == 1000
    assert {c.model for c in completions} == {r.model for r in read_labelled(FILES[0])}
