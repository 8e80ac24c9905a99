"""A simulated 7 T micro-MRI scanner: every animal is measured fast and slow, and the truth is kept.

Reads nothing. Writes ParaVision 6.0.1 studies to data/raw/<subject>/ and what the scanner knows to data/truth.zarr.
Section 2 of the report: T2-weighted RARE, a 12-minute and a 1-minute scan per region and plane, and the LEGO brick.

The object (anatomy.py) is sampled finer than any pixel, seen through a surface coil, encoded line by line with the
echo that acquires each line, truncated in k-space, and spoiled by noise, respiration, drift and accidents. In coronal
and sagittal scans the animal is longer than the field of view; saturation slabs above and below keep the phase axis
(head-feet) from folding. The same command resumes: subjects that are complete are kept, others are scanned again.

Usage:
    python 00_simulate.py --preset demo
    python 00_simulate.py --subjects 24 --workers 8 --root /scratch/mice
    python 00_simulate.py --preset smoke --seed 7
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import SeedSequence, default_rng

import anatomy
from common import (
    InputError,
    Progress,
    atomic_path,
    available_cores,
    fingerprint,
    finish_store,
    follow_parent,
    main,
    write_scan,
)
from common import scan_attributes as attributes_of
from paravision_writer import PLANES, Scan, session_of, study_mark, write_scan_folder, write_subject
from scanner import (
    BREATHS,
    add_noise,
    breathing,
    coil_maps,
    decay,
    encode,
    line_order,
    moved,
    reconstruct,
    shifted,
    spoil,
)

Array = np.ndarray[Any, Any]

SPOILED = ("none", "spike", "motion", "signal_loss", "empty")
SCANNER = 1  # to be raised when the same settings give other images


@dataclass(frozen=True)
class Config:
    """Settings of the simulated scanner; the defaults are the report's (Table 1)."""

    root: Path = Path(".")
    """Folder that holds data/."""
    subjects: int = 24
    """Number of mice."""
    regions: tuple[str, ...] = ("HT", "TA")
    """Body regions: HT head-thorax, TA thorax-abdomen."""
    planes: tuple[str, ...] = ("axial", "coronal", "sagittal")
    """Slice orientations."""
    lego: bool = True
    """Also scan the LEGO brick, axial and coronal."""
    lego_medium: str = "gel"
    """What surrounds the brick: gel (T2 50 ms) or water."""
    lego_slices: int = 16
    """Slices per scan of the brick, spread over its height and its depth."""

    fov_mm: float = 30.0
    """Field of view, both axes."""
    slices: int = 30
    """Slices per scan of a mouse."""
    slice_distance_mm: float = 0.6
    """From slice to slice, centre to centre."""
    thickness_mm: float = 0.6
    """Slice thickness."""
    matrix_high: int = 300
    """Matrix of the 12-minute scan."""
    matrix_low: int = 150
    """Matrix of the 1-minute scan."""
    averages_high: int = 5
    """Averages of the 12-minute scan."""
    averages_low: int = 1
    """Averages of the 1-minute scan."""
    tr_ms: float = 4000.0
    """Repetition time."""
    te_ms: float = 37.1
    """Effective echo time: that of the echo that acquires the centre of k-space."""
    echo_spacing_ms: float = 9.275
    """From echo to echo."""
    rare_factor: int = 8
    """Echoes per excitation."""

    noise: float = 0.024
    """Noise of the low image per channel and component, as a share of the signal of fully relaxed water in the coil."""
    coils: int = 1
    """Surface loops on the animal's back."""
    coil_radius_mm: float = 15.0
    """Radius of a loop."""
    spoiled_fraction: float = 0.12
    """Share of slices with a spike in k-space, a burst of motion or a loss of signal in one of the two scans."""
    motion: bool = True
    """Respiration, drift between the two scans, and change of bowels and bladder between them."""
    supersampling: int = 2
    """Samples of the object per pixel of the high image, along each axis."""
    sub_slices: int = 3
    """Sheets of samples through the thickness of a slice."""

    workers: int = 0
    """Processes; 0 takes every core. The result does not depend on it."""
    seed: int = 0
    """Of animals, noise and accidents."""

    @property
    def effective_echo(self) -> int:
        """Number of the echo at the effective echo time, from 1."""
        return round(self.te_ms / self.echo_spacing_ms)

    @property
    def samples(self) -> int:
        """Samples of the object along each axis of the field of view."""
        return self.supersampling * self.matrix_high


_TINY = Config(
    subjects=4, regions=("TA",), slices=4, slice_distance_mm=3.0, lego_slices=4, matrix_high=64, matrix_low=32
)
PRESETS = {
    "paper": Config(),
    "demo": Config(subjects=20, slices=8, slice_distance_mm=2.0, lego_slices=6),
    "smoke": _TINY,
}


# ---------------------------------------------------------------- sequence


def scan_time(cfg: Config, matrix: int, averages: int) -> tuple[int, Array]:
    """Duration of a scan (s) and its phase-encode lines in the order of their acquisition."""
    echo, shot = line_order(matrix, cfg.rare_factor, cfg.effective_echo)
    return round((int(shot.max()) + 1) * averages * cfg.tr_ms / 1000), np.lexsort((echo, shot)) - matrix // 2


def image_noise(cfg: Config, level: float, matrix: int, averages: int) -> float:
    """Noise of an image in units of signal density at equal bandwidth: proportional to matrix / sqrt(averages)."""
    return float(level * (matrix / cfg.matrix_low) / np.sqrt(averages / cfg.averages_low))


def draw_accident(cfg: Config, empty: bool, rng: np.random.Generator) -> tuple[str, str]:
    """What spoils a slice in the high and in the low scan."""
    hit, kind, which = rng.uniform() < cfg.spoiled_fraction, SPOILED[rng.integers(1, 4)], rng.integers(2)
    if empty:
        return "empty", "empty"
    return (kind if hit and which == 0 else "none"), (kind if hit and which == 1 else "none")


# ---------------------------------------------------------------- the object in a slice


@dataclass(frozen=True)
class Slice:
    """The object in one slice, as both scans meet it."""

    signal: list[Array]
    """Signal (y, x, echo) in the high and in the low scan, chest at rest."""
    labels: Array
    """Tissue (y, x) at the pixels of the high image."""
    breath: Array | None = None
    """Displacement (2, y, x) along y and x at full inspiration, in samples; None where nothing moves."""


def mouse_slice(cfg: Config, mouse: anatomy.Mouse, frame: Array, origin: Array) -> Slice:
    """Render a slice of a mouse; `frame` (3, 3) holds the directions of x, y and the stack, `origin` its centre."""
    grid, weights = anatomy.tile_grid(cfg.fov_mm, cfg.samples, cfg.thickness_mm, cfg.sub_slices)
    corners, sheets = (grid @ frame + origin).astype(np.float32), (cfg.sub_slices, anatomy.TILE**2)
    t1, t2, proton = mouse.table.T
    own = decay(proton * (1 - np.exp(-cfg.tr_ms / t1)), t2, cfg.echo_spacing_ms, cfg.rare_factor)
    found, states = mouse.render(corners, weights, later=cfg.motion)
    tiled = np.zeros((len(corners), anatomy.TILE**2, cfg.rare_factor), np.float32)
    signal: list[Array] = []
    for tissue, density in states:
        changed = np.flatnonzero((tissue != states[0][0]).any(axis=1)) if signal else np.arange(len(found))
        label = tissue[changed].reshape(-1, *sheets)
        weight = density[changed].reshape(-1, *sheets, 1) / np.float32(cfg.sub_slices)
        tiled[found[changed]] = sum(own[label[:, n]] * weight[:, n] for n in range(cfg.sub_slices))
        signal.append(anatomy.untile(tiled, cfg.samples))
    labels = np.zeros((len(corners), anatomy.TILE**2), np.uint8)
    labels[found] = states[0][0].reshape(-1, *sheets)[:, cfg.sub_slices // 2]
    breath = None
    if cfg.motion:
        push = mouse.breath(corners) @ frame[:2].T.astype(np.float32) * np.float32(cfg.samples / cfg.fov_mm)
        if np.abs(push).max() > 0.5:
            breath = np.stack(
                [anatomy.untile(push[..., n] @ weights[:, : anatomy.TILE**2], cfg.samples) for n in (1, 0)]
            )
    return Slice(signal, anatomy.untile(labels, cfg.samples)[:: cfg.supersampling, :: cfg.supersampling], breath)


def brick_slice(cfg: Config, brick: anatomy.Brick, frame: Array, origin: Array) -> Slice:
    """Render a slice of the phantom with 8 points per pixel of the high image along each axis."""
    points = max(8 // cfg.supersampling, 1)
    share = brick.share(frame, origin, cfg.fov_mm, cfg.samples, points, cfg.thickness_mm, cfg.sub_slices)
    t1, t2, density = anatomy.TISSUES[cfg.lego_medium][:3]
    own = decay(np.array(density * (1 - np.exp(-cfg.tr_ms / t1))), np.array(t2), cfg.echo_spacing_ms, cfg.rare_factor)
    labels = np.where(share > 0.5, anatomy.ID[cfg.lego_medium], 0).astype(np.uint8)
    return Slice(2 * [share[..., None] * own], labels[:: cfg.supersampling, :: cfg.supersampling])


# ---------------------------------------------------------------- one subject


@dataclass(frozen=True)
class Setup:
    """What holds for all scans of a subject."""

    subject: anatomy.Mouse | anatomy.Brick
    coil_centres: Array
    coil_seed: int
    noise: float
    breaths_per_s: float


def scan_pair(
    cfg: Config, setup: Setup, scans: tuple[Scan, Scan], region: str, rng: np.random.Generator
) -> tuple[list[Array], dict[str, Array], dict[str, Any]]:
    """Run the high and the low scan of one region and plane: both volumes, the truth, and its figures."""
    frame = np.array(PLANES[scans[0].plane][:3], float)
    samples, count, tr_s = cfg.samples, scans[0].slices, cfg.tr_ms / 1000
    axis = (np.arange(samples) - samples // 2) * cfg.fov_mm / samples
    lines = [line_order(scan.matrix, cfg.rare_factor, cfg.effective_echo) for scan in scans]
    sigma = [image_noise(cfg, setup.noise, scan.matrix, scan.averages) for scan in scans]
    gain, start = rng.uniform(600, 1500, 2), rng.uniform(0, 60, 2)
    way = rng.normal(size=3)
    alive = cfg.motion and isinstance(setup.subject, anatomy.Mouse)  # a phantom lies still
    drift = alive * rng.uniform(0, 0.2) * way @ frame[:2].T / np.linalg.norm(way)  # along x and y of the image
    volumes = [np.empty((count, scan.matrix, scan.matrix), np.float32) for scan in scans]
    truth = np.empty_like(volumes[0])
    labels, spoiled = np.empty(truth.shape, np.uint8), np.zeros((2, count), np.uint8)
    turn = np.argsort([*range(0, count, 2), *range(1, count, 2)])  # slices are interlaced within TR
    for s in range(count):
        origin = scans[0].centre + (s - (count - 1) / 2) * scans[0].distance_mm * frame[2]
        if isinstance(setup.subject, anatomy.Brick):
            part = brick_slice(cfg, setup.subject, frame, origin)
        else:
            part = mouse_slice(cfg, setup.subject, frame, origin + anatomy.REGIONS[region])
        points = [origin[n] + axis * frame[0, n] + axis[:, None] * frame[1, n] for n in range(3)]
        coils = coil_maps(points, setup.coil_centres, cfg.coil_radius_mm, setup.coil_seed)
        if scans[0].plane != "axial":  # the saturation slabs fade over half a millimetre
            coils = coils * np.clip((cfg.fov_mm / 2 - np.abs(axis[:, None])) / 0.5, 0, 1).astype(np.float32)
        labels[s] = part.labels
        seen = np.linalg.norm(coils, axis=0) * part.signal[1][..., cfg.effective_echo - 1]
        accident = draw_accident(cfg, bool((seen > 3 * sigma[1]).mean() < 0.02), rng)  # hardly any animal shows
        for which, (scan, (echo, shot)) in enumerate(zip(scans, lines, strict=True)):
            kspace = encode(part.signal[which], echo, coils)
            if which == 0:
                truth[s] = gain[0] * reconstruct(kspace, samples)
            if part.breath is not None:
                begin = start[which] + tr_s * turn[s] / count
                share = breathing(int(shot.max()) + 1, scan.averages, tr_s, begin, setup.breaths_per_s, rng)[shot]
                share = share.astype(np.float32)
                kspace = kspace * share[:, :1]
                for n in range(1, len(BREATHS)):
                    there = moved(part.signal[which], BREATHS[n] * part.breath)
                    kspace += share[:, n, None] * encode(there, echo, coils, share[:, n] > 0)
            if which == 1:
                kspace = shifted(kspace, drift[::-1] / cfg.fov_mm)
            spoiled[1 - which, s] = SPOILED.index(accident[which])  # row 0 is the low scan
            kspace = add_noise(spoil(kspace, accident[which], shot, cfg.fov_mm, rng), sigma[which], samples, rng)
            volumes[which][s] = gain[which] * reconstruct(kspace, samples)
    figures = {"noise_high": sigma[0] * gain[0], "noise_low": sigma[1] * gain[1], "drift_mm": drift}
    return volumes, {"truth": truth, "labels": labels, "spoiled": spoiled}, figures


def simulate_subject(cfg: Config, name: str) -> list[str]:
    """Scan one subject, write its truth scan by scan and then its study; return the keys of its scans."""
    lego = name == "lego"
    number = 0 if lego else int(name.removeprefix("mouse"))
    pairs = [(region, plane) for region in cfg.regions for plane in cfg.planes]  # in scanner order
    pairs, mark = [("lego", "axial"), ("lego", "coronal")] if lego else pairs, settings_mark(cfg)
    keys = [f"{name}/{region}/{plane}" for region, plane in pairs]
    place, store = cfg.root / "data" / "raw" / name, cfg.root / "data" / "truth.zarr"
    if study_mark(place) == mark and all((attributes_of(store, k) or {}).get("fingerprint") == mark for k in keys):
        return keys
    rng = default_rng(SeedSequence([cfg.seed, number, 0]))
    spread = (np.arange(cfg.coils) - (cfg.coils - 1) / 2) * 0.9 * cfg.coil_radius_mm
    setup = Setup(
        anatomy.Brick(rng) if lego else anatomy.Mouse(SeedSequence([cfg.seed, number, 1])),
        [0, 12, 0] + rng.normal(0, 0.7, 3) + spread[:, None] * [1, 0, 0],
        int(rng.integers(1 << 31)),
        cfg.noise * rng.uniform(0.85, 1.2),
        rng.uniform(40, 100) / 60,
    )
    date = datetime.datetime(2024, 1, 8, 9) + datetime.timedelta(days=number)
    session = session_of(name, mark, date)
    roles = (("default", cfg.matrix_high, cfg.averages_high), ("fast", cfg.matrix_low, cfg.averages_low))
    with atomic_path(place) as study:
        for index, (region, plane) in enumerate(pairs):
            own = default_rng(SeedSequence([cfg.seed, number, 2, *region.encode(), list(PLANES).index(plane)]))
            centre = np.round(own.normal(0, 0.3, 3), 3)
            slices, distance = cfg.slices, cfg.slice_distance_mm
            if lego:
                slices, distance = cfg.lego_slices, round({"axial": 12.6, "coronal": 15.0}[plane] / cfg.lego_slices, 3)
            scans: list[Scan] = []
            for role, matrix, averages in roles:
                title, turn = f"T2_TurboRARE_{plane}_{role}_{region}", 2 * index + len(scans) + 1
                time, lines = scan_time(cfg, matrix, averages)
                scans.append(Scan(turn, title, plane, matrix, averages, slices, distance, centre, date, time, lines))
                date += datetime.timedelta(seconds=time + 40)
            volumes, truth, figures = scan_pair(cfg, setup, (scans[0], scans[1]), region, own)
            for scan, volume in zip(scans, volumes, strict=True):
                write_scan_folder(cfg, study, session, scan, volume)
            write_scan(store, keys[index], truth, {"fingerprint": mark} | figures)
        write_subject(study, session, date)
    return keys


# ---------------------------------------------------------------- the run


def settings_mark(cfg: Config) -> str:
    """Digest of all settings that the scans of one subject depend on."""
    return fingerprint(SCANNER, dataclasses.replace(cfg, root=Path(), subjects=0, lego=True, workers=0))


def check(cfg: Config, names: list[str]) -> None:
    """Refuse settings that no scanner can run, and to write over studies that are not this run's."""
    high, low, last = cfg.matrix_high, cfg.matrix_low, cfg.rare_factor * cfg.echo_spacing_ms
    off = abs(cfg.te_ms - cfg.effective_echo * cfg.echo_spacing_ms) > 0.01 or not 0 < cfg.te_ms < last + 0.01
    counts = [f.name for f in dataclasses.fields(cfg) if f.type == "int" and f.name not in ("workers", "seed")]
    faults = [
        (getattr(cfg, n) < 1, f"--{n.replace('_', '-')}: found {getattr(cfg, n)}, expected 1 or more") for n in counts
    ]
    faults += [
        (off, f"--te-ms: found {cfg.te_ms}, expected a multiple of {cfg.echo_spacing_ms} up to {last:g}"),
        (
            bool(high % low or low % 2),
            f"--matrix-high: found {high}, expected a multiple of an even low matrix ({low})",
        ),
        (low < 2 * cfg.rare_factor, f"--matrix-low: found {low}, expected {2 * cfg.rare_factor} or more"),
        (cfg.lego_medium not in ("gel", "water"), f"--lego-medium: found {cfg.lego_medium}, expected gel or water"),
    ]
    for name, known in (("regions", anatomy.REGIONS), ("planes", PLANES)):
        found = getattr(cfg, name)
        wrong = not found or not set(found) <= set(known) or len(set(found)) < len(found)
        faults.append((wrong, f"--{name}: found {' '.join(found)}, expected some of {' '.join(known)}"))
    for wrong, text in faults:
        if wrong:
            raise InputError(text)
    for study in sorted((cfg.root / "data" / "raw").glob("[!.]*")):
        mark, ours = study_mark(study), study.name in names
        if ours and mark != settings_mark(cfg):
            found = f"simulated with other settings ({mark})" if mark else "not simulated"
        elif mark and not ours:
            found = f"simulated, but not one of the {len(names)} subjects of this run"
        else:
            continue
        raise InputError(f"{study}: found a study that is {found}; remove it or choose another --root")


def run(cfg: Config) -> dict[str, Any]:
    """Scan every subject."""
    names = [f"mouse{n:02d}" for n in range(1, cfg.subjects + 1)] + ["lego"] * cfg.lego
    check(cfg, names)
    # The bits of a matrix product depend on the number of its threads: every subject has a process with just one.
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))
    progress = Progress(len(names), "simulate")
    keys: list[str] = []
    workers = cfg.workers or available_cores()
    with ProcessPoolExecutor(workers, get_context("spawn"), follow_parent) as pool:
        for name, own in zip(names, pool.map(functools.partial(simulate_subject, cfg), names), strict=True):
            keys += own
            progress.step(f"{name} | {len(keys)} scan pairs")
    for left in (cfg.root / "data" / "raw").glob(".mouse*.partial"):  # of a killed run with more subjects
        shutil.rmtree(left)
    attributes = {"fingerprint": settings_mark(cfg), "tissues": anatomy.NAMES, "spoiled_kinds": SPOILED}
    finish_store(cfg.root / "data" / "truth.zarr", keys, attributes)
    return {"subjects": len(names), "scans": len(keys)}


if __name__ == "__main__":
    main(run, PRESETS)
