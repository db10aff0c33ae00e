"""Which cached blocks requests share, on a stand-in for vLLM's hashing of blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.engines.vllm.board import Row, steered_tokens
from cmrm.engines.vllm.patches import keep_steered_blocks_apart
from cmrm.errors import ModelError
from cmrm.steering.setting import Positions

BLOCK = 4


def hashing(*, deaf: bool = False) -> Any:
    """A module that hashes blocks as vLLM does: chained, over tokens and extra keys; a deaf one
    never asks for the keys."""
    module = SimpleNamespace()

    def keys(request: Any, start: int, end: int, feature: int) -> tuple[Any, int]:
        salted = start == 0 and request.cache_salt
        images = tuple(
            ("mm", part.identifier) for part in request.mm_features or ()
            if part.mm_position.offset < end
            and part.mm_position.offset + part.mm_position.length > start
        )  # fmt: skip
        extra = (*images, *((("cache_salt", request.cache_salt),) if salted else ()))
        return extra or None, feature

    def hasher(size: int, digest: Any) -> Any:
        def hashes(request: Any) -> list[Any]:
            before = [*request.block_hashes]
            for start in range(len(before) * size, request.num_tokens - size + 1, size):
                end = start + size
                extra = None if deaf else module.generate_block_hash_extra_keys(
                    request, start, end, 0
                )[0]  # fmt: skip
                tokens = tuple(request.all_token_ids[start:end])
                before.append(digest((before[-1] if before else None, tokens, extra)))
            return before[len(request.block_hashes) :]

        return hashes

    module.generate_block_hash_extra_keys = keys
    module.get_request_block_hasher = hasher
    return module


def asked(name: str, prompt: int, total: int, images: list[tuple[int, int]], salt: Any) -> Any:
    """A request of equal tokens; `images`: (offset, length)."""
    features = [
        SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=o, length=n))
        for o, n in images
    ]
    return SimpleNamespace(
        request_id=name, block_hashes=[], num_tokens=total, num_prompt_tokens=prompt,
        all_token_ids=[0] * total, lora_request=None, cache_salt=salt, prompt_embeds=None,
        mm_features=features or None,
    )  # fmt: skip


REQUESTS = st.tuples(
    st.integers(4, 24), st.integers(0, 12), st.lists(st.integers(0, 5), max_size=2),
    st.sampled_from([None, "client"]),
)  # fmt: skip


@pytest.mark.parametrize("positions", get_args(Positions))
@given(one=REQUESTS, other=REQUESTS)
def test_no_block_with_a_steered_token_is_shared(
    positions: Positions, one: Any, other: Any
) -> None:
    module = hashing()
    keep_steered_blocks_apart(module, positions)
    hashes, edges = [], []
    for name, (prompt, new, offsets, salt) in (("a", one), ("b", other)):
        images = [(o, min(4, prompt - o)) for o in sorted(offsets) if o < prompt]
        request = asked(name, prompt, prompt + new, images, salt)
        hashes.append(module.get_request_block_hasher(BLOCK, repr)(request))
        end = max((o + n for o, n in images), default=None)
        steered = steered_tokens(Row(0, prompt + new, prompt, end, 0), positions)
        edges.append(int(steered.argmax()) if steered.any() else prompt + new)
    for k, (first, second) in enumerate(zip(*hashes, strict=False)):
        if first == second:
            assert BLOCK * (k + 1) <= min(edges)


def test_the_same_beginning_is_shared() -> None:
    module = hashing()
    keep_steered_blocks_apart(module, "last")
    one, other, text = (
        module.get_request_block_hasher(BLOCK, repr)(asked(name, 17, 24, images, None))
        for name, images in (("a", [(0, 4)]), ("b", [(0, 4)]), ("c", []))
    )
    assert [x == y for x, y in zip(one, other, strict=True)] == [True] * 4 + [False] * 2
    assert not any(x == y for x, y in zip(one, text, strict=True))


@pytest.mark.parametrize("positions", sorted(set(get_args(Positions))))
def test_hashing_that_does_not_ask_is_noticed(positions: Positions) -> None:
    with pytest.raises(ModelError, match="would be shared between requests"):
        keep_steered_blocks_apart(hashing(deaf=True), positions)
