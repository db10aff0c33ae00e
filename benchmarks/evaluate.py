"""`evaluate_ratio`: throughput through Inspect / of a bare `generate` on the same batches."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace

from common import anchors, arguments, paired_ratio, random_llava, report
from inspect_ai import eval as inspect_eval
from inspect_ai.model import get_model

from cmrm import generate
from cmrm.engines.transformers import TransformersEngine
from cmrm.evaluate import provider
from cmrm.evaluate.tasks import set_task
from cmrm.prompts import Loaded


def main() -> None:
    """Print the figure: replies a second through Inspect / bare."""
    options = arguments(__doc__, samples=64, batch_size=16, tokens=24, pairs=3)
    n, size, tokens = (
        (4, 2, 4) if options.tiny else (options.samples, options.batch_size, options.tokens)
    )
    vlm = random_llava(tiny=options.tiny)
    provider._ENGINES[json.dumps(["random", {}], sort_keys=True)] = TransformersEngine(vlm)
    samples = [replace(sample, label="harmful") for sample in anchors(n)]
    task = set_task(
        Loaded("bench", tuple(samples), (), ()),
        "original",
        ["keyword"],
        max_new_tokens=tokens,
        batch_size=size,
    )
    model = get_model("cmrm/random", memoize=False, batch_size=size)

    def bare() -> None:
        generate(vlm, samples, max_new_tokens=tokens, batch_size=size)

    with tempfile.TemporaryDirectory() as folder:

        def through_inspect() -> None:
            log = inspect_eval(
                task,
                model=model,
                log_dir=folder,
                display="none",
                log_images=False,
                max_samples=4 * size,
            )[0]
            assert log.status == "success", log.error

        ratio = paired_ratio(bare, through_inspect, pairs=1 if options.tiny else options.pairs)
    report("evaluate_ratio", ratio, samples=n, batch_size=size, tokens=tokens, target=0.95)


if __name__ == "__main__":
    main()
