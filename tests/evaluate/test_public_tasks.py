"""Public Inspect tasks, not written here, on the defended demo VLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")
pytest.importorskip("inspect_evals", reason="the public tasks are inspect_evals' (extra `dev`)")

import pandas as pd
from inspect_ai import eval
from inspect_ai.log import read_eval_log
from inspect_ai.model import get_model

from cmrm import estimate_shift
from cmrm.evaluate.provider import shared_engine
from cmrm.prompts.easy_vqa import vqa_samples
from cmrm.prompts.ours import prompt_samples
from cmrm.prompts.sample import open_images
from tiny import vlm_of

pytestmark = pytest.mark.demo
XSTEST = Path(__file__).parents[3] / "shared/data/xstest/prompts.csv"


@pytest.fixture(scope="module")
def shift(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of a few anchors of the demo VLM."""
    anchors = prompt_samples("anchor", "harmful")[:16]
    vectors = estimate_shift(vlm_of(shared_engine("demo")), anchors, batch_size=8)
    return vectors.save(tmp_path_factory.mktemp("shift") / "shift.safetensors")


def mmmu_rows() -> list[dict[str, Any]]:
    """Questions of easy-VQA in MMMU's columns, since MMMU itself is not at hand."""
    pairs = [(s, a) for s, a in vqa_samples("test", n=60) if a in {"yes", "no"}][:6]
    assert len(pairs) == 6
    rows: list[dict[str, Any]] = []
    for k, (sample, answer) in enumerate(pairs):
        options = ["yes", "no"] if k % 2 else ["no", "yes"]
        rows.append({
            "id": f"validation_Shapes_{k}", "question": sample.query, "options": str(options),
            "image_1": open_images(sample)[0], "question_type": "multiple-choice",
            "answer": "AB"[options.index(answer)], "explanation": "", "subfield": "",
            "img_type": "", "topic_difficulty": "", **{f"image_{n}": None for n in range(2, 8)},
        })  # fmt: skip
    return rows


def test_mmmu_of_inspect_evals(
    shift: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts, solver and scorer."""
    datasets = pytest.importorskip("datasets")
    from inspect_evals.mmmu import mmmu, utils

    monkeypatch.setattr(utils, "INSPECT_EVALS_CACHE_PATH", tmp_path / "cache")
    task = mmmu.mmmu_task_multiple_choice(datasets.Dataset.from_list(mmmu_rows()))
    completions = []
    steered: dict[str, Any] = {"defense": "cmrm_dataset", "shift": str(shift), "alpha": 20.0}
    for arguments in ({}, steered):
        model = get_model("cmrm/demo", memoize=False, batch_size=6, **arguments)
        logs = str(tmp_path / "logs")
        log = eval(task, model=model, log_dir=logs, display="none", max_tokens=12)[0]
        assert log.status == "success", log.error
        assert log.samples is not None
        assert log.results is not None
        assert log.results.scores[0].metrics["accuracy"].value is not None
        samples = sorted(log.samples, key=lambda sample: str(sample.id))
        completions.append([sample.output.completion for sample in samples])
        assert len(samples) == 6
    assert all(completions[0])
    assert completions[0] != completions[1], "so strong a shift changes replies: it is in the path"


@pytest.mark.skipif(not XSTEST.is_file(), reason="XSTest's prompts are not at hand")
def test_xstest_of_inspect_evals_from_the_command_line(tmp_path: Path) -> None:
    """Published prompts and the public task, by Inspect's own command; the demo is the grader."""
    data = tmp_path / "walledai" / "XSTest"
    data.mkdir(parents=True)
    pd.read_csv(XSTEST).to_csv(data / "test.csv", index=False)
    logs = tmp_path / "logs"
    command = [
        sys.executable, "-m", "inspect_ai", "eval", "inspect_evals/xstest", "--model", "cmrm/demo",
        "-M", "defense=adashield_s", "-M", "batch_size=8", "--limit", "8", "--max-tokens", "12",
        "-T", "scorer_model=cmrm/demo", "--display", "none", "--log-dir", str(logs),
        "--log-format", "json",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    output = (done.stdout + done.stderr)[-2000:]
    assert done.returncode == 0, output
    (file,) = sorted(logs.glob("*.json"))
    log = read_eval_log(str(file))
    assert log.status == "success", log.error
    assert log.samples is not None
    assert len(log.samples) == 8
    assert all(sample.output.completion for sample in log.samples)
