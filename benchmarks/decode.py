"""`decode_ratio_hooks`: dataset level, decoded tokens a second steered / bare, by hooks; one row,
after a 576-token image."""

from __future__ import annotations

import torch
from common import anchors, arguments, random_llava, report, seconds

from cmrm import Steering, steer
from cmrm.model.compat import cache_of, with_cache
from cmrm.model.encode import encode
from cmrm.prompts.conditions import build_requests


def main() -> None:
    """Print the figure."""
    options = arguments(__doc__, tokens=64, pairs=15)
    vlm = random_llava(tiny=options.tiny)
    inputs = encode(vlm, list(build_requests(anchors(1), "original")))
    generator = torch.Generator().manual_seed(0)
    vectors = 1e-3 * torch.randn(vlm.n_layers, vlm.hidden_size, generator=generator)
    count = 4 if options.tiny else options.tokens

    @torch.inference_mode()
    def decode() -> float:
        """Seconds of decoding alone, token by token, behind a fresh prefill."""
        behind = with_cache(
            vlm.model, cache_of(vlm.model(**inputs, use_cache=True, logits_to_keep=1))
        )
        token = torch.full((1, 1), 42)

        def tokens() -> None:
            for _ in range(count):
                vlm.model(input_ids=token, **behind)

        return seconds(tokens)

    def steered() -> float:
        with steer(vlm, vectors, Steering(0.5)):
            return decode()

    pairs = 1 if options.tiny else options.pairs
    steered()
    decode()
    ratios, speeds = [], []
    for k in range(pairs):
        first, second = (decode, steered) if k % 2 else (steered, decode)
        times = {first: first(), second: second()}
        ratios.append(times[decode] / times[steered])
        speeds.append(count / times[decode])
    ratios.sort()
    speeds.sort()
    ratio = {
        "value": round(ratios[pairs // 2], 4),
        "low": round(ratios[0], 4),
        "high": round(ratios[-1], 4),
        "pairs": pairs,
        "tokens_per_second_bare": round(speeds[pairs // 2], 1),
    }
    report("decode_ratio_hooks", ratio, tokens=count, target=0.98)


if __name__ == "__main__":
    main()
