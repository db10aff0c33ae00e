"""Fluency: how likely the untouched backbone finds a defended model's harmless answers.

The answer to a benign request is read behind that request as text alone, by the model without a
defence and without the image. An answer that a defence has turned into mush is unlikely there,
whatever a judge of refusals says of it. The figures of two defences on one model can be compared,
those of two models cannot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch

from cmrm.measure.outcomes import Cell
from cmrm.measure.rates import ratio_interval
from cmrm.measure.texts import refuses
from cmrm.model.batching import in_batches
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import Request
from cmrm.store import TextStore

Likelihood = tuple[float, int]
"""Negative log-likelihood of an answer in nats, summed over its tokens, and their number."""


def answer_likelihoods(vlm: VLM, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
    """Likelihoods of the answers of (request, answer) pairs, none of them empty.

    Each answer's tokens stand behind its request as text; the model is not steered.
    """
    with vlm.lock, torch.inference_mode():
        prompts = [encode(vlm, [Request(request)])["input_ids"][0] for request, _ in pairs]
        answers = [
            vlm.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(
                vlm.device
            )
            for _, answer in pairs
        ]
        rows = [torch.cat([prompt, text]) for prompt, text in zip(prompts, answers, strict=True)]
        width = max(len(row) for row in rows)
        pad = vlm.tokenizer.pad_token_id or 0
        ids = torch.stack(  # int64 [B, T], padded on the right
            [torch.nn.functional.pad(row, (0, width - len(row)), value=pad) for row in rows]
        )
        mask = torch.stack(
            [torch.arange(width, device=ids.device) < len(row) for row in rows]
        ).long()
        logits = vlm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, T, V]
    likelihoods = []
    for k, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        before = logits[k, len(prompt) - 1 : len(prompt) - 1 + len(answer)].float()
        nats = float(torch.nn.functional.cross_entropy(before, answer, reduction="sum"))
        likelihoods.append((nats, len(answer)))
    return likelihoods


def harmless_answers(cell: Cell) -> list[tuple[str, str]]:
    """(request, answer) of a cell's benign and open requests that were answered.

    Empty answers, and refusals by the default judge, are left out.
    """
    pairs = [
        (outcome.request, outcome.reply) for outcome in cell.of_kind("benign", "open")
        if outcome.reply.strip()
    ]  # fmt: skip
    return [pair for pair, refusal in zip(pairs, refuses(pairs), strict=True) if not refusal]


class FluencyStore:
    """Likelihoods on disk by request and answer; a file belongs to one model."""

    def __init__(self, path: Path) -> None:
        """Raises `InputError` when the file cannot be used."""
        self._texts = TextStore(path)

    def get(self, request: str, answer: str) -> Likelihood | None:
        """The stored likelihood of an answer; None where there is none."""
        text = self._texts.get(_key(request, answer))
        return None if text is None else tuple(json.loads(text))

    def measure(
        self,
        vlm: VLM,
        cells: Iterable[Cell],
        *,
        batch_size: int,
        on_batch: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Measure on the untouched model the harmless answers of `cells` that are not stored yet.

        Raises:
            RuntimeError: memory runs out on a single answer.
        """
        wanted = dict.fromkeys(pair for cell in cells for pair in harmless_answers(cell))
        new = [pair for pair in wanted if self.get(*pair) is None]
        new.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        measured = in_batches(new, batch_size, lambda pairs: answer_likelihoods(vlm, pairs))
        for pairs, likelihoods in measured:
            texts = {
                _key(*pair): json.dumps(likelihood)
                for pair, likelihood in zip(pairs, likelihoods, strict=True)
            }
            self._texts.put(texts)
            on_batch(len(pairs))

    def perplexity(self, cell: Cell, *, seed: int = 0) -> dict[str, Any] | None:
        """Perplexity of a cell's harmless answers, as a figure; None where none is measured."""
        stored = [self.get(*pair) for pair in harmless_answers(cell)]
        whole = [likelihood for likelihood in stored if likelihood is not None and likelihood[1]]
        return perplexity_of(whole, seed=seed) if whole else None

    def perplexities(
        self, cells: Iterable[Cell], *, seed: int = 0
    ) -> Mapping[tuple[str, str, str], dict[str, Any]]:
        """`perplexity` of each cell by its key; cells without one are left out."""
        figures = {cell.key: self.perplexity(cell, seed=seed) for cell in cells}
        return {key: figure for key, figure in figures.items() if figure is not None}


def perplexity_of(likelihoods: Sequence[Likelihood], *, seed: int = 0) -> dict[str, Any]:
    """exp of the mean over all tokens, with a seeded 95 % bootstrap interval over answers.

    `n` is the number of answers.
    """
    nats, tokens = zip(*likelihoods, strict=True)
    mean, low, high = ratio_interval(nats, tokens, seed=seed)
    return {
        "value": round(exp(mean), 4), "low": round(exp(low), 4), "high": round(exp(high), 4),
        "n": len(likelihoods), "tokens": sum(tokens),
    }  # fmt: skip


def _key(request: str, answer: str) -> str:
    return hashlib.sha256(f"{request}\x00{answer}".encode()).hexdigest()
