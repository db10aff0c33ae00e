"""`cmrm reproduce` from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm.cli.main import app
from cmrm.errors import InputError
from cmrm.evaluate import scorers
from cmrm.judges import Verdict, make_judge
from cmrm.measure import loop
from cmrm.measure.schema import read_results
from reproduce.recipes import recipe_file, vlsafe

pytestmark = pytest.mark.usefixtures("no_models_left")


class Theirs:
    """The publication's judge."""

    name = "theirs"

    def judge(self, request: str, reply: str) -> Verdict:
        return Verdict.SAFE


class Ours(Theirs):
    """A judge that finds every reply unsafe."""

    name = "ours"

    def judge(self, request: str, reply: str) -> Verdict:
        return Verdict.UNSAFE


@pytest.fixture(autouse=True)
def judges(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`chat:org/theirs` and `chat:org/ours` are the judges of this file."""

    def made(name: str) -> Any:
        return Theirs() if "theirs" in name else Ours() if "ours" in name else make_judge(name)

    monkeypatch.setattr(scorers, "make_judge", made)
    for cached in (scorers.judge_named, scorers.verdict_scorer):
        cached.cache_clear()
    yield
    for cached in (scorers.judge_named, scorers.verdict_scorer):
        cached.cache_clear()


def run(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    results: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return results


def test_a_recipe_runs_from_end_to_end_and_again(checkpoint: str, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, judges=["chat:org/ours"])
    command = [
        "reproduce", recipe, "--model", checkpoint, "--partial", "--out", tmp_path / "out",
        "--path", f"vlsafe={vlsafe(tmp_path / 'v')}",
    ]  # fmt: skip
    for _ in range(2):
        results = run(*command)
    cells = {(cell["set"], cell["condition"], cell["defense"]): cell for cell in results["cells"]}
    assert ("asked", "query", "none") not in cells, "a set's own conditions"
    assert ("vlsafe", "caption", "none") in cells
    asked = cells["vlsafe", "original", "none"]["done"]
    assert 0 < asked < 20, "anchors are not asked"
    schedules = {
        name: cells["vlsafe", "original", name]["settings"]["schedule"]
        for name in ("cmrm_dataset@paper", "cmrm_sample@calibrated")
    }
    assert schedules == {
        "cmrm_dataset@paper": "per_layer", "cmrm_sample@calibrated": "telescoped",
    }  # fmt: skip
    target = results["recipe"]["targets"][0]
    assert (target["measured"], target["published"], target["inside"]) == (100.0, 100.0, True)
    assert target["n"] == asked
    notes = next(data for data in results["sets"] if data["name"] == "vlsafe")["notes"]
    assert "20 samples where 1110 are published" in notes
    assert any("are anchors and not asked" in note for note in notes)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "published within the interval" in page
    assert read_results(tmp_path / "out" / "results.json")["recipe"]["title"] == "A table"


def test_a_judge_that_comes_later_is_asked_about_the_stored_replies(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is short: the model first, the publication's judge afterwards."""
    recipe = recipe_file(tmp_path, judges=["chat:org/theirs", "chat:org/ours"])
    out = tmp_path / "out"
    command = [
        "reproduce", recipe, "--model", checkpoint, "--partial", "--out", out,
        "--path", f"vlsafe={vlsafe(tmp_path / 'v')}",
    ]  # fmt: skip
    first = run(*command, "--judges", "chat:org/ours")["recipe"]
    assert (first["judge"], first["targets"][0]["measured"]) == ("chat:org/ours", 100.0)
    second = run("rescore", out, "--judges", "chat:org/theirs")
    shown = second["recipe"]
    assert (shown["judge"], shown["targets"][0]["measured"]) == ("chat:org/theirs", 0.0)
    assert second["judges"] == ["chat:org/ours", "chat:org/theirs"]

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a reply was generated again")

    monkeypatch.setattr(loop, "respond", never)
    third = run(*command, "--judges", "chat:org/ours,keyword")
    assert third["judges"] == ["chat:org/ours", "chat:org/theirs", "keyword"], (
        "a new judge is asked, and the others' verdicts stay"
    )


def test_a_dry_run_names_everything_that_is_missing_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = {"vlsafe": {"anchors": 0.2}, "mossbench": {}}
    recipe = recipe_file(tmp_path, sets=sets, model=str(tmp_path / "nowhere"))
    result = CliRunner().invoke(
        app, ["reproduce", str(recipe), "--dry-run"], env={"COLUMNS": "200"}
    )
    assert isinstance(result.exception, InputError)
    for part in ("set vlsafe", "set mossbench", "harmlessness_examine.jsonl", "model"):
        assert part in result.output
    assert not Path("table").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["magic"], "there is no recipe magic"),
        (["paper_llava15_7b", "--limit", "0"], "limit is 0"),
        (["paper_llava15_7b", "--model", ""], "--model and --out take a name"),
        (["paper_llava15_7b", "--dtype", "int4"], "dtype is 'int4'"),
        (["paper_llava15_7b", "--judges", ","], "--judges names nothing"),
        (["paper_sharegpt4v_7b", "--model", "demo", "--path", "x"], "is no NAME=DIR"),
        (["paper_llava15_7b"], "parts are not there"),
    ],
)
def test_bad_command_lines(options: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, ["reproduce", *options])
    assert isinstance(result.exception, InputError), result.output
    assert problem in str(result.exception)
