"""Middleware of vLLM's own OpenAI-compatible server: what its workers say of their steering.

Clients reach three paths of vLLM's, once every worker is armed. vLLM loads it by `--middleware
cmrm.engines.vllm.http.Middleware`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import Any

from cmrm.engines.serving.front import Front, Scope, shows_key

TIMEOUT = 10.0
"""Seconds in which workers have to say that they are armed."""
REFUSED: dict[str, Callable[[Any], bool]] = {
    "use_beam_search": bool,
    "continue_final_message": bool,
    "add_generation_prompt": lambda value: value is False,
    "chat_template": lambda value: value is not None,
    "chat_template_kwargs": bool,
    "echo": bool,
    "kv_transfer_params": bool,
    "truncate_prompt_tokens": lambda value: value is not None,
    "truncation_side": lambda value: value is not None,
}
"""Fields of a body that would move the token at which steering begins -> whether they do."""


class Middleware(Front):
    """ASGI middleware around vLLM's application."""

    asked = MappingProxyType({**Front.asked, "/v1/completions": "POST"})
    """vLLM has more paths, not all of them behind the key."""

    async def workers(self, scope: Scope) -> list[dict[str, Any]]:
        """See `Front.workers`."""
        client = scope["app"].state.engine_client
        answer = client.collective_rpc("cmrm_status", timeout=TIMEOUT)
        workers = list(await asyncio.wait_for(answer, TIMEOUT))
        expected = expected_program()
        if not workers or any(worker["program"] != expected for worker in workers):
            raise RuntimeError("a worker is armed with another program")
        return workers

    async def outcome(self, scope: Scope, name: str) -> dict[str, Any] | None:
        """See `Front.outcome`."""
        client = scope["app"].state.engine_client
        try:
            answer = client.collective_rpc("cmrm_outcome", timeout=TIMEOUT, args=(name,))
            outcomes = list(await asyncio.wait_for(answer, TIMEOUT))
        except Exception:  # the reply is whole: that nothing is known of it is what is said
            return None
        known = next((outcome for outcome in outcomes if outcome is not None), None)
        if known is None:
            return None
        return {"steered_tokens": known["steered"], "gate_open": known["open"]}

    def admits(self, scope: Scope) -> bool:
        """vLLM looks at the key too, but behind this: nothing is read of a request without it."""
        return shows_key(scope, os.environ.get("VLLM_API_KEY"))

    def refusal(self, path: str, body: bytes) -> str | None:
        """See `refused_body`."""
        return refused_body(body)


def refused_body(body: bytes) -> str | None:
    """Why a body cannot be steered rightly; None where it can, or is none that vLLM takes."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return "the body is not JSON"
    if not isinstance(asked, dict):
        return "the body is not a JSON object"
    for name, moved in REFUSED.items():
        if name in asked and moved(asked[name]):
            return f"{name} would move the token at which steering begins; ask without it"
    return None


@cache
def expected_program() -> str:
    """Key of the program that this server's environment names."""
    from cmrm.engines.vllm.arming import program_of

    return program_of(os.environ)[0].key
