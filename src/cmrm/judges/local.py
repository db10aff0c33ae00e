"""Models that judge in this process: how they are loaded and asked. On an accelerator where there is one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cmrm.errors import InputError, ModelError
from cmrm.judges.rubrics import RubricJudge


@cache
def load_judge_model(source: str, *, vision: bool = False) -> tuple[Any, Any]:
    """A model from a folder or hub id, and its tokenizer; with `vision` an image-text-to-text model and its processor. Loaded once in this
    process, whatever it is asked.

    Raises:
        ModelError: it cannot be loaded.
    """
    from cmrm.model.compat import mend_torchvision

    mend_torchvision()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    placed = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    try:
        tokenizer = (AutoProcessor if vision else AutoTokenizer).from_pretrained(source)
        model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(
            source, dtype="auto", **placed
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the judge {source}: {said}") from error
    return model, tokenizer


@torch.inference_mode()
def answered(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> str:
    """What the model says behind `inputs` (one row, on its device), greedy; `tokenizer` is the bare one."""
    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id
    )  # fmt: skip
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


class ChatJudge(RubricJudge):
    """`chat:MODEL` or `chat:MODEL#strongreject`: a chat model from a folder or hub id, such as the Llama-3-8B-Instruct that judges in
    the CMRM paper (arXiv 2410.09047), with no server in between."""

    def __init__(self, model: Any, tokenizer: Any, *, source: str = "", rubric: str = "engages") -> None:
        """`model`: a transformers model that generates; `tokenizer`: its tokenizer, with a chat template.

        Raises:
            ModelError: the tokenizer has none.
        """
        super().__init__(rubric)
        self.name = f"chat:{source}#{rubric}"
        self.model, self.tokenizer = model.eval(), tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"{source or 'the judge'} has no chat template; name a chat model")

    @classmethod
    def named(cls, rest: str) -> ChatJudge:
        """From what follows `chat:`.

        Raises:
            InputError: the rubric is unknown. ModelError: the model cannot be loaded.
        """
        source, rubric = chat_source(rest)
        model, tokenizer = load_judge_model(source)
        return cls(model, tokenizer, source=source, rubric=rubric)

    def ask(self, question: str, max_tokens: int) -> str:
        """What it answers, greedy."""
        turns = [{"role": "user", "content": question}]
        held = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        return answered(self.model, self.tokenizer, held, max_tokens)


def chat_source(rest: str) -> tuple[str, str]:
    """Model and rubric that what follows `chat:` names.

    Raises:
        InputError: no model is named, or the rubric is unknown.
    """
    from cmrm.judges.rubrics import RUBRICS

    source, mark, rubric = rest.rpartition("#")
    if not mark or Path(rest).exists():
        source, rubric = rest, "engages"
    if not source:
        raise InputError(f"chat:{rest} is no chat:MODEL")
    if rubric not in RUBRICS:
        raise InputError(f"unknown rubric {rubric!r}; one of {', '.join(RUBRICS)}")
    return source, rubric
