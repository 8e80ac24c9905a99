"""The contact sheet of 01_curate.py --review: every slice of a scan pair at a glance, and which of them to keep.

Beside viewer.py, as roi_picker.py is: two windows that share all but what they show. A sheet is one image at the
resolution of the screen, not thirty axes: that keeps it quick.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import zarr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from zarr.errors import BaseZarrError

from cohort import SLICES, is_kept, read_slices
from common import Array, InputError, Store, body_mask, crop_box, grid_relation, open_curated, upsample, write_table
from viewer import END, GREY_SCALE, HELP, INK, TURN_SCANS, UNDO, Command, ReadAhead, Window, bright_pixel, open_window

VIEWS = ("low", "high", "difference")
GAP = 7  # around a tile, screen pixels
GAIN = 2  # a difference is shown that much stronger than the images


# ---------------------------------------------------------------- images


class Pair(NamedTuple):
    """A scan pair on the high grid, both images in units of the low scan."""

    low: Array
    high: Array
    limit: float  # a bright pixel of the high image: what the grey scale is measured in
    aspect: float  # height over width of a pixel
    body: tuple[slice, slice]  # rows and columns where the animal is


def load_pair(curated: Store, key: str) -> Pair:
    """Read a pair; the low image is upsampled (Fourier) onto the pixels of the high one."""
    attributes = curated.attrs(key)
    low, high = (curated.read(key, name, 3, "float32") for name in ("low", "high"))
    low_affine, high_affine = (np.array(attributes[name]) for name in ("affine_low", "affine_high"))
    try:
        ratio, offset = grid_relation(low_affine, high_affine, low.shape, high.shape)
    except InputError as error:
        raise InputError(f"{curated.path / key}: {error}") from None
    fine = upsample(low, ratio.tolist(), "fourier", offset.tolist())
    some = fine[:, ::3, ::3], high[:, ::3, ::3]  # every third pixel tells as much
    bright = (some[0] > np.quantile(some[0], 0.8)) & (some[0] > 0)
    gain = float(np.median(some[1][bright] / some[0][bright])) if bright.any() else 1.0
    high = high / np.float32(gain if gain > 0 else 1.0)
    _, dy, dx = attributes["spacing_high_mm"]
    y0, y1, x0, x1 = crop_box(body_mask(low), margin=4, step=1)
    body = slice(y0 * ratio[0], y1 * ratio[0]), slice(x0 * ratio[1], x1 * ratio[1])
    return Pair(fine, high, bright_pixel(high), dy / dx, body)


class Sheet(NamedTuple):
    """Tiles in rows, with room for a frame around and a caption under each; all in screen pixels, y downwards."""

    columns: int
    rows: int
    tile: tuple[int, int]
    step: tuple[int, int]  # from tile to tile
    gap: int  # above, left and right of a tile

    @classmethod
    def fit(cls, n: int, shape: Sequence[float], area: tuple[int, int], gap: int, caption: int) -> Sheet:
        """The number of columns that gives n tiles of a shape (height, width) the most room in an area."""

        def zoom(columns: int) -> float:
            rows = -(-n // columns)
            return min((area[0] / rows - gap - caption) / shape[0], (area[1] / columns - 2 * gap) / shape[1])

        columns = max(range(1, n + 1), key=zoom)
        height, width = (max(int(zoom(columns) * side), 8) for side in shape)
        return cls(columns, -(-n // columns), (height, width), (height + gap + caption, width + 2 * gap), gap)

    def corner(self, i: int) -> tuple[int, int]:
        """Row and column of the first pixel of a tile."""
        row, column = divmod(i, self.columns)
        return row * self.step[0] + self.gap, column * self.step[1] + self.gap

    def hit(self, y: float, x: float) -> int:
        """Tile at a place, that of a gap included; -1 beside all of them."""
        row, column = int(y // self.step[0]), int(x // self.step[1])
        return row * self.columns + column if 0 <= row < self.rows and 0 <= column < self.columns else -1

    def outline(self, i: int, margin: float) -> list[tuple[float, float]]:
        """Closed line around a tile, `margin` outside of it."""
        y, x = self.corner(i)
        top, left, bottom, right = y - margin, x - margin, y + self.tile[0] + margin, x + self.tile[1] + margin
        return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


class Picture(Artist):
    """Pixels that are drawn as they are: matplotlib's own images are resampled at every draw, which takes 0.1 s."""

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        self.axes, self.pixels = axes, np.zeros((1, 1, 4), np.uint8)

    def draw(self, renderer: Any) -> None:
        """Put the pixels into the upper left corner of the axes."""
        box = cast(Axes, self.axes).bbox
        gc = renderer.new_gc()
        renderer.draw_image(gc, round(box.x0), round(box.y1) - len(self.pixels), self.pixels[::-1])
        gc.restore()


# ---------------------------------------------------------------- decisions


class Decisions:
    """The decision column of data/slices.csv, and `keep` of data/curated.zarr, which follows it."""

    def __init__(self, root: Path) -> None:
        self.curated, self.path = open_curated(root), root / "data" / "slices.csv"
        self.rows: list[dict[str, str]] = []
        self.scans: dict[str, list[dict[str, str]]] = {}
        self.read()

    def read(self) -> None:
        """Read the table as it is now.

        Raises
        ------
        InputError
            If it lacks a column, a value is none of those allowed, or the slices of a scan are not 0, 1, 2, …
        """
        if not self.path.exists():
            raise InputError(f"{self.path}: no such file, expected the output of 01_curate.py")
        rows = read_slices(self.path)
        scans: dict[str, list[dict[str, str]]] = {key: [] for key in self.curated.scans}
        for line, row in enumerate(rows, start=2):
            if row["suggestion"] not in ("keep", "drop") and row["key"] in scans:
                odd = f"suggestion {row['suggestion']!r} found"
                raise InputError(f"{self.path}: line {line}: {odd}, expected keep or drop")
            scans.get(row["key"], []).append(row)
        for key, found in scans.items():
            found.sort(key=lambda row: (len(row["slice"]), row["slice"]))
            numbers = [row["slice"] for row in found]
            if not numbers or numbers != [str(i) for i in range(len(numbers))]:
                text = ", ".join(numbers) or "no slice"
                raise InputError(f"{self.path}: {key}: {text} found, expected one line for each slice from 0 on")
        self.rows, self.scans = rows, scans

    def marks(self, key: str) -> list[str]:
        """What holds for each slice of a scan: KEEP or DROP by a person, drop? by suggestion, else nothing."""
        texts = {"keep": "KEEP", "drop": "DROP"}
        return [texts.get(r["decision"]) or ("drop?" if r["suggestion"] == "drop" else "") for r in self.scans[key]]

    def change(self, key: str, decisions: dict[int, str]) -> dict[int, str]:
        """Write decisions about slices of a scan and give those that held before; what others wrote meanwhile stays."""
        self.read()
        rows = self.scans[key]
        before = {i: rows[i]["decision"] for i in decisions}
        for i, decision in decisions.items():
            rows[i]["decision"] = decision
        write_table(self.path, SLICES, self.rows)
        keep = np.array([is_kept(row) for row in rows])
        place = self.curated.path / key / "keep"
        try:
            with zarr.config.set({"array.write_empty_chunks": True}):  # all dropped is data too
                array = zarr.open_array(place, mode="r+")
                array[...] = keep
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, BaseZarrError) as error:
            raise InputError(f"{place}: cannot be written ({error}), run 01_curate.py again") from None
        return before


# ---------------------------------------------------------------- the window


class Review(Window):
    """Contact sheet of a scan pair: what to keep and what to drop."""

    STATE = ".review.json"
    MOUSE = (
        "click  keep or drop   right drag  up brighter, right softer   wheel  view   arrows  cursor   "
        "space  keep or drop   a  as suggested   shift+k / shift+d  whole scan   h  hide this line"
    )
    COMMANDS = (
        *TURN_SCANS,
        Command(("1",), "low", lambda w: w.show("low"), lambda w: w.shows("low")),
        Command(("2",), "high", lambda w: w.show("high"), lambda w: w.shows("high")),
        Command(("3",), "difference", lambda w: w.show("difference"), lambda w: w.shows("difference")),
        Command(("z", "enter"), "enlarge", lambda w: w.turn("enlarged"), lambda w: w.state["enlarged"]),
        Command(("b",), "body", lambda w: w.turn("cropped"), lambda w: w.state["cropped"]),
        Command(("k",), "keep", lambda w: w.decide({w.slice: "keep"})),
        Command(("d",), "drop", lambda w: w.decide({w.slice: "drop"})),
        UNDO,
        Command(("f",), "only with drops", lambda w: w.filter(), lambda w: w.state["filtered"]),
        GREY_SCALE,
        END,
        Command((" ", "space", "x"), "", lambda w: w.toggle()),
        Command(("a",), "", lambda w: w.decide({w.slice: ""})),
        Command(("K", "shift+k"), "", lambda w: w.decide(dict.fromkeys(range(len(w.pair.low)), "keep"))),
        Command(("D", "shift+d"), "", lambda w: w.decide(dict.fromkeys(range(len(w.pair.low)), "drop"))),
        Command(("left",), "", lambda w: w.move(-1)),
        Command(("right",), "", lambda w: w.move(1)),
        Command(("up",), "", lambda w: w.move(-1 if w.state["enlarged"] else -w.sheet.columns)),
        Command(("down",), "", lambda w: w.move(1 if w.state["enlarged"] else w.sheet.columns)),
        Command(("tab",), "", lambda w: w.turn_view(1)),
        HELP,
    )

    def __init__(self, root: Path = Path("."), figure: Figure | None = None) -> None:
        self.decisions = Decisions(Path(root))
        super().__init__(root, self.decisions.curated.scans, figure)
        self.state |= {"view": "low", "filtered": False, "enlarged": False, "cropped": False, "seen": []}
        self.resume({"view": VIEWS})
        self.state["seen"] = [key for key in self.state["seen"] if key in self.keys]
        self.past: list[tuple[str, dict[int, str]]] = []
        self.pairs = ReadAhead(functools.partial(load_pair, self.decisions.curated))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.picture = Picture(self.axes)
        self.axes.add_artist(self.picture)
        self.frames = self.axes.add_collection(LineCollection([], linewidths=2.5, capstyle="projecting"))
        self.captions: list[Any] = []
        self.go(self.key, self.slice)

    # ---- drawing

    def layout(self) -> None:
        """The sheet on the figure of this size."""
        width, height, top, bottom = self.place()
        gap = round(GAP * self.unit)
        area = max(int(height - top - bottom), 50), max(int(width - 2 * gap), 50)
        left = round(gap / 2)
        self.axes.set_position((left / width, (height - top - area[0]) / height, area[1] / width, area[0] / height))
        self.axes.set(xlim=(0, area[1]), ylim=(area[0], 0))
        slices, rows, columns = self.pair.low[:, *self.field].shape
        shape, tiles = (rows * self.pair.aspect, columns), len(VIEWS) if self.state["enlarged"] else slices
        for lines in (1, 2):
            self.sheet = Sheet.fit(tiles, shape, area, gap, round((6 + 14 * lines) * self.unit))
            self.letters, self.lines = int(self.sheet.tile[1] / (6.2 * self.unit)), lines
            if max(len(self.words(i)) for i in range(tiles)) <= self.letters:
                break
        for text in self.captions:
            text.remove()
        self.captions = []
        for i in range(tiles):
            _, _, _, (x, y), _ = self.sheet.outline(i, 5 * self.unit)
            text = self.axes.text(x + 5 * self.unit, y + 1, "", size=8.5, color=INK["plain"], va="top", clip_on=True)
            self.captions.append(text)
        self.fill()

    @property
    def field(self) -> tuple[slice, slice]:
        """Rows and columns that are shown."""
        return self.pair.body if self.state["cropped"] else (slice(None), slice(None))

    def words(self, i: int) -> str:
        """Caption of a tile."""
        place = self.slice if self.state["enlarged"] else i
        mark, reason = self.decisions.marks(self.key)[place], self.decisions.scans[self.key][place]["reason"]
        first = f"{VIEWS[i]}   slice " if self.state["enlarged"] else ""
        return f"{first}{place + 1}  {mark} {reason}".strip()

    def fill(self) -> None:
        """Images of this view at the size of the tiles, then in the present grey scale."""
        low, high, i = self.pair.low, self.pair.high, self.slice
        if self.state["enlarged"]:
            images = [low[i], high[i], high[i] - low[i]]
        else:
            images = {"low": low, "high": high, "difference": high - low}[self.state["view"]]
        size, images = self.sheet.tile[::-1], [image[self.field] for image in images]
        self.tiles = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.HAMMING)) for image in images]
        self.rescale()

    def rescale(self) -> None:
        """The tiles in the present grey scale: one for low and high, a stronger one around zero for the difference."""
        black, white = self.limits(self.pair.limit)
        half = (white - black) / 2 / GAIN
        height, width = self.sheet.rows * self.sheet.step[0], self.sheet.columns * self.sheet.step[1]
        grey = np.zeros((height, width), np.uint8)
        for i, tile in enumerate(self.tiles):
            view = VIEWS[i] if self.state["enlarged"] else self.state["view"]
            low, high = (-half, half) if view == "difference" else (black, white)
            y, x = self.sheet.corner(i)
            values = np.clip((tile - low) * np.float32(255 / (high - low)), 0, 255)
            grey[y : y + tile.shape[0], x : x + tile.shape[1]] = values
        self.picture.pixels = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        self.mark()

    def mark(self) -> None:
        """Frames and captions of what holds, and the cursor."""
        marks = self.decisions.marks(self.key)
        lines, colours = [], []
        many = not self.state["enlarged"]
        for i in range(len(self.captions)):
            place = i if many else self.slice
            mark = marks[place]
            text = textwrap.wrap(self.words(i), max(self.letters, 8), max_lines=self.lines, placeholder="…")
            self.captions[i].set(text="\n".join(text), color=INK[mark or "plain"])
            if mark:
                lines.append(self.sheet.outline(i, 1.5 * self.unit))
                colours.append(INK[mark])
            if mark == "DROP":
                (left, top), _, (right, bottom), *_ = self.sheet.outline(i, 0)
                lines.append([(left, bottom), (right, top)])
                colours.append(INK[mark])
            if many and place == self.slice:
                lines.append(self.sheet.outline(i, 4.5 * self.unit))
                colours.append(INK["cursor"])
        self.frames.set(segments=lines, colors=colours)
        self.draw()

    def heading(self) -> str:
        """Scan, its place among the scans, and what holds for its slices."""
        marks = self.decisions.marks(self.key)
        dropped = sum(mark in ("drop?", "DROP") for mark in marks)
        place = f"{self.keys.index(self.key) + 1} of {len(self.keys)} scans, {len(self.state['seen'])} seen"
        view = f"low, high, (high - low) x {GAIN}" if self.state["enlarged"] else self.state["view"]
        view += f" (high - low) x {GAIN}" if self.state["view"] == "difference" and not self.state["enlarged"] else ""
        return f"{self.key}   {place}   {len(marks)} slices, {dropped} dropped   view: {view}"

    def hint(self) -> str:
        """Slice under the cursor."""
        row, mark = self.decisions.scans[self.key][self.slice], self.decisions.marks(self.key)[self.slice]
        says = {"": "kept", "drop?": "dropped by suggestion", "KEEP": "kept by hand", "DROP": "dropped by hand"}[mark]
        by_hand = f" (suggestion: {row['suggestion']}{', ' * bool(row['reason'])}{row['reason']})"
        why = f": {row['reason']}" if mark == "drop?" else by_hand * bool(mark)
        only = "   only scans with drops" if self.state["filtered"] else ""
        return f"slice {self.slice + 1}: {says}{why}{only}"

    # ---- scans

    def go(self, key: str, index: int = 0) -> None:
        """Show a scan."""
        self.pair = self.pairs.get(key)
        n = len(self.decisions.scans[key])
        if n != len(self.pair.low):
            path = self.decisions.path
            raise InputError(f"{path}: {key}: {n} slices found, expected {len(self.pair.low)}: run 01_curate.py again")
        seen = self.state["seen"]
        self.state |= {"key": key, "slice": min(max(index, 0), n - 1), "seen": seen + [key] * (key not in seen)}
        self.remember()
        self.layout()
        self.pairs.ask(*filter(None, (self.neighbour(-1), self.neighbour(1), key)))

    def neighbour(self, step: int) -> str | None:
        """Next or previous scan that passes the filter, if there is one."""
        place = self.keys.index(self.key) + step
        while 0 <= place < len(self.keys):
            rows = self.decisions.scans[self.keys[place]]
            if not self.state["filtered"] or any("drop" in (row["suggestion"], row["decision"]) for row in rows):
                return self.keys[place]
            place += step
        return None

    @property
    def among(self) -> str:  # type: ignore[override]
        """Which scans are gone through."""
        return " that has drops" if self.state["filtered"] else ""

    def filter(self) -> None:
        """Only scans with a drop that is suggested or decided, or all again."""
        self.state["filtered"] = not self.state["filtered"]
        self.remember()
        self.draw()
        self.pairs.ask(*filter(None, (self.neighbour(1), self.key)))

    # ---- views

    def show(self, view: str) -> None:
        """Low, high or difference."""
        self.state |= {"view": view, "enlarged": False}
        self.remember()
        self.layout()

    def turn_view(self, step: int) -> None:
        """The view after the present one."""
        self.show(VIEWS[(VIEWS.index(self.state["view"]) + step) % len(VIEWS)])

    def shows(self, view: str) -> bool:
        """Whether the sheet is of this view."""
        return bool(self.state["view"] == view and not self.state["enlarged"])

    def turn(self, name: str) -> None:
        """One slice large, low, high and difference side by side, or the sheet again; the body, or the whole field."""
        self.state[name] = not self.state[name]
        self.remember()
        self.layout()

    def on_scroll(self, event: Any) -> None:
        """Views in the sheet, slices when enlarged."""
        step = -1 if event.step > 0 else 1
        self.move(step) if self.state["enlarged"] else self.turn_view(step)

    # ---- cursor

    def move(self, step: int) -> None:
        """Move the cursor."""
        place = self.slice + step
        if 0 <= place < len(self.decisions.scans[self.key]):
            self.state["slice"] = place
            self.fill() if self.state["enlarged"] else self.mark()
            self.remember()

    def on_click(self, event: Any) -> None:
        """Keep or drop the slice that was clicked."""
        if event.inaxes is not self.axes:
            return
        tile = self.sheet.hit(event.ydata, event.xdata)
        if not 0 <= tile < len(self.tiles):
            return
        if not self.state["enlarged"]:
            self.state["slice"] = tile
        self.toggle()

    # ---- decisions

    def decide(self, decisions: dict[int, str]) -> None:
        """Write decisions about slices of this scan."""
        before = self.decisions.change(self.key, decisions)
        if before != decisions:
            self.past.append((self.key, before))
        self.mark()
        self.remember()

    def toggle(self) -> None:
        """Keep what would be dropped, drop what would be kept."""
        dropped = self.decisions.marks(self.key)[self.slice] in ("drop?", "DROP")
        self.decide({self.slice: "keep" if dropped else "drop"})

    def undo(self) -> None:
        """Take the last decision of this sitting back and show its scan."""
        if not self.past:
            self.message = "nothing to undo in this sitting"
            self.draw()
            return
        key, before = self.past[-1]
        self.decisions.change(key, before)
        self.past.pop()
        self.go(key, min(before))


def review(root: Path, web: bool = False, port: int = 8988) -> int:
    """Look at the slices of every pair and decide; gives the number of decisions of this sitting."""
    window = cast(Review, open_window(functools.partial(Review, root), "--review", web, port))
    return len(window.past)
