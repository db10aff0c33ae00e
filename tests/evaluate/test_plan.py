"""What a plan takes and refuses, before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cmrm import Sample
from cmrm.defenses import FitData, defense_names
from cmrm.errors import InputError
from cmrm.evaluate.plan import expanded_defenses
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Condition
from evaluate.plans import anchors, picture, small_plan, small_set

NOWHERE = "no/such-model"


def unlabelled(label: str | None) -> Loaded:
    return Loaded("odd", (Sample("a", "How?", picture("red"), label=label),))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"defenses": ("magic",)}, "unknown defence"),
        ({"judges": ("oracle",)}, "unknown judge"),
        ({"judges": ()}, "at least one judge"),
        ({"rater": "keyword"}, "rates no answers"),
        ({"sets": ()}, "name at least one"),
        ({"sets": (small_set(), small_set())}, "each once"),
        ({"conditions": (Condition.QUERY, Condition.QUERY)}, "name each once"),
        ({"anchors": FitData(small_set().samples[:2], ())}, "are asked in the test sets too"),
        (
            {"anchors": FitData([Sample("a", "How?"), Sample("b", "Why?")], [])},
            "2 anchors have no image, which 'cmrm_dataset' is fitted on",
        ),
        ({"settings": {"none": {"alpha": 1}}}, "'none' does not take these settings"),
        ({"settings": {"cmrm_dataset": 3}}, "expected a mapping"),
        ({"batch_size": 0}, "batch_size is 0; it is at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it is at least 1"),
        ({"sets": (unlabelled(None),)}, "no sample is labelled harmful or benign"),
        ({"sets": (unlabelled("dangerous"),)}, "the labels are dangerous"),
    ],
)
def test_what_a_plan_refuses(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        small_plan(NOWHERE, **changes)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_list_of_defences() -> None:
    assert expanded_defenses("all") == tuple(defense_names())
    assert expanded_defenses("ecso, all")[0] == "ecso"
    variants = ("cmrm_dataset@demo", "cmrm_sample@demo")
    assert expanded_defenses("all", variants) == (*defense_names(), *variants)
    assert expanded_defenses("none", variants) == ("none",)


def test_a_set_can_have_conditions_of_its_own() -> None:
    image = picture("red")
    sets = tuple(
        Loaded(name, (Sample(f"{name}1", f"How {name}?", image, label="harmful"),))
        for name in ("a", "b")
    )
    plan = small_plan(NOWHERE, sets=sets, defenses=(), set_conditions={"b": (Condition.BLANK,)})
    assert [(loaded.name, condition.value) for _, loaded, condition in plan.cells()] == [
        ("a", "original"), ("a", "query"), ("b", "blank"),
    ]  # fmt: skip
    assert replace(plan, anchors=None).cells() == plan.cells()


def test_settings_of_a_plan_are_those_of_the_sources_whatever_the_model() -> None:
    names = ("cmrm_dataset", "cmrm_sample", "ecso")
    plans = [small_plan(model, defenses=names, anchors=anchors()) for model in (NOWHERE, "demo")]
    first, demo = ({n: plan.defense(n).settings for n in names} for plan in plans)
    assert first == demo
    assert demo["cmrm_dataset"]["alpha"] == demo["cmrm_sample"]["alpha"] == 1.0
    assert demo["cmrm_dataset"]["layers"] is None


@pytest.mark.parametrize("library", ["inspect_ai", "scipy"])
def test_without_its_extra_evaluation_says_so_in_one_line(library: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from cmrm.errors import MissingExtraError\n"
        "try:\n    import cmrm.evaluate.run\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert library in done.stdout, done.stderr[-400:]
    assert "pip install 'cmrm[eval]'" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def test_nothing_of_evaluation_or_recipes_needs_the_demo() -> None:
    code = (
        "import sys, cmrm.evaluate.run, cmrm.evaluate.preflight, cmrm.reproduce.plan, "
        "cmrm.reproduce.comparison\n"
        "assert not [name for name in sys.modules if name.startswith('cmrm.demo')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
