"""Fixtures that several test files share."""

from __future__ import annotations

import importlib
import os
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
