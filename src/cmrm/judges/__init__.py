"""Judges say whether a reply refuses. They never guess: what cannot be judged is `unscored`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cmrm.judges.base import Judge, Verdict
from cmrm.judges.keyword import KeywordJudge

if TYPE_CHECKING:
    from cmrm.judges.ensemble import EnsembleJudge, RegressionJudge

__all__ = ["EnsembleJudge", "Judge", "KeywordJudge", "RegressionJudge", "Verdict", "judge_names", "make_judge"]


def __getattr__(name: str) -> Any:
    if name in {"EnsembleJudge", "RegressionJudge"}:
        from cmrm.judges import ensemble

        return getattr(ensemble, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _ensemble() -> Judge:
    from cmrm.judges.ensemble import EnsembleJudge

    return EnsembleJudge()


def _regression() -> Judge:
    from cmrm.judges.ensemble import RegressionJudge

    return RegressionJudge()


_PLAIN: dict[str, Callable[[], Judge]] = {"keyword": KeywordJudge, "regression": _regression, "ensemble": _ensemble}


def judge_names() -> list[str]:
    """What `make_judge` takes."""
    return [*_PLAIN, "guard:KIND=MODEL", "openai:MODEL@URL"]


def make_judge(name: str) -> Judge:
    """A judge by name.

    `keyword`, `regression`, `ensemble`; `guard:llama-guard-3=PATH` and the like (`judges.guard.KINDS`) for a guard model from a
    folder or hub id; `openai:MODEL@http://host:port/v1` for any endpoint of OpenAI's protocol (`judges.endpoint`).

    Raises:
        InputError: the name is unknown, or what it names cannot be used. ModelError: a guard cannot be loaded.
    """
    from cmrm.errors import InputError

    if name in _PLAIN:
        return _PLAIN[name]()
    kind, colon, rest = name.partition(":")
    if colon and kind == "guard":
        from cmrm.judges.guard import GuardJudge

        return GuardJudge.named(rest)
    if colon and kind == "openai":
        from cmrm.judges.endpoint import EndpointJudge

        return EndpointJudge.named(rest)
    raise InputError(f"unknown judge {name!r}; one of {', '.join(judge_names())}")
