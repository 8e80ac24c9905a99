"""Every figure of merit against an independent computation, and the stage on a cohort made here from scratch."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
from scipy import ndimage
from scipy.stats import spearmanr

import common
import merit

REPO = Path(__file__).resolve().parent.parent
evaluate = importlib.import_module("06_evaluate")
SUBJECTS = ("mouse01", "mouse02", "mouse03", "mouse04", "mouse05")
TEST, VALIDATION = ("mouse03", "mouse04"), ("mouse02",)


def rng(*entropy: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([20, *entropy]))


# ---------------------------------------------------------------- a cohort


def acquire(spectrum: np.ndarray, n: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Magnitude image of the central n x n of a centred k-space, pixel 0 of all matrices at one place."""
    first = (spectrum.shape[-1] - n) // 2
    part = np.fft.ifftshift(spectrum[..., first : first + n, first : first + n], axes=(-2, -1))
    image = np.fft.ifft2(part) * (n / spectrum.shape[-1]) ** 2
    image = image + noise * (generator.normal(size=image.shape) + 1j * generator.normal(size=image.shape))
    return np.abs(image).astype(np.float32)


def object_of(subject: int, slices: int, n: int) -> np.ndarray:
    """An ellipse of organs and vessels, different for every subject."""
    generator = rng(subject)
    y, x = np.mgrid[:n, :n] / n - 0.5
    volume = np.zeros((slices, n, n))
    for index in range(slices):
        turn = generator.uniform(-0.3, 0.3)
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        inside = (u / 0.34) ** 2 + (v / 0.27) ** 2 < 1
        volume[index] = inside * 1.0
        for _ in range(14):
            cu, cv, size = generator.uniform(-0.2, 0.2), generator.uniform(-0.15, 0.15), generator.uniform(0.01, 0.09)
            volume[index][inside & ((u - cu) ** 2 + (v - cv) ** 2 < size**2)] = generator.uniform(0.4, 1.8)
    return volume


SCANS = (("HT", "axial"), ("TA", "sagittal"))


def write_cohort(root: Path, n: int = 64, slices: int = 3, subjects: tuple[str, ...] = SUBJECTS, scans=SCANS) -> None:
    """Curated pairs and truth of some mice and a phantom; the last slice of every scan is dropped."""
    keys = []
    for number, subject in enumerate([*subjects, "lego"]):
        for region, plane in (("LEGO", "axial"),) if subject == "lego" else scans:
            key = f"{subject}/{region}/{plane}"
            generator = rng(number, len(region))
            spectrum = np.fft.fftshift(np.fft.fft2(object_of(10 * number + len(plane), slices, 2 * n)), axes=(-2, -1))
            low, high = acquire(spectrum, n // 2, 0.06, generator), acquire(spectrum, n, 0.06, generator)
            truth = acquire(spectrum, n, 0.0, generator)
            affines = [np.diag([30 / m, 30 / m, 0.6, 1.0]) for m in (n // 2, n)]
            parts = dict(zip(("affine_low", "affine_high"), affines, strict=True))
            attributes = {"subject": subject, "region": region, "plane": plane.split("_")[0]} | parts
            attributes |= {"fingerprint": f"made of {key}"}
            attributes |= {"spacing_low_mm": [0.6, 60 / n, 60 / n], "spacing_high_mm": [0.6, 30 / n, 30 / n]}
            keep = np.arange(slices) < slices - 1
            arrays = {"low": 100 * low, "high": 150 * high, "keep": keep}
            common.write_scan(root / "data" / "curated.zarr", key, arrays, attributes)
            arrays = {"truth": 150 * truth, "labels": (truth > 0.3).astype(np.uint8)}
            arrays["spoiled"] = np.zeros((2, slices), np.uint8)
            common.write_scan(root / "data" / "truth.zarr", key, arrays, {"subject": subject})
            keys.append(key)
    common.finish_store(root / "data" / "curated.zarr", keys, {"fingerprint": "curated"})
    common.finish_store(root / "data" / "truth.zarr", keys, {"fingerprint": "truth"})


def write_pairs(root: Path, **settings) -> None:
    preprocess = importlib.import_module("02_preprocess")
    chosen = {"upsample": "fourier", "test": TEST, "validation": VALIDATION, "workers": 1} | settings
    preprocess.run(preprocess.Config(root=root, **chosen))


def write_network(root: Path, name: str = "unet", seed: int = 1, **data) -> None:
    """A run folder with a small network that was never trained, and its history."""
    import torch

    import networks

    pairs = common.open_pairs(root).attributes
    config = networks.UNetConfig((4, 8), (4,), "meanpool", "bilinear", "ReLU", residual=True)
    net = networks.UNet(config, generator := torch.Generator().manual_seed(seed))
    for parameter in net.parameters():  # a new network returns its input
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    data = {name: pairs[name] for name in ("fingerprint", "settings", "splits")} | data
    content = {"stage": "unet", "network": networks.plain(config), "weights": net.state_dict(), "data": data}
    networks.save_checkpoint(root / "runs" / name / "best.pt", content)
    columns = importlib.import_module("03_train_unet").COLUMNS
    losses = {e: {"epoch": e, "train": 0.5 / e + 0.2, "validation": 0.4 / e + 0.3} for e in range(1, 6)}
    rows = [dict.fromkeys(columns, 1.0) | losses[epoch] for epoch in losses]
    common.write_table(root / "runs" / name / "history.csv", columns, rows)


def config(root: Path, **changes):
    return dataclasses.replace(evaluate.PRESETS["smoke"], root=root, workers=1, **changes)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A small experiment, judged once; tests that change it copy it."""
    root = tmp_path_factory.mktemp("evaluated")
    write_cohort(root)
    write_pairs(root)
    write_network(root)
    evaluate.run(config(root))
    return root


@pytest.fixture
def copied(evaluated, tmp_path) -> Path:
    root = tmp_path / "experiment"
    shutil.copytree(evaluated, root)
    return root


@pytest.fixture(scope="module")
def rows(evaluated) -> list[dict[str, str]]:
    return common.read_table(evaluated / "results" / "metrics.csv", evaluate.COLUMNS)


def value(rows, **wanted) -> float:
    found = [float(row["value"]) for row in rows if all(row[name] == str(v) for name, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def images(root: Path, model: str, key: str) -> np.ndarray:
    return common.Store(root / "results" / f"{model}.zarr", "06").read(key, "restored", 3, "float32")


# ---------------------------------------------------------------- figures of merit on arrays


@pytest.fixture
def pair():
    generator = rng(1)
    reference = generator.random((40, 52), dtype=np.float32) * 3
    image = reference + generator.normal(scale=0.4, size=reference.shape).astype(np.float32)
    body = np.zeros(reference.shape, bool)
    body[8:31, 10:40] = True
    return image, reference, {"field": np.ones_like(body), "body": body, "air": ~body}


def as_dict(found):
    return {(metric, mask): value for metric, mask, value in found}


def test_errors_equal_those_of_scikit_image(pair):
    image, reference, masks = pair
    found = as_dict(merit.compare(image, reference, masks, 2.5, 0.8))
    a, b = np.float64(image), np.float64(reference)
    for name, mask in masks.items():
        mse = skimage.metrics.mean_squared_error(b[mask], a[mask])
        assert found["mse", name] == pytest.approx(mse / 0.8**2, rel=1e-6)
        assert found["mse_range", name] == pytest.approx(mse / 2.5**2, rel=1e-6)
        psnr = skimage.metrics.peak_signal_noise_ratio(b[mask], a[mask], data_range=2.5)
        assert found["psnr", name] == pytest.approx(psnr, rel=1e-6)


def ssim_by_hand(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:
    """Eq. 8 with Wang's Gaussian window of 11 x 11 and standard deviation 1.5, borders reflected."""
    x = np.arange(-5, 6)
    kernel = np.exp(-(x**2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def local(image):
        return ndimage.correlate1d(ndimage.correlate1d(image, kernel, 0, mode="reflect"), kernel, 1, mode="reflect")

    mean_a, mean_b = local(a), local(b)
    var_a, var_b, cov = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def test_similarity_equals_its_formula_in_every_mask(pair):
    image, reference, masks = pair
    found = as_dict(merit.compare(image, reference, masks, 2.5, 0.8))
    local = ssim_by_hand(np.float64(image), np.float64(reference), 2.5)
    assert found["ssim", "body"] == pytest.approx(local[masks["body"]].mean(), abs=1e-6)
    assert found["ssim", "air"] == pytest.approx(local[masks["air"]].mean(), abs=1e-6)
    assert found["ssim", "field"] == pytest.approx(local[5:-5, 5:-5].mean(), abs=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    whole = skimage.metrics.structural_similarity(np.float64(reference), np.float64(image), data_range=2.5, **options)
    assert found["ssim", "field"] == pytest.approx(whole, abs=1e-6)


def test_the_range_is_the_one_given_and_not_the_images_own(pair):
    image, reference, masks = pair
    narrow, wide = (as_dict(merit.compare(image, reference, masks, r, 1.0)) for r in (3.0, 30.0))
    assert wide["psnr", "body"] - narrow["psnr", "body"] == pytest.approx(20)
    assert wide["ssim", "body"] > narrow["ssim", "body"]
    assert wide["mse", "body"] == narrow["mse", "body"]


def test_identical_constant_and_shifted_images(pair):
    _, reference, masks = pair
    with np.errstate(divide="ignore"):
        same = as_dict(merit.compare(reference, reference, masks, 3.0, 1.0))
    assert (same["mse", "body"], same["psnr", "body"]) == (0, np.inf)
    assert same["ssim", "body"] == pytest.approx(1)
    flat = as_dict(merit.compare(np.full_like(reference, 1.5), reference, masks, 3.0, 1.0))
    assert flat["mse", "body"] == pytest.approx(np.square(np.float64(reference)[masks["body"]] - 1.5).mean())
    assert flat["ssim", "body"] < 0.05
    raised = as_dict(merit.compare(reference + np.float32(0.25), reference, masks, 3.0, 1.0))
    assert raised["mse", "air"] == pytest.approx(0.0625, rel=1e-6)
    moved = as_dict(merit.compare(np.roll(reference, 1, axis=1), reference, masks, 3.0, 1.0))
    assert moved["mse", "field"] > 0.5  # white noise against itself one pixel on: twice its variance
    assert moved["ssim", "field"] < 0.1


def test_what_lies_outside_a_mask_does_not_count_inside(pair):
    image, reference, masks = pair
    spoiled = np.where(masks["body"], image, 1e3)
    kept, changed = (as_dict(merit.compare(i, reference, masks, 2.5, 0.8)) for i in (image, spoiled))
    assert changed["mse", "body"] == kept["mse", "body"]
    assert changed["mse", "air"] > 1e3 * kept["mse", "air"]


@pytest.mark.parametrize("sigma", [0.02, 3.0])
def test_noise_level_is_right_within_one_percent(sigma):
    generator = rng(2)
    noise = np.abs(sigma * (generator.normal(size=(2, 200, 200)) + 1j * generator.normal(size=(2, 200, 200))))
    air = np.ones(noise.shape, bool)
    air[:, 60:140, 60:140] = False
    noise[~air] += 50 * sigma
    assert merit.noise_level(noise, air) == pytest.approx(sigma, rel=0.01)


def test_noise_level_where_the_animal_fills_the_field():
    images = 5 + rng(3).normal(scale=0.3, size=(3, 64, 64))
    assert merit.noise_level(images, np.zeros(images.shape, bool)) == pytest.approx(0.3, rel=0.1)


def test_contrast_figures_by_hand():
    roi, background = np.array([[4.0, 6.0]]), np.array([[1.0, 3.0], [1.0, 3.0]])
    found = evaluate.contrast_figures(roi, background)
    assert found == {"cnr": 3.0, "cnr_abs": 3.0, "nstd": 0.5}  # (5 - 2) / 1 and 1 / 2
    assert evaluate.contrast_figures(background, roi)["cnr"] == -3.0
    with np.errstate(divide="ignore"):
        assert evaluate.contrast_figures(roi, np.ones((3, 3)))["cnr"] == np.inf


def test_boxes_are_calm_apart_inside_the_body_and_the_same_each_time():
    high = np.abs(rng(4).normal(size=(80, 90)))  # rough everywhere but in three plateaus
    for mean, top, left in ((0.2, 10, 10), (4.0, 40, 50), (2.0, 60, 10)):
        high[top : top + 12, left : left + 12] = mean + 1e-3 * rng(5).normal(size=(12, 12))
    body = np.zeros(high.shape, bool)
    body[5:75, 5:85] = True
    boxes = {box.kind: box for box in evaluate.place_boxes("a/b/c", 3, high, body, 10)}
    assert boxes == {box.kind: box for box in evaluate.place_boxes("a/b/c", 3, high, body, 10)}
    background, roi = boxes["background"], boxes["roi"]
    assert (background.key, background.slice, background.y1 - background.y0) == ("a/b/c", 3, 10)
    assert 40 <= background.y0 <= 42  # the least spread for its mean
    assert 50 <= background.x0 <= 52
    assert 10 <= roi.y0 <= 12  # the most different one
    assert 10 <= roi.x0 <= 12
    body[:, :45] = False  # only the background's plateau is left: whatever ROI there is lies inside
    for box in evaluate.place_boxes("a/b/c", 3, high, body, 10):
        assert body[box.y0 : box.y1, box.x0 : box.x1].all()


@pytest.mark.parametrize("body", [np.zeros((40, 40), bool), np.pad(np.ones((10, 10), bool), 15)])
def test_no_boxes_without_room_for_two(body):
    assert evaluate.place_boxes("k", 0, rng(6).random((40, 40)), body, 10) == []


# ---------------------------------------------------------------- means and intervals


def row(subject: str, slice_: int, value: float, **changes) -> dict:
    plain = {"model": "m", "split": "test", "metric": "mse", "reference": "high", "mask": "body"}
    return plain | {"subject": subject, "slice": slice_, "value": value} | changes


def test_animals_count_equally_however_many_slices_they_have():
    rows = [row("a", i, 1.0) for i in range(9)] + [row("b", 0, 3.0)]
    found = merit.summarise(rows, 2000, 1)["m"]["test"]["mse_body"]
    assert found["mean"] == 2.0
    assert found["animals"] == 2
    assert found["ci95"] == [1.0, 3.0]  # over slices it would be about 1.0 to 1.6


def test_interval_of_many_animals_equals_theory():
    values = rng(7).normal(size=400)
    mean, (lower, upper) = merit.bootstrap(values, 4000, 1)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (mean - lower, upper - mean) == pytest.approx((half, half), rel=0.1)
    assert merit.bootstrap(values, 4000, 1) == (mean, [lower, upper])


def test_one_animal_has_a_point_for_an_interval():
    found = merit.summarise([row("a", 0, 1.0), row("a", 1, 2.0)], 100, 1)["m"]["test"]["mse_body"]
    assert found == {"mean": 1.5, "ci95": [1.5, 1.5], "animals": 1}


def test_names_in_the_summary_and_values_that_are_not_finite():
    rows = [
        row("a", 0, 1.0, reference="truth"),
        row("a", 0, 2.0, mask="field"),
        row("a", 0, 3.0, mask="air", reference="truth", metric="ssim"),
        row("a", 0, 4.0, metric="cnr", reference="", mask="box:body"),
        row("a", 0, float("inf"), metric="psnr"),
        row("b", 0, 5.0, metric="psnr"),
        row("b", 0, float("nan"), metric="nstd"),
    ]
    found = merit.summarise(rows, 100, 1)["m"]["test"]
    means = {name: figures["mean"] for name, figures in found.items()}
    assert means == {"mse_truth_body": 1.0, "mse": 2.0, "ssim_truth_air": 3.0, "cnr": 4.0, "psnr_body": 5.0}


# ---------------------------------------------------------------- the stage


MODELS = ("low", "bicubic", "fourier", "nlm", "high", "unet")


def test_images_of_every_model_cover_the_whole_field_in_low_units(evaluated):
    expected = {"lego/LEGO/axial", *(f"{s}/{r}" for s in (*TEST, *VALIDATION) for r in ("HT/axial", "TA/sagittal"))}
    curated, pairs = common.open_curated(evaluated), common.open_pairs(evaluated)
    for model in MODELS:
        store = common.Store(evaluated / "results" / f"{model}.zarr", "06")
        assert set(store.scans) == expected
        for key in store.scans:
            restored = store.read(key, "restored", 3, "float32")
            high = curated.read(key, "high")
            assert restored.shape == high.shape == (3, 64, 64)
            assert np.isfinite(restored).all()
            assert set(store.attrs(key)) == {"affine", "spacing_mm", "fingerprint"}
            assert store.attrs(key)["affine"] == curated.attrs(key)["affine_high"]
            if model != "unet":  # that one was never trained
                body = curated.read(key, "low").mean()
                assert restored.mean() == pytest.approx(body, rel=0.1)
        assert pairs.attrs(key)["gain"] == pytest.approx(1.5, rel=0.05)


def test_baselines_are_what_they_are_called(evaluated):
    key = "mouse03/HT/axial"
    curated, gain = common.open_curated(evaluated), common.open_pairs(evaluated).attrs("mouse03/HT/axial")["gain"]
    low = curated.read(key, "low")
    assert np.array_equal(
        images(evaluated, "low", key), ndimage.zoom(low, (1, 2, 2), order=0, grid_mode=True, mode="nearest")
    )
    assert np.allclose(images(evaluated, "high", key), curated.read(key, "high") / gain)
    spectrum = np.fft.fftshift(np.fft.fft2(low), axes=(-2, -1))
    spectrum[:, 0] /= 2
    spectrum[:, :, 0] /= 2
    padded = np.pad(spectrum, ((0, 0), (16, 16), (16, 16)))
    padded[:, 48], padded[:, :, 48] = padded[:, 16], padded[:, :, 16]
    filled = 4 * np.fft.ifft2(np.fft.ifftshift(padded, axes=(-2, -1))).real
    fourier = images(evaluated, "fourier", key)
    assert np.allclose(fourier[:, ::2, ::2], low, atol=1e-2)  # pixel j of the low image lies on pixel 2j
    inner = np.s_[:, 1:-1, 1:-1]
    assert np.abs(fourier - filled)[inner].max() < 0.02 * low.max()
    assert np.allclose(images(evaluated, "bicubic", key)[:, ::2, ::2], low, atol=1e-2)
    tuned = json.loads((evaluated / "results" / "nlm.zarr" / "zarr.json").read_text())["attributes"]["tuning"]
    strength = float(min(tuned, key=tuned.get))
    sigma = evaluate.load_scan(config(evaluated), key).noise[0]
    assert sigma == pytest.approx(6.0, rel=0.05)  # 0.06 x 100
    wanted = skimage.restoration.denoise_nl_means(
        fourier[0], patch_size=5, patch_distance=6, h=strength * sigma, sigma=sigma, fast_mode=True
    )
    assert np.allclose(images(evaluated, "nlm", key)[0], wanted, atol=1e-3)


def test_rows_equal_figures_computed_from_the_stores(evaluated, rows):
    """One slice, from curated images and truth to the table, without the stage's own functions."""
    key, index = "mouse04/TA/sagittal", 1
    pairs, curated = common.open_pairs(evaluated), common.open_curated(evaluated)
    gain, (y0, y1, x0, x1) = pairs.attrs(key)["gain"], pairs.attrs(key)["box"]
    high = np.float64(curated.read(key, "high")) / gain
    truth = np.float64(common.open_truth(evaluated).read(key, "truth")) / gain
    place = {"subject": "mouse04", "region": "TA", "plane": "sagittal", "slice": index, "split": "test"}
    unit = np.float64(images(evaluated, "fourier", key))[index, y0:y1, x0:x1].mean()
    assert unit == pytest.approx(pairs.read(key, "scale")[index], rel=1e-5)
    data_range = high[:2].max()  # slice 2 was dropped
    body = common.body_mask(images(evaluated, "fourier", key)[:2])[index]
    for model in ("low", "nlm", "unet", "high"):
        restored = np.float64(images(evaluated, model, key))[index]
        for reference, volume in (("high", high), ("truth", truth)):
            if model == reference:
                assert not any(
                    r["model"] == model and r["reference"] == reference and r["metric"] == "mse" for r in rows
                )
                continue
            here = place | {"model": model, "reference": reference}
            mse = np.square(restored - volume[index])[body].mean()
            low_mse = np.square(np.float64(images(evaluated, "low", key))[index] - volume[index])[body].mean()
            assert value(rows, metric="mse", mask="body", **here) == pytest.approx(mse / unit**2, rel=1e-6)
            assert value(rows, metric="mse_ratio", mask="body", **here) == pytest.approx(mse / low_mse, rel=1e-6)
            psnr = 10 * np.log10(data_range**2 / mse)
            assert value(rows, metric="psnr", mask="body", **here) == pytest.approx(psnr, rel=1e-6)
            ratio = restored[body].mean() / volume[index][body].mean()
            assert value(rows, metric="mean_ratio", mask="body", **here) == pytest.approx(ratio, rel=1e-6)
            ratio = restored[body].max() / volume[index][body].max()
            assert value(rows, metric="max_ratio", mask="body", **here) == pytest.approx(ratio, rel=1e-6)
            local = ssim_by_hand(restored, volume[index], data_range)
            assert value(rows, metric="ssim", mask="body", **here) == pytest.approx(local[body].mean(), abs=1e-6)
            assert value(rows, metric="ssim", mask="air", **here) == pytest.approx(local[~body].mean(), abs=1e-6)
    ranges = {float(row["range"]) for row in rows if row["subject"] == "mouse04" and row["region"] == "TA"}
    assert list(ranges) == [pytest.approx(data_range)]


def test_the_correction_for_the_noise_of_the_high_image(evaluated, rows):
    """MSE against the high image less its noise is the MSE against the truth, where noise is independent."""
    for key in ("mouse03/HT/axial", "mouse04/HT/axial"):
        sigma = evaluate.load_scan(config(evaluated), key).noise[1]
        assert sigma == pytest.approx(0.06 * 150 / common.open_pairs(evaluated).attrs(key)["gain"], rel=0.05)
    model = {"model": "fourier", "split": "test", "mask": "body"}
    found = {
        name: np.mean([float(r["value"]) for r in rows if all(r[k] == v for k, v in (model | wanted).items())])
        for name, wanted in {
            "plain": {"metric": "mse", "reference": "high"},
            "corrected": {"metric": "mse_corrected", "reference": "high"},
            "true": {"metric": "mse", "reference": "truth"},
        }.items()
    }
    assert found["plain"] > 1.15 * found["true"]
    assert found["corrected"] == pytest.approx(found["true"], rel=0.05)


def test_only_kept_slices_of_the_splits_count(rows):
    assert {row["slice"] for row in rows} == {"0", "1"}
    assert {(row["subject"], row["split"]) for row in rows} == {
        ("mouse02", "validation"),
        ("mouse03", "test"),
        ("mouse04", "test"),
        ("lego", "lego"),
    }


def test_splits_by_slice_are_told_apart_within_a_scan(tmp_path):
    write_cohort(tmp_path, slices=9, subjects=("mouse01",), scans=(("HT", "axial"), ("HT", "axial_2")))
    write_pairs(tmp_path, split_by="slice", test=(), validation=())
    evaluate.run(config(tmp_path, models=(), splits=("test", "validation")))
    pairs = common.open_pairs(tmp_path)
    splits = pairs.read("mouse01/HT/axial_2", "split")
    indices = pairs.read("mouse01/HT/axial_2", "slice_index")
    table = common.read_table(tmp_path / "results" / "metrics.csv", evaluate.COLUMNS)
    for name in ("test", "validation"):
        expected = set(indices[splits == common.SPLITS.index(name)])
        assert expected
        here = [row for row in table if (row["split"], row["plane"]) == (name, "axial_2")]  # an animal's second pair
        assert {int(row["slice"]) for row in here} == expected
    assert len({tuple(row[name] for name in evaluate.COLUMNS[:-2]) for row in table}) == len(table)
    store = common.Store(tmp_path / "results" / "low.zarr", "06")
    assert set(store.scans) == {"mouse01/HT/axial", "mouse01/HT/axial_2"}


def test_summary_follows_its_schema_and_the_table(evaluated, rows):
    summary = json.loads((evaluated / "results" / "summary.json").read_text())
    assert set(summary) == set(MODELS)
    for splits in summary.values():
        assert set(splits) == {"test", "lego", "validation"}
        for split, metrics in splits.items():
            for figures in metrics.values():
                assert set(figures) == {"mean", "ci95", "animals"}
                assert figures["animals"] == (2 if split == "test" else 1)
                lower, upper = figures["ci95"]
                assert lower <= figures["mean"] + 1e-12
                assert upper >= figures["mean"] - 1e-12
    masked = {
        f"{m}{r}{k}"
        for m in ("mse", "mse_range", "psnr", "ssim", "mse_ratio")
        for r in ("", "_truth")
        for k in ("", "_body", "_air")
    }
    others = {
        "mean_ratio_body",
        "max_ratio_body",
        "mean_ratio_truth_body",
        "max_ratio_truth_body",
        "mse_corrected_body",
    }
    boxes = {"cnr", "cnr_abs", "nstd", "contrast_recovery", "contrast_recovery_truth"}
    assert set(summary["unet"]["test"]) == masked | others | boxes
    assert set(summary["high"]["test"]) == {n for n in masked | others if "truth" in n} | boxes - {"contrast_recovery"}
    wanted = {"model": "nlm", "split": "test", "metric": "mse", "reference": "high", "mask": "body"}
    by_animal = [
        np.mean([float(r["value"]) for r in rows if r["subject"] == s and all(r[k] == v for k, v in wanted.items())])
        for s in TEST
    ]
    assert summary["nlm"]["test"]["mse_body"]["mean"] == pytest.approx(np.mean(by_animal), rel=1e-6)
    assert summary["low"]["test"]["mse_ratio_body"]["mean"] == 1.0


def test_denoising_helps_and_alignment_helps(evaluated):
    """The order that theory gives: low, half a pixel off, below Fourier below tuned non-local means."""
    summary = json.loads((evaluated / "results" / "summary.json").read_text())
    psnr = {model: summary[model]["test"]["psnr_truth_body"]["mean"] for model in ("low", "fourier", "nlm")}
    assert psnr["low"] + 0.5 < psnr["fourier"] < psnr["nlm"]


def test_strength_is_chosen_on_validation_slices_alone(evaluated, copied, monkeypatch):
    seen = []
    real = evaluate.load_scan
    monkeypatch.setattr(evaluate, "load_scan", lambda cfg, key: seen.append(key) or real(cfg, key))
    strength, curve = evaluate.tune(config(evaluated, tuning_slices=100))
    assert {key.split("/")[0] for key in seen} == set(VALIDATION)
    assert strength == float(min(curve, key=curve.get))
    # Test animals replaced by noise: the choice and its errors stay as they are.
    for key in common.open_curated(copied).scans:
        if key.startswith(TEST):
            attributes = common.scan_attributes(copied / "data" / "curated.zarr", key)
            arrays = {name: common.open_curated(copied).read(key, name) for name in ("low", "high", "keep")}
            arrays = {n: rng(8).random(a.shape, np.float32) if n != "keep" else a for n, a in arrays.items()}
            common.write_scan(copied / "data" / "curated.zarr", key, arrays, attributes)
    monkeypatch.setattr(evaluate, "load_scan", real)
    assert evaluate.tune(config(copied, tuning_slices=100)) == (strength, curve)


def test_network_images_are_the_networks_own(evaluated):
    import networks

    key = "mouse03/HT/axial"
    pairs = common.open_pairs(evaluated)
    net, _ = networks.load_unet(evaluated / "runs" / "unet" / "best.pt", pairs.attributes["settings"])
    low = common.upsample(common.open_curated(evaluated).read(key, "low"), 2, "fourier")
    scale = np.r_[
        pairs.read(key, "scale"),
        low[2, slice(*pairs.attrs(key)["box"][:2]), slice(*pairs.attrs(key)["box"][2:])].mean(),
    ]
    wanted = networks.restore(net, low, scale.astype(np.float32), np.zeros(3, np.float32), flips=True)
    assert np.allclose(images(evaluated, "unet", key), wanted, rtol=1e-3, atol=1e-2 * low.max())


def test_a_second_run_writes_no_image_again_and_gives_the_same_tables(copied, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in (copied / "results").rglob("c/*/*/*")}
    tables = {name: (copied / "results" / name).read_bytes() for name in ("metrics.csv", "summary.json", "rois.csv")}
    assert len(before) == len(MODELS) * 7
    evaluate.run(config(copied))
    assert {p: p.stat().st_mtime_ns for p in (copied / "results").rglob("c/*/*/*")} == before
    assert {name: (copied / "results" / name).read_bytes() for name in tables} == tables


def test_another_checkpoint_or_setting_renews_only_what_depends_on_it(copied):
    before = {m: images(copied, m, "lego/LEGO/axial") for m in MODELS}
    write_network(copied, seed=2)
    evaluate.run(config(copied, strengths=(2.0,)))
    changed = {m for m in MODELS if not np.array_equal(images(copied, m, "lego/LEGO/axial"), before[m])}
    assert changed == {"nlm", "unet"}


def test_two_workers_give_the_same_tables(copied):
    tables = {name: (copied / "results" / name).read_bytes() for name in ("metrics.csv", "summary.json", "rois.csv")}
    for model in MODELS:
        shutil.rmtree(copied / "results" / f"{model}.zarr")
    evaluate.run(dataclasses.replace(config(copied), workers=2))
    assert {name: (copied / "results" / name).read_bytes() for name in tables} == tables


def test_an_interrupted_run_leaves_incomplete_stores_and_the_next_one_completes(copied, monkeypatch):
    write_network(copied, seed=3)
    real, calls = evaluate.write_scan, []

    def stop(store, key, arrays, attributes):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(store, key, arrays, attributes)

    monkeypatch.setattr(evaluate, "write_scan", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config(copied))
    with pytest.raises(common.InputError, match="no such store"):
        common.Store(copied / "results" / "unet.zarr", "06_evaluate.py")
    monkeypatch.setattr(evaluate, "write_scan", real)
    evaluate.run(config(copied))
    fresh = copied.parent / "fresh"
    shutil.copytree(copied, fresh)
    shutil.rmtree(fresh / "results")
    evaluate.run(config(fresh))
    for name in ("metrics.csv", "summary.json"):
        assert (copied / "results" / name).read_bytes() == (fresh / "results" / name).read_bytes()


def test_without_truth_all_else_is_there(copied):
    shutil.rmtree(copied / "data" / "truth.zarr")
    summary = evaluate.run(config(copied))
    assert not [name for name in summary["unet"]["test"] if "truth" in name]
    assert summary["unet"]["test"]["ssim_body"]["animals"] == 2


# ---------------------------------------------------------------- boxes


def draw(root: Path, *boxes: tuple) -> None:
    common.write_table(root / "data" / "rois.csv", evaluate.Box._fields, [evaluate.Box(*b)._asdict() for b in boxes])


def test_boxes_without_drawn_ones_lie_in_the_body_of_the_middle_slice(evaluated):
    table = common.read_table(evaluated / "results" / "rois.csv", evaluate.Box._fields)
    keys = {row["key"] for row in table}
    assert keys <= set(common.Store(evaluated / "results" / "low.zarr", "06").scans)
    assert len(keys) >= 5  # a body may have no room for two
    assert len(table) == 2 * len(keys)
    for row in table:
        body = common.body_mask(images(evaluated, "fourier", row["key"])[:2])[int(row["slice"])]
        y0, y1, x0, x1 = (int(row[name]) for name in ("y0", "y1", "x0", "x1"))
        assert body[y0:y1, x0:x1].all()
        assert (y1 - y0, x1 - x0, row["name"]) == (10, 10, "auto")


def test_drawn_boxes_are_used_for_all_models_and_give_equations_13_and_14(copied):
    key = "mouse03/HT/axial"
    roi, background = (key, 1, "liver", "roi", 20, 26, 30, 40), (key, 1, "muscle", "background", 40, 48, 24, 30)
    draw(
        copied, roi, background, (key, 2, "dropped", "roi", 0, 4, 0, 4), (key, 2, "dropped", "background", 9, 12, 9, 12)
    )
    evaluate.run(config(copied))
    used = [r for r in common.read_table(copied / "results" / "rois.csv", evaluate.Box._fields) if r["key"] == key]
    assert [r["name"] for r in used] == ["liver", "muscle"]
    table = common.read_table(copied / "results" / "metrics.csv", evaluate.COLUMNS)
    place = {"subject": "mouse03", "region": "HT", "slice": 1, "mask": "box:liver"}
    contrasts = {}
    for model in MODELS:
        image = np.float64(images(copied, model, key))[1]
        inside, outside = image[20:26, 30:40], image[40:48, 24:30]
        contrasts[model] = inside.mean() - outside.mean()
        cnr = contrasts[model] / outside.std()
        assert value(table, model=model, metric="cnr", **place) == pytest.approx(cnr, rel=1e-6)
        nstd = outside.std() / outside.mean()
        assert value(table, model=model, metric="nstd", **place) == pytest.approx(nstd, rel=1e-6)
    recovery = value(table, model="low", metric="contrast_recovery", reference="high", **place)
    assert recovery == pytest.approx(contrasts["low"] / contrasts["high"], rel=1e-4)


# ---------------------------------------------------------------- bad input

KEY = "mouse03/HT/axial"
PAIR = (KEY, 1, "a", "background", 0, 4, 0, 4)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([("mouse99/HT/axial", 0, "a", "roi", 0, 4, 0, 4)], "line 2: mouse99/HT/axial"),
        ([PAIR, (KEY, 1, "a", "roi", 60, 70, 0, 4)], "line 3: .* in 3 slices of 64 x 64"),
        ([PAIR, (KEY, 1, "a", "roi", 8, 8, 0, 4)], "line 3"),
        ([PAIR, (KEY, 3, "a", "roi", 0, 4, 0, 4)], "line 3"),
        ([PAIR, (KEY, 1, "a", "roi", -2, 4, 0, 4)], "line 3"),
        ([PAIR, (KEY, 1, "a", "organ", 0, 4, 0, 4)], "line 3: .*organ"),
        ([PAIR, (KEY, "one", "a", "roi", 0, 4, 0, 4)], "line 3: .*one"),
        ([(KEY, 1, "a", "roi", 0, 4, 0, 4)], "slice 1: .* expected one background"),
        ([PAIR], "slice 1: .* expected one background"),
    ],
)
def test_a_box_that_cannot_be_is_refused(copied, boxes, words):
    draw(copied, *boxes)
    with pytest.raises(common.InputError, match=words) as found:
        evaluate.run(config(copied))
    assert "rois.csv" in str(found.value)


def refused(root: Path, *options: str) -> str:
    """The one line with which the command ends."""
    command = [sys.executable, "06_evaluate.py", "--preset", "smoke", "--root", str(root), "--workers", "1", *options]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_an_apddm_is_judged_beside_the_u_net_with_its_intervals(copied):
    apddm = importlib.import_module("05_apddm")
    chosen = {"root": copied, "patch": 32, "steps_per_epoch": 4, "precision": "float32", "device": "cpu", "samples": 4}
    apddm.run(dataclasses.replace(apddm.PRESETS["smoke"], **chosen))
    summary = evaluate.run(config(copied, models=("unet", "apddm"), splits=("test",)))
    assert summary["apddm"]["test"]["mse_body"]["mean"] > 0
    key = f"{TEST[0]}/HT/axial"
    store, scan = common.Store(copied / "results" / "apddm.zarr", "06"), evaluate.load_scan(config(copied), key)
    restored, width = (store.read(key, name, 3, "float32") for name in ("restored", "half_width"))
    rows = common.read_table(copied / "results" / "metrics.csv", evaluate.COLUMNS)
    place = {"model": "apddm", "subject": TEST[0], "region": "HT", "slice": 1, "reference": "truth", "mask": "body"}
    error = np.abs(restored - scan.references["truth"])[1][scan.body[1]]
    inside = error <= width[1][scan.body[1]]
    assert value(rows, metric="coverage", **place) == pytest.approx(inside.mean())
    assert value(rows, metric="error_rank", **place) == pytest.approx(
        spearmanr(width[1][scan.body[1]], error).statistic
    )
    assert 0 < summary["apddm"]["test"]["coverage_body"]["mean"] < 1
    # Intervals are those of one sampling; of another one there are none.
    summary = evaluate.run(config(copied, models=("apddm",), splits=("test",), samples=2))
    assert "coverage_body" not in summary["apddm"]["test"]
    with pytest.raises(common.InputError, match="steps: found 999"):
        evaluate.run(config(copied, models=("apddm",), steps=999))


def test_a_missing_checkpoint_ends_in_one_line_and_changes_nothing(copied):
    before = sorted((p, p.stat().st_mtime_ns) for p in (copied / "results").rglob("*"))
    assert str(Path("runs") / "apddm" / "best.pt") in refused(copied, "--models", "unet", "apddm")
    assert sorted((p, p.stat().st_mtime_ns) for p in (copied / "results").rglob("*")) == before


def test_a_checkpoint_of_other_pairs_is_refused(copied):
    write_pairs(copied, normalise="zscore")
    with pytest.raises(common.InputError, match=r"best\.pt: .*normalise"):
        evaluate.run(config(copied))


def test_a_checkpoint_that_knows_a_test_animal_is_refused(copied):
    write_network(copied, splits={"train": ["mouse01", "mouse04"]})
    with pytest.raises(common.InputError, match=r"best\.pt: trained on mouse04"):
        evaluate.run(config(copied))


def test_a_model_named_like_a_baseline_is_refused(evaluated):
    with pytest.raises(common.InputError, match="--models: nlm found"):
        evaluate.run(config(evaluated, models=("nlm",)))


def test_missing_stores_and_empty_splits_are_named(copied, tmp_path):
    with pytest.raises(common.InputError, match=r"no slice of unused found"):
        evaluate.run(config(copied, splits=("unused",)))
    shard = next((copied / "data" / "curated.zarr" / KEY / "high" / "c").rglob("0/0/0"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(common.InputError, match=f"{KEY}/high"):
        evaluate.run(config(copied))
    assert "pairs.zarr: no such store" in refused(tmp_path / "nothing")


def test_pairs_of_other_images_are_refused(copied):
    attributes = common.scan_attributes(copied / "data" / "curated.zarr", KEY)
    arrays = {
        "low": np.ones((3, 20, 20), np.float32),
        "high": np.ones((3, 40, 40), np.float32),
        "keep": np.ones(3, bool),
    }
    common.write_scan(copied / "data" / "curated.zarr", KEY, arrays, attributes)
    with pytest.raises(common.InputError, match=r"full_shape \[3, 64, 64\] found, expected \[3, 40, 40\]"):
        evaluate.run(config(copied))


def test_tables_are_plain_csv(evaluated):
    with (evaluated / "results" / "metrics.csv").open(newline="") as stream:
        header = next(csv.reader(stream))
    assert ",".join(header) == "model,split,subject,region,plane,slice,metric,reference,mask,range,value"
