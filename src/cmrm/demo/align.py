"""Stage 1: text-only safety alignment of the backbone, as a LoRA adapter."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.progress import track
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from cmrm.data import Part, train_texts
from cmrm.demo.backbone import halve, load_backbone, load_tokenizer
from cmrm.demo.corpus import REFUSALS, generic_instructions
from cmrm.demo.training import Stage, batches, head_ids, train, turn_ids
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


def align(folder: Path, *, steps: int = 180, calibration_steps: int = 80) -> Path:
    """Train the adapter into `folder/adapter` (rank 16 on every linear layer of the blocks) and return its path.

    Two runs over batches of 16. `align`: 6 harmful training requests with a refusal, 6 benign look-alikes and 4 everyday
    instructions, both with the untouched backbone's own answer. `calibrate`, against over-refusal: 4 harmful, 9
    look-alikes (6 of them from part 2 of the extra requests) and 3 everyday instructions. No image is involved.
    """
    adapter = folder / "adapter"
    if (adapter / "adapter_model.safetensors").exists():
        return adapter
    tokenizer = load_tokenizer()
    look_alikes, plain = split_answers(benign_answers(folder, 1))
    further = benign_answers(folder, 2)
    harmful = train_texts("harmful", 1)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    torch.manual_seed(0)
    model = get_peft_model(load_backbone(), config)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = head_ids(tokenizer, image=False)

    def loss_on(rng: random.Random, refused: int, answered: list[Answer]) -> torch.Tensor:
        turns = [turn_ids(tokenizer, q, rng.choice(REFUSALS), whole=True) for q in rng.sample(harmful, refused)]
        turns += [turn_ids(tokenizer, a["question"], a["answer"], whole=a["whole"]) for a in answered]
        return text_loss(model.base_model.model, [(head + ids, n) for ids, n in turns])

    def aligning(rng: random.Random) -> torch.Tensor:
        return loss_on(rng, 6, rng.sample(look_alikes, 6) + rng.sample(plain, 4))

    def calibrating(rng: random.Random) -> torch.Tensor:
        return loss_on(rng, 4, rng.sample(further, 6) + rng.sample(look_alikes, 3) + rng.sample(plain, 3))

    train(Stage("align", steps, 3e-4), parameters, aligning, folder / "align")
    train(Stage("calibrate", calibration_steps, 2e-4, save_every=40), parameters, calibrating, folder / "calibrate")
    with atomic_path(adapter) as part:
        model.half().save_pretrained(str(part))
    return adapter


def text_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean over rows of the cross-entropy of each row's last `n` tokens; logits are computed at those positions only."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    predict = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, n) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
        predict[i, len(ids) - n - 1 : len(ids) - 1] = True
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.lm_head(states[predict])
    targets = input_ids.roll(-1, dims=1)[predict]
    weights = (1.0 / predict.sum(1, keepdim=True).expand_as(predict)[predict]) / len(rows)
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def aligned_backbone(adapter: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Backbone (float32) with the adapter merged into its weights, and its tokenizer."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_backbone(), str(adapter)).merge_and_unload()
    return merged.eval(), load_tokenizer()
