"""`cmrm check`, `cmrm sets`, `cmrm families`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.commands import json_of, output, refused, run
from cmrm.checks.clauses import Broken
from cmrm.checks.run import CHECKS
from cmrm.model.families import FAMILIES


def test_the_tiny_model_passes(checkpoint: str) -> None:
    assert "FAIL" not in output("check", checkpoint)


def test_a_check_that_fails_is_exit_code_1(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(vlm: object) -> str:
        raise Broken("it does not hold")

    for name in list(CHECKS):
        monkeypatch.delitem(CHECKS, name)
    monkeypatch.setitem(CHECKS, "a check that fails", wrong)
    broken = run("check", checkpoint, "--json")
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)["failed"] == 1
    assert "FAIL" in run("check", checkpoint).output


def test_sets() -> None:
    assert "figstep" in output("sets")
    assert "mm_harmful.jsonl" in output("sets", "mm-harmfulbench")
    assert len(json_of("sets", "--json")) >= 15
    assert "no set 'nope'" in refused("sets", "nope")


def test_families() -> None:
    assert "Idefics3" in output("families")
    assert len(json_of("families", "--json")["covered"]) == len(FAMILIES)


def test_the_docs_name_every_family_and_every_set() -> None:
    from cmrm.model.families import NOT_COVERED
    from cmrm.prompts import NAMED

    root = Path(__file__).parents[2]
    assert f"{len(FAMILIES)} architectures" in (root / "README.md").read_text(encoding="utf-8")
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"{len(FAMILIES)} architectures" in text.replace("\n", " ")
    for family in FAMILIES:
        assert f"| {family.name} | `{family.architecture}` | {family.note} |" in text
    assert all(name in text for name, _ in NOT_COVERED)
    words = (root / "docs" / "data.md").read_text(encoding="utf-8").lower().replace("\n", " ")
    titles = {
        "vlsafe", "figstep", "mm-safetybench", "mm-harmfulbench", "hades", "jailbreakv", "vlguard",
        "siuo", "msts", "xstest", "mossbench", "llava-bench-coco", "scienceqa", "pope", "easy-vqa",
    }  # fmt: skip
    assert titles <= set(NAMED)
    assert all(title in words for title in titles)
