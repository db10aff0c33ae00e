"""Parts of a set: anchors and tests by content identity, draws, set hashes, the leakage guard.

What decides is what a sample asks, not its id: two samples that ask the same never stand on two
sides of a split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from cmrm.errors import InputError
from cmrm.prompts.sample import Sample, content_key, image_digests
from cmrm.prompts.text import normalised, shortened


def check_unique(samples: Iterable[Sample]) -> None:
    """Raise `InputError` when two samples share an id: seeds and results depend on ids."""
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise _repeated(sample)
        seen.add(sample.id)


class SetHash:
    """The hash of a set of samples, taken in one at a time; their order does not matter.

    The sum of sha256 digests over id and content identity, modulo 2^256.
    """

    def __init__(self) -> None:
        """The hash of no sample."""
        self.value = 0
        self.count = 0
        self._ids: set[int] = set()

    def add(self, sample: Sample) -> None:
        """Take in one more sample.

        Raises:
            InputError: a sample with this id was taken in before, or an image cannot be opened.
        """
        key = int.from_bytes(_digest(sample.id)[:8], "big")
        if key in self._ids:
            raise _repeated(sample)
        self._ids.add(key)
        digest = _digest(f"{sample.id}\0{content_key(sample)}")
        self.value = (self.value + int.from_bytes(digest, "big")) % 2**256
        self.count += 1

    def hexdigest(self) -> str:
        """64 hex digits."""
        return f"{self.value:064x}"


def set_hash(samples: Iterable[Sample]) -> str:
    """`SetHash` of all of `samples`."""
    total = SetHash()
    for sample in samples:
        total.add(sample)
    return total.hexdigest()


def templates(samples: Sequence[Sample]) -> frozenset[str]:
    """Normalised queries that are templates of a set, such as the fixed text of FigStep.

    A template is asked by at least half of the set's samples, with at least 2 different images.
    Its request is in the image, so that two samples with this query do not ask the same.

    Raises:
        InputError: an image of a candidate cannot be opened.
    """
    queries = [normalised(sample.query) for sample in samples]
    common = {query for query, n in Counter(queries).items() if n >= 2 and 2 * n >= len(samples)}
    digests: dict[str, set[tuple[str, ...]]] = {query: set() for query in common}
    for sample, query in zip(samples, queries, strict=True):
        if query in common and len(digests[query]) < 2 and sample.pictures:
            digests[query].add(image_digests(sample))
    return frozenset(query for query, images in digests.items() if len(images) >= 2)


def split_by_content(
    samples: Sequence[Sample], share: float, *, salt: str = "cmrm"
) -> tuple[list[Sample], list[Sample]]:
    """Split a set into (first part, rest), the first with about `share` of what is asked.

    Samples with the same normalised query stand on one side; where the query is a template
    (`templates`), those with the same content identity. The side of a group depends on its content
    and on `salt` alone, so that it stays when the set grows or is put in another order.

    Raises:
        InputError: `share` is not within 0..1, or an image of a template cannot be opened.
    """
    if not 0.0 <= share <= 1.0:
        raise InputError(f"share is {share}; it is a part of the whole, between 0 and 1")
    fixed = templates(samples)
    first: list[Sample] = []
    rest: list[Sample] = []
    for sample in samples:
        query = normalised(sample.query)
        group = content_key(sample) if query in fixed else query
        place = int.from_bytes(_digest(f"{salt}\0{group}")[:8], "big") / 2**64
        (first if place < share else rest).append(sample)
    return first, rest


def refuse_overlap(harmful: Sequence[Sample], benign: Sequence[Sample]) -> None:
    """Refuse anchors that are said to be harmful and benign.

    Raises:
        InputError: samples of both kinds have the same content identity.
    """
    keys = {content_key(sample) for sample in harmful}
    both = [sample for sample in benign if content_key(sample) in keys]
    if both:
        raise InputError(
            f"{len(both)} anchors stand among the harmful and among the benign ones (the first: "
            f"{shortened(both[0].id)!r}); name each sample once"
        )


def refuse_leaks(
    anchors: Sequence[Sample],
    tested: Sequence[Sample],
    *,
    sides: tuple[str, str] = ("anchors", "the test sets"),
) -> None:
    """The leakage guard: no anchor may ask what a tested set asks.

    An anchor leaks when a tested sample has the same content identity, or the same normalised query
    and that query is a template (`templates`) of neither set. Call it once for each tested set,
    since what is a template depends on the set. `sides`: what the two are called in the message.

    Raises:
        InputError: anchors leak (how many, and the first), or an image cannot be opened.
    """
    asked: dict[str, list[Sample]] = {}
    for sample in tested:
        asked.setdefault(normalised(sample.query), []).append(sample)
    shared = [anchor for anchor in anchors if normalised(anchor.query) in asked]
    if not shared:
        return
    fixed = templates(anchors) | templates(tested)
    keys = {
        query: {content_key(sample) for sample in asked[query]}
        for query in fixed & {normalised(anchor.query) for anchor in shared}
    }
    leaks = [
        anchor
        for anchor in shared
        if normalised(anchor.query) not in keys
        or content_key(anchor) in keys[normalised(anchor.query)]
    ]
    if leaks:
        raise InputError(
            f"{len(leaks)} {sides[0]} are asked in {sides[1]} too (the first: "
            f"{shortened(leaks[0].id)!r}); fit on other samples"
        )


def drawn_by_hash(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """`limit` samples (None: all) in the order of the set, drawn by the hash of their ids.

    The draw does not depend on the order of the set.
    """
    if limit is None or limit >= len(samples):
        return list(samples)
    ranked = sorted(samples, key=lambda sample: _digest(f"limit\0{sample.id}"))
    kept = {sample.id for sample in ranked[:limit]}
    return [sample for sample in samples if sample.id in kept]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _repeated(sample: Sample) -> InputError:
    return InputError(
        f"two samples have the id {shortened(sample.id)!r}; ids must be unique within a set"
    )
