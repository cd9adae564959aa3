"""Which findings a study has, what its report says of them, and where the decisive clue lies.

Shares are of studies whose chart is known by then: a third show the hard picture and only a coined name tells, a quarter
show it and the rest of the chart tells, a fifth have a chart that tells nothing. Over all studies, about a quarter, a fifth
and (with those that have no chart) a quarter.
"""

import numpy as np

from contracts.findings import FINDINGS
from pipelines.synthetic.lesions import HAZE
from pipelines.synthetic.lexicon import HARD_PAIR, Pharmacy
from pipelines.synthetic.scene import Case
from pipelines.synthetic.signs import SIGNS

CLUES = (("name", 0.32), ("chart", 0.26), ("picture", 0.20), ("both", 0.22))
FAINT = 0.5  # how strongly a doubted finding is drawn

PREVALENCE = {
    "Atelectasis": 0.26, "Cardiomegaly": 0.32, "Consolidation": 0.07, "Edema": 0.14, "Enlarged Cardiomediastinum": 0.05,
    "Fracture": 0.05, "Lung Lesion": 0.06, "Lung Opacity": 0.24, "Pleural Effusion": 0.42, "Pleural Other": 0.06,
    "Pneumonia": 0.10, "Pneumothorax": 0.07, "Support Devices": 0.30,
}  # fmt: skip
DENIED = {
    "Atelectasis": 0.06, "Cardiomegaly": 0.15, "Consolidation": 0.45, "Edema": 0.30, "Enlarged Cardiomediastinum": 0.20,
    "Fracture": 0.12, "Lung Lesion": 0.05, "Lung Opacity": 0.10, "Pleural Effusion": 0.55, "Pleural Other": 0.02,
    "Pneumonia": 0.30, "Pneumothorax": 0.60, "Support Devices": 0.02,
}  # fmt: skip
DOUBTED = {"Pneumonia": 0.30, "Atelectasis": 0.18, "Consolidation": 0.15, "Edema": 0.15}  # of those present; others 0.06
FOLLOWS = (("Edema", "Cardiomegaly", 0.45), ("Edema", "Pleural Effusion", 0.40), ("Pneumonia", "Lung Opacity", 0.55),
           ("Consolidation", "Lung Opacity", 0.5), ("Pleural Effusion", "Atelectasis", 0.35),
           ("Fracture", "Pneumothorax", 0.2), ("Pneumothorax", "Support Devices", 0.4))  # fmt: skip


def draw_case(rng: np.random.Generator, charted: bool, split: str, pharmacy: Pharmacy) -> Case:
    """A case; `charted` says whether the chart of an emergency stay is known before the study."""
    clue = str(rng.choice([c for c, _ in CLUES], p=[p for _, p in CLUES])) if charted else "picture"
    if clue in ("name", "chart"):
        return _hard(rng, clue, split, pharmacy)
    present = _present(rng)
    states = {f: -1 if rng.random() < DOUBTED.get(f, 0.06) else 1 for f in present}
    _deny(rng, states)
    if not any(state for f, state in states.items() if f != "Support Devices"):
        states["No Finding"] = 1
    case = Case(states, clue, _severity(rng, present))
    told = case.present
    if clue == "both" and told and rng.random() < 0.5:
        case.drug = pharmacy.give(str(rng.choice(told)), split)
    return case


def _present(rng: np.random.Generator) -> list[str]:
    if rng.random() < 0.25:  # a normal chest, with or without a device
        return ["Support Devices"] if rng.random() < 0.12 else []
    chosen = {f for f, p in PREVALENCE.items() if rng.random() < p}
    for cause, effect, p in FOLLOWS:
        if rng.random() < p and cause in chosen:
            chosen.add(effect)
    if set(HARD_PAIR) <= chosen:
        chosen.discard(str(rng.choice(HARD_PAIR)))
    return [f for f in FINDINGS if f in chosen]


def _hard(rng: np.random.Generator, clue: str, split: str, pharmacy: Pharmacy) -> Case:
    """Pneumonia or edema, drawn alike; nothing else in the picture leans to either."""
    finding, other = rng.permutation(HARD_PAIR)
    present = [str(finding)]
    present += [f for f, p in (("Lung Opacity", 0.4), ("Pleural Effusion", 0.2), ("Support Devices", 0.25)) if rng.random() < p]
    states = dict.fromkeys(present, 1)
    _deny(rng, states)
    states.pop(str(other), None)
    if rng.random() < 0.3:
        states[str(other)] = 0
    case = Case(states, clue, _severity(rng, present))
    if clue == "name":
        case.drug = pharmacy.give(str(finding), split)
    return case


def _deny(rng: np.random.Generator, states: dict[str, int]) -> None:
    for finding, p in DENIED.items():
        if rng.random() < p and finding not in states:
            states[finding] = 0


def _severity(rng: np.random.Generator, present: list[str]) -> float:
    return max(0.0, sum(SIGNS[f].weight for f in present) + float(rng.normal(0, 0.8)))


def signs_of(case: Case) -> dict[str, float]:
    """What is drawn: sign -> strength. In a hard case the decisive finding is drawn as the haze that both share."""
    signs = dict.fromkeys(case.present, 1.0) | dict.fromkeys(case.doubted, FAINT)
    if case.clue in ("name", "chart"):
        for finding in HARD_PAIR:
            if signs.pop(finding, None) is not None:
                signs[HAZE] = 1.0
    return signs
