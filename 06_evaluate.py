"""Restored images and figures of merit of every model.

Reads data/curated.zarr, data/pairs.zarr and runs/<model>/best.pt; data/truth.zarr and data/rois.csv if any.
Writes results/<model>.zarr, results/metrics.csv, results/summary.json and results/rois.csv; with --pick-rois only
data/rois.csv. Section 5 of the report.

Usage:
    python 06_evaluate.py --preset demo --models unet --splits test lego
    python 06_evaluate.py --root experiment --workers 8
    python 06_evaluate.py --pick-rois --web                     # draw the boxes of CNR, then run again
"""

import functools
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import ndimage

from common import (
    SPLITS,
    Array,
    InputError,
    Lazy,
    Progress,
    Store,
    body_mask,
    fingerprint,
    finish_store,
    grid_relation,
    main,
    normalisation,
    open_curated,
    open_pairs,
    open_truth,
    run_parallel,
    scan_attributes,
    sha256,
    upsample,
    write_json,
    write_scan,
    write_table,
)
from merit import compare, coverage, noise_level, summarise
from rois import Box, contrast_figures, incomplete, pixels, place_boxes, read_boxes, rois_path

networks, anchored = Lazy("networks"), Lazy("anchored")
skimage = Lazy("skimage")
roi_picker = Lazy("roi_picker")

BASELINES = ("low", "bicubic", "fourier", "nlm", "high")  # `low` first: the others are set against it
COLUMNS = ("model", "split", "subject", "region", "plane", "slice", "metric", "reference", "mask", "range", "value")
PRINTED = ("mse", "mse_ratio", "ssim", "psnr", "psnr_truth", "ssim_truth", "mean_ratio")  # all of them in the body
Figure = namedtuple("Figure", "slice model metric reference mask value")  # a row of metrics.csv but for its scan


@dataclass(frozen=True)
class Config:
    """What is judged, and how."""

    root: Path = Path(".")
    """Folder of data, runs and results."""
    models: tuple[str, ...] = ("unet",)
    """Trained networks, U-Nets and APDDMs: names of folders below runs."""
    splits: tuple[Literal["train", "validation", "test", "lego"], ...] = ("test", "lego", "validation")
    """Splits whose slices are judged; their scans are restored whole."""
    strengths: tuple[float, ...] = (0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0)
    """Non-local means: strengths to choose from on validation slices, in units of the low scan's noise."""
    tuning_slices: int = 12
    """Validation slices that choose the strength, spread over all scans."""
    flips: bool = True
    """U-Nets: mean over the four flips of a slice."""
    steps: int = 0
    """APDDM: steps along the path; 0 = what its intervals are calibrated for."""
    samples: int = 0
    """APDDM: samples whose mean is the restored image; 0 = what its intervals are calibrated for."""
    box: int = 10
    """Side of the boxes placed in the middle slice of a scan without drawn ones, pixels of the high grid."""
    draws: int = 2000
    """Bootstrap samples of animals."""
    workers: int = 0
    """Processes; 0 takes every core."""
    seed: int = 1
    """Of the bootstrap, and of an APDDM's noise."""
    pick_rois: bool = False
    """Draw ROI and background boxes into data/rois.csv in a window, on scans of these splits; nothing is judged."""
    web: bool = False
    """Pick them in a browser, also over ssh: the page is served on 127.0.0.1 only."""
    port: int = 8988
    """Of that page; the next free one if it is taken."""


PRESETS = {"paper": Config(), "demo": Config(), "smoke": Config(strengths=(0.7, 1.1), tuning_slices=2, draws=200)}


@dataclass(frozen=True)
class Scan:
    """One scan on its full field, in units of the low scan; all but `low` on the high grid."""

    low: Array
    references: dict[str, Array]  # high image and, where it is known, truth
    body: Array
    noise: tuple[float, float]  # standard deviation in the low and in the high image
    data_range: float  # maximum of the high image over the kept slices
    unit: Array  # mean of each low slice over the crop, which the report divides by
    judged: dict[int, str]  # slices that are judged, and their split
    attributes: dict[str, Any]  # of the curated scan and of the pair


# ---------------------------------------------------------------- scans


def on_high_grid(low: Array, attributes: dict[str, Any], method: str, aligned: bool = True) -> Array:
    """Low images upsampled, with pixel centres as stage 02 has them or, not aligned, as a plain zoom puts them."""
    ratio = tuple(attributes["ratio"])
    low_affine, high_affine = (np.array(attributes[name]) for name in ("affine_low", "affine_high"))
    slices, *high_matrix = attributes["full_shape"]  # `low` may be some of them
    _, offset = grid_relation(low_affine, high_affine, (slices, *low.shape[1:]), (slices, *high_matrix))
    y, x = offset - np.divide(attributes["shift"], ratio)
    return upsample(low, ratio, method, (float(y), float(x)) if aligned else None)


def load_scan(cfg: Config, key: str) -> Scan:
    """Read a scan, bring high image and truth to the units of the low one, find body, noise and judged slices."""
    curated, pairs = open_curated(cfg.root), open_pairs(cfg.root)
    attributes = curated.attrs(key) | pairs.attrs(key)
    gain = np.float32(attributes["gain"])
    low, high = (np.nan_to_num(curated.read(key, name, 3, "float32")) for name in ("low", "high"))
    if list(high.shape) != list(attributes["full_shape"]):
        found = f"{pairs.path / key}: full_shape {attributes['full_shape']} found"
        raise InputError(f"{found}, expected {list(high.shape)}, as in {curated.path}: run {pairs.made_by} again")
    references = {"high": high / gain}
    if (cfg.root / "data" / "truth.zarr").exists() and key in (store := open_truth(cfg.root)).scans:
        references["truth"] = store.read(key, "truth", 3, "float32") / gain
    codes, kept = pairs.read(key, "split", 1, "uint8"), pairs.read(key, "slice_index", 1, "int32")
    judged = {int(index): SPLITS[code] for index, code in zip(kept, codes, strict=True) if SPLITS[code] in cfg.splits}
    fine, body = on_high_grid(low, attributes, "fourier"), np.zeros(high.shape, bool)
    body[kept] = body_mask(fine[kept])  # a dropped slice may hold spikes, or no animal
    (ry, rx), reach = attributes["ratio"], max(2, high.shape[1] // 50)  # ringing around the body is no noise
    air = ~ndimage.binary_dilation(body[kept], np.ones((1, 3, 3), bool), iterations=reach)
    noise = noise_level(low[kept], air[:, ::ry, ::rx]), noise_level(references["high"][kept], air)
    y0, y1, x0, x1 = attributes["box"]
    unit, _ = normalisation(fine[:, y0:y1, x0:x1], "mean")
    return Scan(low, references, body, noise, float(references["high"][kept].max()), unit, judged, attributes)


def slices_of(cfg: Config, splits: Sequence[str]) -> list[tuple[str, int]]:
    """Scan and number of every slice of these splits."""
    pairs, found = open_pairs(cfg.root), []
    for key in sorted(pairs.scans):
        chosen = np.isin(pairs.read(key, "split", 1, "uint8"), [SPLITS.index(name) for name in splits])
        found += [(key, int(index)) for index in pairs.read(key, "slice_index", 1, "int32")[chosen]]
    if not found:
        raise InputError(f"{pairs.path}: no slice of {', '.join(splits)} found, expected one or more")
    return found


class Network(NamedTuple):
    """A trained network and how it restores."""

    net: Any
    sampling: dict[str, Any]  # of an APDDM
    factor: float  # of its intervals on the deviation of the samples; not a number: not calibrated for this sampling
    setting: str  # whatever the images depend on


def load_networks(cfg: Config) -> dict[str, Network]:
    """Trained networks; none may come from pairs of other settings, none may know a test animal."""
    pairs, nets = open_pairs(cfg.root).attributes, {}
    for model in cfg.models:
        path = cfg.root / "runs" / model / "best.pt"
        checkpoint = networks.load_checkpoint(path, pairs["settings"])
        seen = (checkpoint["data"].get("splits") or {}).get("train", [])
        leaked = set(seen) & set(pairs["splits"].get("test", []))
        if leaked and pairs["split_by"] == "animal":
            raise InputError(f"{path}: trained on {', '.join(sorted(leaked))}, expected no animal of split test")
        if checkpoint["stage"] == "apddm":
            net = anchored.APDDM(checkpoint)
            sampling, found = net.asked(cfg.steps, cfg.samples)
            factor = found["factor"] if found else np.nan
            net.net.to(networks.pick_device())
            nets[model] = Network(net, sampling, factor, f"{sha256(path)} {sampling} seed {cfg.seed}")
        else:
            net, _ = networks.load_unet(path)
            nets[model] = Network(net.to(networks.pick_device()), {}, np.nan, f"{sha256(path)} flips {cfg.flips}")
    return nets


# ---------------------------------------------------------------- images


def denoise(images: Array, noise: float, strength: float) -> Array:
    """Non-local means of every slice."""
    settings = {"patch_size": 5, "patch_distance": 6, "h": strength * noise, "sigma": noise, "fast_mode": True}
    return np.stack([skimage.restoration.denoise_nl_means(image, **settings) for image in images]).astype(np.float32)


def tuning_errors(cfg: Config, task: tuple[str, int]) -> list[float]:
    """MSE against the high slice in the body, in normalised units, of non-local means of every strength."""
    scan, index = load_scan(cfg, task[0]), task[1]
    fine, body = on_high_grid(scan.low[[index]], scan.attributes, "fourier"), scan.body[index]
    restored = [denoise(fine, scan.noise[0], strength)[0] for strength in cfg.strengths]
    high = scan.references["high"][index]
    return [float(np.square(image - high)[body].mean() / scan.unit[index] ** 2) for image in restored]


def every(function: Callable[[Any], Any], tasks: Sequence[Any], label: str, workers: int) -> dict[Any, Any]:
    """Results of a function by task, with progress."""
    progress, found = Progress(len(tasks), label), {}
    for task, result in run_parallel(function, tasks, workers):
        found[task] = result
        progress.step()
    return found


def tune(cfg: Config) -> tuple[float, dict[str, float]]:
    """Strength of non-local means with the least MSE on validation slices, and the MSE of every strength."""
    slices = slices_of(cfg, ["validation"])
    tasks = [slices[i] for i in np.linspace(0, len(slices) - 1, min(cfg.tuning_slices, len(slices))).astype(int)]
    found = every(functools.partial(tuning_errors, cfg), tasks, "tuning", cfg.workers)
    errors = np.mean([found[task] for task in tasks], axis=0)
    curve = {f"{strength:g}": float(error) for strength, error in zip(cfg.strengths, errors, strict=True)}
    return cfg.strengths[int(errors.argmin())], curve


def by_network(cfg: Config, network: Network, scan: Scan) -> dict[str, Array]:
    """Arrays of a scan by a network, on the full field, upsampled and normalised as stage 02 does it in the crop."""
    chosen = open_pairs(cfg.root).attributes["settings"]
    images = on_high_grid(scan.low, scan.attributes, chosen["upsample"], chosen["align"] != "none")
    y0, y1, x0, x1 = scan.attributes["box"]
    scale, offset = normalisation(images[:, y0:y1, x0:x1], chosen["normalise"])
    scale[scale == 0] = 1  # a dropped slice of zeros
    if not network.sampling:
        return {"restored": networks.restore(network.net, images, scale, offset, flips=cfg.flips)}
    draws = networks.seeded(cfg.seed, 6)
    mean, deviation = anchored.restore_apddm(network.net, images, scale, offset, **network.sampling, generator=draws)
    return {"restored": mean} | ({} if np.isnan(network.factor) else {"half_width": deviation * network.factor})


def restore(cfg: Config, settings: dict[str, str], nets: dict[str, Network], key: str) -> None:
    """Write the images of a scan by every model of `settings`, but for those that are there already."""
    inputs = [store.attrs(key).get("fingerprint") for store in (open_curated(cfg.root), open_pairs(cfg.root))]
    scan = None
    for model, setting in settings.items():
        store, mark = cfg.root / "results" / f"{model}.zarr", fingerprint(model, setting, inputs)
        if (scan_attributes(store, key) or {}).get("fingerprint") == mark:
            continue
        scan = scan or load_scan(cfg, key)
        if model in nets:
            arrays = by_network(cfg, nets[model], scan)
        elif model == "high":
            arrays = {"restored": scan.references["high"]}
        elif model == "low":  # the report's zoom, half a pixel off
            arrays = {"restored": on_high_grid(scan.low, scan.attributes, "nearest", aligned=False)}
        else:
            images = on_high_grid(scan.low, scan.attributes, "cubic" if model == "bicubic" else "fourier")
            arrays = {"restored": denoise(images, scan.noise[0], float(setting)) if model == "nlm" else images}
        (store / "zarr.json").unlink(missing_ok=True)  # incomplete until all scans are there
        place = {name: scan.attributes[name] for name in ("affine", "spacing_mm")} | {"fingerprint": mark}
        write_scan(store, key, {name: array.astype(np.float32) for name, array in arrays.items()}, place)


def slice_figures(scan: Scan, images: dict[str, Array], index: int) -> Iterator[Figure]:
    """Figures of one slice of every model against the high image and, where it is known, the truth."""
    body, unit = scan.body[index], float(scan.unit[index])
    masks = {name: m for name, m in (("field", np.ones_like(body)), ("body", body), ("air", ~body)) if m.any()}
    for reference, volume in scan.references.items():
        low_errors: dict[str, float] = {}
        for model in (name for name in images if name != reference):
            found = compare(images[model][index], volume[index], masks, scan.data_range, unit)
            errors = {mask: value for metric, mask, value in found if metric == "mse"}
            low_errors = low_errors or errors
            found += [("mse_ratio", mask, np.divide(errors[mask], low_errors[mask])) for mask in masks]
            if body.any():
                restored, wanted = (np.asarray(v[index][body], np.float64) for v in (images[model], volume))
                size = {"mean": restored.mean() / wanted.mean(), "max": restored.max() / wanted.max()}
                found += [(f"{name}_ratio", "body", ratio) for name, ratio in size.items()]
            if body.any() and reference == "high":  # E[MSE against the high image] = MSE + variance of its noise
                found += [("mse_corrected", "body", errors["body"] - (scan.noise[1] / unit) ** 2)]
            yield from (Figure(index, model, metric, reference, mask, float(value)) for metric, mask, value in found)


def interval_figures(scan: Scan, model: str, image: Array, half_width: Array, index: int) -> Iterator[Figure]:
    """How many body pixels of a slice lie in their interval, and whether it is wide where the error is large."""
    body = scan.body[index]
    for reference, volume in scan.references.items() if body.any() else ():
        error = np.abs(image[index] - volume[index])[body]
        for metric, value in coverage(error, half_width[index][body]).items():
            yield Figure(index, model, metric, reference, "body", value)


def box_figures(scan: Scan, images: dict[str, Array], boxes: Sequence[Box]) -> Iterator[Figure]:
    """Figures of every ROI with the background of its slice."""
    for roi in (box for box in boxes if box.kind == "roi"):
        pair = roi, next(box for box in boxes if box.kind == "background" and box.slice == roi.slice)
        volumes = images | scan.references
        values = {name: [pixels(volume, box) for box in pair] for name, volume in volumes.items()}
        contrast = {name: inside.mean() - outside.mean() for name, (inside, outside) in values.items()}
        for model in images:
            for metric, value in contrast_figures(*values[model]).items():
                yield Figure(roi.slice, model, metric, "", f"box:{roi.name}", float(value))
            for reference in (name for name in scan.references if name != model):  # CNR is won by blur, this is not
                recovery = np.divide(contrast[model], contrast[reference])
                yield Figure(roi.slice, model, "contrast_recovery", reference, f"box:{roi.name}", float(recovery))


@np.errstate(divide="ignore", invalid="ignore")
def judge(cfg: Config, models: Sequence[str], drawn: Sequence[Box], key: str) -> tuple[list[dict[str, Any]], list[Box]]:
    """Rows of metrics.csv of one scan, and its boxes: those that were drawn, else two in its middle slice."""
    scan = load_scan(cfg, key)
    stores = {model: Store(cfg.root / "results" / f"{model}.zarr", "06_evaluate.py") for model in models}
    images = {model: store.read(key, "restored", 3, "float32") for model, store in stores.items()}
    indices = sorted(scan.judged)
    boxes = [box for box in drawn if box.key == key and box.slice in indices]
    if key not in {box.key for box in drawn}:
        middle = indices[len(indices) // 2]
        boxes = place_boxes(key, middle, scan.references["high"][middle], scan.body[middle], cfg.box)
    figures = [figure for index in indices for figure in slice_figures(scan, images, index)]
    for model, store in stores.items():
        if (store.path / key / "half_width").exists():
            width = store.read(key, "half_width", 3, "float32")
            figures += [f for index in indices for f in interval_figures(scan, model, images[model], width, index)]
    figures += box_figures(scan, images, boxes)
    place = dict(zip(("subject", "region", "plane"), key.split("/"), strict=True)) | {"range": scan.data_range}
    return [place | {"split": scan.judged[f.slice]} | f._asdict() for f in figures], boxes


def print_summary(summary: dict[str, Any]) -> None:
    """Print the figures that matter, one line per model."""
    for split in dict.fromkeys(split for found in summary.values() for split in found):
        print(f"\n{split + ', body':18}" + "".join(f"{name:>12}" for name in PRINTED))
        for model, found in summary.items():
            means = [found.get(split, {}).get(f"{name}_body", {}).get("mean", np.nan) for name in PRINTED]
            print(f"{model:18}" + "".join(f"{mean:12.4f}" for mean in means))


def run(cfg: Config) -> dict[str, Any]:
    """Restore and judge every scan of the splits; return summary.json's content."""
    if clash := set(cfg.models) & set(BASELINES):
        raise InputError(f"--models: {', '.join(sorted(clash))} found, a baseline, expected folders below runs")
    slices = slices_of(cfg, cfg.splits)
    if cfg.pick_rois:
        return {"boxes": roi_picker.pick_rois(cfg.root, slices, cfg.models, cfg.web, cfg.port)}
    keys = list(dict.fromkeys(key for key, _ in slices))
    drawn, nets = read_boxes(cfg.root), load_networks(cfg)
    if lacks := incomplete(drawn):
        raise InputError(f"{rois_path(cfg.root)}: {lacks[0]}")
    strength, curve = tune(cfg)
    print(f"non-local means: strength {strength:g} of " + ", ".join(f"{s} (MSE {e:.4f})" for s, e in curve.items()))
    digests = {model: network.setting for model, network in nets.items()}
    settings = dict.fromkeys(BASELINES, "") | {"nlm": f"{strength:g}"}
    every(functools.partial(restore, cfg, settings, {}), keys, "baselines", cfg.workers)
    every(functools.partial(restore, cfg, digests, nets), keys if nets else [], "networks", 1)
    for model, setting in (settings | digests).items():
        attributes: dict[str, Any] = {"model": model, "fingerprint": fingerprint(setting, keys)}
        attributes["tuning"] = curve if model == "nlm" else {}
        finish_store(cfg.root / "results" / f"{model}.zarr", keys, attributes)
    found = every(functools.partial(judge, cfg, (*settings, *digests), drawn), keys, "figures", cfg.workers)
    rows = [row for key in keys for row in found[key][0]]
    summary = summarise(rows, cfg.draws, cfg.seed)
    write_table(cfg.root / "results" / "rois.csv", Box._fields, [b._asdict() for key in keys for b in found[key][1]])
    write_table(cfg.root / "results" / "metrics.csv", COLUMNS, rows)
    write_json(cfg.root / "results" / "summary.json", summary)
    print_summary(summary)
    return summary


if __name__ == "__main__":
    main(run, PRESETS)
