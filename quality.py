"""How good a slice of a pair is: measures of both scans, and a suggestion to keep or drop it with the reason.

Apart from 01_curate.py, because the measures are arrays in, numbers out, and know nothing of tables and stores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import fft, ndimage

from common import Array, Lazy, body_mask

skimage: Any = Lazy("skimage")

MEASURES = (
    *("snr_low", "snr_high", "body_fraction", "ghost_low", "ghost_high", "spike_low", "spike_high"),
    *("correlation", "mismatch", "shift_y", "shift_x"),
)
COARSE = 0.15  # cycles per pixel of the low scan: structure so large that its signal is far above the noise
FAR = 4.0  # robust standard deviations from which a slice is no neighbour to judge others by
RAYLEIGH = math.sqrt(2 * math.log(2))  # median of the magnitude of noise alone, in its standard deviations


def resized(spectrum: Array, shape: tuple[int, ...]) -> Array:
    """A spectrum (slice, ky, kx), frequency 0 first, cut or filled with zeros to another matrix (y, x)."""
    result = np.zeros((len(spectrum), *shape), spectrum.dtype)
    parts = [(o // 2, n // 2, min(o, n)) for o, n in zip(spectrum.shape[1:], shape, strict=True)]
    old, new = ([slice(part[k] - part[2] // 2, part[k] - part[2] // 2 + part[2]) for part in parts] for k in (0, 1))
    result[:, new[0], new[1]] = fft.fftshift(spectrum, axes=(1, 2))[:, old[0], old[1]]
    return np.asarray(fft.ifftshift(result, axes=(1, 2)))


def to_low_grid(high: Array, shape: tuple[int, ...]) -> Array:
    """High images (slice, y, x) as a scan of the low matrix (y, x) would have them: the centre of their k-space."""
    scale = math.prod(shape) / high[0].size
    return np.asarray(fft.ifft2(resized(fft.fft2(high), shape)).real * scale, np.float32)


def frequency(shape: tuple[int, ...]) -> Array:
    """Distance from the centre of k-space, cycles per pixel, in the order of an FFT (y, x)."""
    return np.asarray(np.hypot(fft.fftfreq(shape[0])[:, None], fft.fftfreq(shape[1])))


def noise_sigma(stack: Array, air: Array) -> float:
    """Standard deviation of a scan's noise: from its air (a mask), where Rayleigh's law holds, else from k-space."""
    if air.mean() > 0.01 and stack[air].any():
        return float(np.median(stack[air])) / RAYLEIGH or float(stack[air].mean())
    corner = np.abs(fft.fft2(stack)[:, frequency(stack.shape[1:]) > 0.5]) ** 2
    return math.sqrt(np.median(corner) / math.log(2) / stack[0].size) or 1e-6 * float(stack.max())


def agreement(low: Array, high: Array, power: list[float]) -> tuple[Array, Array, Array]:
    """Signal to noise of both spectra (slice, k) and their correlation, freed from what noise takes from it."""
    count = low.shape[1]
    noise = [count * p for p in power]
    signal = [np.maximum((np.abs(f) ** 2).sum(axis=1) - n, 0.05 * n) for f, n in zip((low, high), noise, strict=True)]
    gain = np.maximum((low * high.conj()).sum(axis=1).real / signal[1], 0)
    rest = (np.abs(low - gain[:, None] * high) ** 2).sum(axis=1) - noise[0] - gain**2 * noise[1]
    snr = [np.sqrt(s / n) for s, n in zip(signal, noise, strict=True)]
    return snr[0], snr[1], np.sqrt(np.clip(1 - rest / signal[0], 0, 1))


def spike_level(stack: Array, other: Array) -> Array:
    """Highest peak of each image's k-space (slice,) over its surroundings, and over the other scan's k-space there."""
    size = np.abs(fft.fft2(stack))
    usual = np.broadcast_to(np.median(size, axis=(1, 2), keepdims=True) + 1e-30, size.shape)
    for shape in ((1, 5, 5), (1, 9, 1), (1, 1, 9)):  # edges of the field of view draw lines along the axes of k-space
        usual = np.maximum(usual, ndimage.median_filter(size, shape, mode="wrap"))
    expected = resized(np.abs(fft.fft2(other)), stack.shape[1:])
    k = frequency(stack.shape[1:])
    coarse = (k > 0) & (k < COARSE * min(1, other.shape[1] / stack.shape[1]))
    power = [(f[:, coarse] ** 2).sum(axis=1)[:, None, None] for f in (size, expected)]
    expected = ndimage.maximum_filter(
        expected * np.sqrt(power[0] / np.maximum(power[1], 1e-6 * power[0] + 1e-30)), (1, 3, 3), mode="wrap"
    )
    peak = size / np.maximum(usual, expected)
    return np.asarray(peak[:, k > 0].max(axis=1))


def ghost_level(stack: Array, air: Array, phase_axis: str, sigma: float) -> Array:
    """Air in line with the body along the phase axis, in units of noise alone (slice,), so that 1 is clean."""
    line = air & (~air).any(axis=1 if phase_axis == "y" else 2, keepdims=True)
    enough = line.mean(axis=(1, 2)) > 0.01
    masks = np.where(enough[:, None, None], line, air)
    found = [np.median(image[m]) if m.sum() > 50 else RAYLEIGH * sigma for image, m in zip(stack, masks, strict=True)]
    return np.array(found) / (RAYLEIGH * sigma)


def shifts(low: Array, high: Array, body: Array) -> Array:
    """Place of the high images relative to the low ones, (slice, 2) in pixels (y, x) of their common grid."""
    found = np.zeros((len(low), 2))
    for i, (one, other, mask) in enumerate(zip(low, high, body, strict=True)):
        inside = ndimage.binary_dilation(mask, iterations=2)
        if (one * inside).any() and (other * inside).any():
            register = skimage.registration.phase_cross_correlation
            found[i] = register(other * inside, one * inside, upsample_factor=20, normalization=None)[0]
    return found


def structure(stack: Array) -> Array:
    """What is finer than the shading of a coil and coarser than noise, on the low grid."""
    return np.asarray(ndimage.gaussian_filter(stack, (0, 1, 1)) - ndimage.gaussian_filter(stack, (0, 4, 4)))


def local_mismatch(low: Array, coarse: Array, body: Array, sigma: tuple[float, float], shift: Array) -> Array:
    """Share of the local structure that is not common to both scans, the median over each slice's body (slice,).

    The median, because an animal that moved differs everywhere, and bowels only where they are. Both scans on the low
    grid; `sigma` is the noise of each there, `shift` (y, x) in pixels the place of `coarse` relative to `low`.
    """
    point = np.zeros((1, 81, 81))
    point[0, 40, 40] = 1
    left = float(np.square(structure(point)).sum())  # share of the variance of white noise
    one, other = structure(low), structure(ndimage.shift(coarse, (0, *-shift), order=3, mode="nearest"))
    noise = [left * s**2 for s in sigma]
    common, power = ((one * other * body).sum(axis=(1, 2)), ((other**2 - noise[1]) * body).sum(axis=(1, 2)))
    gain = (common / np.maximum(power, 1e-9 * np.square(other).sum() + 1e-30))[:, None, None]
    rest, shown = (ndimage.gaussian_filter(np.square(image), (0, 3, 3)) for image in (one - gain * other, other))
    rest, shown = rest - noise[0] - gain**2 * noise[1], gain**2 * (shown - noise[1])
    found = np.full(len(low), np.nan)
    for i, where in enumerate(body & (shown > 0.7 * noise[0])):
        if where.sum() > 60:
            found[i] = np.median(rest[i][where] / (shown[i][where] + noise[0]))
    usual = np.nanmedian(found) if np.isfinite(found).any() else 0.0  # of slices that show too little to tell
    return np.asarray(np.maximum(np.nan_to_num(found, nan=usual), 0))


def measure(low: Array, high: Array, phase_low: str, phase_high: str) -> dict[str, list[float]]:
    """Measures of every slice of a pair of stacks (slice, y, x); `phase_*` is the image axis of phase encoding.

    ``snr`` is that of the coarse structure, ``body_fraction`` the share of pixels that show signal in the better scan,
    ``correlation`` that of the coarse structure of both scans, ``mismatch`` the share of the local structure that is
    not common to both, ``shift`` in pixels of the high grid.
    """
    ratio = np.array(high.shape[1:]) // low.shape[1:]
    coarse, body = to_low_grid(high, low.shape[1:]), body_mask(low)
    result: dict[str, Array] = {}
    power, shown, noise = [], [], []
    for name, stack, other, phase in (("low", low, high, phase_low), ("high", high, low, phase_high)):
        zoom, on_grid = (ratio, coarse) if name == "high" else (ratio // ratio, low)
        air = ~ndimage.binary_dilation(body, np.ones((1, 3, 3)), iterations=max(low.shape[1] // 40, 1))
        air = air.repeat(zoom[0], 1).repeat(zoom[1], 2)
        sigma = noise_sigma(stack, air)
        result[f"ghost_{name}"] = ghost_level(stack, air, phase, sigma)
        result[f"spike_{name}"] = spike_level(stack, other)
        noise.append(sigma / math.sqrt(zoom.prod()))  # on the low grid
        # Power in a coefficient of k-space: magnitudes of noise alone (air) have 0.43 of its variance.
        power.append(low[0].size * sigma**2 * (0.43 + 0.57 * body.mean()) / zoom.prod())
        local = ndimage.gaussian_filter(on_grid, (0, 1, 1)) / sigma
        shown.append((np.sqrt(np.maximum(local**2 - math.pi / 2, 0)) > 3).mean(axis=(1, 2)))  # pi / 2: noise alone
    result["body_fraction"] = np.maximum(*shown)
    band = (frequency(low.shape[1:]) > 0) & (frequency(low.shape[1:]) < COARSE)
    spectra = [fft.fft2(stack)[:, band] for stack in (low, coarse)]
    snr_low, snr_high, correlation = agreement(spectra[0], spectra[1], power)
    result |= {"snr_low": snr_low, "snr_high": snr_high, "correlation": correlation}
    moved = shifts(low, coarse, body)
    result["mismatch"] = local_mismatch(low, coarse, body, (noise[0], noise[1]), np.median(moved, axis=0))
    result["shift_y"], result["shift_x"] = (moved * ratio).T
    return {name: [float(f"{value:.6g}") for value in result[name]] for name in MEASURES}


def outliers(values: Array, good: Array, usual: float, most: float, both: bool = False) -> Array:
    """How far each slice (slice,) is above its neighbours among the good ones, in the scan's own robust spread.

    Neighbours, because signal and motion change along the animal; `usual` is a spread that means nothing, `most` the
    largest that a scan may claim, were many of its slices spoiled. What is far above, or with `both` far below, is no
    neighbour to judge the others by.
    """
    found, left = np.zeros(len(values)), np.ones(len(values), bool)
    while left.any():
        above = np.zeros(len(values))
        for i, value in enumerate(values):
            near = [k for k in range(max(i - 3, 0), min(i + 4, len(values))) if k != i and good[k] and left[k]]
            above[i] = value - np.median(values[near]) if near else 0
        spread = 1.4826 * np.median(np.abs(above[good & left])) if (good & left).any() else 0
        found[left] = above[left] / min(max(spread, usual), most)
        off = np.where(good & left, np.abs(found) if both else found, 0)
        worst = int(np.argmax(off))
        if off[worst] < FAR:
            break
        left[worst] = False
    return found


def scores(numbers: dict[str, list[float]]) -> dict[str, Array]:
    """By reason, how far each slice (slice,) is off its neighbours, in robust standard deviations of its scan."""
    m = {name: np.array(values) for name, values in numbers.items()}
    size = np.log(m["body_fraction"] + 1e-4)
    good = m["body_fraction"] >= min(0.02, m["body_fraction"].max())  # the others tell nothing of the scan
    balance = np.log(m["snr_low"] / m["snr_high"])
    coarse = np.log(1 - m["correlation"] ** 2 + 0.003)
    rules: dict[str, tuple[Any, ...]] = {
        "the scans disagree": (np.log(m["mismatch"] + 0.1), 0.15, 0.3),
        "the scans disagree in coarse structure": (coarse, 0.2, 0.4),
        "spike in low": (np.log(m["spike_low"] + 1e-3), 0.1, math.inf),
        "spike in high": (np.log(m["spike_high"] + 1e-3), 0.1, math.inf),
        "ghosts or noise in low": (np.log(m["ghost_low"] + 1e-3), 0.06, math.inf),
        "ghosts or noise in high": (np.log(m["ghost_high"] + 1e-3), 0.06, math.inf),
        "signal lost in low": (-balance, 0.2, 0.4, True),
        "signal lost in high": (balance, 0.2, 0.4, True),
    }
    shown = np.clip((size - math.log(0.01)) / math.log(2), 0, 1)  # a slice of mere noise is neither moved nor spiked
    found = {reason: shown * outliers(rule[0], good, *rule[1:]) for reason, rule in rules.items()}
    return found | {"hardly any body": 3 + (math.log(0.02) - size) / 0.2}


def suggest(numbers: dict[str, list[float]], empty: dict[str, Array], threshold: float) -> tuple[list[str], list[str]]:
    """Suggestion, keep or drop, for every slice, and the reason for dropping it; `empty` holds reasons known before."""
    reasons: list[list[str]] = [[] for _ in numbers["correlation"]]
    for text, flags in empty.items():
        for i in np.flatnonzero(flags):
            reasons[i].append(text)
    for text, values in scores(numbers).items():
        for i in np.flatnonzero(values > threshold):
            reasons[i].append(text)
    return ["drop" if found else "keep" for found in reasons], ["; ".join(found) for found in reasons]
