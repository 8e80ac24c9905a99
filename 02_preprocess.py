"""Pairs ready for training: drop slices, crop, align, upsample, one gain a pair, normalise, split by animal.

Reads data/curated.zarr. Writes data/pairs.zarr. Report, chapter 3 and Table 2.

Usage:
    python 02_preprocess.py --preset demo
    python 02_preprocess.py --align none --upsample nearest      # the report's way
    python 02_preprocess.py --test 7 16 22 --validation 6 10     # animals by number or id
    python 02_preprocess.py --split-by slice                     # cohorts of one or two animals
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import fft, ndimage
from scipy.special import i0e, i1e

from common import (
    SPLITS,
    Array,
    InputError,
    Progress,
    Store,
    body_mask,
    crop_box,
    fingerprint,
    finish_store,
    grid_relation,
    main,
    normalisation,
    open_curated,
    run_parallel,
    scan_attributes,
    upsample,
    write_scan,
)

# Report, Table 2, for mice 1 to 24; the others train.
TABLE_2 = {6: "validation", 10: "validation", 7: "test", 16: "test", 22: "test", 24: "unused"}


@dataclass(frozen=True)
class Config:
    """Settings of the preprocessing; the defaults are the report's but for `align`."""

    root: Path = Path(".")
    """Folder that holds data/."""
    align: Literal["none", "centres", "measured"] = "centres"
    """Where low pixels lie on the high grid: plain zoom (report 3.3), as the affines say, or plus measured drift."""
    upsample: Literal["nearest", "linear", "cubic", "fourier"] = "nearest"
    """How the low image comes to the high matrix (report 3.3: nearest)."""
    normalise: Literal["mean", "zscore", "eq15"] = "mean"
    """Factors of each low slice, used for the high one too: mean (report 3.4), zscore, or Eq. 15."""
    margin: int = 8
    """Air kept around the body, pixels of the high grid."""
    split_by: Literal["animal", "slice"] = "animal"
    """What is held out: animals, or, in a cohort of one or two, blocks of slices (which tests no generalisation)."""
    test: tuple[str, ...] = ()
    """Animals to test on, ids or their numbers; none: the report's Table 2 for mice 1 to 24, else about 3 of 23."""
    validation: tuple[str, ...] = ()
    """Animals to validate on; none: Table 2, else about 2 of 23."""
    seed: int = 0
    """Seed of the split where nobody names it."""
    workers: int = 0
    """Processes; 0 takes every core."""


PRESETS = {
    "paper": Config(),
    "demo": Config(align="measured", upsample="fourier"),
    "smoke": Config(align="measured", upsample="fourier"),
}


# ---------------------------------------------------------------- geometry


def measured_shift(low: Array, high: Array, ratio: Any) -> Array:
    """Place (dy, dx) of the high images relative to the low ones, in pixels: peak of their cross-correlation.

    Both stacks (slice, y, x) lie on the high grid; only frequencies that the low scan acquired count. The whole scan
    has one shift, refined from the best whole pixel by Newton's method on the trigonometric correlation.
    """
    ny, nx = low.shape[1:]
    ky, kx = np.meshgrid(fft.fftfreq(ny), fft.fftfreq(nx), indexing="ij")
    inside = (np.abs(ky) < 0.5 / ratio[0]) & (np.abs(kx) < 0.5 / ratio[1])
    inside[0, 0] = False
    cross = np.zeros((ny, nx), np.complex128)
    for one, other in zip(low, high, strict=True):
        cross += np.conj(fft.fft2(one)) * fft.fft2(other)
    cross *= inside
    if not cross.any():
        return np.zeros(2)
    peak = np.unravel_index(np.argmax(fft.ifft2(cross).real), (ny, nx))
    shift = np.array([fft.fftfreq(n, 1 / n)[p] for n, p in zip((ny, nx), peak, strict=True)])
    k = 2 * np.pi * np.stack([ky[inside], kx[inside]])
    for _ in range(8):
        term = cross[inside] * np.exp(1j * (shift @ k))
        gradient = -(k * term.imag).sum(axis=1)
        hessian = -(k[:, None] * k[None] * term.real).sum(axis=2)
        shift = shift - np.clip(np.linalg.solve(hessian, gradient), -0.5, 0.5)
    return shift


# ---------------------------------------------------------------- intensity


def signal(stack: Array, air: Array, width: Any) -> Array:
    """Local mean signal of magnitude images without the Rician floor; `air` marks pixels of noise alone."""
    local = ndimage.gaussian_filter(stack, (0, *width))
    sigma = np.median(local[air]) / np.sqrt(np.pi / 2) if air.any() else 0.0  # mean of a Rayleigh
    if sigma == 0:
        return np.asarray(local)
    level = np.linspace(0, 12, 600)
    mean = np.sqrt(np.pi / 2) * ((1 + level**2 / 2) * i0e(level**2 / 4) + level**2 / 2 * i1e(level**2 / 4))  # Rician
    exact, large = np.interp(local / sigma, mean, level), np.sqrt(np.maximum((local / sigma) ** 2 - 1, 0))
    return np.asarray(sigma * np.where(exact < 11, exact, large))


def pair_gain(low: Array, high: Array, mask: Array, ratio: Any) -> float:
    """Intensity high / low in the body: median over slices of the ratio of their local mean signal."""
    plane, width = np.ones((1, 3, 3), bool), [float(r) for r in ratio]
    air = ~ndimage.binary_dilation(mask, plane, iterations=4)
    inner = ndimage.binary_erosion(mask, plane, iterations=3)  # the rim was chosen by the noise of the low image
    if not inner.any():
        inner = mask if mask.any() else ~mask
    sums = [(signal(stack, air, width) * inner).sum(axis=(1, 2)) for stack in (low, high)]
    area = inner.sum(axis=(1, 2))
    usable = area > 0.1 * area.max()
    return float(np.median(sums[1][usable] / sums[0][usable]))


# ---------------------------------------------------------------- splits


def counts(n: int) -> tuple[int, int]:
    """Test and validation animals of n, in the report's proportions (3 and 2 of 23)."""
    return max(round(3 * n / 23), min(3, n // 4), 1), max(round(2 * n / 23), min(2, n // 5), 1)


def number_of(subject: str) -> int | None:
    """Trailing number of an id: 7 for mouse07."""
    found = re.search(r"(\d+)$", subject)
    return int(found[1]) if found else None


def find_subjects(names: tuple[str, ...], subjects: list[str], option: str) -> list[str]:
    """Ids that the user named in full or by their number."""
    chosen = []
    for name in names:
        number = int(name) if name.isdecimal() else -1
        hits = [s for s in subjects if s == name] or [s for s in subjects if number_of(s) == number]
        if len(hits) != 1:
            what = "unknown animal" if not hits else f"animals {', '.join(hits)} for"
            raise InputError(f"{option}: {what} {name!r} found, expected one of {', '.join(subjects)}")
        chosen += hits
    return chosen


def split_animals(subjects: list[str], test: tuple[str, ...], validation: tuple[str, ...], seed: int) -> dict[str, str]:
    """Split of each animal: as named by the user, else the report's Table 2, else drawn in its proportions."""
    subjects = sorted(subjects, key=lambda s: (number_of(s) is None, number_of(s) or 0, s))
    split: dict[str, str] = {}
    for name, chosen in (("test", test), ("validation", validation)):
        for subject in find_subjects(chosen, subjects, f"--{name}"):
            if split.setdefault(subject, name) != name:
                raise InputError(f"--test and --validation: {subject} found in both, expected each animal in one split")
    numbers = [number_of(s) for s in subjects]
    if not split and numbers == list(range(1, 25)):
        return {subject: TABLE_2.get(n, "train") for n, subject in enumerate(subjects, start=1)}
    order = np.random.default_rng(np.random.SeedSequence([seed, 2])).permutation(len(subjects))
    free = [subjects[i] for i in order if subjects[i] not in split]
    for name, named, wanted in zip(("test", "validation"), (test, validation), counts(len(subjects)), strict=True):
        if not named:
            split |= dict.fromkeys(free[:wanted], name)
            free = free[wanted:]
    if len(subjects) < 3 or not free:
        raise InputError(
            f"cohort: {len(subjects)} animals ({', '.join(subjects)}) found, {len(free)} left to train on, expected "
            "one or more each for training, validation and test; --split-by slice holds out slices instead"
        )
    return split | dict.fromkeys(free, "train")


def split_slices(kept: Array, subject: str) -> Array:
    """Split code of every slice number: three blocks in the report's proportions, one slice unused between them.

    `kept` (slice,) tells which slices any scan of the animal keeps; all its scans share the result.
    """
    present = np.flatnonzero(kept)
    n = len(present) - 2
    if n < 3:
        raise InputError(f"{subject}: {len(present)} kept slices found, expected at least 5 for --split-by slice")
    test, validation = counts(n)
    code = np.zeros(len(kept), np.uint8)
    ends = np.cumsum([n - test - validation, 1 + validation, 1 + test])
    for name, first, last in zip(("train", "validation", "test"), (0, ends[0] + 1, ends[1] + 1), ends, strict=True):
        code[present[first] : present[last - 1] + 1] = SPLITS.index(name)
    return code


def assign(
    attrs: dict[str, dict[str, Any]], keep: dict[str, Array], cfg: Config
) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """Split code of every slice of each scan, and the subjects of each split."""
    codes, animals = {}, defaultdict(list)
    for key in sorted(keep):
        if attrs[key]["region"].lower() == "lego":
            codes[key] = np.full(len(keep[key]), SPLITS.index("lego"), np.uint8)
        else:
            animals[attrs[key]["subject"]].append(key)
    split = split_animals(list(animals), cfg.test, cfg.validation, cfg.seed) if cfg.split_by == "animal" else {}
    for subject, keys in animals.items():
        length = max(len(keep[key]) for key in keys)
        if split:
            code = np.full(length, SPLITS.index(split[subject]), np.uint8)
        else:
            padded = [np.pad(keep[key], (0, length - len(keep[key]))) for key in keys]
            code = split_slices(np.any(padded, axis=0), subject)
        codes |= {key: code[: len(keep[key])] for key in keys}
    members = {name: {attrs[k]["subject"] for k in keep if i in codes[k][keep[k]]} for i, name in enumerate(SPLITS)}
    return codes, {name: sorted(found) for name, found in members.items()}


# ---------------------------------------------------------------- the stage


def load(store: Store, key: str) -> tuple[Array, Array, Array, Array, Array]:
    """Low and high images of the kept slices, the numbers of these slices, ratio and offset of the grids."""
    where, attrs = store.path / key, store.attrs(key)
    kept = np.flatnonzero(store.read(key, "keep", 1, "bool"))
    low, high = (store.read(key, name, 3, "float32") for name in ("low", "high"))
    affines = np.array(attrs["affine_low"]), np.array(attrs["affine_high"])
    try:
        ratio, offset = grid_relation(*affines, low.shape, high.shape)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for name, image in (("low", low), ("high", high)):
        for number in kept:
            mean = image[number].mean(dtype=np.float64)  # NaN or infinite if one pixel is
            if mean == 0 or not np.isfinite(mean):
                found = f"{name}, slice {number}: mean {mean} found"
                raise InputError(f"{where}: {found}, expected an image, or the decision to drop it")
    return low[kept], high[kept], kept, ratio, offset


def process(task: tuple[str, str], cfg: Config, codes: dict[str, Array]) -> dict[str, Any]:
    """Preprocess and write one scan; gives its attributes."""
    key, mark = task
    curated = open_curated(cfg.root)
    low, high, kept, ratio, offset = load(curated, key)
    attrs, factors = curated.attrs(key), (int(ratio[0]), int(ratio[1]))
    fine = upsample(low, factors, "fourier", tuple(offset))
    shift = measured_shift(fine, high, ratio) if cfg.align == "measured" else np.zeros(2)
    low = upsample(low, factors, cfg.upsample, None if cfg.align == "none" else tuple(offset - shift / ratio))
    mask = body_mask(low)
    gain = pair_gain(fine, high, mask, ratio)  # half a pixel off would count as 1 % in the fall-off of a surface coil
    y0, y1, x0, x1 = box = crop_box(mask, cfg.margin)
    full_shape = (len(codes[key]), *high.shape[1:])
    images = {"low": low[:, y0:y1, x0:x1], "high": high[:, y0:y1, x0:x1] / np.float32(gain)}
    scale, level = normalisation(images["low"], cfg.normalise)
    if not scale.all():
        empty = kept[scale == 0][0]
        raise InputError(f"{curated.path / key}: low, slice {empty}: no signal in the crop found, expected some")
    arrays = {name: (image - level[:, None, None]) / scale[:, None, None] for name, image in images.items()}
    arrays |= {"offset": level, "scale": scale, "slice_index": kept.astype(np.int32), "split": codes[key][kept]}
    attributes = {"box": box, "full_shape": full_shape, "ratio": factors, "gain": gain, "shift": shift}
    attributes |= {"affine": attrs["affine_high"], "spacing_mm": attrs["spacing_high_mm"], "fingerprint": mark}
    write_scan(cfg.root / "data" / "pairs.zarr", key, arrays, attributes)
    return attributes


def run(cfg: Config) -> dict[str, Any]:
    """Preprocess every scan whose data or settings changed, then declare the store complete."""
    curated, target = open_curated(cfg.root), cfg.root / "data" / "pairs.zarr"
    attrs = {key: curated.attrs(key) for key in curated.scans}
    keep = {key: curated.read(key, "keep", 1, "bool") for key in curated.scans}
    codes, splits = assign(attrs, keep, cfg)
    for name in ("train", "validation", "test"):
        if not splits[name]:
            raise InputError(f"{curated.path}: no kept slice in the {name} split, expected some in each")
    if cfg.split_by == "slice":
        print("warning: slices of one animal stand in several splits: no test of generalisation to other animals")

    settings = {n: v for n, v in dataclasses.asdict(cfg).items() if n not in ("root", "workers")}
    imaging = {n: settings[n] for n in ("align", "upsample", "normalise", "margin")}
    marks = {}
    for key, kept in keep.items():
        if kept.any():
            marks[key] = fingerprint(attrs[key]["fingerprint"], kept, codes[key][kept], imaging)
        else:
            print(f"{key}: left out, no slice is kept")
    stale = [(k, m) for k, m in marks.items() if (scan_attributes(target, k) or {}).get("fingerprint") != m]
    if stale:
        (target / "zarr.json").unlink(missing_ok=True)  # not complete until all scans are of these settings
    progress = Progress(len(stale), "scan")
    work = functools.partial(process, cfg=cfg, codes=codes)
    for (key, _), attributes in run_parallel(work, stale, cfg.workers):
        y0, y1, x0, x1 = attributes["box"]
        progress.step(f"{key} | {y1 - y0} x {x1 - x0} | gain {attributes['gain']:.3f}")
    summary = {"fingerprint": fingerprint(settings, marks), "settings": settings}
    summary |= {"split_by": cfg.split_by, "splits": splits}
    finish_store(target, list(marks), summary)
    text = ", ".join(f"{name} {len(found)}" for name, found in splits.items() if found)
    print(f"{target}: {len(marks)} scans, {len(stale)} of them new | subjects: {text}")
    return summary | {"scans": sorted(marks), "written": sorted(k for k, _ in stale)}


if __name__ == "__main__":
    main(run, PRESETS)
