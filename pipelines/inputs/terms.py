"""The table of terms and how a text is read against it: words, their bare spelling, and chains of words that match a term."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.inputs.spelling import Speller

_SAME = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bc", "'")
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
)
_UNSEEN = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_BROKEN = re.compile(r"(?<=[^\W\d_])-[ \t]*\r?\n\s*(?=[^\W\d_])")  # a word broken at the end of a line
# 'r/o' and 's/p', 'w/', 'p.n.a.', '0.4', a word with its apostrophe, and the signs that are read as words.
_WORD = re.compile(
    r"(?:[rh]/o|[sh]/p|c/[wf])(?=[^\W_]{2})|(?:[^\W_]/){1,3}[^\W_](?![^\W_])|w/|(?:[^\W\d_]\.){2,}|\d+(?:[.]\d+)+|[^\W_]+(?:'[^\W_]+)*|[+&?=]",
    re.IGNORECASE,
)
_JOINTS = frozenset("-_'\"")


def plain(text: str) -> str:
    """`text` with one form for each quote, hyphen and space (NFKC), without characters nobody sees and line-end hyphens."""
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text)).translate(_SAME)
    return _BROKEN.sub("", text.replace("\0", " "))


class Words:
    """A text's words. keys: bare spelling, to be looked up; joined[i]: nothing but a space or a hyphen parts word i from the one before."""

    __slots__ = ("ends", "joined", "keys", "starts", "text")

    def __init__(self, text: str, speller: Speller) -> None:
        self.text = text
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.joined: list[bool] = []
        end = 0
        for match in _WORD.finditer(text):
            start, word = match.start(), match[0]
            key = _bare(word)
            if self.keys and text[end:start] == "-" and (whole := self.keys[-1] + key) in speller.guarded:  # 'cardio-megaly'
                self.keys[-1], self.ends[-1] = whole, (end := match.end())
                continue
            self.keys.append(speller.correct(key))
            self.starts.append(start)
            self.joined.append(start == end or (gap := text[end:start]) == " " or _weak(gap))
            self.ends.append(end := match.end())

    def gap(self, i: int) -> str:
        """What stands before word i, without spaces."""
        return self.text[self.ends[i - 1] if i else 0 : self.starts[i]].strip()


def _bare(word: str) -> str:
    word = word.casefold()
    if not word.isascii():
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    if "." in word and word[0].isalpha():
        word = word.replace(".", "")
    return word.removesuffix("'s")


def _weak(gap: str) -> bool:
    inner = gap.strip()
    return not inner or (set(inner) <= _JOINTS and not (gap != inner and gap[0].isspace() and gap[-1].isspace() and "-" in inner))


@dataclass(frozen=True, eq=False)
class Term:
    """What a chain of words stands for. `not_near`: words of elsewhere that make it innocent; `unclear`, `weak`: see leakage.yaml."""

    rule: str
    not_near: frozenset[str] = frozenset()
    unclear: bool = False
    weak: bool = False


@dataclass(eq=False)
class _Node:
    edges: dict[str, list["_Node"]] = field(default_factory=dict)
    term: Term | None = None


class Chains:
    """Terms as a graph of words, so that choices cost their sum and not their product."""

    def __init__(self, macros: Mapping[str, str], backwards: bool = False) -> None:
        self._root, self._macros, self._step = _Node(), macros, -1 if backwards else 1
        self.vocabulary: set[str] = set()

    def add(self, rows: Iterable[str], term: Term) -> None:
        for pattern in (p for row in rows for p in row.split(",")):
            at = [self._root]
            for slot in pattern.split()[:: self._step]:
                optional = slot.startswith("(") and slot.endswith(")")
                end = _Node()
                for choice in (slot[1:-1] if optional else slot).split("|"):
                    for words in self._spelt(choice):
                        self.vocabulary.update(words)
                        self._lay(at, words[:: self._step], end)
                at = [end, *at] if optional else [end]
            assert self._root not in at, f"the term {pattern!r} of leakage.yaml matches nothing at all"
            for node in at:
                node.term = term

    def _spelt(self, choice: str) -> list[list[str]]:
        if choice.startswith("<"):
            return [w for c in self._macros[choice[1:-1]].split("|") for w in self._spelt(c)]
        stem, ending, rest = choice.partition("(")
        return [stem.split()] + ([(stem + rest[:-1]).split()] if ending else [])

    @staticmethod
    def _lay(at: Sequence[_Node], words: Sequence[str], end: _Node) -> None:
        for node in at:
            for word in words[:-1]:
                node.edges.setdefault(word, []).append(step := _Node())
                node = step
            node.edges.setdefault(words[-1], []).append(end)

    def starts(self, key: str) -> bool:
        return key in self._root.edges

    def match(self, words: Words, at: int) -> list[tuple[int, Term]]:
        """All terms that begin (backwards: end) at word `at`, longest first, each with the word that follows it (backwards: precedes)."""
        keys, joined, step = words.keys, words.joined, self._step
        found: list[tuple[int, Term]] = []
        states, k = self._root.edges.get(keys[at], []), at
        while states:
            k += step
            found += [(k, s.term) for s in dict.fromkeys(states) if s.term]
            if not (0 <= k < len(keys)) or not joined[k if step > 0 else k + 1]:
                break
            key = keys[k]
            states = [t for s in dict.fromkeys(states) for t in s.edges.get(key, ())]
        return found[::-1]
