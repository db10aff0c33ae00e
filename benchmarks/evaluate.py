"""`evaluate_ratio`: throughput through Inspect and the provider / of a bare batched `generate` on the same prompts and batches."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace

from common import anchors, arguments, paired_ratio, random_llava, report
from inspect_ai import eval as inspect_eval
from inspect_ai.model import get_model

from cmrm import generate
from cmrm.evaluate import provider
from cmrm.evaluate.tasks import set_task
from cmrm.prompts import Loaded


def main() -> None:
    """Print the figure: replies a second through Inspect / bare."""
    given = arguments(__doc__, samples=64, batch_size=16, tokens=24, pairs=3)
    n, size, tokens = (4, 2, 4) if given.tiny else (given.samples, given.batch_size, given.tokens)
    vlm = random_llava(tiny=given.tiny)
    provider._LOADED[json.dumps(["random", {}], sort_keys=True)] = vlm
    samples = [replace(sample, label="harmful") for sample in anchors(n)]
    task = set_task(
        Loaded("bench", tuple(samples), (), ()), "original", ["keyword"], max_new_tokens=tokens, batch_size=size
    )
    model = get_model("cmrm/random", memoize=False, batch_size=size)

    def bare() -> None:
        generate(vlm, samples, max_new_tokens=tokens, batch_size=size)

    with tempfile.TemporaryDirectory() as folder:

        def through_inspect() -> None:
            log = inspect_eval(
                task, model=model, log_dir=folder, display="none", log_images=False, max_samples=4 * size
            )[0]
            assert log.status == "success", log.error

        found = paired_ratio(bare, through_inspect, pairs=1 if given.tiny else given.pairs)
    report("evaluate_ratio", found, samples=n, batch_size=size, tokens=tokens, target=0.95)


if __name__ == "__main__":
    main()
