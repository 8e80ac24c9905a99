"""Stage 02 and the geometry of common.py against closed forms, scipy and known truths."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from common import (
    InputError,
    body_mask,
    crop_box,
    finish_store,
    grid_relation,
    normalisation,
    open_pairs,
    scan_attributes,
    upsample,
    write_scan,
)

stage = importlib.import_module("02_preprocess")
REPO = Path(__file__).resolve().parents[1]
METHODS = ("nearest", "linear", "cubic", "fourier")


def waves(shape, ratio, offset, seed=0):
    """A band-limited periodic image of the low matrix `shape`, sampled analytically at i / ratio + offset."""
    rng = np.random.default_rng(seed)
    y, x = (np.arange(n * r) / r + o for n, r, o in zip(shape, ratio, offset, strict=True))
    image = np.full((len(y), len(x)), 5.0)
    for _ in range(12):
        ky, kx = (rng.integers(-((n - 1) // 2), (n - 1) // 2 + 1) for n in shape)
        phase = rng.uniform(0, 2 * np.pi)
        image += 0.3 * np.cos(2 * np.pi * (ky * y[:, None] / shape[0] + kx * x / shape[1]) + phase)
    return image


def blobs(ny, nx, shift=(0.0, 0.0), slices=4, scale=1.0, seed=1):
    """A smooth animal with inner structure, sampled on pixels of the low grid (or finer by `scale`) after a shift."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: ny * scale, : nx * scale] / scale - np.reshape(shift, (2, 1, 1))
    out = []
    for _ in range(slices):
        distance = np.hypot((y - ny / 2) / (0.32 * ny), (x - nx / 2) / (0.25 * nx))
        image = 100 / (1 + np.exp((distance - 1) * 12))
        for _ in range(14):
            cy, cx = ny / 2 + rng.uniform(-0.2, 0.2) * ny, nx / 2 + rng.uniform(-0.15, 0.15) * nx
            image += rng.uniform(-40, 80) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * rng.uniform(1.2, 2.5) ** 2))
        out.append(np.abs(image))
    return np.array(out)


def rician(image, sigma, seed):
    rng = np.random.default_rng(seed)
    return np.abs(image + sigma * (rng.normal(size=image.shape) + 1j * rng.normal(size=image.shape)))


def affine(step, origin=(0.0, 0.0, 0.0)):
    matrix = np.diag([*step, 1.0])
    matrix[:3, 3] = origin
    return matrix


def add_scan(root, key, low, high, origin=(0.0, 0.0, 0.0), **more):
    """One curated scan; `origin` (x, y, slice) is the place of high voxel 0 in mm, low pixels being 0.2 mm."""
    subject, region, plane = key.split("/")
    ratio = [h / n for h, n in zip(high.shape[1:], low.shape[1:], strict=True)]
    keep = more.pop("keep", np.ones(len(low), bool))
    attrs = {"subject": subject, "region": region, "plane": plane, "fingerprint": f"{key}{more.pop('version', 0)}"}
    attrs |= {
        "affine_low": affine((0.2, 0.2, 0.6)),
        "affine_high": affine((0.2 / ratio[1], 0.2 / ratio[0], 0.6), origin),
    }
    attrs |= {"spacing_low_mm": [0.6, 0.2, 0.2], "spacing_high_mm": [0.6, 0.2 / ratio[0], 0.2 / ratio[1]]} | more
    arrays = {"low": low.astype(np.float32), "high": high.astype(np.float32), "keep": np.asarray(keep, bool)}
    write_scan(root / "data" / "curated.zarr", key, arrays, attrs)
    return key


def close(root, keys):
    finish_store(root / "data" / "curated.zarr", keys, {"fingerprint": "f"})


def cohort(root, numbers=range(1, 6), lego=True, **more):
    """A small cohort of low and high images of the same smooth animals, gain 2."""
    keys = []
    for number in numbers:
        low, high = blobs(32, 40, seed=number), 2 * blobs(32, 40, scale=2, seed=number)
        keys.append(add_scan(root, f"mouse{number:02d}/HT/axial", low, high, **more))
    if lego:
        keys.append(add_scan(root, "brick/lego/axial", blobs(32, 40, seed=99), blobs(32, 40, scale=2, seed=99)))
    close(root, keys)
    return keys


def config(root, **more):
    return stage.Config(root=root, workers=1, **({"upsample": "fourier"} | more))


# ---------------------------------------------------------------- upsampling


@pytest.mark.parametrize("shape", [(24, 24), (25, 16), (16, 27), (15, 21)])
@pytest.mark.parametrize("ratio", [(1, 1), (2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.37, -0.21), (-0.25, -1.4)])
def test_fourier_upsampling_is_exact_on_band_limited_images(shape, ratio, offset):
    low = waves(shape, (1, 1), (0, 0))[None]
    found = upsample(low, ratio, "fourier", offset)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], waves(shape, ratio, offset), atol=1e-5 * 5, rtol=0)


@pytest.mark.parametrize("shape", [(8, 10), (7, 9), (8, 9)])
@pytest.mark.parametrize("ratio", [2, 3])
def test_fourier_keeps_every_input_pixel_and_a_real_nyquist(shape, ratio):
    low = np.random.default_rng(0).normal(size=(3, *shape))  # all frequencies, the Nyquist one among them
    found = upsample(low, ratio, "fourier")
    np.testing.assert_allclose(found[:, ::ratio, ::ratio], low, atol=2e-6)
    checker = np.cos(np.pi * np.arange(8))[None, None].repeat(4, 1)
    wave = np.cos(np.pi * (np.arange(8 * ratio) / ratio + 0.3))
    np.testing.assert_allclose(upsample(checker, ratio, "fourier", (0, 0.3))[0, 0], wave * np.cos(0), atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.31, -0.17), (-0.4, 0.22), None])
def test_every_method_puts_a_spot_where_the_offset_says(method, offset):
    y, x = np.mgrid[:32, :40]
    spot = np.exp(-((y - 14.3) ** 2 + (x - 21.8) ** 2) / (2 * 2.2**2))[None]
    ratio = (2, 3)
    found = upsample(spot, ratio, method, offset)[0]
    assert found.shape == (64, 120)
    used = offset or tuple(0.5 / r - 0.5 for r in ratio)
    centre = [(c - o) * r for c, o, r in zip((14.3, 21.8), used, ratio, strict=True)]
    np.testing.assert_allclose(ndimage.center_of_mass(found), centre, atol=0.02)


@pytest.mark.parametrize(("n", "half"), [(16, 1 - 1 / 16), (15, 1.0)])
def test_noise_variance_after_fourier_upsampling(n, half):
    operator = upsample(np.eye(n)[:, None].repeat(1, 1), (1, 2), "fourier")[:, 0]  # column i: weights of output i
    variance = np.square(operator).sum(axis=0)
    np.testing.assert_allclose(variance[::2], 1, atol=1e-5)
    np.testing.assert_allclose(variance[1::2], half, atol=1e-5)  # the Nyquist cosine vanishes between the pixels
    shifted = upsample(np.eye(n)[:, None], (1, 1), "nearest", (0, 0.25))[:, 0]
    expected = 1 if n % 2 else 1 - (1 - np.cos(np.pi / 4) ** 2) / n
    np.testing.assert_allclose(np.square(shifted).sum(axis=0), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 24), (15, 9)])
@pytest.mark.parametrize(("method", "order"), [("nearest", 0), ("linear", 1), ("cubic", 3)])
def test_plain_zoom_is_scipys(shape, method, order):
    low = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    zoomed = [ndimage.zoom(s, (2, 3), order=order, grid_mode=True, mode="grid-wrap") for s in low]
    np.testing.assert_allclose(upsample(low, (2, 3), method, None), zoomed, atol=1e-5)
    if order == 0:  # the report's call
        np.testing.assert_array_equal(upsample(low, 2, method, None), [ndimage.zoom(s, 2, order=0) for s in low])


def test_nearest_at_centres_is_half_a_pixel_nearer_than_plain_zoom():
    low, high = waves((32, 32), (1, 1), (0, 0), 3)[None], waves((32, 32), (2, 2), (0, 0), 3)
    centred, plain, turned = (
        np.square(upsample(low, 2, "nearest", o)[0] - high).mean() for o in ((0, 0), None, (-0.5, -0.5))
    )
    assert centred < 0.8 * plain < 0.8 * turned


def test_unknown_method():
    with pytest.raises(ValueError, match="lanczos"):
        upsample(np.ones((1, 4, 4)), 2, "lanczos")


# ---------------------------------------------------------------- body, box, intensity


def scene(coil=False, noise=2.0):
    """A volume of 12 slices, the first and the last two without animal, and where the animal is."""
    y, x = np.mgrid[:96, :80]
    body = np.zeros((12, 96, 80), bool)
    body[2:10] = np.hypot((y - 50) / 34, (x - 38) / 26) < 1
    signal = np.where(body, 60.0, 0.0)
    signal[:, 40:50, 30:44] *= 0.1  # a lung
    if coil:
        signal *= np.exp(-(y - 16) / 30.0)
    return rician(signal, noise, 5), body


@pytest.mark.parametrize("coil", [False, True])
def test_body_mask_finds_the_animal(coil):
    volume, body = scene(coil)
    volume[6, 4:10, 4:10] += 40  # a bright artefact in the air
    found = body_mask(volume)
    assert found.dtype == bool
    assert not found[[0, 1, 10, 11]].any()
    assert not found[6, :12, :12].any()
    dice = 2 * (found & body).sum() / (found.sum() + body.sum())
    assert dice > 0.95
    fine = body_mask(upsample(volume, 2, "fourier"))
    assert 2 * (fine[:, ::2, ::2] & found).sum() / (fine[:, ::2, ::2].sum() + found.sum()) > 0.97
    np.testing.assert_array_equal(body_mask(volume * 1e4), found)


def test_body_mask_of_a_phantom_with_signal_free_bricks():
    y, x = np.mgrid[:80, :80]
    water = np.hypot(y - 40, x - 40) < 32
    brick = (abs(y - 40) < 12) & (abs(x - 40) < 16)
    found = body_mask(rician(np.where(water & ~brick, 80.0, 0)[None].repeat(5, 0), 3, 1))
    assert (found == water).mean() > 0.96
    assert found[:, brick].all()


def test_body_mask_of_background_set_to_zero():
    _, body = scene()
    found = body_mask(np.where(body, 50.0, 0.0))
    assert 2 * (found & body).sum() / (found.sum() + body.sum()) > 0.95


@pytest.mark.parametrize("seed", range(20))
def test_boxes_hold_the_mask_with_sides_of_8(seed):
    rng = np.random.default_rng(seed)
    ny, nx = rng.integers(40, 90, 2)
    mask = np.zeros((3, ny, nx), bool)
    y, x = rng.integers(0, ny - 10), rng.integers(0, nx - 10)
    mask[rng.integers(3), y : y + rng.integers(1, ny - y), x : x + rng.integers(1, nx - x)] = True
    margin = int(rng.integers(0, 12))
    y0, y1, x0, x1 = crop_box(mask, margin)
    assert mask[:, y0:y1, x0:x1].sum() == mask.sum()
    for first, last, n, axes in ((y0, y1, ny, (0, 2)), (x0, x1, nx, (0, 1))):
        assert 0 <= first < last <= n
        assert (last - first) % 8 == 0 or last - first == n
        hits = np.flatnonzero(mask.any(axis=axes))
        assert first <= max(hits[0] - margin, 0)
        assert last >= min(hits[-1] + 1 + margin, n)
        assert last - first <= hits[-1] - hits[0] + 1 + 2 * margin + 7


def test_box_of_an_empty_mask_is_the_field():
    assert crop_box(np.zeros((2, 30, 41), bool), 4) == (0, 30, 0, 41)


@pytest.mark.parametrize("mode", ["mean", "zscore", "eq15"])
def test_normalisation_and_its_inverse(mode):
    low = np.random.default_rng(0).gamma(2, 30, size=(5, 20, 30)).astype(np.float32)
    scale, offset = normalisation(low, mode)
    assert scale.shape == offset.shape == (5,)
    normal = (low - offset[:, None, None]) / scale[:, None, None]
    np.testing.assert_allclose(normal * scale[:, None, None] + offset[:, None, None], low, rtol=1e-5)
    if mode == "mean":
        np.testing.assert_allclose(normal.mean(axis=(1, 2)), 1, rtol=1e-5)
    else:
        np.testing.assert_allclose(normal.mean(axis=(1, 2)), 0, atol=1e-5)
        power = low.std(axis=(1, 2)) if mode == "zscore" else np.sqrt(np.square(low).mean(axis=(1, 2)))
        np.testing.assert_allclose(normal.std(axis=(1, 2)), low.std(axis=(1, 2)) / power, rtol=1e-4)


@pytest.mark.parametrize("gain", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("snr", [5, 20])
def test_gain_of_noisy_scans(gain, snr):
    low, high = blobs(64, 64, slices=12), blobs(64, 64, slices=12, scale=2)
    low, high = rician(low, 100 / snr, 1), gain * rician(high, 100 / snr / 1.12, 2)
    high[2] *= 3  # one spoiled slice
    up = upsample(low, 2, "fourier")
    assert stage.pair_gain(up, high, body_mask(up), (2, 2)) == pytest.approx(gain, rel=0.01)


def test_gain_is_of_signal_and_not_of_the_rician_floor():
    low, high = blobs(64, 64, slices=24), blobs(64, 64, slices=24, scale=2)
    up = upsample(rician(low, 25, 1), 2, "fourier")
    assert stage.pair_gain(up, rician(high, 5, 2), body_mask(up), (2, 2)) == pytest.approx(1, rel=0.007)


@pytest.mark.parametrize("drift", [(0.0, 0.0), (0.63, -1.27), (-2.4, 1.9)])
@pytest.mark.parametrize("ratio", [(2, 2), (2, 3)])
def test_drift_of_noisy_scans(drift, ratio):
    low = rician(blobs(64, 64, slices=12), 6, 1)
    high = rician(upsample(blobs(64, 64, np.divide(drift, ratio), slices=12), ratio, "fourier"), 6, 2)
    found = stage.measured_shift(upsample(low, ratio, "fourier"), 1.7 * high, ratio)
    np.testing.assert_allclose(found, drift, atol=0.05)


def test_relation_of_the_grids():
    low, high = affine((0.2, 0.3, 0.6), (1, 2, 3)), affine((0.1, 0.1, 0.6), (1.04, 1.97, 3))
    ratio, offset = grid_relation(low, high, (4, 10, 20), (4, 30, 40))
    np.testing.assert_array_equal(ratio, (3, 2))
    np.testing.assert_allclose(offset, (-0.1, 0.2))
    turn = affine((1, 1, 1))
    turn[:2, :2] = [[0, -1], [1, 0]]  # oblique scanners' frames change nothing
    np.testing.assert_allclose(grid_relation(turn @ low, turn @ high, (4, 10, 20), (4, 30, 40))[1], offset)


@pytest.mark.parametrize(
    ("high", "shape", "text"),
    [
        (affine((0.1, 0.1, 0.6)), (4, 30, 41), "integer multiple"),
        (affine((0.1, 0.1, 0.6)), (5, 30, 40), "equal slices"),
        (affine((0.1, 0.1, 0.6)), (4, 5, 40), "integer multiple"),
        (affine((0.11, 0.1, 0.6)), (4, 20, 40), "pure scaling"),
        (affine((0.1, 0.1, 0.6), (0, 0, 0.3)), (4, 20, 40), "pure scaling"),
        (affine((0.1, 0.1, 0.7)), (4, 20, 40), "pure scaling"),
    ],
)
def test_grids_that_do_not_fit(high, shape, text):
    with pytest.raises(InputError, match=text):
        grid_relation(affine((0.2, 0.2, 0.6)), high, (4, 10, 20), shape)


# ---------------------------------------------------------------- splits


def named(split):
    return {n: sorted(s for s, where in split.items() if where == n) for n in ("train", "validation", "test", "unused")}


def test_table_2():
    ids = [f"mouse{n:02d}" for n in range(1, 25)]
    found = named(stage.split_animals(ids[::-1], (), (), 0))
    assert found["test"] == ["mouse07", "mouse16", "mouse22"]
    assert found["validation"] == ["mouse06", "mouse10"]
    assert found["unused"] == ["mouse24"]
    train = [int(s[-2:]) for s in found["train"]]
    assert train == [1, 2, 3, 4, 5, 8, 9, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 23]


@pytest.mark.parametrize(
    ("n", "test", "validation"), [(3, 1, 1), (5, 1, 1), (8, 2, 1), (13, 3, 2), (23, 3, 2), (48, 6, 4)]
)
def test_proportions(n, test, validation):
    ids = [f"rat_{i + 30}" for i in range(n)]
    split = stage.split_animals(ids, (), (), 3)
    found = named(split)
    assert (len(found["test"]), len(found["validation"])) == (test, validation)
    assert len(found["train"]) == n - test - validation
    assert stage.split_animals(ids[::-1], (), (), 3) == split
    if n > 5:
        assert any(stage.split_animals(ids, (), (), seed) != split for seed in range(4, 9))


def test_named_animals():
    ids = ["mouse07", "mouse11", "rat", "x8", "x9"]
    found = named(stage.split_animals(ids, ("7", "rat"), ("mouse11",), 0))
    assert found == {"test": ["mouse07", "rat"], "validation": ["mouse11"], "train": ["x8", "x9"], "unused": []}
    found = named(stage.split_animals(ids, ("7",), (), 0))
    assert found["test"] == ["mouse07"]
    assert len(found["validation"]) == 1
    assert len(found["train"]) == 3


@pytest.mark.parametrize(
    ("ids", "test", "validation", "text"),
    [
        (["m1", "m2", "m3"], ("9",), (), "--test.*'9'.*m1, m2, m3"),
        (["m1", "m2", "m3"], (), ("mouse1",), "--validation.*'mouse1'"),
        (["m1", "r1", "m3"], ("1",), (), "--test.*m1, r1.*'1'"),
        (["m1", "m2", "m3"], ("1",), ("m1",), "m1 found in both"),
        (["m1", "m2"], (), (), "2 animals.*--split-by slice"),
        (["m1", "m2", "m3"], ("1", "2"), ("3",), "0 left to train on"),
        ([], (), (), "0 animals"),
    ],
)
def test_splits_that_cannot_be(ids, test, validation, text):
    with pytest.raises(InputError, match=text):
        stage.split_animals(ids, test, validation, 0)


@pytest.mark.parametrize("n", [5, 6, 12, 31])
def test_blocks_of_slices(n):
    kept = np.ones(n + 4, bool)
    kept[[0, 1, -1, -2]] = False
    code = stage.split_slices(kept, "rat")[2:-2]
    test, validation = stage.counts(n - 2)
    assert [(code == c).sum() for c in (1, 2, 3, 0)] == [n - 2 - test - validation, validation, test, 2]
    assert (np.diff(code[code > 0].astype(int)) >= 0).all()
    for one, other in ((1, 2), (2, 3)):
        assert np.flatnonzero(code == other)[0] - np.flatnonzero(code == one)[-1] == 2
    with pytest.raises(InputError, match=r"rat: 4 kept slices.*at least 5"):
        stage.split_slices(np.ones(4, bool), "rat")


# ---------------------------------------------------------------- the stage


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["mean", "zscore", "eq15"])
def test_crops_placed_back_equal_the_full_images(tmp_path, method, mode):
    keep = [True, False, True, True]
    cohort(tmp_path, range(1, 4), keep=keep)
    stage.run(config(tmp_path, upsample=method, normalise=mode, margin=3))
    store = open_pairs(tmp_path)
    for key in store.scans:
        number = 99 if "lego" in key else int(key[5:7])
        gain, kept = (1, [0, 1, 2, 3]) if "lego" in key else (2, [0, 2, 3])
        attrs = store.attrs(key)
        low, high = blobs(32, 40, seed=number), gain * blobs(32, 40, scale=2, seed=number)
        assert attrs["gain"] == pytest.approx(gain, rel=0.01)
        np.testing.assert_array_equal(store.read(key, "slice_index", 1, "int32"), kept)
        assert attrs["full_shape"] == [4, 64, 80]
        y0, y1, x0, x1 = attrs["box"]
        assert (y1 - y0) * (x1 - x0) < 64 * 80
        scale, offset = (store.read(key, n, 1, "float32")[:, None, None] for n in ("scale", "offset"))
        full = upsample(low, 2, method)
        full[kept, y0:y1, x0:x1] = store.read(key, "low", 3, "float32") * scale + offset
        np.testing.assert_allclose(full, upsample(low, 2, method), atol=1e-3)
        back = (store.read(key, "high", 3, "float32") * scale + offset) * attrs["gain"]
        np.testing.assert_allclose(back, high[kept, y0:y1, x0:x1], atol=2e-3)


@pytest.mark.parametrize("align", ["centres", "measured", "none"])
def test_alignment_in_the_store(tmp_path, align):
    """High scans whose field is moved by the affine, of animals that drifted too."""
    drift = np.array([0.35, -0.6])  # of the animal, low pixels
    origin = np.array([0.3, -0.2])  # of high pixel 0 in low pixels (y, x)
    keys = []
    for number in (1, 2, 3):
        low = blobs(48, 40, seed=number)
        high = upsample(blobs(48, 40, drift, seed=number), 2, "fourier", tuple(origin))
        key = f"m{number}/HT/axial"
        keys.append(add_scan(tmp_path, key, low, high, origin=(0.2 * origin[1], 0.2 * origin[0], 0)))
    close(tmp_path, keys)
    stage.run(config(tmp_path, align=align))
    store = open_pairs(tmp_path)
    expected = 2 * drift if align == "measured" else (0, 0)
    place = {"measured": origin - drift, "centres": origin, "none": (-0.25, -0.25)}[align]
    for key in keys:
        attrs = store.attrs(key)
        np.testing.assert_allclose(attrs["shift"], expected, atol=0.02)
        y0, y1, x0, x1 = attrs["box"]
        wanted = upsample(blobs(48, 40, seed=int(key[1])), 2, "fourier", tuple(place))[:, y0:y1, x0:x1]
        low = store.read(key, "low") * store.read(key, "scale")[:, None, None]
        np.testing.assert_allclose(low, wanted, atol=1e-3 if align != "measured" else 1.0)
        residual = np.abs(store.read(key, "low") - store.read(key, "high")).mean()
        assert (residual < 0.02) == (align == "measured")


def test_splits_of_the_store_and_lego(tmp_path):
    keys = cohort(tmp_path, (3, 5, 8, 13))
    low, high = blobs(32, 40, seed=8), blobs(32, 40, scale=2, seed=8)
    keys.append(add_scan(tmp_path, "mouse08/TA/coronal", low, high))
    close(tmp_path, keys)
    summary = stage.run(config(tmp_path, test=("8",), validation=("mouse13",)))
    store = open_pairs(tmp_path)
    expected = {"mouse03": 1, "mouse05": 1, "mouse08": 3, "mouse13": 2, "brick": 4}
    for key in keys:
        assert set(store.read(key, "split", 1, "uint8")) == {expected[key.split("/")[0]]}
    splits = {"train": ["mouse03", "mouse05"], "validation": ["mouse13"], "test": ["mouse08"], "lego": ["brick"]}
    assert store.attributes["splits"] == summary["splits"] == splits | {"unused": []}
    assert store.attributes["split_by"] == "animal"
    assert store.attributes["settings"]["align"] == "centres"


def test_split_by_slice(tmp_path, capsys):
    keys = []
    for key, keep in (("rat1/head/axial", [0] + [1] * 9), ("rat1/head/axial_2", [1] * 9 + [0])):
        low, high = blobs(32, 32, slices=10), blobs(32, 32, slices=10, scale=2)
        keys.append(add_scan(tmp_path, key, low, high, keep=keep))
    close(tmp_path, keys)
    with pytest.raises(InputError, match="--split-by slice"):
        stage.run(config(tmp_path))
    assert not (tmp_path / "data" / "pairs.zarr").exists()
    stage.run(config(tmp_path, split_by="slice"))
    assert "no test of generalisation" in capsys.readouterr().out
    store = open_pairs(tmp_path)
    assert store.attributes["split_by"] == "slice"
    assert store.attributes["splits"]["test"] == ["rat1"]
    code = np.array([1, 1, 1, 1, 1, 0, 2, 0, 3, 3])
    for key in keys:
        np.testing.assert_array_equal(store.read(key, "split"), code[store.read(key, "slice_index")])


def test_unchanged_scans_are_skipped_and_changed_ones_are_not(tmp_path):
    keys = cohort(tmp_path, range(1, 5))
    cfg = config(tmp_path)
    first = stage.run(cfg)
    assert first["written"] == sorted(keys)
    again = stage.run(cfg)
    assert again["written"] == []
    assert again["fingerprint"] == first["fingerprint"]
    key = "mouse02/HT/axial"
    images = blobs(32, 40, seed=2), 2 * blobs(32, 40, scale=2, seed=2)
    add_scan(tmp_path, key, *images, keep=[True, True, False, True])
    close(tmp_path, keys)
    kept = stage.run(cfg)
    assert kept["written"] == [key]
    assert kept["fingerprint"] != first["fingerprint"]
    add_scan(tmp_path, key, *images, keep=[True, False, True, True])
    close(tmp_path, keys)
    assert stage.run(cfg)["written"] == [key]
    np.testing.assert_array_equal(open_pairs(tmp_path).read(key, "slice_index"), [0, 2, 3])
    add_scan(tmp_path, key, *images, keep=[True, False, True, True], version=1)
    close(tmp_path, keys)
    assert stage.run(cfg)["written"] == [key]
    moved = stage.run(dataclasses.replace(cfg, test=("2",)))
    assert key in moved["written"]
    assert set(open_pairs(tmp_path).read(key, "split")) == {3}
    assert stage.run(dataclasses.replace(cfg, test=("2",), margin=9))["written"] == sorted(keys)
    close(tmp_path, keys[:-1])
    gone = stage.run(dataclasses.replace(cfg, test=("2",), margin=9))
    assert gone["scans"] == sorted(keys[:-1])
    assert scan_attributes(tmp_path / "data" / "pairs.zarr", keys[-1]) is None


def test_workers_and_interruption_change_nothing(tmp_path):
    def content(root):
        store = root / "data" / "pairs.zarr"
        return {p.relative_to(store): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}

    for name in ("one", "two"):
        cohort(tmp_path / name, range(1, 4))
    stage.run(config(tmp_path / "one"))
    cfg = dataclasses.replace(config(tmp_path / "two"), workers=2)
    stage.run(cfg)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    store = tmp_path / "two" / "data" / "pairs.zarr"
    (store / "zarr.json").unlink()  # as if killed before the end
    (store / "mouse02" / "HT" / "axial" / "zarr.json").unlink()
    with pytest.raises(InputError, match="02_preprocess"):
        open_pairs(tmp_path / "two")
    assert stage.run(cfg)["written"] == ["mouse02/HT/axial"]
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("low", np.nan, "mouse02/HT/axial: low, slice 2: mean nan"),
        ("high", np.inf, "mouse02/HT/axial: high, slice 2: mean inf"),
        ("low", 0.0, "mouse02/HT/axial: low, slice 2: mean 0"),
        ("high", 0.0, "mouse02/HT/axial: high, slice 2: mean 0"),
    ],
)
def test_bad_slices(tmp_path, name, value, text):
    keys = cohort(tmp_path, range(1, 4))
    stage.run(config(tmp_path))
    images = {"low": blobs(32, 40), "high": blobs(32, 40, scale=2)}
    if np.isfinite(value):
        images[name][2] = value
    else:
        images[name][2, 3, 4] = value
    add_scan(tmp_path, "mouse02/HT/axial", **images, keep=[True, False, True, True])
    with pytest.raises(InputError, match=text):
        stage.run(config(tmp_path))
    with pytest.raises(InputError, match="no such store"):  # the earlier store is not complete any more
        open_pairs(tmp_path)
    add_scan(tmp_path, "mouse02/HT/axial", **images, keep=[True, True, False, True])
    close(tmp_path, keys)
    assert stage.run(config(tmp_path))["scans"] == sorted(keys)  # dropped slices do no harm


def test_scans_and_splits_without_slices(tmp_path, capsys):
    keys = cohort(tmp_path, range(1, 5))
    low, high = blobs(32, 40), blobs(32, 40, scale=2)
    add_scan(tmp_path, "mouse02/HT/axial", low, high, keep=[False] * 4)
    close(tmp_path, keys)
    with pytest.raises(InputError, match="no kept slice in the test split"):
        stage.run(config(tmp_path, test=("2",)))
    found = stage.run(config(tmp_path, test=("1",), validation=("3",)))
    assert "mouse02/HT/axial: left out" in capsys.readouterr().out
    assert "mouse02/HT/axial" not in found["scans"]
    close(tmp_path, [])
    with pytest.raises(InputError, match="0 animals"):
        stage.run(config(tmp_path))


@pytest.mark.real
def test_real_pairs_that_exchange_their_roles(tmp_path, bruker):
    """Of the two rat pairs one's low scan is the other's high scan: gain and drift are the inverse of the other's."""
    curate = importlib.import_module("01_curate")
    curate.run(curate.Config(raw=bruker / "pairs", root=tmp_path, workers=1))
    stage.run(config(tmp_path, split_by="slice", align="measured"))
    store = open_pairs(tmp_path)
    assert len(store.scans) == 3
    one, other = (store.attrs(key) for key in store.scans if store.attrs(key)["spacing_mm"][1] < 0.25)
    assert one["gain"] * other["gain"] == pytest.approx(1, abs=0.005)
    np.testing.assert_allclose(one["shift"], np.negative(other["shift"]), atol=0.01)
    assert np.hypot(*one["shift"]) > 0.1
    rats = [key for key in store.scans if store.attrs(key)["spacing_mm"][1] < 0.25]
    for key in rats:
        test = store.read(key, "slice_index")[store.read(key, "split") == 3]
        assert test.size
        for same in rats:
            assert not np.isin(test, store.read(same, "slice_index")[store.read(same, "split") == 1]).any()
    (mouse,) = (store.attrs(key) for key in store.scans if store.attrs(key)["spacing_mm"][1] > 0.25)
    y0, y1, x0, x1 = mouse["box"]
    assert (y1 - y0) * (x1 - x0) < 0.7 * 128 * 128
    np.testing.assert_allclose(mouse["shift"], 0, atol=0.01)  # both images are of one acquisition
    assert mouse["gain"] == pytest.approx(1, abs=0.005)


def test_command_line_errors_are_one_line(tmp_path):
    keys = cohort(tmp_path, range(1, 4), lego=False)
    add_scan(tmp_path, keys[1], blobs(32, 40), blobs(32, 40, scale=2)[:, :-1])
    close(tmp_path, keys)
    command = [sys.executable, REPO / "02_preprocess.py", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert keys[1] in done.stderr
    assert "integer multiple" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*command[:-1], tmp_path / "none"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "01_curate.py" in done.stderr
