"""Physics of the simulated scanner: sequence, receiver, motion and accidents; arrays in, arrays out.

Apart from 00_simulate.py, which says what is scanned and where it goes: with the physics it could not be read in one
sitting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from numpy.random import default_rng

from common import Array

BREATHS = np.array([0.0, 0.5, 1.0], np.float32)  # positions of the chest, from rest to full inspiration


# ---------------------------------------------------------------- sequence and receiver


def line_order(lines: int, rare_factor: int, effective_echo: int) -> tuple[Array, Array]:
    """Echo (from 0) and shot of each phase-encode line k = -lines/2 ... lines/2 - 1.

    As on the scanner, an echo acquires a block of neighbouring lines, the block of the effective echo lies around
    k = 0, and what falls off one end of k-space is acquired at the other end by the last echoes.
    """
    shots = -(-lines // rare_factor)
    position = np.arange(lines) - lines // 2 + (2 * effective_echo - 1) * shots // 2
    return position // shots % rare_factor, position % shots


def decay(m0: Array, t2_ms: Array, spacing_ms: float, echoes: int) -> Array:
    """Signal (..., echo) of echoes 1 ... `echoes`: M0 exp(-echo spacing / T2)."""
    step = np.exp(-spacing_ms / np.asarray(t2_ms, float))
    return np.stack([m0 * step**echo for echo in range(1, echoes + 1)], axis=-1).astype(np.float32)


def coil_maps(points: list[Array], centres: Array, radius: float, seed: int) -> Array:
    """Complex sensitivity (coil, ...) of loops that lie flat on the back: 1 in a loop, 0.35 one radius below it."""
    rng, (x, y, z), maps = default_rng(seed), points, []
    for cx, cy, cz in centres:
        aside = 0.4 * ((x - cx) ** 2 + (z - cz) ** 2)  # off its axis the field of a loop falls more slowly
        size = (1 + (aside + (y - cy) ** 2) / radius**2) ** -1.5
        tilt = rng.normal(0, 0.03, 3)  # radians per mm: what shim and receiver leave
        phase = tilt[0] * x + tilt[1] * y + tilt[2] * z + 0.5 * np.arctan2(x - cx, cy - y + radius)
        maps.append(size * np.exp(1j * phase))
    return np.asarray(maps, np.complex64)


def encode(signal: Array, echo: Array, coils: Array, wanted: Array | None = None) -> Array:
    """k-space (coil, ky, kx) of a signal (y, x, echo) seen by coils (coil, y, x).

    Line ky is acquired by echo `echo[ky]`, and only where `wanted`. Lines and columns are k = -n/2 ... n/2 - 1 with
    n = len(echo): what the object has beyond them is not acquired.
    """
    n, samples = len(echo), coils.shape[1]
    wanted = np.ones(n, bool) if wanted is None else wanted
    rows = np.flatnonzero(signal[..., 0].any(axis=1))
    y = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 1)
    k = np.arange(n) - n // 2
    fourier = np.exp(-2j * np.pi / samples * np.outer(k, np.arange(samples)[y] - samples // 2)).astype(np.complex64)
    half = np.zeros((len(coils), n, samples), np.complex64)
    for number in np.unique(echo[wanted]):
        own = np.flatnonzero(wanted & (echo == number))
        half[:, own] = fourier[own] @ (coils[:, y] * signal[y, :, number])
    full = scipy.fft.fftshift(scipy.fft.fft(scipy.fft.ifftshift(half, axes=2), axis=2), axes=2)
    return np.asarray(full[:, :, (samples - n) // 2 : (samples + n) // 2])


def shifted(kspace: Array, shift: Array) -> Array:
    """The k-space of an object moved by `shift`, (2,) or per line (ky, 2): y and x as a share of the field of view."""
    n = kspace.shape[-1]
    k = np.arange(n) - n // 2
    dy, dx = np.broadcast_to(shift, (n, 2)).T
    return np.asarray(kspace * np.exp(-2j * np.pi * ((k * dy)[:, None] + np.outer(dx, k))).astype(np.complex64))


def add_noise(kspace: Array, sigma: float, samples: int, rng: np.random.Generator) -> Array:
    """White complex noise whose image has the standard deviation `sigma` per channel and component."""
    noise = rng.standard_normal((*kspace.shape, 2), np.float32).view(np.complex64)[..., 0]
    return np.asarray(kspace + noise * np.float32(sigma * samples**2 / kspace.shape[-1]))


def reconstruct(kspace: Array, samples: int) -> Array:
    """Magnitude image (y, x), root sum of squares over channels; an object of 1 gives 1; k = 0 is index n/2."""
    n = kspace.shape[-1]
    image = scipy.fft.fftshift(scipy.fft.ifft2(scipy.fft.ifftshift(kspace, axes=(1, 2))), axes=(1, 2))
    return np.asarray(np.sqrt((np.abs(image) ** 2).sum(axis=0)) * (n / samples) ** 2, np.float32)


# ---------------------------------------------------------------- motion and accidents


def breathing(shots: int, averages: int, tr_s: float, start_s: float, rate_hz: float, rng: Any) -> Array:
    """Share (shot, position) of each position of the chest in each shot; the averages of a shot follow one another."""
    wander = np.cumsum(rng.normal(0, 0.15, shots * averages))  # the rate is never constant
    cycle = (rate_hz * (start_s + tr_s * np.arange(shots * averages)) + wander) % 1
    inspired = 0.4  # of the cycle: an anaesthetised mouse rests at the end of expiration
    depth = np.where(cycle < inspired, np.sin(np.pi * cycle / inspired) ** 2, 0)
    nearest = np.abs(depth[:, None] - BREATHS).argmin(axis=1).reshape(shots, averages)
    return np.stack([(nearest == s).mean(axis=1) for s in range(len(BREATHS))], axis=1)


def moved(signal: Array, shift: Array) -> Array:
    """Signal (y, x, echo) of an object whose matter moved by `shift` (2, y, x) samples, to the nearest sample."""
    rows, columns = signal.shape[:2]
    y = np.clip(np.arange(rows)[:, None] - np.rint(shift[0]).astype(np.int32), 0, rows - 1)
    x = np.clip(np.arange(columns) - np.rint(shift[1]).astype(np.int32), 0, columns - 1)
    return np.asarray(np.take(signal.reshape(rows * columns, -1), y * columns + x, axis=0))


def spoil(kspace: Array, kind: str, shot: Array, fov_mm: float, rng: np.random.Generator) -> Array:
    """What an accident does to the k-space (coil, ky, kx) of one slice."""
    n, shots = kspace.shape[-1], int(shot.max()) + 1
    if kind == "spike":
        kspace = kspace.copy()
        for ky, kx in rng.integers(n // 6, n - n // 6, (rng.integers(1, 4), 2)):
            kspace[:, ky, kx] += np.abs(kspace).max() * rng.uniform(0.4, 1.2) * np.exp(2j * np.pi * rng.uniform())
    elif kind == "motion":
        path = np.zeros((shots, 2))
        burst = rng.integers(shots) + np.arange(max(2, int(shots * rng.uniform(0.25, 0.5))))
        path[burst % shots] = rng.normal(0, 0.8, (len(burst), 2)) / fov_mm
        kspace = shifted(kspace, path[shot])
    elif kind == "signal_loss":
        kspace = kspace * np.complex64(rng.uniform(0.05, 0.25))
    return kspace
