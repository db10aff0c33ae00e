"""What the judge `small` reads: four views of the reply and one of the request, each as TF-IDF.

Words of the whole reply (1 to 3 in a row), characters inside words of its opening (2 to 5), words
of its first sentence, and its first words with their places; words of the request (1 or 2 in a
row). Apostrophes and punctuation of replies count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack

from cmrm.errors import MissingExtraError
from cmrm.judges.language import UNSPACED

try:
    from sklearn.feature_extraction.text import TfidfVectorizer
except ImportError:
    raise MissingExtraError(
        "the judge small needs scikit-learn; install it with: pip install 'cmrm[eval]'"
    ) from None

LONGEST = 4000
"""Characters of a reply that are read; of a longer one its beginning and its end."""
ENDING = 1000
"""Characters of that end."""
OPENING = 400
"""Characters of its opening."""
SENTENCE = 250
"""Characters of its first sentence at most."""
PLACES = 12
"""Words of it that are read with their places."""
NUMBERED = 4
"""First words whose places are told apart."""

_UNSPACED = re.compile(f"[{UNSPACED}]")
_PARTS = re.compile(r"[\w']+|[.,!?]")
_SENTENCE_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f\u061f])\s*|\n")


def _whole(text: str) -> str:
    """The text, or where it is too long its beginning and its end; letters of scripts without
    blanks stand apart, each as a word."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - ENDING]}\n{text[-ENDING:]}"
    return _spaced(text.lower())


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \g<0> ", text)


def _opening(text: str) -> str:
    return text[:OPENING].lower()


def _first_sentence(text: str) -> str:
    first = next(filter(None, _SENTENCE_END.split(text[:LONGEST].lower())), "")
    return _spaced(first[:SENTENCE])


def _placed(text: str) -> str:
    words = _PARTS.findall(_spaced(text[:LONGEST].lower()))[:PLACES]
    return " ".join(f"_{k}_{w}" if k < NUMBERED else w for k, w in enumerate(words))


_WORDS = r"(?u)\b[\w']+\b|[^\w\s]"


@dataclass(frozen=True)
class View:
    """One view of a reply."""

    read: Callable[[str], str]
    """Normalised reply, or request -> the text that is counted."""
    options: dict[str, Any] = field(hash=False)
    """Of scikit-learn's `TfidfVectorizer`."""
    fewest: int = 2
    """Replies that must hold a term for it to enter the vocabulary."""

    def vectorizer(self, **more: Any) -> TfidfVectorizer:
        """An unfitted vectorizer of this view."""
        return TfidfVectorizer(sublinear_tf=True, lowercase=False, **self.options, **more)


VIEWS: dict[str, View] = {
    "words": View(_whole, {"ngram_range": (1, 3), "token_pattern": _WORDS}, 3),
    "characters": View(_opening, {"ngram_range": (2, 5), "analyzer": "char_wb"}, 3),
    "first_sentence": View(_first_sentence, {"ngram_range": (1, 3), "token_pattern": _WORDS}),
    "places": View(_placed, {"ngram_range": (1, 3), "token_pattern": r"(?u)\S+"}),
}
"""Name -> view of the reply, in the order of the columns."""
REQUEST = "request"
"""Name of the view of the request; its columns come last."""
_REQUEST_VIEW = View(_whole, {"ngram_range": (1, 2), "token_pattern": r"(?u)\b[\w']+\b"})


def _every_view() -> dict[str, View]:
    return {**VIEWS, REQUEST: _REQUEST_VIEW}


@dataclass(frozen=True)
class Features:
    """Fitted vectorizers of all views."""

    vectorizers: dict[str, TfidfVectorizer]
    """View -> its vectorizer."""

    @classmethod
    def fit(cls, replies: Sequence[str], requests: Sequence[str]) -> Features:
        """The vocabularies and document frequencies of normalised replies and of requests."""
        return cls(
            {
                name: view.vectorizer(min_df=view.fewest).fit(
                    [view.read(text) for text in (requests if name == REQUEST else replies)]
                )
                for name, view in _every_view().items()
            }
        )

    @classmethod
    def of(cls, terms: Mapping[str, Sequence[str]], idf: Mapping[str, np.ndarray]) -> Features:
        """Features of stored vocabularies; `idf` float [terms] by view."""
        vectorizers = {}
        for name, view in _every_view().items():
            vectorizer = view.vectorizer(vocabulary={t: k for k, t in enumerate(terms[name])})
            vectorizer.idf_ = np.asarray(idf[name], dtype=np.float64)
            vectorizers[name] = vectorizer
        return cls(vectorizers)

    def terms(self, view: str) -> list[str]:
        """The vocabulary of a view, in the order of its columns."""
        vocabulary: dict[str, int] = self.vectorizers[view].vocabulary_
        return sorted(vocabulary, key=vocabulary.__getitem__)

    @property
    def words(self) -> int:
        """Columns of the first view, words of the whole reply."""
        return len(self.vectorizers["words"].vocabulary_)

    @property
    def columns(self) -> tuple[int, int]:
        """Columns of the reply's views, and of all views."""
        sizes = {name: len(v.vocabulary_) for name, v in self.vectorizers.items()}
        every = sum(sizes.values())
        return every - sizes[REQUEST], every

    def __call__(self, replies: Sequence[str], requests: Sequence[str]) -> csr_matrix:
        """Normalised replies and their requests as a sparse matrix, float64 [N, columns]."""
        parts = [
            self.vectorizers[name].transform(
                [view.read(text) for text in (requests if name == REQUEST else replies)]
            )
            for name, view in _every_view().items()
        ]
        return hstack(parts).tocsr()
