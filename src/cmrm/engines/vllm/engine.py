"""The engine on vLLM, in this process: its batches, its kernels, cmrm's interventions.

vLLM runs eager, so that one loaded model takes another program for every defence. Requests are
rendered by the model's own chat template, as the engine on transformers does. What vLLM's graph
cannot express is refused before a request is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path
from threading import Event, RLock
from typing import Any

import torch

from cmrm.engines.base import Contrast, Decoding, Engine, EngineError, Reply
from cmrm.engines.first_token import first_tokens
from cmrm.engines.transformers import TransformersEngine
from cmrm.engines.vllm.checkpoint import readable_by_vllm, stored_tensors
from cmrm.engines.vllm.matching import check_checkpoint, config_and_processor
from cmrm.engines.vllm.program import Program, targets_of
from cmrm.engines.vllm.starting import need_vllm, one_line, started
from cmrm.engines.vllm.stepping import REQUEST_KEY
from cmrm.errors import ArtifactError, InputError
from cmrm.files import sha256_file
from cmrm.model.encode import adds_special_tokens, rendered
from cmrm.model.vlm import checkpoint_folder, image_token_of, load_vlm, placeholders_of
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Artifact, ShiftVectors, library_versions
from cmrm.steering.intervention import Intervention

MOST_IMAGES = 8
"""Images a request."""
OWN = frozenset([
    "model", "dtype", "revision", "enforce_eager", "worker_cls", "worker_extension_cls",
    "speculative_config", "trust_remote_code",
])  # fmt: skip
"""Options of `vllm.LLM` that are set here, or under which steering was not shown to be right."""
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
        need_vllm("the engine vllm")
        self._model = model
        self._lock = RLock()
        self.revision = revision
        self.folder = readable_by_vllm(checkpoint_folder(model, revision=revision))
        self.config, self.processor = config_and_processor(self.folder)
        self.tokenizer = self.processor.tokenizer
        self.placeholders = placeholders_of(self.processor, image_token_of(self.config))
        self._text = self.config.get_text_config()
        self._llm = started(
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
        """Refuse an artifact of another model: shapes, two projections of every decoder layer,
        config, image processing, chat template, vocabulary."""
        made = artifact.provenance
        if (made.n_layers, made.hidden_size) != (self.n_layers, self.hidden_size):
            raise ArtifactError(
                f"the artifact has {made.n_layers} layers of width {made.hidden_size}, the model "
                f"{self.n_layers} of width {self.hidden_size}"
            )
        check_checkpoint(self.folder, artifact.identity)

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
            raise InputError(f"vLLM refuses a request: {one_line(error)}") from error


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
        # Behind the prompt there is nothing to steer in a reply of one token.
        behind = any(part.positions == "generated" for part in interventions)
        wanted = any(part.edits for part in interventions) and not behind
        if (steered > 0) != bool(request.all_images) and (steered > 0 or wanted):
            raise EngineError(f"vLLM steered the request {k} wrongly; no reply is given")


def _key_of(folder: Path) -> str:
    """Hex sha256 of a checkpoint, byte by byte: the same replies come from the same files alone."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            digest.update(f"\x00{file.name}\x00{sha256_file(file)}".encode())
    return digest.hexdigest()
