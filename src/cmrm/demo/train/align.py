"""Stage 1: text-only safety alignment of the backbone, as a LoRA adapter."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.progress import track
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from cmrm.prompts.ours import FORMS, Part, load_prompts, train_texts
from cmrm.demo.backbone import halve, load_backbone, load_tokenizer
from cmrm.demo.train.corpus import REFUSALS, generic_instructions
from cmrm.demo.train.training import Stage, batches, head_ids, train, turn_ids
from cmrm.files import atomic_path

ANSWER_TOKENS = 32


class Answer(TypedDict):
    """What the untouched backbone says to a benign instruction."""

    question: str
    answer: str
    whole: bool


@torch.inference_mode()
def benign_answers(folder: Path, part: Part) -> list[Answer]:
    """The untouched backbone's own greedy answers to the benign training requests of `part`; cached in `folder`.

    Part 1 holds the everyday instructions too.

    Answers that are refusals by their start are left out: nothing benign is to be refused.
    """
    target = folder / f"benign_answers_{part}.json"
    if target.exists():
        held: list[Answer] = json.loads(target.read_text(encoding="utf-8"))
        return held
    tokenizer = load_tokenizer()
    model = halve(load_backbone())
    questions = sorted(train_texts("benign", part) + (generic_instructions() if part == 1 else []), key=len)
    answers: list[Answer] = []
    for chunk in track(list(batches(questions, 48)), description="benign answers"):
        prompts = [
            str(tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True))
            for q in chunk
        ]  # fmt: skip
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for question, ids in zip(chunk, out.tolist(), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            if not text.lower().startswith(("i'm sorry", "i am sorry", "sorry", "i cannot", "i can't", "as an ai")):
                answers.append(Answer(question=question, answer=text, whole=tokenizer.eos_token_id in ids))
    with atomic_path(target) as scratch:
        scratch.write_text(json.dumps(answers, indent=0), encoding="utf-8")
    return answers


def split_answers(answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """(look-alikes, everyday instructions)."""
    everyday = set(generic_instructions())
    return [a for a in answers if a["question"] not in everyday], [a for a in answers if a["question"] in everyday]


@dataclass(frozen=True)
class Mix:
    """Rows of one batch, by where they come from."""

    harmful_acts: int
    """Harmful training acts of the prompt set, in any of its forms; answered with a refusal."""
    harmful_others: int
    """Further harmful requests (`train_extra.csv`), each in a form of its own; answered with a refusal."""
    benign_acts: int
    """Benign look-alikes of the prompt set; answered by the untouched backbone, as all that is benign."""
    benign_others: int
    """Further benign look-alikes."""
    everyday: int
    """Everyday instructions."""


@dataclass(frozen=True)
class AlignmentStage:
    """One stage of the text alignment."""

    stage: Stage
    """Steps and learning rate."""
    mix: Mix
    """Batch."""
    dropout: float
    """LoRA dropout."""
    cut: int
    """Three of four rows are cut to so many answer tokens: whether to refuse is decided by the first ones."""
    average: float | None = None
    """Decay of an exponential moving average of the weights, which the stage then ends with."""


STAGES = (
    AlignmentStage(Stage("align", 200, 2e-4), Mix(6, 6, 8, 6, 6), dropout=0.05, cut=8),
    AlignmentStage(Stage("sharpen", 260, 4e-4, save_every=65), Mix(6, 8, 6, 9, 4), dropout=0.1, cut=5),
    AlignmentStage(Stage("calibrate", 90, 2e-4, save_every=45), Mix(4, 7, 7, 12, 4), dropout=0.1, cut=5, average=0.96),
    AlignmentStage(Stage("soften", 60, 1.5e-4, save_every=30), Mix(3, 5, 8, 14, 4), dropout=0.1, cut=5, average=0.93),
)
"""The last two shift the balance from refusing towards answering, with averaged weights."""

FIRST_LAYER = 12
"""LoRA adapts decoder layers 12 to 29; a linear probe tells harmful requests from look-alikes there before any training."""
FIRST_WEIGHT = 4.0
"""Weight of the first two answer tokens against the others."""
PARTS: tuple[Part, ...] = (1, 2, 4)
"""Parts of the further requests that are trained on; the others are kept for visual tuning."""


@dataclass(frozen=True)
class Pools:
    """What batches are drawn from."""

    harmful_acts: list[str]
    harmful_others: list[str]
    benign_acts: list[Answer]
    benign_others: list[Answer]
    everyday: list[Answer]


def training_pools(folder: Path) -> Pools:
    """Requests and answers of the alignment; the untouched backbone's answers are computed once and kept in `folder`."""
    everyday = set(generic_instructions())
    acts = {
        label: [form.format(p.act) for p in load_prompts() if p.label == label and p.split == "train" for form in FORMS]
        for label in ("harmful", "benign")
    }
    known = set(acts["harmful"]) | set(acts["benign"])
    answers = [a for part in PARTS for a in benign_answers(folder, part)]
    return Pools(
        harmful_acts=acts["harmful"],
        harmful_others=[t for part in PARTS for t in train_texts("harmful", part) if t not in known],
        benign_acts=[a for a in answers if a["question"] in known],
        benign_others=[a for a in answers if a["question"] not in known | everyday],
        everyday=[a for a in answers if a["question"] in everyday],
    )


def align(folder: Path, stages: Sequence[AlignmentStage] = STAGES) -> Path:
    """Train the adapter into `folder/adapter` (rank 16, linear layers of the upper blocks) and return its path.

    No image is involved. `curve.jsonl` in each stage's folder records the loss.
    """
    adapter = folder / "adapter"
    if (adapter / "adapter_model.safetensors").exists():
        return adapter
    tokenizer = load_tokenizer()
    pools = training_pools(folder)
    head = head_ids(tokenizer, image=False)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(FIRST_LAYER, 30)),
        lora_dropout=stages[0].dropout,
    )
    torch.manual_seed(0)
    model = get_peft_model(load_backbone(), config)
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def row(question: str, answer: str, whole: bool, cut: int, rng: random.Random) -> tuple[list[int], int]:
        ids, n = turn_ids(tokenizer, question, answer, whole=whole)
        if rng.random() < 0.75 and n > cut:
            ids, n = ids[: len(ids) - (n - cut)], cut
        return head + ids, n

    def loss_on(rng: random.Random, one: AlignmentStage) -> torch.Tensor:
        mix = one.mix
        asked = rng.sample(pools.harmful_acts, mix.harmful_acts) + rng.sample(pools.harmful_others, mix.harmful_others)
        rows = [row(q, rng.choice(REFUSALS), True, one.cut, rng) for q in asked]
        answered = rng.sample(pools.benign_acts, mix.benign_acts) + rng.sample(pools.benign_others, mix.benign_others)
        answered += rng.sample(pools.everyday, mix.everyday)
        rows += [row(a["question"], a["answer"], a["whole"], one.cut, rng) for a in answered]
        return text_loss(model.base_model.model, rows)

    for one in stages:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = one.dropout
        train(one.stage, parameters, partial(loss_on, one=one), folder / one.stage.name, average=one.average)
    model.eval()
    with atomic_path(adapter) as part:
        model.half().save_pretrained(str(part))
    return adapter


def text_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean over rows of the weighted cross-entropy of each row's last `n` tokens, the first two weighing `FIRST_WEIGHT`.

    Logits are computed at those positions only.
    """
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for i, (ids, n) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
        share = torch.ones(n)
        share[:2] = FIRST_WEIGHT
        weights[i, len(ids) - n - 1 : len(ids) - 1] = share / share.sum() / len(rows)
    predict = weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(states[predict])
    targets = input_ids.roll(-1, dims=1)[predict]
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights[predict]).sum()


def aligned_backbone(adapter: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Backbone (float32) with the adapter merged into its weights, and its tokenizer."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_backbone(), str(adapter)).merge_and_unload()
    return merged.eval(), load_tokenizer()
