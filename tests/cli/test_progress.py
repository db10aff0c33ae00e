"""Progress where there is no terminal: lines that say where a run is."""

from __future__ import annotations

import threading

import pytest

from cmrm.cli import screen


def test_a_line_says_step_and_share() -> None:
    lines = screen.Lines(print)
    assert lines.line() == "cmrm: 00:00:00 starting"
    lines.begin("none: demo", 480)
    lines.advance(48)
    lines.advance(48)
    assert lines.line() == "cmrm: 00:00:00 none: demo, 96 of 480"
    lines.name("judging")
    assert lines.line().endswith("judging, 96 of 480")
    lines.begin("another", None)
    assert lines.line().endswith("another")


def test_lines_come_while_nothing_is_done_and_end_with_the_run() -> None:
    written: list[str] = []
    there = threading.Event()

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            there.set()

    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"), screen.Lines(write, every=0.01) as lines:
        lines.begin("a long step", 10)
        assert there.wait(30)
        raise ValueError("broken")
    assert threading.active_count() == before
    assert "a long step, 0 of 10" in written[-1]


def test_without_a_terminal_lines_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.progress(5) as (say, tick):
        say("a step")
        tick(2)
    assert isinstance(screen.reporter(), screen.Lines)
    assert capsys.readouterr().err == "", "nothing is said of what is over at once"


def test_on_a_terminal_a_bar_is_drawn() -> None:
    from rich.console import Console

    console = Console(force_terminal=True, width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with screen.Bar(console) as bar:
        bar.begin("a step", 4)
        bar.size(8)
        bar.name("the same step")
        bar.advance(3)
    task = bar._bar.tasks[0]
    assert (task.description, task.total, task.completed) == ("the same step", 8, 3)


def test_the_next_command_is_named_beside_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    screen.next_step("cmrm one", "cmrm two")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "next: cmrm one   or: cmrm two\n")
