"""`cmrm defenses`: what `cmrm evaluate --defenses` takes."""

from __future__ import annotations

from cmrm.cli import options as c
from cmrm.cli import screen


def defenses(as_json: c.JsonOption = False) -> None:
    """Defences that `cmrm evaluate --defenses` takes, and where each comes from."""
    from cmrm.defenses import defense_names

    names = defense_names()
    if as_json:
        screen.print_json(names)
    else:
        rows = [[name, source] for name, source in names.items()]
        screen.print_rows("defences", ["name", "source"], rows)
