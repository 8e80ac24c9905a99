"""Kill a stage with SIGKILL at a random moment, run it again, and compare with an undisturbed run.

Stages 00, 01, 02 and 03 at the smoke preset, `--kills` times in all. Everything on disk must be equal to the last byte;
for stage 03 the weights, the optimiser's state and every column of history.csv but the times.

Usage:
    python benchmarks/kill_resume.py
    python benchmarks/kill_resume.py --kills 50 --seed 1
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

from common import sha256  # noqa: E402

OUTPUTS = {
    "00_simulate": ["data/raw", "data/truth.zarr"],
    "01_curate": ["data/cohort.csv", "data/slices.csv", "data/curated.zarr"],
    "02_preprocess": ["data/pairs.zarr"],
    "03_train_unet": ["runs/unet"],
}
TIMES = {"seconds", "images_per_second"}


def start(stage: str, root: Path) -> subprocess.Popen[bytes]:
    """Start a stage in a process group of its own, so that its workers die with it."""
    command = [sys.executable, f"{stage}.py", "--preset", "smoke", "--root", str(root)]
    return subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a stage that must succeed."""
    _, text = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {text.decode()[-1500:]}")


def tensors(value: Any) -> Any:
    """Plain, comparable form of a checkpoint."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {k: tensors(v) for k, v in value.items() if k not in TIMES}
    return [tensors(v) for v in value] if isinstance(value, list | tuple) else value


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def content(stage: str, root: Path) -> Any:
    """What a stage left on disk, in a form that two runs can be compared by."""
    if stage != "03_train_unet":
        return {name: sha256(root / name) for name in OUTPUTS[stage]}
    run = root / "runs" / "unet"
    with (run / "history.csv").open() as stream:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(stream)]
    loaded = {name: torch.load(run / name, weights_only=True) for name in ("best.pt", "last.pt")}
    for checkpoint in loaded.values():  # the config names the folder, and the loop's history its times
        checkpoint.pop("config")
    return rows, tensors(loaded), sorted(p.name for p in run.iterdir())


def main() -> None:
    """Make the undisturbed run, then kill and repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds, expected = Path(folder) / "whole", {}, {}
        for stage in OUTPUTS:
            begin = time.monotonic()
            finish(start(stage, whole))
            seconds[stage] = time.monotonic() - begin
            expected[stage] = content(stage, whole)
        stages = list(OUTPUTS)
        counts = dict.fromkeys(stages, 0)
        while sum(counts.values()) < args.kills:
            stage = stages[sum(counts.values()) % len(stages)]
            trial = Path(folder) / "trial"
            shutil.rmtree(trial, ignore_errors=True)
            trial.mkdir()
            for name in (name for earlier in stages[: stages.index(stage)] for name in OUTPUTS[earlier]):
                copy(whole / name, trial / name)
            process = start(stage, trial)
            delay = rng.uniform(0.1, 1.0) * seconds[stage]
            begin = time.monotonic()
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            else:  # it was through: what it takes at most is known better now
                seconds[stage] = min(seconds[stage], time.monotonic() - begin)
                continue
            counts[stage] += 1
            finish(start(stage, trial))
            equal = content(stage, trial) == expected[stage]
            print(f"{sum(counts.values()):3d} {stage} killed after {delay:5.1f} s: {'equal' if equal else 'DIFFERENT'}")
            if not equal:
                raise SystemExit(1)
    print(f"{args.kills} kills ({counts}); all results equal")


if __name__ == "__main__":
    main()
