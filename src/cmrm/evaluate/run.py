"""The run: sets x conditions x defences on one model, through Inspect, resumed at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval_set
from inspect_ai.model import Model, get_model

from cmrm.defenses.served import Served
from cmrm.engines.base import Decoding, Engine, EngineError
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import CmrmError, InputError
from cmrm.evaluate.defended import built_defense
from cmrm.evaluate.fitting import fit_defenses
from cmrm.evaluate.folder import Folder
from cmrm.evaluate.logs import read_cells
from cmrm.evaluate.plan import Plan
from cmrm.evaluate.provider import CmrmAPI, shared_engine
from cmrm.evaluate.rescore import rescore_logs
from cmrm.evaluate.results import measured
from cmrm.evaluate.scorers import judge_named
from cmrm.evaluate.tasks import set_task
from cmrm.files import write_json
from cmrm.measure.cost import cost_of
from cmrm.measure.environment import model_info
from cmrm.measure.fluency import FluencyStore
from cmrm.measure.outcomes import Cell
from cmrm.measure.schema import checked
from cmrm.measure.table import RATING
from cmrm.model.identity import public_name
from cmrm.model.vlm import REGISTERED
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import Condition, build_request
from cmrm.shift.artifact import library_versions

Say = Callable[[str], None]
SERVED = Served.name
COST_SAMPLES = 16
"""Requests on which a defence's own cost is measured, after a warm-up of two."""


def evaluate(
    plan: Plan,
    out: Path,
    *,
    say: Say,
    tick: Callable[[int], None] = lambda n: None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run what is not there yet, and write `out/results.json` from all logs in `out/logs`.

    A run that was killed continues with the same call: finished cells are read, replies of
    finished batches come from `out/replies.db`. Results are written as soon as there are replies,
    and again with perplexities and costs.

    Args:
        plan: what is measured.
        out: the run's folder.
        say: receives what is being done.
        tick: called with the number of replies of each finished defence.
        recipe: the recipe of the run as its results hold it (`measure.schema.RecipeRow`).

    Returns:
        The results, in the schema of `measure.schema`.

    Raises:
        InputError: a set, defence, judge or anchor cannot be used, or `out` holds another run.
    """
    if not plan.cells():
        raise InputError("nothing can be asked: no set has what its conditions need")
    engine = shared_engine(plan.model, **plan.model_options)
    folder = Folder(out)
    free = folder.bind(plan, engine)
    try:
        _prepare(plan, engine, folder, say=say)
    except CmrmError:
        if free:  # nothing was generated: the corrected command may use the folder
            folder.release()
        raise
    failures: list[str] = []
    for defense in plan.all_defenses:
        failures += _ask(plan, defense, folder, say=say, tick=tick)
    _ask_new_judges(plan, out, say=say)
    cells = read_cells(folder.logs)
    settings = {name: plan.defense(name).settings for name in plan.all_defenses}
    results = {
        "kind": "evaluation", "model": model_info(engine, public_name(plan.model)),
        "seed": plan.seed,
        "sets": [loaded.to_json() for loaded in plan.sets], "versions": library_versions(),
        "settings": {
            "defenses": settings, "origins": plan.origins(), "judges": list(plan.judges),
            "rater": plan.rater,
            "max_new_tokens": plan.max_new_tokens, "batch_size": plan.batch_size,
        },
        "recipe": recipe,
    }  # fmt: skip

    def written(**more: Any) -> dict[str, Any]:
        nonlocal results
        results = {**results, **more, "failures": failures}
        whole = checked(results)
        write_json(folder.results, whole)
        return whole

    written(**measured(out, cells, seed=plan.seed))
    failures += _fluency(plan, engine, folder, cells, say=say)
    written(**measured(out, cells, seed=plan.seed))
    costs, failed = _costs(plan, engine, folder, say=say)
    failures += failed
    return written(cost=costs)


def _prepare(plan: Plan, engine: Engine, folder: Folder, *, say: Say) -> None:
    """Find everything that would stop the run before anything is generated."""
    for part in plan.parts():
        try:
            part.check(engine)
        except EngineError as error:
            raise _unmade(part.name, engine, error) from None
    for name in (*plan.judges, *([plan.rater] if plan.rater else [])):
        judge_named(name)
    _check_served(plan, engine)
    _check_expressed(plan, engine, folder, fitted=False)
    fit_defenses(plan, engine, folder.fitted, say=say)
    _check_expressed(plan, engine, folder, fitted=True)


def _check_served(plan: Plan, engine: Engine) -> None:
    """A server that steers by itself is untouched for text alone.

    Raises:
        InputError: a cell would be called untouched, or another defence's, and is not.
    """
    if engine.served_program is None:
        return
    steered = [
        name for name, _, condition in plan.cells()
        if SERVED not in name.split("+") and condition.has_image
    ]  # fmt: skip
    if steered:
        raise InputError(
            f"the server steers every request that carries an image, so that {steered[0]!r} cannot "
            "be measured there with one: name --defenses served --conditions query"
        )


def _check_expressed(plan: Plan, engine: Engine, folder: Folder, *, fitted: bool) -> None:
    """Refuse defences that the engine cannot make, by name: each is tried on one request, those
    that have to be `fitted` after it.

    Raises:
        EngineError: it cannot make one.
    """
    if isinstance(engine, TransformersEngine):
        return
    with_image = (s for loaded in plan.sets for s in loaded.samples if s.image is not None)
    sample = next(with_image, None)
    if sample is None:
        return
    request = build_request(sample, Condition.ORIGINAL)
    names = [
        name for name in plan.all_defenses
        if fitted == any(part.needs_fit for part in plan.defense(name).parts)
    ]  # fmt: skip
    for name in names:
        defense = built_defense(engine, name, plan.effective_settings, fitted=folder.fitted)
        try:
            asked = defense.rewrite(engine, [request])
            engine.check_interventions(defense.intervene(engine, asked, [sample.id]))
            if defense.contrast(engine, asked) is not None and not engine.contrasts:
                raise EngineError("it decodes no second conversation")
        except EngineError as error:
            raise _unmade(name, engine, error) from None


def _unmade(name: str, engine: Engine, error: EngineError) -> EngineError:
    return EngineError(f"{name} cannot be made on the engine {engine.name}: {error}")


def _ask(
    plan: Plan, defense: str, folder: Folder, *, say: Say, tick: Callable[[int], None]
) -> list[str]:
    """Ask all cells of one defence; what went wrong, by task."""
    cells = [(loaded, condition) for name, loaded, condition in plan.cells() if name == defense]
    if not cells:
        return []
    tasks = [_task(plan, loaded, condition) for loaded, condition in cells]
    say(f"{defense}: {', '.join(task.name for task in tasks)}")
    model = get_model(
        f"cmrm/{plan.model}", memoize=False, defense=defense, settings=plan.effective_settings,
        fitted=str(folder.fitted), store=str(folder.replies), batch_size=plan.batch_size,
        **plan.model_options,
    )  # fmt: skip
    assert isinstance(model.api, CmrmAPI)
    for task in tasks:
        task.metadata = {**(task.metadata or {}), "settings": model.api.defense.settings}
    try:
        failures = _run_tasks(plan, tasks, model, folder.logs / defense)
    finally:
        model.api.close()
    tick(sum(len(task.dataset) for task in tasks))
    return failures


def _task(plan: Plan, loaded: Loaded, condition: Condition) -> Task:
    return set_task(
        loaded, condition, plan.judges, max_new_tokens=plan.max_new_tokens,
        batch_size=plan.batch_size, seed=plan.seed, rater=plan.rater,
    )  # fmt: skip


def _run_tasks(plan: Plan, tasks: list[Task], model: Model, logs: Path) -> list[str]:
    with _offline(plan.model in REGISTERED), redirect_stdout(StringIO()):
        finished, written = eval_set(
            tasks, log_dir=str(logs), model=model, display="none", log_images=False,
            log_level="error", continue_on_fail=True, retry_attempts=1, retry_immediate=True,
            max_tasks=1, max_samples=4 * plan.batch_size, log_dir_allow_dirty=True,
            score_display=False,
        )  # fmt: skip
    if finished:
        return []
    return [
        f"{log.eval.task}: {log.error.message if log.error else log.status}"
        for log in written if log.status != "success"
    ]  # fmt: skip


def _ask_new_judges(plan: Plan, out: Path, *, say: Say) -> None:
    """Ask judges of the plan that have not judged a log yet, or failed on a reply."""
    cells = read_cells(Folder(out).logs)
    requests = [o for cell in cells for o in cell.of_kind("harmful", "benign")]
    new = [
        name for name in plan.judges
        if any(name not in o.verdicts or name in o.failed for o in requests)
    ]  # fmt: skip
    answers = [o for cell in cells for o in cell.of_kind("open")]
    unrated = any(RATING not in o.scores or RATING in o.failed for o in answers)
    rater = plan.rater if unrated else None
    if new or rater:
        say("judging: " + ", ".join([*new, *([rater] if rater else [])]))
        rescore_logs(out, new, rater=rater)


def _fluency(
    plan: Plan, engine: Engine, folder: Folder, cells: list[Cell], *, say: Say
) -> list[str]:
    """Measure what `cells` lack in perplexities; why it could not be done."""
    if not isinstance(engine, TransformersEngine):
        say(f"no perplexity: the engine {engine.name} gives none")
        return []
    say("fluency")
    try:
        store = FluencyStore(folder.fluency)
        store.measure(engine.vlm, cells, batch_size=plan.batch_size)
    except (CmrmError, RuntimeError) as error:
        return [f"perplexity was not measured: {_line(error)}"]
    return []


def _costs(
    plan: Plan, engine: Engine, folder: Folder, *, say: Say
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """What each defence costs a request, measured on a few harmful ones; why it could not be."""
    samples = [
        sample for loaded in plan.sets for sample in loaded.samples
        if sample.image is not None and sample.label == "harmful"
    ]  # fmt: skip
    requests = [build_request(s, Condition.ORIGINAL) for s in samples[: COST_SAMPLES + 2]]
    costs: dict[str, dict[str, float | None]] = {}
    failures: list[str] = []
    if not isinstance(engine, TransformersEngine):
        say(f"no costs: passes of the engine {engine.name} are not counted")
        return costs, failures
    for name in plan.all_defenses if requests else ():
        say(f"cost of {name}")
        try:
            defense = built_defense(engine, name, plan.effective_settings, fitted=folder.fitted)
            costs[name] = cost_of(
                engine, defense, requests, Decoding(plan.max_new_tokens),
                batch_size=plan.batch_size,
            )  # fmt: skip
        except (CmrmError, RuntimeError) as error:
            failures.append(f"the cost of {name} was not measured: {_line(error)}")
    return costs, failures


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Inspect asks the hub for a model's data otherwise, and waits for it."""
    before = os.environ.get("HF_HUB_OFFLINE")
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
