"""What a scan is like in numbers, how far these spread over the training scans, and the page that shows both.

Stages 03 and 05 keep the spread in their checkpoints, stage 07 holds a new scan against it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from common import SPLITS, Array, Store, body_mask, scan_attributes

# Name of a figure: what it is, unit.
FIGURES = {
    "pixel_y_mm": ("pixel along y", "mm"),
    "pixel_x_mm": ("pixel along x", "mm"),
    "fov_y_mm": ("field of view along y", "mm"),
    "fov_x_mm": ("field of view along x", "mm"),
    "slice_mm": ("distance of slices", "mm"),
    "acquired": ("acquired share of k-space", ""),
    "tr_ms": ("repetition time", "ms"),
    "te_ms": ("effective echo time", "ms"),
    "snr": ("signal-to-noise ratio", ""),
    "contrast": ("spread of body intensities, (p90 - p10) / median", ""),
}


def measure(
    crop: Array, ratio: Sequence[int], shape: Sequence[int], spacing_mm: Sequence[float], parameters: dict[str, Any]
) -> dict[str, float]:
    """Describe a low scan by numbers.

    Parameters
    ----------
    crop : array (slice, y, x)
        The upsampled low image around the body, as stage 02 crops it, in units of its scan.
    ratio : (int, int)
        High matrix / low matrix, along y and x.
    shape, spacing_mm : (slice, y, x)
        Matrix of the whole high grid, and its distances.
    parameters : dict
        As `read_paravision` gives them; what is not in them is left out of the result.

    Returns
    -------
    dict
        The matrix of the low scan as `matrix` [y, x], and the numbers of `FIGURES`.
    """
    few = np.linspace(0, len(crop) - 1, min(len(crop), 8)).round().astype(int)
    pixels = np.asarray(crop)[few, :: ratio[0], :: ratio[1]]
    matrix = [int(n // r) for n, r in zip(shape[1:], ratio, strict=True)]
    pixel = [float(d * r) for d, r in zip(spacing_mm[1:], ratio, strict=True)]
    found: dict[str, Any] = {"matrix": matrix, "slice_mm": float(spacing_mm[0])}
    found |= {f"pixel_{axis}_mm": size for axis, size in zip("yx", pixel, strict=True)}
    found |= {f"fov_{axis}_mm": size * n for axis, size, n in zip("yx", pixel, matrix, strict=True)}
    acquired = parameters.get("acquired_matrix") or []
    if len(acquired) == 2:
        found["acquired"] = float(np.prod(acquired) / np.prod(matrix))
    found |= {name: float(parameters[name]) for name in ("tr_ms", "te_ms") if parameters.get(name) is not None}
    body = body_mask(pixels)
    if body.any():
        low, median, high = np.quantile(pixels[body], (0.1, 0.5, 0.9))
        noise = noise_level(pixels, body)
        found |= {"contrast": float((high - low) / median)} if median > 0 else {}
        found |= {"snr": float(median / noise)} if noise > 0 else {}
    return found


def noise_level(pixels: Array, body: Array) -> float:
    """Standard deviation of the noise: from air (Rayleigh), or from diagonal differences where there is no air."""
    air = ~ndimage.binary_dilation(body, np.ones((1, 3, 3)), iterations=2)
    level = float(np.median(pixels[air])) / np.sqrt(2 * np.log(2)) if air.sum() > 200 else 0.0
    if level <= 0:  # the animal fills the field, or a viewer has blanked the air
        corner = pixels[:, 1:, 1:] - pixels[:, 1:, :-1] - pixels[:, :-1, 1:] + pixels[:, :-1, :-1]
        level = float(np.median(np.abs(corner[body[:, 1:, 1:]]))) / 0.6745 / 2 if body[:, 1:, 1:].any() else 0.0
    return float(level)


def training_range(pairs: Store) -> dict[str, Any]:
    """Spread of the figures over the training scans of pairs.zarr, as plain data.

    Returns
    -------
    dict
        `scans` (how many), `ratios` [[y, x], ...], `matrices` [[y, x], ...] of the low scans, and `limits`
        {figure: [smallest, largest]}.
    """
    curated = pairs.path.with_name("curated.zarr")
    ratios: list[list[int]] = []
    found: list[dict[str, Any]] = []
    for key in pairs.scans:
        chosen = pairs.read(key, "split", 1, "uint8") == SPLITS.index("train")
        if not chosen.any():
            continue
        attributes = pairs.attrs(key)
        scale, offset = (pairs.read(key, name, 1, "float32")[chosen, None, None] for name in ("scale", "offset"))
        crop = pairs.read(key, "low", 3, "float32")[chosen] * scale + offset
        parameters = (scan_attributes(curated, key) or {}).get("parameters_low", {})
        place = (attributes["ratio"], attributes["full_shape"], attributes["spacing_mm"])
        found.append(measure(crop, *place, parameters))
        ratios.append(list(attributes["ratio"]))
    limits: dict[str, list[float]] = {}
    for name in FIGURES:
        values = [figures[name] for figures in found if name in figures]
        limits |= {name: [min(values), max(values)]} if values else {}
    matrices = sorted({tuple(figures["matrix"]) for figures in found})
    distinct = sorted({tuple(ratio) for ratio in ratios})
    return {
        "scans": len(found),
        "ratios": [list(ratio) for ratio in distinct],
        "matrices": [list(matrix) for matrix in matrices],
        "limits": limits,
    }


def compare(figures: dict[str, Any], known: dict[str, Any]) -> tuple[list[list[Any]], list[str]]:
    """Hold a scan against the training scans.

    Parameters
    ----------
    figures : dict
        As `measure` gives them, with `mean_ratio`, the body's mean restored / low.
    known : dict
        As `training_range` gives it; empty if nothing is known.

    Returns
    -------
    rows, warnings : list of [what, this scan, training scans, alike], list of str
    """

    def sizes(matrix: Sequence[int]) -> str:
        return "x".join(map(str, matrix[::-1]))

    trained = [list(matrix) for matrix in known.get("matrices", [])]
    alike = not trained or list(figures["matrix"]) in trained
    rows: list[list[Any]] = [["matrix", sizes(figures["matrix"]), ", ".join(map(sizes, trained)) or "unknown", alike]]
    limits = known.get("limits", {})
    for name, (text, unit) in FIGURES.items():
        if name not in figures:
            continue
        lowest, highest = limits.get(name, (-np.inf, np.inf))
        slack = 0.01 * abs(highest) if name in limits else 0.0  # rounding in headers is no difference
        inside = bool(lowest - slack <= figures[name] <= highest + slack)
        ends = dict.fromkeys((f"{lowest:.4g}", f"{highest:.4g}"))  # one where all training scans agree
        spread = f"{' to '.join(ends)} {unit}".strip() if name in limits else "unknown"
        rows.append([text, f"{figures[name]:.4g} {unit}".strip(), spread, inside])
    warnings = [f"{what} is {here}, in the training scans {there}" for what, here, there, alike in rows if not alike]
    if not known:
        warnings.append("what the training scans were like is unknown: the checkpoint does not say it")
    if abs(figures["mean_ratio"] - 1) > 0.01:
        warnings.append(f"mean of the body restored / low is {figures['mean_ratio']:.3f}, expected 0.99 to 1.01")
    return rows, warnings


def picture(
    low: Array, restored: Array, spread: Array | None, body: Array, spacing_mm: Sequence[float], title: str
) -> bytes:
    """PNG of up to four slices of the body: low, restored, their difference, and the uncertainty if there is one."""
    from matplotlib.figure import Figure

    busy = np.flatnonzero(body.any(axis=(1, 2))) if body.any() else np.arange(len(low))
    chosen = sorted(set(busy[np.linspace(0, len(busy) - 1, 6).round().astype(int)[1:-1]].tolist()))
    top, change = float(np.quantile(low[low > 0], 0.998)), restored - low
    width = float(np.quantile(np.abs(change), 0.998)) or 1.0
    columns = [("low", low, 0.0, top, "gray"), ("restored", restored, 0.0, top, "gray")]
    columns += [("restored - low", change, -width, width, "RdBu_r")]
    columns += [] if spread is None else [("uncertainty", spread, 0.0, float(spread.max()) or 1.0, "viridis")]
    shape = spacing_mm[1] / spacing_mm[2]
    height = 3 * shape * low.shape[1] / low.shape[2] + 0.25
    figure = Figure(figsize=(3 * len(columns), height * len(chosen) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(len(chosen), len(columns), squeeze=False)
    for row, index in zip(panels, chosen, strict=True):
        for panel, (label, volume, lowest, highest, colours) in zip(row, columns, strict=True):
            panel.imshow(volume[index], colours, vmin=lowest, vmax=highest, aspect=shape, interpolation="nearest")
            panel.set_title(f"{label}, slice {index}", fontsize=8)
            panel.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def page(record: dict[str, Any], image: bytes) -> str:
    """One page of HTML that needs no other file, of a record of stage 07 and its picture."""

    def cells(*texts: object, kind: str = "td") -> str:
        return "".join(f"<{kind}>{html.escape(str(text))}</{kind}>" for text in texts)

    warned = "".join(f"<li>{html.escape(text)}</li>" for text in record["warnings"])
    warned = f"<ul class=bad>{warned}</ul>" if warned else "<p>None: the scan is like those of the training.</p>"
    rows = "".join(f"<tr{'' if row[3] else ' class=bad'}>{cells(*row[:3])}</tr>" for row in record["comparison"])
    made = "".join(f"<tr>{cells(key, value)}</tr>" for key, value in record["settings"].items())
    name, heads = html.escape(record["name"]), ("", "this scan", f"{record['training_scans'] or 'no'} training scans")
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}}td,th{{padding:.15em 1em .15em 0;
text-align:left}}.bad{{color:#b00020}}img{{max-width:100%}}</style><h1>{name}</h1>
<p>Restored by a network: detail that the low scan does not hold is what the network learnt from its training scans.</p>
<h2>Warnings</h2>{warned}<h2>Slices</h2><img alt="low, restored and their difference"
src="data:image/png;base64,{base64.b64encode(image).decode()}"><h2>This scan beside the training scans</h2>
<table><tr>{cells(*heads, kind="th")}</tr>{rows}</table><h2>How it was made</h2><table>{made}</table></html>
"""
