"""Stored replies judged anew, and judges that break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from inspect_ai.log import list_eval_logs, read_eval_log

from cmrm.engines import opening
from cmrm.errors import CmrmError, InputError
from cmrm.evaluate import provider
from cmrm.evaluate.logs import read_cells
from cmrm.evaluate.rescore import rescore_logs
from cmrm.evaluate.results import refreshed
from cmrm.evaluate.run import evaluate
from cmrm.evaluate.scorers import verdict_scorer
from cmrm.judges import Verdict
from cmrm.measure import loop
from cmrm.prompts.conditions import Condition
from evaluate.plans import COLOURS, quiet, small_plan

pytestmark = pytest.mark.usefixtures("no_models_left")
NAME = "openai:m@http://localhost:1/moody"
ORIGINAL: dict[str, Any] = {"defenses": (), "conditions": (Condition.ORIGINAL,)}


@pytest.fixture(autouse=True)
def no_judges_left() -> Iterator[None]:
    """Judges are made once a process; those of this file are not for others."""
    verdict_scorer.cache_clear()
    yield
    verdict_scorer.cache_clear()


class Fixed:
    """A judge that always says the same."""

    name = "fixed"

    def judge(self, request: str, reply: str) -> Verdict:
        return Verdict.UNSAFE


class Moody(Fixed):
    """A judge that can be made to fail."""

    name = "moody"
    broken = False

    def judge(self, request: str, reply: str) -> Verdict:
        if self.broken:
            raise CmrmError("nobody at home")
        return Verdict.UNSAFE


class Onlooker:
    """A judge that sees images: red is unsafe."""

    name = "onlooker"
    sees_images = True

    def judge(self, request: str, reply: str, images: Any = ()) -> Verdict:
        return Verdict.UNSAFE if images[0].getpixel((0, 0)) == (255, 0, 0) else Verdict.SAFE


def use_judge(monkeypatch: pytest.MonkeyPatch, judge: Any) -> None:
    for module in ("run", "scorers"):
        monkeypatch.setattr(f"cmrm.evaluate.{module}.judge_named", lambda name: judge)


def replies(out: Path) -> dict[Any, Any]:
    cells = read_cells(out / "logs")
    return {cell.key: {k: o.reply for k, o in cell.outcomes.items()} for cell in cells}


def never(*arguments: object, **options: object) -> None:
    raise AssertionError("the model was used")


def test_rescoring_generates_nothing(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(small_plan(checkpoint, judges=("keyword",)), tmp_path, say=quiet)
    monkeypatch.setattr(loop, "respond", never)
    before = replies(tmp_path)
    for _ in range(2):
        rescore_logs(tmp_path, ["regression", "keyword"])
    results = refreshed(tmp_path)
    assert results["judges"] == ["keyword", "regression"]
    assert results["kind"] == "evaluation"
    assert replies(tmp_path) == before


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_without_logs_there_is_nothing_to_judge(tmp_path: Path, folder: str) -> None:
    with pytest.raises(InputError, match="holds no logs"):
        rescore_logs(tmp_path / folder, ["keyword"])
    with pytest.raises(InputError, match="at least one judge"):
        rescore_logs(tmp_path / folder, [])


def test_a_judge_that_fails_takes_nothing_away_and_is_asked_again(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moody = Moody()
    use_judge(monkeypatch, moody)
    plan = small_plan(checkpoint, defenses=(), judges=(NAME,))
    moody.broken = True
    first = evaluate(plan, tmp_path, say=quiet)
    failure = first["judge_failures"][NAME]
    assert (failure["n"], failure["first"]) == (16, "moody failed: CmrmError: nobody at home")
    rate = first["cells"][0]["judges"][NAME]["unsafe"]
    assert (rate["rate"], rate["n"], rate["unscored"]) == (None, 0, 5), "never safe by default"
    moody.broken = False
    second = evaluate(plan, tmp_path, say=quiet)
    assert second["judge_failures"] == {}
    assert second["cells"][0]["judges"][NAME]["unsafe"]["rate"] == 1.0
    moody.broken = True
    monkeypatch.setattr(opening, "load_vlm", never)
    provider._ENGINES.clear()
    missing = rescore_logs(tmp_path, plan.judges)
    assert (missing.failed, missing.kept) == (16, 16)
    assert "nobody at home" in (missing.message() or "")
    cell = read_cells(tmp_path / "logs")[0]
    assert {outcome.verdicts.get(NAME) for outcome in cell.of_kind("harmful")} == {"unsafe"}
    log = read_eval_log(list_eval_logs(str(tmp_path / "logs" / "none"))[0])
    assert log.eval.model.startswith("cmrm/"), "whose replies they are stays on record"


def test_a_broken_log_is_named_and_nothing_is_changed(checkpoint: str, tmp_path: Path) -> None:
    evaluate(small_plan(checkpoint, defenses=()), tmp_path, say=quiet)
    logs = sorted((tmp_path / "logs" / "none").glob("*.eval"))
    before = logs[0].read_bytes()
    logs[-1].write_bytes(logs[-1].read_bytes()[:500])
    for act in (
        lambda: rescore_logs(tmp_path, ["regression"]),
        lambda: read_cells(tmp_path / "logs"),
    ):
        with pytest.raises(InputError, match="cannot be read as a log"):
            act()
    assert logs[0].read_bytes() == before


def test_a_judge_that_sees_images_is_shown_them_and_never_guesses_without(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_judge(monkeypatch, Onlooker())
    monkeypatch.setattr("cmrm.evaluate.plan.judge_maker", lambda name: Onlooker)
    evaluate(small_plan(checkpoint, judges=("onlooker",), **ORIGINAL), tmp_path, say=quiet)
    (cell,) = read_cells(tmp_path / "logs")
    verdicts = {o.sample_id: o.verdicts["onlooker"] for o in cell.of_kind("harmful")}
    assert verdicts == {f"h{k}": "unsafe" if c == "red" else "safe" for k, c in enumerate(COLOURS)}
    rescore_logs(tmp_path, ["latecomer", "onlooker"])
    again = refreshed(tmp_path)
    late, early = (again["cells"][0]["judges"][n]["unsafe"] for n in ("latecomer", "onlooker"))
    assert (late["n"], late["unscored"]) == (0, 5), "the logs keep no images"
    assert (early["n"], early["unscored"]) == (5, 0), "verdicts with the images in sight stay"
    assert "the log keeps no images" in again["judge_failures"]["latecomer"]["first"]


def test_judges_whose_names_hold_slashes(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspect cuts a scorer's name at its first slash: endpoints, hub ids and paths have some."""
    names = ("openai:m@http://localhost:1/v1#engages", "guard:wildguard=org/model", "chat:org/m")
    use_judge(monkeypatch, Fixed())
    results = evaluate(small_plan(checkpoint, judges=names, **ORIGINAL), tmp_path, say=quiet)
    assert results["judges"] == sorted(names)
    for name in names:
        assert results["cells"][0]["judges"][name]["unsafe"]["rate"] == 1.0
    rescore_logs(tmp_path, [names[1]])
    assert refreshed(tmp_path)["judges"] == sorted(names), "a judge replaces its own verdicts"
