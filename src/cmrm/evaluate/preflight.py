"""What can be known before a run starts: is everything there, and how long will it take?

Nothing of the run is written, and no weights or data are downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cmrm.defenses import make_defense, respond
from cmrm.engines.base import Decoding
from cmrm.engines.opening import LOCAL
from cmrm.errors import CmrmError
from cmrm.evaluate.defended import fitted_file
from cmrm.evaluate.folder import Folder
from cmrm.evaluate.plan import Plan, possible
from cmrm.evaluate.provider import shared_engine
from cmrm.evaluate.weights import Finding, Weights, disk_finding, model_findings
from cmrm.measure.loop import ask_batches

LEAST_ANCHORS = 2
"""Samples that an estimate of the shift needs."""
REPLY_BYTES = 4096
"""About what a reply takes in logs and store."""


def preflight(plan: Plan, out: Path, *, registered: Weights | None = None) -> list[Finding]:
    """Look at everything that `evaluate` would need.

    `registered` are the weights of a registered model.
    """
    engine = str(plan.model_options.get("engine", LOCAL[0]))
    if engine not in LOCAL:
        there = Finding(f"model {plan.model}", True, f"served at {engine}")
        registered = Weights(0, True, there)
    judges = (*plan.judges, *([plan.rater] if plan.rater else []))
    model, findings = model_findings(
        plan.model, judges, plan.model_options.get("device_map"),
        revision=plan.model_options.get("revision"), registered=registered,
    )  # fmt: skip
    memory = next(finding for finding in findings if finding.subject == "memory")
    findings.append(disk_finding("disk for logs", plan.replies() * REPLY_BYTES, out))
    if out.exists() and not out.is_dir():
        findings.append(Finding("--out", False, f"{out} is a file; name a folder"))
    return [
        _cell_finding(plan), _anchor_finding(plan, out), *findings, _time(plan, model, memory),
    ]  # fmt: skip


def _cell_finding(plan: Plan) -> Finding:
    cells = plan.cells()
    if not cells:
        return Finding("cells", False, "nothing can be asked: no sample has what a condition needs")
    left_out = [
        f"{loaded.name} under {condition.value}"
        for loaded in plan.sets
        for condition in plan.conditions_of(loaded)
        if not possible(loaded, condition)
    ]
    text = f"{len(cells)} cells, {plan.replies()} replies of up to {plan.max_new_tokens} tokens"
    if left_out:
        text += f"; left out, without image or caption: {', '.join(left_out)}"
    return Finding("cells", True, text)


def _anchor_finding(plan: Plan, out: Path) -> Finding:
    """Whether what has to be fitted is fitted already, or can be."""
    folder = Folder(out).fitted
    names = [
        part.name for part in plan.parts()
        if part.needs_fit and not plan.takes_shift(part) and not fitted_file(folder, part).exists()
    ]  # fmt: skip
    anchors = plan.anchors
    if not names:
        return Finding("anchors", True, "nothing has to be fitted")
    if anchors is None or len(anchors.shifted) < LEAST_ANCHORS:
        n = 0 if anchors is None else len(anchors.shifted)
        return Finding(
            "anchors", False,
            f"{', '.join(names)} has to be fitted, on {LEAST_ANCHORS} anchors at least; there are "
            f"{n}",
        )  # fmt: skip
    return Finding(
        "anchors", True,
        f"{len(anchors.harmful)} harmful, {len(anchors.benign)} benign, {len(anchors.more)} "
        f"others; for {', '.join(names)}",
    )  # fmt: skip


def _time(plan: Plan, model: Weights, memory: Finding) -> Finding:
    if not model.local:
        return Finding("time", None, "not measured: the model is not on this machine yet")
    if not model.finding.good:
        return Finding("time", None, "not measured: the model cannot be loaded")
    if not plan.cells():
        return Finding("time", None, "nothing to run")
    if memory.good is False:
        return Finding("time", None, "not measured: there is not enough memory")
    try:
        seconds, rows = time_a_batch(plan)
    except (CmrmError, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding("time", False, f"the model does not answer: {reason}")
    total = _duration(seconds / rows * plan.replies())
    return Finding(
        "time", True,
        f"about {total} of generation, from one batch of {rows} that took {seconds:.1f} s here; "
        "defences and judges add to it",
    )  # fmt: skip


def time_a_batch(plan: Plan, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Seconds and rows of one batch of the first cell, by the untouched model, after a warm-up."""
    engine = shared_engine(plan.model, **plan.model_options)
    for part in plan.parts():
        part.check(engine)
    _, loaded, condition = plan.cells()[0]
    batches = ask_batches(loaded.samples, condition, seed=plan.seed, batch_size=plan.batch_size)
    requests = [ask.request for ask in next(batches)]
    untouched = make_defense("none")
    respond(engine, untouched, requests[:1], Decoding(1))
    start = clock()
    respond(engine, untouched, requests, Decoding(plan.max_new_tokens))
    return clock() - start, len(requests)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
