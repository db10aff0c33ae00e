"""Peers on the text model that they support: extraction / bare forward of the same prompts, and
decoding steered / bare.

    pip install --no-deps repeng==0.4.0 steering-vectors==0.12.2

They pin older numpy and transformers than cmrm takes, hence --no-deps. A peer that is not installed
is left out and named on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from common import arguments, paired_ratio, report, seconds

from cmrm.demo.backbone import halve, load_backbone, load_tokenizer
from cmrm.model.compat import cache_of, with_cache
from cmrm.prompts.ours import load_prompts

BATCH = 16
Steered = Callable[[], AbstractContextManager[Any]]


def repeng(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[Callable[[], Any], Steered]:
    """repeng: states of all layers, and a control vector at layers 1 to the last (it leaves layer 0
    out)."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # repeng's annotations name a type that numpy 2 took away
    from repeng import ControlModel
    from repeng.extract import batched_get_hiddens

    layers = range(-1, -model.config.num_hidden_layers, -1)

    @contextmanager
    def steered() -> Any:
        wrapped = ControlModel(model, list(layers))
        width = model.config.hidden_size
        wrapped.set_raw_control(
            {k: 1e-3 * torch.ones(width, dtype=model.dtype) for k in wrapped.layer_ids}
        )
        try:
            yield wrapped
        finally:
            wrapped.unwrap()

    return lambda: batched_get_hiddens(model, tokenizer, prompts, list(layers), BATCH), steered


def steering_vectors(
    model: Any, tokenizer: Any, prompts: list[str]
) -> tuple[Callable[[], Any], Steered]:
    """steering-vectors: activations of pairs of prompts at all layers, and a vector at each."""
    from steering_vectors import SteeringVector, extract_activations

    half = len(prompts) // 2
    pairs = list(zip(prompts[:half], prompts[half:], strict=True))
    vector = SteeringVector(
        {
            k: 1e-3 * torch.ones(model.config.hidden_size, dtype=model.dtype)
            for k in range(model.config.num_hidden_layers)
        }
    )
    return lambda: extract_activations(
        model, tokenizer, pairs, batch_size=BATCH
    ), lambda: vector.apply(model)


PEERS = {"repeng": repeng, "steering-vectors": steering_vectors}


def main() -> None:
    """Print `peer_extraction_ratio_<peer>` and `peer_decode_ratio_<peer>` of every installed
    one."""
    options = arguments(__doc__, prompts=128, pairs=5, tokens=64)
    n, pairs, count = (
        (4, 1, 4) if options.tiny else (options.prompts, options.pairs, options.tokens)
    )
    model, tokenizer = halve(load_backbone()), load_tokenizer()
    prompts = sorted((p.text for p in load_prompts() if p.split != "test"), key=len)[:n]
    batches = [
        tokenizer(prompts[k : k + BATCH], padding=True, return_tensors="pt")
        for k in range(0, n, BATCH)
    ]

    single = tokenizer(
        prompts[:1], return_tensors="pt"
    )  # repeng's mask takes one row with the transformers of today

    @torch.inference_mode()
    def bare() -> None:
        for inputs in batches:
            model(**inputs, use_cache=False)

    @torch.inference_mode()
    def decode() -> float:
        behind = with_cache(model, cache_of(model(**single, use_cache=True)))
        token = torch.full((1, 1), 42)

        def tokens() -> None:
            for _ in range(count):
                model(input_ids=token, **behind)

        return seconds(tokens)

    for name, peer in PEERS.items():
        try:
            release = version(name)
            extraction, steered = peer(model, tokenizer, prompts)
        except (PackageNotFoundError, ImportError) as error:
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        ratio = paired_ratio(extraction, bare, pairs=pairs)
        report(f"peer_extraction_ratio_{name}", ratio, version=release, prompts=n)
        ratios = []
        for _ in range(pairs):
            plain = decode()
            with steered():
                ratios.append(plain / decode())
        ratios.sort()
        report(
            f"peer_decode_ratio_{name}",
            {
                "value": round(ratios[pairs // 2], 4),
                "low": round(ratios[0], 4),
                "high": round(ratios[-1], 4),
                "pairs": pairs,
            },
            version=release,
            tokens=count,
            rows=1,
        )


if __name__ == "__main__":
    main()
