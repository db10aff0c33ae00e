"""The parity contract on further models: another Llama backbone, a Qwen one, and the demo VLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["llava_next", "qwen2_5_vl", pytest.param("demo", marks=pytest.mark.demo)]
)
def test_vllm_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    worker, out = Path(__file__).with_name("families_worker.py"), tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(worker), name, str(tmp_path / "model"), str(out)],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["apart"] < 2e-3
    replies = result["replies"]
    for label, (here, there) in replies.items():
        assert here == there, label
    moved = [label for label in replies if replies[label][0] != replies["none"][0]]
    assert {"last", "all"} <= set(moved), "the settings change something"
