"""The engine on vLLM, in this process: its batches, its kernels, cmrm's interventions.

vLLM runs eager, so that one loaded model takes another program for every defence. Requests are
rendered by the model's own chat template, as the engine on transformers does. What vLLM's graph
cannot express is refused before a request is sent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Event, RLock
from typing import Any

import torch

from cmrm.engines.base import Contrast, Decoding, Engine, EngineError, Reply
from cmrm.engines.first_token import first_tokens
from cmrm.engines.transformers import TransformersEngine
from cmrm.engines.vllm.checkpoint import readable_by_vllm, stored_tensors
from cmrm.engines.vllm.program import Program, targets_of
from cmrm.engines.vllm.stepping import REQUEST_KEY
from cmrm.errors import InputError, MissingExtraError, ModelError
from cmrm.model.encode import adds_special_tokens, rendered
from cmrm.model.vlm import checkpoint_folder, image_token_of, load_vlm, placeholders_of
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Artifact, ShiftVectors, library_versions
from cmrm.steering.intervention import Intervention

MOST_IMAGES = 8
"""Images a request."""
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
"""Environment of vLLM's start: its engine runs in this process, its first model runner."""
_REMEDY = "use --engine transformers"
_NO_CONTRAST = f"the engine vllm cannot decode two conversations side by side; {_REMEDY}"


class VllmEngine(Engine):
    """A model in vLLM that answers under interventions; see the module.

    Environment variables of vLLM (`VLLM_CPU_KVCACHE_SPACE`, ...) act as always.
    """

    name = "vllm"

    def __init__(
        self, model: str, *, dtype: str = "auto", revision: str | None = None, **options: Any
    ) -> None:
        """Load `model` (folder, hub id, or a registered name).

        Args:
            model: what to load.
            dtype: as vLLM takes it.
            revision: hub branch, tag or commit.
            options: of `vllm.LLM`: `tensor_parallel_size`, `max_model_len`,
                `gpu_memory_utilization`, ...

        Raises:
            MissingExtraError: vLLM is not installed. InputError: its version is not tested, or an
                option is not taken. ModelError: the model cannot be loaded, or not be armed.
        """
        refused = sorted({"enforce_eager", "worker_cls", "speculative_config"} & set(options))
        if refused:
            raise InputError(f"{refused[0]} is set by cmrm's engine on vLLM; leave it out")
        _need_vllm()
        self._model = model
        self._lock = RLock()
        self.revision = revision
        source = checkpoint_folder(model, revision=revision)
        self.folder = readable_by_vllm(source)
        from transformers import AutoConfig, AutoProcessor

        from cmrm.model.compat import patch_torchvision

        patch_torchvision()
        try:
            self.config = AutoConfig.from_pretrained(self.folder)
            self.processor = AutoProcessor.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"cannot read {model}: {_line(error)}") from error
        self.tokenizer = self.processor.tokenizer
        self.placeholders = placeholders_of(self.processor, image_token_of(self.config))
        self._text = self.config.get_text_config()
        self._llm = _started(
            self.folder,
            {"dtype": dtype, "limit_mm_per_prompt": {"image": MOST_IMAGES}, **options},
        )
        self._armed = Program("last", {}).key
        self._context: dict[str, Any] | None = None

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return int(self._text.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return int(self._text.hidden_size)

    @property
    def model_id(self) -> str:
        """Hub id or path of the model."""
        return self._model

    @property
    def dtype(self) -> str:
        """Of the weights: `bfloat16`."""
        return str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def context(self) -> dict[str, Any]:
        """Identity of the files, dtype, versions."""
        if self._context is None:
            import vllm

            self._context = {
                "engine": self.name, "identity": _key_of(self.folder), "dtype": self.dtype,
                "versions": {**library_versions(), "vllm": str(vllm.__version__)},
            }  # fmt: skip
        return self._context

    def facts(self) -> dict[str, Any]:
        """What is known of the model; see `Engine.facts`."""
        count = 0
        for _, shape in stored_tensors(self.folder):
            count += int(torch.Size(shape).numel())
        return {
            "id": self.model_id, "revision": self.revision,
            "architecture": (getattr(self.config, "architectures", None) or ["unknown"])[0],
            "dtype": self.dtype, "layers": self.n_layers, "hidden_size": self.hidden_size,
            "parameters": count, "identity": self.context()["identity"],
        }  # fmt: skip

    def count_tokens(self, text: str) -> int:
        """By the model's own tokenizer."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def check_interventions(self, interventions: Sequence[Intervention]) -> None:
        """Refuse what vLLM's graph cannot express; see `Engine.check_interventions`."""
        try:
            program = Program.of_interventions(interventions)
            program.check(self.n_layers, self.hidden_size)
        except InputError as error:
            raise EngineError(f"the engine vllm cannot do this: {error}; {_REMEDY}") from None

    def accept(self, artifact: Artifact | ShiftVectors) -> None:
        """Refuse an artifact of another model: shapes, and two projections of every layer."""
        from cmrm.engines.vllm.matching import check_files

        made = artifact.provenance
        if (made.n_layers, made.hidden_size) != (self.n_layers, self.hidden_size):
            raise InputError(
                f"the artifact has {made.n_layers} layers of width {made.hidden_size}, the model "
                f"{self.n_layers} of width {self.hidden_size}"
            )
        check_files(self.folder, artifact.identity)

    def answer(
        self,
        requests: Sequence[Request],
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        batch_size: int = 16,
        on_batch: Callable[[int], None] | None = None,
        contrast: Contrast | None = None,
    ) -> list[Reply]:
        """Replies to conversations, in the order given; see `Engine.answer`.

        vLLM batches by itself; `batch_size` is not used.
        """
        if contrast is not None:
            raise EngineError(_NO_CONTRAST)
        if not requests:
            return []
        options = options or Decoding()
        outputs, outcomes = self._steered(requests, interventions, _sampling(options))
        if on_batch is not None:
            on_batch(len(requests))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Reply(str(text).strip(), len(ids), outcomes.get(str(k), {}).get("open"))
            for k, (text, ids) in enumerate(zip(texts, tokens, strict=True))
        ]

    def stream(
        self,
        request: Request,
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        cancel: Event | None = None,
    ) -> Generator[str | Reply, None, None]:
        """Not in process: `cmrm serve` streams.

        Raises:
            EngineError: always.
        """
        raise EngineError("the engine vllm does not stream in process; use `cmrm serve`")
        yield ""

    def states(self, requests: Sequence[Request], *, batch_size: int = 16) -> torch.Tensor:
        """States at the last prompt token: float32 [N, L, d]; see `Engine.states`."""
        if not requests:
            return torch.zeros(0, self.n_layers, self.hidden_size)
        names = [str(k) for k in range(len(requests))]
        with self._lock:
            self._arm(Program("last", {}, reads=tuple(range(self.n_layers))))
            self._generate(
                requests,
                {"temperature": 0.0, "max_tokens": 1},
                [{"record": name} for name in names],
            )
            _, records = self._taken()
        missing = [name for name in names if name not in records]
        if missing:
            raise EngineError(f"vLLM gave no states of {len(missing)} requests")
        return torch.stack([records[name] for name in names])

    def first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of the tokens that the texts begin with; see `engines.first_token`."""
        return first_tokens(self.tokenizer, texts)

    def first_token_log_odds(
        self,
        requests: Sequence[Request],
        tokens: Sequence[int],
        interventions: Sequence[Intervention] = (),
        contrast: Contrast | None = None,
    ) -> torch.Tensor:
        """Log-odds float32 [N]; see `Engine.first_token_log_odds`."""
        if contrast is not None:
            raise EngineError(_NO_CONTRAST)
        options = {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": list(tokens)}
        outputs, _ = self._steered(requests, interventions, options)
        odds = []
        for output in outputs:
            steps = output.outputs[0].logprobs[0]
            inside = torch.tensor([steps[token].logprob for token in tokens]).logsumexp(0)
            odds.append(inside - torch.log1p(-inside.exp().clamp(max=1 - 1e-7)))
        return torch.stack(odds) if odds else torch.zeros(0)

    def estimate_shift(self, anchors: Sequence[Sample], **options: Any) -> ShiftVectors:
        """By the engine on transformers, on the CPU: an estimate runs once, and is no part of
        serving; see `shift.estimate.estimate_shift`."""
        return self._estimator.estimate_shift(anchors, **options)

    def artifact(self, *arguments: Any, **options: Any) -> Artifact:
        """Fitted tensors of this model as an artifact; see `Engine.artifact`."""
        return self._estimator.artifact(*arguments, **options)

    @cached_property
    def _estimator(self) -> TransformersEngine:
        """The same model on transformers, for what vLLM cannot do; loaded when it is wanted."""
        dtype = "auto" if self.dtype not in ("bfloat16", "float16", "float32") else self.dtype
        return TransformersEngine(load_vlm(self.model_id, dtype=dtype, revision=self.revision))

    def close(self) -> None:
        """Free the model's memory."""
        with self._lock:
            self._llm.llm_engine.engine_core.shutdown()

    def _steered(
        self,
        requests: Sequence[Request],
        interventions: Sequence[Intervention],
        options: dict[str, Any],
    ) -> tuple[list[Any], dict[str, dict[str, Any]]]:
        """vLLM's outputs under interventions, and what happened to each request, by its place."""
        for part in interventions:
            if part.rows not in (None, len(requests)):
                raise InputError(
                    f"{part.rows} rows of vectors were given for {len(requests)} requests"
                )
        self.check_interventions(interventions)
        program, targets = Program.of_interventions(interventions), targets_of(interventions)
        asks = []
        for k, request in enumerate(requests):
            ask: dict[str, Any] = {"name": str(k)}
            if targets is not None and request.all_images:
                ask["target"] = targets[k if len(targets) > 1 else 0].tolist()
            asks.append(ask)
        with self._lock:
            self._arm(program)
            outputs = self._generate(requests, options, asks)
            outcomes, _ = self._taken()
        _check_steered(requests, interventions, outcomes)
        return outputs, outcomes

    def _arm(self, program: Program) -> None:
        """Let every worker run a program, which a self-test shows.

        Raises:
            EngineError: a worker does not.
        """
        if program.key == self._armed:
            return
        self._armed = ""
        keys = self._llm.collective_rpc("cmrm_arm", args=(program.to_bytes(),))
        if not keys or any(key != program.key for key in keys):
            raise EngineError("a worker of vLLM is armed with another program")
        self._armed = program.key

    def _taken(self) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
        """Outcomes and records of the first worker; all workers hold the same."""
        outcomes, records = self._llm.collective_rpc("cmrm_take")[0]
        return outcomes, records

    def _generate(
        self, requests: Sequence[Request], options: dict[str, Any], asks: Sequence[dict[str, Any]]
    ) -> list[Any]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        prompts: list[dict[str, Any]] = []
        for request in requests:
            text = rendered(self.processor, self.placeholders, request)
            prompts.append({"prompt": text})
            if request.all_images:
                prompts[-1]["multi_modal_data"] = {"image": list(request.all_images)}
        if not prompts:
            return []
        adds = adds_special_tokens(self.tokenizer, prompts[0]["prompt"])
        params = [
            SamplingParams(**options, detokenize=False, extra_args={REQUEST_KEY: ask})
            for ask in asks
        ]
        try:
            return list(
                self._llm.generate(
                    prompts, params, use_tqdm=False,
                    tokenization_kwargs={"add_special_tokens": adds},
                )
            )  # fmt: skip
        except (
            ValueError,
            TypeError,
            VLLMClientError,
        ) as error:  # a prompt that is too long, an image it refuses
            raise InputError(f"vLLM refuses a request: {_line(error)}") from error


def _need_vllm() -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise MissingExtraError(
            "the engine vllm needs vLLM in the same environment: run tools/vllm_env.sh FOLDER, "
            "then FOLDER/bin/cmrm (docs/engines.md)"
        )
    from cmrm.engines.vllm.arming import check_version

    check_version()


def _started(folder: Path, options: dict[str, Any]) -> Any:
    """A `vllm.LLM` that takes programs.

    Raises:
        ModelError: it does not start.
    """
    from cmrm.engines.vllm import arming

    if arming.is_armed_with_artifact():
        raise EngineError("CMRM_SHIFT arms vLLM in this process; unset it, and pass the artifact")
    with _environment({**SETTINGS, "CMRM_PROGRAMS": "1"}):
        from vllm import LLM

        try:
            llm = LLM(
                model=str(folder), enforce_eager=True, disable_log_stats=True,
                mm_processor_cache_gb=0, **options,
            )  # fmt: skip
        except TypeError as error:
            raise InputError(f"vLLM does not take an option: {_line(error)}") from error
        except (ValueError, RuntimeError, OSError, AssertionError, NotImplementedError) as error:
            raise ModelError(f"vLLM cannot load {folder}: {_line(error)}") from error
    if not hasattr(llm.llm_engine.model_executor, "collective_rpc"):
        raise EngineError("this vLLM has no workers that can be armed")
    return llm


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _sampling(options: Decoding) -> dict[str, Any]:
    """Decoding as arguments of vLLM's `SamplingParams`."""
    values: dict[str, Any] = {"max_tokens": options.max_new_tokens, "temperature": 0.0}
    if not options.greedy:
        values["temperature"] = options.temperature
        for name in ("top_p", "top_k"):
            if getattr(options, name) is not None:
                values[name] = getattr(options, name)
    return values


def _check_steered(
    requests: Sequence[Request],
    interventions: Sequence[Intervention],
    outcomes: dict[str, dict[str, Any]],
) -> None:
    """Raises `EngineError` where an image request was not steered, or a text request was."""
    for k, request in enumerate(requests):
        steered = outcomes.get(str(k), {}).get("steered")
        if steered is None:
            raise EngineError(f"vLLM says nothing of the request {k}; no reply is given")
        wanted = bool(request.all_images) and any(part.edits for part in interventions)
        if interventions and interventions[0].positions == "generated":
            continue  # a reply of one token has none behind it
        if (wanted and not steered) or (steered and not request.all_images):
            raise EngineError(f"vLLM steered the request {k} wrongly; no reply is given")


def _key_of(folder: Path) -> str:
    """Hex sha256 of the checkpoint: small files byte by byte, tensors by name, shape and samples of
    two projections of every decoder layer."""
    from cmrm.engines.vllm.matching import stored_projections
    from cmrm.model.weights import sample_of

    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name:
            digest.update(f"\x00{file.name}\x00".encode() + file.read_bytes())
    for name, shape in stored_tensors(folder):
        digest.update(json.dumps([name, shape]).encode())
    for place, tensor in stored_projections(folder):
        digest.update(f"\x00{place}".encode() + sample_of(tensor).float().numpy().tobytes())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
