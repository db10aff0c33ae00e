"""`decode_ratio_hooks`, `decode_ratio_folded`: decoded tokens a second, steered / bare, one row.

Behind a 576-token image, by hooks, and by a folded checkpoint. bfloat16; float32 on a CPU that
would emulate it. The folded model and the bare one decode by turns, token by token, and the ratio
is that of the median seconds of a token: a bias costs less than what a machine does meanwhile. With
`--large 1` a backbone of 1.1 billion parameters (`decode_ratio_hooks_1b`, ...) instead of 135
million.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import anchors, arguments, random_llava, report, seconds

from cmrm import Steering, load_vlm, steer
from cmrm.engines.fold import fold
from cmrm.model.compat import cache_of, emulates_bfloat16, with_cache
from cmrm.model.encode import encode
from cmrm.model.vlm import VLM
from cmrm.prompts.conditions import build_requests


def main() -> None:
    """Print both figures."""
    options = arguments(__doc__, tokens=64, pairs=15, large=0)
    dtype = torch.float32 if emulates_bfloat16() else torch.bfloat16
    made = random_llava(tiny=options.tiny, large=bool(options.large))
    end = "_1b" if options.large else ""
    generator = torch.Generator().manual_seed(0)
    vectors = 1e-3 * torch.randn(made.n_layers, made.hidden_size, generator=generator)
    with tempfile.TemporaryDirectory() as scratch:
        bare_folder, folded_folder = Path(scratch, "bare"), Path(scratch, "folded")
        made.model.save_pretrained(bare_folder)
        made.processor.save_pretrained(bare_folder)
        fold(bare_folder, 0.5 * vectors, folded_folder, record={"alpha": 0.5})
        vlm, folded = (load_vlm(place, dtype=dtype) for place in (bare_folder, folded_folder))
    count = 4 if options.tiny else options.tokens

    def hooked() -> float:
        with steer(vlm, vectors, Steering(0.5)):
            return decoding(vlm, count)

    def bare() -> float:
        return decoding(vlm, count)

    facts = {"tokens": count, "dtype": str(dtype).removeprefix("torch.")}
    compare(f"decode_ratio_hooks{end}", bare, hooked, options, target=0.98, **facts)
    by_turns(f"decode_ratio_folded{end}", vlm, folded, options, target=0.995, **facts)
    linear(f"linear_bias_ratio{end}", made, dtype, options)


@torch.inference_mode()
def linear(figure: str, vlm: VLM, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Print seconds of one projection of a token without a bias / with one: what PyTorch makes of
    a bias, of which a folded layer has three."""
    settings = vlm.model.config.get_text_config()
    state = torch.randn(1, 1, settings.hidden_size, dtype=dtype)
    weight = torch.randn(settings.intermediate_size, settings.hidden_size, dtype=dtype)
    bias = torch.zeros(settings.intermediate_size, dtype=dtype)
    calls = 2 if options.tiny else 500
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls):
        for place, term in enumerate((None, bias)):
            times[place].append(
                seconds(lambda term=term: torch.nn.functional.linear(state, weight, term))
            )
    plain, biased = (statistics.median(some) for some in times)
    ratio = {"value": round(plain / biased, 4), "microseconds": round(plain * 1e6, 1)}
    report(figure, ratio, calls=calls, dtype=str(dtype).removeprefix("torch."))


def decoding(vlm: VLM, count: int) -> float:
    """Seconds of decoding alone, token by token, behind a fresh prefill."""
    step = decoder(vlm)

    def tokens() -> None:
        for _ in range(count):
            step()

    return seconds(tokens)


@torch.inference_mode()
def decoder(vlm: VLM) -> Callable[[], None]:
    """What decodes one more token behind a fresh prefill."""
    inputs = encode(vlm, list(build_requests(anchors(1), "original")))
    behind = with_cache(vlm.model, cache_of(vlm.model(**inputs, use_cache=True, logits_to_keep=1)))
    token = torch.full((1, 1), 42)

    @torch.inference_mode()
    def step() -> None:
        vlm.model(input_ids=token, **behind)

    return step


def by_turns(
    figure: str, bare: VLM, steered: VLM, options: argparse.Namespace, **facts: object
) -> None:
    """Print the ratio of two models that decode by turns, each first at every other token."""
    pairs, count = (1 if options.tiny else options.pairs), int(str(facts["tokens"]))
    decoding(steered, 4)
    ratios, speeds = [], []
    for _ in range(pairs):
        steps = decoder(bare), decoder(steered)
        times: tuple[list[float], list[float]] = ([], [])
        for k in range(count):
            for place in (0, 1) if k % 2 else (1, 0):
                times[place].append(seconds(steps[place]))
        medians = [statistics.median(some) for some in times]
        ratios.append(medians[0] / medians[1])
        speeds.append(1 / medians[0])
    report_median(figure, ratios, speeds, **facts)


def compare(
    figure: str,
    bare: Callable[[], float],
    steered: Callable[[], float],
    options: argparse.Namespace,
    **facts: object,
) -> None:
    """Print the ratio of two ways by turns, each first in every other pair."""
    pairs = 1 if options.tiny else options.pairs
    steered()
    bare()
    ratios, speeds = [], []
    for k in range(pairs):
        first, second = (bare, steered) if k % 2 else (steered, bare)
        times = {first: first(), second: second()}
        ratios.append(times[bare] / times[steered])
        speeds.append(int(str(facts["tokens"])) / times[bare])
    report_median(figure, ratios, speeds, **facts)


def report_median(figure: str, ratios: list[float], speeds: list[float], **facts: object) -> None:
    """Print the median ratio, the range, and the bare model's median tokens a second."""
    ratio = {
        "value": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "pairs": len(ratios),
        "tokens_per_second_bare": round(statistics.median(speeds), 1),
    }
    report(figure, ratio, **facts)


if __name__ == "__main__":
    main()
