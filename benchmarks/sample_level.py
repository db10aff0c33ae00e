"""`sample_ttft_ratio`: sample level, time to first token / bare, 576 image tokens, warm prefixes.

A batch of 8 requests, and one row. Every call asks something else: what is kept of the last single
prompt would shorten its repetition. The engine keeps the prefixes between calls, as a server does.
"""

from __future__ import annotations

from common import arguments, first_token_ratios, random_llava

from cmrm import SampleLevel, Steering
from cmrm.engines.transformers import TransformersEngine

TARGETS = {"sample_ttft_ratio": 1.12, "sample_ttft_ratio_one_row": 1.12}


def main() -> None:
    """Print the figure."""
    options = arguments(__doc__, pairs=15)
    engine = TransformersEngine(random_llava(tiny=options.tiny))
    first_token_ratios(
        engine, "sample_ttft_ratio", TARGETS, options, shift=SampleLevel(), steering=Steering(0.5)
    )


if __name__ == "__main__":
    main()
