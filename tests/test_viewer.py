"""Contact sheet and ROI boxes, driven by events of mouse and keyboard, and in a real browser."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import test_06_evaluate as judged
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_01_curate import images, write_study

from common import (
    InputError,
    finish_store,
    open_curated,
    open_pairs,
    scan_attributes,
    upsample,
    write_scan,
    write_table,
)

matplotlib.use("agg")
import matplotlib.pyplot as plt

import contact_sheet
import roi_picker
import rois
from rois import Box

REPO = Path(__file__).resolve().parent.parent
curate, preprocess = (importlib.import_module(name) for name in ("01_curate", "02_preprocess"))
evaluate = importlib.import_module("06_evaluate")
KEYS = ["mouse1/unknown/axial", "mouse22/unknown/axial", "mouse333/unknown/axial"]


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Figures are drawn where a test looks at them, and closed after it; a window draws but once for many changes."""
    monkeypatch.setattr(FigureCanvasAgg, "draw_idle", lambda _self: None)
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """Three pairs of five slices; one low slice of the second holds nothing but noise."""
    root = tmp_path_factory.mktemp("imported")
    for name in ("mouse1", "mouse22", "mouse333"):
        low, _ = images(seed=len(name))
        if name == "mouse22":
            low[3] = np.random.default_rng(0).rayleigh(30, low[3].shape)
        write_study(root / "data/raw", name, low={"stack": low})
    curate.run(curate.Config(root=root, workers=1))
    return root


@pytest.fixture
def root(imported, tmp_path) -> Path:
    shutil.copytree(imported, tmp_path / "experiment")
    return tmp_path / "experiment"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def decisions(root: Path) -> dict[tuple[str, int], str]:
    """What is decided, by key and slice."""
    rows = table(root / "data/slices.csv")
    return {(row["key"], int(row["slice"])): row["decision"] for row in rows if row["decision"]}


def key(window: Any, *keys: str) -> None:
    for name in keys:
        KeyEvent("key_press_event", window.figure.canvas, name)._process()


def mouse(window: Any, name: str, x: float, y: float, button: int = 1) -> None:
    MouseEvent(name, window.figure.canvas, x, y, None if name.startswith("motion") else button)._process()


def drag(window: Any, start: tuple[float, float], *places: tuple[float, float], button: int = 1) -> None:
    mouse(window, "button_press_event", *start, button=button)
    for place in places:
        mouse(window, "motion_notify_event", *place, button=button)
    mouse(window, "button_release_event", *(places or [start])[-1], button=button)


def tile(window: Any, index: int) -> tuple[float, float]:
    """Middle of a tile on the figure."""
    y, x = window.sheet.corner(index)
    height, width = window.sheet.tile
    return tuple(window.axes.transData.transform((x + width / 2, y + height / 2)))


def press_button(window: Any, label: str) -> None:
    text = next(text for command, text in window.buttons if command.label == label)
    box = text.get_window_extent()
    drag(window, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))


# ---------------------------------------------------------------- contact sheet


def test_a_click_decides_and_is_saved_at_once(root):
    before = table(root / "data/slices.csv")
    window = contact_sheet.Review(root)
    for wanted in ("drop", "keep", "drop"):
        drag(window, tile(window, 2))
        assert decisions(root) == {(KEYS[0], 2): wanted}
        assert open_curated(root).read(KEYS[0], "keep", 1, "bool").tolist() == [
            True,
            True,
            wanted == "keep",
            True,
            True,
        ]
    for old, new in zip(before, table(root / "data/slices.csv"), strict=True):
        assert {**old, "decision": ""} == {**new, "decision": ""}
    drag(window, tile(window, 1), tile(window, 4))  # no click: it did not end where it began
    mouse(window, "button_release_event", *tile(window, 1))
    assert decisions(root) == {(KEYS[0], 2): "drop"}


def test_suggestions_are_framed_with_their_reason(root):
    window = contact_sheet.Review(root)
    key(window, "n")
    assert window.key == KEYS[1]
    row = next(row for row in table(root / "data/slices.csv") if (row["key"], row["slice"]) == (KEYS[1], "3"))
    assert row["suggestion"] == "drop"
    assert "low" in row["reason"]
    assert window.captions[3].get_text().startswith("4  drop? " + row["reason"][:30])
    assert row["reason"] not in window.status.get_text()
    assert window.captions[0].get_text().strip() == "1"

    def frames(colour: str) -> list[int]:
        """Tiles with a frame of a colour."""
        colours = [matplotlib.colors.to_hex(c) for c in window.frames.get_colors()]
        lines = [path.vertices for path in window.frames.get_paths()]
        found = [
            line for line, c in zip(lines, colours, strict=True) if c == contact_sheet.INK[colour] and len(line) == 5
        ]
        return [window.sheet.hit(line[:, 1].mean(), line[:, 0].mean()) for line in found]

    assert (frames("drop?"), frames("DROP"), frames("KEEP"), frames("cursor")) == ([3], [], [], [0])
    key(window, "right", "right", "right")
    assert row["reason"] in window.status.get_text()  # in full for the slice under the cursor
    drag(window, tile(window, 3))
    assert decisions(root) == {(KEYS[1], 3): "keep"}
    key(window, "right", "d")
    assert (frames("drop?"), frames("DROP"), frames("KEEP"), frames("cursor")) == ([], [4], [3], [4])


def test_keys_move_the_cursor_and_decide(root):
    window = contact_sheet.Review(root)
    key(window, "right", "right", "d", "left", " ", "left", "left", "k")
    assert decisions(root) == {(KEYS[0], 2): "drop", (KEYS[0], 1): "drop", (KEYS[0], 0): "keep"}
    key(window, "a")
    assert decisions(root) == {(KEYS[0], 2): "drop", (KEYS[0], 1): "drop"}
    columns = window.sheet.columns
    assert 1 < columns < 5
    key(window, "down", "x", "up", "k")
    assert decisions(root)[KEYS[0], columns] == ("keep" if columns == 2 else "drop")
    assert decisions(root)[KEYS[0], 0] == "keep"
    key(window, "D")
    assert decisions(root) == {(KEYS[0], i): "drop" for i in range(5)}
    assert not open_curated(root).read(KEYS[0], "keep").any()
    key(window, "K", "F12", "q")
    assert decisions(root) == {(KEYS[0], i): "keep" for i in range(5)}
    assert plt.get_fignums() == []


def test_undo_goes_back_through_scans_to_the_table_as_it_was(root):
    before = (root / "data/slices.csv").read_bytes(), open_curated(root).read(KEYS[1], "keep")
    window = contact_sheet.Review(root)
    key(window, "right", "d", "n", "D", "n")
    assert len(decisions(root)) == 6
    key(window, "u")
    assert (window.key, window.slice) == (KEYS[1], 0)
    assert decisions(root) == {(KEYS[0], 1): "drop"}
    np.testing.assert_array_equal(open_curated(root).read(KEYS[1], "keep"), before[1])
    key(window, "ctrl+z")
    assert (window.key, window.slice) == (KEYS[0], 1)
    assert (root / "data/slices.csv").read_bytes() == before[0]
    key(window, "u")
    assert "nothing to undo" in window.status.get_text()
    key(window, "d", "d", "d", "u")  # what changes nothing is nothing to undo
    assert decisions(root) == {}


def test_only_scans_with_drops(root):
    window = contact_sheet.Review(root)
    visited = []
    for name in ("n", "n", "n", "p", "f", "n", "p", "p"):
        key(window, name)
        visited.append(window.key)
    assert visited == [KEYS[1], KEYS[2], KEYS[2], KEYS[1], KEYS[1], KEYS[1], KEYS[1], KEYS[1]]
    assert "no scan before this one that has drops" in window.status.get_text()
    key(window, "f", "n", "d", "p", "p", "f", "n", "n")  # a drop by hand counts too
    assert window.key == KEYS[2]
    key(window, "p", "p")
    assert window.key == KEYS[1]


def test_buttons_do_what_their_keys_do(root):
    window = contact_sheet.Review(root)
    for label in ("next", "high", "drop", "only with drops"):
        press_button(window, label)
    assert (window.key, window.state["view"], window.state["filtered"]) == (KEYS[1], "high", True)
    assert decisions(root) == {(KEYS[1], 0): "drop"}
    press_button(window, "undo")
    assert decisions(root) == {}
    window.figure.set_size_inches(6, 7)  # the buttons go on in further rows
    window.layout()
    rows = {round(text.get_position()[1], 3) for _, text in window.buttons}
    assert len(rows) > 1
    for label in ("only with drops", "previous"):
        press_button(window, label)
    assert window.key == KEYS[0]


def test_next_sitting_goes_on_where_the_last_one_ended(root):
    window = contact_sheet.Review(root)
    key(window, "n", "3", "right", "right", "f")
    drag(window, (700, 400), (800, 450), button=3)
    again = contact_sheet.Review(root)
    assert again.state == window.state
    assert (again.key, again.slice, again.state["view"], again.state["filtered"]) == (KEYS[1], 2, "difference", True)
    assert again.state["window"] != [0.5, 1.0]
    key(again, "z", "r")
    assert contact_sheet.Review(root).state["enlarged"] is True
    assert contact_sheet.Review(root).state["window"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "\xff"),
        '{"key": "gone/x/y", "slice": 4}',
        '{"key": 7, "slice": "a", "view": [], "window": [1]}',
        '{"window": [0.5, -1.0], "slice": 999}',
        '{"view": "sideways", "window": ["a", "b"], "seen": [1, {}], "slice": -4}',
    ],
)
def test_a_damaged_memory_counts_as_none(root, text):
    (root / "data/.review.json").write_text(text, encoding="latin-1")
    window = contact_sheet.Review(root)
    assert (window.key, window.state["view"], window.state["window"]) == (KEYS[0], "low", [0.5, 1.0])
    key(window, "n", "d")
    assert decisions(root) == {(KEYS[1], 0): "drop"}


# ---------------------------------------------------------------- images


def grey(window: Any, index: int) -> np.ndarray:
    """Pixels of a tile as they are drawn on the figure."""
    window.figure.canvas.draw()
    frame = np.asarray(window.figure.canvas.buffer_rgba())
    x, y = tile(window, index)
    height, width = window.sheet.tile
    top, left = round(len(frame) - y - height / 2), round(x - width / 2)
    return frame[top + 4 : top + height - 4, left + 4 : left + width - 4, 0].astype(float)


def test_low_and_high_share_one_grey_scale_and_the_difference_lies_around_grey(root):
    """The high scan of this fixture has the low one's units times 2.5."""
    attributes = scan_attributes(root / "data/curated.zarr", KEYS[0])
    store = open_curated(root)
    arrays = {name: store.read(KEYS[0], name) for name in ("low", "high", "keep")}
    write_scan(root / "data/curated.zarr", KEYS[0], arrays | {"high": 2.5 * arrays["high"]}, attributes)
    window = contact_sheet.Review(root)
    found = {}
    for name in ("1", "2", "3"):
        key(window, name)
        found[name] = grey(window, 0)
    bright = found["2"] > 100
    assert 0.1 < bright.mean() < 0.9
    assert np.median(found["1"][bright]) == pytest.approx(np.median(found["2"][bright]), rel=0.08)
    assert np.corrcoef(found["1"].ravel(), found["2"].ravel())[0, 1] > 0.97  # and lie on each other
    assert abs(np.median(found["3"]) - 127) < 8
    key(window, "z")
    assert window.captions[2].get_text().startswith("difference   slice 1")
    assert np.corrcoef(grey(window, 0).ravel(), grey(window, 1).ravel())[0, 1] > 0.97


def test_low_pixels_lie_on_the_high_pixels_that_the_affines_name(root):
    """Pixel j of the low images of this fixture lies on pixel 2 j of the high ones, half a high pixel off a zoom."""
    store = open_curated(root)
    pair = contact_sheet.load_pair(store, KEYS[0])
    np.testing.assert_allclose(pair.low, upsample(store.read(KEYS[0], "low"), 2, "fourier", (0, 0)), atol=1e-3)
    path = root / "data/curated.zarr" / KEYS[0] / "zarr.json"
    text = json.loads(path.read_text())
    for axis, shift in ((0, 0.3), (1, 0.5)):  # of the high scan, mm
        text["attributes"]["affine_high"][axis][3] += shift
    path.write_text(json.dumps(text))
    step = np.diag(text["attributes"]["affine_low"])
    moved = contact_sheet.load_pair(store, KEYS[0]).low
    wanted = upsample(store.read(KEYS[0], "low"), 2, "fourier", (0.5 / step[1], 0.3 / step[0]))
    np.testing.assert_allclose(moved, wanted, rtol=1e-3, atol=0.1)


def test_right_drag_changes_window_and_level(root):
    window = contact_sheet.Review(root)
    start = grey(window, 0)
    drag(window, (700, 400), (700, 500), button=3)
    up = grey(window, 0)
    assert up.mean() > start.mean() + 3
    key(window, "r")
    drag(window, (700, 400), (1100, 400), button=3)
    wide = grey(window, 0)
    assert wide.std() < 0.8 * start.std()
    key(window, "2")
    assert grey(window, 0).std() < 0.8 * start.std()  # of the pair, not of the view
    key(window, "r", "1")
    np.testing.assert_array_equal(grey(window, 0), start)
    assert decisions(root) == {}


def test_the_body_fills_its_tile_on_demand(root):
    window = contact_sheet.Review(root)
    key(window, "2")
    whole = grey(window, 0)
    button = next(text for command, text in window.buttons if command.label == "body")
    assert button.get_bbox_patch().get_facecolor() == matplotlib.colors.to_rgba(contact_sheet.INK["key"])
    key(window, "b")
    body = grey(window, 0)
    assert button.get_bbox_patch().get_facecolor() == matplotlib.colors.to_rgba(contact_sheet.INK["on"])
    assert (body > 60).mean() > 1.1 * (whole > 60).mean()
    y, x = np.nonzero((open_curated(root).read(KEYS[0], "high") > 600).any(axis=0))  # the object, far above the noise
    rows, columns = window.pair.body
    assert 0 < rows.start <= y.min()
    assert y.max() < rows.stop < 64
    assert 0 < columns.start <= x.min()
    assert x.max() < columns.stop < 64
    drag(window, tile(window, 4))
    assert decisions(root) == {(KEYS[0], 4): "drop"}
    key(window, "b")
    np.testing.assert_array_equal(grey(window, 0), whole)


@pytest.mark.parametrize(
    ("n", "shape", "area"), [(30, (300, 300), (800, 1500)), (1, (64, 64), (100, 900)), (7, (60.0, 256), (900, 400))]
)
def test_tiles_lie_apart_inside_of_the_area(n, shape, area):
    sheet = contact_sheet.Sheet.fit(n, shape, area, 7, 17)
    taken = np.zeros(area, int)
    for i in range(n):
        y, x = sheet.corner(i)
        taken[y - 2 : y + sheet.tile[0] + 2, x - 2 : x + sheet.tile[1] + 2] += 1  # with the frame
        assert sheet.hit(y + 1, x + 1) == sheet.hit(y + sheet.tile[0] - 1, x + sheet.tile[1] - 1) == i
    assert taken.max() == 1
    assert taken.sum() == n * (sheet.tile[0] + 4) * (sheet.tile[1] + 4)  # nothing hangs over
    assert sheet.tile[0] / sheet.tile[1] == pytest.approx(shape[0] / shape[1], rel=0.05)
    assert sheet.hit(-5, 5) == sheet.hit(5, area[1] + 99) == -1


def test_the_next_scan_is_read_ahead_and_few_are_kept(root, monkeypatch):
    read: list[str] = []
    load = contact_sheet.load_pair

    def counted(store, name):
        read.append(name)
        return load(store, name)

    monkeypatch.setattr(contact_sheet, "load_pair", counted)
    window = contact_sheet.Review(root)
    window.pairs.found[KEYS[1]].result(10)
    assert read == KEYS[:2]  # before anybody asked for it
    key(window, "n", "p")
    window.pairs.found[KEYS[2]].result(10)
    assert sorted(read) == KEYS  # none of them twice
    window.pairs.ask(*(f"{i}" for i in range(20)))
    assert len(window.pairs.found) == 5


# ---------------------------------------------------------------- tables


def test_what_others_write_meanwhile_stays(root):
    window = contact_sheet.Review(root)
    rows = table(root / "data/slices.csv")
    rows[12]["decision"] = "drop"
    away = dict(rows[0], key="away/HT/axial", decision="drop", slice="17")
    write_table(root / "data/slices.csv", list(rows[0]), [*rows, away])
    key(window, "d")
    assert decisions(root) == {
        (KEYS[0], 0): "drop",
        (rows[12]["key"], int(rows[12]["slice"])): "drop",
        ("away/HT/axial", 17): "drop",
    }


def spoil(root: Path, fault: str) -> None:
    path = root / "data/slices.csv"
    rows = table(path)
    columns = list(rows[0])
    if fault == "gone":
        path.unlink()
        return
    if fault == "column":
        columns.remove("reason")
        rows = [{k: v for k, v in row.items() if k != "reason"} for row in rows]
    elif fault == "decision":
        rows[4]["decision"] = "perhaps"
    elif fault == "suggestion":
        rows[4]["suggestion"] = ""
    elif fault == "missing":
        del rows[3]
    elif fault == "twice":
        rows.insert(3, rows[3])
    elif fault == "scan":
        rows = [row for row in rows if row["key"] != KEYS[2]]
    elif fault == "binary":
        path.write_bytes(b"key,slice,suggestion,reason,decision\n\xff\xfe\x00")
        return
    elif fault == "short":
        path.write_text("key,slice,suggestion,reason,decision\na,1\n")
        return
    write_table(path, columns, rows)


FAULTS = {
    "gone": "no such file, expected the output of 01_curate.py",
    "column": "unknown or missing column reason",
    "decision": "line 6: decision 'perhaps' found, expected keep",
    "suggestion": "line 6: suggestion '' found",
    "missing": r"mouse1/unknown/axial: 0, 1, 2, 4 found, expected one line for each slice",
    "twice": "0, 1, 2, 3, 3, 4 found, expected one line for each slice",
    "scan": "mouse333/unknown/axial: no slice found",
    "binary": "expected a CSV table in UTF-8",
    "short": "line 2 has not 5 fields",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_table(root, fault):
    spoil(root, fault)
    with pytest.raises(InputError, match=rf"slices\.csv: .*{FAULTS[fault]}"):
        contact_sheet.Review(root)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_come_while_the_window_is_open(root, fault):
    window = contact_sheet.Review(root)
    spoil(root, fault)
    before = [p.read_bytes() for p in (root / "data/slices.csv",) if p.exists()]
    key(window, "d")
    assert re.search(FAULTS[fault], window.status.get_text())
    assert [p.read_bytes() for p in (root / "data/slices.csv",) if p.exists()] == before
    assert open_curated(root).read(KEYS[0], "keep").all()
    assert window.past == []


def test_a_damaged_scan_is_named_and_the_others_can_be_seen(root):
    shard = next((root / "data/curated.zarr" / KEYS[1] / "high/c").rglob("0/0/0"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200])
    window = contact_sheet.Review(root)
    key(window, "n")
    assert window.key == KEYS[0]
    assert f"{KEYS[1]}/high: cannot be read" in window.status.get_text()
    shard.write_bytes(whole)
    key(window, "n")
    assert window.key == KEYS[1]


def test_decisions_count_in_the_next_stage_and_in_the_next_import(root):
    window = contact_sheet.Review(root)
    key(window, "right", "d", "n")
    drag(window, tile(window, 3))  # keep what was suggested for dropping
    rows = table(root / "data/slices.csv")
    preprocess.run(preprocess.Config(root=root, workers=1, test=("mouse22",), validation=("mouse1",)))
    pairs = open_pairs(root)
    assert pairs.read(KEYS[0], "slice_index").tolist() == [0, 2, 3, 4]
    assert pairs.read(KEYS[1], "slice_index").tolist() == [0, 1, 2, 3, 4]
    keep = {name: open_curated(root).read(name, "keep").tolist() for name in KEYS}
    curate.run(curate.Config(root=root, workers=1))
    assert table(root / "data/slices.csv") == rows
    assert {name: open_curated(root).read(name, "keep").tolist() for name in KEYS} == keep


def command(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, *words, "--preset", "smoke")
    return subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False, timeout=120, **more)


def test_without_a_display_the_command_says_so_in_one_line(root, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    done = command("01_curate.py", "--review", "--root", str(root))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines() == [
        "error: --review: no display found, expected one, or --web for a browser, also over ssh"
    ]


# ---------------------------------------------------------------- regions of interest

KEY = "mouse03/HT/axial"


@pytest.fixture(scope="module")
def restored(tmp_path_factory) -> Path:
    """Two animals and a phantom with pairs, and the images of a model."""
    root = tmp_path_factory.mktemp("restored")
    judged.write_cohort(root, subjects=("mouse01", "mouse02", "mouse03"), scans=judged.SCANS[:1])
    judged.write_pairs(root, test=("mouse03",), validation=("mouse02",))
    for model, factor in (("unet", 0.9), ("other", 0.5)):
        for name in (KEY, "mouse02/HT/axial"):
            image = factor * open_curated(root).read(name, "high") / open_pairs(root).attrs(name)["gain"]
            write_scan(root / "results" / f"{model}.zarr", name, {"restored": image.astype(np.float32)}, {})
        finish_store(root / "results" / f"{model}.zarr", [KEY, "mouse02/HT/axial"], {})
    return root


@pytest.fixture
def picker(restored, tmp_path):
    """The window, at the second slice of the test animal."""
    root = tmp_path / "experiment"
    shutil.copytree(restored, root)
    return open_picker(root)


def open_picker(root: Path) -> roi_picker.RoiPicker:
    slices = evaluate.slices_of(evaluate.Config(root=root), ("test", "validation"))
    window = roi_picker.RoiPicker(root, slices, ("unet", "other", "never"))
    if window.key != KEY:
        key(window, "n")
    return window


def at(window: Any, image: int, y: float, x: float) -> tuple[float, float]:
    """Place on the figure of the corner between pixels, of one of the images."""
    return tuple(window.axes[image].transData.transform((x - 0.5, y - 0.5)))


def draw(window: Any, image: int, y0: int, y1: int, x0: int, x1: int) -> None:
    middle = at(window, image, (y0 + y1) / 2, (x0 + x1) / 2)
    drag(window, at(window, image, y0, x0), middle, at(window, image, y1, x1))


def boxes(window: Any) -> list[tuple[Any, ...]]:
    """The table, without the key."""
    rows = table(window.root / "data/rois.csv")
    assert {row["key"] for row in rows} <= {KEY}
    return [(int(r["slice"]), r["name"], r["kind"], *(int(r[k]) for k in ("y0", "y1", "x0", "x1"))) for r in rows]


def test_boxes_drawn_on_any_image_land_in_the_table(picker):
    assert picker.names == ["low", "unet", "high"]
    assert picker.slice == 1
    draw(picker, 0, 10, 20, 12, 30)
    assert boxes(picker) == [(1, "roi", "roi", 10, 20, 12, 30)]
    assert "a background box is missing" in picker.status.get_text() or picker.selected
    key(picker, "b")
    draw(picker, 2, 40, 52, 20, 33)
    draw(picker, 1, 44, 56, 40, 50)
    assert boxes(picker) == [
        (1, "roi", "roi", 10, 20, 12, 30),
        (1, "background", "background", 40, 52, 20, 33),
        (1, "roi 2", "roi", 44, 56, 40, 50),
    ]
    assert rois.incomplete(rois.read_boxes(picker.root)) == []
    key(picker, "b")
    draw(picker, 1, 2, 8, 2, 8)  # but one background in a slice: the new one replaces it
    assert [box[2] for box in boxes(picker)] == ["roi", "roi", "background"]
    drag(picker, at(picker, 0, 60, 60))  # a click beside all of them deselects
    assert picker.selected is None
    assert len(boxes(picker)) == 3


def shown(window: Any, image: int) -> dict[str, tuple[float, ...]]:
    """The figures under an image: name to the numbers of its line."""
    lines = window.words[image].get_text().splitlines()[1:]
    return {line[:14].strip(): tuple(float(word) for word in line[14:].split()) for line in lines}


def test_figures_are_those_of_the_evaluation(picker):
    draw(picker, 0, 20, 30, 25, 40)
    key(picker, "b")
    draw(picker, 0, 36, 46, 22, 35)
    cfg = judged.config(picker.root)
    scan = evaluate.load_scan(cfg, KEY)
    volumes = {"low": evaluate.on_high_grid(scan.low, scan.attributes, "nearest", aligned=False)}
    volumes |= {"unet": picker.images["unet"], "high": scan.references["high"]}
    figures = list(evaluate.box_figures(scan, volumes, rois.read_boxes(picker.root)))
    for image, name in enumerate(picker.names):
        wanted = {f.metric: f.value for f in figures if f.model == name and not f.reference}
        found = shown(picker, image)
        assert found["roi"][1] == pytest.approx(wanted["cnr"], abs=6e-4)
        assert found["background"][1] == pytest.approx(wanted["nstd"], abs=6e-5)
    assert shown(picker, 0)["roi"] != shown(picker, 2)["roi"]


def test_figures_follow_the_mouse_and_the_table_its_release(picker):
    key(picker, "b")
    draw(picker, 0, 36, 46, 22, 35)
    before = (picker.root / "data/rois.csv").read_bytes()
    places = [at(picker, 0, y, x) for y, x in ((20, 25), (24, 30), (30, 40))]
    mouse(picker, "button_press_event", *places[0])
    found = []
    for place in places[1:]:
        mouse(picker, "motion_notify_event", *place)
        found.append(shown(picker, 2)["roi"])
    assert found[0] != found[1]
    assert (picker.root / "data/rois.csv").read_bytes() == before
    mouse(picker, "button_release_event", *places[-1])
    assert shown(picker, 2)["roi"] == found[1]
    assert len(boxes(picker)) == 2


def test_boxes_are_moved_resized_deleted_and_all_of_it_undone(picker):
    draw(picker, 1, 10, 20, 12, 30)
    states = [boxes(picker)]
    drag(picker, at(picker, 2, 13, 16), at(picker, 2, 15, 19), at(picker, 2, 18, 26))  # from inside, on another image
    states.append(boxes(picker))
    drag(picker, at(picker, 0, 25, 40), at(picker, 0, 28, 45), at(picker, 0, 31, 50))  # at its corner
    states.append(boxes(picker))
    key(picker, "x")
    states.append(boxes(picker))
    assert [[box[3:] for box in state] for state in states] == [
        [(10, 20, 12, 30)],
        [(15, 25, 22, 40)],
        [(15, 31, 22, 50)],
        [],
    ]
    key(picker, "down")
    for state in states[-2::-1]:
        key(picker, "u")
        assert boxes(picker) == state
        assert picker.slice == 1
    key(picker, "u", "u")
    assert boxes(picker) == []
    assert "nothing to undo" in picker.status.get_text()


def test_a_box_cannot_leave_the_image(picker):
    drag(picker, at(picker, 0, 50, 50), at(picker, 0, 60, 60), at(picker, 0, 63.9, 63.9), (2, 2))
    y0, y1, x0, x1 = boxes(picker)[0][3:]
    assert 0 <= y0 < y1 <= 64
    assert 0 <= x0 < x1 <= 64


def test_names_are_typed_and_given_once(picker):
    key(picker, "t", *"Liver", " ", "l", "q", "backspace", "enter")  # q ends nothing while a name is typed
    draw(picker, 0, 10, 20, 12, 30)
    draw(picker, 0, 30, 40, 12, 30)
    assert [box[1] for box in boxes(picker)] == ["Liver l", "Liver l 2"]
    key(picker, "t", *"Liver l", "enter")
    assert "the name of another ROI" in picker.status.get_text()
    key(picker, "t", *"kidney, left", "enter")
    assert [box[1] for box in boxes(picker)] == ["Liver l", "kidney, left"]
    key(picker, "t", *"spleen", "escape")
    assert [box[1] for box in boxes(picker)] == ["Liver l", "kidney, left"]
    key(picker, "u")
    assert [box[1] for box in boxes(picker)] == ["Liver l", "Liver l 2"]


def test_boxes_are_there_again_and_can_be_edited(picker):
    draw(picker, 1, 10, 20, 12, 30)
    key(picker, "down")
    draw(picker, 1, 40, 50, 42, 50)
    key(picker, "p")
    again = open_picker(picker.root)
    assert (again.key, again.slice) == (KEY, 1)  # at its first box
    drag(again, at(again, 0, 15, 20))  # a click selects it
    assert again.selected == Box(KEY, 1, "roi", "roi", 10, 20, 12, 30)
    key(again, "delete")
    assert boxes(again) == [(2, "roi", "roi", 40, 50, 42, 50)]
    key(again, "down")
    assert (open_picker(picker.root).key, open_picker(picker.root).slice) == (KEY, 2)


def test_model_grey_scale_slices_and_what_is_not_judged(picker):
    key(picker, "m")
    assert picker.names == ["low", "other", "high"]
    mean = [axes.images[0].get_array().mean() for axes in picker.axes]
    assert mean[1] == pytest.approx(0.5 * mean[2], rel=1e-4)
    limits = {axes.images[0].get_clim() for axes in picker.axes}
    assert len(limits) == 1
    drag(picker, (700, 400), (900, 500), button=3)
    assert {axes.images[0].get_clim() for axes in picker.axes} != limits
    assert not (picker.root / "data/rois.csv").exists()
    MouseEvent("scroll_event", picker.figure.canvas, 700, 400, step=-1)._process()
    assert picker.slice == 2
    assert "is dropped or of another split" in picker.status.get_text()
    key(picker, "down", "down")
    assert picker.slice == 2


def test_what_others_write_into_the_boxes_stays(picker):
    draw(picker, 0, 10, 20, 12, 30)
    other = Box(KEY, 0, "by hand", "roi", 1, 9, 1, 9)
    rois.write_boxes(picker.root, [*picker.boxes, other])
    draw(picker, 0, 40, 50, 12, 30)
    assert [box[1] for box in boxes(picker)] == ["roi", "by hand", "roi 2"]
    (picker.root / "data/rois.csv").write_text("key,slice\n")
    draw(picker, 0, 40, 50, 40, 50)
    assert "rois.csv: unknown or missing column" in picker.status.get_text()
    assert (picker.root / "data/rois.csv").read_text() == "key,slice\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{KEY},1,a,organ,0,4,0,4", "line 2: .*organ.* expected roi or background"),
        (f"{KEY},1,a,roi,0,99,0,4", "line 2: .*99.* 3 slices of 64 x 64"),
        (f"{KEY},1,a,roi,{'9' * 5000},4,0,4", "line 2"),
        (f"{KEY},²,a,roi,0,4,0,4", "line 2"),
        ("gone/x/y,1,a,roi,0,4,0,4", "line 2: gone/x/y.* expected a scan of"),
        (f"{KEY},1,a", "line 2 has not 8 fields"),
    ],
)
def test_faults_of_the_boxes(picker, line, words):
    (picker.root / "data/rois.csv").write_text(f"{','.join(Box._fields)}\n{line}\n")
    with pytest.raises(InputError, match=rf"rois\.csv: {words}"):
        open_picker(picker.root)


def test_the_command_ends_in_one_line_on_bad_boxes(picker):
    (picker.root / "data/rois.csv").write_bytes(b"\xff\xfe,")
    done = command("06_evaluate.py", "--pick-rois", "--web", "--root", str(picker.root))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "rois.csv" in done.stderr


# ---------------------------------------------------------------- any order of events


def sitting(window: Any, places: Any, events: int, seed: int) -> None:
    """Press keys and buttons at random, drag over random places, resize the figure: all but the end."""
    generator = np.random.default_rng(seed)
    keys = [name for command in window.COMMANDS for name in command.keys if name != "q"]
    keys += ["enter", "escape", "é", "ctrl+x", "shift", None]
    for _ in range(events):
        kind = generator.random()
        if kind < 0.5:
            key(window, keys[generator.integers(len(keys))])
        elif kind < 0.9:
            drag(window, *places(generator), button=int(generator.choice([1, 1, 1, 1, 2, 3])))
        elif kind < 0.95:
            width, height = generator.uniform(0.4, 18), generator.uniform(0.4, 11)
            window.figure.set_size_inches(width, height)
            window.on_resize(None)
        else:
            place = generator.uniform(-20, 1600, 2)
            MouseEvent("scroll_event", window.figure.canvas, *place, step=int(generator.choice([-1, 1])))._process()
            mouse(window, str(generator.choice(["button_press_event", "button_release_event"])), *place)


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_done_to_the_sheet_table_and_store_agree_and_undo_takes_it_back(root, seed):
    before = (root / "data/slices.csv").read_bytes()
    window = contact_sheet.Review(root)

    def places(generator: np.random.Generator) -> list[tuple[float, float]]:
        return [tile(window, int(generator.integers(len(window.captions))))]

    sitting(window, places, 120, seed)
    assert len(decisions(root)) > 3
    for name in KEYS:
        rows = [row for row in table(root / "data/slices.csv") if row["key"] == name]
        keep = [(row["decision"] or row["suggestion"]) == "keep" for row in rows]
        assert open_curated(root).read(name, "keep").tolist() == keep
    contact_sheet.Review(root)
    while window.past:
        key(window, "u")
    assert (root / "data/slices.csv").read_bytes() == before


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_done_to_boxes_they_are_boxes_and_undo_takes_it_back(picker, seed):
    drawn = 0

    def places(generator: np.random.Generator) -> list[tuple[float, float]]:
        image = int(generator.integers(len(picker.axes)))
        return [at(picker, image, *generator.uniform(-4, 68, 2)) for _ in range(3)]

    for part in range(3):
        sitting(picker, places, 40, 10 * seed + part)
        found = rois.read_boxes(picker.root)
        assert found == picker.boxes
        drawn += len(found)
        for box in found:
            assert min(box.y1 - box.y0, box.x1 - box.x0) >= 2
        kinds = [(box.key, box.slice, box.kind, box.kind == "background" or box.name) for box in found]
        assert len(set(kinds)) == len(kinds)  # one background, and a name but once
    assert drawn > 2
    picker.typing = None
    while picker.past:
        key(picker, "u")
    assert picker.boxes == rois.read_boxes(picker.root) == []


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromedriver found (Debian packages chromium and chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,900",
    ):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """A page that shows a window, its mouse and its keyboard."""

    def __init__(self, driver: Any, address: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        self.driver, self.chain, self.address = driver, lambda: ActionChains(driver, duration=20), address
        driver.get(address)
        same = "return figure.imageObj.width == innerWidth && figure.imageObj.height == innerHeight"
        wait_for(lambda: driver.execute_script(same))  # the frame has the size of the page

    def size(self) -> tuple[int, int]:
        return tuple(self.driver.execute_script("return [figure.canvas.width, figure.canvas.height]"))

    def drag(self, start: tuple[float, float], *places: tuple[float, float]) -> None:
        """Move the mouse with the button down; places are those of the figure, y upwards."""
        width, height = self.size()
        div = self.driver.execute_script("return figure.canvas_div")
        middle = [(round(x - width / 2), round(height / 2 - y)) for x, y in (start, *places)]
        chain = self.chain().move_to_element_with_offset(div, *middle[0]).click_and_hold()
        for place in middle[1:]:
            chain = chain.move_to_element_with_offset(div, *place)
        chain.release().perform()

    def key(self, *keys: str) -> None:
        for name in keys:
            self.chain().send_keys(name).perform()


class Command:
    """A script whose window is a page, until it ends."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, *words, "--web", "--preset", "smoke"]
        self.process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self) -> Command:
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if "Ctrl+C" in line:
                break
        found = re.search(r"address: (http://127\.0\.0\.1:(\d+)/\S+/)", self.said)
        assert found, self.said
        self.address, self.port = found[1], int(found[2])
        return self

    def end(self) -> str:
        """What the script said, once it ended by itself."""
        self.said += self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, self.said
        assert "Traceback" not in self.said
        return self.said

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def wait_for(test: Any, seconds: float = 20) -> None:
    """Wait until a test holds."""
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def experiment(smoke, tmp_path) -> Path:
    shutil.copytree(smoke, tmp_path / "experiment")
    return tmp_path / "experiment"


def twin(window: Any, page: Page) -> Any:
    """The same window here, laid out for the page, to know the places of what it shows."""
    width, height = page.size()
    window.figure.set_size_inches(width / 100, height / 100)
    window.layout()
    return window


def reachable(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def status_of(address: str) -> int:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(address, timeout=5) as answer:
            return answer.status
    except HTTPError as error:
        with error:
            return error.code


def test_slices_are_reviewed_in_a_browser(browser, experiment, tmp_path):
    shutil.copytree(experiment, tmp_path / "twin")
    before = table(experiment / "data/slices.csv")
    memory = experiment / "data/.review.json"
    with Command("01_curate.py", "--review", "--root", str(experiment)) as script:
        page = Page(browser, script.address)
        assert f"ssh -L {script.port}:127.0.0.1:{script.port} " in script.said
        assert status_of(page.address) == 200
        assert status_of(f"http://127.0.0.1:{script.port}/") == 404  # who does not know the address sees nothing
        assert reachable("127.0.0.1", script.port)
        assert not reachable("127.0.0.2", script.port)  # of this machine too, and not listened to
        window = twin(contact_sheet.Review(tmp_path / "twin"), page)
        first, second = window.keys[:2]
        suggested = {(r["key"], int(r["slice"])) for r in before if r["suggestion"] == "drop"}
        other = {True: "keep", False: "drop"}
        wanted = {}
        for index in (1, 0):
            page.drag(tile(window, index))
            wanted[first, index] = other[(first, index) in suggested]
            wait_for(lambda: decisions(experiment) == wanted)
        page.key("n")
        wait_for(lambda: json.loads(memory.read_text())["key"] == second)
        page.drag(tile(window, 1))
        wanted[second, 1] = other[(second, 1) in suggested]
        wait_for(lambda: decisions(experiment) == wanted)
        page.key("u")
        del wanted[second, 1]
        wait_for(lambda: decisions(experiment) == wanted)
        page.key("3")
        wait_for(lambda: json.loads(memory.read_text())["view"] == "difference")
        page.key("q")
        said = script.end()
    after = table(experiment / "data/slices.csv")
    assert decisions(experiment) == wanted
    assert [{**row, "decision": ""} for row in after] == [{**row, "decision": ""} for row in before]
    dropped = sum((row["decision"] or row["suggestion"]) == "drop" for row in after)
    assert f"{dropped} of them dropped" in said.splitlines()[-1]  # the import afterwards counts them
    for name in (first, second):
        keep = [(row["decision"] or row["suggestion"]) == "keep" for row in after if row["key"] == name]
        assert open_curated(experiment).read(name, "keep").tolist() == keep
    shown = "return getComputedStyle(document.getElementById('end')).display"
    wait_for(lambda: browser.execute_script(shown) == "block")


def test_boxes_are_drawn_in_a_browser(browser, experiment):
    path = experiment / "data/rois.csv"
    with Command("06_evaluate.py", "--pick-rois", "--root", str(experiment)) as script:
        page = Page(browser, script.address)
        cfg = evaluate.PRESETS["smoke"]
        slices = evaluate.slices_of(evaluate.Config(root=experiment), cfg.splits)
        window = twin(roi_picker.RoiPicker(experiment, slices, cfg.models), page)
        assert window.names == ["low", "unet", "high"]
        place = (window.key, window.slice)
        page.drag(at(window, 0, 20, 22), at(window, 0, 25, 28), at(window, 0, 32, 36))
        wait_for(lambda: path.exists() and len(table(path)) == 1)
        page.key("b")
        page.drag(at(window, 2, 40, 22), at(window, 2, 45, 28), at(window, 2, 50, 40))
        wait_for(lambda: len(table(path)) == 2)
        page.drag(at(window, 1, 26, 29), at(window, 1, 27, 31), at(window, 1, 28, 33))  # the first one, by its middle
        wait_for(lambda: table(path)[-1]["kind"] == "roi")
        script.process.send_signal(signal.SIGINT)  # Ctrl+C
        assert "2 boxes" in script.end()
    found = {row["kind"]: row for row in table(path)}
    assert {(row["key"], int(row["slice"])) for row in found.values()} == {place}
    sides = {kind: [int(row[k]) for k in ("y0", "y1", "x0", "x1")] for kind, row in found.items()}
    np.testing.assert_allclose(sides["background"], [40, 50, 22, 40], atol=1)  # the mouse moves by whole pixels
    np.testing.assert_allclose(sides["roi"], [22, 34, 26, 40], atol=1)
    assert rois.incomplete(rois.read_boxes(experiment)) == []


def test_a_notebook_shows_the_page_in_a_cell_and_goes_on(browser, root):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(REPO))
    try:
        shown: list[str] = []

        def read(message: dict[str, Any]) -> None:
            shown.append(message["content"].get("data", {}).get("text/html", ""))

        code = f"import pathlib, contact_sheet\ncontact_sheet.review(pathlib.Path({str(root)!r}), web=True)"
        answer = client.execute_interactive(code, timeout=60, output_hook=read)
        assert answer["content"]["status"] == "ok"
        address = re.search(r'src="(http://127\.0\.0\.1:\d+/\S+/)"', "".join(shown))
        assert address, shown
        page = Page(browser, address[1])
        page.drag(tile(twin(contact_sheet.Review(root), page), 2))
        wait_for(lambda: decisions(root) == {(KEYS[0], 2): "drop"})
        assert client.execute_interactive("1 + 1", timeout=20, output_hook=read)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
