"""Chest X-ray phantoms: a body's absorption, drawn layer by layer, and the pixels that a detector makes of it.

In: a `Body` (the patient), a view, a size in pixels and a seed. Out: 12-bit pixels in which dense tissue is bright, as
MONOCHROME2. The picture shows the patient from the front, so the patient's right is on the left of the image (side -1).
Lengths are fractions of the thorax or of the image; absorption has no unit (air 0, a lung about 0.2, bone and water 0.7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

cv2.setNumThreads(1)

LEVELS = 4095  # 12 bits
NOISE = 0.010  # standard deviation of the detector's noise, of a full scale of 1

Points = Sequence[tuple[float, float]] | np.ndarray


@dataclass(frozen=True)
class Body:
    """What stays the same from picture to picture of one patient."""

    width: float  # of the thorax, 1 on average
    height: float  # of the lungs, 1 on average
    heart: float  # breadth of the heart, 1 on average
    fat: float  # soft tissue in front of the lungs, 0 (slim) to 1 (obese)


def draw_body(rng: np.random.Generator) -> Body:
    """A body from the spread of habitus in adults."""
    return Body(
        width=float(rng.uniform(0.93, 1.07)),
        height=float(rng.uniform(0.93, 1.06)),
        heart=float(rng.uniform(0.92, 1.06)),
        fat=float(rng.beta(2, 3)),
    )


class Frontal:
    """The anatomy of one frontal picture (AP or PA), in pixels. AP films are magnified: a broader heart, a lower inspiration."""

    def __init__(self, body: Body, view: str, width: int, height: int, rng: np.random.Generator) -> None:
        anterior = view.startswith("AP")
        self.body, self.w, self.h = body, width, height
        self.unit = min(width, height) / 500
        self.cx = width * rng.uniform(0.48, 0.52)
        self.half = min(width, height * 1.05) * 0.47 * body.width
        self.top = height * rng.uniform(0.09, 0.12)
        span = height * (0.62 if anterior else 0.67) * body.height
        self.base = {-1: self.top + span * 0.97, +1: self.top + span}
        self.heart_breadth = self.half * body.heart * (0.56 if anterior else 0.46)
        self.vessel_seed = int(rng.integers(2**31))

    # --- places ---
    def outer(self, side: int, v: float | np.ndarray) -> np.ndarray:
        """x of the lung's outer border at depth v (0 apex, 1 base)."""
        bulge = 0.40 + 0.52 * np.sin(np.pi / 2 * np.minimum(1.0, 0.12 + np.asarray(v) * 1.15)) ** 0.9
        return self.cx + side * self.half * bulge

    def inner(self, side: int, v: float | np.ndarray) -> np.ndarray:
        """x of the lung's inner border at depth v."""
        return self.cx + side * self.half * (0.15 + 0.05 * np.asarray(v))

    def at(self, side: int, u: float, v: float) -> tuple[float, float]:
        """A place in a lung: u from the mediastinum (0) to the chest wall (1), v from the apex (0) to the base (1)."""
        x = self.inner(side, v) * (1 - u) + self.outer(side, v) * u
        return float(x), self.top + (self.base[side] - self.top) * v

    def diaphragm(self, side: int, u: float | np.ndarray) -> np.ndarray:
        """y of the dome: highest at its middle, falling to the costophrenic angle at u = 1."""
        u = np.asarray(u)
        drop = (self.base[side] - self.top) * 0.13
        return self.base[side] + drop * (np.abs(u - 0.40) / 0.60) ** 2 - drop * 0.55

    def rib(self, side: int, i: int) -> np.ndarray:
        """The centre line of the i-th back rib as drawn, spine to chest wall: [40, 2] pixels."""
        s = np.linspace(0.02, 1.0, 40)
        v0 = -0.02 + i * 0.108
        y = self.top + (self.base[side] - self.top) * (v0 + 0.02 - 0.10 * np.sin(np.pi * s * 0.75) + (0.10 + 0.015 * i) * s**2)
        v = np.clip((y - self.top) / (self.base[side] - self.top), 0, 1)
        x = self.cx + side * self.half * 0.06 + s * (self.outer(side, v) + side * 2 - self.cx - side * self.half * 0.06)
        return np.stack([x, y], 1)

    # --- masks: float32 [h, w], 0 to 1 ---
    def fill(self, points: Points, blur: float = 1.5) -> np.ndarray:
        """A filled polygon with a soft edge (blur in units of a 500th of the image)."""
        mask = np.zeros((self.h, self.w), np.uint8)
        cv2.fillPoly(mask, [np.round(np.asarray(points)).astype(np.int32)], 255, cv2.LINE_AA)
        return self.soften(mask, blur)

    def ellipse(self, centre: tuple[float, float], axes: tuple[float, float], angle: float = 0, blur: float = 1.5) -> np.ndarray:
        mask = np.zeros((self.h, self.w), np.uint8)
        cv2.ellipse(mask, (centre, (2 * axes[0], 2 * axes[1]), angle), 255, -1, cv2.LINE_AA)
        return self.soften(mask, blur)

    def stroke(self, points: Points, thickness: float, blur: float = 0.7) -> np.ndarray:
        mask = np.zeros((self.h, self.w), np.uint8)
        line = np.round(np.asarray(points) * 16).astype(np.int32)
        cv2.polylines(mask, [line], False, 255, max(1, round(thickness * self.unit)), cv2.LINE_AA, shift=4)
        return self.soften(mask, blur)

    def soften(self, mask: np.ndarray, blur: float) -> np.ndarray:
        """A mask of 8 bits, blurred: `blur` is a standard deviation in 500ths of the image. Wide blurs are done on a small copy."""
        sigma = max(0.4, blur * self.unit)
        shrink = int(sigma / 2.5)
        if shrink > 1:
            small = cv2.resize(mask, (self.w // shrink, self.h // shrink), interpolation=cv2.INTER_AREA)
            mask = cv2.resize(cv2.GaussianBlur(small, (0, 0), sigma / shrink), (self.w, self.h), interpolation=cv2.INTER_LINEAR)
        else:
            mask = cv2.GaussianBlur(mask, (0, 0), sigma)
        return mask.astype(np.float32) * np.float32(1 / 255)

    def lung_outline(self, side: int) -> np.ndarray:
        v = np.linspace(0, 1, 24)
        u = np.linspace(1, 0, 20)
        y = self.top + (self.base[side] - self.top) * v
        bottom_x = self.outer(side, 1.0) * u + self.inner(side, 1.0) * (1 - u)
        wall = np.stack([self.outer(side, v), y], 1)
        dome = np.stack([bottom_x, self.diaphragm(side, u)], 1)
        inner = np.stack([self.inner(side, v), y], 1)[::-1]
        apex = np.array([[(self.inner(side, 0) + self.outer(side, 0)) / 2, self.top - self.half * 0.06]])
        return np.concatenate([wall[:-1], dome, inner[1:], apex])

    @cached_property
    def lungs(self) -> dict[int, np.ndarray]:
        """The two lungs, with soft edges: patient's right -1, left +1."""
        return {side: self.fill(self.lung_outline(side), 2.0) for side in (-1, 1)}

    def heart(self, breadth: float) -> np.ndarray:
        """The heart's shadow, `breadth` pixels from its midline to its apex (on the patient's left)."""
        y = self.base[1] - self.half * 0.30
        return self.ellipse((self.cx + breadth * 0.30, y), (breadth * 0.98, breadth * 0.70), 24, 2.5)

    @cached_property
    def absorption(self) -> np.ndarray:
        """Everything healthy, float32 [h, w]."""
        body, unit = self.body, self.unit
        neck, shoulder = self.half * 0.36, self.top + self.h * 0.02
        flank = self.half * (1.04 + 0.12 * body.fat)
        outline = [(neck, -5), (neck * 1.05, self.top * 0.35), (self.half * 1.1, shoulder), (self.half * 1.4, self.h * 0.22),
                   (flank, self.h * 0.42), (flank, self.h + 5)]  # fmt: skip
        torso = self.fill([(self.cx + x, y) for x, y in outline] + [(self.cx - x, y) for x, y in reversed(outline)], 5)
        lungs = self.lungs[-1] + self.lungs[1]
        total = torso * self._thickness() - lungs * 0.46
        total += self.fill(self._column(0.085), 3) * 0.16
        total += self.heart(self.heart_breadth) * (0.05 + 0.25 * np.minimum(1, lungs * 1.2))
        total += self.ellipse((self.cx + self.half * 0.13, self.top + self.h * 0.16), (self.half * 0.13, self.half * 0.13), 0, 2) * 0.16
        total -= self.fill([(self.cx - 9 * unit, 0), (self.cx + 9 * unit, 0), (self.cx + 7 * unit, self.top + self.h * 0.2),
                            (self.cx - 7 * unit, self.top + self.h * 0.2)], 2) * 0.12  # fmt: skip
        total += self._bones(torso)
        total += self._vessels() * lungs
        bubble = self.ellipse((self.cx + self.half * 0.5, self.base[1] + self.half * 0.22), (self.half * 0.17, self.half * 0.09), 0, 3)
        return total - bubble * 0.14

    def _thickness(self) -> np.ndarray:
        """What soft tissue absorbs: more towards the midline, the abdomen, and in the obese; a little uneven."""
        rng = np.random.default_rng([self.vessel_seed, 1])
        x = np.linspace(-1, 1, self.w, dtype=np.float32)[None, :]
        y = np.linspace(0, 1, self.h, dtype=np.float32)[:, None]
        uneven = cv2.resize(rng.standard_normal((9, 9), dtype=np.float32), (self.w, self.h), interpolation=cv2.INTER_CUBIC)
        fine = cv2.resize(rng.standard_normal((60, 60), dtype=np.float32), (self.w, self.h), interpolation=cv2.INTER_CUBIC)
        return 0.56 + 0.12 * self.body.fat + 0.12 * (1 - x**2) + 0.10 * (y - 0.4) + 0.022 * uneven + 0.008 * fine

    def _column(self, share: float) -> list[tuple[float, float]]:
        x = self.half * share
        return [(self.cx - x, 0), (self.cx + x, 0), (self.cx + x * 1.5, self.h), (self.cx - x * 1.5, self.h)]

    def _bones(self, torso: np.ndarray) -> np.ndarray:
        total = np.zeros((self.h, self.w), np.float32)
        for side in (-1, 1):
            back = np.zeros((self.h, self.w), np.uint8)
            front = np.zeros((self.h, self.w), np.uint8)
            for i in range(1, 10):
                line = np.round(self.rib(side, i) * 16).astype(np.int32)
                cv2.polylines(back, [line], False, 255, max(2, round(11 * self.unit)), cv2.LINE_AA, shift=4)
                cv2.polylines(back, [line], False, 130, max(1, round(6 * self.unit)), cv2.LINE_AA, shift=4)
                if i < 7:
                    end = self.rib(side, i)[-1]
                    target = self.at(side, 0.22, min(0.95, 0.12 * i + 0.32))
                    cv2.line(front, (round(end[0]), round(end[1])), (round(target[0]), round(target[1])), 255,
                             max(2, round(9 * self.unit)), cv2.LINE_AA)  # fmt: skip
            total += (self.soften(back, 0.8) * 0.10 + self.soften(front, 2.0) * 0.035) * torso
            collar = [(self.cx + side * self.half * f, self.top + self.h * y)
                      for f, y in ((0.10, 0.085), (0.35, 0.055), (0.65, 0.035), (1.0, -0.005))]  # fmt: skip
            total += self.stroke(collar, 15, 1.0) * 0.13
        return total

    def _vessels(self) -> np.ndarray:
        """Hila, and vessels that branch from them and thin out."""
        rng = np.random.default_rng(self.vessel_seed)
        tree = np.zeros((self.h, self.w), np.uint8)
        hila = np.zeros((self.h, self.w), np.float32)
        for side in (-1, 1):
            hilum = self.at(side, 0.10, 0.48)
            hila += self.ellipse(hilum, (self.half * 0.09, self.half * 0.17), -12 * side, 6)
            for angle in np.linspace(-1.25, 1.35, 11) + rng.normal(0, 0.08, 11):
                x, y = hilum
                for step in range(7):
                    length = self.half * 0.10
                    nx, ny = x + side * np.cos(angle) * length, y + np.sin(angle) * length
                    cv2.line(tree, (round(x), round(y)), (round(nx), round(ny)), 235 - 28 * step,
                             max(1, round((5 - 0.7 * step) * self.unit)), cv2.LINE_AA)  # fmt: skip
                    x, y, angle = nx, ny, angle + rng.normal(0, 0.22)
        return self.soften(tree, 0.9) * 0.10 + hila * 0.12


class Lateral(Frontal):
    """A simple side view: sternum on the left, spine on the right, one shared lung field. Depth v and place u as for `Frontal`."""

    def outer(self, side: int, v: float | np.ndarray) -> np.ndarray:
        return self.cx + self.half * (0.34 + 0.40 * np.sin(np.pi * np.clip(np.asarray(v) * 0.85 + 0.1, 0, 1)))

    def inner(self, side: int, v: float | np.ndarray) -> np.ndarray:
        return self.cx - self.half * (0.26 + 0.40 * np.sin(np.pi / 2 * np.clip(np.asarray(v) * 1.1, 0, 1)))

    def diaphragm(self, side: int, u: float | np.ndarray) -> np.ndarray:
        return self.base[1] + (self.base[1] - self.top) * (0.16 * np.asarray(u) ** 3 - 0.06)

    def heart(self, breadth: float) -> np.ndarray:
        y = self.base[1] - self.half * 0.34
        return self.ellipse((self.cx - self.half * 0.62 + breadth * 0.62, y), (breadth * 0.62, breadth * 0.86), 18, 3)

    @cached_property
    def absorption(self) -> np.ndarray:
        body = self.body
        front, back = self.half * (0.86 + 0.15 * body.fat), self.half * (1.02 + 0.1 * body.fat)
        torso = self.fill([(self.cx - self.half * 0.3, -5), (self.cx - front, self.h * 0.3), (self.cx - front, self.h + 5),
                           (self.cx + back, self.h + 5), (self.cx + back, self.h * 0.25), (self.cx + self.half * 0.45, -5)], 5)  # fmt: skip
        lung = self.lungs[1]
        total = torso * self._thickness() - lung * 0.42 + self.heart(self.heart_breadth) * lung * 0.22
        for i in range(11):
            y = self.h * (0.05 + 0.088 * i)
            x = self.cx + self.half * (0.52 + 0.22 * np.sin(np.pi * (0.1 + 0.08 * i)))
            total += self.ellipse((float(x), y), (self.half * 0.12, self.h * 0.033), 0, 1.2) * 0.15
        for i in range(1, 9):
            y = self.top + (self.base[1] - self.top) * (0.06 + 0.105 * i)
            line = [(self.cx + self.half * 0.66, y), (self.cx, y + self.h * 0.035), (self.cx - self.half * 0.6, y + self.h * 0.10)]
            total += self.stroke(line, 8, 1.2) * 0.045 * torso
        total += self.stroke([(self.cx - self.half * 0.36, self.top), (self.cx - self.half * 0.72, self.base[1])], 10) * 0.12
        return total + self.ellipse(self.at(1, 0.45, 0.46), (self.half * 0.13, self.half * 0.15), 0, 5) * 0.12


def expose(absorption: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Absorption float32 [h, w] -> 12-bit pixels uint16 [h, w], bright where dense, with the film's exposure, tone and noise."""
    gain, gamma = rng.uniform(0.92, 1.08), rng.uniform(0.85, 1.15)
    film = np.clip(absorption * gain * 0.88 + 0.03, 0, 1) ** np.float32(gamma)
    grain = rng.standard_normal(absorption.shape, dtype=np.float32)
    return np.clip((film + grain * NOISE) * LEVELS, 0, LEVELS).astype(np.uint16)


def official_grey(pixels: np.ndarray) -> np.ndarray:
    """What MIMIC-CXR-JPG did to a DICOM (Johnson et al. 2019, arXiv:1901.07042): scale to 8 bits, equalise the histogram."""
    low, high = int(pixels.min()), int(pixels.max())
    return cv2.equalizeHist(((pixels.astype(np.float32) - low) * (255 / max(1, high - low))).astype(np.uint8))
