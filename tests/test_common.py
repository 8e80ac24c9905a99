"""Command line, files, stores: what every stage leans on."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import InputError


@dataclass(frozen=True)
class Config:
    root: Path = Path(".")
    """Folder of the experiment."""
    slices: int = 30
    """Number of slices."""


PRESETS = {"paper": Config(), "smoke": Config(slices=2)}


def test_first_preset_is_the_default_and_options_override_presets():
    assert common.parse_config(PRESETS, []).slices == 30
    assert common.parse_config(PRESETS, ["--preset", "smoke"]).slices == 2
    assert common.parse_config(PRESETS, ["--preset=smoke"]).slices == 2
    assert common.parse_config(PRESETS, ["--slices", "7", "--preset", "smoke"]).slices == 7


@pytest.mark.parametrize("args", [["--preset", "huge"], ["--preset"], ["--preset="]])
def test_unknown_preset_is_named(args):
    with pytest.raises(InputError, match="expected one of paper, smoke"):
        common.parse_config(PRESETS, args)


def run_main(monkeypatch, capsys, function) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as stop:
        common.main(function, PRESETS)
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def run(config):
        raise error

    return run


def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys):
    code, text = run_main(monkeypatch, capsys, raising(InputError("a.csv: found 3,\n expected 4")))
    assert (code, text) == (2, "error: a.csv: found 3, expected 4\n")


def test_full_disk_is_one_line_and_status_2(monkeypatch, capsys):
    code, text = run_main(monkeypatch, capsys, raising(OSError(errno.ENOSPC, "no space", "pairs.zarr")))
    assert code == 2
    assert text.count("\n") == 1
    assert "pairs.zarr: no space left" in text


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(ZeroDivisionError):
        common.main(raising(ZeroDivisionError()), PRESETS)


def test_atomic_path_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    with pytest.raises(RuntimeError), common.atomic_path(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_replaces_folders_and_removes_leftovers(tmp_path):
    target = tmp_path / "study"
    for text in ("one", "two"):
        (tmp_path / ".study.partial").mkdir()
        (tmp_path / ".study.partial" / "stale").write_text("from a killed run")
        with common.atomic_path(target) as partial:
            partial.mkdir()
            (partial / "subject").write_text(text)
        assert [p.name for p in target.iterdir()] == ["subject"]
        assert (target / "subject").read_text() == text
    assert list(tmp_path.iterdir()) == [target]


def square(value: int) -> int:
    return value * value


@pytest.mark.parametrize("workers", [1, 2])
def test_run_parallel_gives_each_task_its_result(workers):
    assert dict(common.run_parallel(square, range(9), workers)) == {i: i * i for i in range(9)}


def divide(value: int, by: int) -> float:
    return value / by


@pytest.mark.parametrize("workers", [1, 2])
def test_run_parallel_passes_errors_on(workers):
    with pytest.raises(ZeroDivisionError):
        list(common.run_parallel(functools.partial(divide, by=0), range(3), workers))


def test_fingerprint_sees_fields_and_order():
    assert common.fingerprint(Config(), "a") == common.fingerprint(Config(), "a")
    assert common.fingerprint(Config(slices=3)) != common.fingerprint(Config())
    assert common.fingerprint("a", "b") != common.fingerprint("b", "a")
    assert common.fingerprint(np.arange(3)) != common.fingerprint(np.arange(4))


def test_sha256_of_a_folder_sees_names_and_content(tmp_path):
    (tmp_path / "a").write_text("x")
    first = common.sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert common.sha256(tmp_path) != first


def test_table_round_trip_and_faults(tmp_path):
    path = tmp_path / "t.csv"
    common.write_table(path, ["key", "note"], [{"key": "a/b", "note": 'comma, quote" and ü'}])
    assert common.read_table(path, ["key", "note"]) == [{"key": "a/b", "note": 'comma, quote" and ü'}]
    for text, expected in {
        "key,other\n1,2\n": "unknown or missing column note, other",
        "key,note\n1\n": "line 2 has not 2 fields",
        "key,note\n1,2,3\n": "line 2 has not 2 fields",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=expected):
            common.read_table(path, ["key", "note"])
    path.write_bytes(b"key,note\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="UTF-8"):
        common.read_table(path, ["key", "note"])
    with pytest.raises(InputError, match="no such file"):
        common.read_table(tmp_path / "none.csv", ["key"])


KEY = "mouse01/HT/axial"


def make_store(root: Path) -> Path:
    store = root / "data" / "curated.zarr"
    low = np.random.default_rng(0).normal(size=(3, 16, 12)).astype(np.float32)
    common.write_scan(store, KEY, {"low": low, "keep": np.zeros(3, bool)}, {"gain": np.float32(2)})
    common.finish_store(store, [KEY], {"fingerprint": "f"})
    return store


def test_store_round_trip(tmp_path):
    make_store(tmp_path)
    store = common.open_curated(tmp_path)
    assert store.scans == [KEY]
    assert store.attrs(KEY) == {"gain": 2.0}
    assert not store.read(KEY, "keep", 1, "bool").any()
    low = store.read(KEY, "low", 3, "float32")
    assert np.array_equal(low, zarr.open_group(tmp_path / "data" / "curated.zarr", mode="r")[KEY]["low"][...])


def test_store_is_one_chunk_a_slice_and_one_file_an_array(tmp_path):
    array = zarr.open_array(make_store(tmp_path) / KEY / "low", mode="r")
    assert array.chunks == (1, 16, 12)
    assert array.shards == (3, 16, 12)


def test_finish_store_drops_scans_that_left_the_cohort(tmp_path):
    store = make_store(tmp_path)
    common.write_scan(store, "mouse02/HT/axial", {"keep": np.ones(2, bool)}, {})
    common.finish_store(store, ["mouse02/HT/axial"], {})
    assert not (store / KEY).exists()
    assert common.open_curated(tmp_path).scans == ["mouse02/HT/axial"]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda s: (s / "zarr.json").unlink(), "no such store, expected the output of 01_curate.py"),
        (lambda s: cut(s / "zarr.json", 30), "damaged"),
        (lambda s: (s / KEY / "zarr.json").unlink(), "missing or damaged"),
        (lambda s: (s / KEY / "low" / "zarr.json").unlink(), "cannot be read"),
        (lambda s: (s / KEY / "low" / "c/0/0/0").unlink(), "data are missing"),
        (lambda s: cut(s / KEY / "low" / "c/0/0/0", 0), "data are missing"),
        (lambda s: cut(s / KEY / "low" / "c/0/0/0", 500), "cannot be read"),
        (lambda s: flip(s / KEY / "low" / "c/0/0/0", 100), "cannot be read"),
    ],
)
def test_damaged_store_is_named_never_read_as_zeros(tmp_path, damage, expected):
    damage(make_store(tmp_path))
    with pytest.raises(InputError, match=expected) as error:
        store = common.open_curated(tmp_path)
        store.attrs(KEY)
        store.read(KEY, "low", 3, "float32")
    assert "curated.zarr" in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_any_root_metadata_is_read_or_refused(tmp_path_factory, content):
    store = tmp_path_factory.mktemp("any") / "data" / "curated.zarr"
    store.mkdir(parents=True)
    (store / "zarr.json").write_bytes(content)
    with pytest.raises(InputError):
        common.Store(store, "01_curate.py")


def test_unfinished_and_foreign_stores_are_refused(tmp_path):
    store = make_store(tmp_path)
    meta = json.loads((store / "zarr.json").read_text())
    for change, expected in ({"complete": False}, "incomplete"), ({"format": 99}, "format 99 found, expected 1"):
        (store / "zarr.json").write_text(json.dumps(meta | {"attributes": meta["attributes"] | change}))
        with pytest.raises(InputError, match=expected):
            common.open_curated(tmp_path)


def test_wrong_axes_or_dtype_are_refused(tmp_path):
    make_store(tmp_path)
    store = common.open_curated(tmp_path)
    with pytest.raises(InputError, match="3 axes of float32 found, expected 2 of float32"):
        store.read(KEY, "low", 2, "float32")
    with pytest.raises(InputError, match="expected 1 of uint8"):
        store.read(KEY, "keep", 1, "uint8")


def test_common_starts_without_torch():
    code = "import sys, common; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, check=False).returncode == 0


def test_progress_prints_plain_lines_where_output_is_no_terminal(capsys):
    progress = common.Progress(3, "slice", interval=0)
    for value in range(3):
        progress.step(f"mse {value}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("slice 3/3 | mse 2 | eta 0.0 min")
    assert len(lines) == 3
