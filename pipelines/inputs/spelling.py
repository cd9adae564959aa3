"""Which word a misspelt one stands for: 'pnuemonia', 'efusion', 'consolodation'. Only long words are guarded; abbreviations never are."""

from collections.abc import Collection, Mapping
from functools import lru_cache

from rapidfuzz import process
from rapidfuzz.distance import OSA


class Speller:
    """Sets right words that are a few slips from a guarded one; a slip is a letter too many, too few, wrong, or swapped with its neighbour.

    guarded: word -> slips it may hold. stems: part of a word -> what any word that holds it stands for. innocent: words right as they are.
    """

    def __init__(self, guarded: Mapping[str, int], stems: Mapping[str, str], innocent: Collection[str]) -> None:
        self.guarded, self._stems, self._innocent = dict(guarded), dict(stems), frozenset(innocent)
        self._shortest = min(len(w) for w in guarded) - 1
        self._longest = max(len(w) + n for w, n in guarded.items())
        self._words: dict[
            str, list[str]
        ] = {}  # by the letters a misspelling may begin with: the first, or the second where the first was lost
        for word in guarded:
            for letter in set(word[:2]):
                self._words.setdefault(letter, []).append(word)
        self._cached = lru_cache(1 << 16)(self._correct)

    def correct(self, word: str) -> str:
        """The guarded word that `word` (lower case, no accents) stands for, or `word` itself."""
        return word if len(word) < self._shortest else self._cached(word) if len(word) < 64 else self._correct(word)

    def _correct(self, word: str) -> str:
        if word in self.guarded or word in self._innocent:
            return word
        for stem, meant in self._stems.items():
            if stem in word:
                return meant
        if len(word) > self._longest or not word.isalpha():
            return word
        near = process.extract(word, self._words.get(word[0], ()), scorer=OSA.distance, score_cutoff=3, limit=None)
        return min(((slips, meant) for meant, slips, _ in near if slips <= self.guarded[meant]), default=(0, word))[1]
