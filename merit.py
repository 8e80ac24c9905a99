"""Figures of merit: arrays in, numbers out, and their means over animals (report 5).

Apart from 06_evaluate.py, because they know nothing of stores, and benchmarks use them on arrays of their own.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from common import Array, Lazy

skimage: Any = Lazy("skimage")

WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def compare(image: Array, reference: Array, masks: dict[str, Array], data_range: float, unit: float) -> list[Any]:
    """MSE (Eq. 12) in normalised units and relative to the range, PSNR and SSIM (Eq. 8) of a slice in every mask."""
    image, reference = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    similarity = functools.partial(skimage.metrics.structural_similarity, data_range=data_range, full=True, **WANG)
    whole, local = similarity(reference, image)
    found = []
    for name, mask in masks.items():
        mse = np.square(image - reference)[mask].mean()
        found += [("mse", name, mse / unit**2), ("mse_range", name, mse / data_range**2)]
        found += [("psnr", name, -10 * np.log10(mse / data_range**2))]
        found += [("ssim", name, whole if name == "field" else local[mask].mean())]
    return found


def noise_level(images: Array, air: Array) -> float:
    """Standard deviation of the noise of magnitude images from the median of their air (Rayleigh distribution)."""
    if air.any():
        return float(np.median(images[air]) / np.sqrt(2 * np.log(2)))
    rough = np.diff(np.diff(images, 2, axis=1), 2, axis=2)  # the animal fills the field: what is no smooth anatomy
    return float(np.median(np.abs(rough)) / 0.6745 / 6)


def bootstrap(values: Sequence[float], draws: int, seed: int) -> tuple[float, list[float]]:
    """Mean of one value per animal and its 95 % interval: bootstrap over the animals."""
    animals = np.asarray(values, np.float64)
    generator = np.random.default_rng(np.random.SeedSequence([seed, 6]))
    means = animals[generator.integers(len(animals), size=(draws, len(animals)))].mean(axis=1)
    return float(animals.mean()), np.quantile(means, (0.025, 0.975)).tolist()


def summarise(rows: Iterable[dict[str, Any]], draws: int, seed: int) -> dict[str, Any]:
    """Mean over the slices of an animal, then over animals; values that are not finite count nowhere."""
    groups: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if np.isfinite(row["value"]):
            key = row["metric"] + "_truth" * (row["reference"] == "truth")
            key += f"_{row['mask']}" * (row["mask"] in ("body", "air"))
            groups[row["model"], row["split"], key][row["subject"]].append(row["value"])
    summary: dict[str, Any] = {}
    for (model, split, key), animals in groups.items():
        mean, ci = bootstrap([float(np.mean(animals[name])) for name in sorted(animals)], draws, seed)
        summary.setdefault(model, {}).setdefault(split, {})[key] = {"mean": mean, "ci95": ci, "animals": len(animals)}
    return summary


def coverage(error: Array, half_width: Array) -> dict[str, float]:
    """Share of errors that lie in their interval, and Spearman's rank correlation of the widths with the errors."""
    rank = spearmanr(half_width, error).statistic
    return {"coverage": float((np.abs(error) <= half_width).mean()), "error_rank": float(rank)}
