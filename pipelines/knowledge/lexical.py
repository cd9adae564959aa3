"""The words' side of retrieval: BM25 for what is said, and names for what only one document says.

An embedding of ten medicines lies somewhere between them, and of a name that its model has never seen it knows nothing. BM25 adds up
words, so that ten common ones outweigh a rare one. A name counts by itself: by how few documents hold it, and by how little the encoder
knows it, which shows in the number of pieces its tokeniser cuts it to.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import bm25s
import numpy as np
import scipy.sparse
from bm25s.stopwords import STOPWORDS_EN

from contracts.storage import Place

K1, B = 1.5, 0.75  # the usual constants of BM25 (Manning, Raghavan & Schuetze 2008, section 11.4.3)
WHOLE, UNKNOWN = 1, 6  # pieces of a word that the encoder's vocabulary has, and of one that it knows nothing of
_NORM = 8  # a sum of eighth powers is nearly the largest of them

_WORD = re.compile(r"\w+")
STOP_WORDS = frozenset(STOPWORDS_EN)
FILES = ("lexical-words.json", "lexical-starts.npy", "lexical-passages.npy", "lexical-said.npy", "lexical-names.npy")


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, without stop words."""
    return [w for w in _WORD.findall(text.lower()) if w not in STOP_WORDS]


class Lexical:
    """An inverted index over passages. said and names: what a word adds to a passage's BM25, and its weight as a name there, in [0, 1]."""

    def __init__(self, words: dict[str, int], starts: np.ndarray, passages: np.ndarray, said: np.ndarray, names: np.ndarray, count: int):
        """Sparse rows of words over `count` passages: word i stands in passages[starts[i] : starts[i + 1]]."""
        self.words, self.count = words, count
        self._parts = (starts, passages, said, names)
        shape = (len(starts) - 1, count)
        self._said = scipy.sparse.csr_array((said, passages, starts), shape=shape)
        self._names = scipy.sparse.csr_array((names**_NORM, passages, starts), shape=shape)

    @classmethod
    def build(cls, texts: Sequence[str], documents: np.ndarray, pieces: Callable[[list[str]], np.ndarray]) -> "Lexical":
        """documents: int [texts], which document each passage is of. pieces: how many pieces the encoder cuts each word to."""
        tokens = [words_of(text) for text in texts]
        if not any(tokens):
            none = np.zeros(0, np.float32)
            return cls({}, np.zeros(1, np.int32), np.zeros(0, np.int32), none, none, len(texts))
        model = bm25s.BM25(k1=K1, b=B, method="lucene")
        model.index(tokens, show_progress=False)
        words = {word: number for word, number in model.vocab_dict.items() if word}
        scores: Any = model.scores
        said, passages, starts = (scores[part] for part in ("data", "indices", "indptr"))
        holding = np.diff(starts)  # passages
        word = np.repeat(np.arange(len(holding)), holding)
        # BM25 of a word is its rarity times how much of the passage it is: the second, of a passage of middling length 1.
        share = said / np.log1p((len(texts) - holding + 0.5) / (holding + 0.5))[word]
        central = np.minimum(share * (K1 + 1), 1)
        of = np.unique(np.stack([word, documents[passages]]), axis=1)[0]
        held = np.bincount(of, minlength=len(holding))  # documents: the chunks of one repeat its words
        unknown = np.zeros(len(holding))
        names = [w for w in words if w.isalpha()]
        unknown[[words[w] for w in names]] = np.clip((pieces(names) - WHOLE) / (UNKNOWN - WHOLE), 0, 1)
        weight = (unknown / np.maximum(held, 1))[word] * central
        return cls(words, starts, passages, said.astype(np.float32), weight.astype(np.float32), len(texts))

    def ask(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(BM25 of every passage, and its best name in [0, 1]), both float32 [texts, passages]. A word asked twice counts once."""
        found = [[n for w in dict.fromkeys(words_of(text)) if (n := self.words.get(w)) is not None] for text in texts]
        starts = np.cumsum([0, *map(len, found)])
        numbers = np.array([n for row in found for n in row], np.int32)
        shape = (len(texts), len(self._parts[0]) - 1)
        asked = scipy.sparse.csr_array((np.ones(len(numbers), np.float32), numbers, starts), shape=shape)
        return (asked @ self._said).toarray(), np.minimum((asked @ self._names).toarray() ** (1 / _NORM), 1)

    def write(self, folder: Place) -> None:
        """FILES, into a folder that is there."""
        (folder / FILES[0]).write(json.dumps(sorted(self.words, key=self.words.__getitem__)).encode())
        for name, part in zip(FILES[1:], self._parts):
            buffer = io.BytesIO()
            np.save(buffer, part, allow_pickle=False)
            (folder / name).write(buffer.getvalue())

    @classmethod
    def read(cls, folder: Place, count: int) -> "Lexical":
        """Of a knowledge folder of `count` passages."""
        words = {word: number for number, word in enumerate(json.loads((folder / FILES[0]).read()))}
        starts, passages, said, names = (np.load(io.BytesIO((folder / name).read()), allow_pickle=False) for name in FILES[1:])
        return cls(words, starts, passages, said, names, count)
