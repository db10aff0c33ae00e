"""The training loop of all stages (seeded per step, resumable), and chat turns as token ids."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from cmrm.demo.backbone import IMAGE_TOKEN, IMAGE_TOKENS
from cmrm.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 20241112
TOWER_SHARE = 0.2
"""Learning rate of a vision tower that is trained inside a whole VLM, as a share of the stage's."""


@dataclass(frozen=True)
class Stage:
    """Settings of one training stage."""

    name: str
    """Name of its folder and its progress bar; part of the seed of its batches."""
    steps: int
    """Optimiser steps of the whole schedule."""
    lr: float
    """Peak learning rate (AdamW, 3 % linear warm-up, cosine decay to 10 %)."""
    until: int | None = None
    """Step after which the stage stops before its schedule ends; None: the schedule's end."""
    save_every: int = 50
    """Steps between checkpoints. A stopped run resumes from the last one."""


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
    """Run `stage` on `parameters`, which are changed in place.

    At every step `loss_of(rng)` draws a batch and returns its loss; `rng` depends on seed, stage
    name and step alone. A run that is started again after a stop resumes from the last checkpoint
    in `folder` and draws the batches that it would have drawn without the stop.

    One JSON line for each checkpoint is appended to `folder/curve.jsonl`: the step, the mean loss
    since the last line, and the figures that `on_checkpoint(step)` returns.

    Args:
        average: decay of an exponential moving average of the parameters, which they end as; None:
            the parameters end as the last step leaves them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    optimizer = _optimizer(stage, parameters)
    start, averaged = 0, {}
    if average is not None:
        averaged = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        _assign(parameters, state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        averaged = state["averaged"] if averaged else {}
    end = stage.steps if stage.until is None else stage.until
    losses: list[float] = []
    with _progress() as progress:
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
            losses.append(loss.item())
            completed = step + 1
            latest = losses[-20:]
            progress.update(task, completed=completed, loss=f"{sum(latest) / len(latest):.3f}")
            if completed % stage.save_every == 0 or completed == end:
                _save(checkpoint, completed, parameters, optimizer, averaged)
                figures = {"step": completed, "loss": round(sum(losses) / len(losses), 4)}
                if on_checkpoint is not None:
                    figures |= on_checkpoint(completed)
                with (folder / "curve.jsonl").open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(figures) + "\n")
                progress.console.print(f"{stage.name}: {figures}")
                losses = []
    _assign(parameters, averaged)


def _optimizer(stage: Stage, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with the parameters of a vision tower, if there is one, in a group of their own."""
    tower = [p for name, p in parameters.items() if "vision_tower" in name]
    others = [p for name, p in parameters.items() if "vision_tower" not in name]
    groups: list[dict[str, Any]] = [
        {"params": others, "share": 1.0},
        {"params": tower, "share": TOWER_SHARE},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.98))


def _assign(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _save(
    path: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, torch.Tensor],
) -> None:
    state = {
        "step": step,
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "averaged": averaged,
    }
    with atomic_path(path) as part:
        torch.save(state, part)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )


def head_ids(tokenizer: PreTrainedTokenizerBase, *, image: bool) -> list[int]:
    """Token ids before a question: system turn, user header and, with an image, 64 placeholders."""
    images = [{"type": "image"}] if image else []
    turn = {"role": "user", "content": [*images, {"type": "text", "text": "\x00"}]}
    rendered = str(tokenizer.apply_chat_template([turn], tokenize=False))
    head = rendered.split("\x00")[0].replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS)
    return list(tokenizer.encode(head, add_special_tokens=False))


def turn_ids(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, *, whole: bool
) -> tuple[list[int], int]:
    """Token ids of question, assistant header and answer; and the number of targets at their end.

    `whole=False` means that a length limit cut the answer off: no end-of-turn token follows it.
    """
    header = f"{question}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(header, add_special_tokens=False)
    target = tokenizer.encode(answer + ("<|im_end|>" if whole else ""), add_special_tokens=False)
    return list(prompt) + list(target), len(target)
