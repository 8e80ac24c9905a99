"""The whole path at smoke size: simulated scanner to figures of merit, held against docs/DATA.md."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

REPO = Path(__file__).resolve().parent.parent
DATA_MD = (REPO / "docs" / "DATA.md").read_text()


@pytest.fixture(scope="module")
def summary(smoke: Path) -> dict:
    return json.loads((smoke / "results" / "summary.json").read_text())


def test_restored_beats_its_input_on_unseen_animals(summary):
    for split in ("test", "lego"):
        low, unet = summary["low"][split], summary["unet"][split]
        for metric in ("mse_body", "mse_truth_body"):
            assert unet[metric]["mean"] < low[metric]["mean"], (split, metric)


def test_summary_has_the_promised_form(summary):
    assert {"low", "bicubic", "fourier", "nlm", "unet"} <= set(summary)
    for model in summary.values():
        for split in model.values():
            for entry in split.values():
                assert set(entry) == {"mean", "ci95", "animals"}
                low, high = entry["ci95"]
                assert low <= entry["mean"] <= high or math.isclose(low, high) or not math.isfinite(entry["mean"])
                assert entry["animals"] >= 1


def test_splits_share_no_animal(smoke):
    splits = zarr.open_group(smoke / "data" / "pairs.zarr", mode="r").attrs["splits"]
    animals = [a for names in splits.values() for a in names]
    assert len(animals) == len(set(animals))
    assert all(splits[name] for name in ("train", "validation", "test", "lego"))


def documented_arrays(section: str) -> dict[str, str]:
    """Array name -> dtype of the table under a heading of docs/DATA.md."""
    text = re.search(rf"## {re.escape(section)}\n(.*?)(?=\n## |\Z)", DATA_MD, flags=re.S)
    assert text, section
    rows = re.findall(r"^\| (`[^|]+) \|[^|]+\| (\w+) \|", text[1], flags=re.M)
    return {name: dtype for names, dtype in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("store", ["truth", "curated", "pairs"])
def test_stores_hold_what_data_md_says(smoke, store):
    group = zarr.open_group(smoke / "data" / f"{store}.zarr", mode="r")
    expected = documented_arrays(f"data/{store}.zarr")
    assert expected
    for key in group.attrs["scans"]:
        found = {name: str(array.dtype) for name, array in group[key].arrays()}
        assert found == expected, key


@pytest.mark.parametrize("table", ["data/cohort.csv", "data/slices.csv", "results/metrics.csv", "results/rois.csv"])
def test_tables_have_the_columns_of_data_md(smoke, table):
    with (smoke / table).open(newline="") as stream:
        header = next(csv.reader(stream))
    columns = ", ".join(header)
    assert f"`{columns}`" in DATA_MD, columns


@pytest.mark.parametrize("store", ["truth", "curated", "pairs"])
def test_attributes_of_a_scan_are_documented(smoke, store):
    section = re.search(rf"## data/{store}.zarr\n(.*?)(?=\n## |\Z)", DATA_MD, flags=re.S)[1]
    group = zarr.open_group(smoke / "data" / f"{store}.zarr", mode="r")
    names = set(group.attrs) | {name for key in group.attrs["scans"] for name in group[key].attrs}
    missing = {name for name in names if f"`{name}`" not in section}
    assert missing == set()


def test_results_are_on_the_full_field_of_the_high_scan(smoke):
    curated = zarr.open_group(smoke / "data" / "curated.zarr", mode="r")
    for model in ("low", "unet"):
        restored = zarr.open_group(smoke / "results" / f"{model}.zarr", mode="r")
        assert restored.attrs["scans"]
        for key in restored.attrs["scans"]:
            assert restored[key]["restored"].shape == curated[key]["high"].shape
            assert restored[key]["restored"].dtype == "float32"


OUTPUTS = {
    "00_simulate": ["data"],
    "01_curate": ["data/curated.zarr", "data/slices.csv"],
    "02_preprocess": ["data/pairs.zarr"],
    "03_train_unet": ["runs"],
    "06_evaluate": ["results"],
}


@pytest.mark.parametrize("stage", OUTPUTS)
def test_disk_that_takes_no_more_is_one_line_and_leaves_nothing_half_written(smoke, tmp_path, stage):
    """A limit on the size of files stands for the full disk, which only root could make."""
    for part in ("data", "runs", "results"):
        shutil.copytree(smoke / part, tmp_path / part)
    for place in OUTPUTS[stage]:
        path = tmp_path / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = [sys.executable, f"{stage}.py", "--preset", "smoke", "--root", str(tmp_path)]
    limited = ["sh", "-c", 'ulimit -f 6 && exec "$@"', "sh", *command]  # blocks of 512 bytes
    done = subprocess.run(limited, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
    assert str(tmp_path) in done.stderr.splitlines()[-1]
    assert "file too large" in done.stderr
    assert not list(tmp_path.rglob("*.partial"))
