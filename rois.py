"""Regions of interest: the boxes of data/rois.csv, their figures of merit, and boxes placed by rule.

Apart from 06_evaluate.py because the viewer, where boxes are drawn, must show the very figures that 06 writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Array, InputError, open_curated, read_table, write_table


class Box(NamedTuple):
    """A box of one slice, half-open, in pixels of the high grid; `kind` is roi or background."""

    key: str
    slice: int
    name: str
    kind: str
    y0: int
    y1: int
    x0: int
    x1: int


def pixels(volume: Array, box: Box) -> Array:
    """Pixels of a box in a volume (slice, y, x) on the high grid, float64."""
    return np.asarray(volume[box.slice, box.y0 : box.y1, box.x0 : box.x1], np.float64)


def contrast_figures(roi: Array, background: Array) -> dict[str, float]:
    """Contrast-to-noise ratio (Eq. 13), its size, and the normalised standard deviation (Eq. 14) of two boxes."""
    cnr = (roi.mean() - background.mean()) / background.std()
    return {"cnr": cnr, "cnr_abs": abs(cnr), "nstd": background.std() / background.mean()}


def place_boxes(key: str, index: int, high: Array, body: Array, side: int) -> list[Box]:
    """Background where the body is most homogeneous, ROI where it is homogeneous and most different; or neither."""
    view = np.lib.stride_tricks.sliding_window_view
    windows = view(np.asarray(high, np.float64), (side, side))[::2, ::2]
    mean, deviation = windows.mean(axis=(2, 3)), windows.std(axis=(2, 3))
    inside = view(body, (side, side))[::2, ::2].all(axis=(2, 3))
    y, x = np.unravel_index(np.where(inside, deviation / (mean + 1e-30), np.inf).argmin(), mean.shape)
    rows, columns = np.ogrid[: mean.shape[0], : mean.shape[1]]
    calm = inside & (deviation <= np.quantile(deviation[inside], 0.1) if inside.any() else False)
    calm &= (2 * np.abs(rows - y) >= side) | (2 * np.abs(columns - x) >= side)
    v, u = np.unravel_index(np.where(calm, np.abs(mean - mean[y, x]), -1).argmax(), mean.shape)
    corners = {"roi": (2 * int(v), 2 * int(u)), "background": (2 * int(y), 2 * int(x))} if calm.any() else {}
    return [Box(key, index, "auto", kind, t, t + side, s, s + side) for kind, (t, s) in corners.items()]


def rois_path(root: Path) -> Path:
    """Table of the boxes that a person drew."""
    return root / "data" / "rois.csv"


def read_boxes(root: Path) -> list[Box]:
    """Read the boxes that a person drew into data/rois.csv; none if there is no such table.

    Raises
    ------
    InputError
        If a line is no roi or background box inside of a slice of data/curated.zarr.
    """
    path, curated = rois_path(root), open_curated(root)
    boxes: list[Box] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for line, row in enumerate(read_table(path, Box._fields) if path.exists() else [], start=2):
        numbers = {
            k: int(row[k]) if re.fullmatch(r"[0-9]{1,9}", row[k]) else -1 for k in ("slice", "y0", "y1", "x0", "x1")
        }
        box = Box(key=row["key"], name=row["name"], kind=row["kind"], **numbers)
        if box.key not in shapes:
            shapes[box.key] = curated.read(box.key, "high", 3).shape if box.key in curated.scans else (0, 0, 0)
        n, height, width = shapes[box.key]
        fits = 0 <= box.slice < n and 0 <= box.y0 < box.y1 <= height and 0 <= box.x0 < box.x1 <= width
        if not fits or box.kind not in ("roi", "background"):
            wanted = f"roi or background in {n} slices of {height} x {width}" if n else f"a scan of {curated.path}"
            raise InputError(f"{path}: line {line}: {', '.join(row.values())} found, expected {wanted}")
        boxes.append(box)
    return boxes


def incomplete(boxes: Sequence[Box]) -> list[str]:
    """What slices lack of one background and at least one ROI, one text each."""
    found = []
    for key, index in dict.fromkeys((box.key, box.slice) for box in boxes):
        kinds = [box.kind for box in boxes if (box.key, box.slice) == (key, index)]
        if kinds.count("background") != 1 or len(kinds) < 2:
            found.append(f"{key}, slice {index}: {kinds} found, expected one background and its roi")
    return found


def write_boxes(root: Path, boxes: Sequence[Box]) -> None:
    """Write data/rois.csv."""
    write_table(rois_path(root), Box._fields, [box._asdict() for box in boxes])
