"""Charts of emergency stays: triage, vitals in a series, medicines brought and given, laboratory, diagnoses, and the dirt in them."""

from collections.abc import Callable
from datetime import datetime
from itertools import count, cycle

import numpy as np

from pipelines.synthetic.scene import MEASURES, Case, Episode, Lab, Medicine, Patient, Stay, Vitals
from pipelines.synthetic.signs import (
    CONDITIONS,
    KNOWN_LABS,
    LAB_ITEMS,
    NEUTRAL_COMPLAINTS,
    NEUTRAL_DISPENSED,
    NEUTRAL_MEDICINES,
    SIGNS,
    SYMPTOMS,
    Sign,
)
from pipelines.synthetic.timeline import hours

HEALTHY = {"temperature": 98.2, "heartrate": 80, "resprate": 17, "o2sat": 98, "sbp": 130, "dbp": 74, "pain": 2.5}
SPREAD = {"temperature": 0.5, "heartrate": 9, "resprate": 1.8, "o2sat": 1.1, "sbp": 13, "dbp": 8, "pain": 2}
DECLINE = {"heartrate": 8.0, "resprate": 2.0, "o2sat": -1.6, "sbp": -7.0, "dbp": -3.0}  # for each point of severity
BOUNDS = {"temperature": (94, 107), "heartrate": (35, 210), "resprate": (6, 60), "o2sat": (60, 100), "sbp": (55, 240),
          "dbp": (25, 150), "pain": (0, 10)}  # fmt: skip
MISSING = {"triage": dict.fromkeys(MEASURES, 0.05), "vitals": dict.fromkeys(MEASURES, 0.06) | {"temperature": 0.30, "pain": 0.20}}

# What people type: measure, the text instead of the true one, and what a careful reader makes of it.
DIRT: tuple[tuple[str, Callable[[str], str], str], ...] = (
    ("temperature", lambda f: f"{(float(f) - 32) / 1.8:.1f}", "repaired"),
    ("pain", lambda _: "UA", "unreadable"),
    ("dbp", lambda _: "879", "implausible"),
    ("temperature", lambda _: "9.8", "implausible"),
    ("pain", lambda _: "0/10", "repaired"),
    ("o2sat", lambda _: "10", "implausible"),
    ("sbp", lambda _: "11", "implausible"),
    ("temperature", lambda f: f"{(float(f) - 32) / 1.8:.1f}", "repaired"),
    ("pain", lambda _: "13", "implausible"),
    ("temperature", lambda _: "986", "implausible"),
    ("pain", lambda _: "Critical", "unreadable"),
    ("heartrate", lambda _: "1", "implausible"),
    ("pain", lambda text: f"{text}/10", "repaired"),
    ("resprate", lambda _: "97", "implausible"),
    ("pain", lambda _: "unable", "unreadable"),
)


class Charts:
    """Fills the charts of patients one after the other; the kinds of dirt come round in turn, so that a small set has all."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dirt = cycle(DIRT)
        self.specimens = count(1_000_001)

    def fill(self, patient: Patient) -> None:
        rng = np.random.default_rng([self.seed, 3, patient.subject_id])
        for episode in patient.episodes:
            for stay in episode.stays:
                self._stay(rng, patient, episode, stay)
            if episode.admission and not episode.admission.stay:
                t, case = episode.studies[0].time, episode.studies[0].case
                for start in (-30, -9, -1.2, 6):  # the first is older than a day, the third often still in the laboratory
                    self._draw_labs(rng, patient, t + hours(start + rng.uniform(-1, 1)), [], case.severity)
            if episode.admission:
                present = episode.studies[0].case.present
                episode.admission.codes = self._codes(patient, [SIGNS[f].icd for f in present], episode.admission.admittime)
        for admission in patient.earlier:
            extra = [SIGNS[str(rng.choice(list(SIGNS)))].icd] if rng.random() < 0.5 else []
            admission.codes = self._codes(patient, extra, admission.admittime)

    def _codes(self, patient: Patient, first: list[tuple[str, str]], when: datetime) -> list[tuple[str, int]]:
        version = patient.icd_version(when)
        pairs = first + [CONDITIONS[c][0] for c in patient.conditions] or [SYMPTOMS[0]]
        return [(pair[version - 9], version) for pair in pairs]

    def _stay(self, rng: np.random.Generator, patient: Patient, episode: Episode, stay: Stay) -> None:
        study = episode.studies[0]
        own = stay is study.linked
        case = study.case if own else Case({}, "picture", 0.5)
        signs = [SIGNS[f] for f in case.present] if case.clue in ("both", "chart") else []
        known_by = min(study.time, stay.outtime) if own and stay.intime < study.time else stay.outtime
        complaints = [c for s in signs for c in s.complaints] or list(NEUTRAL_COMPLAINTS)
        stay.complaint = str(rng.choice(complaints))
        blank = rng.random() < 0.06
        stay.acuity = "" if blank else str(int(np.clip(round(3.6 - 0.55 * case.severity + rng.normal(0, 0.4)), 1, 5)))
        stay.triage = self._row(rng, stay.intime, signs, case.severity, dict.fromkeys(MEASURES, 1.0) if blank else MISSING["triage"])
        self._series(rng, stay, signs, case.severity)
        self._medicines(rng, patient, stay, case, signs, known_by)
        version = patient.icd_version(stay.intime)
        told = [SIGNS[f].icd for f in case.present][:3] if own else []
        stay.diagnoses = [(pair[version - 9], version) for pair in told or [SYMPTOMS[rng.integers(len(SYMPTOMS))]]]
        for start in (rng.uniform(0.2, 1.0), rng.uniform(2, 6)):
            self._draw_labs(rng, patient, stay.intime + hours(start), signs, case.severity)

    def _series(self, rng: np.random.Generator, stay: Stay, signs: list[Sign], severity: float) -> None:
        """Every hour or two; the very ill get worse while they wait, the others better. Some rows lie outside the stay."""
        times, t = [], stay.intime + hours(rng.uniform(0.1, 0.6))
        while t < stay.outtime:
            times.append(t)
            t += hours(rng.uniform(0.7, 2.2))
        if rng.random() < 0.10:
            times.append(stay.intime - hours(rng.uniform(0.05, 0.4)))
        if rng.random() < 0.10:
            times.append(stay.outtime + hours(rng.uniform(0.05, 1.0)))
        for time in times:
            progress = (time - stay.intime) / (stay.outtime - stay.intime)
            now = severity * (1 + 0.5 * progress * (1 if severity > 2 else -1))
            stay.vitals.append(self._row(rng, time, signs, now, MISSING["vitals"]))
            fast = stay.vitals[-1].cells["heartrate"]
            stay.vitals[-1].rhythm = ("Sinus Tachycardia" if fast and int(fast) > 100 else "Sinus Rhythm") if rng.random() < 0.3 else ""

    def _row(self, rng: np.random.Generator, time: datetime, signs: list[Sign], severity: float, missing: dict[str, float]) -> Vitals:
        row = Vitals(time, {}, {})
        for m in MEASURES:
            mean = HEALTHY[m] + DECLINE.get(m, 0) * severity + sum(s.vitals.get(m, 0) for s in signs)
            value = float(np.clip(rng.normal(mean, SPREAD[m]), *BOUNDS[m]))
            absent = rng.random() < missing[m]
            row.cells[m] = "" if absent else f"{value:.1f}" if m == "temperature" else str(round(value))
            row.status[m] = "missing" if absent else "ok"
        if rng.random() < 0.07:
            m, typed, status = next(self.dirt)
            clean = row.cells[m] or str(HEALTHY[m] if m == "temperature" else round(HEALTHY[m]))
            row.cells[m], row.status[m] = typed(clean), status
        return row

    def _medicines(self, rng: np.random.Generator, patient: Patient, stay: Stay, case: Case, signs: list[Sign], known_by: datetime) -> None:
        before = lambda: stay.intime + hours((known_by - stay.intime).total_seconds() / 3600 * rng.uniform(0.1, 0.8))  # noqa: E731
        any_time = lambda: stay.intime + hours((stay.outtime - stay.intime).total_seconds() / 3600 * rng.uniform(0.1, 1))  # noqa: E731
        home = [CONDITIONS[c][1] for c in patient.conditions]
        home += [m for m in NEUTRAL_MEDICINES if rng.random() < 0.3] + [m for s in signs for m in s.home if rng.random() < 0.7]
        asked = before()
        late = any_time() if rng.random() < 0.25 else asked  # the rest of the list may be asked for after the study
        stay.reconciled = [Medicine(late if i % 3 == 2 else asked, *m) for i, m in enumerate(dict.fromkeys(home))]
        given = [m for m in NEUTRAL_DISPENSED if rng.random() < 0.25]
        stay.dispensed = [Medicine(any_time(), name, "") for name in given]
        for sign in signs:
            for i, (name, _) in enumerate(sign.given):
                first = i == 0 and case.clue == "chart"  # the clue must be there to be read
                if first or rng.random() < 0.7:
                    stay.dispensed.append(Medicine(before() if first else any_time(), name, ""))
        if case.drug:
            if rng.random() < 0.6:
                stay.reconciled.append(Medicine(asked, case.drug.name, ""))
            else:
                stay.dispensed.append(Medicine(before(), case.drug.name, ""))

    def _draw_labs(self, rng: np.random.Generator, patient: Patient, t: datetime, signs: list[Sign], severity: float) -> None:
        shifted = {item: value for s in signs for item, value in s.labs.items()}
        usual = [item for item in LAB_ITEMS if rng.random() < (0.62 if item in KNOWN_LABS else 0.35)]
        specimen, stored = next(self.specimens), t + hours(rng.uniform(0.4, 2.4))
        for item in sorted({*usual, *shifted}):
            lab = LAB_ITEMS[item]
            value = rng.uniform(lab.low + 0.1 * (lab.high - lab.low), lab.high) * rng.uniform(0.97, 1.05)
            if item in shifted:
                value = shifted[item] * rng.uniform(0.75, 1.3)
            elif item == 50813:
                value = 1.0 + 0.7 * max(0.0, severity - 0.5) * rng.uniform(0.7, 1.3)
            patient.labs.append(Lab(t, stored, item, round(float(value), lab.digits), specimen))
