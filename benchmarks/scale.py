"""How simulating, curating and preprocessing scale with processes, and the memory they take.

Each stage is run by its command, with every number of workers in a folder of its own; memory is the largest sum over
its processes of what each has to itself plus its share of what they have in common (Pss of Linux).

Usage:
    python benchmarks/scale.py
    python benchmarks/scale.py --subjects 24 --slices 30 --workers 2 --root /scratch/paper
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

REPO = Path(__file__).resolve().parent.parent


def processes(parent: int) -> list[int]:
    """A process and all its descendants."""
    found = [parent]
    with contextlib.suppress(OSError):  # it ended meanwhile
        for thread in Path(f"/proc/{parent}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += processes(int(child))
    return found


def memory(parent: int) -> float:
    """MiB that a process and its descendants take now."""
    total = 0
    for process in processes(parent):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and largest memory in MiB of a command that must succeed."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - start, peak


def main(
    subjects: int = 6, slices: int = 8, workers: tuple[int, ...] = (1, os.cpu_count() or 1), root: Path | None = None
) -> None:
    """Measure and print.

    Parameters
    ----------
    subjects : int
        Mice, of two regions and three planes each.
    slices : int
        Slices of each scan; their distance is such that the stack has the report's extent.
    workers : tuple of int
        Numbers of processes to compare.
    root : Path, optional
        Where the cohorts are made, and stay; a temporary folder if not given.
    """
    size = ["--subjects", str(subjects), "--slices", str(slices), "--slice-distance-mm", f"{18 / slices:g}"]
    stages = {
        "00_simulate": ["--preset", "paper", *size],
        "01_curate": ["--preset", "paper"],
        "02_preprocess": ["--preset", "demo"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        first: dict[str, float] = {}
        for count in workers:
            folder = (root or Path(scratch)) / f"workers_{count}"
            for stage, options in stages.items():
                command = [sys.executable, f"{stage}.py", *options, "--root", str(folder), "--workers", str(count)]
                seconds, peak = measure(command)
                gain = first.setdefault(stage, seconds) / seconds
                rate = 6 * subjects * slices / seconds
                print(
                    f"{stage} | {count} workers | {seconds:.1f} s | {rate:.1f} slice pairs/s | "
                    f"{gain:.2f} times as fast as {workers[0]} | {peak:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    tyro.cli(main)
