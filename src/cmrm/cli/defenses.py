"""`cmrm defenses`: what `cmrm evaluate --defenses` takes."""

from __future__ import annotations

from cmrm.cli import options as c


def defenses(as_json: c.JsonOption = False) -> None:
    """Defences that `cmrm evaluate --defenses` takes, and where each comes from."""
    from cmrm.defenses import defense_names

    names = defense_names()
    if as_json:
        c.print_json(names)
    else:
        rows = [[name, source] for name, source in names.items()]
        c.print_rows("defences", ["name", "source"], rows)
