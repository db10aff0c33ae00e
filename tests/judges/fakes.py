"""Chat models that answer from a list, for tests of judges."""

from __future__ import annotations

from typing import Any


class Listener:
    """A chat model that gives the answers of a list, and keeps its questions and budgets."""

    def __init__(self, tokenizer: Any, *answers: str) -> None:
        import torch

        self.device = torch.device("cpu")
        self.tokenizer, self.answers = tokenizer, list(answers)
        self.questions: list[str] = []
        self.limits: list[int] = []

    def eval(self) -> Listener:
        return self

    def generate(self, input_ids: Any, max_new_tokens: int, **options: Any) -> Any:
        import torch

        assert options["do_sample"] is False
        self.questions.append(self.tokenizer.decode(input_ids[0]))
        self.limits.append(max_new_tokens)
        encoded = self.tokenizer(self.answers.pop(0), add_special_tokens=False, return_tensors="pt")
        answer = encoded["input_ids"].to(input_ids.dtype)
        end = torch.tensor([[self.tokenizer.eos_token_id]])
        return torch.cat([input_ids, answer, end], dim=1)[:, : input_ids.shape[1] + max_new_tokens]


def chat_tokenizer() -> Any:
    """The tests' own tokenizer, with a chat template."""
    from tiny import tiny_processor

    tokenizer = tiny_processor().tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    return tokenizer
