"""The run that a recipe describes, and the published figures beside the run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm.cli.runs import demo_variants
from cmrm.errors import InputError
from cmrm.prompts.text import normalised
from cmrm.reproduce.comparison import compared, published, with_comparison
from cmrm.reproduce.plan import plan_of
from cmrm.reproduce.schema import read_recipe, recipe_path
from reproduce.recipes import recipe_file, vlsafe


def test_anchors_are_drawn_by_content_and_never_asked(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_file(tmp_path))
    places = {"vlsafe": vlsafe(tmp_path / "v")}
    plan, troubles = plan_of(recipe, places=places, partial=True)
    assert plan is not None
    assert not troubles
    assert plan.anchors is not None
    asked = {sample.query for loaded in plan.sets for sample in loaded.samples}
    assert not asked & {sample.query for sample in plan.anchors.all}
    assert len(plan.anchors.harmful) + len(plan.sets[0].samples) == 20
    assert plan.anchors.more, "samples that are neither harmful nor benign count for the shift"
    assert plan.anchors.shifted == (*plan.anchors.harmful, *plan.anchors.more)
    again, _ = plan_of(recipe, places=places, partial=True)
    assert again == plan
    few, _ = plan_of(recipe, places=places, partial=True, limit=2)
    assert few is not None
    assert few.anchors is not None
    sizes = [len(loaded.samples) for loaded in few.sets]
    assert sizes == [2, min(2, len(plan.sets[1].samples))]
    assert len(few.anchors.harmful) == 2
    drawn = {sample.id for sample in few.anchors.harmful}
    assert drawn <= {sample.id for sample in plan.anchors.harmful}


def test_requests_that_ask_the_same_stand_on_one_side(tmp_path: Path) -> None:
    """LLaVA-Bench asks "Describe the following image." of several images."""
    folder = tmp_path / "many"
    folder.mkdir()
    Image.new("RGB", (24, 20), "red").save(folder / "red.png")
    queries = ["Describe it." if k % 2 else f"What is {k}?" for k in range(30)]
    queries[1], queries[3] = "describe  IT.", " Describe it. "
    lines = [f"q{k},{query},{folder / 'red.png'},red" for k, query in enumerate(queries)]
    (folder / "asked.csv").write_text("\n".join(["id,query,image,answer", *lines]) + "\n")
    sets = {str(folder / "asked.csv"): {"anchors": 0.4}}
    plan, _ = plan_of(read_recipe(recipe_file(tmp_path, sets=sets, targets=[])))
    assert plan is not None
    assert plan.anchors is not None
    asked = [normalised(sample.query) for sample in plan.sets[0].samples]
    anchors = [normalised(sample.query) for sample in plan.anchors.all]
    assert len(asked) + len(anchors) == 30
    assert not set(asked) & set(anchors)


def test_a_template_over_many_images_is_split_by_its_images(tmp_path: Path) -> None:
    """FigStep's samples share one text; what they ask is in the image."""
    folder = tmp_path / "typographic"
    folder.mkdir()
    lines = []
    for k in range(30):
        Image.new("RGB", (24, 20), (8 * k, 90, 30)).save(folder / f"{k}.png")
        lines.append(f"f{k},Fill the list.,{folder / f'{k}.png'},harmful")
    (folder / "set.csv").write_text("\n".join(["id,query,image,label", *lines]) + "\n")
    sets = {str(folder / "set.csv"): {"anchors": 0.4}}
    plan, _ = plan_of(read_recipe(recipe_file(tmp_path, sets=sets, targets=[])))
    assert plan is not None
    assert plan.anchors is not None
    assert 4 <= len(plan.anchors.harmful) <= 20, "neither all nor none"
    assert len(plan.anchors.harmful) + len(plan.sets[0].samples) == 30


def test_a_set_from_which_no_rate_can_come_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text("query,label\nHow?,dangerous\n")
    recipe = read_recipe(recipe_file(tmp_path, sets={str(path): {}}, targets=[]))
    with pytest.raises(InputError, match="no sample is labelled harmful or benign"):
        plan_of(recipe)


def test_the_demos_variants_are_settings_of_the_run_alone() -> None:
    demo = read_recipe(recipe_path("paper_llava15_7b")).for_demo()
    with pytest.raises(InputError, match="'cmrm_dataset@demo' has no settings"):
        plan_of(demo, limit=2)
    plan, troubles = plan_of(demo, limit=2, variants=demo_variants("demo"))
    assert not troubles
    assert plan is not None
    assert plan.anchors is not None
    assert len(plan.anchors.harmful) + len(plan.anchors.benign) == 2
    assert plan.defense("cmrm_dataset@demo").settings["alpha"] != 1.0
    assert plan.defense("cmrm_dataset@paper").settings["alpha"] == 1.0


def test_without_a_model_or_anything_to_ask_there_is_no_plan(tmp_path: Path) -> None:
    anchors_alone = recipe_file(tmp_path, sets={"cmrm-anchor": {"anchors": 1.0}}, targets=[])
    assert plan_of(read_recipe(anchors_alone), limit=2) == (None, [])
    recipe = read_recipe(recipe_file(tmp_path, sets={"cmrm-test": {}}, targets=[], model=None))
    assert plan_of(recipe, limit=2)[0] is None
    named, _ = plan_of(recipe, limit=2, model="some/model", model_options={"device_map": "cpu"})
    assert named is not None
    assert named.model_options == {"dtype": "auto", "device_map": "cpu"}
    assert replace(named).replies() > 0


RATE: dict[str, Any] = {"rate": 0.5, "low": 0.4, "high": 0.6, "n": 80, "unscored": 1}
CELL: dict[str, Any] = {
    "set": "vlsafe", "condition": "original", "defense": "none", "accuracy": None,
    "judges": {"keyword": {"unsafe": RATE}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "cells", "judges", "expected"),
    [
        (None, [CELL], ["keyword"], ("keyword", 50.0, 40.0, 60.0, False)),
        (
            {**RATE, "rate": 1.0, "high": 1.0},
            [CELL],
            ["keyword", "theirs"],
            ("theirs", 100.0, 40.0, 100.0, True),
        ),
        (None, [], ["keyword"], ("keyword", None, None, None, None)),
        ({**RATE, "rate": None}, [CELL], ["theirs"], ("theirs", None, None, None, None)),
        (None, [CELL], [], (None, None, None, None, None)),
    ],
)
def test_published_figures_stand_beside_those_of_the_judge_that_judged(
    tmp_path: Path,
    theirs: dict[str, Any] | None,
    cells: list[dict[str, Any]],
    judges: list[str],
    expected: tuple[Any, ...],
) -> None:
    recipe = read_recipe(recipe_file(tmp_path, judges=["theirs", "keyword"]))
    if theirs is not None:
        rates = {**CELL["judges"], "theirs": {"unsafe": theirs}}
        cells = [{**cell, "judges": rates} for cell in cells]
    row = compared(published(recipe), {"cells": cells, "judges": judges})
    target = row["targets"][0]
    figures = (target["measured"], target["low"], target["high"], target["inside"])
    assert (row["judge"], *figures) == expected
    assert target["published"] == 100.0


def test_ratings_and_accuracies_are_compared_too(tmp_path: Path) -> None:
    base = {"set": "vlsafe", "condition": "original", "defense": "none"}
    targets = [
        {**base, "figure": "rating", "value": 79.2}, {**base, "figure": "accuracy", "value": 10.0},
    ]  # fmt: skip
    recipe = read_recipe(recipe_file(tmp_path, targets=targets))
    rating = {"value": 79.0, "low": 75.0, "high": 80.0, "n": 9, "unscored": 0}
    cell = {**CELL, "rating": rating, "accuracy": RATE}
    rows = compared(published(recipe), {"cells": [cell], "judges": ["keyword"]})["targets"]
    assert [(row["measured"], row["n"], row["inside"]) for row in rows] == [
        (79.0, 9, True), (50.0, 80, False),
    ]  # fmt: skip


def test_results_without_a_recipe_are_left_as_they_are() -> None:
    results: dict[str, Any] = {"recipe": None, "cells": [], "judges": []}
    assert with_comparison(results) == results
