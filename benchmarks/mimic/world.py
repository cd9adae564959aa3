"""Whom the tables tell of: made-up patients, where they were and when, and the words that are said of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

VERSION = 2  # of the tables: goes up when the code of this folder makes others
DAY = 86_400  # seconds
FIRST = int(np.datetime64("2110-01-01", "s").astype(np.int64))
VOWELS, CONSONANTS = "aeiou", "bcdfglmnprstv"


@dataclass(frozen=True)
class Sizes:
    """Rows of the tables that a user may scale. The other tables keep their published proportion to the images or the stays."""

    images: int = 377_110
    stays: int = 425_000
    vitals: int = 1_600_000
    labs: int = 10_000_000
    reports: int = 20_000

    def scaled(self, images: int) -> "Sizes":
        """All tables as much smaller as `images` is smaller than the images here."""
        return Sizes(**{name: max(1, round(n * images / self.images)) for name, n in asdict(self).items()})

    def of(self, images: float) -> int:
        """Rows of a table that has so many where MIMIC has all its images."""
        return max(1, round(images * self.images / 377_110))


@dataclass(frozen=True)
class World:
    """Who was where and when; all tables tell of it. Visits are sorted by patient; times are seconds since 1970."""

    patients: np.ndarray  # subject_id
    born: np.ndarray  # the first day of the ten years in which all their visits fall
    imaged: np.ndarray  # indices of patients with X-rays
    stay_of: np.ndarray  # index of the patient
    stay_id: np.ndarray
    stay_in: np.ndarray
    stay_out: np.ndarray
    stay_hadm: np.ndarray  # 0 where the stay ended at home
    hadm_of: np.ndarray
    hadm_id: np.ndarray
    hadm_in: np.ndarray
    hadm_out: np.ndarray
    study_of: np.ndarray
    study_id: np.ndarray
    study_time: np.ndarray


def words(n: int, seed: int, least: int = 1, most: int = 4) -> pa.Array:
    """`n` phrases of `least` to `most` made-up words."""
    rng = np.random.default_rng(seed)
    syllables = [c + v for c in CONSONANTS for v in VOWELS]

    def word() -> str:
        return "".join(syllables[i] for i in rng.integers(0, len(syllables), rng.integers(2, 5)))

    return pa.array([" ".join(word() for _ in range(rng.integers(least, most + 1))) for _ in range(n)])


def pick(rng: np.random.Generator, entries: Sequence[str] | pa.Array, n: int, p: Sequence[float] | None = None) -> pa.Array:
    """`n` of the entries; without `p` the first ones are the commonest, as words are."""
    values = entries if isinstance(entries, pa.Array) else pa.array(entries)
    if p is None:
        at = (len(values) * rng.random(n) ** 3).astype(np.int64)
    else:
        at = np.searchsorted(np.cumsum(p) / np.sum(p), rng.random(n)).clip(max=len(values) - 1)
    return values.take(pa.array(at))


def stamp(seconds: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    return pa.array(seconds.astype("datetime64[s]"), mask=missing)


def blank(rng: np.random.Generator, values: pa.Array, share: float) -> pa.Array:
    return pc.if_else(pa.array(rng.random(len(values)) < share), pa.scalar(None, values.type), values)


def visits_of(rng: np.random.Generator, owner: np.ndarray, of: np.ndarray, patients: int) -> np.ndarray:
    """For each patient in `of` the index of one of their visits (owner: sorted patients of the visits), or -1."""
    count = np.bincount(owner, minlength=patients)
    first = np.cumsum(count) - count
    return np.where(count[of] > 0, first[of] + (rng.random(len(of)) * count[of]).astype(np.int64), -1)


@cache
def world(sizes: Sizes) -> World:
    rng = np.random.default_rng([sizes.images, sizes.stays])
    n, imaged, studies, admissions = sizes.of(364_627), sizes.of(65_379), sizes.of(227_835), sizes.of(546_028)
    studies = max(studies, imaged)
    patients = 10_000_000 + np.sort(rng.choice(9_999_999, n, replace=False))
    ours = np.sort(rng.choice(n, imaged, replace=False))
    weight = rng.lognormal(0, 1, n)
    weight[ours] *= 4  # who is X-rayed comes more often
    share = np.cumsum(weight) / weight.sum()
    born = FIRST + rng.integers(0, 80 * 365, n) * DAY

    stay_of = np.sort(np.searchsorted(share, rng.random(sizes.stays)).clip(max=n - 1))
    stay_in = born[stay_of] + rng.integers(0, 3650 * DAY, sizes.stays)
    stay_out = stay_in + (rng.lognormal(1.7, 0.6, sizes.stays) * 3600).astype(np.int64)
    stays = np.sort(rng.choice(sizes.stays, min(int(sizes.stays * 0.48), admissions), replace=False))
    others = np.searchsorted(share, rng.random(admissions - len(stays))).clip(max=n - 1)
    hadm_of = np.concatenate([stay_of[stays], others])
    hadm_in = np.concatenate([stay_out[stays] - 1800, born[others] + rng.integers(0, 3650 * DAY, len(others))])
    hadm_id = 20_000_000 + rng.permutation(9_999_999)[:admissions]
    stay_hadm = np.zeros(sizes.stays, np.int64)
    stay_hadm[stays] = hadm_id[: len(stays)]
    order = np.lexsort((hadm_in, hadm_of))
    hadm_of, hadm_in, hadm_id = hadm_of[order], hadm_in[order], hadm_id[order]
    hadm_out = hadm_in + (rng.lognormal(1.1, 0.8, admissions) * DAY).astype(np.int64)

    ours_share = np.cumsum(weight[ours]) / weight[ours].sum()
    extra = ours[np.searchsorted(ours_share, rng.random(studies - imaged)).clip(max=imaged - 1)]
    study_of = np.sort(np.concatenate([ours, extra]))
    stay, hadm = visits_of(rng, stay_of, study_of, n), visits_of(rng, hadm_of, study_of, n)
    place, moment = rng.random(studies), rng.random(studies)
    in_stay, in_hadm = (stay >= 0) & (place < 0.6), (hadm >= 0) & (place < 0.85)
    study_time = np.select(
        [in_stay, in_hadm],
        [stay_in[stay] + moment * (stay_out - stay_in)[stay], hadm_in[hadm] + moment * (hadm_out - hadm_in)[hadm]],
        born[study_of] + moment * 3650 * DAY,
    ).astype(np.int64)
    study_id = 50_000_000 + rng.permutation(9_999_999)[:studies]
    stay_id = 30_000_000 + rng.permutation(9_999_999)[: sizes.stays]
    return World(
        patients, born, ours, stay_of, stay_id, stay_in, stay_out, stay_hadm, hadm_of, hadm_id, hadm_in, hadm_out,
        study_of, study_id, study_time,
    )  # fmt: skip


def stream(sizes: Sizes, table: str) -> np.random.Generator:
    """A table's own random numbers: the same whatever was made before it."""
    return np.random.default_rng([*table.encode(), sizes.images, sizes.stays, sizes.vitals, sizes.labs])
