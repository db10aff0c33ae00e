"""What a server does by itself."""

from __future__ import annotations

from cmrm.defenses.base import Defense
from cmrm.engines.base import Engine
from cmrm.errors import InputError


class Served(Defense):
    """The steering of a server of `cmrm serve`: the request is sent as it is."""

    name = "served"
    source = "the server"
    local = False

    def check(self, engine: Engine) -> None:
        """Raise `InputError` where the engine is no server that steers."""
        if engine.served_program is None:
            raise InputError(
                "the defence `served` is what a server of `cmrm serve` does: name its address "
                "(--engine http://HOST:PORT/v1)"
            )
