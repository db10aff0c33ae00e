"""`cmrm demo`: from nothing to a table, a results file and a report."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cmrm.shift.artifact import Recommended, ShiftVectors, library_versions
from cmrm.prompts.conditions import FIVE, Condition
from cmrm.demo.vlm import demo_checkpoint
from cmrm.demo.ledger import Ledger
from cmrm.demo.measure import Bench, Defense, Tick, defenses, work
from cmrm.prompts.ours.samples import prompt_samples, vqa_samples
from cmrm.demo.settings import CORRUPTION, DATASET_STEERING, ESTIMATOR, SAMPLE_STEERING, Budget
from cmrm.errors import CmrmError, InputError
from cmrm.measure.rates import Rate
from cmrm.files import write_json
from cmrm.judges import KeywordJudge
from cmrm.model.vlm import VLM, load_vlm
from cmrm.prompts.sample import Sample
from cmrm.shift.estimate import estimate_shift

SCHEMA = "cmrm-demo-results/1"
SHOWN_WORDS = 6
"""Words of a harmful request, and of the reply to it, that a report shows."""

Say = Callable[[str], None]


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
        raise InputError(f"cannot write to {out}: {error.strerror or error}; name another folder with --out") from error
    return out / "state"


def run_demo(out: Path, budget: Budget, *, say: Say, tick: Tick, start: Callable[[int], None]) -> dict[str, Any]:
    """Measure everything and write `results.json`, `shift.safetensors`, the PNGs and `report.html` into `out`.

    Finished stages are kept under `out/state`: a run that was stopped goes on from there. `start(total)` is told the
    number of prompts before the first one runs.
    """
    from cmrm.report.page import write_report
    from cmrm.report.plots import write_plots

    state = prepare_out(out)
    say("assembling the demo VLM (once, into the cache)")
    checkpoint = demo_checkpoint()
    vlm = load_vlm(checkpoint, dtype=torch.bfloat16)
    context = {
        "model": checkpoint.name,
        "versions": library_versions(),
        "estimator": ESTIMATOR,
        "corruption": CORRUPTION,
    }
    ledger = Ledger(state, context)
    start(work(budget))
    bench = Bench(vlm, ledger, budget, tick)
    shift = _shift(vlm, state, budget, tick)
    shift.save(out / "shift.safetensors")
    results = measure(bench, shift, say=say) | {"model": _model_block(vlm, checkpoint)}
    say("writing the report")
    write_json(out / "results.json", results)
    plots = write_plots(results, out)
    write_report(results, plots, out / "report.html")
    return results


def measure(bench: Bench, shift: ShiftVectors, *, say: Say) -> dict[str, Any]:
    """All figures of one run, as `results.json` holds them (docs/results-schema.md)."""
    budget = bench.budget
    harmful = prompt_samples("test", "harmful", per_category=budget.per_category)
    benign = prompt_samples("test", "benign", per_category=budget.per_category)
    rows = defenses(shift)
    untouched = rows["none"]
    conditions: dict[str, Rate] = {}
    for condition in FIVE:
        say(f"unsafe rate, {condition.value}")
        conditions[condition.value] = bench.unsafe(harmful, condition, untouched)
    unsafe: dict[str, Rate] = {}
    over: dict[str, dict[str, Any]] = {"text": {}, "image": {}}
    utility: dict[str, Any] = {}
    questions = vqa_samples("test", n=budget.vqa, seed=budget.seed)
    over["text"]["none"] = bench.over_refusal(benign, Condition.QUERY, untouched).to_json()
    for name, defense in rows.items():
        say(f"unsafe rate, over-refusal, utility: {name}")
        unsafe[name] = bench.unsafe(harmful, Condition.ORIGINAL, defense)
        over["image"][name] = bench.over_refusal(benign, Condition.ORIGINAL, defense).to_json()
        utility[name] = bench.vqa_accuracy(questions, defense).to_json("accuracy")
    say("unsafe rate over alpha")
    swept = prompt_samples("test", "harmful", per_category=budget.sweep_per_category)
    sweep = bench.sweep(swept, rows["cmrm_dataset"])
    say("geometry of the five conditions")
    geometry = bench.geometry(prompt_samples("test", "harmful", per_category=budget.geometry_per_category))
    gap = _share(conditions["original"]) - _share(conditions["query"])
    return {
        "schema": SCHEMA,
        "conditions": {k: v.to_json("unsafe_rate") for k, v in conditions.items()},
        "defenses": {
            k: {**v.to_json("unsafe_rate"), "gap_closed": _closed(conditions["original"], v, gap)}
            for k, v in unsafe.items()
        },
        "gap": round(gap, 6),
        "over_refusal": over,
        "utility": {"easy_vqa": utility},
        "per_category": _per_category(bench, harmful, rows),
        "alpha_sweep": sweep,
        "geometry": geometry,
        "examples": _examples(bench, harmful, rows),
        "settings": {
            "budget": asdict(budget),
            "cmrm_dataset": asdict(DATASET_STEERING) | {"estimator": ESTIMATOR},
            "cmrm_sample": asdict(SAMPLE_STEERING),
            "corruption": CORRUPTION,
            "chosen_on": "anchor split",
            "judge": KeywordJudge.name,
            "decoding": "greedy",
        },
        "shift": {
            "n_anchors": shift.provenance.n_anchors,
            "norms": list(shift.provenance.norms),
            "explained_ratio": list(shift.provenance.explained_ratio),
        },
        "seeds": {"noise_and_questions": budget.seed},
        "versions": library_versions() | {"python": platform.python_version()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def _shift(vlm: VLM, state: Path, budget: Budget, tick: Tick) -> ShiftVectors:
    """The vectors of this run, kept under `state` as soon as they are estimated."""
    anchors = prompt_samples("anchor", "harmful")
    kept = state / "shift.safetensors"
    recommended = Recommended(**asdict(DATASET_STEERING))
    if kept.is_file():
        try:
            held = ShiftVectors.load(kept)
            held.check(vlm)
            same = (held.recommended, held.provenance.estimator, held.provenance.versions) == (
                recommended, ESTIMATOR, library_versions()
            )  # fmt: skip
            if same and held.provenance.model_id == vlm.model_id:
                tick(2 * len(anchors))
                return held
        except CmrmError:
            kept.unlink()
    shift = estimate_shift(
        vlm,
        anchors,
        estimator=ESTIMATOR,
        corruption=CORRUPTION,
        seed=budget.seed,
        batch_size=budget.batch_size,
        recommended=recommended,
        on_batch=tick,
    )
    shift.save(kept)
    return shift


def _share(rate: Rate) -> float:
    if rate.rate is None:
        raise CmrmError(f"the judge scored none of {rate.unscored} replies; no rate can be given")
    return rate.rate


def _closed(original: Rate, defended: Rate, gap: float) -> float | None:
    """Share of the gap (original minus query) that a defence closes; None where there is no gap to close."""
    if gap <= 0:
        return None
    return round((_share(original) - _share(defended)) / gap, 6)


def _per_category(bench: Bench, harmful: list[Sample], rows: dict[str, Defense]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    cells = {"query": (Condition.QUERY, rows["none"])} | {k: (Condition.ORIGINAL, v) for k, v in rows.items()}
    for cell, (condition, defense) in cells.items():
        verdicts = bench.verdicts(harmful, condition, defense)[1]
        for sample, verdict in zip(harmful, verdicts, strict=True):
            entry = table.setdefault(str(sample.category), {}).setdefault(
                cell, {"refused": 0, "complied": 0, "unscored": 0}
            )
            entry[verdict.value] += 1
    return table


def _examples(bench: Bench, harmful: list[Sample], rows: dict[str, Defense]) -> list[dict[str, str]]:
    """The first request of each category with the verdict per cell; texts are cut to their first words."""
    cells = {"query": (Condition.QUERY, rows["none"])} | {k: (Condition.ORIGINAL, v) for k, v in rows.items()}
    found = {cell: bench.verdicts(harmful, *where) for cell, where in cells.items()}
    seen: set[str] = set()
    examples = []
    for k, sample in enumerate(harmful):
        if str(sample.category) in seen:
            continue
        seen.add(str(sample.category))
        entry = {"category": str(sample.category), "request": first_words(sample.query)}
        for cell, (texts, verdicts) in found.items():
            entry[cell] = f"{verdicts[k].value}: {first_words(texts[k])}"
        examples.append(entry)
    return sorted(examples, key=lambda e: e["category"])


def first_words(text: str, n: int = SHOWN_WORDS) -> str:
    """The first `n` words of `text` on one line, with an ellipsis where it was cut."""
    words = text.split()
    return " ".join(words[:n]) + (" ..." if len(words) > n else "")


def _model_block(vlm: VLM, checkpoint: Path) -> dict[str, Any]:
    return {
        "name": "cmrm demo VLM",
        "checkpoint": checkpoint.name,
        "architecture": type(vlm.model).__name__,
        "decoder_layers": vlm.n_layers,
        "hidden_size": vlm.hidden_size,
        "parameters": sum(p.numel() for p in vlm.model.parameters()),
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
    }
