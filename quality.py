"""How good a slice of a pair is: measures of both scans, and a suggestion to keep or drop it with the reason.

Apart from 01_curate.py, because the measures are arrays in, numbers out, and know nothing of tables and stores.
"""

from __future__ import annotations

import math
from typing import Any

import lazy_loader as lazy
import numpy as np
from scipy import fft, ndimage

from common import Array, body_mask

skimage: Any = lazy.load("skimage")

MEASURES = (
    *("snr_low", "snr_high", "body_fraction", "ghost_low", "ghost_high", "spike_low", "spike_high"),
    *("correlation", "shift_y", "shift_x"),
)
COARSE = 0.06  # cycles per pixel of the low scan: structure so large that its signal is far above the noise
RAYLEIGH = math.sqrt(2 * math.log(2))  # median of the magnitude of noise alone, in its standard deviations


def to_low_grid(high: Array, shape: tuple[int, ...]) -> Array:
    """High images (slice, y, x) as a scan of the low matrix (y, x) would have them: the centre of their k-space."""
    ny, nx = shape
    spectrum = fft.fftshift(fft.fft2(high), axes=(1, 2))
    y, x = (high.shape[1] - ny) // 2, (high.shape[2] - nx) // 2
    centre = fft.ifftshift(spectrum[:, y : y + ny, x : x + nx], axes=(1, 2))
    return np.asarray(fft.ifft2(centre).real * (ny * nx / high[0].size), np.float32)


def frequency(shape: tuple[int, ...]) -> Array:
    """Distance from the centre of k-space, cycles per pixel, in the order of an FFT (y, x)."""
    return np.asarray(np.hypot(fft.fftfreq(shape[0])[:, None], fft.fftfreq(shape[1])))


def noise_power(spectrum: Array) -> float:
    """Power of noise in a coefficient of a scan's spectra (slice, y, x), from the corners of k-space."""
    corner = np.abs(spectrum[:, frequency(spectrum.shape[1:]) > 0.5]) ** 2
    return float(np.median(corner)) / math.log(2)


def noise_sigma(stack: Array, air: Array) -> float:
    """Standard deviation of a scan's noise: from its air (a mask), where Rayleigh's law holds, else from k-space."""
    if air.mean() > 0.01 and stack[air].any():
        return float(np.median(stack[air])) / RAYLEIGH or float(stack[air].mean())
    return math.sqrt(noise_power(fft.fft2(stack)) / stack[0].size) or 1e-6 * float(stack.max())


def agreement(low: Array, high: Array, power: tuple[float, float]) -> tuple[Array, Array, Array]:
    """Signal to noise of both spectra (slice, k) and their correlation, freed from what noise takes from it."""
    count = low.shape[1]
    noise = [count * p for p in power]
    signal = [np.maximum((np.abs(f) ** 2).sum(axis=1) - n, 0.05 * n) for f, n in zip((low, high), noise, strict=True)]
    gain = np.maximum((low * high.conj()).sum(axis=1).real / signal[1], 0)
    rest = (np.abs(low - gain[:, None] * high) ** 2).sum(axis=1) - noise[0] - gain**2 * noise[1]
    snr = [np.sqrt(s / n) for s, n in zip(signal, noise, strict=True)]
    return snr[0], snr[1], np.sqrt(np.clip(1 - rest / signal[0], 0, 1))


def spike_level(stack: Array) -> Array:
    """Highest peak of each image's own k-space over what lies around it (slice,), away from the centre and axes."""
    size = np.abs(fft.fft2(stack))
    around = ndimage.median_filter(size, (1, 5, 5), mode="wrap")
    peak = size / np.maximum(around, np.median(size, axis=(1, 2), keepdims=True) + 1e-30)
    peak *= frequency(stack.shape[1:]) > 0.04
    return np.asarray(peak[:, 1:, 1:].max(axis=(1, 2)))


def ghost_level(stack: Array, body: Array, air: Array, phase_axis: str, sigma: float) -> Array:
    """Signal of the air in line with the body along the phase axis, above noise, per signal of the body (slice,)."""
    line = air & (~air).any(axis=1 if phase_axis == "y" else 2, keepdims=True)
    power = [float(np.mean(image[m] ** 2)) if m.sum() > 50 else 0.0 for image, m in zip(stack, line, strict=True)]
    inside = [float(np.mean(image[m])) if m.any() else math.inf for image, m in zip(stack, body, strict=True)]
    return np.sqrt(np.maximum(np.array(power) - 2 * sigma**2, 0)) / np.maximum(inside, sigma)


def shifts(low: Array, high: Array, body: Array) -> Array:
    """Place of the high images relative to the low ones, (slice, 2) in pixels (y, x) of their common grid."""
    found = np.zeros((len(low), 2))
    for i, (one, other, mask) in enumerate(zip(low, high, body, strict=True)):
        inside = ndimage.binary_dilation(mask, iterations=2)
        if (one * inside).any() and (other * inside).any():
            register = skimage.registration.phase_cross_correlation
            found[i] = register(other * inside, one * inside, upsample_factor=20, normalization=None)[0]
    return found


def measure(low: Array, high: Array, phase_low: str, phase_high: str) -> dict[str, list[float]]:
    """Measures of every slice of a pair of stacks (slice, y, x); `phase_*` is the image axis of phase encoding.

    ``snr`` is that of the coarse structure, ``body_fraction`` the share of pixels that show signal in the better scan,
    ``correlation`` that of the coarse structure of both scans, ``shift`` in pixels of the high grid.
    """
    ratio = np.array(high.shape[1:]) // low.shape[1:]
    coarse, body = to_low_grid(high, low.shape[1:]), body_mask(low)
    result: dict[str, Array] = {}
    sigmas = {}
    for name, stack, phase, zoom in (("low", low, phase_low, (1, 1)), ("high", high, phase_high, ratio)):
        mask = body.repeat(zoom[0], 1).repeat(zoom[1], 2)
        air = ~ndimage.binary_dilation(mask, np.ones((1, 3, 3)), iterations=max(stack.shape[1] // 40, 1))
        sigmas[name] = noise_sigma(stack, air)
        result[f"ghost_{name}"] = ghost_level(stack, mask, air, phase, sigmas[name])
        result[f"spike_{name}"] = spike_level(stack)
    local = [
        ndimage.gaussian_filter(stack, (0, 1, 1)) / sigmas[name] for name, stack in (("low", low), ("high", coarse))
    ]
    shown = [np.sqrt(np.maximum(mean**2 - math.pi / 2, 0)) > 3 for mean in local]  # pi / 2: what noise alone gives
    result["body_fraction"] = np.max([mask.mean(axis=(1, 2)) for mask in shown], axis=0)

    # Magnitudes of noise alone vary with 0.43 of its variance; the coarse image of the high scan averages its noise.
    pixels, spectra = low[0].size, [fft.fft2(low), fft.fft2(coarse)]
    floors = (0.43 * pixels * sigmas["low"] ** 2, 0.43 * pixels * sigmas["high"] ** 2 / ratio.prod())
    power = (
        max(noise_power(spectra[0]), floors[0]),
        max(noise_power(spectra[1]), floors[1]),
    )  # k-space may be zero-filled
    band = frequency(low.shape[1:]) < COARSE
    band[0, 0] = False
    snr_low, snr_high, correlation = agreement(spectra[0][:, band], spectra[1][:, band], power)
    result |= {"snr_low": snr_low, "snr_high": snr_high, "correlation": correlation}
    result["shift_y"], result["shift_x"] = (shifts(low, coarse, body) * ratio).T
    return {name: [float(f"{value:.6g}") for value in result[name]] for name in MEASURES}


def outliers(values: Array, good: Array, usual: float) -> Array:
    """Robust standard deviations above the good slices of the scan; `usual` is a spread that means nothing."""
    middle = np.median(values[good])
    return np.asarray((values - middle) / max(1.4826 * np.median(np.abs(values[good] - middle)), usual))


def scores(numbers: dict[str, list[float]]) -> dict[str, Array]:
    """By reason, how far each slice (slice,) is off its scan's own, in robust standard deviations."""
    m = {name: np.array(values) for name, values in numbers.items()}
    size = np.log(m["body_fraction"] + 1e-4)
    good = size > np.median(size) - 3  # slices that show next to nothing tell nothing of the others
    balance = np.log(m["snr_low"] / m["snr_high"])
    rules = {
        "the two scans disagree": (np.log(1 - m["correlation"] ** 2 + 0.003), 0.15),
        "spike in low": (np.log(m["spike_low"] + 1e-3), 0.1),
        "spike in high": (np.log(m["spike_high"] + 1e-3), 0.1),
        "signal lost in low": (-balance, 0.15),
        "signal lost in high": (balance, 0.15),
    }
    shown = np.clip((size - math.log(0.01)) / math.log(2), 0, 1)  # what is made of noise is neither moved nor spiked
    found = {reason: shown * outliers(values, good, usual) for reason, (values, usual) in rules.items()}
    return found | {"hardly any body": 4 + (math.log(0.02) - size) / 0.2}


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
