"""What a recipe may hold; each mistake is one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm.errors import InputError
from cmrm.prompts.conditions import FIVE
from cmrm.reproduce.schema import read_recipe, recipe_path
from reproduce.recipes import TARGET, recipe_file

SHIPPED = Path(__file__).parents[2] / "src" / "cmrm" / "reproduce"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_whole(path: Path) -> None:
    assert recipe_path(path.stem).read_text() == path.read_text(), "the very file is in the wheel"
    paper = read_recipe(path)
    assert paper.conditions == FIVE
    shares = {name: use.anchors for name, use in paper.sets.items() if use.anchors}
    assert shares == {"vlsafe": 0.2, "jailbreak-llms": 0.2, "llava-bench-coco": 0.2}
    targets = {(t.set, t.condition.value, t.defense): t.value for t in paper.targets}
    if path.stem == "paper_llava15_7b":
        assert targets["vlsafe", "original", "none"] == 61.53
        assert targets["vlsafe", "original", "cmrm_dataset@paper"] == 5.41
        assert targets["vlsafe", "original", "cmrm_sample@paper"] == 3.15
        assert paper.model == "llava-hf/llava-1.5-7b-hf"
    demo = paper.for_demo()
    assert demo.targets == (), "the published figures are another model's"
    assert demo.model == "demo"
    assert demo.rater is None
    assert demo.defenses == (
        "cmrm_dataset@paper", "cmrm_dataset@demo", "cmrm_sample@paper", "cmrm_sample@demo",
    )  # fmt: skip
    assert "no figure is the publication's" in demo.notes[0]


def test_recipes_are_found_by_name() -> None:
    with pytest.raises(InputError, match=r"no recipe magic; .*paper_llava15_7b"):
        recipe_path("magic")
    with pytest.raises(InputError, match=r"no recipe|cannot be a recipe's file"):
        recipe_path("x" * 5000)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": "cmrm-recipe/9"}, "its `schema` has to be cmrm-recipe/1"),
        ({"judge": ["keyword"]}, "judge is no part of a recipe"),
        ({"sets": {"vlsafe": {"anchors": 2}}}, "sets.vlsafe.anchors is 2"),
        ({"sets": {"vlsafe": {"anchors": True}}}, "sets.vlsafe.anchors is True"),
        ({"sets": {"vlsafe": {"share": 0.2}}}, "sets.vlsafe.share is no part of a recipe"),
        ({"sets": ["vlsafe"]}, "sets is ['vlsafe']"),
        ({"sets": {}}, "sets is {}"),
        ({"conditions": ["sepia"]}, "conditions.0 is 'sepia'"),
        ({"conditions": ["blur"]}, "they are a list of original, blank"),
        ({"conditions": "original"}, "conditions is 'original'"),
        ({"conditions": []}, "they are a list of"),
        ({"conditions": ["query", "query"]}, "each once"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"model": 5}, "model is 5"),
        ({"rater": ["x"]}, "rater is ['x']"),
        ({"judges": "keyword"}, "judges is 'keyword'"),
        ({"judges": []}, "judges is []"),
        ({"notes": "a note"}, "notes is 'a note'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"targets": [TARGET | {"value": float("nan")}]}, "targets.0.value is nan"),
        ({"targets": [TARGET | {"value": "61.53"}]}, "targets.0.value is '61.53'"),
        ({"targets": [{"set": "vlsafe", "figure": "unsafe"}]}, "targets.0.condition is missing"),
        ({"targets": [TARGET | {"set": "x"}]}, "the set 'x', which is not asked"),
        ({"targets": [TARGET | {"figure": "joy"}]}, "targets.0.figure is 'joy'"),
        ({"targets": [TARGET | {"condition": "sepia"}]}, "targets.0.condition is 'sepia'"),
        ({"targets": [TARGET | {"condition": "blur"}]}, "which the recipe does not run"),
        ({"targets": [TARGET | {"defense": "ecso"}]}, "which the recipe does not run"),
        ({"settings": {"cmrm_dataset@papre": {"alpha": 0.2}}}, "which is not among the defences"),
        ({"settings": {"cmrm_dataset@paper": 3}}, "settings.cmrm_dataset@paper is 3"),
        ({"demo": {"targets": []}}, "demo.targets is no part of a recipe"),
        ({"demo": {"batch_size": 0}}, "demo.batch_size is 0"),
    ],
)
def test_broken_recipes(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        read_recipe(recipe_file(tmp_path, **changes))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("part", ["title", "model", "sets", "conditions", "defenses", "judges"])
def test_a_part_that_is_missing_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(InputError, match=f"the part {part} is missing"):
        read_recipe(recipe_file(tmp_path, without=part, targets=[]))


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(and 2 more\)"):
        read_recipe(recipe_file(tmp_path, model=5, seed="x", dtype="int4"))


@pytest.mark.parametrize(
    "text", ["a: [", "just words", "- 1\n- 2", "\x00", "schema: 2024-13-45", "[" * 5000]
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=r"r\.yaml"):
        read_recipe(tmp_path / "r.yaml")


def test_without_a_demo_section_it_cannot_be_tried(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no section `demo`"):
        read_recipe(recipe_file(tmp_path)).for_demo()


def test_a_demo_section_has_to_fit_the_rest(tmp_path: Path) -> None:
    settings = {"cmrm_dataset@paper": {"alpha": 0.2}}
    path = recipe_file(tmp_path, settings=settings, demo={"defenses": ["ecso"]})
    with pytest.raises(InputError, match="which is not among the defences"):
        read_recipe(path).for_demo()


def test_what_is_left_out_has_the_documented_default(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, sets={"vlsafe": None})
    values = yaml.safe_load(path.read_text())
    del values["max_new_tokens"], values["batch_size"]
    path.write_text(yaml.safe_dump(values))
    recipe = read_recipe(path)
    assert (recipe.max_new_tokens, recipe.batch_size, recipe.seed, recipe.dtype) == (
        128, 16, 0, "auto",
    )  # fmt: skip
    assert (recipe.rater, recipe.sets["vlsafe"].anchors) == (None, 0.0)
