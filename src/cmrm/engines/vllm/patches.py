"""What is changed in vLLM itself, and what is refused there, for the versions in `TESTED`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from cmrm.engines.vllm.board import first_steered
from cmrm.engines.vllm.stepping import asked
from cmrm.errors import InputError, ModelError
from cmrm.steering.setting import Positions

TESTED = ("0.32",)
"""Versions of vLLM, major and minor, that the parity contract was run on."""


def check_version() -> str:
    """vLLM's version.

    Raises:
        InputError: it is none of `TESTED`, or the untested second model runner is asked for.
    """
    import vllm

    version = str(vllm.__version__)
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise InputError(
            f"vLLM {version} is not tested with cmrm (tested: {', '.join(TESTED)}): its requests "
            "could go unsteered; install a tested version"
        )
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("", "0"):
        raise InputError("VLLM_USE_V2_MODEL_RUNNER: that model runner is not armed; unset it")
    return version


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **more: Any) -> Any:
        return around(original, self, *args, **more)

    setattr(owner, name, method)


def salt_compilations(config: Any, key: str) -> None:
    """Compiled graphs of another program are never used."""
    original = config.compute_hash

    def compute_hash(self: Any, *args: Any, **more: Any) -> str:
        text = f"{original(self, *args, **more)} cmrm {key}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    config.compute_hash = compute_hash


def salt_requests(request: Any, key: str | None, *, fills: bool = False) -> None:
    """A request that cannot be steered rightly fails here, alone.

    With a `key`, cached blocks of an image request are shared with no other at all. With `fills`,
    an image request has to name the coordinates of its text.
    """
    original = request.from_engine_core_request.__func__

    def from_engine_core_request(cls: Any, made: Any, *args: Any, **more: Any) -> Any:
        _check_request(made, fills=fills)
        if made.mm_features and key is not None:
            made.cache_salt = f"cmrm {key} {made.request_id}"
        return original(cls, made, *args, **more)

    request.from_engine_core_request = classmethod(from_engine_core_request)


def keep_steered_blocks_apart(cache: Any, positions: Positions) -> None:
    """Cached blocks of an image request are shared up to the first token that may be steered, and
    from there on with no other request.

    Args:
        cache: vLLM's module that hashes blocks (`vllm.v1.core.kv_cache_utils`).
        positions: the program's.

    Raises:
        ModelError: blocks are not kept apart after all.
    """
    original = cache.generate_block_hash_extra_keys

    def keys(request: Any, start: int, end: int, feature: int) -> tuple[Any, int]:
        extra, feature = original(request, start, end, feature)
        places = [part.mm_position for part in request.mm_features or ()]
        if places:
            image_end = max(place.offset + place.length for place in places)
            if end > first_steered(request.num_prompt_tokens, image_end, positions):
                extra = (*(extra or ()), ("cache_salt", f"cmrm {request.request_id}"))
        return extra, feature

    cache.generate_block_hash_extra_keys = keys
    _check_blocks(cache, positions)


def _check_blocks(cache: Any, positions: Positions) -> None:
    """Hash the blocks of two equal requests.

    Raises:
        ModelError: a block with a steered token has one hash in both, or one before it has two.
    """
    block, prompt, image_end = 4, 14, 8
    place = SimpleNamespace(offset=4, length=image_end - 4)

    def hashes(name: str) -> list[Any]:
        request = SimpleNamespace(
            request_id=name, block_hashes=[b"start"], num_tokens=20, num_prompt_tokens=prompt,
            all_token_ids=list(range(20)), lora_request=None, cache_salt=None, prompt_embeds=None,
            mm_features=[SimpleNamespace(identifier="image", mm_position=place)],
        )  # fmt: skip
        return list(cache.get_request_block_hasher(block, repr)(request))

    first = first_steered(prompt, image_end, positions)
    same = [one == other for one, other in zip(hashes("a"), hashes("b"), strict=True)]
    if same != [block * (k + 2) <= first for k in range(4)]:
        raise ModelError(
            "cmrm: cached blocks with steered tokens would be shared between requests; no answer "
            "is given. Install a tested version of vLLM"
        )


def _check_request(made: Any, *, fills: bool) -> None:
    """Refuse a request whose steering was not shown to be right.

    Raises:
        ModelError: it carries something else than images, grows while it is answered, or names no
            coordinates of its text where the program `fills`.
    """
    others = sorted({part.modality for part in made.mm_features or ()} - {"image"})
    if others:
        raise ModelError(f"cmrm: the request carries {', '.join(others)}; images alone are tested")
    if getattr(made, "resumable", False) or made.prompt_embeds is not None:
        raise ModelError("cmrm: requests that grow, or that are embeddings, are not tested")
    if fills and made.mm_features and "target" not in asked(made):
        raise ModelError("cmrm: `fill` has no coordinates of this request's text; ask as a chat")


def refuse_beams(*owners: Any) -> None:
    """Each step of vLLM's beam search is a new request whose prompt ends with what was generated:
    which of its tokens are generated cannot be known."""

    def refuse(*args: Any, **more: Any) -> Any:
        raise ValueError("cmrm: beam search cannot be steered; ask without it")

    for owner in owners:
        owner.beam_search = refuse


def check_features(runner: Any) -> None:
    """Refuse what the parity contract does not hold for.

    Raises:
        ModelError: such a feature is on.
    """
    config = runner.vllm_config
    parallel = config.parallel_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "micro-batches": bool(parallel.use_ubatching),
        "context parallelism": max(
            parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size
        )
        > 1,
        "sleep mode": bool(runner.model_config.enable_sleep_mode),
        "transfer of KV, encoder states or weights": any(
            getattr(config, f"{name}_transfer_config", None) is not None
            for name in ("kv", "ec", "weight")
        ),
        "prompt embeddings": bool(getattr(runner, "enable_prompt_embeds", False)),
        "LoRA": config.lora_config is not None,
    }
    on = [name for name, there in refused.items() if there]
    if on:
        raise ModelError(
            f"{', '.join(on)}: not tested with cmrm, requests could go unsteered; turn it off"
        )
