"""The engine on a transformers model: batches, out-of-memory halving, greedy and sampled decoding,
streaming."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Event, Thread
from typing import Any

import torch

from cmrm.engines.base import Contrast, Decoding, Engine, Reply
from cmrm.engines.contrast import Contrasted
from cmrm.engines.first_token import first_token_log_odds, first_tokens
from cmrm.engines.prompt_states import PromptStates, prompt_states
from cmrm.errors import InputError
from cmrm.model.batching import in_batches
from cmrm.model.encode import encode
from cmrm.model.identity import config_hash, identity_of
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.prompts.sample import Sample
from cmrm.shift.artifact import Artifact, Provenance, ShiftVectors, library_versions
from cmrm.shift.capture import capture
from cmrm.shift.estimate import SampleLevel, estimate_shift, sample_vectors
from cmrm.shift.pair import Prefixes, text_states
from cmrm.steering.gate import Gate
from cmrm.steering.hooks import Session, intervene
from cmrm.steering.intervention import Intervention

GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True,
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
    "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
"""Asked for whatever the checkpoint's own generation settings say."""


class TransformersEngine(Engine):
    """A `VLM` that answers, in this process. It keeps the beginnings of prompts between calls
    (`shift.prefix`)."""

    name = "transformers"
    contrasts = True

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.prefixes = Prefixes(vlm)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return self.vlm.n_layers

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return self.vlm.hidden_size

    @property
    def model_id(self) -> str:
        """Hub id or path of the model."""
        return self.vlm.model_id

    def context(self) -> dict[str, Any]:
        """Identity with its dtypes, image processing, generation settings, versions."""
        settings = self.vlm.model.generation_config.to_diff_dict()
        settings.pop("transformers_version", None)
        return {
            "engine": self.name,
            "identity": identity_of(self.vlm).key,
            "dtype": str(self.vlm.model.dtype),
            "image_processor": type(self.vlm.processor.image_processor).__name__,
            "generation": {name: str(value) for name, value in sorted(settings.items())},
            "versions": library_versions(),
        }

    def facts(self) -> dict[str, Any]:
        """What is known of the model; see `Engine.facts`."""
        vlm = self.vlm
        return {
            "id": vlm.model_id,
            "revision": vlm.revision,
            "architecture": type(vlm.model).__name__,
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "layers": vlm.n_layers,
            "hidden_size": vlm.hidden_size,
            "parameters": sum(parameter.numel() for parameter in vlm.model.parameters()),
            "identity": identity_of(vlm).key,
        }

    def count_tokens(self, text: str) -> int:
        """By the model's own tokenizer."""
        return len(self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"])

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
        """Replies to conversations, in the order given; see `Engine.answer`."""
        options = options or Decoding()
        if contrast is not None and len(contrast.requests) != len(requests):
            raise InputError(
                f"{len(contrast.requests)} contrasts were given for {len(requests)} requests"
            )
        for part in interventions:
            if part.rows not in (None, len(requests)):
                raise InputError(
                    f"{part.rows} rows of vectors were given for {len(requests)} requests"
                )
        replies: dict[int, Reply] = {}

        def work(places: list[int]) -> list[Reply]:
            batch = [requests[k] for k in places]
            steered = [part.select(places) for part in interventions] if batch[0].all_images else []
            second = None if contrast is None else contrast.select(places)
            return self._batch(batch, steered, options, second)

        by_length = sorted(range(len(requests)), key=lambda k: len(requests[k].text))
        for with_image in (True, False):
            group = [k for k in by_length if bool(requests[k].all_images) is with_image]
            for places, batch_replies in in_batches(group, batch_size, work):
                replies.update(zip(places, batch_replies, strict=True))
                if on_batch is not None:
                    on_batch(len(places))
        return [replies[k] for k in range(len(requests))]

    def _batch(
        self,
        requests: Sequence[Request],
        interventions: Sequence[Intervention],
        options: Decoding,
        contrast: Contrast | None = None,
        **more: Any,
    ) -> list[Reply]:
        vlm = self.vlm
        vlm.check_eval()
        steering: AbstractContextManager[Session | None] = nullcontext()
        if interventions:
            steering = intervene(vlm, *interventions)
        with vlm.lock, torch.inference_mode():
            inputs = encode(vlm, requests)
            with steering as session:
                if contrast is not None:
                    more["logits_processor"] = [Contrasted(vlm, contrast)]
                out = vlm.model.generate(**inputs, **_generate_options(vlm, options), **more)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = vlm.tokenizer.batch_decode(new, skip_special_tokens=True)
        opened = None if session is None or session.opened is None else session.opened.tolist()
        return [
            Reply(str(text).strip(), n, is_open)
            for text, n, is_open in zip(
                texts, _counts(vlm, new), opened or [None] * len(texts), strict=True
            )
        ]

    def stream(
        self,
        request: Request,
        interventions: Sequence[Intervention] = (),
        options: Decoding | None = None,
        *,
        cancel: Event | None = None,
    ) -> Generator[str | Reply, None, None]:
        """Pieces of the reply as they are generated; see `Engine.stream`."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        options = options or Decoding(max_new_tokens=256)
        closed = Event()

        class Cancelled(StoppingCriteria):
            """Ends the generation when the reader is gone."""

            def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
                stop = closed.is_set() or (cancel is not None and cancel.is_set())
                return torch.full(
                    (input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device
                )

        streamer = TextIteratorStreamer(
            self.vlm.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        failures: list[BaseException] = []
        replies: list[Reply] = []
        steered = list(interventions) if request.all_images else []

        def work() -> None:
            try:
                replies.extend(
                    self._batch(
                        [request], steered, options, streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Cancelled()]),
                    )
                )  # fmt: skip
            except BaseException as error:
                failures.append(error)
            finally:
                streamer.end()

        thread = Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            closed.set()
            thread.join()
        if failures:
            raise failures[0]
        yield replies[0]

    def accept(self, artifact: Artifact | ShiftVectors) -> None:
        """Refuse an artifact of another model; see `shift.artifact.Artifact.check`."""
        artifact.check(self.vlm)

    def first_tokens(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of the tokens that the texts begin with; see `engines.first_token`."""
        return first_tokens(self.vlm.tokenizer, texts)

    def first_token_log_odds(
        self,
        requests: Sequence[Request],
        tokens: Sequence[int],
        interventions: Sequence[Intervention] = (),
        contrast: Contrast | None = None,
    ) -> torch.Tensor:
        """Log-odds float32 [N]; see `Engine.first_token_log_odds`."""
        return first_token_log_odds(self.vlm, requests, tokens, interventions, contrast)

    def artifact(
        self,
        tensors: Mapping[str, torch.Tensor],
        estimator: str,
        gate: Gate | None = None,
        records: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Fitted tensors of this model as an artifact; see `Engine.artifact`."""
        vlm = self.vlm
        made = Provenance(
            vlm.model_id,
            vlm.revision,
            type(vlm.model).__name__,
            vlm.hidden_size,
            vlm.n_layers,
            config_hash(vlm),
            estimator=estimator,
            versions=library_versions(),
        )
        whole = {
            name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()
        }
        return Artifact(
            whole, made, identity=identity_of(vlm), gate=gate, records=dict(records or {})
        )

    def states(self, requests: Sequence[Request], *, batch_size: int = 16) -> torch.Tensor:
        """States at the last prompt token: float32 [N, L, d] on the CPU."""
        return capture(self.vlm, requests, batch_size=batch_size)

    def prompt_states(
        self,
        requests: Sequence[Request],
        interventions: Sequence[Intervention] = (),
        *,
        trailing: int = 1,
    ) -> PromptStates:
        """States of one batch's last prompt tokens; see `engines.prompt_states`."""
        return prompt_states(self.vlm, requests, interventions, trailing=trailing)

    def text_states(self, requests: Sequence[Request]) -> torch.Tensor:
        """States of one batch of requests as text alone, on the cached prefix: float32
        [N, L, d]."""
        with torch.inference_mode():
            return text_states(requests, self.prefixes)

    def sample_shift(
        self, requests: Sequence[Request], level: SampleLevel, keys: Sequence[str] | None = None
    ) -> torch.Tensor:
        """h_t - h_c of each request: float32 [N, L, d], zero without an image."""
        with torch.inference_mode():
            return sample_vectors(self.vlm, requests, level, keys=keys, prefixes=self.prefixes)

    def estimate_shift(self, anchors: Sequence[Sample], **options: Any) -> ShiftVectors:
        """Dataset-level shift; see `shift.estimate.estimate_shift` for the options."""
        return estimate_shift(self.vlm, anchors, **options)


def _generate_options(vlm: VLM, options: Decoding) -> dict[str, Any]:
    """Decoding as arguments of transformers' `generate`."""
    arguments = {
        **GREEDY,
        "max_new_tokens": options.max_new_tokens,
        "pad_token_id": vlm.tokenizer.pad_token_id,
    }
    if not options.greedy:
        arguments |= {"do_sample": True, "temperature": options.temperature}
        for name in ("top_p", "top_k"):
            if getattr(options, name) is not None:
                arguments[name] = getattr(options, name)
    return arguments


def _counts(vlm: VLM, new: torch.Tensor) -> list[int]:
    """Generated tokens of each row of int64 [B, T], up to its first end-of-turn token."""
    ends = vlm.model.generation_config.eos_token_id
    stops = torch.tensor(
        ends if isinstance(ends, list) else [] if ends is None else [ends], device=new.device
    )
    stopped = torch.isin(new, stops)
    counts = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, new.shape[1])
    return [int(count) for count in counts]
