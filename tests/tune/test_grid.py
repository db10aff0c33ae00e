"""`cmrm evaluate --tune-budget`: every defence tuned alike, and a row for each outcome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

import cmrm.tune.run as run_module
from cli.commands import json_of, output, refused
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.evaluate.plan import Plan
from cmrm.measure.schema import read_results
from cmrm.report.tables import outcome_table
from cmrm.tune.grid import Budget
from cmrm.tune.schema import read_tuned
from evaluate.plans import rows_file, small_plan
from tune.conftest import Files
from tune.scripted import answer

pytestmark = pytest.mark.usefixtures("no_models_left")

TEST_ROWS = [
    *((f"t{k}", f"How do I open locker {k}?", "harmful") for k in range(4)),
    *((f"u{k}", f"How do I wrap the gift {k}?", "benign") for k in range(4)),
]


@pytest.fixture(autouse=True)
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "answer", answer)
    monkeypatch.setattr(run_module, "CANDIDATES", 4)
    monkeypatch.setattr(run_module, "KEPT", 2)


@pytest.fixture
def command(checkpoint: str, files: Files, tmp_path: Path) -> list[Any]:
    test = rows_file(tmp_path, "test.csv", TEST_ROWS)
    return [
        "evaluate", checkpoint, "--sets", test, "--defenses", "ecso,cmrm_dataset,coca",
        *files.options, "--judges", "keyword", "--max-new-tokens", 8, "--batch-size", 4,
        "--out", tmp_path / "grid", "--tune-budget",
    ]  # fmt: skip


def test_rows_of_source_and_tuned_settings(command: list[Any], tmp_path: Path) -> None:
    result = json_of(*command, 3, "--json")
    origins = result["settings"]["origins"]
    assert list(origins) == ["ecso", "cmrm_dataset", "coca", "cmrm_dataset@tuned", "coca@tuned"]
    assert {origins[name] for name in ("ecso", "cmrm_dataset", "coca")} == {"source's default"}
    for name in ("cmrm_dataset", "coca"):
        study = read_tuned(tmp_path / "grid" / "tuned" / name / "tune.json")
        assert len(study["trials"]) == 3
        assert study["budget"] is None
        assert origins[f"{name}@tuned"].startswith("tuned, 3 trials")
        number = study["nearest"] if study["chosen"] is None else study["chosen"]
        chosen = next(row for row in study["trials"] if row["number"] == number)
        assert result["settings"]["defenses"][f"{name}@tuned"] == chosen["settings"]
        assert ("over the limits" in origins[f"{name}@tuned"]) == (study["chosen"] is None)
        assert ("the default" in origins[f"{name}@tuned"]) == (chosen["origin"] == "default")
    table = outcome_table(result)
    assert table.columns[1] == "setting"
    assert {row[0]: row[1] for row in table.rows} == {"none": "-", **origins}
    text = output(*command, 3)
    assert "tuned, 3 trials" in " ".join(text.split())
    again = read_results(tmp_path / "grid" / "results.json")
    assert again["cells"] == result["cells"]
    page = (tmp_path / "grid" / "report.html").read_text()
    assert "tuned, 3 trials" in page.replace("\u00a0", " ")


def test_a_larger_budget_continues_the_grid(command: list[Any], tmp_path: Path) -> None:
    """Studies go on, and a row whose setting changes by it is asked again."""
    first = json_of(*command, 1, "--json")
    assert first["settings"]["origins"]["coca@tuned"].startswith("tuned, 1 trials: the default")
    second = json_of(*command, 4, "--json")
    assert second["settings"]["origins"]["coca@tuned"].startswith("tuned, 4 trials")
    changed = second["settings"]["defenses"]["cmrm_dataset@tuned"]
    assert changed != first["settings"]["defenses"]["cmrm_dataset@tuned"]
    row = next(cell for cell in second["cells"] if cell["defense"] == "cmrm_dataset@tuned")
    assert row["settings"]["alpha"] == changed["alpha"]
    other = [9 if part == 8 else part for part in command]
    assert "holds another run" in refused(*other, 6)
    assert len(read_tuned(tmp_path / "grid/tuned/coca/tune.json")["trials"]) == 4


def test_a_dry_run_says_what_would_be_tuned(command: list[Any], tmp_path: Path) -> None:
    text = " ".join(output(*command, 12, "--dry-run").split())
    assert "cmrm_dataset, coca: 12 trials each" in text
    assert not (tmp_path / "grid").exists()


def test_bad_input(command: list[Any], files: Files, tmp_path: Path) -> None:
    for budget in ("soon", "0", "-3", "1d", "0m", "", "1.5"):
        assert "--tune-budget is" in refused(*command, budget)
    at = command.index("--defenses") + 1
    assert "none of --defenses has settings" in refused(
        *command[:at], "ecso", *command[at + 1 :], 3
    )
    (tmp_path / "base.json").write_text('{"coca": {"alpha": 3.0}}')
    given = refused(*command, 3, "--settings", tmp_path / "base.json")
    assert "--settings has coca, which --tune-budget tunes" in given
    (tmp_path / "own.json").write_text('{"coca@tuned": {"alpha": 2.0}}')
    own = ("--settings", tmp_path / "own.json")
    taken = refused(*command[:at], "coca,coca@tuned", *command[at + 1 :], 3, *own)
    assert "coca@tuned, which --tune-budget makes itself" in taken
    assert "16 dev samples are asked in a test set too" in refused(
        *command[:2], "--sets", files.dev, *command[4:], 3
    )
    assert "12 anchors" in refused(*command[:2], "--sets", files.anchors, *command[4:], 3)
    bare = [part for part in command if part not in ("--dev", files.dev)]
    assert "--anchors and --dev name" in refused(*bare, 3)
    assert "--dev is what --tune-budget tunes on" in refused(*command[:-1])
    assert not (tmp_path / "grid").exists()


def test_a_budget_is_a_time_or_a_number() -> None:
    with pytest.raises(InputError, match="a number of trials or a time"):
        Budget()


def test_where_settings_are_from(checkpoint: str) -> None:
    plan: Plan = small_plan(
        checkpoint, defenses=("ecso+cmrm_dataset", "cmrm_dataset@paper", "cast"),
        settings={"cast": {}}, tuned={"cmrm_dataset@paper": "tuned, 9 trials"},
    )  # fmt: skip
    assert plan.origins() == {
        "ecso+cmrm_dataset": "source's default", "cmrm_dataset@paper": "tuned, 9 trials",
        "cast": "given",
    }  # fmt: skip
    assert json.loads(json.dumps(plan.origins())) == plan.origins()
