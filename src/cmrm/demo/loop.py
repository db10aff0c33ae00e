"""`cmrm demo`: the demo VLM measured with and without its image, with and without CMRM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cmrm.defenses import Defense
from cmrm.demo import DEMO
from cmrm.demo.levels import (
    dataset_level,
    fill_level,
    gated_level,
    mixed_level,
    sample_level,
    shift_of_run,
    untouched,
)
from cmrm.demo.settings import (
    ALPHAS,
    ANSWER_TOKENS,
    DATASET_STEERING,
    SAMPLE_STEERING,
    Budget,
)
from cmrm.engines.base import Decoding
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.files import atomic_path, write_json
from cmrm.judges import DEFAULT_JUDGE, Judge, make_judge
from cmrm.measure.environment import (
    machine_info,
    model_info,
    shift_info,
    versions_info,
)
from cmrm.measure.examples import examples_of
from cmrm.measure.geometry import Compass, represent
from cmrm.measure.loop import Answering, measure_cell
from cmrm.measure.outcomes import Cell, joined, kind_of
from cmrm.measure.schema import checked
from cmrm.measure.store import ReplyStore
from cmrm.measure.table import cell_row, results_of
from cmrm.model.vlm import load_vlm
from cmrm.prompts import Loaded
from cmrm.prompts.conditions import FIVE, Condition
from cmrm.prompts.easy_vqa import vqa_samples
from cmrm.prompts.ours import prompt_samples
from cmrm.prompts.sample import Sample
from cmrm.prompts.splits import set_hash
from cmrm.shift.artifact import ShiftVectors

Say = Callable[[str], None]
Tick = Callable[[int], None]

VQA = "easy-vqa"
"""Name of the set of visual questions."""
HARM = "text"
"""Where the harm of our own prompts is."""
NOTES = (
    "the recipe of the demo's weights was chosen with a look at this split: the gap between text "
    "and image is partly selected on it (see the model card)",
)
"""Stated beside the results."""


@dataclass(frozen=True)
class Prompts:
    """Samples of one run."""

    anchors: Sequence[Sample]
    """Harmful requests that the shift is estimated on."""
    lookalikes: Sequence[Sample]
    """Benign look-alikes that direction and gate are fitted on, and the mixed shift."""
    harmful: Sequence[Sample]
    """Harmful requests of the test split."""
    benign: Sequence[Sample]
    """Benign look-alikes of the test split."""
    questions: Sequence[Sample]
    """Visual questions with their answers."""
    swept: Sequence[Sample]
    """Harmful requests of the alpha sweep."""
    drawn: Sequence[Sample]
    """Harmful requests whose states are plotted."""
    drawn_benign: Sequence[Sample]
    """Benign look-alikes, for what the harm gate reads."""

    @classmethod
    def of(cls, budget: Budget) -> Prompts:
        """The samples that a budget pays for."""
        some = budget.geometry_per_category
        return cls(
            anchors=prompt_samples("anchor", "harmful", per_category=budget.anchors_per_category),
            lookalikes=prompt_samples("anchor", "benign", per_category=budget.anchors_per_category),
            harmful=prompt_samples("test", "harmful", per_category=budget.per_category),
            benign=prompt_samples("test", "benign", per_category=budget.per_category),
            questions=visual_questions("test", budget.vqa, seed=budget.seed),
            swept=prompt_samples("test", "harmful", per_category=budget.sweep_per_category),
            drawn=prompt_samples("test", "harmful", per_category=some),
            drawn_benign=prompt_samples("test", "benign", per_category=some),
        )

    def passes(self, budget: Budget) -> int:
        """Prompts that the run passes through the model, for its progress bar."""
        both = len(self.harmful) + len(self.benign)
        defenses = 5 if budget.mixed else 4
        defended = defenses * (both + len(self.questions)) + len(self.questions)
        untouched = len(FIVE) * len(self.harmful) + 2 * len(self.benign)
        return defended + untouched + self.states(defenses) + len(ALPHAS) * len(self.swept)

    def states(self, defenses: int) -> int:
        """Prompts whose states are read, of them under so many defences."""
        return (len(FIVE) + defenses) * len(self.drawn) + 2 * len(self.drawn_benign)


def visual_questions(published: str, n: int | None, *, seed: int = 0) -> list[Sample]:
    """easy-VQA questions of a published split as samples with their answers; see `vqa_samples`."""
    drawn = vqa_samples(published, n=n, seed=seed)
    return [replace(sample, answer=answer) for sample, answer in drawn]


GEOMETRY = 2
"""Form of the stored geometry."""
JUDGES = (DEFAULT_JUDGE, "keyword")
"""Judges of the demo; rates that are printed are the first one's."""


class Bench:
    """The demo's measurements: one engine, one budget, two judges, one store of replies."""

    def __init__(
        self,
        engine: TransformersEngine,
        budget: Budget,
        store: ReplyStore | None = None,
        tick: Tick = lambda n: None,
    ) -> None:
        """`tick` is called after each batch with its number of prompts."""
        self.engine = engine
        self.budget = budget
        self.store = store
        self.tick = tick
        self.judges: dict[str, Judge] = {name: make_judge(name) for name in JUDGES}

    def cell(
        self,
        samples: Sequence[Sample],
        defense: Defense,
        condition: Condition = Condition.ORIGINAL,
        *,
        name: str = DEMO,
    ) -> Cell:
        """Judged replies to samples; harmful, benign and visual ones are never in one batch."""
        by_kind: dict[str, list[Sample]] = {}
        for sample in samples:
            by_kind.setdefault(kind_of(sample), []).append(sample)
        parts = []
        for kind, part in by_kind.items():
            tokens = ANSWER_TOKENS if kind == "utility" else self.budget.max_new_tokens
            parts.append(
                measure_cell(
                    Answering(self.engine, defense, Decoding(tokens), self.store),
                    part,
                    self.judges,
                    name=name,
                    condition=condition,
                    harm=None if kind == "utility" else HARM,
                    batch_size=self.budget.batch_size,
                    seed=self.budget.seed,
                    on_batch=self.tick,
                )
            )
        return joined(parts)

    def rates(self, cell: Cell) -> dict[str, Any]:
        """`unsafe`, `over_refusal` and `accuracy` of a cell, in the form of `measure.rates.Rate`.

        Those without samples are absent.
        """
        row = cell_row(cell, [DEFAULT_JUDGE])
        judged = row["judges"][DEFAULT_JUDGE]
        named = {**judged, "accuracy": row["accuracy"]}
        return {
            name: named[name] for name in ("unsafe", "over_refusal", "accuracy") if named.get(name)
        }

    def sweep(self, samples: Sequence[Sample], shift: ShiftVectors) -> list[dict[str, Any]]:
        """Unsafe rate with the original image at each of `ALPHAS`, dataset level."""
        points = []
        for alpha in ALPHAS:
            defense = dataset_level(shift, replace(DATASET_STEERING, alpha=alpha))
            rate = self.rates(self.cell(samples, defense))["unsafe"]
            points.append({"alpha": alpha, "defense": defense.name, "judge": DEFAULT_JUDGE, **rate})
        return points

    def geometry(
        self, prompts: Prompts, defenses: Sequence[Defense], shift: ShiftVectors, file: Path
    ) -> dict[str, Any]:
        """Where the states of the five conditions and of the defences lie; from `file` where it
        holds them."""
        budget = self.budget
        samples, lookalikes = prompts.drawn, prompts.drawn_benign
        inputs = [
            self.engine.context(), set_hash([*samples, *lookalikes]), budget.seed,
            budget.batch_size, GEOMETRY, [(d.name, d.settings, d.fingerprint()) for d in defenses],
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        stored = _stored(file, key)
        if stored is not None:
            self.tick(prompts.states(len(defenses)))
            return stored
        gates = [defense.gate for defense in defenses if defense.gate is not None]
        compass = Compass(shift.direction, gates[0] if gates else shift.gate)
        shared: dict[str, Any] = {
            "batch_size": budget.batch_size, "seed": budget.seed, "compass": compass,
            "on_batch": self.tick,
        }  # fmt: skip
        states = represent(self.engine, samples, FIVE, defenses=defenses, drawing=True, **shared)
        benign = represent(self.engine, lookalikes, (Condition.QUERY, Condition.ORIGINAL), **shared)
        states.scores |= benign.scores
        geometry = states.to_geometry(self.engine)
        write_json(file, {"key": key, "geometry": geometry})
        return geometry


def _stored(file: Path, key: str) -> dict[str, Any] | None:
    """The geometry that `file` holds under `key`; None without one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        geometry: dict[str, Any] = content["geometry"]
        return geometry if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prepare_out(out: Path) -> Path:
    """Make the output folder; return its `state` folder.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        (out / "state").mkdir(parents=True, exist_ok=True)
        probe = out / "state" / ".probe"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot write to {out}: {reason}; name another folder with --out"
        ) from error
    return out / "state"


def run_demo(
    out: Path, budget: Budget, *, say: Say, tick: Tick, start: Callable[[int], None]
) -> dict[str, Any]:
    """Measure everything; write results, artifact, figures, table and page into `out`.

    Replies, shift and states are stored under `out/state`: the same call after a kill continues,
    and measures nothing twice.

    Args:
        out: folder.
        budget: size of the run.
        say: called with a line on what is being done.
        tick: called with the number of prompts that were finished.
        start: called with the number of all prompts before the first one.

    Raises:
        InputError: `out` cannot be written to.
        MissingExtraError: a library of the extra `demo` is not installed.
    """
    from cmrm.report.balance import balance_table
    from cmrm.report.headline import headline_table
    from cmrm.report.page import write_report
    from cmrm.report.tables import markdown

    state = prepare_out(out)
    say("assembling the demo VLM (once, into the cache)")
    engine = TransformersEngine(load_vlm(DEMO))
    prompts = Prompts.of(budget)
    start(prompts.passes(budget))
    bench = Bench(engine, budget, ReplyStore(state / "replies.db"), tick)
    say("states of anchors")
    fitted_on = (engine, budget, prompts.anchors, prompts.lookalikes, state)
    shift = shift_of_run(*fitted_on)
    shift.save(out / "shift.safetensors")
    mixed = shift_of_run(*fitted_on, mixed=True) if budget.mixed else None
    results = measure(bench, prompts, shift, mixed, state, say=say)
    write_json(out / "results.json", results)
    say("writing the report")
    with atomic_path(out / "table.md") as part:
        tables = (headline_table(results), balance_table(results))
        part.write_text("\n".join(map(markdown, tables)), encoding="utf-8")
    write_report(results, out)
    return results


def measure(
    bench: Bench,
    prompts: Prompts,
    shift: ShiftVectors,
    mixed: ShiftVectors | None,
    state: Path,
    *,
    say: Say,
) -> dict[str, Any]:
    """All results of one run, in the form of `measure.schema.Results`.

    `mixed`: the shift of harmful and benign anchors together; None: not measured.
    """
    defenses: list[Defense] = [
        dataset_level(shift, DATASET_STEERING),
        *([] if mixed is None else [mixed_level(mixed, DATASET_STEERING)]),
        sample_level(SAMPLE_STEERING),
        fill_level(shift),
        gated_level(shift),
    ]
    both = [*prompts.harmful, *prompts.benign]
    cells = []
    for condition in FIVE:
        say(f"replies, {condition.value}")
        whole = condition in (Condition.ORIGINAL, Condition.QUERY)
        cells.append(bench.cell(both if whole else prompts.harmful, untouched(), condition))
    for defense in defenses:
        say(f"replies, {defense.name}")
        cells.append(bench.cell(both, defense))
    for defense in [untouched(), *defenses]:
        say(f"visual questions, {defense.name}")
        cells.append(bench.cell(prompts.questions, defense, name=VQA))
    say("unsafe rate over alpha")
    sweep = bench.sweep(prompts.swept, shift)
    say("states of the five conditions and of the defences")
    geometry = bench.geometry(prompts, defenses, shift, state / "geometry.json")
    budget = bench.budget
    sets = [
        Loaded(DEMO, tuple(both), notes=NOTES, harm=HARM),
        Loaded(VQA, tuple(prompts.questions)),
    ]
    return checked({
        **results_of(cells, seed=budget.seed),
        "kind": "demo",
        "model": model_info(bench.engine, DEMO),
        "sets": [loaded.to_json() for loaded in sets],
        "settings": {
            "budget": asdict(budget),
            **{defense.name: defense.settings for defense in defenses},
            "chosen_on": "anchor split",
            "decoding": "greedy",
        },
        "seed": budget.seed,
        "versions": versions_info(),
        "machine": machine_info(),
        "examples": examples_of(cells),
        "geometry": geometry,
        "alpha_sweep": sweep,
        "shift": shift_info(shift),
    })  # fmt: skip
