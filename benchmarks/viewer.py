"""Contact sheet: time from the key press to the scan drawn, and to the frame as it is sent to a browser.

Random scan pairs of 30 slices, low 150 x 150 and high 300 x 300, are gone through with the key for the next scan: after
a pause that lets the next one be read ahead, and at once, as fast as the window can. Then the keys for the other views
and for dropping a slice, whose table has as many lines as that of the paper cohort. Ends with status 1 if a scan takes
longer than 0.5 s.

Usage:
    python benchmarks/viewer.py
    python benchmarks/viewer.py --scans 30 --width 2560 --height 1440
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from matplotlib.backend_bases import KeyEvent
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("agg")
from common import finish_store, write_scan, write_table
from contact_sheet import Review

SLICES = 30
COLUMNS = ("key", "slice", "suggestion", "reason", "decision")


def write_cohort(root: Path, scans: int) -> None:
    """Pairs of noise with a bright ellipse; every seventh slice is suggested for dropping. 144 scans in the table."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:300j, -1:1:300j]
    body = (x / 0.6) ** 2 + (y / 0.5) ** 2 < 1
    keys = [f"mouse{n:03}/HT/axial" for n in range(scans)]
    affines = {f"affine_{name}": np.diag([30 / n, 30 / n, 1, 1]) for name, n in (("low", 150), ("high", 300))}
    for key in keys:
        high = (generator.gamma(4.0, 5.0, (SLICES, 300, 300)) + 200 * body).astype(np.float32)
        arrays = {"low": high[:, ::2, ::2] + np.float32(9), "high": high, "keep": np.ones(SLICES, bool)}
        write_scan(root / "data" / "curated.zarr", key, arrays, affines | {"spacing_high_mm": [1, 0.1, 0.1]})
    finish_store(root / "data" / "curated.zarr", keys, {})
    named = keys + [f"away{n:03}/HT/axial" for n in range(144 - scans)]
    spoiled, good = ("drop", "spike in low", ""), ("keep", "", "")
    lines = [(key, i, *(good if i % 7 else spoiled)) for key in named for i in range(SLICES)]
    rows = [dict(zip(COLUMNS, line, strict=True)) for line in lines]
    write_table(root / "data" / "slices.csv", COLUMNS, rows)


def press(window: Review, key: str) -> tuple[float, float]:
    """Seconds from a key press to the figure drawn, and to the frame compressed for a browser."""
    start = time.perf_counter()
    KeyEvent("key_press_event", window.figure.canvas, key)._process()  # Agg draws at once when it is asked to
    drawn = time.perf_counter()
    with BytesIO() as png:
        Image.fromarray(np.asarray(window.figure.canvas.buffer_rgba())[..., :3]).save(
            png, format="png", compress_level=1
        )
    return drawn - start, time.perf_counter() - start


def main(scans: int = 15, width: int = 1520, height: int = 900, pause: float = 1.0) -> None:
    """Measure and print.

    Parameters
    ----------
    scans : int
        Scan pairs to go through.
    width, height : int
        Of the window, pixels.
    pause : float
        Seconds that each scan is looked at.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(Path(folder), scans)
        start = time.perf_counter()
        window = Review(Path(folder))
        window.figure.set_size_inches(width / 100, height / 100)
        window.layout()
        window.figure.canvas.draw()
        print(f"{width} x {height} pixels, {scans} scans of {SLICES} slices of 300 x 300")
        print(f"first scan after opening: {time.perf_counter() - start:.3f} s")
        worst = 0.0
        for label, key, wait in (
            ("next scan, read ahead", "n", pause),
            ("previous scan, at once", "p", 0.0),
            ("other view", "tab", 0.0),
            ("drop a slice", "d", 0.0),
        ):
            times = []
            for _ in range(scans - 1):
                time.sleep(wait)
                times.append(press(window, key))
            drawn, sent = zip(*times, strict=True)
            print(
                f"{label:24} drawn: median {statistics.median(drawn):.3f} s, maximum {max(drawn):.3f} s | "
                f"compressed: median {statistics.median(sent):.3f} s, maximum {max(sent):.3f} s"
            )
            worst = max(worst, max(sent) if "scan" in label else 0)
    sys.exit(worst > 0.5)


if __name__ == "__main__":
    tyro.cli(main)
