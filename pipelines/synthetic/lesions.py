"""How each finding looks on a phantom: what it adds to (or takes from) the absorption, and the box where it was drawn.

In: the anatomy of one picture and a random generator. Out: a change of absorption float32 [h, w], and its box. Where each
sign is drawn follows the usual textbook descriptions (Hansell et al. 2008, Fleischner Society glossary).
"""

from collections.abc import Callable, Mapping

import cv2
import numpy as np

from contracts.findings import FINDINGS
from pipelines.synthetic.phantom import Body, Frontal, Lateral, expose

HAZE = "haze"  # drawn for Pneumonia and for Edema alike, where the picture must not tell which
ON_LATERAL = ("Cardiomegaly", "Consolidation", "Lung Lesion", "Lung Opacity", "Pleural Effusion", "Pneumonia")
Box = tuple[int, int, int, int]


def _side(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _cloud(a: Frontal, rng: np.random.Generator, grain: float) -> np.ndarray:
    """Smooth random texture around 1, `grain` units across."""
    step = max(2, round(grain * a.unit))
    coarse = rng.standard_normal((a.h // step + 3, a.w // step + 3), dtype=np.float32)
    return np.clip(1 + 0.35 * cv2.resize(coarse, (a.w, a.h), interpolation=cv2.INTER_CUBIC), 0.2, 1.8)


def atelectasis(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Plate-like bands across a lung base."""
    side = _side(rng)
    total = np.zeros((a.h, a.w), np.float32)
    for i in range(3):
        v = 0.66 + 0.075 * i + rng.uniform(-0.01, 0.01)
        points = [a.at(side, 0.10, v + 0.035), a.at(side, 0.45, v - 0.01), a.at(side, 0.82, v)]
        total += a.stroke(points, rng.uniform(5, 8), 1.0)
    return np.minimum(total, 1) * a.lungs[side] * 0.24


def cardiomegaly(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    big = a.heart(a.half * rng.uniform(0.74, 0.82))
    lungs = np.minimum(1, a.lungs[-1] + a.lungs[1])
    return np.clip(big - a.heart(a.heart_breadth), 0, 1) * (0.05 + 0.27 * lungs)


def consolidation(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """A dense lobe with dark, branching bronchi inside."""
    side, v = _side(rng), rng.choice([0.26, 0.66])
    centre = a.at(side, 0.5, v)
    dense = a.ellipse(centre, (a.half * 0.27, a.half * 0.24), rng.uniform(-20, 20), 8)
    air = np.zeros((a.h, a.w), np.float32)
    hilum = a.at(side, 0.16, 0.5)
    for spread in (-0.13, 0.0, 0.13):
        end = a.at(side, 0.78, float(np.clip(v + spread, 0.05, 0.93)))
        air += a.stroke([hilum, ((hilum[0] + end[0]) / 2, (hilum[1] * 0.4 + end[1] * 0.6)), end], 4.0, 0.7)
    return (dense * _cloud(a, rng, 40) * 0.36 - np.minimum(air, 1) * (dense > 0.4) * 0.22) * a.lungs[side]


def edema(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Bat's wings around both hila, and short septal lines at the bases."""
    total = np.zeros((a.h, a.w), np.float32)
    for side in (-1, 1):
        wing = a.ellipse(a.at(side, 0.34, 0.50), (a.half * 0.24, a.half * 0.36), 8 * side, 24)
        total += wing * _cloud(a, rng, 25) * a.lungs[side] * 0.27
        for v in np.linspace(0.74, 0.92, 6):
            total += a.stroke([a.at(side, 0.82, v), a.at(side, 0.97, v + 0.008)], 1.8, 0.5) * a.lungs[side] * 0.14
    return total


def haze(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Hazy opacity of both lower zones, which pneumonia and edema can both give."""
    total = np.zeros((a.h, a.w), np.float32)
    for side in (-1, 1):
        centre = a.at(side, rng.uniform(0.45, 0.55), rng.uniform(0.66, 0.74))
        total += a.ellipse(centre, (a.half * 0.28, a.half * 0.30), 0, 22) * _cloud(a, rng, 50) * a.lungs[side]
    return total * 0.25


def enlarged_cardiomediastinum(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    wide = a.half * rng.uniform(0.34, 0.40)
    centre = (a.cx + a.half * 0.02, a.top + a.h * 0.17)
    lungs = np.minimum(1, a.lungs[-1] + a.lungs[1])
    return a.ellipse(centre, (wide, a.h * 0.20), 0, 3) * (0.03 + 0.30 * lungs)


def fracture(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Steps in two neighbouring ribs: a dark gap, and the outer end out of line."""
    side, first = _side(rng), int(rng.integers(3, 6))
    total = np.zeros((a.h, a.w), np.float32)
    for i in (first, first + 1):
        rib = a.rib(side, i)
        k = 29
        shift = np.array([0.0, 9.0 * a.unit])
        across = np.array([0.0, 11.0 * a.unit])
        total += a.stroke(rib[k + 1 : k + 9] + shift, 9, 0.6) * 0.26
        total -= a.stroke([rib[k] - across, rib[k] + across], 5, 0.6) * 0.22
    return total


def lung_lesion(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """A round nodule with a sharp edge."""
    side = _side(rng)
    radius = a.half * rng.uniform(0.085, 0.13)
    return a.ellipse(a.at(side, rng.uniform(0.45, 0.7), rng.uniform(0.2, 0.6)), (radius, radius * rng.uniform(0.9, 1.1)), 0, 1.5) * 0.32


def lung_opacity(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """One hazy patch without a sharp border."""
    side = _side(rng)
    centre = a.at(side, rng.uniform(0.45, 0.6), rng.uniform(0.22, 0.62))
    return a.ellipse(centre, (a.half * 0.22, a.half * 0.20), rng.uniform(0, 90), 16) * a.lungs[side] * 0.31


def pleural_effusion(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Fluid over a diaphragm, its surface rising to the chest wall (meniscus)."""
    side, v = _side(rng), rng.uniform(0.66, 0.78)
    u = np.linspace(0, 1.1, 24)
    level = a.at(side, 0, v)[1] - (a.base[side] - a.top) * 0.17 * np.clip(u, 0, 1) ** 3
    surface = np.stack([a.inner(side, v) * (1 - u) + a.outer(side, v) * u, level], 1)
    low = a.base[side] + a.half * 0.35
    return a.fill([*surface, (surface[-1][0], low), (surface[0][0], low)], 2.5) * a.lungs[side] * 0.46


def pleural_other(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Thickened pleura along the chest wall, with calcified plaques."""
    side = _side(rng)
    depth = np.linspace(0.28, 0.86, 12)
    thick = 0.10 + 0.05 * np.sin(np.arange(12) * 1.7)
    wall = [a.at(side, 1.02, v) for v in depth]
    inside = [a.at(side, 1 - t, v) for t, v in zip(thick, depth)]
    total = a.fill([*wall, *inside[::-1]], 1.2) * 0.26
    for v in (0.40, 0.58, 0.76):
        total += a.stroke([a.at(side, 0.90, v), a.at(side, 0.93, v + 0.06)], 6, 0.6) * 0.20
    return total


def pneumonia(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """Fluffy patches that run together in one zone."""
    side, v = _side(rng), rng.choice([0.45, 0.68])
    total = np.zeros((a.h, a.w), np.float32)
    for _ in range(7):
        centre = a.at(side, rng.uniform(0.25, 0.8), float(np.clip(v + rng.normal(0, 0.07), 0.1, 0.88)))
        radius = a.half * rng.uniform(0.06, 0.13)
        total = np.maximum(total, a.ellipse(centre, (radius, radius), 0, 6))
    return total * _cloud(a, rng, 12) * a.lungs[side] * 0.32


def pneumothorax(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """A black apex without vessels, bounded by the white line of the pleura."""
    side = _side(rng)
    depth = np.linspace(0, rng.uniform(0.5, 0.65), 14)
    retreat = 0.42 * (1 - depth / depth[-1]) ** 0.8
    edge = [a.at(side, float(1 - r), float(v)) for r, v in zip(retreat, depth)]
    roof = (edge[0][0], a.top - a.half * 0.06)
    wall = [a.at(side, 1.0, float(v)) for v in depth[::-1]]
    gas = a.fill([roof, *edge, *wall, (wall[-1][0], a.top - a.half * 0.06)], 1.0) * a.lungs[side]
    healthy = np.clip(a.absorption - 0.10, 0, None)  # the gas takes what vessels and air spaces absorbed
    return a.stroke([roof, *edge], 2.4, 0.5) * 0.26 * a.lungs[side] - gas * np.minimum(healthy, 0.15)


def support_devices(a: Frontal, rng: np.random.Generator) -> np.ndarray:
    """A breathing tube, a central line with a feeding tube, or a pacemaker with its leads."""
    kind = rng.integers(3)
    carina = a.top + a.h * 0.19
    if kind == 0:
        walls = a.stroke([(a.cx - 6 * a.unit, -4), (a.cx - 6 * a.unit, carina)], 3.2, 0.4)
        walls += a.stroke([(a.cx + 6 * a.unit, -4), (a.cx + 6 * a.unit, carina)], 3.2, 0.4)
        lumen = a.stroke([(a.cx, -4), (a.cx, carina)], 8, 0.6)
        return np.minimum(walls, 1) * 0.36 - lumen * 0.22
    if kind == 1:
        side = _side(rng)
        s = np.linspace(0, 1, 20)
        x = a.cx + side * a.half * 0.5 * (1 - s) ** 2 - a.half * 0.14 * s
        line = a.stroke(np.stack([x, a.top * 0.4 + (carina + a.h * 0.12 - a.top * 0.4) * s**0.9], 1), 3.0, 0.4)
        tube = np.stack([a.cx + a.half * 0.02 + a.half * 0.28 * s**4, a.h * (-0.02 + 0.92 * s)], 1)
        return np.minimum(line + a.stroke(tube, 3.2, 0.4), 1) * 0.36
    can = (a.cx + a.half * 0.62, a.top + a.h * 0.13)
    total = a.ellipse(can, (a.half * 0.13, a.half * 0.11), 15, 0.6) * 0.42
    for tip in ((-0.10, 0.10), (0.34, 0.02)):
        lead = [can, (a.cx + a.half * 0.2, can[1] - a.h * 0.03), (a.cx - a.half * 0.1, carina),
                (a.cx + a.half * tip[0], a.base[1] - a.h * (0.04 + tip[1]))]  # fmt: skip
        total = np.maximum(total, a.stroke(lead, 3.0, 0.4) * 0.38)
    return total


LESIONS: dict[str, Callable[[Frontal, np.random.Generator], np.ndarray]] = {
    "Atelectasis": atelectasis,
    "Cardiomegaly": cardiomegaly,
    "Consolidation": consolidation,
    "Edema": edema,
    "Enlarged Cardiomediastinum": enlarged_cardiomediastinum,
    "Fracture": fracture,
    "Lung Lesion": lung_lesion,
    "Lung Opacity": lung_opacity,
    "Pleural Effusion": pleural_effusion,
    "Pleural Other": pleural_other,
    "Pneumonia": pneumonia,
    "Pneumothorax": pneumothorax,
    "Support Devices": support_devices,
    HAZE: haze,
}


def box_of(change: np.ndarray) -> Box:
    """The pixels that a lesion changed by a quarter of its most: x0, y0, x1, y1, the last two outside."""
    x, y, w, h = cv2.boundingRect((np.abs(change) > 0.25 * np.abs(change).max()).astype(np.uint8))
    return x, y, x + w, y + h


def picture(body: Body, view: str, size: tuple[int, int], seed: int, signs: Mapping[str, float]) -> tuple[np.ndarray, dict[str, Box]]:
    """One radiograph: uint16 [h, w] of 12 bits, and the box of each sign drawn.

    view: 'AP', 'PA' or 'LATERAL' (other frontal names are drawn as AP). size: width, height in pixels.
    signs: names of LESIONS with their strength (1 plain, below 1 faint); on a lateral only those of ON_LATERAL are drawn.
    """
    lateral = view == "LATERAL"
    anatomy = (Lateral if lateral else Frontal)(body, view, *size, np.random.default_rng([seed, 0]))
    absorption = anatomy.absorption
    boxes: dict[str, Box] = {}
    order = (*FINDINGS, HAZE)
    for name in sorted(signs, key=order.index):
        if lateral and name not in ON_LATERAL:
            continue
        # a generator of its own, so that one finding looks the same whatever else is drawn
        change = LESIONS[name](anatomy, np.random.default_rng([seed, 2, order.index(name)]))
        absorption = absorption + change * signs[name]
        boxes[name] = box_of(change)
    return expose(absorption, np.random.default_rng([seed, 1])), boxes
