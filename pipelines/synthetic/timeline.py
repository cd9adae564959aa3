"""Lives: patients with their visits, studies and pictures, laid out in time around the moment of each study.

In: a seed and a number. Out: `Patient`s whose stays, studies and admissions are placed, with the stay that each study belongs
to. That is decided here, by how an episode is laid out, and by nothing else: no table is joined to find it.
"""

import hashlib
from datetime import datetime, timedelta
from itertools import count

import numpy as np

from pipelines.synthetic.cases import draw_case, signs_of
from pipelines.synthetic.lexicon import Pharmacy
from pipelines.synthetic.phantom import draw_body
from pipelines.synthetic.scene import Admission, Case, Episode, Image, Patient, Stay, Study
from pipelines.synthetic.signs import CONDITIONS

# How an episode lies in time, and how often. The study is at hour 0; the stay that it belongs to is named below.
KINDS = {
    "inside": 0.71, "overlap": 0.03, "same_start": 0.015, "inside_and_near": 0.03, "near_before": 0.05, "near_after": 0.05,
    "between": 0.025, "far": 0.035, "alone": 0.025, "inpatient": 0.03,
}  # fmt: skip
RARE = [kind for kind in KINDS if kind != "inside"]  # so that even a small set has each of them once
CHARTED = ("inside", "overlap", "same_start", "inside_and_near", "near_after", "between")

SPLITS = (("train", 0.7), ("validate", 0.1), ("test", 0.2))
VIEWS = ((("AP",), 0.48), (("PA", "LATERAL"), 0.34), (("PA",), 0.06), (("AP", "AP"), 0.04),
         (("PA", "LATERAL", "LATERAL"), 0.05), (("PA", "AP"), 0.03))  # fmt: skip
REPORTS = (("full", 0.70), ("impression", 0.16), ("wet", 0.08), ("absent", 0.03), ("short", 0.03))
RACES = ("WHITE", "BLACK/AFRICAN AMERICAN", "HISPANIC/LATINO - PUERTO RICAN", "ASIAN - CHINESE", "OTHER", "UNKNOWN")
GROUPS = ("2008 - 2010", "2011 - 2013", "2014 - 2016")


def pick(rng: np.random.Generator, weighted):
    """One of (thing, weight) pairs."""
    weights = np.array([w for _, w in weighted], float)
    return weighted[rng.choice(len(weighted), p=weights / weights.sum())][0]


def hours(x: float) -> timedelta:
    return timedelta(seconds=round(x * 3600))


def spread(start: int):
    """Eight-digit numbers from `start` on, without repeats and without order, as MIMIC's identifiers are."""
    return (start + k * 7_919_003 % 9_999_991 for k in count(1))  # 9,999,991 is prime


class Lives:
    """Draws patients one after the other; numbers and coined names run through all of them."""

    def __init__(self, patients: int, seed: int, size: int) -> None:
        self.seed, self.size, self.n = seed, size, patients
        self.pharmacy = Pharmacy(seed)
        self.subjects, self.hadms, self.stays, self.studies = (spread(k * 10_000_000) for k in (1, 2, 3, 5))
        self.rare = iter([kind for rare in RARE for kind in (rare, None)])  # every other episode, until all were seen
        order = np.random.default_rng([seed, 0]).permutation(patients)
        first, second = max(1, round(patients * 0.7)), max(2, round(patients * 0.8))
        self.splits = {int(p): SPLITS[(i >= first) + (i >= second)][0] for i, p in enumerate(order)}

    def all(self) -> list[Patient]:
        return [self.patient(i) for i in range(self.n)]

    def patient(self, i: int) -> Patient:
        rng = np.random.default_rng([self.seed, 1, i])
        year = int(rng.integers(2112, 2190))
        patient = Patient(
            subject_id=next(self.subjects), split=self.splits[i], sex=str(rng.choice(["F", "M"])), age=int(rng.integers(22, 90)),
            anchor_year=year, anchor_group=str(rng.choice(GROUPS)), race=str(rng.choice(RACES, p=(0.6, 0.18, 0.08, 0.05, 0.05, 0.04))),
            body=draw_body(rng), conditions=[c for c in CONDITIONS if rng.random() < 0.25],
        )  # fmt: skip
        visits_emergency = i != 2 and rng.random() > 0.05
        when = datetime(year, int(rng.integers(1, 13)), 1) + timedelta(seconds=int(rng.integers(86_400 * 28)))
        left = int(rng.choice([1, 2, 3, 4], p=(0.34, 0.30, 0.21, 0.15)))
        self._earlier(rng, patient, when)
        while left:
            kind = (next(self.rare, None) or pick(rng, list(KINDS.items()))) if visits_emergency else pick(
                rng, [("alone", 0.5), ("inpatient", 0.5)])  # fmt: skip
            twice = kind == "inside" and left > 1 and rng.random() < 0.12
            left -= 1 + twice
            patient.episodes.append(self._episode(rng, patient, kind, when, twice, last=not left))
            when += timedelta(seconds=int(86_400 * rng.uniform(70, 420)))
        if patient.dod is None and rng.random() < 0.08:
            patient.dod = (when + timedelta(days=int(rng.integers(20, 500)))).date()
        return patient

    def _earlier(self, rng: np.random.Generator, patient: Patient, first: datetime) -> None:
        discharge = first - timedelta(days=float(rng.uniform(60, 500)))
        for _ in range(int(rng.choice([0, 1, 2], p=(0.5, 0.3, 0.2)))):
            admit = discharge - timedelta(days=float(rng.uniform(1, 9)))
            patient.earlier.append(Admission(next(self.hadms), admit.replace(microsecond=0), discharge.replace(microsecond=0)))
            discharge = admit - timedelta(days=float(rng.uniform(60, 400)))
        patient.earlier.reverse()

    def _episode(self, rng: np.random.Generator, patient: Patient, kind: str, t: datetime, twice: bool, last: bool) -> Episode:
        case = draw_case(rng, kind in CHARTED, patient.split, self.pharmacy)
        stays, linked = self._stays(rng, kind, t)
        times = [t]
        if twice and linked:
            times.append(t + (linked.outtime - t) * float(rng.uniform(0.3, 0.8)))
        studies = [self._study(rng, patient, time.replace(microsecond=0), case, linked) for time in times]
        episode = Episode(kind, stays, studies)
        host = linked or (stays[0] if stays and stays[0].intime < t else None)
        if kind == "inpatient" or (host and rng.random() < min(0.95, 0.35 + 0.15 * case.severity)):
            episode.admission = self._admission(rng, patient, studies[-1].time, case, host, last)
        return episode

    def _stays(self, rng: np.random.Generator, kind: str, t: datetime) -> tuple[list[Stay], Stay | None]:
        """The stays around a study at t, and the one it belongs to: inside beats near, then the nearer arrival, then the lower id."""

        def stay(start: float, end: float) -> Stay:
            arrival = (t + hours(start)).replace(second=0)
            return Stay(next(self.stays), arrival, t + hours(end))

        u = rng.uniform
        inside = lambda: stay(-u(0.5, 5), u(0.8, 8))  # noqa: E731
        if kind == "inside":
            stays = [inside()]
        elif kind == "overlap":
            stays = [stay(-u(0.5, 2), u(1, 8)), stay(-u(4, 7), u(1, 8))]
        elif kind == "same_start":
            start = -u(0.5, 3)
            stays = sorted([stay(start, u(1, 4)), stay(start, u(5, 8))], key=lambda s: s.stay_id)
        elif kind == "inside_and_near":
            stays = [stay(-u(2, 5), u(1, 6)), stay(-u(14, 20), -u(8, 12))]
        elif kind == "near_before":
            start = u(1, 21)
            stays = [stay(start, start + u(3, 10))]
        elif kind == "near_after":
            end = -u(1, 21)
            stays = [stay(end - u(3, 10), end)]
        elif kind == "between":
            end = -u(1, 4)
            start = u(6, 20)
            stays = [stay(end - u(3, 8), end), stay(start, start + u(3, 8))]
        elif kind == "far":
            end = -u(27, 70)
            stays = [stay(end - u(3, 8), end)]
        else:
            stays = []
        return stays, stays[0] if stays and kind != "far" else None

    def _admission(self, rng: np.random.Generator, patient: Patient, t: datetime, case: Case, host: Stay | None, last: bool) -> Admission:
        if host:
            admit = host.intime + (host.outtime - host.intime) * float(rng.uniform(0.4, 0.9))
        else:
            admit = t - hours(rng.uniform(10, 90))
        admit = admit.replace(microsecond=0)
        found = Admission(next(self.hadms), admit, max(admit, t) + hours(rng.uniform(24, 240)), host)
        if host:
            host.hadm_id, host.disposition = found.hadm_id, "ADMITTED"
        if rng.random() < 1 / (1 + np.exp(-2.0 * (case.severity - 2.1))):
            before = host is None and t - admit > hours(6) and rng.random() < 0.4
            start = t - (t - admit) * 0.5 if before else max(admit, t) + hours(rng.uniform(1.5, 20))
            start = start.replace(microsecond=0)
            found.icu = (next(self.stays), start, start + hours(rng.uniform(20, 90)))
            found.dischtime = max(found.dischtime, found.icu[2] + hours(rng.uniform(3, 60)))
        if last and rng.random() < 1 / (1 + np.exp(-2.2 * (case.severity - 2.3))):
            found.death = found.dischtime
            patient.dod = found.death.date()
        return found

    def _study(self, rng: np.random.Generator, patient: Patient, t: datetime, case: Case, linked: Stay | None) -> Study:
        report = pick(rng, REPORTS)
        if report == "short" and case.states.get("No Finding") != 1:
            report = "full"
        study = Study(next(self.studies), t, case, linked, report, labelled=bool(rng.random() > 0.01))
        for view in pick(rng, VIEWS):
            study.images.append(self.image(rng, patient, study, view))
        return study

    def image(self, rng: np.random.Generator, patient: Patient, study: Study, view: str) -> Image:
        """One more picture of a study, a minute or two after the one before."""
        place = len(study.images)
        digest = hashlib.sha256(f"{self.seed}/{study.study_id}/{place}".encode()).hexdigest()
        long, short = self.size, round(self.size * rng.uniform(0.82, 0.97))
        time = study.time + timedelta(seconds=place * int(rng.integers(40, 150)))
        shown = "LL" if view == "LATERAL" and rng.random() < 0.3 else view
        return Image(
            dicom_id="-".join(digest[k : k + 8] for k in range(0, 40, 8)),
            view=view,
            listed_view="" if rng.random() < 0.06 else shown,
            time=time,
            date=time.date(),
            fraction=round(float(rng.uniform(0, 0.99)), 3),
            size=(long, short) if view == "AP" and rng.random() < 0.4 else (short, long),
            seed=int(digest[40:47], 16),
            split=patient.split,
            body=patient.body,
            signs=signs_of(study.case),
        )
