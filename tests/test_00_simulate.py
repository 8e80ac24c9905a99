"""The simulated scanner against closed forms, NumPy's FFT, a real scanner's line order and independent decoders."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.random import SeedSequence, default_rng

import anatomy
from common import InputError, open_truth
from paravision_writer import PLANES, Scan, session_of, write_scan_folder

simulate = importlib.import_module("00_simulate")
Config = simulate.Config
REPO = Path(__file__).resolve().parents[1]
BRUKER = REPO.parent / "shared" / "bruker"
TINY = Config(
    subjects=2,
    regions=("TA",),
    planes=("axial",),
    lego=False,
    slices=2,
    slice_distance_mm=4.0,
    matrix_high=64,
    matrix_low=32,
    workers=1,
    seed=3,
)
DATE = datetime.datetime(2024, 1, 8)
ONES = np.ones((1, 600, 600), np.complex64)


def tree_digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def options(cfg: Config) -> list[str]:
    """The command line that gives a config."""
    words = []
    for name, value in vars(cfg).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *(value if isinstance(value, tuple) else [str(value)])]
    return words


def scan_of(plane: str, matrix: int, averages: int, slices: int, distance: float = 4.0) -> Scan:
    seconds, lines = simulate.scan_time(TINY, matrix, averages)
    return Scan(1, "scan", plane, matrix, averages, slices, distance, np.zeros(3), DATE, seconds, lines)


def setup_of(cfg: Config, seed: int = 0) -> object:
    mouse = anatomy.Mouse(SeedSequence([seed, 5]))
    return simulate.Setup(mouse, np.array([[0.0, 12.0, 0.0]]), 1, cfg.noise, 1.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    assert simulate.run(dataclasses.replace(TINY, root=root)) == {"subjects": 2, "scans": 2}
    return root


@pytest.fixture(scope="module")
def quiet() -> tuple[list[np.ndarray], dict[str, np.ndarray], dict[str, object]]:
    """A pair without motion or accidents, with little in its corners but noise."""
    cfg = dataclasses.replace(TINY, motion=False, spoiled_fraction=0.0, matrix_high=128, matrix_low=64, slices=4)
    scans = tuple(scan_of("axial", n, a, 4) for n, a in ((128, 5), (64, 1)))
    return simulate.scan_pair(cfg, setup_of(cfg), scans, "HT", default_rng(2))


# ---------------------------------------------------------------- sequence


@pytest.mark.parametrize(("lines", "shots"), [(150, 19), (300, 38), (32, 4), (64, 8)])
def test_every_line_is_acquired_once_and_the_centre_at_the_effective_echo(lines: int, shots: int) -> None:
    echo, shot = simulate.line_order(lines, 8, 4)
    assert len(set(zip(echo.tolist(), shot.tolist(), strict=True))) == lines
    assert echo[lines // 2] == 3
    assert set(echo) == set(range(8))
    assert shot.max() + 1 == shots


def test_scan_times_are_the_reports() -> None:
    assert simulate.scan_time(Config(), 150, 1)[0] == 76
    assert simulate.scan_time(Config(), 300, 5)[0] == 760


@pytest.mark.real
def test_line_order_is_the_real_scanners() -> None:
    method = BRUKER / "phantom_letters_rare_pv601_7T" / "study" / "6" / "method"
    if not method.is_file():
        pytest.skip(f"{method} is not there")
    text = method.read_text(encoding="latin-1")
    real = [int(v) for v in re.search(r"PVM_EncSteps1=\( 160 \)\n([-\d\s]+)", text).group(1).split()]
    assert "PVM_RareFactor=8" in text
    cfg = Config(te_ms=35.0, echo_spacing_ms=35 / 3)  # the third echo
    assert simulate.scan_time(cfg, 160, 2)[1].tolist() == real


def test_signal_follows_the_spin_echo_equation() -> None:
    signal = simulate.decay(np.array([0.8]), np.array([24.0]), 9.275, 8)
    assert signal[0] == pytest.approx([0.8 * np.exp(-9.275 * e / 24) for e in range(1, 9)], rel=1e-6)


def test_large_uniform_object_shows_the_signal_at_the_effective_echo_time() -> None:
    y, x = np.mgrid[-300:300, -300:300]
    disc = (np.hypot(y, x) < 200).astype(float)
    signal = disc[..., None] * simulate.decay(np.array(1.0), np.array(45.0), 9.275, 8)
    echo, _ = simulate.line_order(300, 8, 4)
    image = simulate.reconstruct(simulate.encode(signal, echo, ONES), 600)
    assert image[120:180, 120:180].mean() == pytest.approx(np.exp(-37.1 / 45), rel=0.01)


def test_encoding_is_the_centre_of_the_fft() -> None:
    rng = default_rng(0)
    image = rng.uniform(size=(128, 128)) * (np.hypot(*np.mgrid[-64:64, -64:64]) < 50)
    coil = np.exp(1j * rng.uniform(0, 6, (2, 128, 128)))
    kspace = simulate.encode(image[..., None].astype(np.float32), np.zeros(64, int), coil.astype(np.complex64))
    full = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image * coil, axes=(1, 2))), axes=(1, 2))
    assert np.abs(kspace - full[:, 32:96, 32:96]).max() < 1e-5 * np.abs(full).max()


def test_low_kspace_is_the_centre_of_the_high_one_without_decay() -> None:
    cfg = dataclasses.replace(TINY, motion=False)
    part = simulate.mouse_slice(cfg, anatomy.Mouse(SeedSequence(1)), np.eye(3), np.array(anatomy.REGIONS["TA"]))
    coils = np.ones((1, cfg.samples, cfg.samples), np.complex64)
    high, low = (simulate.encode(part.signal[0], np.zeros(n, int), coils) for n in (64, 32))
    assert np.abs(high[:, 16:48, 16:48] - low).max() < 1e-6 * np.abs(high).max()


def test_pixel_j_of_the_low_image_lies_on_pixel_2j_of_the_high_one() -> None:
    signal = np.zeros((600, 600, 1), np.float32)
    signal[4 * 31, 4 * 92] = 1  # a low pixel is four samples
    for n, step in ((150, 1), (300, 2)):
        image = simulate.reconstruct(simulate.encode(signal, np.zeros(n, int), ONES), 600)
        assert np.unravel_index(image.argmax(), image.shape) == (31 * step, 92 * step)


def point_spread_width(t2_ms: float, n: int = 150, finer: int = 64) -> float:
    """Full width at half maximum along y, in pixels, of a point imaged by the scanner."""
    echo, _ = simulate.line_order(n, 8, 4)
    signal = np.zeros((600, 600, 8), np.float32)
    signal[300, 300] = np.exp(-(np.arange(1, 9) - 4) * 9.275 / t2_ms)
    line = simulate.encode(signal, echo, ONES)[0, :, n // 2]
    padded = np.zeros(n * finer, complex)
    padded[n * finer // 2 - n // 2 : n * finer // 2 + n // 2] = line
    spread = np.abs(np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(padded))))
    above = np.flatnonzero(spread > spread.max() / 2)
    return (above[-1] - above[0] + 1) / finer


def test_width_of_the_point_spread_grows_with_decay() -> None:
    # A full window gives 1.207 pixels. With decay the width follows from the same sum in closed form: line k of
    # weight w(k) adds w(k) exp(2 pi i k x / n).
    assert point_spread_width(1e9) == pytest.approx(1.207, abs=0.02)
    echo, _ = simulate.line_order(150, 8, 4)
    x = np.arange(-300, 301) / 100
    for t2_ms, expected in ((45.0, 1.39), (24.0, 1.75)):
        weight = np.exp(-(echo - 3) * 9.275 / t2_ms)
        psf = np.abs(np.exp(2j * np.pi * np.outer(x, np.arange(150) - 75) / 150) @ weight)
        closed = np.ptp(x[psf > psf.max() / 2])
        assert point_spread_width(t2_ms) == pytest.approx(closed, abs=0.03)
        assert point_spread_width(t2_ms) == pytest.approx(expected, abs=0.03)


def test_shift_moves_the_image() -> None:
    rng = default_rng(1)
    kspace = np.fft.fftshift(np.fft.fft2(rng.uniform(size=(1, 32, 32))), axes=(1, 2)).astype(np.complex64)
    kspace[:, 0] = kspace[:, :, 0] = 0  # the frequency that a shift by pixels leaves undefined in sign
    still = simulate.reconstruct(kspace, 32)
    there = simulate.reconstruct(simulate.shifted(kspace, np.array([3, -5]) / 32), 32)
    assert np.abs(np.roll(still, (3, -5), (0, 1)) - there).max() < 1e-5


# ---------------------------------------------------------------- noise


def test_noise_of_air_is_rayleigh_and_of_tissue_gaussian() -> None:
    rng, sigma = default_rng(4), 0.03
    empty, centre = np.zeros((2, 1, 128, 128), np.complex64)
    air = np.stack([simulate.reconstruct(simulate.add_noise(empty, sigma, 256, rng), 256) for _ in range(12)])
    assert air.mean() == pytest.approx(np.sqrt(np.pi / 2) * sigma, rel=0.01)
    assert air.std() == pytest.approx(np.sqrt(2 - np.pi / 2) * sigma, rel=0.01)
    centre[0, 64, 64] = 256**2  # a uniform object of 1
    tissue = np.stack([simulate.reconstruct(simulate.add_noise(centre, sigma, 256, rng), 256) for _ in range(12)])
    assert tissue.std() == pytest.approx(sigma, rel=0.01)
    assert tissue.mean() == pytest.approx(1 + sigma**2 / 2, rel=1e-3)


def test_several_channels_give_the_noise_of_a_root_sum_of_squares() -> None:
    rng = default_rng(5)
    empty = np.zeros((4, 128, 128), np.complex64)
    image = simulate.reconstruct(simulate.add_noise(empty, 0.1, 256, rng), 256)
    assert (image**2).mean() == pytest.approx(2 * 4 * 0.1**2, rel=0.02)


def test_signal_to_noise_of_high_over_low_is_1_12() -> None:
    cfg, rng = Config(), default_rng(6)
    y, x = np.mgrid[-300:300, -300:300]
    signal = (np.hypot(y, x) < 250).astype(np.float32)[..., None]
    ratio = []
    for matrix, averages in ((cfg.matrix_high, cfg.averages_high), (cfg.matrix_low, cfg.averages_low)):
        sigma = simulate.image_noise(cfg, 0.02, matrix, averages)
        still = simulate.encode(signal, np.zeros(matrix, int), ONES)
        inside = slice(matrix * 5 // 16, matrix * 11 // 16)
        pair = [simulate.reconstruct(simulate.add_noise(still, sigma, 600, rng), 600) for _ in range(2)]
        noise = (pair[0] - pair[1])[inside, inside].std() / np.sqrt(2)
        ratio.append(pair[0][inside, inside].mean() / noise)
    assert ratio[0] / ratio[1] == pytest.approx(1.12, abs=0.02 + 0.01)  # and 1 % of counting statistics
    assert simulate.image_noise(cfg, 1, 150, 1) / simulate.image_noise(cfg, 1, 300, 5) == pytest.approx(1.118, abs=1e-3)


def test_noise_in_the_corners_of_a_scan_is_what_the_truth_says(quiet: tuple) -> None:
    volumes, _, figures = quiet
    for volume, name in zip(volumes, ("noise_high", "noise_low"), strict=True):
        edge = volume.shape[1] // 6
        corners = np.concatenate([volume[:, :edge, :edge].ravel(), volume[:, :edge, -edge:].ravel()])
        assert np.sqrt((corners**2).mean() / 2) == pytest.approx(figures[name], rel=0.06)


def test_high_scan_differs_from_the_truth_by_its_noise_alone(quiet: tuple) -> None:
    volumes, truth, figures = quiet
    bright = truth["truth"] > 6 * figures["noise_high"]
    assert bright.sum() > 1000
    difference = (volumes[0] - truth["truth"])[bright]
    assert difference.std() == pytest.approx(figures["noise_high"], rel=0.04)


# ---------------------------------------------------------------- motion and accidents


def test_breathing_shares() -> None:
    one = simulate.breathing(400, 1, 4.0, 3.0, 1.1, default_rng(0))
    five = simulate.breathing(400, 5, 4.0, 3.0, 1.1, default_rng(0))
    assert one.sum(axis=1) == pytest.approx(1)
    assert set(np.unique(one)) == {0.0, 1.0}
    assert five.sum(axis=1) == pytest.approx(1)
    assert one[:, 0].mean() == pytest.approx(0.74, abs=0.05)  # 0.6 of the cycle at rest and the ends of the breath
    assert five[:, 0].std() < 0.5 * one[:, 0].std()  # 0.45 if the five averages were independent


def test_matter_moves_by_the_displacement() -> None:
    signal = default_rng(0).uniform(size=(20, 30, 2)).astype(np.float32)
    shift = np.stack([np.full((20, 30), 3.2), np.full((20, 30), -2.0)])
    assert np.array_equal(simulate.moved(signal, shift)[4:, :27], signal[1:17, 2:29])


def test_truth_names_the_scan_that_an_accident_befell() -> None:
    cfg = dataclasses.replace(TINY, motion=False, noise=1e-6, spoiled_fraction=1.0)
    scans = (scan_of("axial", 64, 5, 24, 0.6), scan_of("axial", 32, 1, 24, 0.6))
    volumes, truth, figures = simulate.scan_pair(cfg, setup_of(cfg), scans, "TA", default_rng(3))
    gain = figures["noise_high"] / figures["noise_low"] / simulate.image_noise(cfg, 1, 64, 5)  # of high over low
    level = truth["truth"].mean(axis=(1, 2))
    kept = np.stack([volumes[1].mean(axis=(1, 2)) * gain / level, volumes[0].mean(axis=(1, 2)) / level])
    lost = truth["spoiled"] == simulate.SPOILED.index("signal_loss")
    assert lost.any(axis=1).all()
    assert kept[lost].max() < 0.3
    assert kept[truth["spoiled"] == 0] == pytest.approx(1, abs=0.05)


def test_respiration_ghosts_lie_along_the_phase_axis_and_averaging_lowers_them() -> None:
    cfg = dataclasses.replace(TINY, noise=1e-6, spoiled_fraction=0.0, matrix_high=128, matrix_low=64)
    ghosts = []
    for averages in (1, 5):
        scans = (scan_of("axial", 128, averages, 3), scan_of("axial", 64, 1, 3))
        volumes, truth, _ = simulate.scan_pair(cfg, setup_of(cfg), scans, "TA", default_rng(2))
        error = volumes[0] - truth["truth"]
        outside = truth["labels"] == 0
        columns = np.where(outside.all(axis=1, keepdims=True), error, 0)  # beside the animal, along read
        rows = np.where(outside.all(axis=2, keepdims=True), error, 0)  # above and below it, along phase
        assert (rows**2).sum() > 10 * (columns**2).sum()
        ghosts.append((error**2)[outside].sum() / (truth["truth"] ** 2).sum())
    assert 1e-5 < ghosts[0] < 0.1
    assert ghosts[1] < 0.6 * ghosts[0]


def test_motion_off_leaves_both_scans_of_one_object() -> None:
    cfg = dataclasses.replace(TINY, motion=False)
    mouse = anatomy.Mouse(SeedSequence(8))
    still = simulate.mouse_slice(cfg, mouse, np.eye(3), np.array([0, 0, -22.0]))
    assert still.breath is None
    assert np.array_equal(*still.signal)
    live = simulate.mouse_slice(dataclasses.replace(TINY), mouse, np.eye(3), np.array([0, 0, -22.0]))
    changed = (live.signal[0] != live.signal[1]).any(axis=-1)[::2, ::2]
    assert 0.02 < changed[live.labels > 0].mean() < 0.9
    assert not changed[live.labels == anatomy.ID["bone"]].all()


def test_accidents_do_what_their_names_say() -> None:
    rng = default_rng(0)
    image = np.zeros((1, 64, 64))
    image[0, 20:44, 24:40] = 1
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, axes=(1, 2))), axes=(1, 2)).astype(np.complex64)
    _, shot = simulate.line_order(64, 8, 4)
    still = simulate.reconstruct(kspace, 64)
    spike = simulate.spoil(kspace, "spike", shot, 30, rng)
    assert 1 <= np.count_nonzero(spike != kspace) <= 3
    assert np.abs(spike - kspace).max() >= 0.3 * np.abs(kspace).max()
    burst = simulate.spoil(kspace, "motion", shot, 30, rng)
    assert np.abs(burst) == pytest.approx(np.abs(kspace), rel=1e-4, abs=1e-3)
    assert np.abs(simulate.reconstruct(burst, 64) - still).max() > 0.1
    assert simulate.reconstruct(simulate.spoil(kspace, "signal_loss", shot, 30, rng), 64).max() < 0.3 * still.max()
    assert np.array_equal(simulate.spoil(kspace, "none", shot, 30, rng), kspace)
    drawn = np.array([simulate.draw_accident(Config(), False, rng) for _ in range(4000)])
    assert (drawn != "none").any(axis=1).mean() == pytest.approx(0.12, abs=0.015)
    assert (drawn != "none").sum(axis=1).max() == 1
    assert simulate.draw_accident(Config(), True, rng) == ("empty", "empty")


# ---------------------------------------------------------------- objects


def test_coil_falls_to_0_35_at_one_radius_below_it() -> None:
    y = np.array([12.0, -3.0])
    field = np.abs(simulate.coil_maps([0 * y, y, 0 * y], np.array([[0.0, 12.0, 0.0]]), 15.0, 0))[0]
    assert field == pytest.approx([1, 8**-0.5], rel=1e-3)


def test_brick_has_the_measures_of_lego() -> None:
    brick = anatomy.Brick(default_rng(0))
    brick.bubbles = np.empty((0, 4))
    axis = (np.arange(1500) + 0.5) / 50 - 15
    x, y = np.meshgrid(axis, axis)
    vessel = np.pi * 14.2**2

    def plastic(level: float) -> float:
        return vessel - brick.water(x, y, np.full_like(x, level)).sum() / 50**2

    tubes = 2 * np.pi * (3.255**2 - 2.4**2)
    assert plastic(-1.0) == pytest.approx(0, abs=0.2)
    assert plastic(4.0) == pytest.approx(23.8 * 15.8 - 21.4 * 13.4 + tubes, rel=2e-3)
    assert plastic(9.0) == pytest.approx(23.8 * 15.8, rel=2e-3)
    assert plastic(10.5) == pytest.approx(6 * np.pi * 2.4**2, rel=5e-3)
    assert plastic(11.5) == pytest.approx(0, abs=0.2)
    angles = [
        np.rad2deg(np.arctan2(b.turn[1, 0], b.turn[0, 0])) for b in (anatomy.Brick(default_rng(n)) for n in range(9))
    ]
    assert all(2.9 < abs(angle) < 7.1 for angle in angles)


def test_brick_slice_holds_the_right_share_of_water() -> None:
    cfg = dataclasses.replace(TINY, matrix_high=100, matrix_low=50)
    brick = anatomy.Brick(default_rng(0))
    brick.turn, brick.bubbles = np.eye(3), np.empty((0, 4))
    part = simulate.brick_slice(cfg, brick, np.eye(3), np.array([0, 0, 10.5 - 5.7]))
    alone = simulate.decay(np.array(1.0), np.array(50.0), cfg.echo_spacing_ms, 8)
    full = alone * (1 - np.exp(-4000 / 1800))
    water = part.signal[0].sum(axis=(0, 1)) * (30 / cfg.samples) ** 2 / full
    assert water == pytest.approx(np.full(8, np.pi * (14.2**2 - 6 * 2.4**2)), rel=2e-3)
    pure = dataclasses.replace(cfg, lego_medium="water")
    other = simulate.brick_slice(pure, brick, np.eye(3), np.array([0, 0, 10.5 - 5.7])).signal[0].sum(axis=(0, 1))
    assert other[7] / other[0] == pytest.approx(np.exp(-7 * cfg.echo_spacing_ms / 500), rel=1e-4)


def labels_of(mouse: anatomy.Mouse, plane: str, origin: tuple[float, ...]) -> np.ndarray:
    cfg = dataclasses.replace(TINY, matrix_high=150, matrix_low=50, motion=False)
    frame = np.array(PLANES[plane][:3], float)
    return simulate.mouse_slice(cfg, mouse, frame, np.array(origin)).labels


@pytest.fixture(scope="module")
def mice() -> list[anatomy.Mouse]:
    return [anatomy.Mouse(SeedSequence([9, n])) for n in range(3)]


def middle(labels: np.ndarray, *names: str) -> tuple[float, float]:
    """Mean (x, y) of tissues in pixels from the middle of the field of view."""
    y, x = np.nonzero(np.isin(labels, [anatomy.ID[name] for name in names]))
    return float(x.mean()) - 75, float(y.mean()) - 75


def test_abdomen_has_its_organs_in_their_places(mice: list[anatomy.Mouse]) -> None:
    for mouse in mice:
        labels = labels_of(mouse, "axial", (0, 0, -16.5))
        found = {name: np.count_nonzero(labels == number) * 0.2**2 for name, number in anatomy.ID.items()}
        body = labels > 0
        assert 250 < body.sum() * 0.2**2 < 520  # mm2
        kidney = np.isin(labels, [anatomy.ID[n] for n in ("kidney_cortex", "outer_medulla", "inner_medulla")])
        assert 8 < kidney[:, :75].sum() * 0.2**2 < 40
        assert 8 < kidney[:, 75:].sum() * 0.2**2 < 40
        assert 0.8 < found["white_matter"] + found["grey_matter"] < 4  # the cord, dorsal of the great vessels
        assert middle(labels, "white_matter", "grey_matter")[1] > middle(labels, "vessel")[1]
        assert found["gut_wall"] > 15
        assert found["grey_matter"] < found["muscle"]
        assert not body[0].any()
        assert not body[-1].any()


def test_head_has_a_brain_in_a_skull_and_the_chest_lungs_around_a_heart(mice: list[anatomy.Mouse]) -> None:
    for mouse in mice:
        head = labels_of(mouse, "axial", (0, 0, 27))
        grey = head == anatomy.ID["grey_matter"]
        rows, columns = np.nonzero(grey)
        assert 8 < np.ptp(columns) * 0.2 < 12  # mm wide
        assert 4.5 < np.ptp(rows) * 0.2 < 8
        assert np.count_nonzero(head == anatomy.ID["csf"]) > 20
        assert np.count_nonzero(head == anatomy.ID["white_matter"]) > 20
        assert np.count_nonzero(head == anatomy.ID["bone"]) > 50
        chest = labels_of(mouse, "axial", (0, 0, 4))
        lung = chest == anatomy.ID["lung"]
        assert lung[:, :75].sum() > 150
        assert lung[:, 75:].sum() > 150
        assert np.count_nonzero(chest == anatomy.ID["myocardium"]) > 200
        assert middle(chest, "myocardium")[0] > -5  # the heart lies a little to the left, which is x > 0


def test_animals_differ_and_one_animal_is_one_object_on_all_planes(mice: list[anatomy.Mouse]) -> None:
    axial = [labels_of(mouse, "axial", (0, 0, -14)) for mouse in mice]
    assert (axial[0] != axial[1]).mean() > 0.1
    sagittal = labels_of(mice[0], "sagittal", (0, 0, -14))
    # The axial slice's column x = 0 is the sagittal slice's row z = -14; sheets and samples differ by their depth.
    assert (axial[0][:, 75] == sagittal[75]).mean() > 0.75
    assert (np.roll(axial[0][:, 75], 20) == sagittal[75]).mean() < 0.6


def test_truth_has_detail_that_the_low_scan_cannot_hold(quiet: tuple) -> None:
    image = quiet[1]["truth"]
    kspace = np.abs(np.fft.fftshift(np.fft.fft2(image), axes=(1, 2))) ** 2
    inner = kspace[:, 32:96, 32:96].sum()
    assert 0.001 < 1 - inner / kspace.sum() < 0.3


# ---------------------------------------------------------------- files


def parameters(path: Path) -> dict[str, str]:
    """A reader of JCAMP-DX of its own: name to the text of the value."""
    text = path.read_text(encoding="latin-1")
    return {n: v.strip() for n, v in re.findall(r"##\$(\w+)=(.*?)(?=\n##|\n\$\$)", text, re.S)}


def numbers(value: str) -> np.ndarray:
    return np.array(re.sub(r"^\(.*?\)", "", value).split(), float)


def test_a_written_scan_reads_back_to_half_a_step(tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, matrix_high=40)
    scan = scan_of("coronal", 40, 5, 3)
    volume = (
        default_rng(0).rayleigh(50, (3, 40, 40)).astype(np.float32) * np.array([1, 8, 0.1], np.float32)[:, None, None]
    )
    write_scan_folder(cfg, tmp_path, session_of("mouse01", "ab", DATE), scan, volume)
    visu = parameters(tmp_path / "1" / "pdata" / "1" / "visu_pars")
    slope = numbers(visu["VisuCoreDataSlope"])
    stored = np.fromfile(tmp_path / "1" / "pdata" / "1" / "2dseq", "<i2").reshape(3, 40, 40)
    assert len(set(slope)) == 3
    assert np.abs(stored * slope[:, None, None] - volume).max(axis=(1, 2)) == pytest.approx(slope / 2, rel=0.02)
    assert numbers(visu["VisuCoreDataMax"]).tolist() == stored.max(axis=(1, 2)).tolist()
    assert visu["VisuCoreFrameType"].endswith("MAGNITUDE_IMAGE")


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_brukerapi_reads_values_and_geometry(tmp_path: Path, plane: str) -> None:
    dataset = pytest.importorskip("brukerapi.dataset")
    centre = np.array([0.5, -0.25, 1.0])
    affine = {}
    for number, matrix in ((1, 64), (2, 32)):
        scan = dataclasses.replace(scan_of(plane, matrix, 5, 4, 0.6), number=number, centre=centre)
        volume = default_rng(number).rayleigh(50, (4, matrix, matrix)).astype(np.float32)
        write_scan_folder(TINY, tmp_path, session_of("mouse01", "ab", DATE), scan, volume)
        read = dataset.Dataset(tmp_path / str(number) / "pdata" / "1" / "2dseq")
        assert np.abs(np.asarray(read.data).T - volume).max() < volume.max() / 32766
        affine[matrix] = np.asarray(read.affine)
    # What is written is where the object was sampled: the centre of the stack, and pixel n/2 of each slice.
    for matrix, a in affine.items():
        assert (a @ [matrix / 2, matrix / 2, 1.5, 1])[:3] == pytest.approx(centre, abs=1e-5)
    x, y, step = (np.array(v) for v in PLANES[plane][:3])
    assert affine[64][:3, :3] == pytest.approx(np.stack([x * 30 / 64, y * 30 / 64, step * 0.6], axis=1), abs=1e-6)
    for j in ([0, 0, 0, 1], [5, 11, 3, 1]):
        assert affine[32] @ j == pytest.approx(affine[64] @ (np.array(j) * [2, 2, 1, 1]), abs=1e-6)


@pytest.mark.real
def test_planes_are_those_of_a_real_tripilot() -> None:
    path = BRUKER / "mouse_body_rare_pv601_7T" / "study" / "1" / "pdata" / "1" / "visu_pars"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    real = numbers(parameters(path)["VisuCoreOrientation"]).reshape(3, 9)
    for row, plane in zip(real, ("axial", "sagittal", "coronal"), strict=True):
        read, phase, _, normal, _ = PLANES[plane]
        assert row.tolist() == [*read, *phase, *normal]


def test_study_has_the_files_and_the_order_of_a_session(tiny: Path) -> None:
    study = tiny / "data" / "raw" / "mouse01"
    assert sorted(p.name for p in study.iterdir()) == ["1", "2", "subject"]
    method, acqp = parameters(study / "1" / "method"), parameters(study / "2" / "acqp")
    visu = [parameters(study / n / "pdata" / "1" / "visu_pars") for n in ("1", "2")]
    assert method["PVM_NAverages"] == "5"
    assert method["EffectiveTE"].split()[-1] == "37.1"
    assert sorted(numbers(method["PVM_EncSteps1"])) == list(range(-32, 32))
    assert "axial_fast_TA (E2)" in acqp["ACQ_scan_name"]
    assert visu[0]["VisuStudyUid"] == visu[1]["VisuStudyUid"]
    assert visu[0]["VisuSubjectId"].endswith("<mouse01>")
    assert visu[0]["VisuAcqDate"] < visu[0]["VisuCreationDate"] < visu[1]["VisuAcqDate"]
    assert visu[0]["VisuFGOrderDesc"].endswith("(2, <FG_SLICE>, <>, 0, 2)")
    assert visu[0]["VisuAcqSequenceName"].endswith("<Bruker:RARE>")


def test_truth_is_in_the_units_of_the_high_scan(tiny: Path) -> None:
    truth = open_truth(tiny)
    assert truth.scans == ["mouse01/TA/axial", "mouse02/TA/axial"]
    assert truth.attributes["tissues"][0] == "air"
    assert truth.attributes["spoiled_kinds"][0] == "none"
    for key in truth.scans:
        subject = key.split("/")[0]
        image = truth.read(key, "truth", 3, "float32")
        labels, spoiled = truth.read(key, "labels", 3, "uint8"), truth.read(key, "spoiled", 2, "uint8")
        assert labels.shape == image.shape == (2, 64, 64)
        assert spoiled.shape == (2, 2)
        pdata = tiny / "data" / "raw" / subject / "1" / "pdata" / "1"
        slope = numbers(parameters(pdata / "visu_pars")["VisuCoreDataSlope"])
        high = np.fromfile(pdata / "2dseq", "<i2").reshape(2, 64, 64) * slope[:, None, None]
        clean = spoiled[1] == 0
        bright = image[clean] > np.percentile(image, 80)
        assert np.median(high[clean][bright] / image[clean][bright]) == pytest.approx(1, abs=0.06)


def test_result_does_not_depend_on_the_number_of_workers(tiny: Path, tmp_path: Path) -> None:
    simulate.run(dataclasses.replace(TINY, root=tmp_path, workers=2))
    assert tree_digest(tmp_path) == tree_digest(tiny)


def test_another_seed_is_another_animal(tiny: Path, tmp_path: Path) -> None:
    simulate.run(dataclasses.replace(TINY, root=tmp_path, subjects=1, seed=4))
    first, other = (tree_digest(root / "data" / "raw" / "mouse01") for root in (tiny, tmp_path))
    assert first.keys() == other.keys()
    assert first["1/pdata/1/2dseq"] != other["1/pdata/1/2dseq"]


def test_finished_subjects_are_kept_and_lost_ones_scanned_again(tiny: Path, tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, root=tmp_path)
    simulate.run(dataclasses.replace(cfg, subjects=1))
    kept = tmp_path / "data" / "raw" / "mouse01" / "1" / "pdata" / "1" / "2dseq"
    stamp = kept.stat().st_mtime_ns
    simulate.run(cfg)
    assert kept.stat().st_mtime_ns == stamp
    (tmp_path / "data" / "raw" / ".mouse07.partial" / "1").mkdir(parents=True)  # of a killed run of more subjects
    simulate.run(cfg)
    assert tree_digest(tmp_path) == tree_digest(tiny)
    assert not (tmp_path / "data" / "raw" / ".mouse07.partial").exists()
    (tmp_path / "data" / "raw" / "mouse02" / "subject").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="mouse02: found a study that is not simulated"):
        simulate.run(cfg)


def test_killed_at_any_moment_the_next_run_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "00_simulate.py"), *options(dataclasses.replace(TINY, root=tmp_path))]
    log, raw, killed = tmp_path.with_suffix(".log"), tmp_path / "data" / "raw", 0
    for moment in (".mouse01.partial", "mouse01", ".mouse02.partial"):
        with log.open("w") as stream:
            run = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=REPO)
            give_up = time.monotonic() + 60
            while not (raw / moment).exists() and run.poll() is None and time.monotonic() < give_up:
                time.sleep(0.002)
            killed += run.poll() is None
            run.kill()  # the parent alone: its workers must notice
            run.wait()
        if run.returncode == -signal.SIGKILL:
            assert not (tmp_path / "data" / "truth.zarr" / "zarr.json").exists()
    assert killed, log.read_text()  # a busy machine may let one of the runs end first
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    assert tree_digest(tmp_path) == tree_digest(tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"te_ms": 40.0}, "--te-ms: found 40.0, expected a multiple of 9.275"),
        ({"matrix_low": 30}, "--matrix-high: found 64"),
        ({"matrix_high": 8, "matrix_low": 8}, "--matrix-low: found 8, expected 16 or more"),
        ({"sub_slices": 0}, "--sub-slices: found 0"),
        ({"planes": ("oblique",)}, "--planes: found oblique"),
        ({"regions": ("XX",)}, "--regions: found XX"),
        ({"lego_medium": "oil"}, "--lego-medium: found oil"),
        ({"subjects": 0}, "--subjects: found 0"),
    ],
)
def test_settings_that_cannot_be_scanned_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        simulate.run(dataclasses.replace(TINY, root=tmp_path, **change))
    assert not any(tmp_path.iterdir())


def test_studies_of_other_settings_and_foreign_ones_are_not_overwritten(tiny: Path) -> None:
    before = tree_digest(tiny)
    for change, message in (
        ({"seed": 5}, "mouse01: found a study that is simulated with other settings"),
        ({"subjects": 1}, "mouse02: found a study that is simulated, but not one of the 1 subjects"),
    ):
        words = options(dataclasses.replace(TINY, root=tiny, **change))
        command = [sys.executable, str(REPO / "00_simulate.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert tree_digest(tiny) == before


def test_memory_of_a_full_size_scan_is_bounded(tmp_path: Path) -> None:
    cfg = Config(root=tmp_path, subjects=1, regions=("TA",), planes=("coronal",), slices=2, lego=False, workers=1)
    command = [sys.executable, str(REPO / "00_simulate.py"), *options(cfg)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPO)
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    assert peak_gib < 0.9  # two workers stay under 2 GiB; a scan's volumes add 0.1 GiB at most
