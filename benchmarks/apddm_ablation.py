"""What each part of the anchored path is worth, and what steps and samples buy, on test animals.

Reads the stores and runs/<unet> of --root. Every arm starts from that U-Net, has the same budget and differs from
`bank` in one thing; `none` is the U-Net trained on without a path. Arms are runs of stage 05 under runs/ablation/,
figures are kept in results/apddm_ablation.csv and results/apddm_curve.csv: the same command goes on where it stopped.
Scans are restored as they are and with 1.5 and 2 times their noise: complex noise is added and the magnitude taken,
which is exact in law. MSE in the body, in units of the low slice's mean, mean over animals. With --intervals: the share
of body pixels whose calibrated interval holds the high image, and the truth, by tissue and by signal-to-noise ratio,
and the rank correlation of the intervals' width with the error; kept in results/apddm_intervals.csv.

Usage:
    python benchmarks/apddm_ablation.py --root experiment
    python benchmarks/apddm_ablation.py --root experiment --arms none bank beta_16 --seeds 0
    python benchmarks/apddm_ablation.py --root experiment --curve apddm
    python benchmarks/apddm_ablation.py --root experiment --intervals apddm
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import anchored
import merit
import networks
from common import Array, InputError, main, normalisation, open_pairs, open_truth, read_table, write_table

training, evaluation = map(importlib.import_module, ("05_apddm", "06_evaluate"))
ARMS: dict[str, dict[str, Any]] = {
    "none": {"timesteps": "last", "beta": 0.0},
    "bank": {},
    "gaussian": {"noise": "gaussian"},
    "chain": {"draws": "chain"},
    "condition": {"condition": True},
    "last": {"timesteps": "last"},
    "end": {"end_share": 0.5},
    "range_16": {"beta": 16.0, "beta_range": True},
    "end_range_16": {"end_share": 0.5, "beta": 16.0, "beta_range": True},
    "last_range_16": {"timesteps": "last", "beta": 16.0, "beta_range": True},
    "gaussian_range_16": {"noise": "gaussian", "beta": 16.0, "beta_range": True},
    "beta_0.5": {"beta": 0.5},
    "beta_2": {"beta": 2.0},
    "beta_4": {"beta": 4.0},
    "beta_16": {"beta": 16.0},
}
FIGURES = ["mse_high", "mse_truth", "ssim_high", "detail", "air"]
ARM_COLUMNS = ["arm", "seed", "noise", *FIGURES]
CURVE_COLUMNS = [
    "run",
    "steps",
    "samples",
    "eta",
    "noisy_start",
    *FIGURES,
    "deviation",
    "seconds_per_slice",
    "ratio_to_unet",
]

INTERVAL_COLUMNS = ["run", "group", "name", "pixels", "half_width"]
INTERVAL_COLUMNS += [
    f"{what}_{reference}" for reference in ("high", "truth") for what in ("inside", "rank_correlation")
]
SNR_BINS = (0, 2, 5, 10, 20, 1000)


@dataclass(frozen=True)
class Config:
    """What is compared."""

    root: Path = Path(".")
    """Folder of data, runs and results."""
    unet: str = "unet"
    """Run whose U-Net every arm starts from."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to train and judge."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Repetitions of every arm."""
    epochs: int = 3
    """Of every arm."""
    steps_per_epoch: int = 100
    """Of every arm."""
    noise: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Noise of the low scans, in units of their own."""
    slices: int = 40
    """Test slices, spread evenly."""
    curve: str = ""
    """Run whose curve over steps and samples is measured, in place of the arms."""
    intervals: str = ""
    """Run whose intervals are judged, in place of the arms."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 20)
    """Of the curve."""
    samples: tuple[int, ...] = (1, 4, 16)
    """Of the curve."""


PRESETS = {"paper": Config(seeds=(0, 1, 2)), "smoke": Config(seeds=(0,), arms=("none", "bank"), epochs=1, slices=4)}


def noisier(low: Array, sigma: float, factor: float, seed: int) -> Array:
    """The magnitude image of a scan with `factor` times the noise: complex noise keeps its law under any phase."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, 55]))
    real, imaginary = sigma * np.sqrt(factor**2 - 1) * generator.normal(size=(2, *low.shape))
    return np.asarray(np.hypot(low + real, imaginary), np.float32)


def test_cases(cfg: Config) -> list[tuple[Any, list[int]]]:
    """Some test slices, spread evenly over all scans: their scans, cut down to them, and the slices' numbers."""
    how = evaluation.Config(root=cfg.root, splits=("test",))
    places = evaluation.slices_of(how, ["test"])
    chosen = defaultdict(list)
    for number in np.linspace(0, len(places) - 1, min(len(places), cfg.slices)).astype(int):
        chosen[places[number][0]].append(places[number][1])
    cases = []
    for key, indices in chosen.items():
        scan = evaluation.load_scan(how, key)
        references = {name: volume[indices] for name, volume in scan.references.items()}
        cut = {"low": scan.low[indices], "references": references, "body": scan.body[indices]}
        cases.append((replace(scan, **cut, unit=scan.unit[indices]), indices))
    return cases


def prepare(scan: Any, settings: dict[str, Any], factor: float) -> tuple[Array, Array, Array]:
    """Low slices as stage 02 has them, on the full field, with their scale and offset."""
    low = noisier(scan.low, scan.noise[0], factor, 0) if factor > 1 else scan.low
    fine = evaluation.on_high_grid(low, scan.attributes, settings["upsample"], settings["align"] != "none")
    y0, y1, x0, x1 = scan.attributes["box"]
    return fine, *normalisation(fine[:, y0:y1, x0:x1], settings["normalise"])


def figures(scan: Any, number: int, image: Array) -> dict[str, float]:
    """Errors in the body, detail (power at fine scales over the best reference's), what is left in air."""
    body, unit = scan.body[number], scan.unit[number]
    row: dict[str, float] = {}
    for name, volume in scan.references.items():
        found = {m: v for m, _, v in merit.compare(image, volume[number], {"body": body}, scan.data_range, unit)}
        row |= {f"mse_{name}": float(found["mse"]), f"ssim_{name}": float(found["ssim"])}
    best = scan.references.get("truth", scan.references["high"])[number]
    return row | {"detail": fine_power(image * body) / fine_power(best * body), "air": float(image[~body].std() / unit)}


def fine_power(image: Array) -> float:
    """Power of an image at spatial frequencies beyond what the low scan holds, half of the highest."""
    radius = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, image.shape), indexing="ij"))
    return float(np.square(np.abs(np.fft.fft2(image)))[(radius > 0.25) & (radius < 0.5)].sum())


def mean_over_animals(rows: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Mean over the slices of an animal, then over animals."""
    animals: dict[str, list[dict[str, float]]] = defaultdict(list)
    for animal, row in rows:
        animals[animal].append(row)
    return {
        name: float(np.mean([np.mean([row[name] for row in found]) for found in animals.values()]))
        for name in rows[0][1]
    }


def judge(cfg: Config, cases: list[tuple[Any, list[int]]], restore: Any, factor: float = 1.0) -> dict[str, float]:
    """Figures of `restore`: (low, scale, offset) -> image and deviation; seconds of processor time per slice."""
    settings, rows, seconds = open_pairs(cfg.root).attributes["settings"], [], 0.0
    for scan, indices in cases:
        given = prepare(scan, settings, factor)
        start = time.process_time()
        image, deviation = restore(*given)
        seconds += time.process_time() - start
        for number in range(len(indices)):
            row = figures(scan, number, image[number])
            row["deviation"] = float(deviation[number][scan.body[number]].mean() / scan.unit[number])
            rows.append((scan.attributes["subject"], row))
    return mean_over_animals(rows) | {"seconds_per_slice": seconds / len(rows)}


def kept(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run."""
    return list(read_table(path, columns)) if path.exists() else []


def sampled(model: anchored.APDDM, steps: int, samples: int, eta: float, noisy_start: bool) -> Any:
    """Restoring with this sampling."""
    return lambda low, scale, offset: anchored.restore_apddm(
        model, low, scale, offset, steps, samples, eta, noisy_start, networks.seeded(0)
    )


def by_unet(cfg: Config) -> Any:
    """Restoring with the U-Net."""
    net = networks.load_unet(cfg.root / "runs" / cfg.unet / "best.pt")[0]
    return lambda low, scale, offset: (networks.restore(net, low, scale, offset), np.zeros_like(low))


def run_arms(cfg: Config, path: Path) -> list[dict[str, Any]]:
    """Train and judge what is missing."""
    rows, cases = kept(path, ARM_COLUMNS), test_cases(cfg)

    def add(arm: str, seed: int, restore: Any) -> None:
        for factor in cfg.noise:
            place = {"arm": arm, "seed": seed, "noise": factor}
            if not any(all(str(row[name]) == str(value) for name, value in place.items()) for row in rows):
                found = judge(cfg, cases, restore, factor)
                rows.append(place | {name: found.get(name, "") for name in FIGURES})
                write_table(path, ARM_COLUMNS, rows)

    add("low", 0, lambda low, scale, offset: (low, np.zeros_like(low)))
    add(cfg.unet, 0, by_unet(cfg))
    for seed in cfg.seeds:
        for arm in cfg.arms:
            if arm not in ARMS:
                raise InputError(f"--arms: found {arm!r}, expected some of {', '.join(ARMS)}")
            base = replace(training.PRESETS["demo"], root=cfg.root, run=f"ablation/{arm}_{seed}", init_from=cfg.unet)
            base = replace(base, seed=seed, epochs=cfg.epochs, steps_per_epoch=cfg.steps_per_epoch, steps=1, samples=1)
            training.run(replace(base, **({"beta": 1.0} | ARMS[arm])))
            model = anchored.load_apddm(base.folder / "best.pt")[0]
            add(arm, seed, sampled(model, 1, 1, 0.0, False))
    return rows


def run_curve(cfg: Config, path: Path) -> list[dict[str, Any]]:
    """Judge steps and samples of one model: deterministic from the low image, ancestral from a noisy start."""
    rows, cases = kept(path, CURVE_COLUMNS), test_cases(cfg)
    settings = open_pairs(cfg.root).attributes["settings"]
    model = anchored.load_apddm(cfg.root / "runs" / cfg.curve / "best.pt", settings)[0]
    plain = judge(cfg, cases, by_unet(cfg))["seconds_per_slice"]
    for steps in cfg.steps:
        for samples, eta, noisy in [(1, 0.0, False), *((k, 1.0, True) for k in cfg.samples)]:
            place = {"run": cfg.curve, "steps": steps, "samples": samples, "eta": eta, "noisy_start": noisy}
            if not any(all(str(row[name]) == str(value) for name, value in place.items()) for row in rows):
                found = judge(cfg, cases, sampled(model, steps, samples, eta, noisy))
                found["ratio_to_unet"] = found["seconds_per_slice"] / plain
                rows.append(place | {name: found.get(name, "") for name in CURVE_COLUMNS[5:]})
                write_table(path, CURVE_COLUMNS, rows)
    return rows


def run_intervals(cfg: Config, path: Path) -> list[dict[str, Any]]:
    """Coverage of the intervals with the sampling that they were calibrated for."""
    settings = open_pairs(cfg.root).attributes["settings"]
    model = anchored.load_apddm(cfg.root / "runs" / cfg.intervals / "best.pt", settings)[0]
    if not model.interval:
        raise InputError(
            f"--intervals: found {cfg.intervals!r} without intervals, expected a run with 2 or more samples"
        )
    parts: dict[str, list[Array]] = defaultdict(list)
    for scan, indices in test_cases(cfg):
        mean, deviation = sampled(model, *model.sampling.values())(*prepare(scan, settings, 1.0))
        body, key = scan.body, "/".join(scan.attributes[name] for name in ("subject", "region", "plane"))
        unit = np.broadcast_to(scan.unit[:, None, None], body.shape)[body]
        parts["width"].append(model.interval["factor"] * deviation[body] / unit)
        for name, volume in scan.references.items():
            parts[name].append(abs(mean - volume)[body] / unit)
        best = scan.references.get("truth", scan.references["high"])
        parts["snr"].append(best[body] / scan.noise[0])
        if "truth" in scan.references:
            parts["tissue"].append(open_truth(cfg.root).read(key, "labels", 3, "uint8")[indices][body])
        parts["animal"].append(np.full(body.sum(), scan.attributes["subject"]))
    found = {name: np.concatenate(values) for name, values in parts.items()}
    groups = {("all", "body"): np.ones(len(found["width"]), bool)}
    groups |= {("animal", str(name)): found["animal"] == name for name in np.unique(found["animal"])}
    groups |= {("snr", f"{a:g} to {b:g}"): (found["snr"] >= a) & (found["snr"] < b) for a, b in pairwise(SNR_BINS)}
    if "tissue" in found:
        names = open_truth(cfg.root).attributes["tissues"]
        groups |= {("tissue", names[code]): found["tissue"] == code for code in np.unique(found["tissue"])}
    rows = []
    for (kind, name), chosen in groups.items():
        if chosen.sum() >= 100:
            width, row = found["width"][chosen], {"run": cfg.intervals, "group": kind, "name": name}
            row |= {"pixels": int(chosen.sum()), "half_width": float(width.mean())}
            for reference in ("high", "truth"):
                error = found.get(reference, np.full_like(found["width"], np.nan))[chosen]
                row[f"inside_{reference}"] = float((error <= width).mean())
                row[f"rank_correlation_{reference}"] = float(stats.spearmanr(width, error).statistic)
            rows.append(row)
    write_table(path, INTERVAL_COLUMNS, rows)
    return rows


def run(cfg: Config) -> dict[str, Any]:
    """Measure, and print a table."""
    results = cfg.root / "results"
    if cfg.intervals:
        rows, columns = run_intervals(cfg, results / "apddm_intervals.csv"), INTERVAL_COLUMNS
    elif cfg.curve:
        rows, columns = run_curve(cfg, results / "apddm_curve.csv"), CURVE_COLUMNS
    else:
        rows, columns = run_arms(cfg, results / "apddm_ablation.csv"), ARM_COLUMNS
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.4f}" if isinstance(value, float) else str(value)[:7] for value in row.values())
            + " |"
        )
    return {"rows": rows}


if __name__ == "__main__":
    main(run, PRESETS)
