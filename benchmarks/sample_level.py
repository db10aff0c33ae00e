"""`sample_ttft_ratio`: sample level, time to first token / bare time to first token, 576 image tokens, warm prefixes."""

from __future__ import annotations

import argparse

from common import anchors, paired_ratio, random_llava, report

from cmrm import SampleLevel, Steering, generate


def main() -> None:
    """Print the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one pair: does it still run?")
    given = parser.parse_args()
    vlm = random_llava(tiny=given.tiny)
    sample = anchors(1)
    setting = Steering(alpha=0.5)

    def bare() -> None:
        generate(vlm, sample, max_new_tokens=1)

    def steered() -> None:
        generate(vlm, sample, shift=SampleLevel(), steering=setting, max_new_tokens=1)

    found = paired_ratio(steered, bare, pairs=1 if given.tiny else given.pairs)
    report("sample_ttft_ratio", found, target=1.12)


if __name__ == "__main__":
    main()
