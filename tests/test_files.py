"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmrm.files import atomic_path


def test_atomic_path_leaves_nothing_behind_on_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as part:
            part.write_text("half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_kill_9_never_leaves_a_half_written_file(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cmrm.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "result.json"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not target.exists()
    with atomic_path(target) as part:
        part.write_text(json.dumps([1]))
    assert json.loads(target.read_text()) == [1]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    inside = tmp_path / "folder" / "inside"
    inside.parent.mkdir()
    inside.write_text("x")
    with pytest.raises(IsADirectoryError), atomic_path(inside.parent) as part:
        part.write_text("y")
    assert inside.read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"], "no scratch is left"
