"""Models that judge in this process: how they are loaded and asked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cmrm.errors import InputError, ModelError
from cmrm.judges.quoting import defused, special_tokens
from cmrm.judges.rubrics import ModelAnswer, RubricJudge, rubric_named


@cache
def load_judge_model(source: str, *, vision: bool = False) -> tuple[Any, Any]:
    """A model from a folder or hub id, and its tokenizer; loaded once in a process.

    With `vision` an image-text-to-text model and its processor. It is placed on the accelerators
    where there are some.

    Raises:
        ModelError: it cannot be loaded.
    """
    from cmrm.model.compat import patch_torchvision

    patch_torchvision()
    import transformers

    options = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    loader = (
        transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    )
    try:
        reader = transformers.AutoProcessor if vision else transformers.AutoTokenizer
        tokenizer = reader.from_pretrained(source)
        model = loader.from_pretrained(source, dtype="auto", **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the judge {source}: {cause}") from error
    return model, tokenizer


@torch.inference_mode()
def generate_answer(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> ModelAnswer:
    """The greedy answer to `inputs` (a single row, on the model's device).

    It is withheld where the row is longer than what the model reads.
    """
    length, longest = inputs["input_ids"].shape[1], context_length(model)
    if longest is not None and length > longest:
        return ModelAnswer("", withheld=f"{length} tokens are more than the judge's {longest}")
    padding = tokenizer.pad_token_id
    ids = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False,
        pad_token_id=tokenizer.eos_token_id if padding is None else padding,
    )[0, length:]  # fmt: skip
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    cut = len(ids) >= max_new_tokens and int(ids[-1]) not in ends
    return ModelAnswer(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), cut)


def context_length(model: Any) -> int | None:
    """Tokens that a transformers model reads at most; None where its config does not say."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


class ChatJudge(RubricJudge):
    """`chat:MODEL` or `chat:MODEL#strongreject`: a chat model from a folder or hub id.

    It needs no server. The CMRM paper (arXiv 2410.09047) judges so, with Llama-3-8B-Instruct.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, source: str = "", rubric: str = "engages"
    ) -> None:
        """`model`: a transformers model; `tokenizer`: its tokenizer, with a chat template.

        Raises:
            InputError: the rubric is unknown.
            ModelError: the tokenizer has no chat template.
        """
        super().__init__(rubric)
        self.name = f"chat:{source}#{rubric}"
        self.model, self.tokenizer = model.eval(), tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"{source or 'the judge'} has no chat template; name a chat model")

    @classmethod
    def named(cls, rest: str) -> ChatJudge:
        """The judge that the text behind `chat:` names.

        Raises:
            InputError: the rubric is unknown.
            ModelError: the model cannot be loaded.
        """
        source, rubric = chat_source(rest)
        model, tokenizer = load_judge_model(source)
        return cls(model, tokenizer, source=source, rubric=rubric)

    def ask(self, question: str, max_tokens: int) -> ModelAnswer:
        """The model's greedy answer."""
        text = defused(question, special_tokens(self.tokenizer))
        turns = [{"role": "user", "content": text}]
        inputs = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        return generate_answer(self.model, self.tokenizer, inputs, max_tokens)


def chat_source(rest: str) -> tuple[str, str]:
    """Model and rubric that the text behind `chat:` names.

    Raises:
        InputError: no model is named, or the rubric is unknown.
    """
    source, mark, rubric = rest.rpartition("#")
    if not mark or Path(rest).exists():
        source, rubric = rest, "engages"
    if not source:
        raise InputError(f"chat:{rest} is no chat:MODEL")
    rubric_named(rubric)
    return source, rubric
