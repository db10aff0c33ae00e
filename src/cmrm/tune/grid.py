"""The same budget for every defence of a grid, before the grid is run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense, base_name, make_defense
from cmrm.engines.base import Engine
from cmrm.errors import CmrmError, InputError
from cmrm.evaluate.plan import Plan
from cmrm.judges import make_judge
from cmrm.measure.store import ReplyStore
from cmrm.tune.choose import Limits
from cmrm.tune.measuring import Bench
from cmrm.tune.remembering import Remembering
from cmrm.tune.results import tuned, write_tuned
from cmrm.tune.run import Options, Say, Tuner
from cmrm.tune.sets import Sets


@dataclass(frozen=True)
class Budget:
    """What each defence of a grid is tuned with: a number of trials, or a time."""

    trials: int | None = None
    """Settings that are measured, the default one among them."""
    seconds: float = math.inf
    """Time of one defence's study, over all calls."""
    limits: Limits = field(default_factory=Limits)
    """What a setting may cost."""

    def __post_init__(self) -> None:
        if self.trials is None and math.isinf(self.seconds):
            raise InputError("a budget is a number of trials or a time")


def tunable_names(plan: Plan) -> tuple[str, ...]:
    """The plan's defences that have settings to tune, without variants and stacks, each once."""
    names = [name for name in plan.defenses if "+" not in name and name == base_name(name)]
    return tuple(name for name in names if type(make_defense(name)).space is not Defense.space)


def tuned_plan(
    plan: Plan,
    engine: Engine,
    sets: Sets,
    budget: Budget,
    out: Path,
    *,
    max_new_tokens: int | None = None,
    say: Say = lambda text: None,
    tick: Callable[[int], None] = lambda n: None,
) -> Plan:
    """The plan with a row `NAME@tuned` for each defence that has settings.

    Each defence is searched by the same budget, dev set, judges and limits; its study lies in
    `out/NAME`, and the same call continues it. The grid fits the chosen setting on the plan's own
    anchors, as every other row. Where no setting meets the limits the row has the nearest one, and
    says so.

    Args:
        plan: the grid.
        engine: the grid's model.
        sets: what is fitted on and compared on; never the plan's sets.
        budget: of each defence.
        out: folder of the studies.
        max_new_tokens: length limit of a reply in the search; None: the plan's.
        say: receives what is being done.
        tick: called after each batch with its number of requests.

    Raises:
        InputError: a sample of the search is asked in the grid, the plan's vectors are given, no
            defence has settings, or one cannot be tuned.
    """
    names = tunable_names(plan)
    check_tunable(plan, names)
    sets.check([loaded.samples for loaded in plan.sets])
    bench = Bench(
        Remembering(engine), {name: make_judge(name) for name in plan.judges},
        ReplyStore(out / "replies.db"), plan.batch_size, max_new_tokens or plan.max_new_tokens,
        plan.seed, tick,
    )  # fmt: skip
    say("the untouched model on the dev set")
    bench.cell(sets.dev, make_defense("none"))
    settings, rows = dict(plan.settings), {}
    for name in names:
        row = f"{name}@tuned"
        settings[row], rows[row] = _tuned(name, plan, bench, sets, budget, out / name, say)
    return replace(
        plan,
        defenses=tuple(dict.fromkeys((*plan.defenses, *rows))),
        settings=settings,
        tuned={**plan.tuned, **rows},
    )


def check_tunable(plan: Plan, names: tuple[str, ...]) -> None:
    """Refuse a plan that cannot be tuned.

    Raises:
        InputError: no defence has settings, the vectors are given, or a name is taken.
    """
    if not names:
        raise InputError("--tune-budget: none of --defenses has settings to tune")
    if plan.shift is not None:
        raise InputError(
            "--tune-budget fits vectors for each setting and --shift gives them; leave one out"
        )
    preset = [name for name in names if name in plan.settings]
    if preset:
        raise InputError(
            f"--settings has {', '.join(preset)}, which --tune-budget tunes from the source's "
            "default; leave one out, or name a variant (NAME@mine)"
        )
    taken = [f"{name}@tuned" for name in names if f"{name}@tuned" in plan.defenses]
    if taken:
        raise InputError(f"--defenses names {', '.join(taken)}, which --tune-budget makes itself")


def _tuned(
    name: str, plan: Plan, bench: Bench, sets: Sets, budget: Budget, out: Path, say: Say
) -> tuple[dict[str, Any], str]:
    """The settings that a search chooses, and what the grid says of them."""
    options = Options(name, budget.seconds, budget.limits, budget.trials)
    try:
        search = Tuner(bench, sets, options, out, lambda text: say(f"tuning {name}: {text}")).run()
        result = tuned(search, bench, sets, options, plan.model)
        write_tuned(result, search, out)
    except CmrmError as error:
        raise type(error)(f"tuning {name}: {error}") from error
    number = result["nearest"] if result["chosen"] is None else result["chosen"]
    row = next(row for row in result["trials"] if row["number"] == number)
    words = f"tuned, {len(result['trials'])} trials"
    if row["origin"] == "default":
        words += ": the default"
    if result["chosen"] is None:
        words += "; over the limits"
    return row["settings"], words
