"""How well the suggestions of 01_curate.py find the slices that the simulated scanner spoiled.

Reads data/slices.csv and data/truth.zarr of an experiment. A slice counts as spoiled if either of its scans is.

Usage:
    python benchmarks/slice_quality.py --root .
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quality
from common import open_truth


def main(root: Path = Path("."), thresholds: tuple[float, ...] = (2.0, 2.5, 3.0, 4.0)) -> None:
    """Compare and print.

    Parameters
    ----------
    root : Path
        Folder of an experiment whose stages 00 and 01 are done.
    thresholds : tuple of float
        Robust standard deviations from which a slice is dropped.
    """
    truth = open_truth(root)
    worst: list[float] = []
    spoiled: list[tuple[int, int]] = []
    names: list[str] = []
    rows = csv.DictReader((root / "data" / "slices.csv").read_text().splitlines())
    for key, group in itertools.groupby(rows, lambda row: row["key"]):
        scan = list(group)
        scores = quality.scores({name: [float(row[name]) for row in scan] for name in quality.MEASURES})
        worst += np.max(list(scores.values()), axis=0).tolist()
        spoiled += [(int(low), int(high)) for low, high in truth.read(key, "spoiled", 2, "uint8").T]
        names += [f"{key} slice {row['slice']}" for row in scan]
    value, bad = np.array(worst), np.asarray(np.array(spoiled).max(axis=1) > 0)
    ranks, n = rankdata(value), int(bad.sum())
    area = (ranks[bad].sum() - n * (n + 1) / 2) / (n * (len(bad) - n))
    print(f"{len(bad)} slices, {n} spoiled: area under ROC {area:.4f}")
    for threshold in thresholds:
        found, flagged = (value[bad] > threshold).mean(), (value[~bad] > threshold).mean()
        print(f"threshold {threshold:g}: {found:.1%} of the spoiled found, {flagged:.1%} of the good flagged")
    for code, kind in enumerate(truth.attributes["spoiled_kinds"][1:], start=1):
        of_kind = (np.array(spoiled) == code).any(axis=1)
        lost = [f"{names[i]} ({value[i]:.1f})" for i in np.flatnonzero(of_kind & (value <= 2.5))]
        print(
            f"{kind}: {of_kind.sum() - len(lost)} of {of_kind.sum()} found at 2.5; missed: {', '.join(lost) or 'none'}"
        )


if __name__ == "__main__":
    tyro.cli(main)
