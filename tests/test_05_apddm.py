"""The anchored path against closed forms, its sampler against theory, its training against interruptions."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import anchored
import common
import networks
from common import InputError

REPO = Path(__file__).resolve().parent.parent
apddm = importlib.import_module("05_apddm")


# ---------------------------------------------------------------- data


def write_pairs(root: Path, shape=(56, 64), slices=4, normalise="mean", odd_test=False) -> None:
    """Smooth bodies, a noisy high image and a coarser low one, of two training, two validation and one test animal."""
    store, keys = root / "data" / "pairs.zarr", []
    splits = {"train": ["m1", "m2"], "validation": ["m3", "m4"], "test": ["m5"]}
    for split, animals in splits.items():
        for animal in animals:
            rng = np.random.default_rng(np.random.SeedSequence([7, int(animal[1])]))
            truth = 1 + 5 * ndimage.gaussian_filter(rng.normal(size=(slices, *shape)), (0, 3, 3))
            truth *= np.hypot(*np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")) < 1
            high = abs(truth + 0.05 * (rng.normal(size=truth.shape) + 1j * rng.normal(size=truth.shape)))
            coarse = truth.reshape(slices, shape[0] // 2, 2, shape[1] // 2, 2).mean((2, 4))
            noise = 0.25 * (rng.normal(size=coarse.shape) + 1j * rng.normal(size=coarse.shape))
            low = np.float32(np.repeat(np.repeat(abs(coarse + noise), 2, 1), 2, 2))
            high = high * (50 if odd_test and split == "test" else 1)
            scale, offset = common.normalisation(low, normalise)
            images = {"low": low, "high": high}
            arrays = {
                name: np.float32((image - offset[:, None, None]) / scale[:, None, None])
                for name, image in images.items()
            }
            arrays |= {"scale": scale, "offset": offset, "slice_index": np.arange(slices, dtype=np.int32)}
            arrays |= {"split": np.full(slices, common.SPLITS.index(split), np.uint8)}
            attributes = {"box": [0, shape[0], 0, shape[1]], "full_shape": [slices, *shape], "ratio": [2, 2]}
            attributes |= {"spacing_mm": [0.6, 0.1, 0.1], "fingerprint": animal}
            keys.append(f"{animal}/HT/axial")
            common.write_scan(store, keys[-1], arrays, attributes)
    settings = {"normalise": normalise, "align": "centres", "upsample": "nearest"}
    attributes = {"settings": settings, "split_by": "animal", "splits": splits}
    common.finish_store(store, keys, attributes | {"fingerprint": common.fingerprint(settings, shape, odd_test)})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("apddm")
    write_pairs(folder)
    return folder


def small(root: Path, **changes) -> apddm.Config:
    """A training of a second or two."""
    settings = {"root": root, "patch": 48, "steps_per_epoch": 8, "precision": "float32", "device": "cpu", "ema": 0.9}
    return dataclasses.replace(apddm.PRESETS["smoke"], **(settings | changes))


def checkpoint(**changes) -> dict:
    """What a new APDDM is made of."""
    config = {"timesteps": "all", "parametrization": "residual", "condition": False, "embedding": 16, "rotations": True}
    config |= {"steps": 2, "samples": 3, "eta": 1.0, "noisy_start": True}
    network = networks.plain(networks.UNetConfig((8, 16), (), "meanpool", "bilinear", "ReLU", True))
    path = {"weights": torch.from_numpy(anchored.schedule_values("parabola", 10)), "beta": 0.3}
    bank = [torch.randn(20, 28, generator=networks.seeded(1, n)).half() for n in range(6)]
    return {"config": config | changes, "network": network, "path": path, "bank": bank}


def path_of(length: int, beta: float = 1.0, schedule="parabola") -> anchored.AnchoredPath:
    return anchored.AnchoredPath(torch.from_numpy(anchored.schedule_values(schedule, length)), beta)


# ---------------------------------------------------------------- path


def equation_29(t: np.ndarray, length: int) -> np.ndarray:
    t, n = np.asarray(t, float), float(length)
    inner = 6 * t**3 - 15 * t**2 * n + 9 * t**2 + 10 * t * n**2 - 15 * t * n + t + 5 * n**2 - 1
    return 8 / 15 / n**4 * t * (t + 1) * inner


@pytest.mark.parametrize("length", [2, 5, 10, 100, 1000])
def test_sums_are_those_of_equations_28_and_29(length):
    sums = path_of(length).sums.numpy()
    np.testing.assert_allclose(sums, equation_29(np.arange(length + 1), length), rtol=1e-10, atol=1e-12)
    assert sums[-1] == pytest.approx(8 * (length**4 - 1) / (15 * length**3), rel=1e-12)


@pytest.mark.parametrize("length", [10, 100, 1000])
def test_variance_of_a_chain_is_the_closed_form(length):
    path = path_of(length, beta=0.3)
    generator = networks.seeded(2, length)
    walked = np.array([float(x.square().mean()) for x in anchored.walk(path, anchored.gaussian, (400, 500), generator)])
    expected = 0.3**2 * equation_29(np.arange(1, length + 1), length) * 15 * length**3 / (8 * (length**4 - 1))
    kept = expected > 1e-12  # f(T) = 0 leaves the last two equal, but T = 1000 starts near 0
    np.testing.assert_allclose(walked[kept], expected[kept], rtol=0.01)
    assert walked[-1] == pytest.approx(0.3**2, rel=0.01)  # Eq. 33


def test_equation_32_as_printed_gives_variance_beta_not_its_square():
    length, beta = 100, 0.3
    printed = math.sqrt(15 / 8 * length**3 / (length**4 - 1) * beta)
    generator = networks.seeded(3)
    weights = (printed * path_of(length).weights).tolist()
    end = sum(w * torch.randn(300, 300, generator=generator) for w in weights)
    assert float(end.square().mean()) == pytest.approx(beta, rel=0.02)
    assert float(end.square().mean()) > 3 * beta**2
    assert path_of(length, beta).sigma == pytest.approx(printed * math.sqrt(beta))


def test_equation_30_as_printed_leaves_the_scale_of_the_residuals():
    residual = 0.2 * torch.randn(200, 200, generator=networks.seeded(4)) + 0.05
    assert float((residual / residual.var()).std()) == pytest.approx(1 / 0.2, rel=0.02)
    slices, figures = anchored.standardise([residual])
    assert float(slices[0].float().std()) == pytest.approx(1, rel=0.002)
    assert float(slices[0].float().mean()) == pytest.approx(0, abs=1e-3)
    assert figures["rms"] ** 2 == pytest.approx(figures["mean"] ** 2 + figures["deviation"] ** 2)


def test_uncentred_residuals_drift_by_two_thirds_of_the_steps():
    length, mean = 50, 0.1
    path = path_of(length)
    noise = anchored.NoiseBank([torch.full((8, 8), mean)])
    (*_, end) = anchored.walk(path, noise, (8, 8), networks.seeded(5))
    np.testing.assert_allclose(end, path.sigma * mean * 2 * (length**2 - 1) / (3 * length), rtol=1e-5)
    slices, _ = anchored.standardise([mean + torch.randn(64, 64, generator=networks.seeded(6)) for _ in range(4)])
    ends = [path.noise(anchored.NoiseBank(slices), length, (64, 64), networks.seeded(7, n), True) for n in range(20)]
    assert abs(float(torch.stack(ends).mean())) < 0.02


@pytest.mark.parametrize("schedule", ["parabola", "halfsine", "constant", lambda u: u * np.exp(-3 * u)])
def test_every_schedule_ends_with_variance_beta_squared_whatever_its_length(schedule):
    for length in (3, 10, 400):
        path = path_of(length, 0.7, schedule)
        assert float(path.variance[-1]) == pytest.approx(0.49)
        assert (path.variance.diff() >= 0).all()


def test_beta_critical_is_equation_37():
    for length in (2, 10, 100):
        weights = anchored.schedule_values("parabola", length)
        expected = math.sqrt(8 * (length**4 - 1) / (15 * length**5)) * 0.28
        assert anchored.beta_critical(weights, 0.28) == pytest.approx(expected)


def test_states_of_a_batch_stand_where_equation_31_puts_them():
    path, generator = path_of(10, 0.4), networks.seeded(14)
    high, low = (torch.randn(5, 1, 60, 60, generator=generator) for _ in range(2))
    batch = networks.Batch(low, high, torch.ones(5, 1, 60, 60, dtype=torch.bool), torch.ones(5))
    steps, levels = [10, 10, 4, 4, 10], [0.0, 1.0, 1.0, 0.0, 0.5]
    for chain in (True, False):
        state = anchored.state_at(path, anchored.gaussian, batch, steps, levels, chain, generator)
        for x, x_0, y, t, level in zip(state, high, low, steps, levels, strict=True):
            noise = x - (x_0 + t / 10 * (y - x_0))
            assert float(noise.std()) == pytest.approx(level * math.sqrt(path.variance[t]), rel=0.06, abs=1e-6)


# ---------------------------------------------------------------- bank


def uneven_bank(**options) -> anchored.NoiseBank:
    """Slices of several sizes whose noise is not the same everywhere."""
    slices = []
    for number in range(12):
        height, width = 30 + 2 * number, 50 - 2 * number
        ramp = torch.linspace(0.2, 2, width) * torch.linspace(0.5, 1.5, height)[:, None] * (1 + number / 6)
        slices.append(0.03 + ramp * torch.randn(height, width, generator=networks.seeded(8, number)))
    return anchored.NoiseBank(anchored.standardise(slices)[0], **options)


@pytest.mark.parametrize("shape", [(16, 16), (24, 40), (70, 90)])
def test_draws_have_mean_0_and_variance_1_whatever_their_size(shape):
    bank, generator = uneven_bank(), networks.seeded(9)
    count = 12_000_000 // (shape[0] * shape[1])
    draws = torch.stack([bank([1.0], shape, generator) for _ in range(min(count, 6000))])
    assert draws.shape[1:] == shape
    assert float(draws.mean()) == pytest.approx(0, abs=0.02)
    assert float(draws.square().mean()) == pytest.approx(1, rel=0.03)


def test_chain_and_jump_have_one_variance_and_the_jump_heavier_tails():
    path, bank = path_of(10, 0.5), uneven_bank()
    for step in (4, 9):
        draws = {
            chain: torch.stack([path.noise(bank, step, (24, 24), networks.seeded(10, n), chain) for n in range(800)])
            for chain in (True, False)
        }
        variance = {chain: float(x.square().mean()) for chain, x in draws.items()}
        kurtosis = {chain: float((x**4).mean()) / variance[chain] ** 2 for chain, x in draws.items()}
        assert variance[True] == pytest.approx(float(path.variance[step]), rel=0.05)
        assert variance[False] == pytest.approx(float(path.variance[step]), rel=0.1)
        assert kurtosis[False] > kurtosis[True] + 0.5


def test_bank_turns_crops_that_are_not_square():
    slices = [torch.arange(12.0 * 20).reshape(12, 20).half()]
    bank = anchored.NoiseBank(slices)
    found = {int(bank([1.0], (4, 9), networks.seeded(11, n)).diff(dim=1)[0, 0]) for n in range(40)}
    assert {1, -1, 20, -20} <= found  # along x and along y, both ways


def test_edges_add_up_in_place_without_rotation():
    """Fig. 29: residuals that share an edge leave it in the end of the path, unless they are turned."""
    edge = torch.zeros(32, 32)
    edge[:, 10] = 3.0
    slices, _ = anchored.standardise([edge + torch.randn(32, 32, generator=networks.seeded(12, n)) for n in range(30)])
    path = path_of(50)
    visible = {}
    for rotations in (True, False):
        bank = anchored.NoiseBank(slices, rotations, positions=False)
        ends = torch.stack([path.noise(bank, 50, (32, 32), networks.seeded(13, n), True) for n in range(40)])
        visible[rotations] = float(ends.mean(0)[4:9, 10].mean() - ends.mean(0)[4:9].mean())
    assert visible[False] > 3
    assert visible[True] < visible[False] / 2


# ---------------------------------------------------------------- sampler


PRIOR, NOISE, MEAN = 0.8**2, 0.6**2, 1.5  # of a Gaussian pixel: variance of x_0, variance of y - x_0, mean of x_0


def posterior(low: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean and variance of x_0 given y."""
    gain = PRIOR / (PRIOR + NOISE)
    return MEAN + gain * (low - MEAN), PRIOR * (1 - gain)


def exact_network(path: anchored.AnchoredPath, end: torch.Tensor):
    """E[x_0 | x_t, y] of the Gaussian pixel."""

    def estimate(state: torch.Tensor, step: int) -> torch.Tensor:
        mean, variance = posterior(end)
        near = 1 - step / path.length
        gain = variance * near / (variance * near**2 + float(path.variance[step]))
        return mean + gain * (state - near * mean - (1 - near) * end)

    return estimate


def theory(path: anchored.AnchoredPath, times: list[int], eta: float, noisy: bool) -> float:
    """Variance of a sample about the posterior's mean: every map is affine, so it follows step by step."""
    variance = posterior(torch.zeros(1))[1]
    spread = path.beta**2 if noisy else 0.0
    for t, s in zip(times, [*times[1:], 0], strict=True):
        v_t, v_s = float(path.variance[t]), float(path.variance[s])
        near_t, near_s = 1 - t / path.length, 1 - s / path.length
        gain = variance * near_t / (variance * near_t**2 + v_t)
        fresh = eta * v_s * (v_t - v_s) / v_t
        slope = near_s * gain + math.sqrt((v_s - fresh) / v_t) * (1 - near_t * gain)
        spread = slope**2 * spread + fresh
    return spread


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_sampler_on_the_gaussian_toy(steps, eta):
    path = path_of(20, 0.7)
    count, low, generator = 200_000, 2.1, networks.seeded(20, steps, int(10 * eta))
    end = torch.full((count,), low, dtype=torch.float64)
    mean = float(posterior(end[:1])[0])
    times = anchored.sampling_times(20, steps)
    for noisy in (True, False):
        found = anchored.sample(
            exact_network(path, end), end, path, times, eta, noisy,
            lambda: torch.randn(count, generator=generator, dtype=torch.float64),
        )  # fmt: skip
        spread = theory(path, times, eta, noisy)
        assert float(found.mean()) == pytest.approx(mean, abs=5 * math.sqrt(spread / count) + 1e-9)
        assert float(found.var()) == pytest.approx(spread, rel=5 * math.sqrt(2 / count), abs=1e-12)


def test_many_ancestral_steps_draw_from_the_posterior_and_few_are_too_narrow():
    variance = posterior(torch.zeros(1))[1]
    shares = {
        steps: theory(path_of(2000, 0.7), anchored.sampling_times(2000, steps), 1.0, True) / variance
        for steps in (1, 4, 100, 2000)
    }
    assert shares[1] == pytest.approx(0, abs=1e-12)
    assert shares[4] < 0.6
    assert shares[100] == pytest.approx(1, abs=0.07)
    assert shares[2000] == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["parabola", "halfsine", "constant"])
def test_with_x_0_known_every_state_has_the_forward_path_s_law(schedule, eta):
    path = path_of(12, 0.6, schedule)
    count, generator = 100_000, networks.seeded(21)
    clean, end = torch.full((count,), -0.4), torch.full((count,), 1.3)
    seen = {}

    def oracle(state: torch.Tensor, step: int) -> torch.Tensor:
        seen[step] = state
        return clean

    draw = lambda: torch.randn(count, generator=generator)  # noqa: E731
    times = [12, 11, 7, 3, 1]
    assert torch.equal(anchored.sample(oracle, end, path, times, eta, True, draw), clean)
    assert list(seen) == times
    for step, state in seen.items():
        variance = float(path.variance[step])
        expected = -0.4 + step / 12 * 1.7
        assert float(state.mean()) == pytest.approx(expected, abs=5 * math.sqrt(variance / count))
        assert float(state.var()) == pytest.approx(variance, rel=0.025)


def test_results_do_not_depend_on_the_length_of_the_path():
    """The end's variance is beta squared for every T; the toy's error after 1, 2, 4 steps moves < 0.1 dB."""
    for steps in (1, 2, 4):
        errors = [
            posterior(torch.zeros(1))[1]
            + theory(path_of(length, 0.7), anchored.sampling_times(length, steps), 1.0, True)
            for length in (20, 100, 1000)
        ]
        assert 10 * math.log10(max(errors) / min(errors)) < 0.1


def test_sampling_times_run_from_the_end_to_the_start():
    for length in (1, 7, 100):
        for steps in range(1, length + 1):
            times = anchored.sampling_times(length, steps)
            assert len(times) == steps == len(set(times))
            assert times[0] == length
            assert times == sorted(times, reverse=True)
            assert times[-1] >= 1


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize("unshuffle", [1, 2])
def test_one_step_of_a_new_model_is_the_u_net_s_estimate(condition, unshuffle):
    content = checkpoint(condition=condition)
    content["network"]["unshuffle"] = unshuffle
    unet = networks.UNet(networks.UNetConfig(**content["network"]), networks.seeded(30))
    torch.nn.init.normal_(unet.last.weight, generator=networks.seeded(31))
    model = anchored.APDDM(content, networks.seeded(32))
    model.take_weights(unet.state_dict())
    image = torch.randn(3, 1, 16, 24, generator=networks.seeded(33))
    with torch.inference_mode():
        for step in (10, 4):
            torch.testing.assert_close(model.estimate(image, step, image), unet(image), rtol=1e-5, atol=1e-5)


def test_a_network_without_embedding_keeps_its_first_weights():
    config = networks.UNetConfig((8, 16), (), "meanpool", "bilinear", "ReLU", False)
    plain, told = (networks.UNet(config, networks.seeded(34), 1, width) for width in (0, 16))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, told.state_dict()[name])


def test_the_place_on_the_path_reaches_every_level():
    net = networks.UNet(networks.UNetConfig((8, 16, 24), (), "meanpool", "bilinear", "ReLU", False), embedding=16)
    image = torch.randn(2, 1, 16, 16, generator=networks.seeded(35))
    net(image, torch.tensor([0.2, 0.7])).square().sum().backward()
    for level in net.embedding.levels:
        assert float(level.weight.grad.abs().sum()) > 0
    for level in net.embedding.levels:
        torch.nn.init.normal_(level.weight, std=0.1, generator=networks.seeded(36))
    with torch.inference_mode():
        one, two = (net(image, torch.full((2,), place)) for place in (0.3, 0.31))
    assert not torch.allclose(one, two)


def scan(slices=3, shape=(21, 26)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    low = np.float32(generator.normal(50, 10, (slices, *shape)))
    return low, np.float32(generator.uniform(20, 40, slices)), np.float32(generator.normal(0, 5, slices))


def trained(**changes) -> anchored.APDDM:
    """A model whose last layers are not 0."""
    model = anchored.APDDM(checkpoint(**changes), networks.seeded(37))
    for parameter in (model.net.last.weight, *(level.weight for level in model.net.embedding.levels)):
        torch.nn.init.normal_(parameter, std=0.05, generator=networks.seeded(38))
    return model


def test_restoring_one_step_from_the_low_image_is_the_network_s_own_restoring():
    model, (low, scale, offset) = trained(), scan()
    mean, deviation = anchored.restore_apddm(
        model, low, scale, offset, 1, 1, 0.0, False, networks.seeded(39), 2, "float32"
    )
    np.testing.assert_allclose(mean, networks.restore(model.net, low, scale, offset, 2, precision="float32"), rtol=1e-5)
    assert not deviation.any()


def test_restoring_does_not_depend_on_the_batch_and_gives_mean_and_deviation():
    model, (low, scale, offset) = trained(condition=True), scan()

    def restored(batch: int, samples: int = 5, seed: int = 40) -> tuple[np.ndarray, np.ndarray]:
        generator = networks.seeded(seed)
        return anchored.restore_apddm(model, low, scale, offset, 3, samples, 1.0, True, generator, batch, "float32")

    mean, deviation = restored(1)
    assert mean.shape == deviation.shape == low.shape
    assert (deviation > 0).all()
    for one, two in zip((mean, deviation), restored(7), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4)
    assert not np.allclose(mean, restored(7, seed=41)[0], rtol=1e-4)
    singles = [restored(4, 1, seed=42 + n)[0] for n in range(40)]
    np.testing.assert_allclose(np.std(singles, axis=0, ddof=1).mean(), deviation.mean(), rtol=0.2)


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"parametrization": "paper"}, (1, 1, 0.0, False), "f(T) = 0"),
        ({}, (11, 1, 0.0, False), "steps: found 11"),
        ({}, (0, 1, 0.0, False), "steps: found 0"),
        ({"timesteps": "last"}, (2, 1, 0.0, False), "trained at T alone"),
        ({}, (4, 8, 0.0, False), "all samples are equal"),
        ({}, (1, 8, 1.0, False), "all samples are equal"),
        ({}, (4, 0, 1.0, True), "samples: found 0"),
        ({}, (4, 1, 1.5, True), "eta: found 1.5"),
    ],
)
def test_sampling_that_cannot_be_is_refused(changes, arguments, words):
    model, (low, scale, offset) = anchored.APDDM(checkpoint(**changes)), scan()
    with pytest.raises(InputError) as caught:
        anchored.restore_apddm(model, low, scale, offset, *arguments, networks.seeded(0))
    assert words in str(caught.value)


def test_paper_s_parametrisation_starts_from_t_below_the_end():
    model = anchored.APDDM(checkpoint(parametrization="paper"), networks.seeded(43))
    torch.nn.init.normal_(model.net.last.weight, generator=networks.seeded(44))
    image = torch.randn(1, 1, 16, 16, generator=networks.seeded(45))
    with torch.inference_mode():
        assert torch.equal(model.estimate(image, 10, image), image)  # Eq. 10 at t = T
        middle = model.estimate(image, 3, image)
        torch.testing.assert_close(middle, image + 4 * 0.3 * 0.7 * (model.net(image, torch.tensor([0.3])) - image))


# ---------------------------------------------------------------- intervals


def test_conformal_factor_covers_new_errors_though_the_deviation_is_too_small():
    generator = np.random.default_rng(6)
    deviation = generator.uniform(0.1, 2, 40_000)
    scores = abs(generator.normal(size=40_000) * deviation) / (deviation / 3)
    factor = anchored.conformal_factor(scores[:20_000], 0.9)
    assert factor == pytest.approx(3 * 1.645, rel=0.03)
    assert (scores[20_000:] <= factor).mean() == pytest.approx(0.9, abs=0.01)
    assert anchored.conformal_factor(scores[:5], 0.9) == math.inf  # five scores cannot promise nine tenths
    draws = generator.exponential(size=(4000, 20))
    covered = np.mean([d[-1] <= anchored.conformal_factor(d[:-1], 0.9) for d in draws])
    assert 0.885 < covered < 0.965  # at least the promise, at most 1 / (n + 1) more


# ---------------------------------------------------------------- training


def test_training_restores_better_than_the_low_image_and_calibrates(root):
    summary = apddm.run(small(root, run="good", steps_per_epoch=80, epochs=3, beta=2.0))
    folder = root / "runs" / "good"
    store = common.open_pairs(root)
    pairs = {key: [store.read(key, name) for name in ("low", "high")] for key in store.scans}
    error = np.mean([np.square(np.subtract(*pairs[key])).mean() for key in ("m3/HT/axial", "m4/HT/axial")])
    assert summary["best_validation_mse"] < 0.6 * error
    model, content = anchored.load_apddm(folder / "best.pt", store.attributes["settings"])
    assert content["interval"]["factor"] == summary["interval"]["factor"] > 1
    assert set(content["interval"]["animals"]) == {"m3", "m4"}  # validation animals and no others
    low, high = pairs["m5/HT/axial"]
    ones = np.ones(len(low), np.float32)
    mean, deviation = anchored.restore_apddm(
        model, low, ones, 0 * ones, 2, 4, 1.0, True, networks.seeded(46), precision="float32"
    )
    assert np.square(mean - high).mean() < 0.6 * np.square(low - high).mean()
    assert (abs(mean - high) <= content["interval"]["factor"] * deviation).mean() == pytest.approx(0.9, abs=0.06)
    figures = np.load(folder / "figures.npz")
    section = (
        (Path(apddm.__file__).parent / "docs" / "DATA.md").read_text().split("`figures.npz` of 05")[1].split("##")[0]
    )
    named = [name for row in re.findall(r"^\| (`.*?) \|", section, flags=re.M) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(figures.files)
    np.testing.assert_allclose(figures["variance_walked"], figures["variance"], rtol=0.05)
    np.testing.assert_allclose(figures["mse_end"], figures["beta"] ** 2, rtol=0.1)
    assert [row["epoch"] for row in common.read_table(folder / "history.csv", apddm.COLUMNS)] == ["1", "2", "3"]
    assert json.loads((folder / "summary.json").read_text())["beta"] == pytest.approx(2 * summary["beta_critical"])


def test_bank_is_of_the_training_animals_alone(root, tmp_path):
    write_pairs(tmp_path, odd_test=True)
    summary = apddm.run(small(tmp_path, epochs=1, steps_per_epoch=1, samples=1))
    store = common.open_pairs(tmp_path)
    scans = [[store.read(f"{m}/HT/axial", name) for name in ("low", "high")] for m in ("m1", "m2")]
    residuals = np.concatenate([low - high for low, high in scans])
    assert summary["deviation"] == pytest.approx(float(residuals.std(dtype=np.float64)), rel=1e-6)
    assert summary["rms"] == pytest.approx(math.sqrt(np.square(residuals, dtype=np.float64).mean()), rel=1e-6)
    bank = networks.load_checkpoint(tmp_path / "runs" / "apddm" / "best.pt")["bank"]
    expected = (residuals - summary["mean"]) / summary["deviation"]
    np.testing.assert_allclose(torch.stack(bank).float().numpy(), expected, atol=5e-3)


@pytest.mark.parametrize("draws", ["jump", "chain"])
def test_a_stopped_run_goes_on_to_the_same_bits(root, monkeypatch, draws):
    settings = {"epochs": 3, "steps_per_epoch": 4, "draws": draws, "beta_range": True, "end_share": 0.5}
    apddm.run(small(root, run=f"whole_{draws}", **settings))
    save, count = networks.save_checkpoint, []

    def stop(path: Path, content: dict) -> None:
        count.append(path.name)
        if count.count("last.pt") == 2:
            raise KeyboardInterrupt
        save(path, content)

    monkeypatch.setattr(networks, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        apddm.run(small(root, run=f"stopped_{draws}", **settings))
    monkeypatch.undo()
    apddm.run(small(root, run=f"stopped_{draws}", **settings))
    for name in ("best.pt", "last.pt"):
        one, two = (networks.load_checkpoint(root / "runs" / f"{run}_{draws}" / name) for run in ("whole", "stopped"))
        for part in ("weights", "training"):
            assert_equal(one.get(part), two.get(part))
        assert one.get("interval") == two.get("interval")
    again = apddm.run(small(root, run=f"stopped_{draws}", **settings))  # a finished run is not run again
    assert again["interval"] == networks.load_checkpoint(root / "runs" / f"whole_{draws}" / "best.pt")["interval"]


def assert_equal(one, two) -> None:
    """Nested data are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_equal(one[name], two[name])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_equal(first, second)
    else:
        assert one == two


def test_starting_from_a_u_net_takes_its_structure_and_weights(root):
    unet = networks.UNet(networks.UNetConfig((8, 24), (), "maxpool", "bilinear", "ELU", True, 2), networks.seeded(47))
    torch.nn.init.normal_(unet.last.weight, std=0.02, generator=networks.seeded(48))
    store = common.open_pairs(root)
    content = {"stage": "unet", "network": networks.plain(unet.config), "weights": unet.state_dict()}
    content["data"] = {"fingerprint": "", "settings": store.attributes["settings"]}
    networks.save_checkpoint(root / "runs" / "first" / "best.pt", content)
    fixed = {"epochs": 1, "steps_per_epoch": 1, "lr": 1e-12, "samples": 1, "init_from": "first"}
    validation = networks.PairSet(store, "validation", torch.device("cpu"))
    batch = validation.batch(range(len(validation)), 4)
    with torch.inference_mode():
        expected = float(networks.image_losses("MSE", 1.0, unet(batch.low), batch).mean())
    for run, changes in (("from_all", {"condition": True}), ("from_last", {"timesteps": "last", "steps": 1})):
        summary = apddm.run(small(root, run=run, **fixed, **changes))
        assert summary["best_validation_mse"] == pytest.approx(expected, rel=1e-5)
        found = networks.load_checkpoint(root / "runs" / run / "best.pt")
        assert found["network"]["features_main"] == [8, 24]
    networks.save_checkpoint(
        root / "runs" / "first" / "best.pt", content | {"weights": copy.deepcopy(unet).state_dict(), "note": 1}
    )
    with pytest.raises(InputError, match="first weights"):
        apddm.run(small(root, run="from_last", **fixed, timesteps="last", steps=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "wave"}, "schedule: found 'wave'"),
        ({"schedule": "no_such_module:f"}, "no_such_module"),
        ({"schedule": "math:pi"}, "schedule"),
        ({"length": 1}, "not all 0"),
        ({"length": 0}, "length: found 0"),
        ({"steps": 11}, "steps: found 11"),
        ({"samples": 4, "eta": 0.0, "noisy_start": False}, "all samples are equal"),
        ({"beta": -1.0}, "beta: found -1.0"),
        ({"beta": 0.0}, "all samples are equal"),
        ({"embedding": 7}, "embedding: found 7"),
        ({"end_share": 1.5}, "end_share 1.5"),
        ({"timesteps": "last", "parametrization": "paper"}, "leaves nothing to train"),
        ({"timesteps": "last"}, "trained at T alone"),
        ({"init_from": "nowhere"}, "no such file"),
        ({"coverage": 1.0}, "coverage 1.0"),
        ({"device": "cuda:99"}, "device: found"),
    ],
)
def test_bad_settings_are_one_line(root, changes, words):
    with pytest.raises(InputError) as caught:
        apddm.run(small(root, run="bad", **changes))
    assert words in str(caught.value)
    assert not (root / "runs" / "bad").exists()


def test_changed_settings_and_data_are_refused(root, tmp_path):
    write_pairs(tmp_path)
    quick = {"epochs": 1, "steps_per_epoch": 1, "samples": 1}
    apddm.run(small(tmp_path, **quick))
    with pytest.raises(InputError, match=r"beta 1.0 -> 2.0.*--fresh"):
        apddm.run(small(tmp_path, **quick, beta=2.0))
    write_pairs(tmp_path, normalise="zscore")
    with pytest.raises(InputError, match="pairs normalise 'mean' -> 'zscore'"):
        apddm.run(small(tmp_path, **quick))
    with pytest.raises(InputError, match="normalise 'mean' -> 'zscore'"):  # a bank of another normalisation
        anchored.load_apddm(tmp_path / "runs" / "apddm" / "best.pt", common.open_pairs(tmp_path).attributes["settings"])
    with pytest.raises(InputError, match="stage 'apddm' found, expected 'unet'"):
        networks.load_unet(tmp_path / "runs" / "apddm" / "best.pt")


def test_low_equal_to_high_has_no_noise_to_draw():
    with pytest.raises(InputError, match="standard deviation 0"):
        anchored.standardise([torch.zeros(4, 4)])


def test_a_paper_run_trains_and_says_nothing_of_sampling(root):
    summary = apddm.run(small(root, run="paper", epochs=1, steps_per_epoch=2, parametrization="paper"))
    assert "interval" not in summary
    assert summary["best_validation"] > 0


def test_two_processes_train_as_one_does(root, tmp_path):
    """The same noise, times and crops, and gradients over the whole batch of 3 and of 1."""
    (tmp_path / "data").symlink_to(root / "data")
    one = small(tmp_path, run="one", batch=3, epochs=1, min_epochs=1, samples=1, eta=0.0, threads=1)
    apddm.run(one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command += ["05_apddm.py", "--preset", "smoke", "--root", str(tmp_path), "--run", "two", "--device", "cpu"]
    for name in ("batch", "epochs", "min_epochs", "samples", "eta", "threads", "patch", "steps_per_epoch", "ema"):
        command += [f"--{name.replace('_', '-')}", str(getattr(one, name))]
    command += ["--precision", "float32"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 001/1") == 1
    first, second = (torch.load(tmp_path / "runs" / run / "best.pt")["weights"] for run in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    assert any(value.std() > 0 for name, value in first.items() if name.startswith("last"))
