"""Stage 1: text-only safety alignment of the backbone, as a LoRA adapter."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from rich.progress import track

from cmrm.demo.backbone import halve, load_backbone, load_tokenizer, prepare_libraries
from cmrm.demo.train.corpus import REFUSALS, generic_instructions
from cmrm.demo.train.training import Stage, head_ids, train, turn_ids
from cmrm.files import atomic_path
from cmrm.prompts.ours import FORMS, Part, load_prompts, train_texts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ANSWER_TOKENS = 32
"""Length limit of the untouched backbone's answers."""
ANSWER_BATCH = 48
"""Instructions that the untouched backbone answers at once; another number changes its answers."""
REFUSAL_STARTS = ("i'm sorry", "i am sorry", "sorry", "i cannot", "i can't", "as an ai")
"""Starts of answers that are left out, because no benign instruction is to be refused."""


class Answer(TypedDict):
    """A benign instruction with the answer of the untouched backbone."""

    question: str
    answer: str
    whole: bool


@torch.inference_mode()
def benign_answers(folder: Path, part: Part) -> list[Answer]:
    """The untouched backbone's own greedy answers to the benign training requests of `part`.

    Part 1 has the everyday instructions too. Answers that start as refusals are left out. The
    answers are computed once and cached in `folder`.
    """
    target = folder / f"benign_answers_{part}.json"
    answers: list[Answer]
    if target.exists():
        answers = json.loads(target.read_text(encoding="utf-8"))
        return answers
    tokenizer = load_tokenizer()
    model = halve(load_backbone())
    everyday = generic_instructions() if part == 1 else []
    questions = sorted(train_texts("benign", part) + everyday, key=len)
    answers = []
    for start in track(range(0, len(questions), ANSWER_BATCH), description="benign answers"):
        batch = questions[start : start + ANSWER_BATCH]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        replies = output[:, inputs["input_ids"].shape[1] :].tolist()
        for question, ids in zip(batch, replies, strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            if not text.lower().startswith(REFUSAL_STARTS):
                whole = tokenizer.eos_token_id in ids
                answers.append(Answer(question=question, answer=text, whole=whole))
    with atomic_path(target) as scratch:
        scratch.write_text(json.dumps(answers, indent=0), encoding="utf-8")
    return answers


def split_answers(answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """`answers` as (look-alikes, everyday instructions)."""
    everyday = set(generic_instructions())
    return (
        [answer for answer in answers if answer["question"] not in everyday],
        [answer for answer in answers if answer["question"] in everyday],
    )


@dataclass(frozen=True)
class Mix:
    """Number of rows that a batch has from each pool."""

    harmful_acts: int
    """Harmful training acts of the prompt set, in any of its forms; answered with a refusal."""
    harmful_others: int
    """Further harmful requests of `train_extra.csv`; answered with a refusal."""
    benign_acts: int
    """Benign look-alikes of the prompt set; answered by the untouched backbone, as the next two."""
    benign_others: int
    """Further benign look-alikes."""
    everyday: int
    """Everyday instructions."""


@dataclass(frozen=True)
class AlignmentStage:
    """Settings of one stage of the text alignment."""

    schedule: Stage
    """Steps and learning rate."""
    mix: Mix
    """Rows of a batch."""
    dropout: float
    """LoRA dropout."""
    cut: int
    """Answer tokens that three of four rows are cut to: the first ones decide whether to refuse."""
    average: float | None = None
    """Decay of an exponential moving average of the weights, which the stage then ends with."""


STAGES = (
    AlignmentStage(Stage("align", 200, 2e-4), Mix(6, 6, 8, 6, 6), dropout=0.05, cut=8),
    AlignmentStage(
        Stage("sharpen", 260, 4e-4, save_every=65), Mix(6, 8, 6, 9, 4), dropout=0.1, cut=5
    ),
    AlignmentStage(
        Stage("calibrate", 90, 2e-4, save_every=45),
        Mix(4, 7, 7, 12, 4),
        dropout=0.1,
        cut=5,
        average=0.96,
    ),
    AlignmentStage(
        Stage("soften", 60, 1.5e-4, save_every=30),
        Mix(3, 5, 8, 14, 4),
        dropout=0.1,
        cut=5,
        average=0.93,
    ),
)
"""The last two stages shift the balance from refusing towards answering, with averaged weights."""

FIRST_LAYER = 12
"""First decoder layer that LoRA adapts; the last is 29.

In these layers a linear probe separates harmful requests from look-alikes before any training.
"""
FIRST_WEIGHT = 4.0
"""Weight of the first two answer tokens in the loss, relative to the others."""
PARTS: tuple[Part, ...] = (1, 2, 4)
"""Parts of the further requests that are trained on here; the others are for visual tuning."""


@dataclass(frozen=True)
class Pools:
    """Requests and answers that batches are drawn from; for the fields see `Mix`."""

    harmful_acts: list[str]
    harmful_others: list[str]
    benign_acts: list[Answer]
    benign_others: list[Answer]
    everyday: list[Answer]


def training_pools(folder: Path) -> Pools:
    """Requests and answers of the alignment; the backbone's answers are cached in `folder`."""
    everyday = set(generic_instructions())
    acts = {
        label: [
            form.format(prompt.act)
            for prompt in load_prompts()
            if prompt.label == label and prompt.split == "train"
            for form in FORMS
        ]
        for label in ("harmful", "benign")
    }
    known = set(acts["harmful"]) | set(acts["benign"])
    harmful = [text for part in PARTS for text in train_texts("harmful", part)]
    answers = [answer for part in PARTS for answer in benign_answers(folder, part)]
    return Pools(
        harmful_acts=acts["harmful"],
        harmful_others=[text for text in harmful if text not in known],
        benign_acts=[answer for answer in answers if answer["question"] in known],
        benign_others=[answer for answer in answers if answer["question"] not in known | everyday],
        everyday=[answer for answer in answers if answer["question"] in everyday],
    )


def align(folder: Path, stages: Sequence[AlignmentStage] = STAGES) -> Path:
    """Train the adapter into `folder/adapter` and return that path.

    The adapter has rank 16, on the linear layers of decoder layers 12 to 29. No image is involved.
    `curve.jsonl` in each stage's folder records the loss.

    Raises:
        MissingExtraError: gguf or peft is not installed.
    """
    adapter = folder / "adapter"
    if (adapter / "adapter_model.safetensors").exists():
        return adapter
    prepare_libraries("gguf", "peft")
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer()
    pools = training_pools(folder)
    head = head_ids(tokenizer, image=False)
    linear = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=linear.split(),
        layers_to_transform=list(range(FIRST_LAYER, 30)),
        lora_dropout=stages[0].dropout,
    )
    torch.manual_seed(0)
    model = get_peft_model(load_backbone(), config)
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def row(
        question: str, answer: str, whole: bool, cut: int, rng: random.Random
    ) -> tuple[list[int], int]:
        ids, targets = turn_ids(tokenizer, question, answer, whole=whole)
        if rng.random() < 0.75 and targets > cut:
            ids, targets = ids[: len(ids) - (targets - cut)], cut
        return head + ids, targets

    def loss_of(rng: random.Random, mix: Mix, cut: int) -> torch.Tensor:
        harmful = rng.sample(pools.harmful_acts, mix.harmful_acts)
        harmful += rng.sample(pools.harmful_others, mix.harmful_others)
        rows = [row(question, rng.choice(REFUSALS), True, cut, rng) for question in harmful]
        benign = rng.sample(pools.benign_acts, mix.benign_acts)
        benign += rng.sample(pools.benign_others, mix.benign_others)
        benign += rng.sample(pools.everyday, mix.everyday)
        rows += [row(a["question"], a["answer"], a["whole"], cut, rng) for a in benign]
        return text_loss(model.base_model.model, rows)

    for stage in stages:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = stage.dropout
        train(
            stage.schedule,
            parameters,
            partial(loss_of, mix=stage.mix, cut=stage.cut),
            folder / stage.schedule.name,
            average=stage.average,
        )
    model.eval()
    with atomic_path(adapter) as scratch:
        model.half().save_pretrained(str(scratch))
    return adapter


def text_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Weighted cross-entropy of the targets of each row, averaged over rows; a float32 scalar.

    A row is (token ids, number of targets at their end). The first two targets weigh
    `FIRST_WEIGHT`, the others 1. Rows are padded on the right; logits are computed at the targets
    only.
    """
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for i, (ids, targets) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
        share = torch.ones(targets)
        share[:2] = FIRST_WEIGHT
        weights[i, len(ids) - targets - 1 : len(ids) - 1] = share / share.sum() / len(rows)
    predict = weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(
            input_ids=input_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(states[predict])
    labels = input_ids.roll(-1, dims=1)[predict]
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights[predict]).sum()
