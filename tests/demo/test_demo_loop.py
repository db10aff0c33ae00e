"""The whole `cmrm demo` pipeline on a tiny random model: files, schema, resumption, interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cmrm.demo.loop as run_module
from cmrm.demo.loop import SCHEMA, first_words, run_demo
from cmrm.demo.settings import QUICK, Budget
from cmrm.errors import InputError
from conftest import tiny_model, tiny_processor

SMALL = replace(
    QUICK, per_category=1, vqa=6, sweep_per_category=1, geometry_per_category=1, max_new_tokens=3, batch_size=8
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model(n_layers=30).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def go(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(run_module, "demo_checkpoint", lambda: checkpoint)

    def start(out: Path = tmp_path / "out", budget: Budget = SMALL, tick: Any = lambda n: None) -> dict[str, Any]:
        return run_demo(out, budget, say=lambda text: None, tick=tick, start=lambda total: None)

    return start


def test_results_and_report(go: Any, tmp_path: Path) -> None:
    results = go()
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["schema"] == SCHEMA
    assert set(results["conditions"]) == {"original", "blank", "noise", "caption", "query"}
    assert set(results["defenses"]) == {"none", "cmrm_dataset", "cmrm_sample"}
    for cell in [*results["conditions"].values(), *results["defenses"].values()]:
        assert {"unsafe_rate", "low", "high", "n", "unscored"} <= set(cell)
        assert cell["n"] + cell["unscored"] == 12
    assert results["defenses"]["none"]["unsafe_rate"] == results["conditions"]["original"]["unsafe_rate"]
    assert results["alpha_sweep"][0]["alpha"] == 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "<script" not in page
    assert {p.suffix for p in out.iterdir() if p.is_file()} == {".json", ".html", ".png", ".safetensors"}
    assert not list(out.rglob(".*")), "no scratch files are left"


def test_same_seed_same_bytes(go: Any, tmp_path: Path) -> None:
    go(tmp_path / "one")
    go(tmp_path / "two")
    for name in ("results.json", "shift.safetensors", "report.html", "unsafe_rate.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_results(go: Any, tmp_path: Path) -> None:
    whole = go(tmp_path / "whole")
    seen = 0

    def stop(n: int) -> None:
        nonlocal seen
        seen += n
        if seen > 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", tick=stop)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "cut" / "state").iterdir()}
    assert kept
    assert not (tmp_path / "cut" / "results.json").exists()
    assert go(tmp_path / "cut") == whole
    assert all((tmp_path / "cut" / "state" / name).read_bytes() == data for name, data in kept.items())


CHILD = """
import sys
from dataclasses import replace
from pathlib import Path
import cmrm.demo.loop as run_module
from cmrm.demo.settings import QUICK
checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
run_module.demo_checkpoint = lambda: checkpoint
small = replace(QUICK, per_category=1, vqa=6, sweep_per_category=1, geometry_per_category=1, max_new_tokens=3, batch_size=8)
run_module.run_demo(out, small, say=lambda text: None, tick=lambda n: print(n, flush=True), start=lambda total: None)
"""


def test_kill_9_in_the_middle_loses_nothing(go: Any, checkpoint: Path, tmp_path: Path) -> None:
    whole = go(tmp_path / "whole")
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(checkpoint), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    seen = 0
    for line in child.stdout:
        seen += int(line)
        if seen > 260:
            child.kill()
            break
    child.wait()
    assert seen > 260
    assert not (out / "results.json").exists()
    finished = [p for p in (out / "state").iterdir() if p.suffix == ".json"]
    assert finished
    assert all(json.loads(p.read_text()) for p in finished)
    assert go(out) == whole


def test_unwritable_out(go: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="--out"):
        go(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_harmful_text_is_cut() -> None:
    assert first_words("one two three four five six seven") == "one two three four five six ..."
    assert first_words("one\n two") == "one two"
