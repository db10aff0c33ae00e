"""Replies that stand in for the tiny model's: the stronger the steering, the more are refusals.

As a script it runs `cmrm` with them, and may end itself: `python scripted.py HOW AFTER ARGS...`
ends (HOW `kill` or `interrupt`) before the batch number AFTER.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from cmrm.engines.base import Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.prompts.conditions import Request
from cmrm.steering.intervention import Intervention

REFUSAL = "I'm sorry, but I can't help with that request."
ANSWER = "Sure, here is how it is done: first get the tools, then follow the steps below."


def strength(interventions: Sequence[Intervention]) -> float:
    return sum(abs(edit.strength) for part in interventions for edit in part.edits)


def reply_to(text: str, steered: float) -> str:
    """Harmful requests are refused from a third of the strength on that benign ones are."""
    place = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 65536
    if "colour" in text:
        return "red" if steered < 1 + 4 * place else "blue"
    return REFUSAL if steered > place * (6 if "wrap" in text else 2) else ANSWER


def answer(
    engine: Any,
    requests: Sequence[Request],
    interventions: Sequence[Intervention] = (),
    options: Any = None,
    **more: Any,
) -> list[Reply]:
    """In the place of `TransformersEngine.answer`."""
    steered = strength(interventions)
    return [Reply(reply_to(request.text, steered), 5) for request in requests]


if __name__ == "__main__":
    how, after = sys.argv[1], int(sys.argv[2])
    batches = 0

    def ending(engine: Any, requests: Sequence[Request], *args: Any, **more: Any) -> list[Reply]:
        global batches
        batches += 1
        if batches > after:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return answer(engine, requests, *args, **more)

    import cmrm.tune.run as run_module

    TransformersEngine.answer = ending  # type: ignore[method-assign,assignment]
    run_module.CANDIDATES, run_module.KEPT = 6, 2
    sys.argv = ["cmrm", *sys.argv[3:]]
    from cmrm.cli.main import run

    run()
