"""The small training loop that the demo's three stages share: seeded per step, resumable, with a progress bar."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedTokenizerBase

from cmrm.demo.backbone import IMAGE_TOKEN, IMAGE_TOKENS
from cmrm.files import atomic_path

SEED = 20241112
TOWER_SHARE = 0.2
"""Learning rate of a vision tower that is trained on inside a whole VLM, as a share of the stage's."""


@dataclass(frozen=True)
class Stage:
    """Settings of one training stage."""

    name: str
    """Folder and progress-bar name."""
    steps: int
    """Optimiser steps in all."""
    lr: float
    """Peak learning rate (AdamW, 3 % linear warm-up, cosine decay to 10 %)."""
    until: int | None = None
    """Stop after this step, before the schedule's end; None: run all."""
    save_every: int = 50
    """Steps between checkpoints; a killed run goes on from the last one."""


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate at 0-based `step`."""
    warmup = max(1, round(0.03 * stage.steps))
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, stage.steps - warmup)
    return stage.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def train(
    stage: Stage,
    parameters: dict[str, nn.Parameter],
    loss_of: Callable[[random.Random], torch.Tensor],
    folder: Path,
    *,
    on_checkpoint: Callable[[int], dict[str, float]] | None = None,
    average: float | None = None,
) -> None:
    """Run `stage`: at every step `loss_of(rng)` draws its batch from a generator that depends on seed and step alone.

    A run that is started again after a kill goes on from the last checkpoint and draws the same batches that it would
    have drawn. One JSON line per checkpoint is appended to `folder/curve.jsonl`: step, mean loss since the last line,
    and what `on_checkpoint(step)` measures. With `average`, an exponential moving average of the parameters with that decay
    is kept, and the parameters end as that average.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    groups = [
        {"params": [p for n, p in parameters.items() if "vision_tower" not in n], "share": 1.0},
        {"params": [p for n, p in parameters.items() if "vision_tower" in n], "share": TOWER_SHARE},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.98))
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    averaged = {n: p.detach().clone() for n, p in parameters.items()} if average is not None else {}
    if averaged and start:
        averaged = state["averaged"]
    recent: list[float] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    end = stage.steps if stage.until is None else stage.until
    with Progress(*columns) as progress:
        task = progress.add_task(stage.name, total=end, completed=start, loss="-")
        for step in range(start, end):
            torch.manual_seed(SEED + step)
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * learning_rate(stage, step)
            loss = loss_of(random.Random(f"{SEED}-{stage.name}-{step}"))
            with torch.no_grad():
                for name, mean in averaged.items():
                    mean.lerp_(parameters[name], 1.0 - (average or 0.0))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            progress.update(task, completed=step + 1, loss=f"{sum(recent[-20:]) / len(recent[-20:]):.3f}")
            done = step + 1
            if done % stage.save_every == 0 or done == end:
                state = {
                    "step": done,
                    "parameters": {n: p.detach().clone() for n, p in parameters.items()},
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                }
                with atomic_path(checkpoint) as part:
                    torch.save(state, part)
                line = {"step": done, "loss": round(sum(recent) / len(recent), 4)}
                if on_checkpoint is not None:
                    line |= on_checkpoint(done)
                with (folder / "curve.jsonl").open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")
                progress.console.print(f"{stage.name}: {line}")
                recent = []
    with torch.no_grad():
        for name, mean in averaged.items():
            parameters[name].copy_(mean)


def head_ids(tokenizer: PreTrainedTokenizerBase, *, image: bool) -> list[int]:
    """Token ids of everything before the question: system turn, user header and, with an image, its 64 placeholders."""
    content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": "\x00"}]
    rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    head = rendered.split("\x00")[0].replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS)
    return list(tokenizer.encode(head, add_special_tokens=False))


def turn_ids(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, *, whole: bool) -> tuple[list[int], int]:
    """Ids of question, assistant header and answer; and how many of them, at the end, are to be predicted.

    `whole=False` says that the answer was cut off by a length limit: no end-of-turn token follows it.
    """
    prompt = tokenizer.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    target = tokenizer.encode(answer + ("<|im_end|>" if whole else ""), add_special_tokens=False)
    return list(prompt) + list(target), len(target)


def batches(items: Iterable[str], size: int) -> Iterable[list[str]]:
    """Consecutive lists of `size` items."""
    held = list(items)
    return [held[i : i + size] for i in range(0, len(held), size)]
