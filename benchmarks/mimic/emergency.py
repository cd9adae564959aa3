"""MIMIC-IV-ED's tables, dirt included, and the ICD codes that it shares with the hospital's."""

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from mimic.world import Sizes, World, blank, pick, stamp, words


def measured(rng: np.random.Generator, n: int) -> dict[str, pa.Array]:
    """Vital signs as nurses type them: a tenth missing, some in Celsius, some impossible, pain in words."""

    def signs(mean: float, spread: float, digits: int, wild: float) -> pa.Array:
        values = np.round(rng.normal(mean, spread, n), digits)
        values[rng.random(n) < 0.0005] = wild
        if digits:
            celsius = rng.random(n) < 0.01
            values[celsius] = np.round((values[celsius] - 32) / 1.8, 1)
        return pa.array(values, mask=rng.random(n) < 0.1)

    usual = [str(i) for i in range(11)]
    odd = ["UA", "0/10", "Critical", "13", "uta", "unable", "5/10", "asleep", "7.5", "denies"]
    return {
        "temperature": signs(98.2, 0.8, 1, 986.0), "heartrate": signs(86, 17, 0, 0), "resprate": signs(18, 2.5, 0, 1181),
        "o2sat": signs(97.5, 2, 0, 10), "sbp": signs(133, 22, 0, 19734), "dbp": signs(76, 15, 0, 879),
        "pain": blank(rng, pick(rng, usual + odd, n, [*([9] * 11), *([0.5] * 10)]), 0.1),
    }  # fmt: skip


def edstays(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = s.stays
    return pa.table({
        "subject_id": w.patients[w.stay_of], "hadm_id": pa.array(w.stay_hadm, mask=w.stay_hadm == 0), "stay_id": w.stay_id,
        "intime": stamp(w.stay_in), "outtime": stamp(w.stay_out), "gender": pick(rng, ["F", "M"], n, [54, 46]),
        "race": pick(rng, ["WHITE", "BLACK/AFRICAN AMERICAN", "HISPANIC/LATINO - PUERTO RICAN", "ASIAN", "OTHER", "UNKNOWN"], n),
        "arrival_transport": pick(rng, ["WALK IN", "AMBULANCE", "UNKNOWN", "OTHER", "HELICOPTER"], n),
        "disposition": pick(rng, ["HOME", "ADMITTED", "TRANSFER", "LEFT WITHOUT BEING SEEN", "ELOPED", "EXPIRED"], n),
    })  # fmt: skip


def triage(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    acuity = blank(rng, pick(rng, pa.array([3.0, 2.0, 1.0, 4.0, 5.0]), s.stays, [54, 34, 5, 6.5, 0.5]), 0.016)
    complaint = pick(rng, pc.utf8_title(words(50_000, 1)), s.stays)
    return pa.table({
        "subject_id": w.patients[w.stay_of], "stay_id": w.stay_id, **measured(rng, s.stays), "acuity": acuity, "chiefcomplaint": complaint,
    })  # fmt: skip


def within(w: World, rng: np.random.Generator, n: int, ragged: float = 0.0) -> tuple[dict[str, np.ndarray], pa.Array]:
    """`n` things that happened in emergency stays: (whose, when), `ragged` a share of a stay before arrival and after leaving."""
    stay = np.sort(rng.integers(0, len(w.stay_id), n))
    when = w.stay_in[stay] + (rng.random(n) * (1 + 2 * ragged) - ragged) * (w.stay_out - w.stay_in)[stay]
    return {"subject_id": w.patients[w.stay_of[stay]], "stay_id": w.stay_id[stay]}, stamp(when)


def vitalsign(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    whose, when = within(w, rng, s.vitals, 0.03)
    signs = measured(rng, s.vitals)
    rhythm = blank(rng, pick(rng, ["Normal Sinus Rhythm", "Sinus Tachycardia", "Atrial Fibrillation"], s.vitals), 0.96)
    return pa.table({**whose, "charttime": when, **signs, "rhythm": rhythm, "pain": signs.pop("pain")})


def medrecon(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = s.of(2_987_342)
    whose, when = within(w, rng, n)
    codes = {c: rng.integers(1, 70_000, n) for c in ("gsn", "ndc", "etc_rn", "etccode")}
    return pa.table(
        {**whose, "charttime": when, "name": pick(rng, words(7_000, 2), n), **codes, "etcdescription": pick(rng, words(900, 3, 3, 6), n)}
    )


def pyxis(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = s.of(1_586_053)
    whose, when = within(w, rng, n)
    return pa.table({
        **whose, "charttime": when, "med_rn": rng.integers(1, 20, n), "name": pc.utf8_title(pick(rng, words(3_500, 4), n)),
        "gsn_rn": rng.integers(1, 3, n), "gsn": rng.integers(1, 70_000, n),
    })  # fmt: skip


@cache
def codes() -> dict[str, pa.Array]:
    """ICD-9 and ICD-10 codes with their titles, as many as MIMIC-IV lists."""
    letters = [c + f"{i:02d}" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for i in range(100)]
    tens, nines = [f"{x}{i:02d}" for x in letters for i in range(37)], [f"{i:05d}" for i in range(16_000)]
    version = pa.array([10] * len(tens) + [9] * len(nines), pa.int8())
    mixed = pa.array(np.random.default_rng(5).permutation(len(version)))  # the commonest stand first
    return {"icd_code": pa.array(tens + nines).take(mixed), "icd_version": version.take(mixed), "long_title": words(len(version), 6, 3, 9)}


def coded(rng: np.random.Generator, whose: np.ndarray) -> dict[str, pa.Array]:
    """A code for each row: half of them one of the patient's own twelve, for what is chronic is coded at every visit."""
    own = (whose * 0.6180339887 + rng.integers(0, 12, len(whose)) * 0.7548776662) % 1
    u = np.where(rng.random(len(whose)) < 0.5, own, rng.random(len(whose)))
    at = pa.array((len(codes()["icd_code"]) * u**4).astype(np.int64))
    return {name: values.take(at) for name, values in codes().items()}


def numbered(visit: np.ndarray) -> np.ndarray:
    """1, 2, 3 ... within each run of equal numbers."""
    first = np.concatenate([[True], visit[1:] != visit[:-1]])
    return np.arange(len(visit)) - np.maximum.accumulate(np.where(first, np.arange(len(visit)), 0)) + 1


def diagnosis(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    stay = np.sort(rng.integers(0, s.stays, s.of(899_050)))
    icd = coded(rng, w.stay_of[stay])
    return pa.table({
        "subject_id": w.patients[w.stay_of[stay]], "stay_id": w.stay_id[stay], "seq_num": numbered(stay), "icd_code": icd["icd_code"],
        "icd_version": icd["icd_version"], "icd_title": pc.utf8_upper(icd["long_title"]),
    })  # fmt: skip
