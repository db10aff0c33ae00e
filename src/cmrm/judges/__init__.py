"""Judges decide whether a reply refuses. They never guess: what they cannot tell is `unscored`.

A third party's judge is found by the entry point group `cmrm.judges`: its name, and a class or
function without arguments that gives a `Judge` of that name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from cmrm.errors import CmrmError, InputError
from cmrm.judges.base import (
    Judge,
    Judgement,
    ReasonedJudge,
    Verdict,
    assessed,
    assessed_all,
    safely,
)
from cmrm.judges.keyword import KeywordJudge

if TYPE_CHECKING:
    from cmrm.judges.ensemble import EnsembleJudge, RegressionJudge

__all__ = [
    "DEFAULT_JUDGE",
    "EnsembleJudge",
    "Judge",
    "Judgement",
    "KeywordJudge",
    "ReasonedJudge",
    "RegressionJudge",
    "Verdict",
    "assessed",
    "assessed_all",
    "judge_maker",
    "judge_model",
    "judge_names",
    "make_judge",
    "safely",
]

DEFAULT_JUDGE = "small"
"""Name of the judge whose figures come first."""
GROUP = "cmrm.judges"
"""Of entry points."""


def __getattr__(name: str) -> Any:
    if name in {"EnsembleJudge", "RegressionJudge"}:
        from cmrm.judges import ensemble

        return getattr(ensemble, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _small() -> Judge:
    from cmrm.judges.small import SmallJudge

    return SmallJudge()


def _ensemble() -> Judge:
    from cmrm.judges.ensemble import EnsembleJudge

    return EnsembleJudge()


def _regression() -> Judge:
    from cmrm.judges.ensemble import RegressionJudge

    return RegressionJudge()


_PLAIN: dict[str, Callable[[], Judge]] = {
    DEFAULT_JUDGE: _small,
    "keyword": KeywordJudge,
    "regression": _regression,
    "ensemble": _ensemble,
}


def judge_names() -> list[str]:
    """Forms of a name that `make_judge` takes."""
    installed = [point.name for point in entry_points(group=GROUP)]
    return [
        *_PLAIN,
        *installed,
        "guard:KIND=MODEL",
        "chat:MODEL",
        "openai:MODEL@URL",
        "judgezoo:NAME",
    ]


def make_judge(name: str) -> Judge:
    """The judge of a name.

    `small`, `keyword`, `regression`, `ensemble`; `guard:llama-guard-3=PATH` and the like for a
    guard (`judges.guard.KINDS`), `chat:PATH` for a chat model with a rubric (`judges.local`), both
    from a folder or hub id; `openai:MODEL@http://host:port/v1` for an endpoint of OpenAI's
    protocol (`judges.endpoint`); `judgezoo:NAME` for a judge of that package (`judges.zoo`).

    Raises:
        InputError: the name is unknown, or what it names cannot be used.
        ModelError: a model cannot be loaded.
        MissingExtraError: the judge needs a library that is not installed.
    """
    return judge_maker(name)()


def judge_maker(name: str) -> Callable[[], Judge]:
    """The function that makes the judge of a name. The name is checked, no model is loaded yet.

    Raises:
        InputError: the name is unknown, or has another form.
        MissingExtraError: the judge needs a library that is not installed.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    kind, _, rest = name.partition(":")
    if kind == "guard" and rest:
        from cmrm.judges.guard import GuardJudge, guard_source

        guard_source(rest)
        return lambda: GuardJudge.named(rest)
    if kind == "chat" and rest:
        from cmrm.judges.local import ChatJudge, chat_source

        chat_source(rest)
        return lambda: ChatJudge.named(rest)
    if kind == "openai" and rest:
        from cmrm.judges.endpoint import EndpointJudge

        judge = EndpointJudge.named(rest)
        return lambda: judge
    if kind == "judgezoo" and rest:
        from cmrm.judges.zoo import ZooJudge, check_zoo_name

        check_zoo_name(rest)
        return lambda: ZooJudge.named(rest)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _installed(point)
    raise InputError(f"unknown judge {name!r}; one of {', '.join(judge_names())}")


def _installed(point: EntryPoint) -> Callable[[], Judge]:
    """A third party's judge.

    Raises:
        InputError: it cannot be imported, or is no class or function without arguments.
    """
    place = f"the installed judge {point.name!r} ({point.value})"
    try:
        made = point.load()
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise InputError(f"{place} cannot be loaded: {error}") from error

    def make() -> Judge:
        try:
            judge: Judge = made()
        except CmrmError:
            raise
        except Exception as error:  # the same, while it is made
            raise InputError(f"{place} cannot be made: {error}") from error
        if not hasattr(judge, "judge") or getattr(judge, "name", None) != point.name:
            raise InputError(
                f"{place} has no method `judge`, or another `name` than {point.name!r}"
            )
        return judge

    return make


def judge_model(name: str) -> str | None:
    """The model that the judge of a name loads into this process, or None.

    Raises:
        InputError: as `judge_maker`.
    """
    judge_maker(name)
    kind, _, rest = name.partition(":")
    if kind == "guard":
        from cmrm.judges.guard import guard_source

        return guard_source(rest)[1]
    if kind == "chat":
        from cmrm.judges.local import chat_source

        return chat_source(rest)[0]
    if kind == "judgezoo":
        from cmrm.judges.zoo import MODELS

        return MODELS[rest]
    return None
