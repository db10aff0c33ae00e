"""Recipes, and what is looked at before a run starts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

import yaml

import cmrm.evaluate.preflight as before
from cmrm import Sample
from cmrm.cli.main import app
from cmrm.prompts.conditions import Condition
from cmrm.defenses import FitData
from cmrm.errors import InputError
from cmrm.evaluate import provider, scorers
from cmrm.evaluate.preflight import free_memory, model_findings, preflight, weights_of
from cmrm.reproduce.recipes import plan_of, read_recipe, recipe_path, told
from cmrm.evaluate.run import Plan
from cmrm.judges import Verdict, make_judge
from cmrm.prompts import Loaded
from cmrm.prompts.catalogue import place_of

pytestmark = pytest.mark.usefixtures("no_models_left")
RECIPES = Path(__file__).parents[1] / "src" / "cmrm" / "reproduce"


def vlsafe(folder: Path, n: int = 20) -> Path:
    """Rows in VLSafe's published layout, with pictures of our own."""
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for k in range(n):
        name = f"{k:012d}.jpg"
        Image.new("RGB", (24, 20), (k * 9 % 255, 80, 120)).save(folder / "val2014" / f"COCO_val2014_{name}")
        rows.append({"image_id": name, "caption": f"a plain picture, number {k}", "query": f"How do I break rule {k}?"})
    (folder / "harmlessness_examine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def questions(folder: Path) -> Path:
    """A file of questions with answers, as a set of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), "red").save(folder / "red.png")
    lines = [f"q{k},Which colour is number {k}?,{folder / 'red.png'},red" for k in range(12)]
    (folder / "asked.csv").write_text("\n".join(["id,query,image,answer", *lines]) + "\n")
    return folder / "asked.csv"


def recipe(folder: Path, **more: Any) -> Path:
    held: dict[str, Any] = {
        "schema": "cmrm-recipe/1", "title": "A table", "source": "Somebody, somewhere", "model": "nobody/none",
        "sets": {"vlsafe": {"anchors": 0.4}, str(questions(folder / "q")): {"anchors": 0.5, "conditions": ["original"]}},
        "conditions": ["original", "caption", "query"], "defenses": ["cmrm_dataset@paper", "cmrm_sample@calibrated"],
        "judges": ["keyword"], "max_new_tokens": 4, "batch_size": 4,
        "targets": [{"set": "vlsafe", "condition": "original", "defense": "none", "figure": "unsafe", "value": 100.0},
                    {"set": "asked", "condition": "original", "defense": "cmrm_dataset@paper", "figure": "accuracy", "value": 99.0}],
    }  # fmt: skip
    held["sets"] = more.pop("sets", held["sets"])
    held["targets"] = more.pop("targets", [held["targets"][0]])
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(held | more, sort_keys=False))
    return path


def test_a_recipe_runs_from_end_to_end_and_goes_on(checkpoint: str, tmp_path: Path) -> None:
    command = [
        "reproduce", str(recipe(tmp_path)), "--model", checkpoint, "--path", f"vlsafe={vlsafe(tmp_path / 'v')}", "--partial",
        "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    for _ in range(2):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout[done.stdout.index("{") :])
    cells = {(c["set"], c["condition"], c["defense"]): c for c in found["cells"]}
    assert ("asked", "query", "none") not in cells, "a set's own conditions"
    assert ("vlsafe", "caption", "none") in cells
    asked = cells["vlsafe", "original", "none"]["done"]
    assert 0 < asked < 20, "anchors are not asked"
    assert cells["vlsafe", "original", "cmrm_dataset@paper"]["settings"]["schedule"] == "per_layer"
    assert cells["vlsafe", "original", "cmrm_sample@calibrated"]["settings"]["schedule"] == "telescoped"
    target = found["recipe"]["targets"][0]
    assert (target["found"], target["published"], target["inside"]) == (100.0, 100.0, True)
    assert target["n"] == cells["vlsafe", "original", "none"]["judges"]["keyword"]["unsafe"]["n"] <= asked
    notes = next(s for s in found["sets"] if s["name"] == "vlsafe")["notes"]
    assert "20 samples where 1110 are published" in notes
    assert any("are anchors and not asked" in n for n in notes)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "A table" in page
    assert "published within the interval" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["recipe"]["title"] == "A table"


def test_anchors_are_drawn_by_hash_and_never_asked(tmp_path: Path) -> None:
    held = read_recipe(recipe(tmp_path))
    places = {"vlsafe": vlsafe(tmp_path / "v")}
    plan, troubles = plan_of(held, places=places, partial=True)
    assert plan is not None
    assert not troubles
    assert plan.anchors is not None
    asked = {s.query for one in plan.sets for s in one.samples}
    assert not asked & {s.query for s in plan.anchors.all}
    assert len(plan.anchors.harmful) + len(plan.sets[0].samples) == 20
    assert plan.anchors.more, "samples that are neither harmful nor benign count for the shift"
    assert plan.anchors.shifted == (*plan.anchors.harmful, *plan.anchors.more)
    again, _ = plan_of(held, places=places, partial=True)
    assert again == plan
    few, _ = plan_of(held, places=places, partial=True, limit=2)
    assert few is not None
    assert few.anchors is not None
    assert [len(one.samples) for one in few.sets] == [2, min(2, len(plan.sets[1].samples))]
    assert len(few.anchors.harmful) == 2
    assert {s.id for s in few.anchors.harmful} <= {s.id for s in plan.anchors.harmful}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_recipes_are_whole(path: Path) -> None:
    assert recipe_path(path.stem).read_text() == path.read_text(), "the very file is in the wheel"
    paper, demo = read_recipe(path), read_recipe(path, demo=True)
    assert paper.conditions == (
        Condition.ORIGINAL,
        Condition.BLANK,
        Condition.NOISE,
        Condition.CAPTION,
        Condition.QUERY,
    )
    assert {name: use.anchors for name, use in paper.sets.items() if use.anchors} == {
        "vlsafe": 0.2,
        "jailbreak-llms": 0.2,
        "llava-bench-coco": 0.2,
    }
    assert not demo.targets, "the published figures are another model's"
    assert demo.model == "demo"
    plan, troubles = plan_of(demo, limit=2)
    assert not troubles
    assert plan is not None
    assert plan.anchors is not None
    assert len(plan.anchors.harmful) + len(plan.anchors.benign) == 2
    known = {(t.set, t.condition, t.defense): t for t in paper.targets}
    for (_, condition, defense), target in known.items():
        assert condition in paper.conditions
        assert defense in ("none", *paper.defenses)
        assert target.figure in {"unsafe", "rating", "accuracy"}
    if path.stem == "paper_llava15_7b":
        assert known["vlsafe", "original", "none"].value == 61.53
        assert known["vlsafe", "original", "cmrm_dataset@paper"].value == 5.41
        assert known["vlsafe", "original", "cmrm_sample@paper"].value == 3.15
        assert paper.model == "llava-hf/llava-1.5-7b-hf"


def test_recipes_are_found_by_name() -> None:
    with pytest.raises(InputError, match=r"no recipe magic; .*paper_llava15_7b"):
        recipe_path("magic")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "cmrm-recipe/9"}, "schema"),
        ({"judge": ["keyword"]}, "unknown parts: judge"),
        ({"sets": {"vlsafe": {"anchors": 2}}}, "share between 0 and 1"),
        ({"sets": {"vlsafe": {"share": 0.2}}}, "sets.vlsafe has unknown parts: share"),
        ({"sets": ["vlsafe"]}, "another form"),
        ({"conditions": ["sepia"]}, "conditions are"),
        ({"conditions": "original"}, "conditions are"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"model": 5}, "model is 5"),
        ({"rater": ["x"]}, "rater is ['x']"),
        ({"judges": "keyword"}, "judges is 'keyword'"),
        ({"notes": "a note"}, "notes is 'a note'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"conditions": []}, "conditions are"),
        ({"conditions": ["query", "query"]}, "each once"),
        ({"targets": [{"set": "vlsafe", "condition": "original", "defense": "none", "figure": "unsafe", "value": float("nan")}]}, "is no number"),
        ({"targets": [{"set": "vlsafe", "figure": "unsafe"}]}, "another form"),
        ({"targets": [{"set": "x", "condition": "original", "defense": "none", "figure": "unsafe", "value": 1}]}, "does not ask"),
        ({"targets": [{"set": "vlsafe", "condition": "original", "defense": "none", "figure": "joy", "value": 1}]}, "'joy'"),
        ({"targets": [{"set": "vlsafe", "condition": "sepia", "defense": "none", "figure": "unsafe", "value": 1}]}, "does not run"),
        ({"targets": [{"set": "vlsafe", "condition": "original", "defense": "ecso", "figure": "unsafe", "value": 1}]}, "does not run"),
        ({"settings": {"cmrm_dataset@papre": {"alpha": 0.2}}}, "which is not among the defences"),
    ],
)  # fmt: skip
def test_broken_recipes(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read_recipe(recipe(tmp_path, **change))


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1\n- 2", "\x00", "schema: 2024-13-45", "[" * 5000])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=r"r\.yaml"):
        read_recipe(tmp_path / "r.yaml")
    path = recipe(tmp_path)
    held = yaml.safe_load(path.read_text())
    del held["judges"]
    path.write_text(yaml.safe_dump(held, sort_keys=False))
    with pytest.raises(InputError, match="lacks judges"):
        read_recipe(path)


def test_without_a_demo_section_it_cannot_be_tried(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no section `demo`"):
        read_recipe(recipe(tmp_path), demo=True)


def test_targets_that_the_run_has_not_are_said_to_be_missing(tmp_path: Path) -> None:
    held = replace(read_recipe(recipe(tmp_path)), judges=("theirs", "keyword"))
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6, "n": 80, "unscored": 1}
    cell: dict[str, Any] = {"set": "vlsafe", "condition": "original", "defense": "none", "accuracy": None,
                            "judges": {"keyword": {"unsafe": rate}}}  # fmt: skip

    def row(cells: list[Any], *judges: str) -> tuple[Any, ...]:
        found = told(held, {"cells": cells, "judges": list(judges)})
        one = found["targets"][0]
        return found["judge"], one["found"], one["low"], one["high"], one["inside"]

    assert row([cell], "keyword") == ("keyword", 50.0, 40.0, 60.0, False), (
        "who judged is said: it was not the publication's judge"
    )
    both = {**cell, "judges": {**cell["judges"], "theirs": {"unsafe": {**rate, "rate": 1.0, "high": 1.0}}}}
    assert row([both], "keyword", "theirs") == ("theirs", 100.0, 40.0, 100.0, True)
    assert row([], "keyword")[1] is None
    unscored = {
        **cell,
        "judges": {"keyword": {"unsafe": {"rate": None, "low": None, "high": None, "n": 0, "unscored": 9}}},
    }
    assert row([unscored], "keyword")[1:] == (None, None, None, None)


def test_requests_that_are_asked_alike_stand_on_one_side(tmp_path: Path) -> None:
    """LLaVA-Bench asks "Describe the following image." of several images."""
    folder = tmp_path / "many"
    folder.mkdir()
    Image.new("RGB", (24, 20), "red").save(folder / "red.png")
    lines = [f"q{k},{'Describe it.' if k % 2 else f'What is {k}?'},{folder / 'red.png'},red" for k in range(30)]
    (folder / "asked.csv").write_text("\n".join(["id,query,image,answer", *lines]) + "\n")
    held = read_recipe(recipe(tmp_path, sets={str(folder / "asked.csv"): {"anchors": 0.4}}, targets=[]))
    plan, _ = plan_of(held)
    assert plan is not None
    assert plan.anchors is not None
    asked = [s.query for s in plan.sets[0].samples]
    anchors = [s.query for s in plan.anchors.all]
    assert len(asked) + len(anchors) == 30
    assert not set(asked) & set(anchors)


def test_a_judge_that_comes_later_is_asked_of_what_was_said_before(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is short: the model first, the publication's judge afterwards, by the same command or by `rescore`."""

    class Theirs:
        name = "theirs"

        def judge(self, request: str, reply: str) -> Verdict:
            return Verdict.SAFE

    path = recipe(tmp_path, judges=["chat:org/theirs", "keyword"])
    command = ["reproduce", str(path), "--model", checkpoint, "--path", f"vlsafe={vlsafe(tmp_path / 'v')}", "--partial",
               "--out", str(tmp_path / "out"), "--json"]  # fmt: skip

    def run(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return found

    first = run(*command, "--judges", "keyword")
    assert (first["recipe"]["judge"], first["recipe"]["targets"][0]["found"]) == ("keyword", 100.0)
    make = make_judge
    monkeypatch.setattr(scorers, "make_judge", lambda name: Theirs() if "theirs" in name else make(name))
    second = run("rescore", str(tmp_path / "out"), "--judges", "chat:org/theirs", "--json")
    assert (second["recipe"]["judge"], second["recipe"]["targets"][0]["found"]) == ("chat:org/theirs", 0.0)
    assert second["judges"] == ["chat:org/theirs", "keyword"]

    def never(*args: object, **options: object) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(provider, "respond", never)
    third = run(*command, "--judges", "keyword,regression")
    assert third["judges"] == ["chat:org/theirs", "keyword", "regression"], (
        "a judge that is new is asked, and the others are kept"
    )


def test_a_dry_run_says_everything_that_is_missing_at_once(tmp_path: Path) -> None:
    path = recipe(tmp_path, sets={"vlsafe": {"anchors": 0.2}, "mossbench": {}}, model=str(tmp_path / "nowhere"))
    result = CliRunner().invoke(app, ["reproduce", str(path), "--dry-run"], env={"COLUMNS": "200"})
    assert isinstance(result.exception, InputError)
    for part in ("set vlsafe", "set mossbench", "harmlessness_examine.jsonl", "model"):
        assert part in result.output
    assert not (tmp_path / "out").exists()
    assert not Path("table").exists()


def test_a_dry_run_starts_nothing(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "time_a_batch", lambda plan: (2.0, 4))
    monkeypatch.setattr(before, "free_memory", lambda device_map: ("CPU", 10**12))
    held = read_recipe(recipe(tmp_path))
    plan, _ = plan_of(held, places={"vlsafe": vlsafe(tmp_path / "v")}, partial=True, model=checkpoint)
    assert plan is not None
    found = {one.what: one for one in preflight(plan, tmp_path / "out")}
    assert all(one.good for one in found.values())
    total = sum(len(loaded.samples) for _, loaded, _ in plan.cells())
    assert f"{total} replies" in found["cells"].says
    assert found["time"].says.startswith(f"about {total / 2:.0f} s of generation")
    assert not (tmp_path / "out").exists()
    assert "harmful" in found["anchors"].says
    none = {one.what: one for one in preflight(replace(plan, anchors=None), tmp_path / "out")}["anchors"]
    assert none.good is False
    assert "cmrm_dataset@paper has to be fitted" in none.says

    def broken(plan: Plan) -> tuple[float, int]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(before, "time_a_batch", broken)
    failed = {one.what: one for one in preflight(plan, tmp_path / "out")}["time"]
    assert (failed.good, "no kernel image" in failed.says) == (False, True)
    monkeypatch.setattr(before, "free_memory", lambda device_map: ("CPU", 10))
    short = {one.what: one for one in preflight(plan, tmp_path / "out")}
    assert short["memory"].good is False
    assert short["time"].good is None, "a model that does not fit is not loaded to be timed"


def test_the_time_is_that_of_a_real_batch(checkpoint: str) -> None:
    samples = [Sample(f"h{k}", f"How {k}?", Image.new("RGB", (20, 16)), label="harmful") for k in range(3)]
    ticks = iter([10.0, 14.0])
    plan = Plan(checkpoint, (Loaded("mine", tuple(samples)),), ("none",), ("keyword",), max_new_tokens=2, batch_size=2)
    assert before.time_a_batch(plan, clock=lambda: next(ticks)) == (4.0, 2)


def test_weights_on_disk(checkpoint: str, tmp_path: Path) -> None:
    whole = weights_of(checkpoint, "model")
    assert whole.local
    assert whole.finding.good
    assert whole.size == (Path(checkpoint) / "model.safetensors").stat().st_size
    (tmp_path / "empty").mkdir()
    assert weights_of(str(tmp_path / "empty"), "model").finding.says.endswith("name the folder of a checkpoint")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text("{}")
    (torn / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    held = weights_of(str(torn), "judge")
    assert (held.finding.good, held.size) == (False, None)
    assert "one.safetensors missing" in held.finding.says
    strange = weights_of("no such/thing at all", "model")
    assert strange.finding.good is False
    assert "neither a folder here nor a hub id" in strange.finding.says


@pytest.mark.parametrize("error", [OSError("offline mode is enabled"), Exception("ConnectError of some client")])
def test_a_hub_model_that_cannot_be_asked_for_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from huggingface_hub import HfApi

    def offline(self: HfApi, *args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "model_info", offline)
    found = weights_of("llava-hf/llava-1.5-7b-hf", "model")
    assert (found.finding.good, found.local) == (None, False)
    _, findings = model_findings("llava-hf/llava-1.5-7b-hf", ["keyword", "chat:meta-llama/Meta-Llama-3-8B-Instruct"])
    assert [one.what for one in findings] == [
        "model llava-hf/llava-1.5-7b-hf", "judge meta-llama/Meta-Llama-3-8B-Instruct", "memory",
    ]  # fmt: skip
    assert findings[-1].good is None


def test_hub_sizes_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    files = [("model-1.safetensors", 9 * 10**9), ("model-2.safetensors", 5 * 10**9), ("pytorch_model.bin", 14 * 10**9),
             ("onnx/model.safetensors", 10**9)]  # fmt: skip
    info = SimpleNamespace(gated=False, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files])
    monkeypatch.setattr(HfApi, "model_info", lambda self, *args, **options: info)
    found = weights_of("somebody/model", "model")
    assert (found.size, found.local, found.finding.good) == (14 * 10**9, False, True)
    monkeypatch.setattr(before, "_may_read", lambda source: False)
    gated = SimpleNamespace(gated="manual", siblings=info.siblings)
    monkeypatch.setattr(HfApi, "model_info", lambda self, *args, **options: gated)
    assert "gated" in weights_of("somebody/model", "model").finding.says


def test_free_memory_is_that_of_the_machine() -> None:
    where, free = free_memory(None)
    assert where == "CPU"
    assert free > 0


def test_named_sets_lie_below_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("figstep_tiny", "figstep_full", "vlsafe", "xstest-v2", "mm_safetybench", "xs"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CMRM_DATA", str(tmp_path))
    assert place_of("figstep", "tiny") == tmp_path / "figstep_tiny"
    assert place_of("figstep", "full") == tmp_path / "figstep_full"
    assert place_of("vlsafe") == tmp_path / "vlsafe"
    assert place_of("mm-safetybench") == tmp_path / "mm_safetybench"
    assert place_of("xstest") == tmp_path / "xstest-v2"
    assert place_of("siuo") is None
    monkeypatch.setenv("CMRM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="which is no folder"):
        place_of("vlsafe")


def test_a_set_can_have_conditions_of_its_own(checkpoint: str) -> None:
    image = Image.new("RGB", (20, 16))
    two = [Loaded(name, (Sample(f"{name}1", f"How {name}?", image, label="harmful"),)) for name in ("a", "b")]
    held = Plan(checkpoint, tuple(two), ("none",), ("keyword",), set_conditions={"b": (Condition.BLANK,)})
    assert [(loaded.name, str(condition)) for _, loaded, condition in held.cells()] == [
        ("a", "original"), ("a", "query"), ("b", "blank"),
    ]  # fmt: skip
    assert replace(held, anchors=FitData([], [])).cells() == held.cells()
