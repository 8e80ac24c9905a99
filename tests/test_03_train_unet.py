"""Training of the U-Net: losses and rules against their formulas, resumption to the bit, refusals."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook
from scipy import ndimage
from skimage.metrics import structural_similarity

from common import InputError, finish_store, write_scan

if "networks" not in sys.modules:
    install_import_hook("networks", "beartype.beartype")
import torch

import networks
import parallel

REPO = Path(__file__).resolve().parent.parent
stage = importlib.import_module("03_train_unet")
SETTINGS = {"align": "centres", "upsample": "nearest"}


def write_pairs(root, sizes=((3, 40, 44), (3, 36, 40)), seed=0, fingerprint="first", settings=SETTINGS):
    """pairs.zarr of smooth random images: two scans to train on, one to validate with."""
    generator = np.random.default_rng(seed)
    store = root / "data" / "pairs.zarr"
    keys = []
    for number, (shape, split) in enumerate(((sizes[0], 1), (sizes[1], 1), (sizes[0], 2))):
        high = 1 + 0.5 * ndimage.gaussian_filter(generator.normal(size=shape), (0, 2, 2)) * 7
        low = ndimage.gaussian_filter(high, (0, 1, 1)) + 0.2 * generator.normal(size=shape)
        arrays = {"low": low.astype(np.float32), "high": high.astype(np.float32)}
        arrays |= {"scale": np.ones(shape[0], np.float32), "offset": np.zeros(shape[0], np.float32)}
        arrays |= {"split": np.full(shape[0], split, np.uint8), "slice_index": np.arange(shape[0], dtype=np.int32)}
        keys.append(f"m{number}/HT/axial")
        write_scan(store, keys[-1], arrays, {"ratio": [2, 2], "full_shape": shape, "spacing_mm": [0.6, 0.1, 0.1]})
    finish_store(store, keys, {"fingerprint": fingerprint, "settings": settings})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root)
    return root


def small(root, **changes):
    """Three short epochs of a small network."""
    values = {
        "root": root, "run": "small", "features_main": (4, 6), "batch": 3, "lr": 1e-2, "optimiser": "Adam", "epochs": 3,
        "min_epochs": 3, "scheduler": "cosine", "precision": "float32",
    }  # fmt: skip
    return dataclasses.replace(stage.PRESETS["paper"], **(values | changes))


@pytest.fixture
def at(data, tmp_path):
    """A config on the shared pairs whose runs go to a folder of this test."""
    (tmp_path / "data").symlink_to(data / "data")
    return lambda **changes: small(tmp_path, **changes)


def padded(shapes=((30, 25), (22, 32)), side=32, content=0.0):
    """A batch of two images, a restored one beside it, and the two without their padding."""
    generator = np.random.default_rng(4)
    images = np.full((3, 2, 1, side, side), content, np.float32)
    mask = np.zeros((2, 1, side, side), bool)
    for item, (height, width) in enumerate(shapes):
        images[:, item, 0, :height, :width] = ndimage.gaussian_filter(generator.random((3, height, width)), (0, 1, 1))
        mask[item, 0, :height, :width] = True
    low, high, restored = torch.from_numpy(images)
    batch = networks.Batch(low, high, torch.from_numpy(mask), torch.tensor([0.7, 1.3]))
    cut = [(restored[i, 0, :h, :w].numpy(), high[i, 0, :h, :w].numpy()) for i, (h, w) in enumerate(shapes)]
    return restored, batch, cut


# ---------------------------------------------------------------- losses


def reference(first, second, data_range):
    return structural_similarity(
        first, second, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )


def test_losses_are_their_formulas():
    restored, batch, cut = padded()
    mse = [np.mean((a - b) ** 2) for a, b in cut]
    mae = [np.mean(abs(a - b)) for a, b in cut]
    ssim = [reference(a, b, r) for (a, b), r in zip(cut, (0.7, 1.3), strict=True)]
    assert np.allclose(networks.image_losses("MSE", 0.8, restored, batch), mse, rtol=1e-5)
    assert np.allclose(networks.image_losses("MAE", 0.8, restored, batch), mae, rtol=1e-5)
    hybrid = 0.3 * np.array(mse) + 0.7 * (1 - np.array(ssim))  # Eq. 7
    assert np.allclose(networks.image_losses("hybrid", 0.3, restored, batch), hybrid, atol=2e-4)
    found = networks.structural_similarity(restored, batch.high, batch.mask, batch.data_range)
    assert np.allclose(found, ssim, atol=2e-4)


@pytest.mark.parametrize("kind", ["MSE", "MAE", "hybrid"])
def test_padding_counts_for_nothing(kind):
    """Neither its content nor its size changes the loss or its gradient."""
    results = []
    for side, content in ((32, 0.0), (32, 9.0), (48, -5.0)):
        restored, batch, _ = padded(side=side, content=content)
        restored.requires_grad_()
        losses = networks.image_losses(kind, 0.5, restored, batch)
        losses.sum().backward()
        assert restored.grad[~batch.mask].abs().sum() == 0
        results.append((losses.detach(), restored.grad[:, :, :32, :32]))
    for losses, gradient in results[1:]:
        assert torch.allclose(losses, results[0][0], rtol=1e-5)
        assert torch.allclose(gradient, results[0][1], rtol=1e-4, atol=1e-9)


def test_hybrid_loss_has_the_right_gradient():
    restored, batch, _ = padded()
    image = restored.double().requires_grad_()
    batch = networks.Batch(batch.low.double(), batch.high.double(), batch.mask, batch.data_range.double())
    loss = lambda value: networks.image_losses("hybrid", 0.2, value, batch).sum()  # noqa: E731
    loss(image).backward()
    direction = torch.randn(image.shape, generator=networks.seeded(2), dtype=torch.float64)
    with torch.no_grad():
        step = (loss(image + 1e-6 * direction) - loss(image - 1e-6 * direction)) / 2e-6
    assert step == pytest.approx((image.grad * direction).sum().item(), rel=1e-4)


def test_validation_does_not_depend_on_the_batch(data):
    cfg, alone = small(data, residual=False), parallel.Group("cpu")
    pairs = networks.PairSet(stage.open_pairs(data), "train", torch.device("cpu"))
    net = networks.UNet(networks.UNetConfig((4, 6), (), "meanpool", "upconv", "ReLU", False))
    figures = [
        stage.validate(net, pairs, dataclasses.replace(cfg, batch=batch), torch.float32, alone)
        for batch in (1, 2, 3, 6)
    ]
    assert set(figures[0]) == {"validation", "validation_mse", "validation_ssim"}
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=2e-5)


# ---------------------------------------------------------------- rules of the training


@pytest.mark.parametrize("decay", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "options"), [("ExponentialLR", {}), ("StepLR", {"step_size": 4}), ("ReduceLROnPlateau", {"patience": 2})]
)
def test_schedulers_step_as_torchs(name, options, decay):
    cfg = stage.Config(scheduler=name, decay=decay, lr=0.02, step_size=4, plateau=2)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    factor = {"factor" if name == "ReduceLROnPlateau" else "gamma": decay}
    oracle = getattr(torch.optim.lr_scheduler, name)(optimiser, **factor, **options)
    generator = np.random.default_rng(1)
    losses: list[float] = []
    seen = set()
    for epoch in range(30):
        rate = stage.learning_rate(cfg, epoch + 0.4, losses)
        assert rate == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6, abs=2e-8)  # torch keeps eps = 1e-8
        seen.add(rate)
        losses.append(float(1 / (1 + min(epoch, 8)) + 0.05 * generator.random()))
        optimiser.step()
        oracle.step(*([losses[-1]] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 3


def test_decay_follows_the_equations():
    for epoch in range(1, 20):
        exponential, step = (
            stage.Config(scheduler=name, decay=0.3, step_size=5) for name in ("ExponentialLR", "StepLR")
        )
        rate = lambda cfg, epoch: stage.learning_rate(cfg, epoch, [])  # noqa: E731
        assert rate(exponential, epoch) == pytest.approx(0.3 * rate(exponential, epoch - 1))  # Eq. 5
        factor = 0.3 if epoch % 5 == 0 else 1  # Eq. 6
        assert rate(step, epoch) == pytest.approx(factor * rate(step, epoch - 1))


def test_cosine_and_warm_up():
    cfg = stage.Config(scheduler="cosine", epochs=10, lr=2.0, warm_up=2)
    rates = [stage.learning_rate(cfg, progress, []) for progress in np.linspace(0, 10, 41)]
    assert rates[0] == 0
    assert rates[20] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[4] == pytest.approx((1 + math.cos(math.pi * 0.1)) / 2)
    assert np.argmax(rates) == 8
    assert stage.learning_rate(dataclasses.replace(cfg, scheduler="none"), 7.5, []) == 2.0


def test_early_stopping():
    cfg = stage.Config(epochs=40, patience=6, min_epochs=10)
    rows = lambda losses: [{"validation": loss, "seconds": 30.0} for loss in losses]  # noqa: E731
    assert stage.reason_to_stop(cfg, []) == ""
    assert stage.reason_to_stop(cfg, rows([1.0, *[2.0] * 8])) == ""  # 8 epochs without improvement, but only 9 in all
    assert "no improvement for 6" in stage.reason_to_stop(cfg, rows([1.0, *[2.0] * 9]))
    assert stage.reason_to_stop(cfg, rows([*[3.0] * 20, 1.0, *[2.0] * 5])) == ""
    assert "no improvement" in stage.reason_to_stop(cfg, rows([*[3.0] * 20, 1.0, *[2.0] * 6]))
    assert "all 40 epochs" in stage.reason_to_stop(cfg, rows(np.linspace(2, 1, 40)))
    timed = dataclasses.replace(cfg, max_minutes=5)
    assert stage.reason_to_stop(timed, rows(np.linspace(2, 1, 9))) == ""
    assert "5 minutes" in stage.reason_to_stop(timed, rows(np.linspace(2, 1, 10)))


def test_order_is_whole_passes():
    order = networks.draw_order(7, 20, networks.seeded(1))
    assert len(order) == 20
    for start in (0, 7):
        assert sorted(order[start : start + 7]) == list(range(7))
    assert len(set(order[14:])) == 6
    assert order[:7] != order[7:14]
    assert networks.draw_order(7, 20, networks.seeded(1)) == order


def test_averaged_weights_follow_and_start_quickly():
    net, mean = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.weight, 1.0)
    torch.nn.init.constant_(mean.weight, 0.0)
    networks.average_weights(mean, net, 0.99, 0)
    assert mean.weight.item() == pytest.approx(0.9)
    networks.average_weights(mean, net, 0.99, 10**6)
    assert mean.weight.item() == pytest.approx(0.9 + 0.01 * 0.1)


# ---------------------------------------------------------------- training


def weights(folder, name="last.pt"):
    content = networks.load_checkpoint(folder / name)
    return content["weights"] | {f"raw {k}": v for k, v in content.get("training", {}).get("weights", {}).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows(folder):
    with (folder / "history.csv").open() as stream:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(stream)]


OPTIONS = [
    {"loss": "MAE", "optimiser": "AdamW"},
    {"loss": "hybrid", "optimiser": "RMSprop", "lr": 1e-3, "patch": 24},
    {"optimiser": "SGD", "clip": 0.1, "memory": "float16"},
    {"scheduler": "ReduceLROnPlateau", "turns": True, "warm_up": 1.0, "weight_decay": 1e-3},
    {"ema": 0.9, "unshuffle": 2, "features_skip": (3,), "precision": "bf16", "flips": False},
    {"residual": False, "activation": "PReLU", "upsampling": "bilinear", "downsampling": "convStrided", "lr": 3e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains(at, options):
    cfg = at(epochs=6, min_epochs=6, **options)
    summary = stage.run(cfg)
    history = rows(cfg.folder)
    assert len(history) == 6
    assert summary["best_validation"] < float(history[0]["validation"])
    assert float(history[-1]["train"]) < float(history[0]["train"])


def test_what_a_run_leaves(at):
    cfg = at()
    calls = []
    summary = stage.run(cfg, calls.append)
    assert sorted(path.name for path in cfg.folder.iterdir()) == ["best.pt", "history.csv", "last.pt", "summary.json"]
    history = rows(cfg.folder)
    assert [call["epoch"] for call in calls] == [1, 2, 3]
    assert [float(row["validation"]) for row in history] == [call["validation"] for call in calls]
    best = min(calls, key=lambda call: call["validation"])
    assert summary["best_validation"] == best["validation"]
    assert json.loads((cfg.folder / "summary.json").read_text())["best_epoch"] == best["epoch"]
    content = networks.load_checkpoint(cfg.folder / "best.pt", SETTINGS)
    assert content["data"]["fingerprint"] == "first"
    assert content["config"]["features_main"] == [4, 6]
    assert len(content["history"]) == best["epoch"]
    # The saved network gives the validation error that was written.
    net, _ = networks.load_unet(cfg.folder / "best.pt")
    pairs = networks.PairSet(stage.open_pairs(cfg.root), "validation", torch.device("cpu"))
    assert stage.validate(net, pairs, cfg, torch.float32, parallel.Group("cpu"))["validation"] == best["validation"]
    low = pairs.batch(range(len(pairs)), 1)
    restored = networks.restore(net, low.low[:, 0].numpy(), np.ones(3, np.float32), np.zeros(3, np.float32))
    assert np.mean((restored - low.high[:, 0].numpy()) ** 2) == pytest.approx(best["validation_mse"], rel=0.02)


def test_a_finished_run_is_not_run_again(at):
    cfg = at()
    first = stage.run(cfg)
    before = (cfg.folder / "last.pt").stat().st_mtime_ns
    (cfg.folder / "summary.json").unlink()
    assert stage.run(cfg, lambda row: pytest.fail("an epoch was trained")) == first
    assert (cfg.folder / "last.pt").stat().st_mtime_ns == before
    assert json.loads((cfg.folder / "summary.json").read_text())["epochs"] == 3


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "scheduler": "ReduceLROnPlateau", "patch": 24, "precision": "bf16"}]
)
def test_stopped_and_resumed_equals_undisturbed_to_the_bit(at, options):
    whole = at(run="whole", **options)
    stage.run(whole)
    parts = at(run="parts", **options)

    def stop(row):
        raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            stage.run(parts, stop)
    stage.run(parts)
    for name in ("last.pt", "best.pt"):
        assert same(weights(whole.folder, name), weights(parts.folder, name))
    assert rows(whole.folder) == rows(parts.folder)


def test_seed_decides(at):
    for run, changes in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        stage.run(at(run=run, epochs=1, min_epochs=1, **changes))
    first, again, other = (weights(at(run=run).folder) for run in "abc")
    assert same(first, again)
    assert not same(first, other)


def words(root, run, **options):
    """The command line of a config that `small` gives."""
    fixed = ["--root", str(root), "--run", run, "--features-main", "4", "6", "--lr", "1e-2"]
    fixed += ["--optimiser", "Adam", "--scheduler", "cosine", "--precision", "float32"]
    return fixed + [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_two_processes_train_as_one_does(at):
    """Gradients over the whole batch, also where one process has more slices of it than the other, or all of it."""
    options = {
        "epochs": 3,
        "min_epochs": 3,
        "batch": 5,
        "threads": 1,
        "patch": 32,
        "loss": "hybrid",
    }  # of 5 slices and of 1
    one = at(run="one", **options)
    stage.run(one)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command += ["03_train_unet.py", *words(one.root, "two", device="cpu", **options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 003/3") == 1
    first, second = weights(one.folder), weights(one.root / "runs" / "two")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    untrained = networks.UNet(
        networks.UNetConfig((4, 6), (), "meanpool", "upconv", "ReLU", True), networks.seeded(0, 3, 0)
    ).state_dict()
    assert any((first[name] - untrained[name]).abs().max() > 1e-3 for name in first)
    figures = [[float(row["validation"]), float(row["train"])] for row in rows(one.folder)]
    assert figures == [
        pytest.approx([float(row["validation"]), float(row["train"])], rel=1e-4)
        for row in rows(one.root / "runs" / "two")
    ]


def test_killed_in_the_middle_of_an_epoch(at):
    """kill -9 at two moments; the run that ends at last equals an undisturbed one to the bit."""
    options = {"epochs": 4, "min_epochs": 4, "steps_per_epoch": 30, "threads": 1}
    killed = at(run="killed", **options)
    command = [sys.executable, "03_train_unet.py", *words(killed.root, "killed", batch=3, **options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (killed.folder / "last.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.03)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed.folder / "summary.json").exists()
    # What a kill while a checkpoint is written would leave.
    (killed.folder / ".last.pt.partial").write_bytes(b"half")
    stage.run(killed)
    whole = at(run="whole", **options)
    stage.run(whole)
    assert same(weights(whole.folder), weights(killed.folder))
    assert rows(whole.folder) == rows(killed.folder)
    assert not list(killed.folder.glob(".*"))


def test_time_budget(at):
    cfg = at(epochs=4, min_epochs=4, max_minutes=1e-5)
    summary = stage.run(cfg)
    assert summary["epochs"] == 1
    assert "minutes are over" in summary["stopped"]
    # Without the budget the same run goes on to its end.
    assert stage.run(dataclasses.replace(cfg, max_minutes=0))["epochs"] == 4


# ---------------------------------------------------------------- refusals


def test_changed_settings_are_refused_with_the_difference(at):
    cfg = at(epochs=1, min_epochs=1)
    stage.run(cfg)
    before = (cfg.folder / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"lr 0\.01 -> 0\.003.*--fresh") as error:
        stage.run(dataclasses.replace(cfg, lr=3e-3))
    assert "batch" not in str(error.value)
    assert (cfg.folder / "last.pt").read_bytes() == before
    summary = stage.run(dataclasses.replace(cfg, lr=3e-3, fresh=True))
    assert summary["epochs"] == 1
    assert networks.load_checkpoint(cfg.folder / "last.pt")["config"]["lr"] == 3e-3


def test_changed_data_are_refused_with_the_difference(tmp_path):
    write_pairs(tmp_path)
    cfg = small(tmp_path, epochs=1, min_epochs=1)
    stage.run(cfg)
    write_pairs(tmp_path, seed=1, fingerprint="second", settings=SETTINGS | {"upsample": "cubic"})
    with pytest.raises(InputError) as error:
        stage.run(cfg)
    assert "pairs upsample 'nearest' -> 'cubic'" in str(error.value)
    assert "pairs fingerprint 'first' -> 'second'" in str(error.value)
    (cfg.folder / "best.pt").unlink()
    write_pairs(tmp_path)
    with pytest.raises(InputError, match=r"best\.pt: no such file"):
        stage.run(cfg)
    (cfg.folder / "last.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"last\.pt"):
        stage.run(cfg)


def test_a_loss_that_is_not_finite_ends_in_one_line(at):
    cfg = at(optimiser="SGD", lr=1e30, residual=False)
    with pytest.raises(InputError, match=r"epoch 1: the loss is not finite.*--lr"):
        stage.run(cfg)
    assert not (cfg.folder / "last.pt").exists()


def test_out_of_memory_ends_in_one_line(at, monkeypatch):
    with pytest.raises(InputError, match="batch 3, patch 0: out of memory"), stage.memory_errors(at()):
        torch.empty(10**15)
    with pytest.raises(RuntimeError, match="other"), stage.memory_errors(at()):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 0}, "batch: found 0"),
        ({"lr": -1.0}, "lr: found -1.0"),
        ({"lr": math.nan}, "lr: found nan"),
        ({"patch": -8}, "patch: found -8"),
        ({"patch": 8}, "patch: found 8, expected 0, or 16 or more"),
        ({"alpha": 1.5}, "alpha: found 1.5"),
        ({"ema": 1.0}, "ema: found 1.0"),
        ({"features_main": (8,)}, "features_main: found"),
        ({"device": "tpu9"}, "device: found 'tpu9'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(at, changes, text):
    cfg = at(**changes)
    with pytest.raises(InputError, match=text):
        stage.run(cfg)
    assert not cfg.folder.exists()


def test_bad_input_on_the_command_line(tmp_path):
    command = [sys.executable, "03_train_unet.py", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pairs.zarr: no such store, expected the output of 02_preprocess.py" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_presets_are_the_reports():
    paper, tuned = stage.PRESETS["paper"], stage.PRESETS["tuned"]
    assert (paper.features_main, paper.downsampling, paper.upsampling) == ((64, 128, 256), "meanpool", "upconv")
    assert (paper.residual, paper.lr, paper.optimiser, paper.batch) == (True, 1e-4, "RMSprop", 32)
    assert (paper.scheduler, paper.loss, paper.activation, paper.epochs) == ("ReduceLROnPlateau", "MSE", "ReLU", 200)
    assert (tuned.features_main, tuned.downsampling, tuned.upsampling) == ((128, 128, 64), "convStrided", "bilinear")
    assert (tuned.residual, tuned.lr, tuned.optimiser, tuned.scheduler) == (False, 3.139e-4, "Adam", "StepLR")
