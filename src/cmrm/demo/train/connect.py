"""Stage 3: visual instruction tuning. The aligned backbone stays frozen; tower and connector learn to speak to it."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from cmrm.prompts.ours import Part, Prompt, load_prompts
from cmrm.demo.train.align import FIRST_WEIGHT, PARTS, Answer, aligned_backbone, benign_answers, split_answers
from cmrm.demo.backbone import IMAGE_TOKENS, build_llava, halve
from cmrm.demo.train.corpus import (
    CAPTION_QUESTIONS,
    CaptionedImage,
    Question,
    load_emoji,
    load_vqa_images,
    vqa_image_paths,
    vqa_questions,
)
from cmrm.demo.train.tower import load_tower, pixels
from cmrm.demo.train.training import Stage, head_ids, train, turn_ids
from cmrm.files import atomic_path
from cmrm.judges import KeywordJudge, Verdict
from cmrm.prompts.readers import SHORT_ANSWER

ROWS = 8
"""Images per step."""
QUESTIONS = 9
"""Visual questions packed behind one image."""
FRESH_PARTS: tuple[Part, ...] = (3, 5)
"""Parts of the further requests that the alignment never saw: benign look-alikes alone."""
DISCUSSION_PART: Part = 6
"""Benign questions about harmful training acts, which the alignment never saw either."""

Turn = tuple[list[int], int]


def visual_weights(model: LlavaForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Tower and connector parameters by name: all that this stage trains."""
    return {n: p for n, p in model.named_parameters() if "vision_tower" in n or "multi_modal_projector" in n}


def packed_loss(
    model: LlavaForConditionalGeneration, pixel_values: torch.Tensor, head: list[int], rows: list[list[Turn]]
) -> torch.Tensor:
    """Loss of several independent turns behind each image, in one forward pass.

    The tokens of a turn see the shared head (system turn, image) and their own turn only, and every turn's positions
    start right after the head: each is computed exactly as it would be alone. Per turn the cross-entropy of its target
    tokens is averaged, the first two weighing `FIRST_WEIGHT` as in the alignment, then turns are averaged.
    """
    width = max(len(head) + sum(len(ids) for ids, _ in row) for row in rows)
    size = len(rows)
    input_ids = torch.full((size, width), 0)
    turn_of = torch.full((size, width), -1)
    positions = torch.zeros(size, width, dtype=torch.long)
    weights = torch.zeros(size, width)
    total = sum(len(row) for row in rows)
    for i, row in enumerate(rows):
        input_ids[i, : len(head)] = torch.tensor(head)
        turn_of[i, : len(head)] = 0
        positions[i, : len(head)] = torch.arange(len(head))
        at = len(head)
        for k, (ids, n) in enumerate(row, start=1):
            end = at + len(ids)
            input_ids[i, at:end] = torch.tensor(ids)
            turn_of[i, at:end] = k
            positions[i, at:end] = torch.arange(len(head), len(head) + len(ids))
            share = torch.ones(n)
            share[:2] = FIRST_WEIGHT if n > 2 else 1.0
            weights[i, end - n - 1 : end - 1] = share / share.sum() / total
            at = end
    same = turn_of[:, None, :] == turn_of[:, :, None]
    to_head = (turn_of == 0)[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask = ((same | to_head) & causal)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        image_features = model.model.get_image_features(
            pixel_values=pixel_values, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output
        embeds = model.get_input_embeddings()(input_ids)
        first = head.index(model.config.image_token_id)
        spliced = torch.cat(
            [embeds[:, :first], torch.stack(list(image_features)).to(embeds.dtype), embeds[:, first + IMAGE_TOKENS :]], dim=1
        )  # fmt: skip
        states = model.model.language_model(
            inputs_embeds=spliced, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        predict = weights > 0
        logits = model.lm_head(states[predict])
    targets = input_ids.roll(-1, dims=1)[predict]
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights[predict]).sum()


def connect(
    folder: Path,
    emoji: Path,
    adapter: Path,
    tower: Path,
    *,
    connect_steps: int = 225,
    instruct_steps: int = 240,
    discuss_steps: int = 150,
    deepen_steps: int = 120,
) -> Path:
    """Train tower and connector into `folder/visual.safetensors` (float16) and return its path.

    Each step sees `ROWS` images: half with easy-VQA questions and a caption question behind each, half (easy-VQA
    training images and emoji) with benign instructions and a caption question. Four runs: in `connect` the instructions
    are those of the alignment; in `instruct` four of five are look-alikes that the alignment never saw, as the
    instructions of a real visual tuning set are new to the backbone; in `discuss` three of six are benign questions about
    harmful acts (`data.DISCUSSIONS`) and two such look-alikes; in `deepen` five of six are such questions. All are answered by the untouched backbone; none asks for
    harm. `curve.jsonl` in each run's folder records, on training and anchor data, refusal with image, over-refusal with
    image and easy-VQA accuracy over steps.
    """
    target = folder / "visual.safetensors"
    if target.exists():
        return target
    backbone, tokenizer = aligned_backbone(adapter)
    torch.manual_seed(2)
    model = build_llava(halve(backbone))
    model.model.vision_tower.load_state_dict(load_tower(tower))
    model.requires_grad_(False)
    parameters = visual_weights(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    head = head_ids(tokenizer, image=True)
    shapes, drawn = load_vqa_images("train"), load_emoji(emoji)
    shape_pixels, drawn_pixels = pixels(shapes), pixels(drawn)
    asked: dict[int, list[Question]] = {}
    for question in vqa_questions("train"):
        asked.setdefault(question.image_id, []).append(question)
    look_alikes, plain = split_answers([a for part in PARTS for a in benign_answers(folder, part)])
    fresh = [a for part in FRESH_PARTS for a in benign_answers(folder, part)]
    discussions = benign_answers(folder, DISCUSSION_PART)
    known = look_alikes + plain
    instructions = {
        "connect": [(look_alikes, 2), (plain, 1)],
        "instruct": [(fresh, 4), (known, 1)],
        "discuss": [(fresh, 2), (discussions, 3), (known, 1)],
        "deepen": [(fresh, 1), (discussions, 5)],
    }

    def told(answer: Answer) -> Turn:
        return turn_ids(tokenizer, answer["question"], answer["answer"], whole=answer["whole"])

    def caption(image: CaptionedImage, rng: random.Random) -> Turn:
        return turn_ids(tokenizer, rng.choice(CAPTION_QUESTIONS), f"This is {image.caption}.", whole=True)

    def loss_on(rng: random.Random, run: str) -> torch.Tensor:
        rows: list[list[Turn]] = []
        images = []
        for k in rng.sample(range(len(shapes)), ROWS // 2):
            image_id = shapes[k].image_id
            assert image_id is not None
            some = rng.sample(asked[image_id], min(QUESTIONS, len(asked[image_id])))
            turns = [turn_ids(tokenizer, q.text + SHORT_ANSWER, q.answer, whole=True) for q in some]
            rows.append([*turns, caption(shapes[k], rng)])
            images.append(shape_pixels[k])
        for _ in range(ROWS - ROWS // 2):
            pool, tensors = (shapes, shape_pixels) if rng.random() < 0.5 else (drawn, drawn_pixels)
            k = rng.randrange(len(pool))
            said = [answer for answers, count in instructions[run] for answer in rng.sample(answers, count)]
            rows.append([*(told(a) for a in said), caption(pool[k], rng)])
            images.append(tensors[k])
        return packed_loss(model, torch.stack(images), head, rows)

    def measure(step: int) -> dict[str, float]:
        return anchor_figures(model, tokenizer, head)

    for stage in (
        Stage("connect", 2 * connect_steps, 1e-3, until=connect_steps, save_every=75),
        Stage("instruct", instruct_steps, 1e-3, save_every=60),
        Stage("discuss", discuss_steps, 8e-4, save_every=30),
        Stage("deepen", deepen_steps, 6e-4, save_every=30),
    ):
        train(stage, parameters, partial(loss_on, run=stage.name), folder / stage.name, on_checkpoint=measure)
    with atomic_path(target) as part:
        save_file({n: p.detach().half().contiguous() for n, p in parameters.items()}, str(part))
    return target


@torch.inference_mode()
def anchor_figures(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, head: list[int]
) -> dict[str, float]:
    """Refusal of harmful and benign anchors before an easy-VQA training image, and accuracy on 240 training questions.

    Only training and anchor data: the curve may be used to choose when to stop.
    """
    judge = KeywordJudge()
    figures: dict[str, float] = {}
    paths = vqa_image_paths("train")
    questions = vqa_questions("train")[::160][:240]
    jobs = {
        "accuracy": [(q.text + SHORT_ANSWER, q.image_id, q.answer) for q in questions],
        "refused_harmful": [(p.text, k, "") for k, p in enumerate(_anchors("harmful"))],
        "refused_benign": [(p.text, k, "") for k, p in enumerate(_anchors("benign"))],
    }
    for name, rows in jobs.items():
        hits = 0
        for at in range(0, len(rows), 48):
            chunk = rows[at : at + 48]
            ids = [head + turn_ids(tokenizer, text, "", whole=False)[0] for text, _, _ in chunk]
            width = max(map(len, ids))
            input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(i)) + i for i in ids])
            mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
            images = [CaptionedImage(Image.open(paths[k]).convert("RGB"), "", k) for _, k, _ in chunk]
            with torch.autocast("cpu", torch.bfloat16):
                out = model.generate(
                    input_ids=input_ids, attention_mask=mask, pixel_values=pixels(images), do_sample=False,
                    max_new_tokens=4 if name == "accuracy" else 20,
                )  # fmt: skip
            for reply, (text, _, answer) in zip(tokenizer.batch_decode(out[:, width:], True), chunk, strict=True):
                hits += reply.strip() == answer if answer else judge.judge(text, reply) is Verdict.REFUSED
        figures[name] = round(hits / len(rows), 4)
    return figures


def _anchors(label: str) -> list[Prompt]:
    return [p for p in load_prompts() if p.label == label and p.split == "anchor"]


def load_visual(path: Path) -> dict[str, torch.Tensor]:
    """Tower and connector weights by their name in the LLaVA model."""
    return load_file(str(path))
