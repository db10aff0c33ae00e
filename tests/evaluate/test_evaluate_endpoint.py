"""`cmrm evaluate --engine URL` from end to end, against servers of the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("inspect_ai", reason="evaluation needs the extra `eval`")

from cli.commands import run
from cmrm.evaluate import provider
from engines.servers import ARMED, Fake, reply, serving


@pytest.fixture(autouse=True)
def _own_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_ENGINES", {})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["query,image,label"]
    for k, colour in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{k}.png")
        lines.append(f"How do I open door {k}?,{k}.png,{'harmful' if k % 2 else 'benign'}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    return tmp_path / "set.csv"


def command(server: Fake, table: Path, *more: str) -> Any:
    return run(
        "evaluate", "m", "--engine", server.url, "--sets", str(table), "--judges", "keyword",
        "--max-new-tokens", "8", *more,
    )  # fmt: skip


def test_a_plain_server_is_measured_with_defences_that_rewrite(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as server:
        dry = command(server, table, "--out", str(out), "--dry-run")
        assert dry.exit_code == 0, dry.output
        assert f"served at {server.url}" in " ".join(dry.output.split())
        assert not out.exists()
        asked = len(server.bodies)
        done = command(server, table, "--defenses", "safety_prompt", "--out", str(out))
        assert done.exit_code == 0, done.output
        first = len(server.bodies)
        again = command(server, table, "--defenses", "safety_prompt", "--out", str(out))
        assert again.exit_code == 0, again.output
        assert len(server.bodies) == first, "finished cells are not asked again"
    assert first - asked == 12, "four requests: as text, with image, and under the defence"
    results = json.loads((out / "results.json").read_text())
    assert {(c["defense"], c["condition"]) for c in results["cells"]} == {
        ("none", "original"), ("none", "query"), ("safety_prompt", "original"),
    }  # fmt: skip
    assert (results["failures"], results["cost"]) == ([], {})
    assert results["model"]["id"] == "m"


def test_a_steered_server_is_measured_by_its_own_name_alone(table: Path, tmp_path: Path) -> None:
    def told(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {**reply(body)[1], "cmrm": {"steered_tokens": 4, "gate_open": None}}

    with serving(health=ARMED, answer=told) as server:
        wrong = command(server, table, "--out", str(tmp_path / "no"))
        assert wrong.exit_code != 0
        assert "steers every request that carries an image" in str(wrong.exception)
        assert not server.bodies, "nothing was asked"
        assert not (tmp_path / "no" / "plan.json").exists(), "the folder stays free"
        options = ("--defenses", "served", "--conditions", "query", "--out", str(tmp_path / "out"))
        done = command(server, table, *options)
        assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(c["defense"], c["condition"]) for c in results["cells"]} == {
        ("none", "query"), ("served", "original"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--defenses", "served"), "what a server of `cmrm serve` does"),
        (("--defenses", "cmrm_sample"), "cmrm_sample cannot be made on the engine endpoint"),
        (("--defenses", "coca"), "cannot be made on the engine endpoint"),
        (("--dtype", "float32"), "the server's to choose"),
        (("--engine-options", '{"nothing": 1}'), "none of a server's"),
    ],
)
def test_what_cannot_be_done_is_named_before_anything_is_asked(
    more: tuple[str, ...], words: str, table: Path, tmp_path: Path
) -> None:
    with serving() as server:
        done = command(server, table, *more, "--out", str(tmp_path / "out"))
    assert done.exit_code != 0
    assert words in str(done.exception)
    assert server.bodies == []
