"""What lies in the simulated scanner, mouse or LEGO brick: which tissue is where, and how fast it relaxes.

This is a table of organs with the evaluator that samples it; it is kept apart from the scanner (00_simulate.py), which
knows nothing of mice. Coordinates of the animal: x left, y dorsal, z towards the head, mm; z = 0 lies between heart
and diaphragm, the nose at +46, the root of the tail at -45. They are the scanner's LPS axes for a prone animal.

Points come in tiles, small boxes of neighbouring samples. What varies slowly (pose, warp, fields of long waves) is
evaluated at the eight corners of a tile and interpolated; an organ is evaluated only in the tiles that touch its box.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.random import SeedSequence, default_rng
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.ndimage import gaussian_filter

Array = np.ndarray[Any, Any]
Rows = Sequence[tuple[float, ...]]
Layers = Sequence[tuple[float, str]]

# name: T1 ms, T2 ms, proton density, share of the density that varies from place to place (its texture)
TISSUES: dict[str, tuple[float, float, float, float]] = {
    "air": (1000, 1.0, 0.0, 0.0),
    "skin": (1400, 26, 0.75, 0.12),
    "fat": (450, 60, 0.90, 0.05),
    "brown_fat": (700, 42, 0.82, 0.08),
    "muscle": (1550, 24, 0.80, 0.07),
    "bone": (1000, 0.7, 0.10, 0.0),
    "marrow": (800, 40, 0.70, 0.12),
    "cartilage": (1200, 20, 0.70, 0.05),
    "nucleus": (1600, 75, 0.85, 0.05),
    "grey_matter": (1700, 50, 0.82, 0.025),
    "deep_grey": (1650, 46, 0.80, 0.035),
    "white_matter": (1550, 40, 0.70, 0.025),
    "csf": (3500, 200, 1.0, 0.0),
    "vitreous": (3300, 180, 1.0, 0.0),
    "lens": (1300, 14, 0.65, 0.0),
    "mucosa": (1700, 60, 0.85, 0.10),
    "gland": (1500, 42, 0.84, 0.08),
    "tongue": (1450, 29, 0.80, 0.10),
    "myocardium": (1600, 24, 0.80, 0.06),
    "blood": (2200, 45, 0.45, 0.45),
    "vessel": (2200, 45, 0.10, 0.5),
    "lung": (1400, 6, 0.30, 0.25),
    "liver": (1100, 21, 0.75, 0.05),
    "bile": (2500, 250, 0.95, 0.0),
    "gut_wall": (1500, 42, 0.82, 0.10),
    "kidney_cortex": (1500, 40, 0.85, 0.05),
    "outer_medulla": (1750, 52, 0.88, 0.06),
    "inner_medulla": (1750, 70, 0.88, 0.05),
    "spleen": (1550, 36, 0.82, 0.05),
    "bladder": (3500, 500, 1.0, 0.0),
    "mesentery": (500, 55, 0.84, 0.06),
    "chyme_0": (2500, 150, 0.90, 0.10),
    "chyme_1": (1500, 80, 0.80, 0.18),
    "chyme_2": (900, 45, 0.70, 0.22),
    "chyme_3": (600, 28, 0.55, 0.28),
    "feces": (450, 20, 0.30, 0.35),
    "gel": (1800, 50, 1.0, 0.0),
    "water": (2800, 500, 1.0, 0.0),
}
NAMES = list(TISSUES)
ID = {name: number for number, name in enumerate(NAMES)}
REGIONS = {"HT": (0.0, 0.2, 19.5), "TA": (0.0, -0.4, -15.0)}  # centre of the field of view in the animal, mm
TILE = 8  # samples along the edge of a tile
# Depths of neighbouring samples, in sixteenths of a sheet, so that oblique surfaces show no steps.
BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])
LATTICE = 128  # cells of the periodic noise along each axis
CELL = 0.1  # mm

# ---------------------------------------------------------------- the table of organs

# (z, half width, level of the widest point, top, bottom), mm
TRUNK: Rows = [
    (-46, 0.1, 1, 2, 0), (-43, 4, 0, 5, -4), (-38, 8.5, 0, 7.5, -7), (-32, 11, -1, 8.8, -9), (-26, 12, -2, 9.3, -9.8),
    (-20, 12.2, -2.5, 9.5, -10), (-14, 12, -2.5, 9.5, -10), (-8, 11.3, -2, 9.3, -9.7), (-2, 10.4, -1.5, 9, -9.2),
    (4, 9.6, -1, 8.7, -8.6), (9, 8.9, -0.5, 8.2, -8), (13, 7.8, -0.5, 7.3, -7.4), (16, 7, -0.5, 6.6, -7),
    (19, 6.6, -0.5, 6.3, -6.8), (22, 6.8, -0.3, 6.5, -6.7), (26, 7.1, 0, 6.9, -6.6), (30, 6.7, 0, 6.7, -6.3),
    (34, 5.7, 0, 5.7, -5.6), (37, 4.6, -0.3, 4.5, -4.9), (40, 3.7, -0.5, 3.4, -4.2), (43, 2.9, -0.6, 2.2, -3.4),
    (45, 2, -0.8, 1.2, -2.6), (46.5, 0.1, -0.7, -0.5, -1),
]  # fmt: skip
CAVITY: Rows = [
    (-38, 0.1, 0, 1, -1), (-35, 5, -1, 2.6, -5), (-30, 8.8, -2, 4.6, -8), (-24, 10.3, -2.3, 5.4, -8.8),
    (-14, 10.3, -2.3, 5.8, -8.8), (-8, 9.6, -1.8, 5.8, -8.4), (-2, 8.5, -1.2, 5.4, -7.6), (4, 7.1, -0.8, 4.8, -6.5),
    (8, 5.4, -0.6, 3.6, -5.2), (11, 3.2, -0.8, 2, -3.6), (12.8, 0.1, -1, -0.5, -1.5),
]  # fmt: skip
BRAIN: Rows = [
    (17.6, 0.9, 1.85, 2.5, 1.2), (18.8, 1.25, 1.85, 2.8, 0.9), (20.5, 2.5, 2.2, 4.3, 0.1), (22.5, 3.9, 2.5, 5, -0.5),
    (24.5, 4.8, 2.2, 5.3, -1),
    (26.5, 5.2, 2, 5.5, -1.3), (28.5, 5.1, 1.9, 5.5, -1.2), (30.5, 4.4, 2, 5.2, -0.6), (32.3, 3.2, 2.2, 4.7, 0.2),
    (33.4, 2, 2.4, 4.2, 0.9), (34.4, 1.6, 2.4, 3.9, 1), (36, 1.3, 2.2, 3.4, 1), (36.9, 0.1, 2.2, 2.4, 2),
]  # fmt: skip
# (z, level of the vertebral bodies, their half width)
SPINE: Rows = [
    (-46, 2, 0.6), (-38, 3, 0.9), (-30, 4, 1.25), (-20, 4.7, 1.3), (-10, 4.7, 1.15), (0, 4.1, 0.95), (6, 3.3, 0.9),
    (12, 1.3, 0.9), (16, 0.2, 0.95), (19, 0.0, 0.9),
]  # fmt: skip
# (z, number of the vertebra whose cranial end it is): 7 neck, 13 chest, 6 loin, 4 sacrum
VERTEBRAE: Rows = [(-46, 34), (-42, 30), (-30.3, 26), (-12.3, 20), (10.2, 7), (19.4, 0)]

BONE: Layers = [(0, "bone"), (0.22, "marrow")]
NODE: Layers = [(-0.1, "fat"), (0, "gland")]
# Ellipsoids: both sides (1) or one (0), centre, half axes, roughness of the surface, layers from depth in mm
BLOBS: list[tuple[int, tuple[float, ...], tuple[float, ...], float, Layers]] = [
    (0, (0, 6.0, 9.0), (4.4, 1.7, 3.6), 0.08, [(0, "brown_fat")]),  # between the shoulder blades
    (1, (2.6, 4.2, 15.5), (1.5, 1.2, 1.7), 0.06, [(0, "brown_fat")]),  # of the neck
    (1, (2.7, -5.0, 16.5), (2.6, 1.6, 4.2), 0.06, [(0, "gland")]),  # submandibular
    (1, (5.2, -3.2, 19.5), (1.0, 1.7, 2.4), 0.06, [(0, "gland")]),  # parotid
    (1, (4.6, -4.8, 20.6), (0.7, 0.6, 1.0), 0.0, NODE),  # lymph nodes
    (1, (6.4, 0.2, 12.0), (0.7, 1.1, 1.3), 0.0, NODE),
    (1, (6.3, -3.6, 6.5), (0.6, 0.9, 1.2), 0.0, NODE),
    (0, (0.2, -3.6, 9.0), (2.3, 1.1, 2.4), 0.06, [(0, "gland")]),  # thymus
    (1, (3.9, 0.5, 31.6), (1.6, 2.0, 2.2), 0.06, [(0, "gland")]),  # behind the eye
    (1, (4.75, 1.5, 33.2), (1.6, 1.6, 1.55), 0.0, [(-0.12, "skin"), (0.06, "vitreous")]),
    (1, (5.05, 1.5, 33.35), (1.02, 1.02, 1.02), 0.0, [(0, "vitreous"), (0.05, "lens")]),
    (0, (0, -3.5, 31.5), (1.7, 1.4, 7.0), 0.05, [(-0.15, "mucosa"), (0, "tongue")]),
    (1, (3.4, -1.5, 22.6), (1.45, 1.3, 1.6), 0.0, [(0, "bone"), (0.16, "air")]),  # middle ear
    (0, (0, -1.9, 21.0), (0.9, 0.45, 1.8), 0.05, [(-0.25, "mucosa"), (0, "air")]),  # larynx
]
# Tubes: both sides (1) or one (0), points (x, y, z, radius), roughness, layers
TUBES: list[tuple[int, Rows, float, Layers]] = [
    (0, [(0, -2.4, 21, 0.75), (0, -3.1, 16, 0.75), (0, -2.6, 11, 0.75), (0, -1.2, 7, 0.7)], 0,
     [(-0.15, "mucosa"), (0, "cartilage"), (0.14, "air")]),  # trachea
    (1, [(0, -1.2, 7, 0.55), (2.2, -0.4, 5, 0.45), (3.6, 0.4, 2, 0.3)], 0, [(0, "cartilage"), (0.12, "air")]),
    (0, [(0.2, -1.3, 20, 0.6), (0.5, -1.4, 14, 0.6), (0.4, 0.6, 8, 0.6), (0.2, 1.4, 0, 0.6), (1.5, 0.8, -5, 0.7)], 0.05,
     [(0, "muscle"), (0.3, "mucosa")]),  # oesophagus
    (0, [(0.2, -1.2, 7, 0.6), (0.9, 0.6, 8.6, 0.6), (1.2, 2, 7, 0.58), (1, 2.3, 0, 0.55), (0.6, 2.7, -12, 0.5),
         (0.3, 2.5, -24, 0.45), (0.2, 2, -31, 0.4)], 0, [(-0.08, "mesentery"), (0, "vessel")]),  # aorta
    (0, [(-1.3, -0.3, 6, 0.6), (-1.4, -1, 0, 0.65), (-1.5, 0.8, -6, 0.75), (-1.1, 2.1, -13, 0.75),
         (-0.7, 2.1, -24, 0.65), (-0.4, 1.6, -31, 0.5)], 0, [(-0.08, "mesentery"), (0, "vessel")]),  # caval vein
    (1, [(1.6, -1, 7, 0.45), (2.6, -3, 11, 0.5), (3.4, -3.4, 16, 0.45), (4.2, -2.6, 21, 0.3)], 0,
     [(0, "vessel")]),  # jugular veins
    (1, [(0.6, -0.6, 8.5, 0.32), (1.3, -1.6, 13, 0.3), (1.7, -1.7, 19, 0.3), (1.6, -1.2, 23, 0.22)], 0,
     [(0, "vessel")]),  # carotid arteries
    (1, [(0.5, 2.4, -14.5, 0.3), (3.4, 2.6, -16.3, 0.28)], 0, [(-0.1, "mesentery"), (0, "vessel")]),  # renal
    (1, [(7.3, -2.2, 10.5, 0.75), (8.4, -4.2, 7.5, 0.55), (9, -5.6, 5, 0.8)], 0, BONE),  # humerus
    (1, [(9, -5.6, 5, 0.6), (8.4, -7, 9, 0.38), (7.8, -8, 13.2, 0.45)], 0, BONE),  # ulna
    (1, [(8.4, -5.6, 5.2, 0.45), (8, -7.2, 9, 0.3), (7.4, -8.1, 13.2, 0.4)], 0, BONE),  # radius
    (1, [(7.4, -8.1, 13.2, 0.3), (7, -8.4, 17, 0.22)], 0, [(0, "bone")]),
    (1, [(4.6, 1.5, -36.5, 1), (7.4, -1.5, -33.4, 0.72), (9.6, -4.2, -30.4, 1.1)], 0, [(0, "bone"), (0.3, "marrow")]),
    (1, [(9.6, -4.6, -30.4, 1.1), (9.4, -6.2, -35, 0.6), (9, -7.2, -39, 0.6)], 0, [(0, "bone"), (0.3, "marrow")]),
    (1, [(2.4, 4.6, -29.5, 0.5), (3.4, 3.4, -34, 0.65), (4.2, 1, -38, 0.7), (2.6, -1.5, -41, 0.5)], 0, BONE),  # pelvis
    (1, [(5.6, -1.2, 25.5, 0.5), (4.6, -4, 29.5, 0.9), (2.8, -4.8, 34, 0.75), (0.6, -4.4, 42, 0.5)], 0,
     [(0, "bone"), (0.25, "marrow"), (0.5, "bone")]),  # mandible with the root of the incisor
    (1, [(1.8, -0.4, 35.5, 0.5), (1.2, -0.4, 40, 0.5), (0.5, -1.6, 44, 0.45)], 0, [(0, "bone")]),  # upper incisor
    (1, [(6.2, 0.2, 25, 0.3), (5.9, 0.2, 28.5, 0.35), (4.6, -0.6, 32, 0.45)], 0, [(0, "bone")]),  # cheek bone
    (1, [(4.2, -0.9, 22.6, 0.5), (6, 0.4, 22.4, 0.5), (7.4, 1.5, 22.2, 0.6)], 0.1, [(-0.2, "cartilage"), (0.1, "air")]),
    (1, [(3.7, 1.3, 32, 0.3), (2.2, 0.2, 30.5, 0.25), (0.2, -0.6, 29, 0.25)], 0, [(0, "white_matter")]),  # optic nerve
]  # fmt: skip
LIMBS: list[Rows] = [
    [(6.6, -1.6, 11, 3.2), (8.4, -4.6, 5.6, 2.3), (8, -7.2, 10, 1.5), (7.5, -8, 13.2, 0.95), (7, -8.4, 17, 0.7)],
    [(4.8, 1.2, -36, 4.6), (9.2, -3.8, -30.8, 2.7), (9.3, -6, -35, 1.9), (9, -7.2, -39, 1.0)],
]  # fmt: skip


def tile_grid(fov: float, samples: int, thickness: float, sheets: int) -> tuple[Array, Array]:
    """Corners of the tiles of a slice, (tile, 8, 3) in mm along x, y and through it, and weights (8, point).

    A tile is TILE x TILE samples and all sheets; the weights interpolate from its corners to its points.
    """
    count, step = -(-samples // TILE), fov / samples
    y, x = np.meshgrid(*2 * [(np.arange(count) * TILE - samples // 2) * step], indexing="ij")
    unit = np.array([(a, b, c) for c in (0, 1) for b in (0, 1) for a in (0, 1)], float)
    first = np.stack([x, y, np.full_like(x, -thickness / 2)], axis=-1).reshape(-1, 1, 3)
    sheet, row, column = np.meshgrid(np.arange(sheets), np.arange(TILE), np.arange(TILE), indexing="ij")
    depth = (sheet + (BAYER[row % 4, column % 4] + 0.5) / 16) / sheets
    at = np.stack([column / TILE, row / TILE, depth], axis=-1).reshape(1, -1, 3)
    weights = np.where(unit[:, None] == 1, at, 1 - at).prod(axis=2).astype(np.float32)
    return first + unit * [TILE * step, TILE * step, thickness], weights


def untile(values: Array, samples: int) -> Array:
    """Values (tile, sample of one sheet, ...) as an image (y, x, ...)."""
    count, rest = -(-samples // TILE), values.shape[2:]
    image = values.reshape(count, count, TILE, TILE, *rest).swapaxes(1, 2)
    return image.reshape(count * TILE, count * TILE, *rest)[:samples, :samples]


class Brick:
    """The phantom: a brick of 3 x 2 studs in a round vessel of gel or water, turned so that its edges are slanted."""

    studs = (3, 2)

    def __init__(self, rng: np.random.Generator) -> None:
        a, b = np.deg2rad(rng.uniform(3, 7, 2) * rng.choice([-1, 1], 2))
        about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        self.turn = about_z @ about_y
        self.bubbles = np.column_stack([rng.uniform([-9, -6, 1], [9, 6, 11], (6, 3)), rng.uniform(0.2, 0.7, 6)])

    def water(self, x: Array, y: Array, z: Array) -> Array:
        """Where there is water; the brick's foot is z = 0, its middle x = y = 0 (mm). ABS and air give no signal."""
        edge_x, edge_y = (np.abs(v) - np.float32(4 * n - 0.1) for v, n in zip((x, y), self.studs, strict=True))
        outline = (edge_x < 0) & (edge_y < 0)
        hollow = (edge_x < -1.2) & (edge_y < -1.2) & (z < 8.6)
        # Studs repeat every 8 mm; a tube stands in the middle of four of them.
        px, py = (np.abs((v + (4 if n % 2 else 8)) % 8 - 4) for v, n in zip((x, y), self.studs, strict=True))
        stud = (px**2 + py**2 < 2.4**2) & (z >= 9.6) & (z < 11.4) & outline
        ring = (4 - px) ** 2 + (4 - py) ** 2
        tube = (ring < 3.255**2) & (ring > 2.4**2) & (edge_x < -4.3) & (edge_y < -4.3)
        water = ~((outline & (z > 0) & (z < 9.6) & (~hollow | tube)) | stud) & (x**2 + y**2 < 14.2**2)
        for bx, by, bz, radius in self.bubbles:
            water &= (x - bx) ** 2 + (y - by) ** 2 + (z - bz) ** 2 > radius**2
        return np.asarray(water)

    def share(
        self, frame: Array, origin: Array, fov: float, samples: int, fine: int, thickness: float, sheets: int
    ) -> Array:
        """Share of water (y, x) in each sample of a slice, from `fine` points per sample along each axis.

        `frame` (3, 3) holds the directions of x, y and the normal in the scanner, `origin` the slice's centre.
        """
        axis = (((np.arange(samples * fine) + 0.5) / fine - 0.5 - samples // 2) * fov / samples).astype(np.float32)
        right, down, through = (frame @ self.turn.T).astype(np.float32)
        start = (self.turn @ origin + [0, 0, 5.7]).astype(np.float32)
        share = np.zeros((samples, samples), np.float32)
        for sheet in range(sheets):
            place = np.tile((BAYER + 0.5) / 16, (fine // 4 + 1, samples * fine // 4 + 1))[:fine, : samples * fine]
            depth = (thickness * ((sheet + place) / sheets - 0.5)).astype(np.float32)
            for row in range(samples):  # row by row: in whole it would take 70 MB per array
                y = axis[row * fine : (row + 1) * fine, None]
                points = [start[n] + axis * right[n] + y * down[n] + depth * through[n] for n in range(3)]
                share[row] += self.water(*points).reshape(fine, samples, fine).mean(axis=(0, 2), dtype=np.float32)
        return share / np.float32(sheets)


def smooth_noise(rng: np.random.Generator) -> Array:
    """Periodic band-limited noise of unit deviation on a cube, flat; its features are about 6 cells wide."""
    noise = rng.standard_normal((LATTICE,) * 3, dtype=np.float32)
    noise = gaussian_filter(noise, 1.6, mode="wrap", truncate=3)
    return np.asarray(noise / noise.std()).ravel()


@dataclass(frozen=True)
class Curves:
    """Smooth functions of z, tabulated in steps of 0.05 mm."""

    start: float
    table: Array  # (curve, step)

    @classmethod
    def through(cls, rows: Rows) -> Self:
        """Monotone cubic curves through rows of (z, value, ...)."""
        station = np.array(sorted(rows)).T
        z = np.arange(station[0, 0], station[0, -1], 0.05)
        return cls(float(z[0]), PchipInterpolator(station[0], station[1:].T)(z).T.astype(np.float32))

    def at(self, z: Array) -> Array:
        """Values (curve, ...)."""
        cell = ((z - np.float32(self.start)) * np.float32(20)).astype(np.int32)
        return self.table[:, np.clip(cell, 0, self.table.shape[1] - 1)]


class Loft(Curves):
    """A body along z of given half width, level of the widest point, top and bottom."""

    def depth(self, x: Array, y: Array, z: Array) -> Array:
        """Distance to the surface along the ray from the axis, mm, positive inside."""
        width, level, top, bottom = self.at(z)
        dy = y - level
        u = (x / np.maximum(width, 0.02)) ** 2
        v = (dy / np.maximum(np.where(dy > 0, top - level, level - bottom), 0.02)) ** 2
        rho = np.sqrt(u + v - np.where(dy > 0, np.float32(0.5), np.float32(0.25)) * np.minimum(u * v, 1)) + np.float32(
            1e-3
        )
        beyond = np.maximum(np.maximum(self.start - z, z - self.start - self.table.shape[1] * 0.05), 0)
        return np.asarray(np.sqrt(x * x + dy * dy + np.float32(1e-4)) * (1 / rho - 1) - beyond)


def spline(points: Rows | Array, step: float = 0.8) -> Array:
    """Points (n, 4) of (x, y, z, radius) on a smooth curve, about `step` mm apart."""
    p = np.asarray(points, float)
    way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(p[:, :3], axis=0), axis=1))])
    fine = np.linspace(0, way[-1], max(int(way[-1] / step), 2) + 1)
    curve = PchipInterpolator(way, p)(fine) if len(p) < 4 else CubicSpline(way, p)(fine)
    curve[:, 3] = np.interp(fine, way, p[:, 3])
    return np.asarray(curve)


def pieces(curve: Array) -> Array:
    """A curve (n, 4) as capsules (n - 1, 9): both ends and the way up to the first."""
    length = np.linalg.norm(np.diff(curve[:, :3], axis=0), axis=1)
    return np.column_stack([curve[:-1], curve[1:], np.cumsum(length) - length])


def branch(rng: np.random.Generator, start: Array, heading: Array, radius: float, length: float) -> list[Array]:
    """A tree of vessels as curves (n, 4): each forks in two thinner ones until they are 0.05 mm in radius."""
    points = [np.append(start, radius)]
    for _ in range(4):
        heading = heading + rng.normal(0, 0.22, 3)
        heading = heading / np.linalg.norm(heading)
        points.append(np.append(points[-1][:3] + heading * length / 4, radius * rng.uniform(0.85, 1)))
    tree = [np.array(points)]
    if radius > 0.05:
        across = np.cross(heading, rng.normal(size=3))
        across /= np.linalg.norm(across)
        split = rng.uniform(0.55, 0.8)
        for side, share in ((1, split), (-1, 1 - 0.35 * split)):
            turned = heading + side * across * rng.uniform(0.4, 0.9)
            tree += branch(rng, points[-1][:3], turned, radius * min(share, 0.85), length * rng.uniform(0.65, 0.95))
    return tree


def loops(rng: np.random.Generator, centre: Sequence[float], half: Sequence[float], pitch: float) -> Array:
    """A bowel folded back and forth in an ellipsoid: points (n, 4) on its axis."""
    cells = [np.arange(-h + rng.uniform(0, pitch), h, pitch) for h in half]
    points = []
    for i, z in enumerate(cells[2]):
        for j, y in enumerate(cells[1][:: (-1) ** i]):
            for x in cells[0][:: (-1) ** (i * len(cells[1]) + j)]:
                if ((np.array([x, y, z]) / half) ** 2).sum() < 1:
                    points.append([x, y, z])
    place = np.array(points) + rng.normal(0, 0.2 * pitch, (len(points), 3)) + centre
    for _ in range(3):  # loops that were straight rows curl
        wave = rng.normal(size=3)
        wave *= 2 * np.pi / rng.uniform(9, 14) / np.linalg.norm(wave)
        place += 1.3 * np.sin(place @ wave + rng.uniform(0, 6.3))[:, None] * rng.normal(size=3)
    return spline(np.column_stack([place, rng.uniform(0.75, 1.3, len(place))]), 1.3)


# ---------------------------------------------------------------- one animal


class Mouse:
    """One animal: everything about it follows from its seed."""

    def __init__(self, seed: SeedSequence) -> None:
        rng = default_rng(seed)
        self.size = rng.uniform(0.93, 1.05)
        self.fatness = rng.uniform(0.5, 1.5)
        self.roll = np.deg2rad(rng.normal(0, 4))
        self.bend = rng.normal(0, [[1.2, 0.8], [0.8, 0.5]])  # mm at 30 mm from the middle
        self.tidal = rng.uniform(0.5, 1.5)  # mm of the diaphragm
        self.noise = smooth_noise(rng)
        self.turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
        # Warp: long waves shift organs, short ones make outlines uneven.
        self.wave_length = np.concatenate([rng.uniform(7, 16, 12), rng.uniform(2.5, 4, 12)])
        direction = rng.normal(size=(24, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.waves = (2 * np.pi * direction / self.wave_length[:, None]).astype(np.float32)
        self.phase = rng.uniform(0, 2 * np.pi, 24).astype(np.float32)
        self.push = (rng.normal(size=(24, 3)) * np.where(self.wave_length > 5, 0.15, 0.03)[:, None]).astype(np.float32)
        # Fields: sums of ten waves of length 1, to be stretched.
        direction = rng.normal(size=(32, 10, 3))
        direction *= 2 * np.pi * rng.uniform(0.7, 1.4, (32, 10, 1)) / np.linalg.norm(direction, axis=2, keepdims=True)
        self.field_waves = direction.astype(np.float32)
        self.field_phase = rng.uniform(0, 2 * np.pi, (32, 10)).astype(np.float32)
        self.table = self.relaxation(rng)
        self.trunk, self.cavity, self.brain = (Loft.through(rows) for rows in (TRUNK, CAVITY, BRAIN))
        self.spine, self.vertebra = Curves.through(SPINE), Curves.through(VERTEBRAE)
        self.blobs, self.tubes = [], []
        for sides, centre, half, rough, layers in BLOBS:
            for side in (-1, 1) if sides else (1,):
                place = (np.array(centre) + rng.normal(0, 0.04, 3) * half) * [side, 1, 1]
                self.blobs.append((place, np.array(half) * rng.uniform(0.9, 1.1, 3), rough, layers))
        for sides, points, rough, layers in TUBES:
            for side in (-1, 1) if sides else (1,):
                curve = np.array(points) * [side, 1, 1, rng.uniform(0.9, 1.1)]
                curve += rng.normal(0, 0.08, curve.shape) * [1, 1, 1, 0]
                self.tubes.append((pieces(spline(curve)), rough, layers))
        self.limbs = [np.array(points) * [side, 1, 1, 1] for points in LIMBS for side in (-1, 1)]
        self.trees = self.vessels(rng)
        self.bowels = self.bowel(rng)

    @staticmethod
    def relaxation(rng: np.random.Generator) -> Array:
        """T1, T2 and density of each tissue in this animal, (tissue, 3): within 15 % of the table."""
        table = np.array([values[:3] for values in TISSUES.values()])
        return np.minimum(table * (1 + rng.uniform(-1, 1, table.shape) * [0.15, 0.15, 0.04]), [1e9, 1e9, 1])

    @staticmethod
    def vessels(rng: np.random.Generator) -> list[tuple[str, str, Array]]:
        """Branching vessels: their tissue, the tissue they run in, their curve."""
        roots = [
            ("vessel", "liver", (-0.6, -1.5, -10), (-0.3, -0.2, 1), 0.42, 4.0),
            ("vessel", "liver", (0.2, -2, -9.5), (0.6, -0.3, 0.6), 0.38, 3.6),
            ("vessel", "liver", (-1.4, -1, -2.2), (-0.6, -0.3, -0.8), 0.42, 4.2),
            ("vessel", "liver", (-1.2, -1.2, -2.2), (0.7, -0.4, -0.6), 0.4, 4.0),
            ("vessel", "liver", (-1.3, -1.4, -2.2), (0, -0.8, -0.6), 0.35, 3.6),
        ]
        for side in (-1, 1):
            roots += [
                ("blood", "lung", (side * 2.4, 0.2, 5), (side * 0.7, 0.2, -0.7), 0.4, 3.4),
                ("blood", "lung", (side * 2.4, 0.6, 5.5), (side * 0.6, 0.4, 0.6), 0.34, 2.6),
                ("blood", "lung", (side * 2.6, -1.5, 4), (side * 0.5, -0.5, -0.8), 0.32, 3.0),
            ]
        for _ in range(7):
            away = rng.normal(size=3) * [1, 0.6, 1]
            roots.append(("vessel", "mesentery", (rng.normal(0, 1), 0.5, -18), tuple(away), 0.28, 4.5))
        grown: dict[tuple[str, str], list[Array]] = {}
        for tissue, host, start, heading, radius, length in roots:
            tree = branch(rng, np.array(start), np.array(heading), radius, length)
            grown.setdefault((tissue, host), []).extend(pieces(curve) for curve in tree)
        return [(tissue, host, np.concatenate(tree)) for (tissue, host), tree in grown.items()]

    @staticmethod
    def bowel(rng: np.random.Generator) -> list[dict[str, Any]]:
        """Small intestine, caecum and colon: axis (n, 4), layers of the wall, kind of content along the way."""
        small = loops(rng, (0, -2, -21.5), (10.2, 7, 12.5), 2.7)
        small[:, 3] *= 1.6
        caecum = np.array([(-6, -3.6, -21, 2), (-3.6, -5.6, -25, 3), (1.5, -6, -27.5, 2.8), (5.5, -5, -25, 1.9)])
        colon = np.array([
            (-5, -3.5, -24, 1.2), (-6.4, -0.6, -19, 1.2), (-3, -3.4, -14.6, 1.2), (2.5, -3.6, -14.8, 1.3),
            (6.4, -0.6, -18.5, 1.2), (4.6, 1.6, -25, 1.3), (1.2, 1.6, -31, 1.3), (0, 1.2, -40, 1.2),
        ])  # fmt: skip
        parts = [("small", small), ("caecum", spline(caecum + rng.normal(0, 0.5, (4, 4)) * [1, 1, 1, 0.2]))]
        parts.append(("colon", spline(colon + rng.normal(0, 0.5, colon.shape) * [1, 1, 1, 0.1])))
        made: list[dict[str, Any]] = []
        for name, axis in parts:
            content = rng.choice([0, 1, 1, 2, 2, 3], 200) if name == "small" else np.full(200, rng.integers(1, 3))
            later = axis + np.append(rng.normal(0, 0.2, 3), 0)
            made.append({"name": name, "axis": pieces(axis), "moved": pieces(later), "content": content})
            made[-1]["shift"] = rng.uniform(1.5, 4)
        return made

    def to_body(self, points: Array) -> Array:
        """Points of the scanner's frame (..., 3) in the straight, unwarped animal."""
        p = points / np.float32(self.size)
        z = p[..., 2] / 30
        x = p[..., 0] - self.bend[0, 0] * z**2 - self.bend[0, 1] * z
        y = p[..., 1] - self.bend[1, 0] * z**2 - self.bend[1, 1] * z
        c, s = np.cos(self.roll), np.sin(self.roll)
        p = np.stack([c * x + s * y, c * y - s * x, p[..., 2]], axis=-1).astype(np.float32)
        hold = np.clip(1 - (p[..., 2:] - 8) / 12, 0.22, 1)  # the skull keeps its shape
        return np.asarray(p + hold * (np.sin(p @ self.waves.T + self.phase) @ self.push))

    def breath(self, points: Array) -> Array:
        """Displacement (..., 3) at full inspiration, mm: most at the diaphragm and the belly, none at the spine."""
        p = points / np.float32(self.size)
        along = (p[..., 2] + 4) / np.where(p[..., 2] > -4, 9, 17)
        reach = np.exp(-(along**2)) * np.clip((5 - p[..., 1]) / 10, 0, 1.2)
        return np.asarray(self.tidal * reach[..., None] * np.array([0, -0.55, -0.85]), np.float32)

    def field(self, points: Array, stream: int, length: float) -> Array:
        """Smooth random field of unit deviation whose waves are `length` mm long."""
        waves = np.sin(points @ (self.field_waves[stream] / np.float32(length)).T + self.field_phase[stream])
        return np.asarray(waves.sum(axis=-1) * np.float32(0.2**0.5))

    def limb_depth(self, points: Array) -> Array:
        """Distance to the surface of the limbs, mm, positive inside."""
        best = np.full(points.shape[:-1], -9, np.float32)
        for limb in self.limbs:
            for a, b in itertools.pairwise(limb.astype(np.float32)):
                best = np.maximum(
                    best, segment(list(np.moveaxis(points, -1, 0)), a[None, :, None], b[None, :, None])[0]
                )
        return best

    def render(self, corners: Array, weights: Array, later: bool = True) -> tuple[Array, list[tuple[Array, Array]]]:
        """Tiles that hold any of the animal, and tissue and relative density of their points in both scans.

        `corners` (tile, 8, 3) in the animal's frame, before pose and warp; `weights` (8, point). Tissue and density
        are (tile found, point), for the high and for the low scan: `later`, bowels moved on and the bladder filled.
        """
        body = self.to_body(corners)
        trunk, limbs = self.trunk.depth(*np.moveaxis(body, -1, 0)), self.limb_depth(body)
        depth = np.maximum(trunk, limbs) + 0.3 * np.maximum(1 - np.abs(trunk - limbs) / 1.5, 0) ** 2
        found = np.flatnonzero(depth.max(axis=1) > -0.2)
        canvas = Canvas(self, body[found], depth[found] @ weights, weights)
        if len(found):
            canvas.paint()
        still, states = canvas.label, []
        for moved in (False, later):
            canvas.label = still.copy()
            canvas.bowels(moved)
            states.append((canvas.label, canvas.density()))
        return found, states


def segment(points: Sequence[Array], a: Array, b: Array) -> tuple[Array, Array]:
    """Depth in tapered capsules from a to b, each (capsule, 4 of x, y, z, radius, ...), and the share of the way."""
    ax, ay, az, radius = (a[:, n] for n in range(4))
    dx, dy, dz, widening = (b[:, n] - a[:, n] for n in range(4))
    length = np.maximum(dx * dx + dy * dy + dz * dz, np.float32(1e-6))
    px, py, pz = points[0] - ax, points[1] - ay, points[2] - az
    way = (px * dx + py * dy + pz * dz) / length
    np.clip(way, 0, 1, out=way)
    px -= way * dx
    py -= way * dy
    pz -= way * dz
    return radius + way * widening - np.sqrt(px * px + py * py + pz * pz), way


class Canvas:
    """The tiles of one slice while tissue after tissue is painted on them."""

    def __init__(self, mouse: Mouse, corners: Array, depth: Array, weights: Array) -> None:
        self.mouse, self.corners, self.depth, self.weights = mouse, corners, depth, weights
        self.x, self.y, self.z = (self.spread(c) for c in np.moveaxis(corners, -1, 0))
        self.low, self.high = corners.min(axis=1), corners.max(axis=1)
        self.bottom, self.top = self.low.min(axis=0, initial=np.inf), self.high.max(axis=0, initial=-np.inf)
        self.cell = self.cells(corners @ (mouse.turn / np.float32(CELL)))
        self.grain = self.cells(corners / np.array([0.07, 0.07, 0.5], np.float32))
        self.label = np.zeros(self.x.shape, np.uint8)
        self.shade: dict[str, Array] = {}  # tissue: factor of its density

    def spread(self, at_corners: Array) -> Array:
        """Interpolate values (tile, 8) to the points."""
        return np.asarray(np.ascontiguousarray(at_corners) @ self.weights)

    def cells(self, lattice: Array) -> Array:
        """Index of each point in the periodic noise."""
        i, j, k = (
            self.spread(c + np.float32(LATTICE * 64)).astype(np.int32) & (LATTICE - 1)
            for c in np.moveaxis(lattice, -1, 0)
        )
        return np.asarray((i * LATTICE + j) * LATTICE + k)

    def fine(self, stream: int, tiles: Any = slice(None)) -> Array:
        """Noise with features of half a millimetre."""
        cell = (self.cell[tiles] + np.int32(stream * 1037417)) & np.int32(LATTICE**3 - 1)
        return np.asarray(self.mouse.noise[cell])

    def field(self, stream: int, length: float, tiles: Any = slice(None)) -> Array:
        """Smooth random field."""
        return self.spread(self.mouse.field(self.corners[tiles], stream, length))

    def near(self, low: Any, high: Any) -> Array:
        """Tiles that touch a box."""
        return np.flatnonzero(((self.low < high) & (self.high > low)).all(axis=1))

    def points(self, tiles: Array) -> list[Array]:
        """Coordinates of the points of some tiles."""
        return [self.x[tiles], self.y[tiles], self.z[tiles]]

    def put(self, tiles: Array, *masks: tuple[Any, str], only: str = "") -> None:
        """Paint tissues where their masks hold, in this order; `only` on one tissue."""
        part = self.label[tiles]
        allowed = part == ID[only] if only else True
        for mask, tissue in masks:
            part[mask & allowed] = ID[tissue]
        self.label[tiles] = part

    def layers(self, tiles: Array, depth: Array, layers: Layers, only: str = "") -> None:
        """Paint shells that begin at given depths."""
        self.put(tiles, *((depth > np.float32(start), tissue) for start, tissue in layers), only=only)

    def blob(self, centre: Array, half: Array, rough: float = 0) -> tuple[Array, Array]:
        """Tiles near an ellipsoid and the depth in it."""
        c, h = np.asarray(centre, np.float32), np.asarray(half, np.float32)
        tiles = self.near(c - h - 0.5, c + h + 0.5)
        q = np.sqrt(sum(((v - c[n]) / h[n]) ** 2 for n, v in enumerate(self.points(tiles))))
        depth = (1 - q) * h.min()
        return tiles, depth + np.float32(rough) * self.fine(3, tiles) if rough else depth

    def tube(self, pieces: Array, margin: float = 0.3, wide: bool = False) -> tuple[Array, Array, Array, Array]:
        """Tiles near tapered capsules (n, 9), depth in the nearest, way along it (mm), depth in another far along.

        Depth in `wide` ones is interpolated from the corners of the tiles.
        """
        ends = pieces[:, :8].reshape(-1, 2, 4).astype(np.float32)
        reach = ends[..., 3:] + np.float32(margin)
        low, high = (ends[..., :3] - reach).min(axis=1), (ends[..., :3] + reach).max(axis=1)
        seen = np.flatnonzero(((low < self.top) & (high > self.bottom)).all(axis=1))
        touch = np.ones((len(self.low), len(seen)), bool)
        for n in range(3):
            touch &= (self.low[:, n, None] < high[seen, n]) & (self.high[:, n, None] > low[seen, n])
        tile, piece = np.nonzero(touch)
        piece = seen[piece]
        # A capsule that is much farther from the middle of a tile than another is the nearest nowhere in it.
        middle = 0.5 * (self.low + self.high)
        size = np.linalg.norm(self.high - self.low, axis=1)[tile]
        rough, _ = segment(list(middle[tile].T), ends[piece, 0], ends[piece, 1])
        best = np.full(len(self.low), -9, np.float32)
        np.maximum.at(best, tile, rough)
        near = (rough > best[tile] - size - margin) & (rough > -margin - size / 2)
        tile, piece = tile[near], piece[near]
        tiles, first, count = np.unique(tile, return_index=True, return_counts=True)
        depth = np.full((len(tiles), self.weights.shape[1]), -9, np.float32)
        way, other = (np.zeros_like(depth), depth.copy()) if wide else (depth, depth)
        length = np.linalg.norm(ends[:, 1, :3] - ends[:, 0, :3], axis=1)
        start = pieces[:, 8].astype(np.float32)
        for turn in range(count.max(initial=0)):
            at = np.flatnonzero(count > turn)
            own = piece[first[at] + turn]
            place = list(np.moveaxis(self.corners[tiles[at]], -1, 0)) if wide else self.points(tiles[at])
            d, share = segment(place, ends[own, 0, :, None], ends[own, 1, :, None])
            if not wide:
                depth[at] = np.maximum(depth[at], d)
                continue
            d, arc = self.spread(d), self.spread((start[own] + share.T * length[own]).T)
            best, best_arc = depth[at], way[at]
            apart = np.abs(arc - best_arc) > 3
            other[at] = np.maximum(other[at], np.where(apart, np.minimum(best, d), -9))
            way[at] = np.where(d > best, arc, best_arc)
            depth[at] = np.maximum(best, d)
        return tiles, depth, way, other

    # ------------------------------------------------------------ painting

    def paint(self) -> None:
        """All tissues but the bowels, from the skin inwards."""
        self.inner = self.spread(self.mouse.cavity.depth(*np.moveaxis(self.corners, -1, 0)))
        # Muscles run along the body; the fat between them is thinner than a sample, so it only brightens.
        sheets = [self.mouse.field(self.corners * np.array([1, 1, 0.3], np.float32), n, 5 + n) for n in (1, 2)]
        near = np.minimum(*(np.abs(self.spread(sheet)) for sheet in sheets))
        fascia = 1 + np.float32(1.8) * np.exp(-((near / np.float32(0.055)) ** 2)) * (self.inner < -0.6)
        self.shade = {"muscle": fascia, "skin": np.clip(self.depth / 0.12, 0, 1), "csf": np.ones_like(self.depth)}
        self.integument()
        self.chest_and_belly()
        self.head()
        self.ribs()
        for centre, half, rough, layers in self.mouse.blobs:
            tiles, depth = self.blob(centre, half, rough)
            self.layers(tiles, self.covered(tiles, depth, layers), layers)
            if layers[-1][1] in ("gland", "brown_fat"):
                self.put(tiles, (np.abs(self.field(12, 1.7, tiles)) < 0.03, "fat"), only=layers[-1][1])
        self.brain()
        for curve, rough, layers in self.mouse.tubes:
            tiles, depth, _, _ = self.tube(curve)
            if rough:
                depth = depth + np.float32(rough) * self.fine(5, tiles)
            self.layers(tiles, self.covered(tiles, depth, layers), layers)
        self.spine()

    def covered(self, tiles: Array, depth: Array, layers: Layers) -> Array:
        """Depth in an organ, cut where it would come through the skin; the eyes alone lie in it."""
        return (
            depth
            if layers[0][1] in ("skin", "vitreous")
            else np.minimum(depth, 2 * (self.depth[tiles] - np.float32(0.45)))
        )

    def integument(self) -> None:
        """Skin, fat, the thin muscle of the skin, and muscles with fat between them."""
        y, z, depth = self.y, self.z, self.depth
        flank = np.exp(-(((z + 27) / 8) ** 2)) * np.clip((2 - y) / 8, 0, 1)
        nape = np.exp(-(((z - 9) / 6) ** 2)) * np.clip((y - 1) / 6, 0, 1)
        thick = self.mouse.fatness * (0.22 + 0.9 * flank + 0.8 * nape + 0.16 * self.field(0, 6)) * (z < 24)
        fat = np.float32(0.32) + np.maximum(thick, 0.06) + 0.04 * self.fine(1)
        streaks = self.mouse.noise[self.grain] > 2.6
        everywhere = slice(None)
        self.put(
            everywhere,  # type: ignore[arg-type]
            (depth > 0, "skin"),
            (depth > 0.32, "fat"),
            ((depth > fat - 0.5 * thick) & (depth < fat - 0.5 * thick + 0.12) & (thick > 0.3), "muscle"),
            ((depth > fat) & ~(streaks & (self.inner < -0.6)), "muscle"),
        )

    def chest_and_belly(self) -> None:
        """Lungs, diaphragm, heart, liver, stomach, spleen, kidneys and what lies between them."""
        tiles = np.flatnonzero(self.inner.max(axis=1) > 0)
        if not len(tiles):
            return
        (x, y, z), inner = self.points(tiles), self.inner[tiles]
        dome = 0.8 - 0.09 * (x**2 + (y + 1.5) ** 2) + 0.5 * self.field(3, 9, tiles)
        below = (dome - z) / np.sqrt(1 + (0.18 * x) ** 2 + (0.18 * (y + 1.5)) ** 2)
        edge = z + 9 + 4 / (1 + np.exp(x / 2)) + 1.6 * self.field(4, 8, tiles)  # lower on the right
        liver = (inner > 0.05) & (below > 0.1) & (edge > 0)
        fissure = np.abs(self.field(5, 15, tiles)) < 0.022
        vessels = self.fine(6, tiles) ** 2 + self.fine(7, tiles) ** 2
        self.put(
            tiles,
            ((inner > 0) & (below > 0), "mesentery"),
            (liver, "gut_wall"),
            (liver & ~fissure, "liver"),
            (liver & ~fissure & (vessels < 0.02), "vessel"),
            ((inner > 0.08) & (below < -0.25), "lung"),
            ((inner > 0.08) & (below < -0.25) & (vessels < 0.05), "blood"),
            ((inner > 0) & (np.abs(below + 0.05) < 0.2), "muscle"),
        )
        self.heart()
        for tissue, host, curve in self.mouse.trees:
            near, depth, _, _ = self.tube(curve, 0.05)
            if len(near):
                self.layers(near, depth, [(0, tissue)], only=host)
        organs: list[tuple[tuple[float, ...], tuple[float, ...], float, Layers]] = [
            ((0.6, -5.2, -6.5), (1.0, 1.3, 1.6), 0, [(-0.1, "gut_wall"), (0, "bile")]),
            ((1.2, -2.2, -13), (4.5, 0.9, 1.6), 0.12, [(0, "gland")]),
            ((-2.9, 4.0, -11.2), (0.9, 0.9, 1.2), 0, [(-0.15, "mesentery"), (0, "gland"), (0.35, "kidney_cortex")]),
            ((3.1, 3.8, -12.6), (0.9, 0.9, 1.2), 0, [(-0.15, "mesentery"), (0, "gland"), (0.35, "kidney_cortex")]),
        ]
        for centre, half, rough, layers in organs:
            near, depth = self.blob(np.array(centre), np.array(half), rough)
            self.layers(near, depth, layers)
        self.stomach()
        for side, level in ((-1, -15.2), (1, -17.6)):
            self.kidney(side, level)
        spleen = [(7.4, 3.6, -8.5, 1.0), (9.3, 1.0, -12, 1.5), (9.4, -2, -16, 1.5), (8.4, -4.6, -19.5, 0.9)]
        near, depth, _, _ = self.tube(pieces(spline(spleen)))
        self.layers(near, depth, [(-0.1, "mesentery"), (0, "spleen")])
        self.put(near, ((self.fine(6, near) ** 2 + self.fine(8, near) ** 2 < 0.015) & (depth > 0.2), "vessel"))

    def heart(self) -> None:
        """Two ventricles around a tilted axis, two atria, blood in all."""
        c = np.array([0.7, -2.2, 4.4], np.float32)
        tiles = self.near(c - 5.5, c + 5.5)
        if not len(tiles):
            return
        axis = np.array([0.42, -0.34, -0.84], np.float32)
        right = np.cross(axis, np.array([0.3, -0.9, 0.3])).astype(np.float32)
        right /= np.linalg.norm(right)
        frame = np.stack([axis, right, np.cross(axis, right)]).astype(np.float32)
        p = [v - c[n] for n, v in enumerate(self.points(tiles))]
        s, r, t = (f[0] * p[0] + f[1] * p[1] + f[2] * p[2] for f in frame)
        rough = 0.1 * self.fine(3, tiles)

        def ball(centre: tuple[float, float], half: tuple[float, float]) -> Array:
            q = ((s - centre[0]) / half[0]) ** 2 + (((r - centre[1]) ** 2 + t**2) / half[1] ** 2)
            return np.asarray((1 - np.sqrt(q)) * half[1])

        left, chamber = ball((0.2, 0.7), (4.2, 2.6)), ball((-0.3, 0.7), (3.0, 1.25)) + rough
        other = ball((-0.5, -0.9), (3.5, 2.6))
        atria = [(ball((-3.7, side), (1.5, 1.7)) + 2 * rough) for side in (1.2, -1.4)]
        both = np.maximum(left, other)
        self.put(
            tiles,
            (np.maximum(both, np.maximum(*atria)) > -0.15, "mesentery"),
            (np.maximum(*atria) > 0, "myocardium"),
            (np.maximum(*atria) > 0.25, "blood"),
            (both > 0, "myocardium"),
            ((other > 0.5 + rough) & (left < 0), "blood"),
            (chamber > 0, "blood"),
        )

    def stomach(self) -> None:
        """A bent bag with a thick wall and food in it."""
        curve = spline([(3, 1.2, -6.5, 1.5), (6.2, 0.8, -8.5, 2.9), (5.6, -2.6, -11, 2.8), (1.5, -3.6, -12, 1.4)])
        tiles, depth, _, _ = self.tube(pieces(curve))
        if len(tiles):
            bumpy = depth - 0.12 * np.abs(self.fine(3, tiles))
            food = self.field(6, 2.5, tiles) + self.fine(9, tiles)
            gas = (self.points(tiles)[1] > 2.2 + 0.2 * self.field(7, 3, tiles)) & (bumpy > 0.6)
            self.layers(tiles, bumpy, [(-0.12, "mesentery"), (0, "muscle"), (0.14, "gut_wall"), (0.5, "chyme_2")])
            self.put(tiles, (food > 0.9, "chyme_1"), (food < -1, "chyme_3"), (gas, "air"), only="chyme_2")

    def kidney(self, side: int, level: float) -> None:
        """Cortex, two zones of medulla, a papilla towards the hilum, and fat around."""
        c = np.array([side * 5.4, 3.1, level], np.float32)
        tiles = self.near(c - np.array([3.6, 3.8, 5.6]), c + np.array([3.6, 3.8, 5.6]))
        if not len(tiles):
            return
        x, y, z = (v - c[n] for n, v in enumerate(self.points(tiles)))
        x = x * side  # now outwards from the spine
        bent = x + 0.07 * z**2 - 0.35
        hilum = 0.9 * np.exp(-((z / 1.1) ** 2) - ((x + 2.4) / 1.2) ** 2 - (y / 1.3) ** 2)
        depth = (1 - np.sqrt((bent / 2.6) ** 2 + (y / 2.8) ** 2 + (z / 4.7) ** 2)) * 2.6 - hilum
        inwards = depth + 0.08 * self.fine(3, tiles)
        papilla = np.sqrt(((bent + 1.0) / 1.5) ** 2 + (y / 0.75) ** 2 + (z / 1.4) ** 2)
        pelvis = (papilla > 1) & (papilla < 1.12) & (bent < -0.5)
        self.layers(tiles, depth, [(-0.7, "mesentery"), (-0.06, "gut_wall"), (0, "kidney_cortex")])
        self.put(
            tiles,
            (inwards > 0.95, "outer_medulla"),
            (inwards > 1.55, "inner_medulla"),
            ((np.abs(inwards - 0.95) < 0.05) & (self.fine(4, tiles) > 0.9), "vessel"),  # arcuate vessels
            ((papilla < 1) & (inwards > 0.2), "inner_medulla"),
            (pelvis & (inwards > 0.2), "csf"),
            ((hilum > 0.45) & (depth > -0.7) & (depth < 0.3), "mesentery"),
        )

    def ribs(self) -> None:
        """Thirteen pairs of ribs that slope down to the side and back up to the breastbone."""
        tiles = np.flatnonzero(
            (self.inner.max(axis=1) > -1)
            & (self.inner.min(axis=1) < 0)
            & (self.low[:, 2] > -16)
            & (self.high[:, 2] < 14)
        )
        if not len(tiles):
            return
        (x, y, z), inner = self.points(tiles), self.inner[tiles]
        angle = np.arctan2(np.abs(x), y + 0.5)
        slope = 6 * np.sin(np.minimum(angle, 2.6) * 0.75) - 5.5 * np.clip(angle - 2.2, 0, 1)
        number = self.mouse.vertebra.at(z + slope)[0] - 7
        rib = np.floor(number).astype(np.int32)
        last = np.concatenate([[2.9] * 7, [2.5, 2.4, 2.3, 1.9, 1.6, 1.4]]).astype(np.float32)
        there = (rib >= 0) & (rib < 13) & (angle < last[np.clip(rib, 0, 12)]) & (angle > 0.35)
        q = ((number - rib - 0.5) * 1.72 / 0.36) ** 2 + ((inner + 0.5) / 0.34) ** 2
        wall = (inner < -0.02) & (inner > -0.95) & (rib >= 0) & (rib < 13)
        sternum = (np.abs(x) < 0.75) & (angle > 2.7) & (np.abs(inner + 0.6) < 0.4) & (z > -3)
        self.put(
            tiles,
            (wall & (np.abs(inner + 0.5) < 0.36), "muscle"),
            (there & (q < 1) & (angle < 2.1), "bone"),
            (there & (q < 0.28) & (angle < 2.1), "marrow"),
            (there & (q < 1) & (angle >= 2.1), "cartilage"),
            (sternum, "bone"),
            (sternum & (np.abs(x) < 0.5) & (np.abs(inner + 0.6) < 0.2) & (np.abs(number - rib - 0.5) < 0.4), "marrow"),
        )
        tiles = self.near((-10, -1, 4), (10, 8, 16))
        x, y, z = self.points(tiles)
        blade = (((y - 3.6) / 3.3) ** 2 + ((z - 9.4 - 0.3 * y) / 3.6) ** 2 < 1) & (np.abs(x) > 2.2)
        self.put(tiles, (blade & (np.abs(self.depth[tiles] - 2.6 + 0.06 * (y - 3) ** 2) < 0.16), "bone"))

    def spine(self) -> None:
        """Vertebrae with discs, arches and processes, the cord in its fluid, and the muscles beside it."""
        level = self.mouse.spine.at(self.corners[..., 2])[0]
        rise = self.corners[..., 1] - level
        tiles = np.flatnonzero(
            (np.abs(self.corners[..., 0]).min(axis=1) < 3.6)
            & (rise.max(axis=1) > -2.2) & (rise.min(axis=1) < 4.6) & (self.corners[..., 2].min(axis=1) < 18.4)
        )  # fmt: skip
        if not len(tiles):
            return
        x, y, z = self.points(tiles)
        level, half = self.mouse.spine.at(z)
        x, y = np.abs(x), y - level
        canal_y = half + np.float32(0.95)
        number = self.mouse.vertebra.at(z)[0]
        disc = np.abs(number - np.rint(number))  # 0 in the middle of a disc
        tilted = self.mouse.vertebra.at(z + 0.7 * np.maximum(y - canal_y, 0))[0] % 1
        waist = half * (0.9 + 0.25 * (0.5 - disc))
        body = (1 - np.sqrt((x / waist) ** 2 + (y / (0.8 * waist)) ** 2)) * 0.8 * half
        canal = np.sqrt(x**2 + (y - canal_y) ** 2)
        cord = np.sqrt((x / 0.92) ** 2 + ((y - canal_y) / 0.7) ** 2)
        grey = (np.abs(x - 0.28) < 0.13) & (np.abs(y - canal_y) < 0.42) | (x < 0.35) & (np.abs(y - canal_y) < 0.1)
        arch = (canal < 1.38) & (canal > 1.08) & (y > canal_y - 0.7) & (np.abs(tilted - 0.5) < 0.32)
        spinous = (x < 0.2) & (y > canal_y + 1) & (y < canal_y + 2.5) & (np.abs(tilted - 0.5) < 0.24)
        loin = z < -11
        wing = ((number % 1 - 0.4) / 0.16) ** 2 + ((y + 0.3 * loin - 0.9 * ~loin) / 0.22) ** 2 < 1
        wing &= (x > 0.8 * half) & (x < 1.8 + 0.9 * loin)
        joint = (np.abs(x - 1.25) < 0.4) & (np.abs(y - canal_y - 0.45) < 0.45) & (disc < 0.25)
        grown = np.clip((-7 - z) / 12, 0.02, 1.2)
        psoas = np.sqrt(((x - 1 - 0.9 * grown) / (1.1 * grown)) ** 2 + ((y + 1.1 * grown) / (0.9 * grown)) ** 2)
        self.put(
            tiles,
            (psoas < 1.08, "mesentery"),
            (psoas < 1, "muscle"),
            (canal < 1.25, "fat"),
            ((body > -0.35) & (y < 0.4), "muscle"),
            (spinous | wing | joint | arch, "bone"),
            ((x < 0.08) & spinous, "marrow"),
            (joint & (disc < 0.04), "cartilage"),
            (body > 0, "bone"),
            ((body > 0.17) & (disc > 0.13), "marrow"),
            ((body > 0) & (disc < 0.075), "cartilage"),
            ((body > 0.3) & (disc < 0.06), "nucleus"),
            (canal < 1.02, "csf"),
            (cord < 1, "white_matter"),
            ((cord < 0.85) & grey, "grey_matter"),
            ((canal < 0.06), "csf"),
        )

    def head(self) -> None:
        """Nose with its folds, palate and teeth, chewing muscles."""
        tiles = np.flatnonzero(self.high[:, 2] > 22)
        if not len(tiles):
            return
        (x, y, z), depth = self.points(tiles), self.depth[tiles]
        x = np.abs(x)
        taper = np.clip((46 - z) / 11, 0.2, 1)
        q = np.sqrt((x / (2.3 * taper)) ** 2 + ((y - 0.6) / (2.0 * taper)) ** 2)
        nose = (q < 1) & (z > 33.6) & (z < 45.5)
        own = self.corners[tiles] * np.array([0, 1, 1], np.float32) + np.abs(self.corners[tiles]) * np.array(
            [1, 0, 0], np.float32
        )
        folds = self.spread(self.mouse.field(own, 8, 1.7))
        palate = (np.abs(y + 1.75) < 0.14) & (x < 2) & (z > 26) & (z < 42)
        molar = ((x - 2) / 0.55) ** 2 + ((y + 2.5) / 0.8) ** 2 + ((z % 1.3 - 0.65) / 0.62) ** 2 < 1
        molar &= (z > 29.9) & (z < 33.8)
        throat = (x < 0.9) & (np.abs(y + 1.35) < 0.22) & (z < 33) & (z > 21)
        self.put(
            tiles,
            ((q < 1.1) & (z > 33.4) & (depth > 0.5), "bone"),
            (nose, "mucosa"),
            (nose & (np.abs(folds) > 0.42) & (q < 0.9), "air"),
            (nose & (x < 0.14), "mucosa"),
            (nose & (x < 0.05), "cartilage"),
            (palate & (depth > 0.5), "bone"),
            (molar, "bone"),
            (throat, "mucosa"),
            (throat & (np.abs(y + 1.35) < 0.1), "air"),
        )

    def brain(self) -> None:
        """Skull, fluid, cortex, hippocampus, ventricles, deep nuclei, cerebellum with its folia, brainstem."""
        rough = self.mouse.brain.depth(*np.moveaxis(self.corners, -1, 0))
        tiles = np.flatnonzero((rough.max(axis=1) > -1) & (self.high[:, 2] > 18.6))
        if not len(tiles):
            return
        x, y, z = self.points(tiles)
        depth = self.spread(rough[tiles])
        mid = np.abs(x)
        base = np.clip((1.2 - y) / 2, 0, 1) * (
            1 + 0.3 * self.field(13, 4, tiles)
        )  # the base of the skull is thick, its roof is thin
        below = z - 24.6 - 0.35 * (y - 2.5) + 0.1 * mid**2 + 0.12 * self.field(14, 3, tiles)  # behind the cerebrum
        cerebrum = (depth > 0) & (below > 0.07) & (z < 33.5)
        bulb = (depth > 0) & (z >= 33.5)
        back = (depth > 0) & (below < -0.07)
        d = depth + 0.05 * self.fine(3, tiles)
        cleft = (mid < 0.06 + 0.05 * (y > 4.6)) & (y > 2.9)
        dorsal = y > 0.4 + 0.35 * mid
        zz = z + 0.4 * self.field(15, 2.5, tiles)  # structures do not end in planes
        hippo = cerebrum & (d > 1.32) & (d < 2.6) & (zz < 28.6) & (mid > 0.45)
        hippo &= y > 1.7 - 1.5 * np.clip(mid - 2.4, 0, 1.4) - 0.15 * (28.6 - zz)
        line = np.minimum(np.abs(d - 1.78), np.abs(d - 2.3))
        horn = np.maximum(1 - ((zz - 29.7) / 1.5) ** 2 - ((mid - 1.2) / 0.9) ** 2, 0)
        ventricle = (np.abs(d - 1.5) < 0.22 * horn) & (y > 2.2)
        horn = np.maximum(1 - ((zz - 26.8) / 1.8) ** 2 - ((y - 2) / 1.6) ** 2, 0)
        ventricle |= (np.abs(d - 1.4) < 0.1 * np.sqrt(horn)) & (mid > 2)
        third = (mid < 0.07) & (y > -0.7) & (y < 0.8) & (z > 25.4) & (z < 29.6)
        third |= (np.hypot(mid, y - 3.1) < 0.16) & (z > 25) & (z < 29.6)
        striatum = cerebrum & (d > 1.5) & (zz > 28.4) & (zz < 32) & (mid > 1.0) & (mid < 3.6) & (y > 0.2)
        bundles = striatum & (self.fine(10, tiles) > 0.85)
        thalamus = cerebrum & (np.sqrt((mid / 2.5) ** 2 + ((y - 1.3) / 1.7) ** 2 + ((z - 26.6) / 2.4) ** 2) < 1)
        fimbria = cerebrum & (np.abs(d - 2.68) < 0.12) & (zz < 28.6) & (mid > 1.2) & (y > 1.4 - 0.4 * mid)
        commissure = cerebrum & (np.hypot(y - 0.9 + 0.12 * mid, z - 30.3) < 0.2) & (mid < 2.6)
        self.put(
            tiles,
            (depth > -0.42 - 0.6 * base, "bone"),
            ((depth > -0.3 - 0.6 * base) & (depth < -0.3) & (base > 0.2), "marrow"),
            (depth > -0.16, "csf"),
            (cerebrum, "grey_matter"),
            (cerebrum & (d > 1.1) & (d < 1.32) & dorsal, "white_matter"),
            (cerebrum & (d > 2.6) & (y < 0.2), "deep_grey"),
            (hippo, "grey_matter"),
            (hippo & (line < 0.07), "white_matter"),
            (striatum, "deep_grey"),
            (bundles, "white_matter"),
            (thalamus, "deep_grey"),
            (fimbria | commissure, "white_matter"),
            (cerebrum & (ventricle | third), "csf"),
            ((depth > -0.1) & cleft & (z > 24) & (z < 36), "csf"),
            ((depth > -0.25) & (np.hypot(mid, y - 5.35) < 0.28) & (z > 24.5) & (z < 33), "vessel"),
            (bulb, "grey_matter"),
            (bulb & (np.abs(depth - 0.45) < 0.08), "white_matter"),
            (bulb & (depth > 0.85), "white_matter"),
            (bulb & (mid < 0.12), "csf"),
        )
        self.shade["csf"][tiles] = np.clip((depth + 0.16) / 0.12, 0, 1)  # its sheet under the skull has a soft edge
        angle = np.arctan2(y - 1.6, z - 22.6)
        radius = np.hypot(y - 1.6, z - 22.6) + 0.2 * mid
        small = back & (radius > 0.9) & (y > 1.75)
        leaf = np.sin(9 * angle + 1.2 * self.field(9, 3, tiles)) + 0.25 * np.sin(27 * angle)
        fourth = (np.abs(y - 1.85 + 0.15 * mid) < 0.2 * np.clip(1.3 - mid, 0, 1)) & (z > 19.5) & (z < 23.4)
        nuclei = self.field(10, 1.8, tiles) > 0.5
        self.put(
            tiles,
            (back, "white_matter"),
            (back & nuclei, "deep_grey"),
            (back & (np.hypot(mid, y - 2.0) < 0.24) & (z > 22), "csf"),
            (small, "grey_matter"),
            (small & (leaf > 0.93) & (depth > 0.35) | small & (radius < 1.5) & (leaf > 0), "white_matter"),
            (small & (leaf < -0.98) & (depth < 1.1), "csf"),
            (fourth & back, "csf"),
        )

    def bowels(self, moved: bool) -> None:
        """Bowels and bladder, which differ between the two scans."""
        m = self.mouse
        for part in m.bowels:
            tiles, depth, way, other = self.tube(part["moved"] if moved else part["axis"], wide=True)
            if not len(tiles):
                continue
            way = way + part["shift"] * moved
            depth = np.minimum(depth, (depth - other) * 0.8)  # where two loops touch, each keeps its wall
            wall = 0.24 + 0.1 * np.abs(self.fine(3, tiles))
            self.layers(tiles, depth, [(0, "gut_wall")], only="mesentery")
            lumen = depth > wall
            if part["name"] == "colon":
                pellet = np.cos(way * (2 * np.pi / 4.8)) + 0.2 * self.fine(12, tiles) > -0.4
                self.put(tiles, (lumen, "mucosa"), (lumen & pellet & (depth > 0.34), "feces"), only="gut_wall")
                continue
            bit = self.fine(13, tiles) + self.field(11, 2.2, tiles)
            kind = part["content"][((way + 1.2 * bit) / 8).astype(np.int32) % 200]
            for k in range(4):
                self.put(tiles, (lumen & (kind == k), f"chyme_{k}"), only="gut_wall")
            grain = lumen & (bit > 1.4)
            gas = lumen & (bit < -2.1) & (depth > 0.5)
            self.put(tiles, (grain, "chyme_3"), only="chyme_1")
            self.put(tiles, (grain, "chyme_1"), only="chyme_2")
            self.put(tiles, (gas, "air"), only="chyme_2")
        tiles, depth = self.blob(np.array([0.3, -4.6, -33.5]), np.array([2.6, 2.3, 2.8]) * (1.07 if moved else 1))
        self.layers(tiles, depth, [(-0.25, "gut_wall"), (0, "bladder")])

    def density(self) -> Array:
        """Density relative to that of the tissue: its texture, along the fibres in muscle."""
        spread = np.array([values[3] for values in TISSUES.values()], np.float32)
        texture = self.fine(14)
        fibres = np.isin(self.label, [ID["muscle"], ID["tongue"], ID["myocardium"]])
        texture[fibres] = self.mouse.noise[self.grain[fibres]]
        density = np.maximum(1 + spread[self.label] * texture, np.float32(0.02))
        for tissue, share in self.shade.items():
            density = np.where(self.label == ID[tissue], density * share, density)
        return np.asarray(density, np.float32)
