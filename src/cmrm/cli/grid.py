"""`cmrm evaluate --tune-budget`: every defence tuned alike before the grid is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrm.cli import options as c
from cmrm.cli import screen
from cmrm.cli.tune import DEMO_TOKENS, LIBRARIES, parsed_budget, study_sets

if TYPE_CHECKING:
    from cmrm.evaluate.plan import Plan
    from cmrm.evaluate.weights import Finding
    from cmrm.tune.grid import Budget
    from cmrm.tune.sets import Sets


def grid_budget(text: str) -> Budget:
    """`12`: trials of each defence; `5m`: time of each.

    Raises:
        InputError: it is neither.
        MissingExtraError: a library is not installed.
    """
    c.need_extra("--tune-budget", "tune", LIBRARIES)
    from cmrm.errors import InputError
    from cmrm.tune.grid import Budget

    text = text.strip()
    if not text.isdecimal():
        if text[-1:] not in "smh":
            raise InputError(
                f"--tune-budget is {text[:40]!r}; it is a number of trials such as 12, or a time "
                "such as 5m"
            )
        return Budget(seconds=parsed_budget(text, "--tune-budget"))
    if int(text[:7]) < 1:
        raise InputError("--tune-budget is 0; one trial is the least")
    return Budget(trials=int(text[:7]))


def grid_sets(
    plan: Plan,
    anchors: Path | None,
    benign_anchors: Path | None,
    dev: str | None,
    *,
    demo: bool,
    **options: Any,
) -> Sets:
    """What the plan's defences are tuned on, checked against the sets of the grid.

    `options`: those of `cli.tune.study_sets`.

    Raises:
        InputError: nothing can be tuned, or a set is missing or is asked in the grid.
    """
    from cmrm.defenses import make_defense
    from cmrm.tune.grid import check_tunable, tunable_names
    from cmrm.tune.sets import demo_sets

    names = tunable_names(plan)
    check_tunable(plan, names)
    if demo and anchors is None and benign_anchors is None and dev is None:
        sets = demo_sets(plan.batch_size)
    else:
        sets = study_sets(
            None if anchors is None else str(anchors),
            None if benign_anchors is None else str(benign_anchors),
            dev, None, plan.batch_size, demo=demo,
            needs_fit=any(make_defense(name).needs_fit for name in names), **options,
        )  # fmt: skip
    sets.check([loaded.samples for loaded in plan.sets])
    return sets


def grid_finding(plan: Plan, sets: Sets, budget: str) -> Finding:
    """What would be tuned, for `--dry-run`."""
    from cmrm.evaluate.weights import Finding
    from cmrm.tune.grid import tunable_names

    names = tunable_names(plan)
    unit = " trials" if budget.strip().isdecimal() else ""
    return Finding(
        "tuning", True,
        f"{', '.join(names)}: {budget.strip()}{unit} each, on {len(sets.dev.samples)} dev samples; "
        "its rows and its time come on top of what stands here",
    )  # fmt: skip


def tune_grid(plan: Plan, sets: Sets, budget: Budget, out: Path, *, demo: bool) -> Plan:
    """The plan with a tuned row for each defence; studies lie in `out/tuned`."""
    from cmrm.evaluate.folder import Folder
    from cmrm.evaluate.provider import shared_engine
    from cmrm.tune.grid import tuned_plan

    engine = shared_engine(plan.model, **plan.model_options)
    folder = Folder(out)
    folder.check(plan, engine)
    tokens = min(DEMO_TOKENS, plan.max_new_tokens) if demo else plan.max_new_tokens
    with screen.progress(None) as (say, tick):
        tuned = tuned_plan(
            plan, engine, sets, budget, out / "tuned", max_new_tokens=tokens, say=say, tick=tick
        )
    folder.renew(tuned, [name for name in tuned.tuned if name not in plan.tuned])
    return tuned
