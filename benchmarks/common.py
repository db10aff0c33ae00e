"""What the benchmarks share: the models, interleaved timing, one JSON line per figure."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import Any

import torch

from cmrm.model.compat import patch_torchvision

patch_torchvision()

from transformers import (  # noqa: E402
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from cmrm import generate, wrap_vlm  # noqa: E402
from cmrm.demo.backbone import IMAGE_TOKEN, halve, load_tokenizer  # noqa: E402
from cmrm.engines.transformers import TransformersEngine  # noqa: E402
from cmrm.model.vlm import VLM  # noqa: E402
from cmrm.prompts.ours import prompt_samples  # noqa: E402
from cmrm.prompts.sample import Sample  # noqa: E402

IMAGE_SIZE, PATCH = 336, 14
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
"""SmolLM2-135M."""
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip
"""TinyLlama-1.1B."""


def random_llava(*, tiny: bool = False, large: bool = False) -> VLM:
    """A LLaVA-1.5 in shape (336 pixels, 576 image tokens) on a backbone of SmolLM2-135M's size,
    random weights, bfloat16; `large`: of TinyLlama-1.1B's size.

    Its vision tower is a small one (4 layers, width 256): a real one costs more in a bare forward
    and nothing more in an extraction that runs the image once, so the ratios are upper bounds in
    this respect.
    """
    sizes = LARGE if large else TINY if tiny else SMALL
    tokenizer = load_tokenizer()
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=49152,
                **sizes,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
            ),
            image_token_index=16,
            vision_feature_layer=-1,
        )
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return wrap_vlm(halve(model.eval()), processor, model_id="random LLaVA-1.5 shape")


def anchors(n: int) -> list[Sample]:
    """`n` requests of our prompt set (training and anchor words only), each with an easy-VQA
    image."""
    prompts = prompt_samples("anchor", "harmful") + prompt_samples("anchor", "benign")
    return [
        Sample(
            f"{k}-{prompts[k % len(prompts)].id}",
            prompts[k % len(prompts)].query,
            prompts[k % len(prompts)].image,
        )
        for k in range(n)
    ]


def arguments(doc: str | None, **defaults: int) -> argparse.Namespace:
    """A benchmark's own numbers as options, and --tiny."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and few inputs: does it still run?"
    )
    return parser.parse_args()


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired_ratio(a: Callable[[], Any], b: Callable[[], Any], *, pairs: int) -> dict[str, Any]:
    """Median over pairs of time(a) / time(b), run A B A B in one process after one run of each to
    warm up."""
    a()
    b()
    ratios, times = [], []
    for _ in range(pairs):
        first, second = seconds(a), seconds(b)
        ratios.append(first / second)
        times.append((first, second))
    return {
        "value": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "pairs": pairs,
        "seconds": [round(statistics.median(t[k] for t in times), 3) for k in (0, 1)],
    }


def first_token_ratios(
    engine: TransformersEngine,
    figure: str,
    targets: Mapping[str, float],
    options: argparse.Namespace,
    **steering: Any,
) -> None:
    """Report time to first token under `steering` over bare, for a batch of 8 and for one row.

    `steering`: arguments of `generate`. Every call asks something else: what is kept of the last
    single prompt would shorten its repetition.
    """
    batch = 2 if options.tiny else 8
    for name, rows in ((figure, batch), (f"{figure}_one_row", 1)):
        samples = sorted(anchors(64), key=lambda s: len(s.query))
        sets = [samples[k : k + rows] for k in range(0, len(samples), rows)]
        calls = {kind: cycle(sets) for kind in ("bare", "steered")}

        def bare(calls: Iterator[list[Sample]] = calls["bare"]) -> None:
            generate(engine, next(calls), max_new_tokens=1)

        def steered(calls: Iterator[list[Sample]] = calls["steered"]) -> None:
            generate(engine, next(calls), max_new_tokens=1, **steering)

        ratio = paired_ratio(steered, bare, pairs=1 if options.tiny else options.pairs)
        report(name, ratio, rows=rows, target=targets[name])


def report(figure: str, values: dict[str, Any], **more: Any) -> None:
    """Print one figure as one JSON line, with the machine."""
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps({"figure": figure, **values, **more, "machine": machine}), flush=True)
