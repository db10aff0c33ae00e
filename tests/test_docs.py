"""Pages: short where they have to be, links that lead somewhere, commands that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cmrm.cli.main import app
from cmrm.prompts.conditions import Request

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
if not (ROOT / "README.md").is_file():
    pytest.skip("the pages are not beside the tests", allow_module_level=True)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", t)]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """Each `cmrm NAME` in a console block is a command, and each of its options is one of it."""
    command = get_command(app)
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        for call in re.findall(r"(?:^|[ /])cmrm (.*?)(?:&&|$)", line.split("#")[0]):
            words = call.split()
            place = command
            while words and hasattr(place, "commands") and words[0] in place.commands:
                place = place.commands[words.pop(0)]
            nested = hasattr(place, "commands") and not getattr(place, "invoke_without_command", 0)
            assert not nested or not words or words[0].startswith("-"), f"no command: {line}"
            known = {option for parameter in place.params for option in parameter.opts}
            known |= {option for parameter in place.params for option in parameter.secondary_opts}
            used = [word.split("=")[0] for word in words[: _end(words)] if word.startswith("--")]
            assert [option for option in used if option not in {*known, "--help"}] == [], line


def test_every_command_is_named() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in get_command(app).commands if f"cmrm {name}" not in text] == []  # type: ignore[attr-defined]


BLOCKS = [
    pytest.param(code, id=f"{page.name}-{k}")
    for page in PAGES
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_are_python_and_what_they_import_is_there(code: str) -> None:
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    own = [node for node in imports if "cmrm" in ast.unparse(node)]
    for node in own:
        exec(compile(ast.Module([node], []), "page", "exec"), {})
    assert imports or "import" not in code


@pytest.mark.parametrize("name", ["PoliteReminder", "ShortJudge"])
def test_the_examples_of_own_parts_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if name in block
    )
    from cmrm import defenses

    monkeypatch.setattr(defenses, "_KNOWN", dict(defenses._KNOWN))
    names: dict[str, Any] = {"__name__": "my_package"}
    exec(code, names)
    made = names[name]()
    if name == "ShortJudge":
        assert [made.judge("x", reply).value for reply in ("", "No.", "a" * 80)] == [
            "unscored", "refused", "complied",
        ]  # fmt: skip
    else:
        asked = defenses.make_defense("polite_reminder").rewrite(None, [Request("Hi")])  # type: ignore[arg-type]
        assert [request.text for request in asked] == ["Please be careful. Hi"]


def _end(words: list[str]) -> int:
    """Where options of another program begin."""
    return words.index("--") if "--" in words else len(words)
