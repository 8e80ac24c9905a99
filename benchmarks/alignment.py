"""What the half-pixel alignment is worth: the same network and budget on pairs aligned or not, with and without flips.

Reads data/curated.zarr of --root (00 and 01 run there) and data/truth.zarr where there is one. Every arm is a run of
stages 02 and 03 under alignment/ of the root; its figures are kept in alignment/results.json, so that the same command
goes on where it was stopped. Figures in the body, for test animals and LEGO, mean over animals: PSNR (its peak is the
maximum of the high scan), MSE in units of the low slice's mean, and bias, the ratio of the means. `given` is the input.

Usage:
    python benchmarks/alignment.py --root experiment --minutes 8
    python benchmarks/alignment.py --root experiment --epochs 12 --arms none-nearest centres-nearest centres-fourier
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (
    SPLITS,
    Array,
    InputError,
    Lazy,
    body_mask,
    crop_box,
    fingerprint,
    main,
    open_curated,
    open_pairs,
    open_truth,
    upsample,
    write_json,
)

networks = Lazy("networks")
FIGURES = ("psnr", "mse", "bias")


@dataclass(frozen=True)
class Config:
    """Arms and budget of the comparison."""

    root: Path = Path(".")
    """Folder whose data/ holds curated.zarr."""
    arms: tuple[str, ...] = ("none-nearest", "centres-nearest", "centres-fourier", "measured-fourier")
    """Values of --align and --upsample of stage 02, joined by a hyphen."""
    flips: tuple[bool, ...] = (True, False)
    """Random flips in training: on, off, or one arm of each."""
    training: str = "demo"
    """Preset of stage 03: network, patch, optimiser."""
    epochs: int = 4
    """Epochs of every arm; 0 = the preset's."""
    minutes: float = 0.0
    """Largest training time of every arm in minutes; 0 = none. Epochs compare arms better on a busy machine."""
    split_by: Literal["animal", "slice"] = "animal"
    """As in stage 02."""
    seed: int = 0
    """Of training and of the split."""


PRESETS = {"demo": Config(), "smoke": Config(training="smoke", epochs=0, arms=("none-nearest", "centres-fourier"))}


def prepare(cfg: Config, arm: str) -> Path:
    """Pairs of one arm under a root of its own, made from the curated scans of the experiment."""
    align, _, method = arm.partition("-")
    stage = importlib.import_module("02_preprocess")
    root = cfg.root / "alignment" / arm
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name in ("curated.zarr", "truth.zarr"):
        link, source = root / "data" / name, (cfg.root / "data" / name).resolve()
        if source.exists() and not link.exists():
            os.symlink(source, link)
    known = [f"{a}-{m}" for a in ("none", "centres", "measured") for m in ("nearest", "linear", "cubic", "fourier")]
    if arm not in known:
        raise InputError(f"--arms: found {arm!r}, expected some of {', '.join(known)}")
    stage.run(stage.Config(root=root, align=align, upsample=method, split_by=cfg.split_by, seed=cfg.seed))
    return root


def train(cfg: Config, root: Path, run: str, flips: bool) -> dict[str, Any]:
    """Train one arm, or go on with it."""
    stage = importlib.import_module("03_train_unet")
    if cfg.training not in stage.PRESETS:
        raise InputError(f"--training: found {cfg.training!r}, expected one of {', '.join(stage.PRESETS)}")
    base = stage.PRESETS[cfg.training]
    budget = {"epochs": cfg.epochs or base.epochs, "max_minutes": cfg.minutes, "patience": 10**6}
    summary: dict[str, Any] = stage.run(replace(base, root=root, run=run, flips=flips, seed=cfg.seed, **budget))
    return summary


def judge(images: dict[str, Array], references: dict[str, Array], body: Array, unit: Array) -> list[dict[str, Any]]:
    """Figures of each image (slice, y, x) in the body against each reference, mean over the slices that show a body."""
    rows = []
    shown = body.any(axis=(1, 2))
    for name, image in images.items():
        for against, reference in references.items():
            if name == against:
                continue
            square = [
                np.square(i - r)[b].mean() for i, r, b in zip(image[shown], reference[shown], body[shown], strict=True)
            ]
            mse = np.array(square) / unit[shown] ** 2
            psnr = np.mean(10 * np.log10(references["high"].max() ** 2 / np.array(square)))
            bias = image[body].mean() / reference[body].mean()
            rows.append({"image": name, "reference": against, "psnr": psnr, "mse": mse.mean(), "bias": bias})
    return rows


def evaluate(root: Path, run: str) -> list[dict[str, Any]]:
    """Figures of one trained arm: mean over slices, scans, animals.

    Body, gain and unit are the same for all arms, and all judge the low scan moved by the animal's drift: where the
    animal lies is no merit of a network, which never sees the high scan at use.
    """
    pairs, curated, stage = open_pairs(root), open_curated(root), importlib.import_module("02_preprocess")
    settings = pairs.attributes["settings"]
    net, _ = networks.load_unet(root / "runs" / run / "best.pt")
    found: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, split in itertools.product(pairs.scans, ("test", "lego")):
        chosen = pairs.read(key, "split") == SPLITS.index(split)
        if not chosen.any():
            continue
        attrs, kept = curated.attrs(key) | pairs.attrs(key), pairs.read(key, "slice_index")[chosen]
        low, high = curated.read(key, "low")[kept], curated.read(key, "high")[kept]
        ratio = np.array(attrs["ratio"])
        drift = -stage.measured_shift(upsample(low, ratio.tolist(), "fourier"), high, ratio) / ratio
        centred = upsample(low, ratio.tolist(), "fourier", tuple(drift))
        place = drift + 0.5 / ratio - 0.5 if settings["align"] == "none" else drift
        given = upsample(low, ratio.tolist(), settings["upsample"], tuple(place))
        body = body_mask(centred)
        y0, y1, x0, x1 = crop_box(body, settings["margin"])
        gain = stage.pair_gain(centred, high, body, ratio)
        references = {"high": high / gain}
        if (root / "data" / "truth.zarr").exists():
            references["truth"] = open_truth(root).read(key, "truth")[kept] / gain
        scale, offset = (pairs.read(key, name)[chosen] for name in ("scale", "offset"))
        images = {"given": given, "restored": networks.restore(net, given, scale, offset), "high": references["high"]}
        for row in judge(images, references, body, centred[:, y0:y1, x0:x1].mean(axis=(1, 2))):
            group = found.setdefault((split, row["image"], row["reference"]), {})
            group.setdefault(attrs["subject"], []).append(row)
    rows = []
    for (split, image, reference), animals in found.items():
        means = [{n: np.mean([r[n] for r in group]) for n in FIGURES} for group in animals.values()]
        figures = {n: float(np.mean([m[n] for m in means])) for n in FIGURES}
        rows.append({"split": split, "image": image, "reference": reference, "animals": len(animals)} | figures)
    return rows


def run(cfg: Config) -> dict[str, Any]:
    """Train and judge every arm that has no figures yet; print all."""
    path = cfg.root / "alignment" / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for flips, arm in itertools.product(cfg.flips, cfg.arms):
        root, kind = prepare(cfg, arm), "flips" if flips else "straight"
        pairs = open_pairs(root).attributes["fingerprint"]
        mark = fingerprint(pairs, cfg.training, cfg.epochs, cfg.minutes, cfg.seed)
        if results.get(f"{arm}-{kind}", {}).get("fingerprint") != mark:
            summary = train(cfg, root, f"{kind}-{mark}", flips)
            rows = evaluate(root, f"{kind}-{mark}")
            results[f"{arm}-{kind}"] = {"fingerprint": mark, "epochs": summary["epochs"], "rows": rows}
            write_json(path, results)
    print(f"{'arm':28}{'split':7}{'image':10}{'against':9}{'PSNR dB':>8}{'MSE':>9}{'bias':>7}")
    for name, result in results.items():
        for row in result["rows"]:
            print(
                f"{name:28}{row['split']:7}{row['image']:10}{row['reference']:9}"
                f"{row['psnr']:8.2f}{row['mse']:9.4f}{row['bias']:7.3f}"
            )
    return results


if __name__ == "__main__":
    main(run, PRESETS)
