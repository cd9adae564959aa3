"""Reports in the words and the shape of MIMIC-CXR's: each finding that has a state is said once at least, no other is named."""

import re
import textwrap

import numpy as np

from pipelines.synthetic.phrases import DENY_TOGETHER, PLACES, SAID, SIDES, SIZES
from pipelines.synthetic.scene import Patient, Study

_HEAD = " " * 33 + "FINAL REPORT"
_COMPARISONS = ("None.", "___.", "Chest radiograph from ___.", "Multiple prior studies, most recently ___.")
_BRIEF = ("No acute process.", "Normal chest.", "Wet read: normal.", "Unremarkable.")
_SLOTS = {"side": SIDES, "size": SIZES, "place": PLACES}


def sentence(rng: np.random.Generator, finding: str, state: int) -> str:
    """One way to state (1), deny (0) or doubt (-1) a finding."""
    options = SAID[state][finding]
    text = options[rng.integers(len(options))]
    text = text.format(**{slot: rng.choice(words) for slot, words in _SLOTS.items()})
    return text[0].upper() + text[1:]


def says(text: str, finding: str, state: int) -> bool:
    """Whether a report states, denies or doubts a finding in one of the ways known to `phrases`."""
    flat = " ".join(text.split()).lower()
    if state == 0 and finding in DENY_TOGETHER and re.search(rf"there is no [a-z ,]*\b{DENY_TOGETHER[finding]}\b", flat):
        return True
    either = {slot: f"(?:{'|'.join(words)})" for slot, words in _SLOTS.items()}
    patterns = (option.lower().replace(".", r"\.").format(**either) for option in SAID[state][finding])
    return any(re.search(pattern, flat) for pattern in patterns)


def report(rng: np.random.Generator, patient: Patient, study: Study) -> str:
    """The text of one study's report, wrapped and indented as MIMIC's are. '' where there is none."""
    if study.report == "absent":
        return ""
    if study.report == "short":
        return f" {_BRIEF[rng.integers(len(_BRIEF))]}\n"
    body = _body(rng, study.case.states)
    if study.report == "wet":
        return _wrap(f"WET READ: ___ ___ ___ {rng.integers(1, 12)}:{rng.integers(10, 59)} PM", " ".join(body))
    sections = [("EXAMINATION", _examination(study)), ("INDICATION", _indication(rng, patient, study))]
    if study.report == "full":
        sections += [("TECHNIQUE", "Chest: " + " and ".join(dict.fromkeys(i.view for i in study.images)) + " views.")]
        sections += [("COMPARISON", _COMPARISONS[rng.integers(len(_COMPARISONS))]), ("FINDINGS", " ".join(body))]
        sections += [("IMPRESSION", _impression(rng, study.case.states))]
    else:
        sections += [("IMPRESSION", " ".join(body))]
    return _HEAD + "\n" + "".join(_section(rng, name, text) for name, text in sections)


def _body(rng: np.random.Generator, states: dict[str, int]) -> list[str]:
    left = dict(states)
    sentences = []
    together = [f for f in DENY_TOGETHER if left.get(f) == 0]
    if len(together) > 1 and rng.random() < 0.6:
        nouns = [DENY_TOGETHER[f] for f in together]
        sentences.append(f"There is no {', '.join(nouns[:-1])} or {nouns[-1]}.")
        for finding in together:
            del left[finding]
    sentences += [sentence(rng, finding, state) for finding, state in left.items()]
    return [sentences[i] for i in rng.permutation(len(sentences))]


def _impression(rng: np.random.Generator, states: dict[str, int]) -> str:
    main = [sentence(rng, f, s) for f, s in states.items() if s != 0]
    if not main:
        return "As above. Clinical correlation is advised."
    return main[0] if len(main) == 1 else " ".join(f"{i}. {text}" for i, text in enumerate(main, 1))


def _examination(study: Study) -> str:
    views = [i.view for i in study.images]
    return "CHEST (PA AND LAT)" if "LATERAL" in views else f"CHEST ({'PORTABLE AP' if 'AP' in views else 'PA'})"


def _indication(rng: np.random.Generator, patient: Patient, study: Study) -> str:
    """Who and why, from what triage knew; one in eight names what will be found, as real ones do (and leaks it)."""
    person = "woman" if patient.sex == "F" else "man"
    complaint = study.linked.complaint.lower() if study.linked and study.linked.complaint else "shortness of breath"
    present = study.case.present
    if present and rng.random() < 0.12:
        return f"___ year old {person} with known {rng.choice(present).lower()} // interval change"
    return f"___ year old {person} with {complaint} // {rng.choice(['acute process?', 'please evaluate', 'eval for acute disease'])}"


def _section(rng: np.random.Generator, name: str, text: str) -> str:
    if name in ("FINDINGS", "IMPRESSION") and rng.random() < 0.7:
        return _wrap(f"{name}: ", "", text)
    return _wrap(f"{name}:  {text}")


def _wrap(*paragraphs: str) -> str:
    lines = [line for p in paragraphs for line in (textwrap.wrap(p, 78, break_on_hyphens=False) or [""])]
    return "".join(f" {line}\n" for line in [*lines, ""])


def report_state(study: Study) -> str:
    """'present', 'short' (under 30 characters of text) or 'absent'."""
    return study.report if study.report in ("short", "absent") else "present"
