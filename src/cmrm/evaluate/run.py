"""The grid: sets x conditions x defences on one model, through Inspect's `eval_set`, resumable at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmrm.shift.artifact import library_versions
from cmrm.model.batching import in_batches
from cmrm.prompts.conditions import Condition, Request, build_request
from cmrm.defenses import Defense, FitData, Meter, defense_names, make_defense, respond
from cmrm.demo import DEMO
from cmrm.errors import CmrmError, InputError
from cmrm.evaluate.defended import built_defense
from cmrm.evaluate.grid import read_cells
from cmrm.evaluate.provider import CmrmAPI, shared_vlm
from cmrm.evaluate.rescore import rescore_logs
from cmrm.evaluate.results import fluency_of, results_of
from cmrm.evaluate.scorers import RATING, check_rater, judge_named
from cmrm.evaluate.tasks import set_task
from cmrm.files import write_json
from cmrm.judges import judge_maker
from cmrm.model.vlm import VLM, config_hash, weights_hash
from cmrm.prompts.sample import Sample, set_hash
from cmrm.prompts import Loaded

if TYPE_CHECKING:
    from collections.abc import Iterator

Say = Callable[[str], None]
COST_SAMPLES = 16
"""Requests on which a defence's own cost is measured, after a warm-up of two."""


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    model: str
    """Folder, hub id, or `demo`."""
    sets: tuple[Loaded, ...]
    """What is asked."""
    defenses: tuple[str, ...]
    """Names, or stacks with `+`; `none` is always among them."""
    judges: tuple[str, ...]
    """Names of judges."""
    conditions: tuple[Condition, ...] = (Condition.ORIGINAL, Condition.QUERY)
    """Of the untouched model; a defence is measured under `original` alone."""
    anchors: FitData | None = None
    """What defences are fitted on."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by the name of the defence."""
    max_new_tokens: int = 48
    """Length limit of a reply."""
    batch_size: int = 16
    """Requests a batch."""
    seed: int = 0
    """Seed of noise and of the bootstrap."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Of `load_vlm`."""
    rater: str | None = None
    """Chat model that rates open answers (LLaVA-Bench): `chat:MODEL` or `openai:MODEL@URL`."""
    set_conditions: Mapping[str, tuple[Condition, ...]] = field(default_factory=dict)
    """Conditions of single sets, by their name, instead of `conditions`."""

    def __post_init__(self) -> None:
        for what in ("batch_size", "max_new_tokens"):
            if getattr(self, what) < 1:
                raise InputError(f"{what} is {getattr(self, what)}; it is at least 1")
        names = [s.name for s in self.sets]
        if not names or len(set(names)) < len(names):
            raise InputError(f"sets are {names}; name at least one, each once")
        if len(set(self.conditions)) < len(self.conditions):
            raise InputError(f"conditions are {', '.join(self.conditions)}; name each once")
        for name in self.all_defenses:
            for part in make_defense(name, self.settings).parts:
                blind = (
                    [s.id for s in self.anchors.shifted if s.image is None]
                    if self.anchors and part.fits_on_images
                    else []
                )
                if blind:
                    raise InputError(
                        f"{len(blind)} anchors have no image, which {part.name!r} is fitted on (the first: {blind[0]!r})"
                    )
        if not self.judges:
            raise InputError("name at least one judge")
        for name in self.judges:
            judge_maker(name)
        if self.rater is not None:
            check_rater(self.rater)
        if self.anchors is not None:
            tested = {sample.query for loaded in self.sets for sample in loaded.samples}
            shared = [s.id for s in self.anchors.all if s.query in tested]
            if shared:
                raise InputError(
                    f"{len(shared)} anchors are asked in the test sets too (the first: {shared[0]!r}); fit on others"
                )

    @property
    def all_defenses(self) -> tuple[str, ...]:
        """`none` first."""
        return ("none", *(name for name in self.defenses if name != "none"))

    def conditions_of(self, loaded: Loaded) -> tuple[Condition, ...]:
        """Of the untouched model on one set."""
        return self.set_conditions.get(loaded.name, self.conditions)

    def cells(self) -> list[tuple[str, Loaded, Condition]]:
        """(defence, set, condition) of every cell; a set without images, or captions, leaves those conditions out."""
        found = []
        for defense in self.all_defenses:
            for loaded in self.sets:
                for condition in self.conditions_of(loaded) if defense == "none" else (Condition.ORIGINAL,):
                    if possible(loaded, condition):
                        found.append((defense, loaded, condition))
        return found


def expanded_defenses(names: str) -> tuple[str, ...]:
    """A comma list of defences and stacks; `all` is every known one."""
    given = [n.strip() for n in names.split(",") if n.strip()]
    known = defense_names()
    return tuple(dict.fromkeys(name for one in given for name in (known if one == "all" else [one])))


def possible(loaded: Loaded, condition: Condition) -> bool:
    """Whether every sample of a set can be put under a condition."""
    if condition.has_image:
        return all(s.image is not None for s in loaded.samples)
    return condition is not Condition.CAPTION or all(s.caption for s in loaded.samples)


def evaluate(plan: Plan, out: Path, *, say: Say, tick: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Run what is not there yet, and write `out/results.json` (schema `cmrm-grid/1`) from all logs in `out/logs`.

    Killed at any moment, the same call goes on: finished cells are read, replies of finished batches come from `out/replies.db`.

    Raises:
        InputError: a set, defence, judge or anchor cannot be used, or `out` belongs to another run.
    """
    from inspect_ai import eval_set
    from inspect_ai.model import get_model

    vlm = shared_vlm(plan.model, **plan.model_options)
    new = not (out / "plan.json").exists()
    _same_run(plan, vlm, out)
    try:
        for name in plan.all_defenses:
            for part in make_defense(name, plan.settings).parts:
                part.check(vlm)
        for name in (*plan.judges, *([plan.rater] if plan.rater else [])):
            judge_named(name)  # one that cannot be loaded stops the run before anything is generated
        fitted = fit_defenses(plan, vlm, out / "fitted", say=say)
    except CmrmError:
        if new:  # nothing was generated: the mended command may use the folder
            shutil.rmtree(out / "fitted", ignore_errors=True)
            (out / "plan.json").unlink(missing_ok=True)
        raise
    failures: list[str] = []
    for defense in plan.all_defenses:
        tasks = [
            set_task(
                loaded, condition, plan.judges, max_new_tokens=plan.max_new_tokens, batch_size=plan.batch_size,
                seed=plan.seed, rater=plan.rater,
            )
            for name, loaded, condition in plan.cells() if name == defense
        ]  # fmt: skip
        if not tasks:
            continue
        say(f"{defense}: {', '.join(t.name for t in tasks)}")
        model = get_model(
            f"cmrm/{plan.model}", memoize=False, defense=defense, settings=_plain(plan.settings), fitted=str(fitted),
            store=str(out / "replies.db"), batch_size=plan.batch_size, **plan.model_options,
        )  # fmt: skip
        assert isinstance(model.api, CmrmAPI)
        for task in tasks:
            task.metadata = {**(task.metadata or {}), "settings": model.api.defense.settings}
        with _offline(plan.model == DEMO), redirect_stdout(StringIO()):
            done, logs = eval_set(
                tasks, log_dir=str(out / "logs" / defense), model=model, display="none", log_images=False, log_level="error",
                continue_on_fail=True, retry_attempts=1, retry_immediate=True, max_tasks=1,
                max_samples=4 * plan.batch_size, log_dir_allow_dirty=True, score_display=False,
            )  # fmt: skip
        tick(sum(len(t.dataset) for t in tasks))
        if not done:
            failures += [f"{log.eval.task}: {log.error.message if log.error else log.status}" for log in logs
                         if log.status != "success"]  # fmt: skip
    _ask_new_judges(plan, out, say=say)
    say("fluency")
    fluency_of(out).measure(vlm, read_cells(out / "logs"), batch_size=plan.batch_size)
    results: dict[str, Any] = results_of(out, seed=plan.seed) | {
        "model": {"id": plan.model, "architecture": type(vlm.model).__name__, "dtype": str(vlm.model.dtype)},
        "sets": [loaded.to_json() for loaded in plan.sets], "cost": {}, "versions": library_versions(), "failures": failures,
        "seed": plan.seed,
    }  # fmt: skip
    write_json(out / "results.json", results)  # whatever happens while the cost is measured
    results["cost"] = measure_cost(plan, vlm, fitted, say=say)
    write_json(out / "results.json", results)
    return results


def _ask_new_judges(plan: Plan, out: Path, *, say: Say) -> None:
    """Judges of the plan that have not judged a log yet, or failed on a reply, are asked."""
    cells = [cell for cell in read_cells(out / "logs") if cell.samples]
    if not cells:
        return
    samples = [sample for cell in cells for sample in cell.samples.values()]
    new = [
        name for name in plan.judges
        if any(name not in s["verdicts"] or name in s["failed"] for s in samples)
    ]  # fmt: skip
    rated = all(RATING in s["scores"] and RATING not in s["failed"] for s in samples)
    rater = plan.rater if not rated else None
    if new or rater:
        say("judging: " + ", ".join([*new, *([rater] if rater else [])]))
        rescore_logs(out, new, rater=rater)


def fit_defenses(plan: Plan, vlm: VLM, folder: Path, *, say: Say) -> Path:
    """Fit what has to be fitted and is not yet, one file a defence; the folder."""
    wanted: dict[str, Defense] = {}
    done: dict[tuple[type[Defense], tuple[object, ...] | None], Defense] = {}
    for name in plan.defenses:
        for part in make_defense(name, plan.settings).parts:
            if part.needs_fit:
                wanted[part.name] = part
    for name, defense in wanted.items():
        path = folder / f"{name}.safetensors"
        if path.exists():
            defense.load(path, vlm)
            continue
        if plan.anchors is None:
            raise InputError(
                f"the defence {name!r} has to be fitted: say on which anchors (--anchors, --benign-anchors)"
            )
        key = (type(defense), defense.fitted_by)
        if defense.fitted_by is not None and key in done:
            defense.state = done[key].state
        else:
            say(f"fitting {name}")
            defense.fit(vlm, plan.anchors)
            done[key] = defense
        defense.save(path, vlm)
    return folder


def measure_cost(plan: Plan, vlm: VLM, fitted: Path, *, say: Say) -> dict[str, dict[str, float | None]]:
    """What each defence costs a request, measured on a few: prompts and tokens run, seconds; its tensors' bytes, and the peak of
    memory while they are answered, in batches of the plan's size."""
    samples = [s for loaded in plan.sets for s in loaded.samples if s.image is not None and s.label == "harmful"]
    if not samples:
        return {}
    requests = [build_request(s, Condition.ORIGINAL) for s in samples[: COST_SAMPLES + 2]]
    held = requests[2:] or requests
    costs: dict[str, dict[str, float | None]] = {}
    for name in plan.all_defenses:
        say(f"cost of {name}")
        defense = built_defense(vlm, name, plan.settings, fitted=fitted)
        respond(vlm, defense, requests[:2], max_new_tokens=2)
        meter = Meter()

        def answer(batch: list[Request], defense: Defense = defense) -> None:
            respond(vlm, defense, batch, max_new_tokens=plan.max_new_tokens)

        with meter.watching(vlm, len(held)):
            for _ in in_batches(held, min(plan.batch_size, len(held)), answer):
                pass
        size = sum(v.numel() * v.element_size() for part in defense.parts for v in part.state.values())
        costs[name] = {**meter.per_request(), "state_bytes": float(size), "peak_bytes": meter.peak_bytes}
    return costs


def _same_run(plan: Plan, vlm: VLM, out: Path) -> None:
    """Logs of one folder belong together: the same model, sets and settings."""
    held = {
        "model": plan.model, "config": config_hash(vlm), "weights": weights_hash(vlm), "max_new_tokens": plan.max_new_tokens, "seed": plan.seed,
        "batch_size": plan.batch_size, "settings": json.loads(json.dumps(_plain(plan.settings))),
        "anchors": _anchor_hash(plan.anchors), "sets": {s.name: set_hash(s.samples) for s in plan.sets},
    }  # fmt: skip
    path = out / "plan.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before is not None:
            other = [k for k in held if k != "sets" and before.get(k) != held[k]]
            changed = [n for n, h in held["sets"].items() if before.get("sets", {}).get(n, h) != h]
            if other or changed:
                raise InputError(
                    f"{out} holds another run ({', '.join([*other, *changed])} differ); choose another --out, or remove it"
                )
            held["sets"] = {**before.get("sets", {}), **held["sets"]}
    write_json(path, held)


def _anchor_hash(anchors: FitData | None) -> str | None:
    if anchors is None:
        return None
    return set_hash([*_told(anchors.harmful, "h"), *_told(anchors.benign, "b"), *_told(anchors.more, "m")])


def _told(samples: Sequence[Sample], side: str) -> list[Sample]:
    return [Sample(f"{side}:{s.id}", s.query) for s in samples]


def _plain(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in held.items()} for name, held in settings.items()
    }


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
