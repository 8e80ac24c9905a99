"""Restore new scans with a trained model: ParaVision, NIfTI or DICOM in, NIfTI on the high matrix out.

Reads scans and runs/<run>/best.pt (and data/pairs.zarr where the checkpoint does not say what it was trained on).
Writes results/denoised/<scan>_restored.nii.gz and <scan>.json, and on demand residual, uncertainty, PNG, HTML, DICOM.
Outputs carry the subject's id, never its name. What is up to date is not restored again.

Usage:
    python 07_denoise.py /data/20240611_mouse07/4 --html
    python 07_denoise.py /data --all --model runs/unet/best.pt --out restored
    python 07_denoise.py scan.nii.gz --strength 0.7 --consistency 1 --residual
    python 07_denoise.py --watch /data/today --png
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro
from scipy import fft

import formats
from common import (
    Array,
    InputError,
    Lazy,
    atomic_path,
    body_mask,
    crop_box,
    fingerprint,
    main,
    normalisation,
    open_pairs,
    sha256,
    upsample,
    write_json,
)
from likeness import compare, measure, page, picture, training_range
from paravision import Scan, scan_folders

if TYPE_CHECKING:
    import anchored
    import networks
else:  # they import torch, which takes longer than --help may
    networks, anchored = Lazy("networks"), Lazy("anchored")

STAGE = 7
OUTPUTS = {"restored": "_restored.nii.gz", "residual": "_residual.nii.gz", "uncertainty": "_uncertainty.nii.gz"}
OUTPUTS |= {"png": ".png", "html": ".html", "dicom": "_dicom"}  # kind: what its file adds to the scan's name


@dataclass(frozen=True)
class Config:
    """What is restored, with which model, and what is written."""

    # files
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """A 2dseq, scan, study or tree of studies of ParaVision; a NIfTI file, whose name the outputs keep; a folder with
    one DICOM series."""
    root: Path = Path(".")
    """Folder of the experiment."""
    model: Path | None = None
    """Checkpoint of a U-Net or an APDDM; runs/unet/best.pt below the root if not given."""
    out: Path | None = None
    """Folder of the outputs; results/denoised below the root if not given."""
    all: bool = False
    """Of studies take every RARE scan, not only those of the matrix that the model was trained on."""
    fresh: bool = False
    """Restore again what is up to date."""

    # model
    ratio: int = 0
    """High matrix / low matrix; 0 = that of the training pairs."""
    strength: float = 1.0
    """From the upsampled low image (0) to the restored one (1)."""
    consistency: float = 0.0
    """How far the low spatial frequencies go back to the measured ones; 1 = exactly those."""
    steps: int = 0
    """APDDM: steps along the path; 0 = what its intervals are calibrated for."""
    samples: int = 0
    """APDDM: samples whose mean is the restored image; 0 = what its intervals are calibrated for."""
    seed: int = 0
    """APDDM: of the noise."""

    # outputs beside the restored NIfTI
    uncertainty: bool = False
    """Half width of an APDDM's intervals, or the standard deviation of its samples where none is known, as NIfTI."""
    residual: bool = False
    """Restored less upsampled low image, as NIfTI."""
    png: bool = False
    """Slices side by side: low, restored, residual."""
    html: bool = False
    """One page: slices, what the scan is like beside the training scans, warnings."""
    dicom: bool = False
    """The restored scan as a folder of DICOM files too."""

    # watching
    watch: Path | None = None
    """Folder in which studies appear: restore each scan once it is complete, until Ctrl-C."""
    poll: float = 10.0
    """Seconds between two looks; a scan is complete if the reader accepts it and nothing changed between them."""
    once: bool = False
    """Stop watching as soon as everything that is there is done."""

    # run
    flips: bool = True
    """U-Net: mean over the four flips of a slice, as stage 06 judges it; --no-flips takes a quarter of the time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """Threads of the network on the CPU; 0 = all cores."""

    @property
    def checkpoint(self) -> Path:
        """The model's file."""
        return self.model or self.root / "runs" / "unet" / "best.pt"

    @property
    def folder(self) -> Path:
        """Where the outputs go."""
        return self.out or self.root / "results" / "denoised"


PRESETS = {"paper": Config(), "demo": Config(png=True, html=True), "smoke": Config(threads=1, poll=0.2)}


class Model(NamedTuple):
    """A trained network, how it is used, how its pairs were made, and what the training scans were like."""

    net: Any
    stage: str
    digest: str
    pairs: dict[str, Any]
    known: dict[str, Any]
    ratio: tuple[int, int]
    sampling: dict[str, Any]
    interval: dict[str, Any] | None


class Restored(NamedTuple):
    """Images on the full field of the high grid, in units of the low scan; `body` is a mask of them."""

    image: Array
    low: Array
    spread: Array | None
    body: Array
    crop: Array


# ---------------------------------------------------------------- images


def high_affine(affine: Array, ratio: tuple[int, int]) -> Array:
    """Affine of the high grid: its pixel (x, y) * ratio lies on pixel (x, y) of the low grid."""
    return np.asarray(affine @ np.diag([1 / ratio[1], 1 / ratio[0], 1.0, 1.0]))


def consistent(image: Array, measured: Array, ratio: tuple[int, int], amount: float) -> Array:
    """Move the centre of each slice's k-space, as large as the low matrix, towards that of the measured image."""
    inside = np.ones(image.shape[1:], bool)
    for axis, factor in enumerate(ratio):
        n = image.shape[axis + 1]
        near = np.abs(fft.fftfreq(n, 1 / n)) <= n / factor / 2
        inside &= near[:, None] if axis == 0 else near
    moved = np.empty_like(image)
    for number, (one, other) in enumerate(zip(image, measured, strict=True)):
        change = fft.fft2(np.subtract(other, one, dtype=np.float64)) * inside
        moved[number] = one + amount * fft.ifft2(change).real
    return moved


def restore(image: Array, model: Model, cfg: Config) -> Restored:
    """Restore low images as stage 02 prepares them: factors from the body's box, network on the full field."""
    how, ratio = model.pairs, model.ratio
    low = upsample(image, ratio, how["upsample"])
    given = upsample(image, ratio, how["upsample"], None) if how["align"] == "none" else low
    body = body_mask(given)
    body = body if body.any() else np.ones_like(body)
    y0, y1, x0, x1 = crop_box(body, how["margin"])
    scale, offset = normalisation(given[:, y0:y1, x0:x1], how["normalise"])
    blank = ~(scale > 0)  # a slice without signal has no scale, and nothing to restore
    scale[blank] = 1
    spread = None
    if model.stage == "apddm":
        generator = networks.seeded(cfg.seed, STAGE)
        restored, spread = anchored.restore_apddm(
            model.net, given, scale, offset, **model.sampling, generator=generator
        )
        spread *= cfg.strength * (model.interval["factor"] if model.interval else 1)
        spread[blank] = 0
    else:
        restored = networks.restore(model.net, given, scale, offset, flips=cfg.flips)
    restored[blank] = low[blank]
    if cfg.strength < 1:
        restored = low + np.float32(cfg.strength) * (restored - low)
    if cfg.consistency > 0:
        restored = consistent(restored, upsample(image, ratio, "fourier"), ratio, cfg.consistency)
    return Restored(restored, low, spread, body, given[:, y0:y1, x0:x1])


# ---------------------------------------------------------------- the stage


def load_model(cfg: Config) -> Model:
    """The network of a checkpoint; what it does not say of its training scans, the pairs it was trained on may."""
    path = cfg.checkpoint
    content = networks.load_checkpoint(path)
    stage, sampling, interval = str(content.get("stage")), {}, None
    net: Any
    if stage == "apddm":
        net = anchored.APDDM(content)
        sampling, calibrated = net.asked(cfg.steps, cfg.samples)
        interval = calibrated if cfg.strength == 1 and cfg.consistency == 0 else None
        net.net.to(networks.pick_device(cfg.device))
    else:
        net = networks.load_unet(path)[0].to(networks.pick_device(cfg.device))
    if cfg.uncertainty and sampling.get("samples", 1) < 2:
        found = f"{sampling['samples']} sample" if sampling else f"stage {stage!r}"
        raise InputError(f"{path}: {found} found, expected an APDDM with 2 or more samples for --uncertainty")
    known = content["data"].get("range") or {}
    if not known and (cfg.root / "data" / "pairs.zarr" / "zarr.json").exists():
        pairs = open_pairs(cfg.root)
        known = training_range(pairs) if pairs.attributes["fingerprint"] == content["data"]["fingerprint"] else {}
    ratios = [[cfg.ratio, cfg.ratio]] if cfg.ratio else known.get("ratios", [])
    if len(ratios) != 1:
        found = f"training pairs of ratios {ratios}" if ratios else "no ratio of the training pairs"
        raise InputError(f"{path}: {found} found, expected one: say --ratio")
    y, x = ratios[0]
    return Model(net, stage, sha256(path), content["data"]["settings"], known, (y, x), sampling, interval)


def read_record(path: Path) -> dict[str, Any]:
    """What an earlier run wrote of a scan; empty if there is nothing of use."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def write(folder: Path, done: Restored, scan: Scan, record: dict[str, Any], kinds: list[str]) -> None:
    """Write the outputs of these kinds; those of an earlier run with other settings go."""
    name, settings = record["name"], record["settings"]
    volumes: dict[str, Any] = {"restored": done.image, "uncertainty": done.spread}
    volumes["residual"] = done.image - done.low
    text = "restored by {model} {checkpoint}, strength {strength:g}, consistency {consistency:g}".format(**settings)
    image = b""
    if {"png", "html"} & set(kinds):
        image = picture(done.low, done.image, done.spread, done.body, scan.spacing_mm, name)
    for kind, ending in OUTPUTS.items():
        path = folder / f"{name}{ending}"
        if kind not in kinds:
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        elif kind in volumes:
            formats.write_nifti(path, volumes[kind], scan.affine, scan.parameters.get("space", 1), text)
        elif kind == "dicom":
            formats.write_dicom(path, scan, record["fingerprint"], text)
        else:
            with atomic_path(path) as partial:
                partial.write_bytes(image if kind == "png" else page(record, image).encode())


def denoise(path: Path, model: Model, cfg: Config) -> dict[str, Any]:
    """Restore one scan and write what is asked for, the record of it last."""
    formats.refuse_inside(cfg.folder, path)
    clock = [time.monotonic()]
    low, name, digest = formats.read_scan(path)
    settings: dict[str, Any] = {"model": model.stage, "checkpoint": model.digest[:12], "ratio": list(model.ratio)}
    settings |= {"strength": cfg.strength, "consistency": cfg.consistency, "flips": cfg.flips} | model.sampling
    settings |= {"seed": cfg.seed} if model.sampling else {}
    settings |= {f"pairs: {key}": model.pairs[key] for key in ("align", "upsample", "normalise", "margin")}
    kinds = [kind for kind in OUTPUTS if kind == "restored" or getattr(cfg, kind)]
    files = [f"{name}{OUTPUTS[kind]}" for kind in kinds]
    mark, record_path = fingerprint(digest, settings, kinds), cfg.folder / f"{name}.json"
    old = read_record(record_path)
    if not cfg.fresh and old.get("fingerprint") == mark and all((cfg.folder / file).exists() for file in files):
        print(f"{name}: up to date", flush=True)
        return old
    clock.append(time.monotonic())
    done = restore(low.image, model, cfg)
    clock.append(time.monotonic())

    z, y, x = low.spacing_mm
    spacing = (z, y / model.ratio[0], x / model.ratio[1])
    fine = Scan(done.image, high_affine(low.affine, model.ratio), spacing, low.parameters)
    figures = measure(done.crop, model.ratio, done.low.shape, spacing, low.parameters)
    figures["mean_ratio"] = float(done.image[done.body].mean(dtype=float) / done.low[done.body].mean(dtype=float))
    rows, warnings = compare(figures, model.known)
    record: dict[str, Any] = {"name": name, "fingerprint": mark, "input": digest, "settings": settings}
    record |= {"files": files, "figures": figures, "comparison": rows, "warnings": warnings}
    record |= {"training_scans": model.known.get("scans", 0)}
    record |= {"affine": fine.affine.tolist(), "shape": list(done.image.shape)}
    if "uncertainty" in kinds:
        interval = model.interval and f"half width of the {model.interval['coverage']:.0%} interval"
        record["uncertainty"] = interval or "standard deviation over the samples"
    write(cfg.folder, done, fine, record, kinds)
    clock.append(time.monotonic())
    seconds = dict(zip(("reading", "network", "writing"), np.diff(clock).tolist(), strict=True))
    write_json(record_path, record | {"seconds": seconds})
    shares = ", ".join(f"{part} {value:.1f} s ({value / sum(seconds.values()):.0%})" for part, value in seconds.items())
    print(f"{name}: {'x'.join(map(str, done.image.shape[::-1]))} | {shares}", flush=True)
    for warning in warnings:
        print(f"  warning: {warning}", flush=True)
    return record | {"seconds": seconds}


def state_of(scan: Path) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times of a scan's files; empty if they change under our hands."""
    try:
        stats = [(str(file), file.stat()) for file in sorted(scan.rglob("*")) if file.is_file()]
    except FileNotFoundError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def watch(folder: Path, model: Model, cfg: Config) -> list[dict[str, Any]]:
    """Restore each scan below a folder once it is complete, until Ctrl-C or, with `once`, nothing is left to do."""
    seen: dict[Path, Any] = {}
    settled: dict[Path, Any] = {}
    records, matrices = [], [] if cfg.all else model.known.get("matrices", [])
    print(f"{folder}: watching, Ctrl-C stops", flush=True)
    try:
        while True:
            try:
                scans, waiting = scan_folders(folder), False
            except FileNotFoundError:  # a folder went while it was looked through
                scans, waiting = [], True
            for scan in scans:
                state = state_of(scan)
                if settled.get(scan) == state:
                    continue
                if not state or seen.get(scan) != state:
                    seen[scan], waiting = state, True
                    continue
                try:
                    records.append(denoise(formats.lowest_reco(scan, matrices), model, cfg))
                except (InputError, FileNotFoundError, PermissionError) as error:
                    print(f"not taken: {error}", flush=True)
                if state_of(scan) == state:  # else it grew meanwhile: look again
                    settled[scan] = state
            if cfg.once and not waiting:
                return records
            time.sleep(cfg.poll)
    except KeyboardInterrupt:
        print(f"{folder}: stopped, {len(records)} scans restored", flush=True)
        return records


def run(cfg: Config) -> dict[str, Any]:
    """Restore every scan of the inputs, or those that appear in the watched folder."""
    for name, good, expected in (
        ("inputs", bool(cfg.inputs) != bool(cfg.watch), "scans or --watch FOLDER"),
        ("strength", 0 <= cfg.strength <= 1, "0 to 1"),
        ("consistency", 0 <= cfg.consistency <= 1, "0 to 1"),
        ("ratio", cfg.ratio >= 0, "1 or more, or 0 for the training pairs'"),
        ("poll", cfg.poll > 0, "a positive number of seconds"),
        ("watch", cfg.watch is None or cfg.watch.is_dir(), "a folder"),
    ):
        if not good:
            raise InputError(f"{name}: found {getattr(cfg, name)}, expected {expected}")
    for path in cfg.inputs:
        formats.check_input(path)
    start = time.monotonic()
    import torch

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = load_model(cfg)
    print(f"{cfg.checkpoint}: {model.stage} loaded in {time.monotonic() - start:.1f} s", flush=True)
    if cfg.watch:
        return {"scans": watch(cfg.watch, model, cfg)}
    matrices = [] if cfg.all else model.known.get("matrices", [])
    sources = [source for path in cfg.inputs for source in formats.find_scans(path, matrices)]
    records, failed = [], []
    for source in sources:
        try:
            records.append(denoise(source, model, cfg))
        except InputError as error:
            if len(sources) == 1:
                raise
            failed.append(str(error))
            print(f"failed: {error}", flush=True)
    if failed:
        raise InputError(f"{len(failed)} of {len(sources)} scans failed, expected none; the first: {failed[0]}")
    return {"scans": records}


if __name__ == "__main__":
    main(run, PRESETS)
