"""Fixtures that several test files share."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parent.parent
BRUKER = REPO.parent / "shared" / "bruker"


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def bruker() -> Path:
    """Folder of real scanner data."""
    if not BRUKER.is_dir():
        pytest.skip(f"no real scanner data at {os.path.relpath(BRUKER, REPO)}")
    return BRUKER


@pytest.fixture(scope="session")
def stage():
    """Import a numbered script by its file name: stage("02_preprocess")."""
    return importlib.import_module


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """Folder of a whole experiment at the smoke preset, made once by the same commands that a user types."""
    root = tmp_path_factory.mktemp("smoke")
    for script in ("00_simulate", "01_curate", "02_preprocess", "03_train_unet", "06_evaluate"):
        command = [sys.executable, f"{script}.py", "--preset", "smoke", "--root", str(root)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return root
