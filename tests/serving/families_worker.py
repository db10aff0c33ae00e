"""Both engines on one model, in a process of its own: `python families_worker.py NAME FOLDER OUT`.

NAME: a family of the tests, or `demo`. OUT has, for each setting, the replies of both engines.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update({
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
})  # fmt: skip
import families

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_hidden_layers": 4, "initializer_range": 0.08,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"rope_parameters": {**families.MROPE, "mrope_section": [8, 12, 12]}}
}
TOKENS = 8


def main() -> None:
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    import torch
    from PIL import Image

    from cmrm import Steering, load_vlm
    from cmrm.engines.base import Decoding
    from cmrm.engines.transformers import TransformersEngine
    from cmrm.engines.vllm.engine import VllmEngine
    from cmrm.model.identity import identity_of
    from cmrm.prompts.conditions import Request
    from cmrm.shift.artifact import Provenance, ShiftVectors
    from cmrm.shift.resolve import resolved

    model = name
    if name != "demo":
        made, processor = getattr(families, name)(**SIZES, **MORE.get(name, {}))
        made.save_pretrained(folder)
        processor.save_pretrained(folder)
        model = str(folder)
    vlm = load_vlm(model, dtype=torch.float32)
    draw = torch.Generator().manual_seed(4)
    shape = (vlm.n_layers, vlm.hidden_size)
    scale = 2.0 if name != "demo" else 0.5
    shift = ShiftVectors(
        scale * torch.randn(shape, generator=draw),
        Provenance(vlm.model_id, None, type(vlm.model).__name__, shape[1], shape[0]),
        Steering(alpha=0.5), {"direction": torch.randn(shape, generator=draw)},
        identity=identity_of(vlm),
    )  # fmt: skip
    colours = ("red", None, "blue", None, "green")
    requests = []
    for k, colour in enumerate(colours):
        images = () if colour is None else (Image.new("RGB", (64, 64), colour),)
        requests.append(Request(f"What is it? {'Tell me. ' * k}", images))
    engine = VllmEngine(model, dtype="float32", max_model_len=1024, max_num_batched_tokens=1024)
    engine.accept(shift)
    other = TransformersEngine(vlm)
    states = [each.states(requests) for each in (engine, other)]
    apart = float((states[0] - states[1]).abs().max() / states[1].abs().max())
    settings = {
        "none": None, "last": Steering(alpha=0.5), "all": Steering(alpha=0.3, positions="all"),
        "generated": Steering(alpha=0.6, positions="generated"),
        "fill": Steering(operator="fill", alpha=1.0),
    }  # fmt: skip
    replies: dict[str, Any] = {}
    for label, steering in settings.items():
        answered = []
        for each in (engine, other):
            parts = []
            if steering is not None:
                parts = resolved(shift, steering, partial(each.text_states, requests))
            rows = each.answer(requests, parts, Decoding(TOKENS), batch_size=1)
            answered.append([asdict(row) for row in rows])
        replies[label] = answered
    out.write_text(json.dumps({"apart": apart, "replies": replies}))


if __name__ == "__main__":
    main()
