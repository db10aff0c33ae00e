"""Diagnosis of the tiny model: cells, shift, corruptions, steering, judges, refusals."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cmrm import Sample, ShiftVectors, Steering, estimate_shift
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import ArtifactError, InputError
from cmrm.judges import Verdict
from cmrm.measure import diagnose as module
from cmrm.measure.diagnose import corruptions_named, diagnose, passes, possible_conditions
from cmrm.measure.store import ReplyStore
from cmrm.model.vlm import VLM, wrap_vlm
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import CORRUPTED, Condition
from tiny import tiny_model


@pytest.fixture(scope="module")
def engine(vlm: VLM) -> TransformersEngine:
    return TransformersEngine(vlm)


@pytest.fixture(scope="module")
def shift(vlm: VLM, anchors: list[Sample]) -> ShiftVectors:
    return estimate_shift(vlm, anchors, recommended=Steering(alpha=0.5))


@pytest.fixture(scope="module")
def loaded(anchors: list[Sample]) -> Loaded:
    labels = ("harmful", "benign")
    samples = tuple(replace(s, label=labels[k % 2]) for k, s in enumerate(anchors))
    return Loaded("colours", samples, harm="text")


def measured(engine: TransformersEngine, loaded: Loaded, **options: Any) -> dict[str, Any]:
    return diagnose(engine, loaded, max_new_tokens=2, batch_size=4, **options)


def keys(results: dict[str, Any]) -> set[tuple[str, str]]:
    return {(cell["condition"], cell["defense"]) for cell in results["cells"]}


def test_a_cell_for_each_of_the_five_conditions(engine: TransformersEngine, loaded: Loaded) -> None:
    results = measured(engine, loaded)
    assert results["kind"] == "diagnosis"
    assert keys(results) == {
        (name, "none") for name in ("original", "blank", "noise", "caption", "query")
    }
    for cell in results["cells"]:
        judged = cell["judges"]["small"]
        assert judged["unsafe"]["n"] + judged["unsafe"]["unscored"] == 3
        assert judged["over_refusal"]["n"] + judged["over_refusal"]["unscored"] == 3
    geometry = results["geometry"]
    assert geometry["relative_distance_to_query"]["query"] == [0.0] * 3
    assert geometry["corruptions"] is None


def test_the_steered_row_closes_a_share_of_the_gap(
    engine: TransformersEngine, loaded: Loaded, shift: ShiftVectors
) -> None:
    results = measured(engine, loaded, shift=shift)
    assert ("original", "cmrm_dataset") in keys(results)
    assert [gap["defense"] for gap in results["gaps"]] == ["cmrm_dataset"]
    assert results["settings"]["steering"]["alpha"] == 0.5
    assert results["shift"]["n_anchors"] == 6
    other = measured(engine, loaded, shift=shift, steering=Steering(alpha=0.1))
    assert other["settings"]["steering"]["alpha"] == 0.1


def test_corruptions_are_compared_with_blank(engine: TransformersEngine, loaded: Loaded) -> None:
    results = measured(engine, loaded, corruptions=corruptions_named("all"))
    compared = results["geometry"]["corruptions"]
    assert set(compared) == {condition.value for condition in CORRUPTED}
    assert compared["blank"]["cosine"] == pytest.approx([1.0] * 3)
    assert compared["black"]["norm_ratio"] != pytest.approx([1.0] * 3)


def test_samples_with_answers_have_an_accuracy(
    engine: TransformersEngine, anchors: list[Sample]
) -> None:
    samples = tuple(replace(sample, answer="red") for sample in anchors[:2])
    results = measured(engine, Loaded("questions", samples))
    assert {cell["accuracy"]["n"] for cell in results["cells"]} == {2}


def test_conditions_that_are_not_possible_are_named(engine: TransformersEngine) -> None:
    samples = tuple(Sample(str(k), f"question {k}", label="harmful") for k in range(2))
    results = measured(engine, Loaded("texts", samples))
    assert keys(results) == {("query", "none")}
    assert results["left_out"]["original"] == "2 of 2 samples have no image"
    assert possible_conditions(samples)[0] == [Condition.QUERY]


def test_every_judge_is_asked(engine: TransformersEngine, loaded: Loaded) -> None:
    class Refusing:
        name = "refusing"

        def judge(self, request: str, reply: str) -> Verdict:
            return Verdict.REFUSED

    class Broken:
        name = "broken"

        def judge(self, request: str, reply: str) -> Verdict:
            raise OSError("no answer")

    judges: dict[str, Any] = {"refusing": Refusing(), "broken": Broken()}
    results = measured(engine, loaded, judges=judges)
    judged = results["cells"][0]["judges"]
    assert judged["refusing"]["unsafe"]["rate"] == 0
    assert (judged["broken"]["unsafe"]["rate"], judged["broken"]["unsafe"]["unscored"]) == (None, 3)
    assert judged["broken"]["unsafe"]["highest"] == 1
    assert results["judge_failures"]["broken"]["n"] == 5 * 6


def test_a_judge_that_sees_images_sees_what_the_model_saw(
    engine: TransformersEngine, loaded: Loaded
) -> None:
    seen: dict[int, int] = {}

    class Seeing:
        name = "seeing"
        sees_images = True

        def judge(self, request: str, reply: str, images: Sequence[Any] = ()) -> Verdict:
            seen[len(images)] = seen.get(len(images), 0) + 1
            return Verdict.REFUSED

    judges: dict[str, Any] = {"seeing": Seeing()}
    measured(engine, loaded, judges=judges)
    assert seen == {1: 3 * 6, 0: 2 * 6}


def test_the_model_may_be_named(engine: TransformersEngine, loaded: Loaded) -> None:
    assert measured(engine, loaded, name="mine")["model"]["id"] == "mine"


def test_unlabelled_samples_are_noted(engine: TransformersEngine, loaded: Loaded) -> None:
    mixed = replace(loaded, samples=(*loaded.samples, Sample("x", "no label at all")))
    notes = measured(engine, mixed)["sets"][0]["notes"]
    assert "1 of 7 samples are labelled neither harmful nor benign" in notes[0]


def test_a_stored_reply_is_not_generated_again(
    engine: TransformersEngine, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReplyStore(tmp_path / "replies.db")
    results = measured(engine, loaded, store=store)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a reply was generated again")

    monkeypatch.setattr(engine, "answer", never)
    assert measured(engine, loaded, store=store) == results


def test_the_bar_counts_every_prompt(
    engine: TransformersEngine, loaded: Loaded, shift: ShiftVectors
) -> None:
    ticks: list[int] = []
    measured(engine, loaded, shift=shift, corruptions=[Condition.BLUR], tick=ticks.append)
    assert sum(ticks) == passes(loaded, [Condition.BLUR], steered=True)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([Sample("a", "x"), Sample("b", "y")], "no sample is labelled harmful or benign"),
        ([Sample("a", "x", label="harmful")], "at least 2"),
    ],
)
def test_sets_without_a_rate_are_refused_before_anything_is_generated(
    engine: TransformersEngine,
    samples: Sequence[Sample],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a reply was generated")

    monkeypatch.setattr(engine, "answer", never)
    with pytest.raises(InputError, match=words):
        measured(engine, Loaded("few", tuple(samples)))


def test_corruptions_and_steering_need_images(
    engine: TransformersEngine, shift: ShiftVectors
) -> None:
    texts = Loaded("texts", tuple(Sample(str(k), f"q {k}", label="harmful") for k in range(2)))
    for options in ({"corruptions": [Condition.BLUR]}, {"shift": shift}):
        with pytest.raises(InputError, match="are about images"):
            measured(engine, texts, **options)


def test_vectors_of_another_model_are_refused(
    loaded: Loaded, shift: ShiftVectors, processor: object
) -> None:
    other = TransformersEngine(wrap_vlm(tiny_model(width=64), processor))
    with pytest.raises(ArtifactError, match="does not fit"):
        measured(other, loaded, shift=shift)


def test_names_of_corruptions() -> None:
    assert corruptions_named(None) == []
    assert corruptions_named("blur, black") == [Condition.BLUR, Condition.BLACK]
    with pytest.raises(InputError, match="unknown corruption sepia"):
        corruptions_named("blur,sepia")


def test_there_is_no_second_measuring_loop() -> None:
    assert "engine.answer" not in inspect.getsource(module)
    assert "generate(" not in inspect.getsource(module)
