"""vLLM's model runners, armed with a program. Written for the versions in `TESTED`.

It fails closed. vLLM does not start where a version is untested, a feature was not shown to be
right, or a decoder layer is not armed. A step with a request of which nothing is known raises,
instead of an answer that is not steered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cmrm.engines.vllm.board import Board, Row
from cmrm.engines.vllm.program import Program
from cmrm.errors import InputError, ModelError
from cmrm.shift.artifact import ShiftVectors
from cmrm.steering.setting import Steering

TESTED = ("0.32",)
"""Versions of vLLM, major and minor, that the parity contract was run on."""
LAYERS = (
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
)  # fmt: skip
"""Classes of decoder layers whose two outputs add up to the residual stream."""
MARGIN = 512
"""Tokens of padding that a captured graph may have beyond those of a batch."""
SLOTS = 8
"""Decisions that are held, for each request that a batch can have."""
SELF_TEST_TOKENS = 8
"""Of the passes that show at the start that steering works."""
SELF_TEST_TARGET = 1e3
"""Coordinate that `fill` is asked for there."""
MOST_RECORDS = 10_000
"""Recorded coordinates that wait for their request; the oldest ones go first."""
REQUEST_KEY = "cmrm"
"""Of `SamplingParams.extra_args`: `{"record": name}`, `{"target": name}`."""
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)$")
_log = logging.getLogger("cmrm.vllm")


@dataclass
class _Armed:
    """One process's program, and what its runner knows of requests."""

    program: Program
    identity: Any
    """`model.identity.Identity` of the artifact, or None."""


_state: dict[str, _Armed] = {}


def arm_vllm() -> None:
    """Patch vLLM's runners in this process, once.

    Raises:
        InputError: the version is not tested, or the setting cannot be used.
        ArtifactError: the artifact is damaged.
    """
    if _state:
        return
    program, shift = program_of(os.environ)
    check_version()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    _state["armed"] = _Armed(program, shift.identity)
    from vllm.config import VllmConfig
    from vllm.v1.request import Request
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _salt_compilations(VllmConfig, program.key)
    _salt_requests(Request, program.key)
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    _refuse_beams(BeamSearchOfflineMixin, BeamSearchOnlineMixin)
    for runner in (GPUModelRunner, CPUModelRunner):
        if "load_model" in vars(runner):
            _wrap(runner, "load_model", _after_loading)
    _wrap(GPUModelRunner, "_preprocess", _before_step)
    _wrap(GPUModelRunner, "_dummy_run", _before_dummy)
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    for worker in (Worker, CPUWorker):
        if "compile_or_warm_up_model" in vars(worker):
            _wrap(worker, "compile_or_warm_up_model", _after_warm_up)
    Worker.cmrm_status = status
    for name in ("reload_weights", "update_weights"):
        if hasattr(Worker, name):
            _wrap(Worker, name, _not_while_armed)


def program_of(environment: Mapping[str, str]) -> tuple[Program, ShiftVectors]:
    """The program and its artifact, from `CMRM_SHIFT` and `CMRM_STEERING`.

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
        steering = Steering.from_json(values)
    return Program.of(shift, steering), shift


def check_version() -> str:
    """vLLM's version.

    Raises:
        InputError: it is none of `TESTED`, or the untested second model runner is asked for.
    """
    import vllm

    version = str(vllm.__version__)
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise InputError(
            f"vLLM {version} is not tested with cmrm (tested: {', '.join(TESTED)}): its requests "
            "could go unsteered; install a tested version"
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("", "0"):
        raise InputError("VLLM_USE_V2_MODEL_RUNNER: that model runner is not armed; unset it")
    return version


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **more: Any) -> Any:
        return around(original, self, *args, **more)

    setattr(owner, name, method)


def _salt_compilations(config: Any, key: str) -> None:
    """Compiled graphs of another program are never used."""
    original = config.compute_hash

    def compute_hash(self: Any, *args: Any, **more: Any) -> str:
        text = f"{original(self, *args, **more)} cmrm {key}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    config.compute_hash = compute_hash


def _salt_requests(request: Any, key: str) -> None:
    """Cached blocks of an image request are shared with no other: its tokens may be steered.

    A request that cannot be steered rightly fails here, alone.
    """
    original = request.from_engine_core_request.__func__

    def from_engine_core_request(cls: Any, made: Any, *args: Any, **more: Any) -> Any:
        _check_request(made)
        if made.mm_features:
            made.cache_salt = f"cmrm {key} {made.request_id}"
        return original(cls, made, *args, **more)

    request.from_engine_core_request = classmethod(from_engine_core_request)


def _check_request(made: Any) -> None:
    """Refuse a request whose steering was not shown to be right.

    Raises:
        ModelError: it carries something else than images, or grows while it is answered.
    """
    others = sorted({part.modality for part in made.mm_features or ()} - {"image"})
    if others:
        raise ModelError(f"cmrm: the request carries {', '.join(others)}; images alone are tested")
    if getattr(made, "resumable", False) or made.prompt_embeds is not None:
        raise ModelError("cmrm: requests that grow, or that are embeddings, are not tested")


def _refuse_beams(*owners: Any) -> None:
    """Each step of vLLM's beam search is a new request whose prompt ends with what was generated:
    which of its tokens are generated cannot be known."""

    def refuse(*args: Any, **more: Any) -> Any:
        raise ValueError("cmrm: beam search cannot be steered; ask without it")

    for owner in owners:
        owner.beam_search = refuse


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
    _check_features(runner)
    program, config = armed.program, runner.model_config.hf_text_config
    program.check(config.num_hidden_layers, config.hidden_size)
    board = Board(
        runner.max_num_tokens + MARGIN, SLOTS * runner.max_num_reqs, len(program.fills),
        runner.device, gated=program.gate is not None,
    )  # fmt: skip
    layers = _layers(runner, config.num_hidden_layers)
    _check_weights(layers, armed.identity)
    for number in program.layers:
        layer = layers[number]
        _patch(type(layer))
        layer.cmrm_step = program.step(number, runner.model_config.dtype, runner.device)
        layer.cmrm_board = board
    runner.cmrm_layers = {number: layers[number] for number in program.layers}
    runner.cmrm_sums = {number: _sum(layers[number]) for number in program.layers}
    runner.cmrm_board = board
    runner.cmrm_slots = {}
    runner.cmrm_decided = set()
    runner.cmrm_records = {}
    runner.cmrm_targets = {}
    runner.cmrm_pending = []
    runner.cmrm_counts = {"steps": 0, "tokens": 0, "masked": 0}
    _log.warning(
        "cmrm: %d of %d decoder layers armed, positions %s, gate %s, program %s",
        len(program.layers), len(layers), program.positions,
        "none" if program.gate is None else f"at layer {program.gate.layers[-1]}",
        program.key[:12],
    )  # fmt: skip


def _check_features(runner: Any) -> None:
    """Refuse what the parity contract does not hold for.

    Raises:
        ModelError: such a feature is on.
    """
    config = runner.vllm_config
    parallel = config.parallel_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "micro-batches": bool(parallel.use_ubatching),
        "context parallelism": max(
            parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size
        )
        > 1,
        "sleep mode": bool(runner.model_config.enable_sleep_mode),
        "transfer of KV, encoder states or weights": any(
            getattr(config, f"{name}_transfer_config", None) is not None
            for name in ("kv", "ec", "weight")
        ),
        "prompt embeddings": bool(getattr(runner, "enable_prompt_embeds", False)),
        "LoRA": config.lora_config is not None,
    }
    on = [name for name, there in refused.items() if there]
    if on:
        raise ModelError(
            f"{', '.join(on)}: not tested with cmrm, requests could go unsteered; turn it off"
        )


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


def _check_weights(layers: Mapping[int, Any], identity: Any) -> None:
    """Compare sampled weights of every decoder layer with those of the artifact's model.

    Raises:
        ModelError: they differ, or the artifact names no weights.
    """
    from cmrm.model.weights import sample_of

    if identity is None:
        raise ModelError("the artifact names no weights; extract it again with this version")
    stored = {
        (int(match[1]), match[2]): place
        for place, name in enumerate(identity.weights.names)
        if (match := re.search(r"(?<!vision)\.layers\.(\d+)\.(\w+layernorm)\.weight$", name))
        and "vision" not in name
    }
    different, compared = [], 0
    for number, layer in layers.items():
        for part in ("input_layernorm", "post_attention_layernorm"):
            place = stored.get((number, part))
            if place is None:
                continue
            compared += 1
            here = sample_of(getattr(layer, part).weight.data).float().cpu()
            there = identity.weights.samples[place]
            if not torch.allclose(here, there, rtol=2.0**-7, atol=1e-6):
                different.append(f"layer {number}'s {part}")
    if different or not compared:
        reason = f"{', '.join(different[:3])} differ" if different else "no weight can be compared"
        raise ModelError(f"the artifact was estimated on another model: {reason}")


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


def _board(runner: Any) -> Board:
    board = getattr(runner, "cmrm_board", None)
    if not isinstance(board, Board):
        raise ModelError("cmrm: this model runner is not armed; no answer is given")
    return board


def status(worker: Any) -> dict[str, Any]:
    """What a worker says of its steering: the program, and tokens so far."""
    runner = worker.model_runner
    _board(runner)
    armed = _state["armed"]
    lost = [n for n, layer in runner.cmrm_layers.items() if _sum(layer) != runner.cmrm_sums[n]]
    if lost:
        raise ModelError(f"cmrm: the vectors of decoder layers {lost[:5]} are not what they were")
    return {
        "armed": True, "program": armed.program.key, "positions": armed.program.positions,
        "layers": len(armed.program.layers), "gated": armed.program.gate is not None,
        **runner.cmrm_counts,
    }  # fmt: skip


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
        _self_test(runner)
        runner.cmrm_tested = True
    return outcome


def _self_test(runner: Any) -> None:
    """Show on passes that answer nobody that steered tokens move, and that others do not.

    Raises:
        ModelError: they do not, or they do.
    """
    board, program = _board(runner), _state["armed"].program
    moving = any(bool(tensor.any()) for tensor in program.adds.values()) or bool(program.fills)
    n = min(SELF_TEST_TOKENS, runner.max_num_tokens)

    def passed(steered: slice) -> torch.Tensor:
        board.clear()
        board.mask[steered] = 1.0
        board.held.fill_(1.0)
        board.slot[:n] = 0
        board.target.fill_(SELF_TEST_TARGET)
        runner.cmrm_testing = True
        try:
            states, _ = runner._dummy_run(n, force_attention=True)
        finally:
            runner.cmrm_testing = False
            board.clear()
            board.held.zero_()
        return torch.as_tensor(states[:n]).float().clone()

    plain, all_of_them = passed(slice(0, 0)), passed(slice(0, n))
    again = passed(slice(0, 0))
    if moving and bool((plain == all_of_them).all(dim=-1).any()):
        raise ModelError("cmrm: the self-test failed, a steered token did not move; not started")
    if not torch.equal(plain, again):
        raise ModelError("cmrm: the self-test failed, an unsteered pass moved; not started")
    _log.warning("cmrm: self-test passed on %d tokens", n)


def _before_dummy(original: Callable[..., Any], runner: Any, *args: Any, **more: Any) -> Any:
    """Passes that answer nobody steer nothing."""
    if hasattr(runner, "cmrm_board") and not getattr(runner, "cmrm_testing", False):
        _keep_records(runner)
        runner.cmrm_board.clear()
    return original(runner, *args, **more)


def _before_step(
    original: Callable[..., Any], runner: Any, scheduled: Any, *args: Any, **more: Any
) -> Any:
    """Say which tokens of this step are steered, in the order of the batch."""
    board, program = _board(runner), _state["armed"].program
    _keep_records(runner)
    _forget(runner, scheduled)
    rows, targets, start = [], [], 0
    for request in runner.input_batch.req_ids:
        count = scheduled.num_scheduled_tokens[request]
        row, target = _row(runner, program, request, count)
        if program.fills and row.decides:
            _await_record(runner, request, start + row.prompt - 1 - row.first)
        rows.append(row)
        targets.append(target)
        start += row.count
    masked = board.fill_in(rows, program.positions, targets if program.fills else ())
    counts = runner.cmrm_counts
    counts["steps"] += 1
    counts["tokens"] += sum(row.count for row in rows)
    counts["masked"] += masked
    return original(runner, scheduled, *args, **more)


def _row(
    runner: Any, program: Program, request: str, count: int
) -> tuple[Row, torch.Tensor | None]:
    """What is known of one request's tokens in this step.

    Raises:
        ModelError: something that decides whether they are steered is not known.
    """
    state = runner.requests.get(request)
    if state is None:
        raise ModelError(f"cmrm: nothing is known of the request {request}; no answer is given")
    ends = []
    for feature in state.mm_features or ():
        ends.append(feature.mm_position.offset + feature.mm_position.length)
    row = Row(
        int(state.num_computed_tokens), int(count), int(state.num_prompt_tokens),
        max(ends) if ends else None, _slot(runner, request) if program.gate is not None else 0,
    )  # fmt: skip
    if program.gate is not None:
        if row.decides:
            runner.cmrm_decided.add(request)
        elif ends and row.first >= row.prompt and request not in runner.cmrm_decided:
            raise ModelError(f"cmrm: the gate has not decided about the request {request}")
    return row, _target(runner, program, request, state, row)


def _target(
    runner: Any, program: Program, request: str, state: Any, row: Row
) -> torch.Tensor | None:
    """Coordinates that fill raises the row to; None where it steers nothing in this step.

    Raises:
        ModelError: the request carries an image and names no recorded coordinates.
    """
    if not program.fills or row.image_end is None or not row.decides:
        return None
    if request not in runner.cmrm_targets:
        recorded = runner.cmrm_records.get(_asked(state).get("target"))
        if recorded is None:
            raise ModelError(
                f"cmrm: fill has no coordinates of the text of the request {request}; no answer "
                "is given"
            )
        runner.cmrm_targets[request] = recorded
    return torch.as_tensor(runner.cmrm_targets[request])


def _asked(state: Any) -> Mapping[str, str]:
    """What the engine says of a request in `SamplingParams.extra_args`."""
    extra = getattr(state.sampling_params, "extra_args", None) or {}
    asked = extra.get(REQUEST_KEY)
    return asked if isinstance(asked, Mapping) else {}


def _await_record(runner: Any, request: str, token: int) -> None:
    """Keep the coordinates of a token of the coming step, where its request asks for it."""
    name = _asked(runner.requests[request]).get("record")
    if name is not None:
        runner.cmrm_pending.append((name, token))


def _keep_records(runner: Any) -> None:
    """Keep the coordinates of the last step that were asked for; they stay on the device."""
    for name, token in runner.cmrm_pending:
        if len(runner.cmrm_records) >= MOST_RECORDS:
            runner.cmrm_records.pop(next(iter(runner.cmrm_records)))
        runner.cmrm_records[name] = runner.cmrm_board.seen[token].clone()
    runner.cmrm_pending = []


def _slot(runner: Any, request: str) -> int:
    """Where the gate's decision about a request is held.

    Raises:
        ModelError: no place is left.
    """
    slots: dict[str, int] = runner.cmrm_slots
    if request not in slots:
        taken = set(slots.values())
        free = next((k for k in range(len(runner.cmrm_board.held) - 1) if k not in taken), None)
        if free is None:
            raise ModelError("cmrm: too many requests wait with a decision of the gate")
        slots[request] = free
        runner.cmrm_board.held[free] = 0.0
    return slots[request]


def _forget(runner: Any, scheduled: Any) -> None:
    """Drop what is held for requests that are gone, also where a new one has the same name."""
    ended = set(getattr(scheduled, "finished_req_ids", ()))
    for held in (runner.cmrm_slots, runner.cmrm_targets):
        for request in [name for name in held if name in ended or name not in runner.requests]:
            del held[request]
    runner.cmrm_decided = {
        name for name in runner.cmrm_decided if name in runner.requests and name not in ended
    }
