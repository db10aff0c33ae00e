"""A run that is killed ends with the numbers of one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

pytestmark = pytest.mark.usefixtures("no_models_left")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import time
from pathlib import Path
from cmrm.evaluate.run import evaluate
from cmrm.measure import loop
from evaluate.plans import quiet, small_plan
inner = loop.respond
def slow(*arguments, **options):
    time.sleep({pause})
    with open({count!r}, "a") as handle:
        handle.write("batch\\n")
    return inner(*arguments, **options)
loop.respond = slow
evaluate(small_plan({checkpoint!r}, defenses=("cmrm_sample",)), Path({out!r}), say=quiet)
"""


def run_and_kill(checkpoint: str, out: Path, *, kills: int, pause: float) -> tuple[Any, int]:
    """Results of a run that was killed so often, each time within its third new batch; batches."""
    count = Path(f"{out}.count")
    count.touch()
    script = SCRIPT.format(
        tests=str(Path(__file__).parents[1]), checkpoint=checkpoint, out=str(out), pause=pause,
        count=str(count),
    )  # fmt: skip
    command, environment = [sys.executable, "-c", script], os.environ | {"HF_HUB_OFFLINE": "1"}
    for _ in range(kills):
        before = len(count.read_text().splitlines())
        process = subprocess.Popen(command, env=environment)
        while len(count.read_text().splitlines()) < before + 3 and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, env=environment)
    return json.loads((out / "results.json").read_text()), len(count.read_text().splitlines())


def test_killed_twice_it_ends_with_the_same_numbers(checkpoint: str, tmp_path: Path) -> None:
    whole, batches = run_and_kill(checkpoint, tmp_path / "whole", kills=0, pause=0.0)
    killed, more_batches = run_and_kill(checkpoint, tmp_path / "killed", kills=2, pause=0.3)
    assert whole["cells"] == killed["cells"]
    assert whole["comparisons"] == killed["comparisons"]
    assert more_batches <= batches + 2, "each kill costs at most one batch"
