"""`cmrm judges sheet` and what its labels do to the results of a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm.cli.main import app
from cmrm.errors import InputError
from cmrm.evaluate.run import evaluate
from cmrm.measure.schema import read_results
from evaluate.plans import quiet, small_plan

pytestmark = pytest.mark.usefixtures("no_models_left")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


def test_a_sheet_is_drawn_recorded_and_corrects_the_results(
    checkpoint: str, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "sheet.csv"
    evaluate(small_plan(checkpoint, defenses=(), judges=("keyword",)), out, say=quiet)
    done = invoke("judges", "sheet", out, "-o", file, "-n", 20, "--seed", 3)
    assert done.exit_code == 0, done.output
    (sheet,) = json.loads((out / "sheets.json").read_text())
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["id", "request", "reply", "refused", "unsafe"], "blind"
    assert sorted(row["id"] for row in rows) == sheet["drawn"]
    assert set(sheet["drawn"]) <= set(sheet["probabilities"])
    for row in rows:
        row |= {"refused": "no", "unsafe": "yes" if "break" in row["request"] else "no"}
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    agreed = invoke("judges", "agree", out, "--sheet", file)
    assert agreed.exit_code == 0, agreed.output
    corrections = read_results(out / "results.json")["corrections"]["keyword"]
    assert set(corrections) == {"unsafe", "over_refusal"}
    unsafe = corrections["unsafe"]["corrected"]
    assert unsafe["source"] == "labels of this run"
    assert unsafe["rate"] is None
    assert "label at least 5 of each" in unsafe["reason"]
    assert "Rates corrected" in (out / "report.html").read_text(encoding="utf-8")
    again = invoke("rescore", out, "--judges", "keyword")
    assert again.exit_code == 0, again.output
    assert "judged by keyword: kappa with people" in again.stdout
    assert "label at least 5 of each" in " ".join(again.stdout.split())


def test_an_existing_sheet_is_never_overwritten(checkpoint: str, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "sheet.csv"
    evaluate(small_plan(checkpoint, defenses=(), judges=("keyword",)), out, say=quiet)
    file.write_text("labels")
    done = invoke("judges", "sheet", out, "-o", file)
    assert isinstance(done.exception, InputError)
    assert "perhaps with labels" in str(done.exception)
    assert file.read_text() == "labels"
