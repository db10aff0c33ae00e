"""Two processes on one machine: tensor parallelism and data parallelism of `cmrm serve`."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own (tools/vllm_env.sh)")

from cmrm import Steering
from serving.models import Model, hooks, requests
from serving.test_serve import GATED, SETTING, ask, close, health, running

FILL = ("--operator", "fill", "--alpha", "1")
TWO = ("--enforce-eager", "--max-num-batched-tokens", "64")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
@pytest.mark.parametrize(
    ("setting", "steering"), [(GATED, SETTING), (FILL, Steering(operator="fill", alpha=1.0))]
)
def test_tensor_parallel(
    model: Model, tmp_path: Path, setting: tuple[str, ...], steering: Steering
) -> None:
    batch = requests()
    wanted = [reply["logprobs"] for reply in hooks(model, batch, steering)]
    options = [*TWO, "--tensor-parallel-size", "2"]
    with running(model, tmp_path / "log.txt", setting=setting, options=options) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda request: ask(server, request), batch))
        assert health(server.address)[0] == 200
    assert all(close(a, b) for a, b in zip(answers, wanted, strict=True))


def test_data_parallel(model: Model, tmp_path: Path) -> None:
    batch = requests()
    wanted = [reply["logprobs"] for reply in hooks(model, batch, SETTING)]
    options = [*TWO, "--data-parallel-size", "2"]
    with running(model, tmp_path / "log.txt", setting=GATED, options=options) as server:
        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda request: ask(server, request), batch))
            assert all(close(a, b) for a, b in zip(answers, wanted, strict=True))
        with urllib.request.urlopen(f"{server.address}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
    for engine in (0, 1):
        finished = [
            float(line.rsplit(" ", 1)[1]) for line in lines
            if line.startswith("vllm:request_success_total") and f'engine="{engine}"' in line
        ]  # fmt: skip
        assert sum(finished) > 0, "both engines answer"


def test_fill_is_refused_under_data_parallelism(model: Model) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cmrm", "serve", str(model.folder), "--shift", str(model.path),
         *FILL, "--", "--data-parallel-size", "2"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "data-parallel-size" in done.stderr
