"""The window of 06_evaluate.py --pick-rois: ROI and background boxes drawn on low, restored and high images.

Beside viewer.py, as contact_sheet.py is: two windows that share all but what they show. The figures under the images
are those of rois.py, as in 06.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.widgets import RectangleSelector

from common import Array, InputError, Store, open_curated, open_pairs, upsample
from rois import Box, contrast_figures, incomplete, pixels, read_boxes, rois_path, write_boxes
from viewer import (
    END,
    GREY_SCALE,
    HELP,
    INK,
    LINE,
    TURN_SCANS,
    UNDO,
    Command,
    ReadAhead,
    Window,
    bright_pixel,
    open_window,
)


class RoiPicker(Window):
    """Low, restored and high image side by side, with boxes drawn on any of them."""

    STATE = ".rois.json"
    MOUSE = (
        "drag  draw a box; inside of one, move it; at its handles, resize it   "
        "right drag  up brighter, right softer   wheel, up, down  slice   h  hide this line"
    )
    COMMANDS = (
        *TURN_SCANS,
        Command(("up", "left"), "slice -", lambda w: w.turn_slice(-1)),
        Command(("down", "right"), "slice +", lambda w: w.turn_slice(1)),
        Command(("o",), "draw ROI", lambda w: w.next_kind("roi"), lambda w: w.state["kind"] == "roi"),
        Command(
            ("b",), "draw background", lambda w: w.next_kind("background"), lambda w: w.state["kind"] == "background"
        ),
        Command(("t",), "name", lambda w: w.rename()),
        Command(("x", "delete", "backspace"), "delete", lambda w: w.delete()),
        UNDO,
        Command(("m",), "model", lambda w: w.turn_model()),
        GREY_SCALE,
        END,
        HELP,
    )

    def __init__(
        self,
        root: Path = Path("."),
        slices: Sequence[tuple[str, int]] = (),
        models: Sequence[str] = (),
        figure: Figure | None = None,
    ) -> None:
        self.curated, self.stores = open_curated(Path(root)), open_pairs(Path(root))
        self.slices = set(slices) or {
            (key, int(i)) for key in self.stores.scans for i in self.stores.read(key, "slice_index", 1, "int32")
        }
        self.boxes = read_boxes(Path(root))
        super().__init__(root, sorted({key for key, _ in self.slices}), figure)
        self.read_text = self.text()
        self.models = [name for name in models if (self.root / "results" / f"{name}.zarr").is_dir()]
        self.state |= {"kind": "roi", "name": "roi", "model": ""}
        self.resume({"kind": ("roi", "background")})
        if self.state["model"] not in self.models:
            self.state["model"] = self.models[0] if self.models else ""
        self.past: list[tuple[str, int, list[Box], list[Box]]] = []
        self.selected: Box | None = None
        self.typing: str | None = None
        self.scans = ReadAhead(self.load)
        self.axes: list[Any] = []
        self.words: list[Any] = []
        self.selectors: list[RectangleSelector] = []
        self.live = -1
        self.go(self.key, self.slice if (self.root / "data" / self.STATE).exists() else None)

    def load(self, key: str) -> tuple[dict[str, Array], float]:
        """Images of a scan in units of the low one, and the height over the width of a pixel."""
        attributes = self.curated.attrs(key) | self.stores.attrs(key)
        low, high = (self.curated.read(key, name, 3, "float32") for name in ("low", "high"))
        images = {"low": upsample(low, attributes["ratio"], "nearest", None)}  # as results/low.zarr has it
        for model in self.models:
            store = Store(self.root / "results" / f"{model}.zarr", "06_evaluate.py")
            if key in store.scans:
                images[model] = store.read(key, "restored", 3, "float32")
        images["high"] = high / np.float32(attributes["gain"])
        if odd := {name: image.shape for name, image in images.items() if image.shape != high.shape}:
            raise InputError(
                f"{key}: {odd} found, expected {high.shape}: run 02_preprocess.py and 06_evaluate.py again"
            )
        _, dy, dx = attributes["spacing_high_mm"]
        return images, dy / dx

    # ---- drawing

    def go(self, key: str, index: int | None = None) -> None:
        """Show a scan, by itself at the slice of its first box or in the middle of those that are judged."""
        self.images, self.aspect = self.scans.get(key)
        self.limit = bright_pixel(self.images["high"])
        if index is None:
            judged = sorted(i for name, i in self.slices if name == key)
            index = min((box.slice for box in self.boxes if box.key == key), default=judged[len(judged) // 2])
        self.state |= {"key": key, "slice": min(max(index, 0), len(self.images["high"]) - 1)}
        self.selected = None
        self.remember()
        self.layout()
        self.scans.ask(*filter(None, (self.neighbour(-1), self.neighbour(1), key)))

    def layout(self) -> None:
        """Three images side by side on the figure of this size."""
        width, height, top, bottom = self.place()
        for selector in self.selectors:
            selector.disconnect_events()
        for artist in (*self.axes, *self.words):
            artist.remove()
        names = [name for name in ("low", self.state["model"], "high") if name in self.images]
        wide, (rows, columns) = (width - 10) / len(names), self.images["high"].shape[1:]
        line = LINE * self.unit
        tall = min(max(height - top - bottom - 9 * line, 50.0), wide * rows / columns * self.aspect)
        foot = height - top - 1.6 * line - tall
        self.axes = []
        for i, name in enumerate(names):
            axes = self.figure.add_axes(((5 + i * wide) / width, foot / height, (wide - 8) / width, tall / height))
            axes.set_axis_off()
            axes.set_title(name, color=INK["text"], size=11)
            axes.imshow(self.images[name][self.slice], cmap="gray", interpolation="nearest", aspect=self.aspect)
            axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
            axes.add_collection(LineCollection([], linewidths=1.6))
            self.axes.append(axes)
        self.names = names
        self.labels: list[Any] = []
        self.words = [self._text((9 + i * wide) / width, (foot - line) / height) for i in range(len(names))]
        self.selectors = [self.selector(i) for i in range(len(names))]
        self.figure.canvas.mpl_disconnect(self.live)  # after the selectors, so that it sees what they made of the mouse
        self.live = self.connect("motion_notify", self.on_drawing)
        self.rescale()

    def selector(self, i: int) -> RectangleSelector:
        """Mouse on one of the images: draw, move and resize a rectangle."""
        return RectangleSelector(
            self.axes[i],
            lambda _press, _release: self.guarded(self.on_box, i),
            button=cast(Any, [1]),
            minspanx=1,
            minspany=1,
            interactive=True,
            drag_from_anywhere=True,
            grab_range=7,
            state_modifier_keys=dict.fromkeys(("move", "clear", "rotate", "center"), "no key"),
            props={"edgecolor": INK["text"], "linewidth": 2, "fill": False},
            handle_props={"markersize": 6, "markerfacecolor": INK["paper"], "markeredgecolor": INK["text"]},
        )

    def here(self) -> list[Box]:
        """Boxes of the slice that is shown."""
        return [box for box in self.boxes if (box.key, box.slice) == (self.key, self.slice)]

    def rescale(self) -> None:
        """The slice in the present grey scale, with its boxes and their figures."""
        for name, axes in zip(self.names, self.axes, strict=True):
            axes.images[0].set_data(self.images[name][self.slice])
            axes.images[0].set_clim(*self.limits(self.limit))
        self.mark()

    def mark(self) -> None:
        """Outlines and names of the boxes; the selected one is the selectors' own."""
        for text in self.labels:
            text.remove()
        self.labels = []
        for axes, selector in zip(self.axes, self.selectors, strict=True):
            others = [box for box in self.here() if box != self.selected]
            corners = [(b.x0 - 0.5, b.x1 - 0.5, b.y0 - 0.5, b.y1 - 0.5) for b in others]
            lines = [[(l, t), (r, t), (r, b), (l, b), (l, t)] for l, r, t, b in corners]  # noqa: E741
            axes.collections[0].set(segments=lines, colors=[INK[box.kind] for box in others])
            for box in self.here():
                corner, look = (box.x0 - 0.5, box.y0 - 0.5), {"size": 8.5, "color": INK[box.kind], "va": "bottom"}
                text = axes.annotate(box.name, corner, (0, 4), textcoords="offset points", **look)
                self.labels.append(text)
            if self.selected:
                b = self.selected
                selector.set_visible(True)
                selector.extents = (b.x0 - 0.5, b.x1 - 0.5, b.y0 - 0.5, b.y1 - 0.5)
                selector.set_props(edgecolor=INK[b.kind])
            else:
                selector.set_visible(False)
        self.write_figures(self.here())

    @np.errstate(divide="ignore", invalid="ignore")
    def write_figures(self, boxes: Sequence[Box]) -> None:
        """Under each image: CNR of every ROI and normalised standard deviation of the background, as 06 gives them."""
        background = next((box for box in boxes if box.kind == "background"), None)
        for name, words in zip(self.names, self.words, strict=True):
            values = {box: pixels(self.images[name], box) for box in boxes}
            lines = [f"{'box':14}{'mean':>9}{'CNR':>9}{'norm. SD':>10}"] if boxes else []
            for box in sorted(boxes, key=lambda box: (box.kind != "background", box.name)):
                line = f"{box.name[:13]:14}{values[box].mean():9.4g}"
                found = contrast_figures(values[box], values[background]) if background else {}
                if found and box.kind == "roi":
                    line += f"{found['cnr']:9.3f}"
                elif found:
                    line += f"{'':9}{found['nstd']:10.4f}"
                lines.append(line)
            words.set(text="\n".join(lines[:6] + ["…"] * (len(lines) > 6)), va="top")
        self.draw()

    def heading(self) -> str:
        """Scan, slice, and what is drawn next."""
        place = f"{self.keys.index(self.key) + 1} of {len(self.keys)} scans"
        what = "background" if self.state["kind"] == "background" else f"ROI {self.state['name']!r}"
        return f"{self.key}   {place}   slice {self.slice + 1} of {len(self.images['high'])}   next box: {what}"

    def hint(self) -> str:
        """What is missing, or what is selected."""
        if self.typing is not None:
            return f"name: {self.typing}_      enter takes it, escape does not"
        if (self.key, self.slice) not in self.slices:
            return "this slice is dropped or of another split: its boxes are not judged"
        kinds = [box.kind for box in self.here()]
        if kinds and "background" not in kinds:
            return "a background box is missing in this slice: press b and draw it"
        if kinds and "roi" not in kinds:
            return "a ROI is missing in this slice: press o and draw it"
        if self.selected:
            b = self.selected
            return f"{b.kind} {b.name!r}: {b.x1 - b.x0} x {b.y1 - b.y0} pixels at x {b.x0}, y {b.y0}"
        drawn = sorted({box.slice + 1 for box in self.boxes if box.key == self.key})
        return f"slices with boxes: {', '.join(map(str, drawn)) or 'none'}"

    # ---- mouse

    def on_key(self, event: Any) -> None:
        """Letters of a name while one is typed, else commands."""
        if self.typing is None:
            super().on_key(event)
            return
        key = event.key or ""
        if key in ("enter", "escape"):
            name, self.typing = self.typing.strip(), None
            if name and key == "enter":
                self.take_name(name)
        elif key == "backspace":
            self.typing = self.typing[:-1]
        elif key == "space" or (len(key) == 1 and key.isprintable()):
            self.typing = (self.typing + key.replace("space", " "))[:40]
        self.draw()

    def on_press(self, event: Any) -> None:
        """Select the box under the mouse, or none; what follows is the selector's, whose turn is next."""
        super().on_press(event)
        if event.button != 1 or event.inaxes not in self.axes:
            return
        selector = self.selectors[self.axes.index(event.inaxes)]
        if self.selected and self.grabs(selector, event):
            return
        inside = [b for b in self.here() if b.x0 <= event.xdata + 0.5 < b.x1 and b.y0 <= event.ydata + 0.5 < b.y1]
        self.selected = min(inside, key=lambda box: (box.x1 - box.x0) * (box.y1 - box.y0), default=None)
        self.mark()

    def grabs(self, selector: RectangleSelector, event: Any) -> bool:
        """Whether a press moves or resizes the selected box: it is inside of it, or at a handle."""
        left, right, top, bottom = selector.extents
        handles = np.concatenate([np.transpose(selector.corners), np.transpose(selector.edge_centers)])
        apart = np.hypot(*(selector.ax.transData.transform(handles) - (event.x, event.y)).T)
        inside = left <= event.xdata <= right and top <= event.ydata <= bottom
        return bool(inside or apart.min() <= selector.grab_range)

    def box_of(self, i: int) -> Box | None:
        """The rectangle of a selector as a box of whole pixels; none if it is too small for a deviation."""
        left, right, top, bottom = self.selectors[i].extents
        rows, columns = self.images["high"].shape[1:]
        x0, x1 = (min(max(round(x + 0.5), 0), columns) for x in (left, right))
        y0, y1 = (min(max(round(y + 0.5), 0), rows) for y in (top, bottom))
        if x1 - x0 < 2 or y1 - y0 < 2:
            return None
        old = self.selected
        kind = old.kind if old else self.state["kind"]
        name = old.name if old else self.free_name(kind)
        return Box(self.key, self.slice, name, kind, y0, y1, x0, x1)

    def free_name(self, kind: str) -> str:
        """Name of the next box: a name is given but once to the ROIs of a slice."""
        if kind == "background":
            return "background"
        taken, base = {box.name for box in self.here() if box.kind == "roi"}, str(self.state["name"])
        names = (base if n == 1 else f"{base} {n}" for n in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)

    def on_drawing(self, event: Any) -> None:
        """Figures of a box while the mouse still draws it."""
        if self.pressed is None or event.inaxes not in self.axes:
            return
        box = self.box_of(self.axes.index(event.inaxes))
        if box and box != self.selected:
            same = [b for b in self.here() if b != self.selected and not (b.kind == box.kind == "background")]
            self.write_figures([*same, box])

    def on_box(self, i: int) -> None:
        """A box was drawn, moved or resized."""
        box, old = self.box_of(i), self.selected
        if box is None or box == old:
            self.mark()
            return
        second = [b for b in self.here() if b.kind == box.kind == "background"]  # but one of them in a slice
        self.change([old] if old else second, [box])
        self.state["kind"] = "roi"
        self.selected = box
        self.mark()

    def on_scroll(self, event: Any) -> None:
        """The wheel turns the slices."""
        self.turn_slice(-1 if event.step > 0 else 1)

    # ---- boxes

    def text(self) -> bytes:
        """The table as it is on the disk."""
        path = rois_path(self.root)
        return path.read_bytes() if path.exists() else b""

    def change(self, removed: Sequence[Box], added: Sequence[Box], undoing: bool = False) -> None:
        """Write the table; what others wrote meanwhile stays."""
        boxes = self.boxes if self.text() == self.read_text else read_boxes(self.root)
        boxes = [box for box in boxes if box not in removed] + list(added)
        write_boxes(self.root, boxes)
        self.boxes, self.read_text = boxes, self.text()
        if not undoing:
            self.past.append((self.key, self.slice, list(removed), list(added)))
        self.remember()

    def delete(self) -> None:
        """Delete the selected box."""
        if self.selected is None:
            self.message = "no box is selected: click one first"
            self.draw()
            return
        self.change([self.selected], [])
        self.selected = None
        self.mark()

    def undo(self) -> None:
        """Take the last change of this sitting back and show its slice."""
        if not self.past:
            self.message = "nothing to undo in this sitting"
            self.draw()
            return
        key, index, removed, added = self.past[-1]
        self.change(added, removed, undoing=True)
        self.past.pop()
        self.go(key, index)

    def next_kind(self, kind: str) -> None:
        """Draw a ROI next, or the background, which replaces that of the slice."""
        self.state["kind"], self.selected = kind, None
        self.mark()

    def rename(self) -> None:
        """Type a name: that of the selected ROI and of the next ones."""
        self.typing = ""
        self.draw()

    def take_name(self, name: str) -> None:
        """Name the selected box so, and the next ROIs."""
        old = self.selected
        if old and any(box.name == name and box.kind == old.kind for box in self.here() if box != old):
            self.message = f"{name!r} is the name of another ROI of this slice"
            return
        if old:
            box = old._replace(name=name)
            self.change([old], [box])
            self.selected = box
        if not old or old.kind == "roi":
            self.state["name"] = name
        self.remember()
        self.mark()

    # ---- slices and scans

    def turn_slice(self, step: int) -> None:
        """Another slice of this scan."""
        place = self.slice + step
        if 0 <= place < len(self.images["high"]):
            self.state["slice"], self.selected = place, None
            self.remember()
            self.rescale()

    def turn_model(self) -> None:
        """The restored image of another model."""
        if len(self.models) < 2:
            self.message = f"models with images in results: {', '.join(self.models) or 'none'}"
        else:
            self.state["model"] = self.models[(self.models.index(self.state["model"]) + 1) % len(self.models)]
        self.layout()


def pick_rois(
    root: Path, slices: Sequence[tuple[str, int]], models: Sequence[str], web: bool = False, port: int = 8988
) -> int:
    """Draw boxes on scans; gives the number of boxes, and tells what is not complete yet."""
    make = functools.partial(RoiPicker, root, slices, models)
    window = cast(RoiPicker, open_window(make, "--pick-rois", web, port))
    for text in incomplete(window.boxes):
        print(f"not complete yet: {text}", flush=True)
    print(f"{rois_path(root)}: {len(window.boxes)} boxes", flush=True)
    return len(window.boxes)
