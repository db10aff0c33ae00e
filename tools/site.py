"""Hooks of the documentation site: pages that stand elsewhere, and pages made from the code.

`pip install '.[dev,docs]' && mkdocs build` (mkdocs.yml). Nothing that is made here is kept in the
repository, so that it cannot differ from the code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from typer.main import get_command

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CHANGELOG.md", "LOG.md", "CONTRIBUTING.md")
"""Pages beside the README."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in `docs/`."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in OUTSIDE}
    pages["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    pages |= {
        "reference/cli.md": command_page(),
        "reference/python.md": python_page(),
        "reference/tables.md": tables_page(),
    }
    for name, text in pages.items():
        content = text if name.startswith("reference/") else at_the_root(text)
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **more: Any) -> str:
    """Links from `docs/` to pages beside it lead to the site's own; those to code become names."""
    markdown = re.sub(r"\]\(\.\./(" + "|".join(OUTSIDE) + r")", r"](\1", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", markdown)


def at_the_root(text: str) -> str:
    """A page beside the README as one of the site."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\(README\.md", "](index.md", text)
    return re.sub(
        r"\[([^\]]*)\]\((?!https?:|#)([^)#]*\.(?!md|png)[a-z]+|LICENSE)\)", r"\1 (`\2`)", text
    )


def command_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    from cmrm.cli.main import app

    lines = ["# Command line", ""]

    def walk(command: Any, name: str) -> None:
        inner = getattr(command, "commands", {})
        if name != "cmrm" and (not inner or getattr(command, "invoke_without_command", False)):
            lines.extend([f"## {name}", "", _plain(command.help or ""), ""])
            rows = [row for row in map(_parameter, command.params) if row]
            if rows:
                lines.extend(["| argument or option | default | |", "|---|---|---|", *rows, ""])
        for part, each in sorted(inner.items()):
            walk(each, f"{name} {part}")

    walk(get_command(app), "cmrm")
    return "\n".join(lines)


def _parameter(parameter: Any) -> str:
    """A row of the table; empty for `--help`."""
    if parameter.name in ("help", "install_completion", "show_completion"):
        return ""
    option = parameter.param_type_name == "option"
    names = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
    shown = names if option else f"`{(parameter.metavar or parameter.name).upper()}`"
    default = parameter.default
    value = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    text = _plain(getattr(parameter, "help", "") or "")
    return f"| {shown} | {value or ('required' if parameter.required else '')} | {text} |"


def _plain(text: str) -> str:
    """Help as one line that a table cell takes."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def python_page() -> str:
    """The public names, by mkdocstrings."""
    import cmrm

    lines = [
        "# Python",
        "",
        "What `import cmrm` offers. Modules below it are documented in their source.",
        "",
    ]
    for name in sorted(cmrm._WHERE, key=str.lower):
        module = cmrm._WHERE[name]
        place = getattr(getattr(cmrm, name), "__module__", f"cmrm.{module}")
        lines += [f"::: {place}.{name}", ""]
    return "\n".join(lines)


def tables_page() -> str:
    """Defences, named sets and families as the commands list them."""
    from cmrm.defenses import defense_names
    from cmrm.model.families import FAMILIES
    from cmrm.prompts import NAMED

    lines = ["# Defences, sets, families", "", "## Defences", "", "| name | source |", "|---|---|"]
    lines += [f"| `{name}` | {_plain(source)} |" for name, source in defense_names().items()]
    lines += [
        "",
        "## Named sets",
        "",
        "| name | measures | samples | licence |",
        "|---|---|---|---|",
    ]
    for each in NAMED.values():
        counts = ", ".join(f"{variant}: {n}" for variant, n in each.counts.items())
        lines.append(
            f"| `{each.name}` | {_plain(each.measures)} | {counts} | {_plain(each.licence)} |"
        )
    lines += ["", "## Families", "", "| family | class in transformers |", "|---|---|"]
    lines += [f"| {family.name} | `{family.architecture}` |" for family in FAMILIES]
    return "\n".join(lines)
