"""vLLM's model runners, armed with a program.

It fails closed. vLLM does not start where a version is untested, a feature was not shown to be
right, or a decoder layer is not armed. A step with a request of which nothing is known raises,
instead of an answer that is not steered.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cmrm.engines.vllm.board import Board
from cmrm.engines.vllm.filling import record_texts
from cmrm.engines.vllm.matching import check_loaded
from cmrm.engines.vllm.patches import (
    check_features,
    check_version,
    keep_steered_blocks_apart,
    refuse_beams,
    salt_compilations,
    salt_requests,
    wrap,
)
from cmrm.engines.vllm.program import Program
from cmrm.engines.vllm.self_test import self_test
from cmrm.engines.vllm.stepping import State, before_dummy, before_step, state_of
from cmrm.errors import InputError, ModelError
from cmrm.model.identity import Identity
from cmrm.shift.artifact import ShiftVectors

LAYERS = (
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
)  # fmt: skip
"""Classes of decoder layers whose two outputs add up to the residual stream."""
MARGIN = 512
"""Tokens of padding that a captured graph may have beyond those of a batch."""
SLOTS = 8
"""Decisions that are held, for each request that a batch can have."""
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)$")
_log = logging.getLogger("cmrm.vllm")


@dataclass
class _Armed:
    """What this process arms its model with."""

    program: Program
    identity: Identity | None
    """Of the model that the artifact was estimated on; not looked at where the program `changes`:
    the engine compares files then."""
    changes: bool = False
    """Whether programs come and go while vLLM runs (`engines.vllm.engine`), eager alone."""


_state: dict[str, _Armed] = {}


def arm_vllm() -> None:
    """Patch vLLM's runners in this process, once: with the artifact in `CMRM_SHIFT`, or without a
    program, for one that comes later, where there is none.

    Raises:
        InputError: the version is not tested, or the setting cannot be used.
        ArtifactError: the artifact is damaged.
    """
    if _state:
        return
    if os.environ.get("CMRM_SHIFT"):
        program, shift = program_of(os.environ)
        armed = _Armed(program, shift.identity)
    else:
        armed = _Armed(Program("last", {}), None, changes=True)
    check_version()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    _state["armed"] = armed
    from vllm.config import VllmConfig
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    salt_compilations(VllmConfig, armed.program.key)
    fills = bool(armed.program.fills)  # without programs that change, which fill as their engine
    salt_requests(Request, armed.program.key if armed.changes else None, fills=fills)
    if not armed.changes:
        keep_steered_blocks_apart(kv_cache_utils, armed.program.positions)
    if fills:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

        record_texts(OpenAIServingChat)
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    refuse_beams(BeamSearchOfflineMixin, BeamSearchOnlineMixin)
    for runner in (GPUModelRunner, CPUModelRunner):
        if "load_model" in vars(runner):
            wrap(runner, "load_model", _after_loading)
    wrap(GPUModelRunner, "_preprocess", before_step)
    wrap(GPUModelRunner, "_dummy_run", before_dummy)
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    for worker in (Worker, CPUWorker):
        if "compile_or_warm_up_model" in vars(worker):
            wrap(worker, "compile_or_warm_up_model", _after_warm_up)
    Worker.cmrm_status = status
    Worker.cmrm_outcome = outcome
    if armed.changes:
        Worker.cmrm_arm = arm_again
        Worker.cmrm_take = take
    for name in ("reload_weights", "update_weights"):
        if hasattr(Worker, name):
            wrap(Worker, name, _not_while_armed)


def program_of(environment: Mapping[str, str]) -> tuple[Program, ShiftVectors]:
    """The program and its artifact, from `CMRM_SHIFT` and `CMRM_STEERING`, which changes what the
    artifact recommends.

    Raises:
        InputError, ArtifactError: they cannot be used.
    """
    shift = ShiftVectors.from_pretrained(environment["CMRM_SHIFT"])
    steering = shift.recommended
    text = environment.get("CMRM_STEERING")
    if text:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"CMRM_STEERING is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError("CMRM_STEERING is no JSON object of settings")
        steering = steering.changed(values)
    return Program.of(shift, steering), shift


def is_armed_with_artifact() -> bool:
    """Whether this process arms every vLLM with the artifact in `CMRM_SHIFT`."""
    armed = _state.get("armed")
    return bool(os.environ.get("CMRM_SHIFT")) or (armed is not None and not armed.changes)


def _after_loading(original: Callable[..., Any], runner: Any, *args: Any, **more: Any) -> Any:
    outcome = original(runner, *args, **more)
    _arm(runner, _state["armed"])
    return outcome


def _not_while_armed(original: Callable[..., Any], worker: Any, *args: Any, **more: Any) -> Any:
    raise ModelError("cmrm: weights are not changed while a server is armed; start it again")


def _arm(runner: Any, armed: _Armed) -> None:
    """Give every steered decoder layer its step.

    Raises:
        ModelError: a feature was not shown to be right, or a layer cannot be armed.
        ArtifactError: the artifact is another model's.
    """
    check_features(runner)
    if armed.changes and not runner.model_config.enforce_eager:
        raise ModelError("cmrm: programs that change need vLLM eager; set enforce_eager")
    program, config = armed.program, runner.model_config.hf_text_config
    program.check(config.num_hidden_layers, config.hidden_size)
    board = Board(
        runner.max_num_tokens + MARGIN, SLOTS * runner.max_num_reqs, len(program.fills),
        runner.device, gated=program.gate is not None,
    )  # fmt: skip
    layers = _layers(runner, config.num_hidden_layers)
    if not armed.changes:
        check_loaded(layers, armed.identity)
    for number in program.layers:
        layer = layers[number]
        _patch(type(layer))
        layer.cmrm_step = program.step(number, runner.model_config.dtype, runner.device)
        layer.cmrm_board = board
    runner.cmrm_layers = {number: layers[number] for number in program.layers}
    runner.cmrm_sums = {number: _sum(layers[number]) for number in program.layers}
    runner.cmrm_state = State(program, board)
    runner.cmrm_state.eager = bool(runner.model_config.enforce_eager)
    runner.cmrm_state.remembers = os.environ.get("CMRM_REMEMBERS") == "1"
    _log.warning(
        "cmrm: %d of %d decoder layers armed, positions %s, gate %s, program %s",
        len(program.layers), len(layers), program.positions,
        "none" if program.gate is None else f"at layer {program.gate.layers[-1]}",
        program.key[:12],
    )  # fmt: skip


def _layers(runner: Any, count: int) -> dict[int, Any]:
    """Decoder layers by number.

    Raises:
        ModelError: they are not all there, or of a class that is not known.
    """
    model = runner.model
    backbone = model.get_language_model() if hasattr(model, "get_language_model") else model
    layers: dict[int, Any] = {}
    for name, module in backbone.named_modules():
        match = _PLACE.search(name)
        if match is not None:
            layers[int(match[1])] = module
    unknown = sorted({type(layer).__name__ for layer in layers.values()} - set(LAYERS))
    if unknown:
        raise ModelError(
            f"decoder layers of the class {', '.join(unknown)} are not tested with cmrm; tested: "
            f"{', '.join(LAYERS)}"
        )
    if sorted(layers) != list(range(count)):
        raise ModelError(f"{len(layers)} of {count} decoder layers were found; not armed")
    return layers


def _patch(kind: type) -> None:
    """Let a class of decoder layers run its instances' steps."""
    if getattr(kind, "cmrm_patched", False):
        return
    original = kind.forward  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        hidden, residual = original(self, *args, **more)
        step = getattr(self, "cmrm_step", None)
        if step is not None:
            hidden = step(hidden, residual, self.cmrm_board)
        return hidden, residual

    kind.forward = forward  # type: ignore[attr-defined]
    kind.cmrm_patched = True  # type: ignore[attr-defined]


def status(worker: Any) -> dict[str, Any]:
    """What a worker says of its steering: the program, and tokens so far."""
    runner = worker.model_runner
    state = state_of(runner)
    armed = _state["armed"]
    lost = [n for n, layer in runner.cmrm_layers.items() if _sum(layer) != runner.cmrm_sums[n]]
    if lost:
        raise ModelError(f"cmrm: the vectors of decoder layers {lost[:5]} are not what they were")
    return {
        "armed": True, "program": armed.program.key, "positions": armed.program.positions,
        "layers": len(armed.program.layers), "gated": armed.program.gate is not None,
        **state.counts,
    }  # fmt: skip


def arm_again(worker: Any, program: bytes) -> str:
    """Arm a worker with another program (`Program.to_bytes`), and show that it works; its key.

    Raises:
        ModelError, InputError: it does not, or the model cannot be armed with it.
    """
    runner, armed = worker.model_runner, _state["armed"]
    for layer in runner.cmrm_layers.values():
        for name in ("cmrm_step", "cmrm_board"):
            vars(layer).pop(name, None)
    armed.program = Program.from_bytes(program)
    _arm(runner, armed)
    self_test(runner)
    return armed.program.key


def outcome(worker: Any, part: str) -> dict[str, Any] | None:
    """What happened to a request; see `stepping.State.outcome_of`."""
    return state_of(worker.model_runner).outcome_of(part)


def take(worker: Any) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Outcomes and records of the requests so far; see `stepping.State`."""
    state = state_of(worker.model_runner)
    return state.taken_outcomes(), state.taken_records()


def _sum(layer: Any) -> float:
    """A checksum of what a layer holds; NaN, which equals nothing, where it holds no step."""
    step = getattr(layer, "cmrm_step", None)
    if step is None:
        return float("nan")
    parts = [part for part in (step.add, step.fill, step.read) if part is not None]
    return float(sum(part.double().abs().sum() for part in parts))


def _after_warm_up(original: Callable[..., Any], worker: Any, *args: Any, **more: Any) -> Any:
    outcome = original(worker, *args, **more)
    runner = worker.model_runner
    if not getattr(runner, "cmrm_tested", False):
        self_test(runner)
        runner.cmrm_tested = True
    return outcome
