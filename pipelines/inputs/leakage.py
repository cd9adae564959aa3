"""The leakage filter: what of a chart's free text states, or nearly states, a finding of the film goes before a model reads it.

A complaint such as 'CXR with RLL PNA' or a medicine 'ceftriaxone for CAP' hands the label over. Which terms count is said in leakage.yaml;
here is how they are found and how what surrounds them (doubt, negation, side, lobe) goes with them, so that the rest reads tidily.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml

from contracts.config import Config
from contracts.findings import FINDINGS
from pipelines.inputs.spelling import Speller
from pipelines.inputs.terms import Chains, Term, Words, plain
from pipelines.inputs.tidy import tidied, without

Mode = Literal["off", "standard", "aggressive"]
Peripheral = Literal["keep", "remove"]


class LeakageConfig(Config):
    """standard: findings and readings of an image. aggressive: laboratory values, medicines and diagnoses that stand close to one too."""

    mode: Mode = "standard"
    peripheral_edema: Peripheral = "keep"  # 'leg edema', 'edematous ankles'


class LeakageFilter:
    """Pure and idempotent; reads any string in time linear in its length."""

    def __init__(self, cfg: LeakageConfig) -> None:
        self.cfg = cfg
        self._reader = None if cfg.mode == "off" else reader(cfg.mode, cfg.peripheral_edema)

    def clean(self, text: str) -> tuple[str, dict[str, int]]:
        """(what is left, rule -> how often). Rules: 'finding:<CheXpert name>', 'radiology', and if aggressive 'lab', 'medicine', 'near'.

        Text in which nothing is found comes back as it was, character for character.
        """
        counts: dict[str, int] = {}
        # Words that did not stand together may make a term once what parted them is gone ('collapsed [pneumonia] lung'); from the second
        # reading on a comma parts them, and then nothing new can come about. The last step is for texts made to break this.
        for between in (" ", ", ", ", ", ", "):
            if self._reader is None or not (found := self._reader.read(text)):
                return text, counts
            for rule in found.rules:
                counts[rule] = counts.get(rule, 0) + 1
            text = tidied(found.left, self._reader.filler, between)
        return ("" if self._reader and self._reader.read(text) else text), counts


def scan(text: str, peripheral_edema: Peripheral = "keep") -> list[str]:
    """The findings (CheXpert names, in their order) of which `text` holds a term.

    It looks terms up and no more: what `clean` takes away around them plays no part.
    """
    table = reader("standard", peripheral_edema)
    named = {term.rule.partition(":")[2] for _, _, term in table.hits(Words(plain(text), table.speller))}
    return [f for f in FINDINGS if f in named]


def scanned(texts: Iterable[str], peripheral_edema: Peripheral = "keep") -> Counter[str]:
    """How many of the texts hold a term, by finding; each distinct text is scanned once."""
    found: Counter[str] = Counter()
    for text, times in Counter(texts).items():
        found.update(dict.fromkeys(scan(text, peripheral_edema), times))
    return found


@lru_cache
def reader(mode: Mode, peripheral: Peripheral) -> "Reader":
    table = yaml.safe_load(Path(__file__).with_name("leakage.yaml").read_text(encoding="utf-8"))
    return Reader(table, mode, peripheral)


class Found:
    """One reading's outcome. left: the text with NUL wherever something was removed."""

    def __init__(self, rules: list[str], left: str) -> None:
        self.rules, self.left = rules, left


class Reader:
    """One setting's terms, and the words that go with them."""

    def __init__(self, table: dict, mode: Mode, peripheral: Peripheral) -> None:
        macros, hints, image = table["words"], table["hints"], table["radiology"]
        self._places = {name: _set(words) for name, words in table["places"].items()}
        terms = Chains(macros)
        terms.add(table["keep"], _KEEP)
        findings = [table["findings"]] + ([table["peripheral"]] if peripheral == "remove" else [])
        for finding, rows in (item for part in findings for item in part.items()):
            self._add(terms, rows, f"finding:{finding}")
        self._images = self._add(terms, image["images"], "radiology")
        self._add(terms, image["terms"], "radiology")
        self._close = frozenset[Term]()
        if mode == "aggressive":
            close = table["aggressive"]
            self._close = self._add(terms, close["lab"], "lab") | self._add(terms, close["medicine"], "medicine")
            self._add(terms, close["near"], "near")
            self._close_before, self._close_after = _set(close["before"]), _set(close["after"])
        self._terms = terms
        self._before, self._image_before = Chains(macros, backwards=True), Chains(macros, backwards=True)
        self._after, self._reports = Chains(macros), Chains(macros)
        for chains, rows in (
            (self._before, hints["before"]),
            (self._after, hints["after"]),
            (self._image_before, image["before"]),
            (self._reports, image["reports"]),
        ):
            chains.add(rows, _HINT)
        self._negators, self._naming, self._short = _set(hints["negators"]), _set(hints["naming"]), _set(hints["abbreviated"])
        self._requests, self._after_request = _set(image["requests"]), _set(image["after_request"])
        self._begins, self._resumes, self._units = _set(image["begins"]), _set(image["resumes"]), _set(hints["units"])
        self.filler = _set(hints["filler"])
        spelling = table["spelling"]
        known = terms.vocabulary | self._before.vocabulary | _set(spelling["innocent"])  # what the table itself spells so is no slip
        self.speller = Speller(spelling["guarded"], spelling["stems"], known)

    def _add(self, chains: Chains, rows: list, rule: str) -> frozenset[Term]:
        added = [Term(rule)]
        chains.add([r for r in rows if isinstance(r, str)], added[0])
        for row in (r for r in rows if not isinstance(r, str)):
            near = self._places[row["not_near"]] if "not_near" in row else frozenset()
            added.append(Term(rule, near, row.get("unclear", False), row.get("weak", False)))
            chains.add(row["terms"], added[-1])
        return frozenset(added)

    def hits(self, words: Words) -> list[tuple[int, int, Term]]:
        """(first word, word after the last, term) of each term in the text, the longest that begins first; they never overlap."""
        found, i, n = [], 0, len(words.keys)
        while i < n:
            if self._terms.starts(words.keys[i]):
                for end, term in self._terms.match(words, i):
                    if self._counts(words, i, end, term):
                        if term is not _KEEP:
                            found.append((i, end, term))
                        i = end - 1
                        break
            i += 1
        return found

    def read(self, text: str) -> Found | None:
        """What is found in `text` and what is left without it; None where nothing is."""
        words = Words(plain(text), self.speller)
        hits = self.hits(words)
        if not hits:
            return None
        gone = bytearray(len(words.keys))
        spans = []
        for i, end, term in hits:
            if gone[i] and gone[end - 1]:
                continue  # within a reading that goes already
            reading = self._reading(words, i, end) if term in self._images else None
            spans.append((i, reading or end, term, reading is not None))
            gone[i : reading or end] = b"\1" * ((reading or end) - i)
        for i, end, term, reading in spans:
            self._take_left(words, gone, i, end, term)
            if not reading:
                self._take_right(words, gone, end, term)
        return Found([term.rule for _, _, term, _ in spans], without(words, gone))

    def _counts(self, words: Words, i: int, end: int, term: Term) -> bool:
        if term.not_near and self._elsewhere(words, i, end, term.not_near):
            return False
        if term.weak:
            return self._reading(words, i, end) is not None or bool(i and words.joined[i] and self._image_before.match(words, i - 1))
        return not term.unclear or self._clear(words, i, end)

    def _elsewhere(self, words: Words, i: int, end: int, places: frozenset[str]) -> bool:
        """Whether the words just before, or those behind 'of', 'in' or a side, place the term elsewhere than in the chest."""
        chest, links = self._places["chest"], self._places["links"]
        for k in range(i - 1, max(i - 5, -1), -1):
            if not words.joined[k + 1] or words.keys[k] in chest:
                break
            if words.keys[k] in places:
                return True
        for k in range(end, min(end + 8, len(words.keys))):
            if not words.joined[k]:
                break
            if words.keys[k] in places:
                return True
            if words.keys[k] not in links and words.keys[k + 1 : k + 2] != ["of"]:  # 'of the neck of the femur'
                break
        return False

    def _clear(self, words: Words, i: int, end: int) -> bool:
        """Whether an abbreviation of several meanings stands for the finding: in capitals among small letters, alone, or behind a hint."""
        before = words.keys[i - 1] if i and words.joined[i] else ""
        if before and (before[0].isdigit() or before in self._units):
            return False
        written = words.text[words.starts[i] : words.ends[end - 1]]
        alone = not before and (end == len(words.keys) or not words.joined[end] or words.keys[end] == "?")
        return alone or before in self._naming or (written.isupper() and not words.text.isupper())

    def _reading(self, words: Words, i: int, end: int) -> int | None:
        """The word after the reading that follows an image; None where none does ('needs CXR')."""
        n = len(words.keys)
        if end == n:
            return None
        if words.gap(end)[:1] not in (":", "-"):
            told = self._reports.match(words, end) if words.joined[end] or words.gap(end) == "(" else []
            if not told and not (words.joined[end] and i and words.keys[i - 1] == "per" and (i == 1 or not words.joined[i - 1])):
                return None
            end = told[0][0] if told else end
        while end < n and words.keys[end] not in self._resumes:
            if not words.joined[end] and (gap := words.gap(end)) and not self._goes_on(words, end, gap):
                break
            end += 1
        return end

    def _goes_on(self, words: Words, at: int, gap: str) -> bool:
        """Whether a reading goes on behind a comma: with a hint ('no', 'small', 'left') or another term."""
        if gap not in (",", "/", "(", ":", ", /"):
            return False
        return (
            gap in "/(:"
            or words.keys[at] in self._negators
            or bool(self._after.starts(words.keys[at]) or self._terms.match(words, at))
            or (words.keys[at] not in self._begins and self._before.starts(words.keys[at]))
        )

    def _take_left(self, words: Words, gone: bytearray, i: int, end: int, term: Term) -> None:
        if term in self._images:
            i = self._take_image_left(words, gone, i)
        near = self._close_before if term in self._close else frozenset()
        while i > 0 and not gone[i - 1]:
            if not words.joined[i] and not self._led(words, i):
                return
            key = words.keys[i - 1]
            start = next((s + 1 for s, _ in self._before.match(words, i - 1)), i) if self._before.starts(key) else i
            if start == i and (key in near or _LEVEL.fullmatch(key)):
                start = i - 1
            if start == i or any(gone[start:i]):
                return
            if self._negators.intersection(words.keys[start:i]) and self._shared(words, gone, start, end):
                return
            gone[start:i] = b"\1" * (i - start)
            i = start

    def _led(self, words: Words, i: int) -> bool:
        """Whether a mark between a hint and its finding leaves them together: 'Dx: PNA', 'poss. PNA', 'r/o (PNA)'."""
        gap = words.gap(i)
        return gap in (":", "-", "(", "#") or (gap == "." and words.keys[i - 1] in self._short)

    def _take_image_left(self, words: Words, gone: bytearray, i: int) -> int:
        """'abnormal', 'needs', 'sent for' before an image; before 'on', 'per' or 'by' it also what was seen there."""
        start = i
        if i and words.joined[i] and (matches := self._image_before.match(words, i - 1)):
            start = matches[0][0] + 1
            if {"on", "per", "by", "via"}.intersection(words.keys[start:i]):
                while start and words.joined[start] and words.keys[start - 1] not in self._begins:
                    start -= 1
        while start and words.joined[start] and words.keys[start - 1] in self._requests:
            start -= 1
        gone[start:i] = b"\1" * (i - start)
        return start

    def _shared(self, words: Words, gone: bytearray, start: int, end: int) -> bool:
        """Whether the negation at `start` also holds for what comes behind the finding ('no PNA or fever'); the 'or' then goes instead."""
        n, listed = len(words.keys), words.keys[start].startswith("den")
        k, shares = end, False
        while k < n and (gone[k] or words.keys[k] in ("or", "nor", "and")):
            if not words.joined[k] and k > start and words.gap(k) not in (",", "/"):
                return False
            shares |= words.keys[k] in ("or", "nor") or (listed and words.keys[k] == "and")
            k += 1
        if k < n and not words.joined[k]:
            shares = (shares and words.gap(k) == "/") or (listed and words.gap(k) == ",")
        if not shares or k >= n:
            return False
        gone[end:k] = b"\1" * (k - end)
        return True

    def _take_right(self, words: Words, gone: bytearray, end: int, term: Term) -> None:
        n = len(words.keys)
        extra = self._after_request if term in self._images else self._close_after if term in self._close else frozenset()
        while end < n and not gone[end]:
            key = words.keys[end]
            stop = next((e for e, _ in self._after.match(words, end)), end) if self._after.starts(key) else end
            if stop == end and (key in extra or (term in self._close and key[0].isdigit())):
                stop = end + 1
            if stop == end or any(gone[end:stop]):
                return
            if not words.joined[end] and not (
                words.gap(end) in ("(", "-", "=", ":", "") or (words.gap(end) == "," and self._is_place(words, end, stop))
            ):
                return
            gone[end:stop] = b"\1" * (stop - end)
            end = stop

    def _is_place(self, words: Words, at: int, stop: int) -> bool:
        return words.keys[at] in self._places["sites"] and (stop == len(words.keys) or not words.joined[stop])


_KEEP, _HINT = Term("keep"), Term("hint")


def _set(words: str | list[str]) -> frozenset[str]:
    return frozenset(words.replace("|", " ").split() if isinstance(words, str) else words)


_LEVEL = re.compile(r"\d{1,2}(?:st|nd|rd|th)|[ctl]\d{1,2}")  # '6th' rib, 'T12' vertebra
