"""One training step of the 32-64-128 U-Net on 300 x 300 slices: this project's against a plain float32 loop.

Both train the same network from the same weights on the same slices, in turn and in one process; what counts is the
ratio of their times, and the share of loading, flips and padding. Ends with status 1 if the ratio is below 2 or the
share is 5 % or more.

Usage:
    python benchmarks/train_step.py
    python benchmarks/train_step.py --batch 8 --repeats 10 --threads 1
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import networks
from common import finish_store, open_pairs, write_scan

stage = importlib.import_module("03_train_unet")
SIDE = 300


def synthetic_pairs(root: Path, slices: int) -> networks.PairSet:
    """Random pairs of the paper's size, through the store that training reads."""
    generator = np.random.default_rng(0)
    images = generator.gamma(4.0, 0.25, (2, slices, SIDE, SIDE)).astype(np.float32)
    arrays = {"low": images[0], "high": images[1], "scale": np.ones(slices, np.float32)}
    write_scan(root / "data" / "pairs.zarr", "m1/HT/axial", arrays | {"split": np.ones(slices, np.uint8)}, {})
    finish_store(root / "data" / "pairs.zarr", ["m1/HT/axial"], {})
    return networks.PairSet(open_pairs(root), "train", networks.pick_device())


def timed(device: torch.device, function: Callable[[], object]) -> float:
    """Seconds that a call takes, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(batch: int = 4, repeats: int = 7, threads: int = 0) -> None:
    """Measure and print.

    Parameters
    ----------
    batch : int
        Slices of a step.
    repeats : int
        Steps of each kind; the median counts.
    threads : int
        Threads on the CPU; 0 = all cores.
    """
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        pairs = synthetic_pairs(Path(folder), 2 * batch)
    device, generator = pairs.device, networks.seeded(0)
    dtype = networks.pick_dtype("auto", device)
    config = networks.UNetConfig((32, 64, 128), (), "meanpool", "upconv", "ReLU", True)
    plain, ours = (networks.UNet(config, networks.seeded(1)).to(device) for _ in range(2))
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimisers = {net: stage.build_optimiser(stage.PRESETS["paper"], net) for net in (plain, ours)}

    def load() -> networks.Batch:
        return pairs.batch(range(batch), config.multiple, flips=True, generator=generator)

    def step(net: networks.UNet, data: networks.Batch, fast: bool) -> None:
        with networks.autocast(device, dtype if fast else torch.float32):
            restored = net(data.low.contiguous(memory_format=torch.channels_last) if fast else data.low)
        loss = networks.image_losses("MSE", 1.0, restored, data).mean()
        optimisers[net].zero_grad()
        loss.backward()
        optimisers[net].step()

    data = load()
    times: dict[str, list[float]] = {"plain": [], "ours": [], "loader": []}
    for repeat in range(repeats + 1):
        found = {
            "plain": timed(device, lambda: step(plain, data, False)),
            "ours": timed(device, lambda: step(ours, data, True)),
            "loader": timed(device, load),
        }
        if repeat:  # the first step of each prepares its kernels
            for name, seconds in found.items():
                times[name].append(seconds)
    ratio = statistics.median(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    share = statistics.median(a / b for a, b in zip(times["loader"], times["ours"], strict=True))
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{device.type}, {torch.get_num_threads()} threads, 32-64-128, batch {batch} of {SIDE} x {SIDE}")
    print(
        f"median of {repeats} steps: plain float32 {1e3 * middle['plain']:.0f} ms, ours {1e3 * middle['ours']:.0f} ms"
    )
    print(f"ratio {ratio:.2f} (2 or more demanded), loader {100 * share:.2f} % of a step (less than 5 demanded)")
    sys.exit(ratio < 2 or share >= 0.05)


if __name__ == "__main__":
    tyro.cli(main)
