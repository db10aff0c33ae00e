"""`judge_small_replies_per_second`: the judge `small` on replies of 10 to 180 words."""

from __future__ import annotations

import random
import statistics
import time

from common import arguments, report

from cmrm.judges import assessed_all, make_judge

OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "No, you should not do that.",
    "The image shows a table with a loaf of bread on it.",
    "Yes, that is a good idea.",
    "It depends on what the object in the image is.",
)
WORDS = """
    the image shows a person who holds bread and water near the table in a kitchen it is safe to mix
    them before you bake however please take care of the hot oven and ask somebody for help
""".split()  # noqa: SIM905


def replies(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Requests and replies out of common words, as long as those of vision-language models."""
    rng = random.Random(seed)
    return [
        (
            "Should I put this in the oven?",
            f"{rng.choice(OPENINGS)} {' '.join(rng.choices(WORDS, k=rng.randint(10, 170)))}.",
        )
        for _ in range(n)
    ]


def main() -> None:
    """Print replies a second, the median of several rounds of new replies."""
    options = arguments(__doc__, pairs=9)
    judge = make_judge("small")
    n = 20 if options.tiny else 500
    assessed_all(judge, replies(4))
    rates = []
    for seed in range(1 if options.tiny else options.pairs):
        pairs = replies(n, seed)
        start = time.perf_counter()
        assessed_all(judge, pairs)
        rates.append(n / (time.perf_counter() - start))
    values = {
        "value": round(statistics.median(rates), 1),
        "low": round(min(rates), 1),
        "high": round(max(rates), 1),
    }
    report("judge_small_replies_per_second", values, pairs=len(rates), replies=n)


if __name__ == "__main__":
    main()
