"""Slice quality: every kind of fault is found, named, and told from what is usual in a scan."""

from __future__ import annotations

import numpy as np
import pytest

import quality

SLICES, HIGH, LOW = 12, 96, 48


def truth(seed: int = 0) -> np.ndarray:
    """Complex k-space (slice, y, x), centre in the middle, of a body with inner structure that changes along it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    stack = np.zeros((SLICES, HIGH, HIGH))
    blobs = rng.uniform(-0.5, 0.5, (40, 2)), rng.uniform(0.03, 0.12, 40), rng.uniform(-0.5, 0.8, 40)
    for i in range(SLICES):
        body = (x / 0.5) ** 2 + (y / (0.55 + 0.01 * i)) ** 2 < 1
        inner = sum(
            a * np.exp(-((x - p[0]) ** 2 + (y - p[1] - 0.01 * i) ** 2) / s**2) for p, s, a in zip(*blobs, strict=True)
        )
        stack[i] = 1000 * body * (1 + inner)
    return np.fft.fftshift(np.fft.fft2(stack), axes=(1, 2))


def image(kspace: np.ndarray, size: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude images of the central part of k-space with noise."""
    first = (kspace.shape[1] - size) // 2
    part = np.fft.ifftshift(kspace[:, first : first + size, first : first + size], axes=(1, 2))
    picture = np.fft.ifft2(part) * (size / kspace.shape[1]) ** 2
    noise = rng.normal(0, sigma, (2, *picture.shape))
    return np.abs(picture + noise[0] + 1j * noise[1]).astype(np.float32)


def pair(spoil=None, which: str = "low", where: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Low and high stack; `spoil` changes the k-space of one slice of one of them."""
    rng = np.random.default_rng(seed + 100)
    stacks = []
    for name, size in (("low", LOW), ("high", HIGH)):
        kspace = truth(seed)
        if name == which and spoil is not None:
            kspace[where] = spoil(kspace[where], rng)
        stacks.append(image(kspace, size, 50, rng))
    return stacks[0], stacks[1]


def spike(kspace: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kspace = kspace.copy()
    kspace[62, 31] += np.abs(kspace).max()
    return kspace


def motion(kspace: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    k = np.arange(HIGH) - HIGH // 2
    shift = np.where(np.arange(HIGH) % 7 < 3, rng.normal(0, 0.04, HIGH), 0)
    return kspace * np.exp(-2j * np.pi * k * shift)[:, None]


def loss(kspace: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.15 * kspace


def nothing(kspace: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0 * kspace


def judge(low: np.ndarray, high: np.ndarray, threshold: float = 2.5) -> tuple[list[str], list[str]]:
    return quality.suggest(quality.measure(low, high, "y", "y"), {}, threshold)


@pytest.mark.parametrize("which", ["low", "high"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(spike, "spike in {}"), (motion, "the scans disagree"), (loss, "signal lost in {}")],
)
@pytest.mark.parametrize("where", [0, 5])
def test_fault_of_one_slice_is_found_and_named(fault, reason, which, where):
    suggestion, reasons = judge(*pair(fault, which, where))
    assert suggestion[where] == "drop"
    assert reason.format(which) in reasons[where]
    assert suggestion.count("drop") <= 2


def test_clean_scan_keeps_its_slices():
    kept = [judge(*pair(seed=seed))[0].count("keep") for seed in range(4)]
    assert sum(kept) >= 4 * SLICES - 2


def test_slice_without_body_is_dropped_and_does_not_upset_the_others():
    low, high = pair()
    rng = np.random.default_rng(3)
    for stack, size in ((low, LOW), (high, HIGH)):
        stack[-4:] = image(0 * truth()[-4:], size, 50, rng)
    suggestion, reasons = judge(low, high)
    assert suggestion[-4:] == ["drop"] * 4
    assert all("hardly any body" in reason for reason in reasons[-4:])
    assert suggestion[:-4].count("drop") <= 1


def test_scale_of_either_scan_does_not_matter():
    low, high = pair(motion)
    one, other = (quality.measure(*stacks, "y", "y") for stacks in ((low, high), (7 * low, 0.01 * high)))
    for name in quality.MEASURES:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-3, atol=1e-3)


def test_shift_is_that_of_the_high_scan_in_its_own_pixels():
    k = (np.arange(HIGH) - HIGH // 2) / HIGH
    moved = truth() * np.exp(-2j * np.pi * (1.5 * k[:, None] - 0.75 * k))
    rng = np.random.default_rng(1)
    measures = quality.measure(image(truth(), LOW, 20, rng), image(moved, HIGH, 20, rng), "y", "y")
    assert np.median(measures["shift_y"]) == pytest.approx(1.5, abs=0.15)
    assert np.median(measures["shift_x"]) == pytest.approx(-0.75, abs=0.15)


def test_signal_to_noise_follows_the_noise():
    rng = np.random.default_rng(1)
    high = image(truth(), HIGH, 30, rng)
    snr = [np.median(quality.measure(image(truth(), LOW, s, rng), high, "y", "y")["snr_low"]) for s in (20, 40)]
    assert snr[0] / snr[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_ghosts_are_looked_for_along_the_phase_axis(axis):
    """A replica of the body half a field of view away along one axis lies in air of that axis only."""
    low, high = pair()
    ghost = np.roll(low[4], LOW // 2, axis=0 if axis == "y" else 1)
    low[4] = np.hypot(low[4], 0.12 * ghost)
    along = quality.measure(low, high, axis, axis)["ghost_low"]
    across = quality.measure(low, high, "xy"["yx".index(axis)], axis)["ghost_low"]
    assert along[4] > 1.2 * np.median(along)
    assert across[4] < along[4]
    assert np.median(along) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("shape", [(9, 15), (10, 14), (15, 10)])
def test_low_grid_of_any_size_takes_the_centre_of_k_space(shape):
    """A band-limited image of twice the matrix, sampled at every second pixel, is the low image."""
    rng = np.random.default_rng(0)
    ny, nx = (2 * n for n in shape)
    y, x = np.mgrid[:ny, :nx]
    waves = [(rng.integers(0, 4), rng.integers(0, 4), rng.uniform(0, 6)) for _ in range(5)]
    stack = 10 + sum(np.cos(2 * np.pi * (a * y / ny + b * x / nx) + c) for a, b, c in waves)[None]
    np.testing.assert_allclose(quality.to_low_grid(stack, shape), stack[:, ::2, ::2], rtol=1e-5)


def test_scans_without_air_or_with_zero_filled_k_space_are_judged_too():
    rng = np.random.default_rng(2)
    low, high = pair(spike, "high")
    for crop in (slice(16, 32), slice(None)):
        inner = low[:, crop, crop]
        outer = high[:, 2 * (crop.start or 0) : 2 * (crop.stop or LOW), 2 * (crop.start or 0) : 2 * (crop.stop or LOW)]
        assert all(np.isfinite(v).all() for v in quality.measure(inner, outer, "y", "y").values())
    part = truth()
    part[:, :20], part[:, -20:] = 0, 0
    filled = image(part, HIGH, 0, rng) + rng.normal(0, 1e-3, high.shape).astype(np.float32)
    assert judge(low, np.abs(filled))[0].count("drop") <= 3


def test_masked_background_and_constant_slices_give_numbers():
    low, high = pair()
    low[low < 300], high[high < 300] = 0, 0
    low[3] = 7
    measures = quality.measure(low, high, "y", "y")
    assert all(np.isfinite(values).all() for values in measures.values())
    suggestion, _ = quality.suggest(measures, {"low is empty": np.arange(SLICES) == 3}, 3.0)
    assert suggestion[3] == "drop"


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_few_slices(slices):
    low, high = pair()
    suggestion, _ = judge(low[:slices], high[:slices])
    assert suggestion == ["keep"] * slices


def test_higher_threshold_drops_no_more():
    low, high = pair(motion)
    dropped = [judge(low, high, threshold)[0].count("drop") for threshold in (1.0, 2.0, 3.0, 5.0, 1e9)]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[-1] == 0


def test_scan_that_lost_the_signal_of_many_slices_does_not_pass_for_usual():
    low, high = pair()
    lost = [2, 3, 4, 7, 9]
    low[lost] *= 0.1
    low[lost] += np.abs(np.random.default_rng(0).normal(0, 50, low[lost].shape)).astype(np.float32)
    suggestion, reasons = judge(low, high)
    assert [i for i, found in enumerate(suggestion) if found == "drop"] == lost
    assert all("signal lost in low" in reasons[i] for i in lost)


def test_what_moved_everywhere_is_told_from_what_changed_in_one_place():
    low, high = pair()
    usual = quality.measure(low, high, "y", "y")["mismatch"]
    moved, _ = pair(motion)
    assert quality.measure(moved, high, "y", "y")["mismatch"][5] > 0.1 + usual[5]
    low[5, 22:26, 22:26] = 2 * low[5, 22:26, 22:26]  # another loop of the bowel
    assert quality.measure(low, high, "y", "y")["mismatch"][5] < 0.03 + usual[5]


def test_spoiled_neighbours_do_not_vouch_for_each_other():
    spoiled = np.arange(30) // 4 == 3
    found = []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(0, 0.1, 30) + 1.5 * spoiled
        found.append(quality.outliers(values, np.ones(30, bool), 0.15, 0.3) > 2.5)
    assert np.mean(found, axis=0)[spoiled].mean() > 0.97
    assert np.mean(found, axis=0)[~spoiled].mean() < 0.01
