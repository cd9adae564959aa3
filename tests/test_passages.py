"""The passages written for this project: enough of them, on every finding, each to be read alone."""

import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from contracts.findings import FINDINGS

FOLDER = Path(__file__).resolve().parents[1] / "pipelines" / "knowledge" / "passages"
KEYS = ["id", "topic", "aspect", "rests_on", "text"]
ASPECTS = ("what it is", "appearance", "clinical picture", "look-alikes", "severity and course", "pattern")
AT_LEAST = dict.fromkeys(FINDINGS, 10) | {
    "Devices": 15,
    "Vital signs": 15,
    "Laboratory": 20,
    "Medicines": 20,
    "History and presentation": 15,
    "Technique": 5,
}
# What the first sentence has to say, so that the passage can be read alone; where it is not the finding's own name.
SUBJECTS = {
    "Enlarged Cardiomediastinum": "mediastin|named contours",
    "Lung Lesion": "lung lesion|nodule",
    "No Finding": "finding|normal",
    "Pleural Other": "pleura",
}
KINDS = {
    "clinical guideline",
    "emergency medicine textbook knowledge",
    "glossary of the Fleischner Society",
    "internal medicine textbook knowledge",
    "laboratory medicine textbook knowledge",
    "pharmacology textbook knowledge",
    "physiology",
    "published description of the CheXpert labels",
    "radiographic technique textbook knowledge",
    "radiology textbook knowledge",
    "surgery and critical care textbook knowledge",
}
BRITISH = re.compile(r"oedema|haem(?!ophilus)|\boesoph|tumour|dyspnoea|fibre|colour|centre|grey", re.IGNORECASE)


@cache
def passages() -> list[dict[str, str]]:
    return [passage for file in sorted(FOLDER.glob("*.yaml")) for passage in yaml.safe_load(file.read_text(encoding="utf-8"))]


def faults(found: list[dict[str, str]]) -> list[str]:
    """All that is wrong with single passages."""
    wrong = []
    for passage in found:
        if list(passage) != KEYS or not all(isinstance(value, str) and value for value in passage.values()):
            wrong.append(f"{passage}: keys are not {KEYS}, or a value is not text")
            continue
        name, topic, text = passage["id"], passage["topic"], passage["text"]
        first = re.split(r"[.:] ", text)[0]
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            wrong.append(f"{name}: not kebab-case")
        if topic not in AT_LEAST:
            wrong.append(f"{name}: no topic {topic}")
        if passage["aspect"] not in ASPECTS:
            wrong.append(f"{name}: no aspect {passage['aspect']}")
        if passage["rests_on"] not in KINDS:
            wrong.append(f"{name}: no kind of source {passage['rests_on']}")
        if not 40 <= len(text.split()) <= 110:
            wrong.append(f"{name}: {len(text.split())} words")
        if "  " in text or "\n" in text.strip() or not text.strip().endswith("."):
            wrong.append(f"{name}: not one paragraph of whole sentences")
        if topic in FINDINGS and not re.search(SUBJECTS.get(topic, topic.removesuffix("s")), first, re.IGNORECASE):
            wrong.append(f"{name}: the first sentence does not name {topic}")
        if re.match(r"(it|its|this|that|these|those|they|he|she|there|here)\b", text, re.IGNORECASE):
            wrong.append(f"{name}: begins with a word that points back")
        if BRITISH.search(text):
            wrong.append(f"{name}: not spelled as in the reports")
    return wrong


def gaps(found: list[dict[str, str]]) -> list[str]:
    """All that the passages lack, or have twice, as a whole."""
    missing = [f"{name}: twice" for name, count in Counter(p["id"] for p in found).items() if count > 1]
    topics = Counter(p["topic"] for p in found)
    missing += [f"{topic}: {topics[topic]} of {least}" for topic, least in AT_LEAST.items() if topics[topic] < least]
    aspects = Counter((p["topic"], p["aspect"]) for p in found)
    for finding in FINDINGS:
        for aspect in ASPECTS:
            least = 2 if aspect in ("look-alikes", "appearance") else 1
            if aspects[finding, aspect] < least:
                missing.append(f"{finding}: {aspects[finding, aspect]} of {least} on {aspect}")
    words = [(p["id"], set(re.findall(r"[a-z0-9]+", p["text"].lower()))) for p in found]
    for (one, a), (other, b) in combinations(words, 2):
        if len(a & b) >= 0.6 * len(a | b):
            missing.append(f"{one} and {other}: nearly the same words")
    return missing


def test_there_are_enough_passages() -> None:
    assert len(passages()) >= 230


def test_every_passage_is_whole() -> None:
    assert faults(passages()) == []


def test_every_finding_is_covered_from_every_side_and_nothing_twice() -> None:
    assert gaps(passages()) == []


def test_files_hold_one_topic_each_and_stay_readable() -> None:
    for file in FOLDER.glob("*.yaml"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400, file.name
        assert max(map(len, lines)) <= 140, file.name
        assert len({p["topic"] for p in yaml.safe_load("\n".join(lines))}) == 1, file.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(group_id="1"), "keys"),
        (lambda p: p.pop("rests_on"), "keys"),
        (lambda p: p.update(text=""), "keys"),
        (lambda p: p.update(id="Edema_1"), "kebab-case"),
        (lambda p: p.update(topic="Oedema"), "no topic"),
        (lambda p: p.update(aspect="look"), "no aspect"),
        (lambda p: p.update(rests_on="Smith et al. 2031"), "no kind of source"),
        (lambda p: p.update(text=" ".join(p["text"].split()[:39])), "39 words"),
        (lambda p: p.update(text=p["text"] * 3), "words"),
        (lambda p: p.update(text=p["text"].strip() + " And"), "whole sentences"),
        (lambda p: p.update(topic="Fracture"), "does not name Fracture"),
        (lambda p: p.update(text="It is so. " + p["text"]), "points back"),
        (lambda p: p.update(text=p["text"].strip() + " Haemoptysis is one more."), "spelled"),
    ],
)
def test_a_broken_passage_is_found(change: Callable[[dict[str, str]], object], said: str) -> None:
    passage = deepcopy(next(p for p in passages() if p["topic"] == "Edema"))
    assert faults([passage]) == []
    change(passage)
    assert any(said in fault for fault in faults([passage]))


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda p: p["topic"] != "Pleural Other", "Pleural Other: 0 of 10"),
        (lambda p: (p["topic"], p["aspect"]) != ("Fracture", "look-alikes"), "Fracture: 0 of 2 on look-alikes"),
    ],
)
def test_a_gap_is_found(kept: Callable[[dict[str, str]], bool], said: str) -> None:
    assert said in gaps([p for p in passages() if kept(p)])


def test_a_passage_that_stands_twice_is_found() -> None:
    again = {**passages()[0], "text": passages()[0]["text"].strip() + " One more sentence."}
    assert f"{again['id']}: twice" in gaps([*passages(), again])
    assert f"{again['id']} and other: nearly the same words" in gaps([*passages(), {**again, "id": "other"}])
