"""A run from end to end: its figures, what stops it, and what it loses when it is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from inspect_ai.log import list_eval_logs, read_eval_log

from cmrm import Sample, generate
from cmrm.defenses import FitData, make_defense, respond
from cmrm.engines.base import Decoding, Engine
from cmrm.errors import InputError
from cmrm.evaluate import run as run_module
from cmrm.evaluate.logs import read_cells
from cmrm.evaluate.provider import shared_engine
from cmrm.evaluate.run import evaluate
from cmrm.judges import make_judge
from cmrm.judges.endpoint import EndpointJudge
from cmrm.measure import loop
from cmrm.measure.fluency import FluencyStore
from cmrm.measure.schema import read_results
from cmrm.measure.store import ReplyStore
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Condition, Request
from evaluate.plans import picture, quiet, small_plan, small_set
from tiny import vlm_of

pytestmark = pytest.mark.usefixtures("no_models_left")
UNTOUCHED: dict[str, Any] = {"defenses": (), "conditions": (Condition.ORIGINAL,)}


def test_a_run_end_to_end(checkpoint: str, tmp_path: Path) -> None:
    stack = "adashield_s+cmrm_dataset"
    plan = small_plan(checkpoint, defenses=("cmrm_dataset", stack))
    results = evaluate(plan, tmp_path, say=quiet)
    cells = {(cell["defense"], cell["condition"]): cell for cell in results["cells"]}
    assert list(cells) == [
        ("none", "original"), ("none", "query"), (stack, "original"), ("cmrm_dataset", "original"),
    ]  # fmt: skip
    for cell in cells.values():
        assert (cell["done"], cell["missing"]) == (9, 0)
        unsafe = cell["judges"]["keyword"]["unsafe"]
        assert unsafe["n"] + unsafe["unscored"] == 5
        assert cell["accuracy"]["n"] == 1
        categories = cell["judges"]["ensemble"]["categories"]
        assert sum(sum(counts.values()) for counts in categories.values()) == 5
        benign = cell["judges"]["keyword"]["over_refusal"]
        answered = cell["perplexity"]["n"] if cell["perplexity"] else 0
        assert answered <= benign["n"] + benign["unscored"] == 3
    assert read_results(tmp_path / "results.json") == results
    assert {row["defense"] for row in results["comparisons"]} <= {"cmrm_dataset", stack}
    assert all(row["p_holm"] >= row["p_value"] for row in results["comparisons"])
    assert results["cost"]["none"]["prefills"] == 1
    assert results["cost"]["cmrm_dataset"]["state_bytes"] > 0
    assert [row["defense"] for row in results["outcomes"]] == ["none", stack, "cmrm_dataset"]


def test_replies_are_those_of_plain_generation(checkpoint: str, tmp_path: Path) -> None:
    evaluate(small_plan(checkpoint, **UNTOUCHED), tmp_path, say=quiet)
    cell = read_cells(tmp_path / "logs")[0]
    engine = shared_engine(checkpoint)
    plain = generate(vlm_of(engine), list(small_set().samples), max_new_tokens=5, batch_size=1)
    replies = {outcome.sample_id: outcome.reply for outcome in cell.outcomes.values()}
    assert replies == {generation.sample_id: generation.text for generation in plain}
    log = read_eval_log(list_eval_logs(str(tmp_path / "logs" / "none"))[0])
    assert log.results is not None
    shown = {score.name: score.metrics for score in log.results.scores}
    unsafe = [metric.value for metric in shown["cmrm_judge_keyword"].values()]
    assert 1.0 in unsafe, "Inspect's viewer shows the unsafe rate of a model that refuses nothing"


def test_a_failing_batch_is_missing_and_never_safe(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(engine: Engine, defense: Any, requests: list[Request], *more: Any, **o: Any) -> Any:
        if any("paint blue" in request.text for request in requests):
            raise RuntimeError("the device is lost")
        return respond(engine, defense, requests, *more, **o)

    plan = small_plan(checkpoint, **UNTOUCHED)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "respond", broken)
        results = evaluate(plan, tmp_path, say=quiet)
    cell = results["cells"][0]
    assert 1 <= cell["missing"] <= 2
    assert cell["done"] == 9 - cell["missing"]
    assert results["failures"]
    again = evaluate(plan, tmp_path, say=quiet)
    assert again["cells"][0]["missing"] == 0
    assert not again["failures"]


def test_a_folder_is_bound_to_one_run(checkpoint: str, tmp_path: Path) -> None:
    evaluate(small_plan(checkpoint, **UNTOUCHED), tmp_path, say=quiet)
    first = small_set()
    fewer = Loaded("mine", first.samples[1:])
    relabelled = Loaded("mine", (Sample("h9", "How?", picture("red"), label="harmful"),))
    for changes, part in (
        ({"max_new_tokens": 6}, "max_new_tokens"),
        ({"sets": (fewer,)}, "mine"),
        ({"sets": (relabelled,)}, "mine"),
    ):
        with pytest.raises(InputError, match=rf"holds another run \({part} differ"):
            evaluate(small_plan(checkpoint, **UNTOUCHED | changes), tmp_path, say=quiet)
    more = small_plan(checkpoint, **UNTOUCHED | {"sets": (first, small_set("other"))})
    with pytest.raises(InputError, match="anchors are asked"):
        small_plan(checkpoint, anchors=FitData(first.samples[:2], ()))
    assert len(evaluate(more, tmp_path, say=quiet)["cells"]) == 2, "further sets are welcome"


def test_labels_belong_to_what_a_folder_is_bound_to(checkpoint: str, tmp_path: Path) -> None:
    sample = Sample("s", "How?", picture("red"), label="harmful")
    evaluate(
        small_plan(checkpoint, **UNTOUCHED | {"sets": (Loaded("a", (sample,)),)}),
        tmp_path,
        say=quiet,
    )
    benign = Loaded("a", (Sample("s", "How?", picture("red"), label="benign"),))
    with pytest.raises(InputError, match=r"holds another run \(a differ"):
        evaluate(small_plan(checkpoint, **UNTOUCHED | {"sets": (benign,)}), tmp_path, say=quiet)


@pytest.mark.parametrize("change", ["weights", "template", "generation"])
def test_another_model_under_the_same_name_is_refused(
    checkpoint: str, tmp_path: Path, change: str
) -> None:
    plan = small_plan(checkpoint, **UNTOUCHED)
    evaluate(plan, tmp_path, say=quiet)
    vlm = vlm_of(shared_engine(checkpoint))
    if change == "weights":
        with torch.no_grad():
            next(vlm.model.parameters()).data.add_(1.0)
    elif change == "template":
        vlm.processor.chat_template = vlm.processor.chat_template + " "
    else:
        vlm.model.generation_config.repetition_penalty = 1.5
    part = "generation settings" if change == "generation" else "weights, config"
    with pytest.raises(InputError, match=rf"holds another run .*{part}"):
        evaluate(plan, tmp_path, say=quiet)


def test_a_damaged_plan_is_not_taken_for_a_free_folder(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan\.json is damaged"):
        evaluate(small_plan(checkpoint, **UNTOUCHED), tmp_path, say=quiet)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"defenses": ("cmrm_sample",), "settings": {"cmrm_sample": {"layers": [99]}}},
            "out of range",
        ),
        ({"anchors": None}, "has to be fitted: name its anchors"),
    ],
)
def test_a_run_that_could_not_start_leaves_its_folder_free(
    checkpoint: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(small_plan(checkpoint, **changes), tmp_path, say=quiet)
    assert not (tmp_path / "plan.json").exists()
    assert not (tmp_path / "logs").exists()


def test_results_are_written_before_fluency_and_before_cost(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    def out_of_memory(stage: str) -> Any:
        def fail(*arguments: object, **options: object) -> None:
            rates = read_results(tmp_path / "results.json")["cells"]
            seen.append((stage, bool(rates)))
            raise torch.OutOfMemoryError("CUDA out of memory")

        return fail

    monkeypatch.setattr(FluencyStore, "measure", out_of_memory("fluency"))
    monkeypatch.setattr(run_module, "cost_of", out_of_memory("cost"))
    results = evaluate(small_plan(checkpoint, **UNTOUCHED), tmp_path, say=quiet)
    assert seen == [("fluency", True), ("cost", True)]
    assert [failure.split(" was not")[0] for failure in results["failures"]] == [
        "perplexity", "the cost of none",
    ]  # fmt: skip
    assert read_results(tmp_path / "results.json") == results


def test_a_killed_run_keeps_the_results_that_it_had(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FluencyStore, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small_plan(checkpoint, **UNTOUCHED), tmp_path, say=quiet)
    assert read_results(tmp_path / "results.json")["cells"][0]["done"] == 9


def test_open_answers_are_rated_or_unscored(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        Sample(
            f"o{k}", f"What is this{'?' * k}", picture("red"), answer="A red square.",
            match="judge", context="red square",
        )
        for k in (1, 2, 3)
    ]  # fmt: skip
    ratings = {1: (8.0, 4.0), 2: None, 3: (8.0, 8.0)}
    seen = []

    def rate(
        self: Any, question: str, context: str, reference: str, reply: str
    ) -> tuple[float, float] | None:
        seen.append((context, reference))
        return ratings[question.count("?")]

    monkeypatch.setattr(EndpointJudge, "rate", rate)
    rater = "openai:m@http://localhost:1/v1"
    plan = small_plan(checkpoint, sets=(Loaded("bench", tuple(samples)),), defenses=(), rater=rater)
    cell = evaluate(plan, tmp_path / "out", say=quiet)["cells"][0]
    rating = cell["rating"]
    assert (rating["value"], rating["n"], rating["unscored"]) == (75.0, 2, 1)
    assert set(seen) == {("red square", "A red square.")}
    assert cell["accuracy"] is None


def test_a_run_and_the_loop_share_their_replies(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspect is a way into `measure.loop`: same batches, same keys, same outcomes."""
    evaluate(small_plan(checkpoint, **UNTOUCHED), tmp_path, say=quiet)
    store = ReplyStore(tmp_path / "replies.db")
    assert len(store) == 9

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a stored reply was generated again")

    monkeypatch.setattr(loop, "respond", never)
    engine, options = shared_engine(checkpoint), Decoding(max_new_tokens=5)
    answering = loop.Answering(engine, make_defense("none"), options, store)
    judges = {name: make_judge(name) for name in ("keyword", "ensemble")}
    cell = loop.measure_cell(answering, small_set().samples, judges, name="mine", batch_size=2)
    (logged,) = read_cells(tmp_path / "logs")
    assert logged == cell


def test_no_cell_can_be_asked(checkpoint: str, tmp_path: Path) -> None:
    blind = Loaded("text", (Sample("s", "How?", label="harmful"),))
    plan = small_plan(checkpoint, **UNTOUCHED | {"sets": (blind,)})
    with pytest.raises(InputError, match="nothing can be asked"):
        evaluate(plan, tmp_path, say=quiet)
