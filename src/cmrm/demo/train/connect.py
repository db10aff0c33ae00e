"""Stage 3: visual instruction tuning of vision tower and connector; the backbone stays frozen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from cmrm.demo.backbone import IMAGE_TOKENS, aligned_backbone, build_llava, halve, visual_weights
from cmrm.demo.train.align import FIRST_WEIGHT, PARTS, Answer, benign_answers, split_answers
from cmrm.demo.train.corpus import (
    CAPTION_QUESTIONS,
    CaptionedImage,
    load_emoji,
    load_vqa_images,
)
from cmrm.demo.train.tower import pixels
from cmrm.demo.train.training import Stage, head_ids, train, turn_ids
from cmrm.files import atomic_path
from cmrm.judges import KeywordJudge, Verdict
from cmrm.prompts.easy_vqa import SHORT_ANSWER, Question, vqa_image_paths, vqa_questions
from cmrm.prompts.ours import Part, Prompt, load_prompts

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

ROWS = 8
"""Images of one step."""
QUESTIONS = 9
"""Visual questions behind one image, at most."""
FRESH_PARTS: tuple[Part, ...] = (3, 5)
"""Parts of the further requests that the alignment never saw: benign look-alikes only."""
DISCUSSION_PART: Part = 6
"""Part with benign questions about harmful training acts, which the alignment never saw either."""
RUNS = ("connect", "instruct", "discuss", "deepen")
"""Names of the four runs, in order; each has a folder with its `curve.jsonl`."""

Turn = tuple[list[int], int]
"""Token ids of a question and its answer, and the number of targets at their end."""


def packed_loss(
    model: LlavaForConditionalGeneration,
    pixel_values: torch.Tensor,
    head: list[int],
    rows: list[list[Turn]],
) -> torch.Tensor:
    """Loss of several independent turns behind each image, in one forward pass; a float32 scalar.

    The tokens of a turn attend to the shared head (system turn, image) and to their own turn only,
    and the positions of every turn start right after the head: each turn is computed as if it were
    alone. For each turn the cross-entropy of its targets is averaged, the first two weighing
    `FIRST_WEIGHT`; then turns are averaged.

    Args:
        pixel_values: processed images, float32 [rows, 3, height, width].
        head: token ids of the head, with one image in it.
        rows: turns behind each image.
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
        start = len(head)
        for k, (ids, targets) in enumerate(row, start=1):
            end = start + len(ids)
            input_ids[i, start:end] = torch.tensor(ids)
            turn_of[i, start:end] = k
            positions[i, start:end] = torch.arange(len(head), len(head) + len(ids))
            share = torch.ones(targets)
            share[:2] = FIRST_WEIGHT if targets > 2 else 1.0
            weights[i, end - targets - 1 : end - 1] = share / share.sum() / total
            start = end
    same_turn = turn_of[:, None, :] == turn_of[:, :, None]
    to_head = (turn_of == 0)[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask = ((same_turn | to_head) & causal)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        image_features = model.model.get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        ).pooler_output
        embeds = model.get_input_embeddings()(input_ids)
        first = head.index(model.config.image_token_id)
        images = torch.stack(list(image_features)).to(embeds.dtype)
        spliced = [embeds[:, :first], images, embeds[:, first + IMAGE_TOKENS :]]
        states = model.model.language_model(
            inputs_embeds=torch.cat(spliced, dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        predict = weights > 0
        logits = model.lm_head(states[predict])
    labels = input_ids.roll(-1, dims=1)[predict]
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights[predict]).sum()


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
    """Train tower and connector into `folder/visual.safetensors` (float16) and return that path.

    Each step sees `ROWS` images with a caption question behind each. Half of them (easy-VQA
    training images) have easy-VQA questions too, half (easy-VQA training images and emoji) benign
    instructions. The four runs differ in these instructions:

    - `connect`: instructions of the alignment;
    - `instruct`: four of five are look-alikes that the alignment never saw, as the instructions of
      a real visual tuning set are new to the backbone;
    - `discuss`: three of six are benign questions about harmful acts
      (`cmrm.prompts.ours.DISCUSSIONS`), two are such look-alikes;
    - `deepen`: five of six are such questions.

    The untouched backbone answers all of them; none asks for harm. `curve.jsonl` in each run's
    folder records, on training and anchor data, refusal with image, over-refusal with image and
    easy-VQA accuracy over steps.

    Raises:
        MissingExtraError: gguf or peft is not installed.
    """
    target = folder / "visual.safetensors"
    if target.exists():
        return target
    backbone, tokenizer = aligned_backbone(adapter)
    torch.manual_seed(2)
    model = build_llava(halve(backbone))
    model.model.vision_tower.load_state_dict(load_file(tower))
    model.requires_grad_(False)
    parameters = visual_weights(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    head = head_ids(tokenizer, image=True)
    shapes, drawings = load_vqa_images("train"), load_emoji(emoji)
    shape_pixels, drawing_pixels = pixels(shapes), pixels(drawings)
    questions: dict[int, list[Question]] = {}
    for question in vqa_questions("train"):
        questions.setdefault(question.image_id, []).append(question)
    instructions = _instructions(folder)

    def answered(answer: Answer) -> Turn:
        return turn_ids(tokenizer, answer["question"], answer["answer"], whole=answer["whole"])

    def caption(image: CaptionedImage, rng: random.Random) -> Turn:
        question = rng.choice(CAPTION_QUESTIONS)
        return turn_ids(tokenizer, question, f"This is {image.caption}.", whole=True)

    def loss_of(rng: random.Random, run: str) -> torch.Tensor:
        rows: list[list[Turn]] = []
        images = []
        for k in rng.sample(range(len(shapes)), ROWS // 2):
            image_id = shapes[k].image_id
            assert image_id is not None
            pool = questions[image_id]
            chosen = rng.sample(pool, min(QUESTIONS, len(pool)))
            turns = [
                turn_ids(tokenizer, visual.text + SHORT_ANSWER, visual.answer, whole=True)
                for visual in chosen
            ]
            rows.append([*turns, caption(shapes[k], rng)])
            images.append(shape_pixels[k])
        for _ in range(ROWS - ROWS // 2):
            is_shape = rng.random() < 0.5
            captioned, tensors = (shapes, shape_pixels) if is_shape else (drawings, drawing_pixels)
            k = rng.randrange(len(captioned))
            turns = [
                answered(answer)
                for answers, count in instructions[run]
                for answer in rng.sample(answers, count)
            ]
            rows.append([*turns, caption(captioned[k], rng)])
            images.append(tensors[k])
        return packed_loss(model, torch.stack(images), head, rows)

    def measure(step: int) -> dict[str, float]:
        return anchor_figures(model, tokenizer, head)

    stages = (
        Stage("connect", 2 * connect_steps, 1e-3, until=connect_steps, save_every=75),
        Stage("instruct", instruct_steps, 1e-3, save_every=60),
        Stage("discuss", discuss_steps, 8e-4, save_every=30),
        Stage("deepen", deepen_steps, 6e-4, save_every=30),
    )
    for run, stage in zip(RUNS, stages, strict=True):
        loss = partial(loss_of, run=run)
        train(stage, parameters, loss, folder / run, on_checkpoint=measure)
    with atomic_path(target) as part:
        weights = {name: p.detach().half().contiguous() for name, p in parameters.items()}
        save_file(weights, str(part))
    return target


def _instructions(folder: Path) -> dict[str, list[tuple[list[Answer], int]]]:
    """Pools of benign instructions of each run, each with the number that is drawn for an image."""
    aligned = [answer for part in PARTS for answer in benign_answers(folder, part)]
    look_alikes, everyday = split_answers(aligned)
    fresh = [answer for part in FRESH_PARTS for answer in benign_answers(folder, part)]
    discussions = benign_answers(folder, DISCUSSION_PART)
    known = look_alikes + everyday
    return {
        "connect": [(look_alikes, 2), (everyday, 1)],
        "instruct": [(fresh, 4), (known, 1)],
        "discuss": [(fresh, 2), (discussions, 3), (known, 1)],
        "deepen": [(fresh, 1), (discussions, 5)],
    }


@torch.inference_mode()
def anchor_figures(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, head: list[int]
) -> dict[str, float]:
    """Refusal of harmful and of benign anchors with an image, and easy-VQA accuracy, as shares.

    The images are easy-VQA training images, and accuracy is that on 240 training questions: no test
    data, so that the figures may decide when to stop.
    """
    judge = KeywordJudge()
    jobs = {
        "accuracy": [
            (question.text + SHORT_ANSWER, question.image_id, question.answer)
            for question in vqa_questions("train")[::160][:240]
        ],
        "refused_harmful": [(p.text, k, "") for k, p in enumerate(_anchors("harmful"))],
        "refused_benign": [(p.text, k, "") for k, p in enumerate(_anchors("benign"))],
    }
    figures: dict[str, float] = {}
    for name, rows in jobs.items():
        hits = 0
        for start in range(0, len(rows), 48):
            chunk = rows[start : start + 48]
            new_tokens = 4 if name == "accuracy" else 20
            texts = [text for text, _, _ in chunk]
            images = [image_id for _, image_id, _ in chunk]
            replies = _replies(model, tokenizer, head, texts, images, new_tokens)
            for reply, (text, _, answer) in zip(replies, chunk, strict=True):
                if answer:
                    hits += reply.strip() == answer
                else:
                    hits += judge.judge(text, reply) is Verdict.REFUSED
        figures[name] = round(hits / len(rows), 4)
    return figures


def _replies(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    head: list[int],
    texts: Sequence[str],
    image_ids: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """Greedy replies to one batch of requests, each with an easy-VQA training image."""
    paths = vqa_image_paths("train")
    captioned = [CaptionedImage(Image.open(paths[k]).convert("RGB"), "", k) for k in image_ids]
    ids = [head + turn_ids(tokenizer, text, "", whole=False)[0] for text in texts]
    width = max(map(len, ids))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    with torch.autocast("cpu", torch.bfloat16):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=pixels(captioned),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
    return list(tokenizer.batch_decode(output[:, width:], True))


def _anchors(label: str) -> list[Prompt]:
    return [p for p in load_prompts() if p.label == label and p.split == "anchor"]
