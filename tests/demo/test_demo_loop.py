"""The whole `cmrm demo` on a tiny random model: files, schema, continuation, pixels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import cmrm.demo.vlm as demo_module
from cmrm.demo.levels import dataset_level
from cmrm.demo.loop import Bench, Prompts, run_demo, visual_questions
from cmrm.demo.settings import ALPHAS, DATASET_STEERING, LOWER, QUICK
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.measure.loop import ordered
from cmrm.measure.schema import read_results
from cmrm.measure.store import ReplyStore
from cmrm.model.vlm import load_vlm
from cmrm.prompts.conditions import FIVE, Request
from cmrm.prompts.ours import prompt_samples
from tiny import tiny_model, tiny_processor

SMALL = replace(
    QUICK,
    per_category=1,
    vqa=6,
    sweep_per_category=1,
    geometry_per_category=1,
    max_new_tokens=3,
    batch_size=8,
    anchors_per_category=1,
    mixed=True,
)


DEFENSES = ("cmrm_dataset", "cmrm_dataset@mixed", "cmrm_sample", "cmrm_fill", "cmrm_gated")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model(n_layers=len(LOWER)).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@dataclass
class Demo:
    """`run_demo` on the tiny checkpoint, with a record of what is asked."""

    batches: list[tuple[str, ...]] = field(default_factory=list)
    """Texts of every batch that the engine answered."""
    ticks: list[int] = field(default_factory=list)
    """Numbers of finished prompts."""

    def run(self, out: Path, tick: Callable[[int], None] | None = None) -> dict[str, Any]:
        self.batches.clear()
        self.ticks.clear()
        return run_demo(
            out,
            SMALL,
            say=lambda text: None,
            tick=tick or self.ticks.append,
            start=lambda total: None,
        )


@pytest.fixture(scope="module")
def demo(checkpoint: Path) -> Iterator[Demo]:
    made = Demo()
    answer = TransformersEngine.answer

    def recorded(engine: Any, requests: Sequence[Request], *args: Any, **options: Any) -> Any:
        made.batches.append(tuple(request.text for request in requests))
        return answer(engine, requests, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "demo_checkpoint", lambda: checkpoint)
        patch.setattr(TransformersEngine, "answer", recorded)
        yield made


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted."""

    results: dict[str, Any]
    out: Path
    batches: tuple[tuple[str, ...], ...]
    ticks: tuple[int, ...]


@pytest.fixture(scope="module")
def whole(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "out"
    results = demo.run(out)
    return Whole(results, out, tuple(demo.batches), tuple(demo.ticks))


def cells_of(results: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(c["set"], c["condition"], c["defense"]): c for c in results["cells"]}


def test_results_hold_every_cell(whole: Whole) -> None:
    results = whole.results
    assert read_results(whole.out / "results.json") == results
    assert results["kind"] == "demo"
    cells = cells_of(results)
    assert set(cells) == {
        *(("demo", condition.value, "none") for condition in FIVE),
        *(("demo", "original", name) for name in DEFENSES),
        *(("easy-vqa", "original", name) for name in ("none", *DEFENSES)),
    }
    for (name, condition, _), cell in cells.items():
        judged = cell["judges"]["keyword"]
        assert cell["missing"] == 0
        assert (judged["unsafe"] is not None) is (name == "demo")
        both = name == "demo" and condition in ("original", "query")
        assert (judged["over_refusal"] is not None) is both
        assert (cell["accuracy"] is not None) is (name == "easy-vqa")
    assert [point["alpha"] for point in results["alpha_sweep"]] == list(ALPHAS)
    geometry = results["geometry"]
    shown = {condition.value for condition in FIVE} | set(DEFENSES)
    for figure in ("cosine_to_query", "relative_distance_to_query", "refusal_coordinate"):
        assert set(geometry[figure]) == shown
    assert set(geometry["positions"]) == {"original", *DEFENSES}
    assert set(geometry["gate"]["scores"]) == {"harmful", "benign"}
    assert geometry["gate"]["steers"] == ["cmrm_gated"]
    assert len(results["shift"]["mean_cosine"]) == len(LOWER)


def test_the_share_of_the_gap_has_an_interval(whole: Whole) -> None:
    gaps = whole.results["gaps"]
    assert {gap["defense"] for gap in gaps} == set(DEFENSES)
    for gap in gaps:
        assert {"value", "low", "high", "n"} <= set(gap)


def test_the_settings_are_the_demos_own(whole: Whole) -> None:
    settings = whole.results["settings"]
    assert settings["cmrm_dataset"]["alpha"] == DATASET_STEERING.alpha
    assert settings["cmrm_dataset"]["layers"] == list(LOWER)
    assert settings["budget"]["name"] == "quick"


def test_files_of_a_run(whole: Whole) -> None:
    names = {path.name for path in whole.out.iterdir() if path.suffix != ".png"}
    assert names == {"results.json", "report.html", "table.md", "shift.safetensors", "state"}
    tables = (whole.out / "table.md").read_text()
    assert "| query alone |" in tables
    assert "| defence | " in tables
    assert not list(whole.out.rglob(".*")), "no scratch files are left"
    assert not list(whole.out.rglob("*.partial")), "the checkpoint goes when the artifact is there"


def test_batches_never_mix_labels(whole: Whole) -> None:
    label_of = {
        sample.query: label
        for label in ("harmful", "benign")
        for sample in prompt_samples("test", label)
    }
    for batch in whole.batches:
        labels = {label_of.get(text.split("\n")[-1], "visual") for text in batch}
        assert len(labels) == 1


def test_the_bar_counts_every_prompt(whole: Whole) -> None:
    assert sum(whole.ticks) == Prompts.of(SMALL).passes(SMALL)


def test_same_seed_same_bytes(demo: Demo, whole: Whole, tmp_path: Path) -> None:
    demo.run(tmp_path)
    for name in ("results.json", "shift.safetensors", "report.html", "unsafe_rate.png", "table.md"):
        assert (tmp_path / name).read_bytes() == (whole.out / name).read_bytes()


def test_a_finished_run_measures_nothing_again(demo: Demo, whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "out")
    assert demo.run(tmp_path / "out") == whole.results
    assert demo.batches == []
    assert sum(demo.ticks) == sum(whole.ticks)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_an_interrupted_run_continues_and_measures_nothing_twice(
    demo: Demo, whole: Whole, tmp_path: Path, share: float
) -> None:
    done = 0

    def stop(n: int) -> None:
        nonlocal done
        done += n
        if done > share * sum(whole.ticks):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, tick=stop)
    first = list(demo.batches)
    assert not (tmp_path / "results.json").exists()
    assert demo.run(tmp_path) == whole.results
    assert Counter([*first, *demo.batches]) == Counter(whole.batches)


CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
import cmrm.demo.vlm as demo_module
from cmrm.demo.loop import run_demo
from cmrm.demo.settings import QUICK
checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
demo_module.demo_checkpoint = lambda: checkpoint
small = replace(
    QUICK, per_category=1, vqa=6, sweep_per_category=1, geometry_per_category=1, max_new_tokens=3,
    batch_size=8,
    anchors_per_category=1,
    mixed=True,
)
run_demo(
    out, small, say=lambda text: None, tick=lambda n: print(n, flush=True), start=lambda total: None
)
"""


def test_kill_9_in_the_middle_loses_nothing(
    demo: Demo, whole: Whole, checkpoint: Path, tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(checkpoint), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    done = 0
    for line in child.stdout:
        done += int(line)
        if done > 260:
            child.kill()
            break
    child.wait()
    assert done > 260
    assert not (tmp_path / "results.json").exists()
    assert len(ReplyStore(tmp_path / "state" / "replies.db")) > 0
    assert demo.run(tmp_path) == whole.results
    assert len(demo.batches) < len(whole.batches)


def test_a_damaged_state_is_measured_again(demo: Demo, whole: Whole, tmp_path: Path) -> None:
    state = tmp_path / "out" / "state"
    shutil.copytree(whole.out, tmp_path / "out")
    (state / "geometry.json").write_text('{"key": 1')
    artifact = state / "shift.safetensors"
    artifact.write_bytes(artifact.read_bytes()[:-40])
    assert demo.run(tmp_path / "out") == whole.results


def test_a_finished_run_keeps_its_results_when_the_report_fails(
    demo: Demo, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(results: Any, out: Path) -> Path:
        raise InputError("no report")

    shutil.copytree(whole.out, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setattr("cmrm.report.page.write_report", fail)
    with pytest.raises(InputError, match="no report"):
        demo.run(tmp_path / "out")
    assert read_results(tmp_path / "out" / "results.json") == whole.results


def test_an_unwritable_folder_is_refused(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="--out"):
        demo.run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_the_images_are_processed_by_pil(
    demo: Demo, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torchvision installed, transformers takes other pixels unless it is told not to."""
    processors: list[str] = []

    def recorded(*args: Any, **options: Any) -> Any:
        vlm = load_vlm(*args, **options)
        processors.append(type(vlm.processor.image_processor).__name__)
        return vlm

    shutil.copytree(whole.out, tmp_path / "out")
    monkeypatch.setattr("cmrm.demo.loop.load_vlm", recorded)
    demo.run(tmp_path / "out")
    assert [name.endswith("Pil") for name in processors] == [True]


def test_visual_questions_are_in_the_order_of_their_numbers() -> None:
    by_length: dict[int, list[int]] = {}
    for sample in ordered(visual_questions("test", 400)):
        by_length.setdefault(len(sample.query), []).append(int(sample.id.split("-")[1]))
    assert all(numbers == sorted(numbers) for numbers in by_length.values())


def test_replies_are_bound_to_the_setting(demo: Demo, checkpoint: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(load_vlm(checkpoint))
    bench = Bench(engine, SMALL, ReplyStore(tmp_path / "replies.db"))
    samples = prompt_samples("test", "harmful", per_category=1)
    shift = engine.estimate_shift(prompt_samples("anchor", "harmful")[:4])
    demo.batches.clear()
    for alpha in (0.1, 0.2, 0.1):
        bench.cell(samples, dataset_level(shift, replace(DATASET_STEERING, alpha=alpha)))
    assert Counter(demo.batches) == Counter(dict.fromkeys(demo.batches, 2))
