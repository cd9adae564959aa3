"""The odd things that a real collection holds once or twice, put into studies chosen by the seed, one oddity a study."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pipelines.synthetic.cases import signs_of
from pipelines.synthetic.scene import Patient, Study
from pipelines.synthetic.timeline import Lives

BAD_FILES = ("truncated", "empty", "png", "rgb", "png16", "missing", "missing")  # see pictures._spoil


def put_oddities(lives: Lives, patients: list[Patient]) -> None:
    """Changes studies in place. A set too small to hold every oddity holds the first of them."""
    rng = np.random.default_rng([lives.seed, 2])
    plain = [(p, s) for p in patients for s in p.studies if [i.listed_view for i in s.images] in (["AP"], ["PA"])]
    pool = [plain[i] for i in rng.permutation(len(plain))]
    _same_picture(pool)
    shuffled = iter(pool)
    for state, _, study in zip(BAD_FILES, *_columns(shuffled, len(BAD_FILES))):
        study.images[0].file = state
    for scene, patient, study in zip(("sizes", "equal", "untimed", "unsplit", "axial"), *_columns(shuffled, 5)):
        _frontals(lives, rng, scene, patient, study)
    for _, study in [*_take(shuffled, 2), *((p, s) for p in patients for s in p.studies if rng.random() < 0.004)]:
        for image in study.images:
            image.time = None
    for what, _, study in zip(("absent", "unlabelled"), *_columns(shuffled, 2)):
        if what == "absent":
            study.report = "absent"
        else:
            study.labelled = False
    for _, study in _take(shuffled, 2):
        study.images[0].bare = True
    _brief([s for p in patients for s in p.studies])


def _take(studies: Iterator[tuple[Patient, Study]], n: int) -> list[tuple[Patient, Study]]:
    return [pair for _, pair in zip(range(n), studies)]


def _columns(studies: Iterator[tuple[Patient, Study]], n: int) -> tuple[list[Patient], list[Study]]:
    taken = _take(studies, n)
    return [p for p, _ in taken], [s for _, s in taken]


def _same_picture(pool: list[tuple[Patient, Study]]) -> None:
    """One picture stands under two patients, byte for byte, across splits where there is such a pair; both leave the pool."""
    able = [(p, s) for p, s in pool if s.case.clue == "picture"][:30]
    pairs = [(a, b) for a in able for b in able if a[0] is not b[0]]
    pairs.sort(key=lambda pair: (pair[0][0].split != "train", pair[1][0].split != "test"))
    for pair in pairs[:1]:
        (_, first), (_, second) = pair
        for taken in pair:
            pool.remove(taken)
        second.case = first.case
        for other in ("body", "view", "listed_view", "size", "seed", "signs"):
            setattr(second.images[0], other, getattr(first.images[0], other))
        if second.report == "short" and first.case.states.get("No Finding") != 1:
            second.report = "full"


def _frontals(lives: Lives, rng: np.random.Generator, scene: str, patient: Patient, study: Study) -> None:
    """Studies in which the one frontal is not the first that comes to hand."""
    first = study.images[0]
    if scene == "axial":
        first.listed_view = "AP AXIAL"
        return
    first.view = first.listed_view = "PA"
    second = lives.image(rng, patient, study, "PA")
    second.listed_view = "PA"
    study.images.append(second)
    width, height = first.size
    second.size = (width, height) if scene == "equal" else (round(width * 0.8), round(height * 0.8))
    if scene == "untimed":
        first.time = None
    if scene == "unsplit":
        first.split = None


def _brief(studies: list[Study]) -> None:
    """A report of a few words says that all is well, and nothing else; at least one is so short."""
    normal = [s for s in studies if s.case.states.get("No Finding") == 1 and "Support Devices" not in s.case.states]
    if not any(s.report == "short" for s in normal) and normal:
        normal[-1].report = "short"
    for study in studies:
        if study.report != "short":
            continue
        if "Support Devices" in study.case.states:
            study.report = "full"
            continue
        study.case = replace(study.case, states={"No Finding": 1})
        for image in study.images:
            image.signs = signs_of(study.case)
