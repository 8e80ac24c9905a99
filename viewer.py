"""A window in which a person decides: what contact_sheet.py (01 --review) and roi_picker.py (06 --pick-rois) share.

One code for a desktop window, a browser, also over ssh (matplotlib's WebAgg), and a notebook, where
``contact_sheet.review(root, web=True)`` shows the same page in a cell. Apart from the scripts because importing
matplotlib would keep their ``--help`` waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import math
import secrets
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib.pyplot as plt
import numpy as np
import tornado.web
import tornado.websocket
from matplotlib.backends import backend_webagg_core
from matplotlib.backends.registry import BackendFilter, backend_registry
from matplotlib.figure import Figure
from PIL import Image

from common import Array, InputError, write_json

INK = {
    "paper": "#111111",
    "plain": "#9a9a9a",
    "text": "#e8e8e8",
    "key": "#303030",
    "on": "#0d5c8c",
    "cursor": "#4fc3f7",
}
INK |= {"drop?": "#ffa726", "DROP": "#ff5252", "KEEP": "#66bb6a", "background": "#ffee58", "roi": "#4fc3f7"}
BUTTON = {"boxstyle": "square,pad=0.5", "edgecolor": "none"}
BAR, LINE = 34, 17  # height of the row of buttons and of a line of text, pixels at 100 per inch
CACHED = 5  # scans kept in memory: the one shown, its neighbours, two more
PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>Slices and boxes</title>
<link rel="icon" href="data:,"><script src="mpl.js"></script>
<style>body {margin: 0; background: #111; overflow: hidden}
#end {display: none; position: fixed; top: 40%; width: 100%; text-align: center; z-index: 9;
font: 20px sans-serif; color: #fff; background: #a00; padding: 10px}
.mpl-toolbar, .ui-dialog-titlebar {display: none} .mpl-canvas {display: block}</style></head>
<body><div id="end">The viewer has ended, or the connection is lost; everything was saved.</div><div id="figure"></div>
<script>
mpl.toolbar_items = [];
const socket = new WebSocket(location.href.replace("http", "ws") + "socket");
const figure = new mpl.figure(1, socket, function () {}, document.getElementById("figure"));
const place = figure.canvas_div;
function fit() { place.style.border = 0; place.style.resize = "none";
  place.style.width = innerWidth + "px"; place.style.height = innerHeight + "px"; }
figure._resize_canvas = fit;
addEventListener("resize", fit);
socket.addEventListener("close", () => document.getElementById("end").style.display = "block");
const taken = "ArrowUp,ArrowDown,ArrowLeft,ArrowRight, ,Tab,PageUp,PageDown,Backspace,/,'".split(",");
place.addEventListener("keydown", e => { if (taken.includes(e.key)) e.preventDefault(); });
addEventListener("keydown", e => { if (document.activeElement !== place) {
  place.focus(); place.dispatchEvent(new KeyboardEvent("keydown", e)); } });
</script></body></html>"""


# ---------------------------------------------------------------- images


def bright_pixel(image: Array) -> float:
    """Grey value that but two percent of the pixels exceed; 1 for an empty image."""
    return float(np.quantile(image[:, ::3, ::3], 0.98)) or 1.0


class ReadAhead:
    """The scans a person is likely to want next, read by a thread while the present one is looked at."""

    def __init__(self, load: Callable[[str], Any]) -> None:
        self.load, self.pool = load, ThreadPoolExecutor(1)
        self.found: dict[str, Future[Any]] = {}

    def get(self, key: str) -> Any:
        """A scan, from memory if it was read ahead."""
        self.ask(key)
        try:
            return self.found[key].result()
        except Exception as error:
            del self.found[key]  # it may have been mended when it is asked for again
            if isinstance(error, KeyError | ValueError | np.linalg.LinAlgError):
                raise InputError(f"{key}: the scan is damaged ({error}), run 01_curate.py again") from None
            raise

    def ask(self, *keys: str) -> None:
        """Begin to read scans, and forget those that were not asked for lately."""
        for key in keys:
            known = self.found.pop(key) if key in self.found else self.pool.submit(self.load, key)
            self.found[key] = known  # the last one asked for is forgotten last
        while len(self.found) > CACHED:
            self.found.pop(next(iter(self.found))).cancel()


# ---------------------------------------------------------------- the window


class Command(NamedTuple):
    """What keys, and a button if there is a label, do."""

    keys: tuple[str, ...]
    label: str
    action: Callable[[Any], None]  # takes the window
    holds: Callable[[Any], bool] = lambda _window: False  # whether its button shows that it is on


TURN_SCANS = (
    Command(("p", "pageup"), "previous", lambda w: w.turn_scan(-1)),
    Command(("n", "pagedown"), "next", lambda w: w.turn_scan(1)),
)
UNDO = Command(("u", "ctrl+z"), "undo", lambda w: w.undo())
GREY_SCALE = Command(("r",), "grey scale", lambda w: w.reset())
END = Command(("q",), "end", lambda w: w.end())
HELP = Command(("h", "?"), "", lambda w: w.toggle_help())


def no_toolbar() -> Figure:
    """An empty figure of pyplot without matplotlib's toolbar."""
    with plt.rc_context({"toolbar": "None"}):
        return plt.figure(figsize=(15.2, 9), dpi=100)


class Window:
    """A figure with buttons and keys, a window on the grey scale, undo, and a memory of where a sitting ended."""

    COMMANDS: tuple[Command, ...] = ()
    MOUSE = ""
    STATE = ""
    among = ""  # which scans are gone through

    def __init__(self, root: Path, keys: Sequence[str], figure: Figure | None) -> None:
        self.root, self.keys, self.message = Path(root), list(keys), ""
        self.state: dict[str, Any] = {"key": self.keys[0], "slice": 0, "window": [0.5, 1.0], "help": True}
        self.figure = figure or no_toolbar()
        self.figure.set_layout_engine("none")  # whatever matplotlibrc says: nothing here is an axis
        self.figure.set_facecolor(INK["paper"])
        self.drag: tuple[float, float, list[float]] | None = None
        self.pressed: tuple[float, float] | None = None
        self.on_end: Callable[[], None] = lambda: plt.close(self.figure)  # nothing in a notebook
        manager = self.figure.canvas.manager
        if manager is not None:
            manager.set_window_title(type(self).__name__)
            if (standard := getattr(manager, "key_press_handler_id", None)) is not None:
                self.figure.canvas.mpl_disconnect(standard)  # matplotlib's own keys: q, s, l, arrows, …
        self.buttons = [(command, self._text(0, 0)) for command in self.COMMANDS if command.label]
        self.title, self.status, self.help = (self._text(0, 0) for _ in range(3))
        self.title.set(weight="bold", size=11)
        for name, handler in (
            ("key_press", self.on_key),
            ("button_press", self.on_press),
            ("motion_notify", self.on_motion),
            ("button_release", self.on_release),
            ("scroll", self.on_scroll),
            ("resize", self.on_resize),
        ):
            self.connect(name, handler)

    def _text(self, x: float, y: float) -> Any:
        return self.figure.text(x, y, "", family="DejaVu Sans Mono", size=9, color=INK["text"], va="center")

    def connect(self, name: str, handler: Callable[[Any], None]) -> int:
        """Have a handler called; gives the number by which to end that."""
        return self.figure.canvas.mpl_connect(cast(Any, f"{name}_event"), functools.partial(self.guarded, handler))

    # ---- state

    @property
    def key(self) -> str:
        """Key of the scan that is shown."""
        return str(self.state["key"])

    @property
    def slice(self) -> int:
        """Slice under the cursor."""
        return int(self.state["slice"])

    def resume(self, choices: dict[str, Sequence[str]]) -> None:
        """Go to where the last sitting ended; what is not of this cohort or damaged counts as nothing."""
        try:
            found = json.loads((self.root / "data" / self.STATE).read_text())
            known = {k: v for k, v in found.items() if k in self.state and type(v) is type(self.state[k])}
        except (OSError, ValueError, AttributeError):
            return
        windows = known.get("window", [])
        if len(windows) != 2 or not all(isinstance(v, float) and 0 < abs(v) < 1e3 for v in windows) or windows[1] < 0:
            known.pop("window", None)
        for name in choices:
            if known.get(name) not in choices[name]:
                known.pop(name, None)
        if known.get("key") not in self.keys:
            known = {k: v for k, v in known.items() if k not in ("key", "slice")}
        self.state |= known

    def remember(self) -> None:
        """Write where this sitting is."""
        write_json(self.root / "data" / self.STATE, self.state)

    # ---- events

    def guarded(self, handler: Callable[[Any], None], event: Any) -> None:
        """Run a handler; a fault of a file becomes a line in the window, and nothing else has happened."""
        try:
            self.message = "" if handler in (self.on_key, self.on_press) else self.message
            handler(event)
        except (InputError, OSError) as error:
            self.message = " ".join(str(error).split())
            self.draw()

    def on_key(self, event: Any) -> None:
        """Do what a key stands for."""
        for command in self.COMMANDS:
            if event.key in command.keys:
                command.action(self)
                return

    def on_press(self, event: Any) -> None:
        """Begin a click or, with the right button, a change of the grey scale."""
        self.pressed = (event.x, event.y) if event.button == 1 else None
        self.drag = (event.x, event.y, list(self.state["window"])) if event.button == 3 else None

    def on_motion(self, event: Any) -> None:
        """Right button down: up is brighter, right is softer."""
        if self.drag is None:
            return
        x, y, (centre, width) = self.drag
        _, _, w, h = self.figure.bbox.bounds
        wide = width * math.exp(2 * (event.x - x) / w)
        self.state["window"] = [min(max(centre - width * (event.y - y) / h, -2.0), 5.0), min(max(wide, 0.01), 20.0)]
        self.rescale()

    def on_release(self, event: Any) -> None:
        """End a click, which counts where it began."""
        if event.button == 3 and self.drag is not None:
            self.drag = None
            self.remember()
        if event.button == 1 and self.pressed is not None:
            near = math.dist(self.pressed, (event.x, event.y)) < 6
            self.pressed = None
            if near and (command := self.button_at(event.x, event.y)):
                command.action(self)
            elif near:
                self.on_click(event)

    def on_click(self, event: Any) -> None:
        """A click that hit no button."""

    def on_scroll(self, event: Any) -> None:
        """The wheel."""

    def on_resize(self, _event: Any) -> None:
        """Lay out anew."""
        self.layout()

    # ---- drawing

    def place(self) -> tuple[float, float, float, float]:
        """Buttons, title and help on the figure of this size; gives its width and height, and what both ends take."""
        _, _, width, height = self.figure.bbox.bounds
        bar, line, left = BAR * self.unit, LINE * self.unit, 12 * self.unit
        x, top = left, bar
        for command, text in self.buttons:
            label = f"{command.label} [{command.keys[0]}]"
            if x > left and x + self._columns(len(label)) + left > width:
                x, top = left, top + bar
            text.set(text=label, x=x / width, y=1 - (top - bar / 2) / height)
            x += self._columns(len(label)) + 19 * self.unit
        self.title.set(x=left / width, y=1 - (top + line / 2) / height)
        self.status.set(x=left / width, y=1 - (top + 1.6 * line) / height)
        lines = textwrap.wrap(self.MOUSE, int((width - 2 * left) / self._columns(1))) if self.state["help"] else []
        self.help.set(text="\n".join(lines), x=left / width, y=4 * self.unit / height, va="bottom")
        return width, height, top + 2.4 * line, (len(lines) + 0.5) * line

    @property
    def unit(self) -> float:
        """Screen pixels to a pixel of a screen that is not fine."""
        return float(self.figure.dpi) / 100

    def _columns(self, n: int) -> int:
        return n * round(0.602 * 9 * self.figure.dpi / 72)  # DejaVu Sans Mono at size 9: whole pixels a letter

    def button_at(self, x: float, y: float) -> Command | None:
        """Button at a place of the figure."""
        _, _, width, height = self.figure.bbox.bounds
        for command, text in self.buttons:
            left, middle = np.multiply(text.get_position(), (width, height))
            right, pad = left + self._columns(len(text.get_text())), 7 * self.unit
            if abs(y - middle) < BAR / 2 * self.unit and left - pad <= x <= right + pad:
                return command
        return None

    def limits(self, limit: float) -> tuple[float, float]:
        """Grey values of black and of white."""
        centre, width = self.state["window"]
        return limit * (centre - width / 2), limit * (centre + width / 2)

    def draw(self) -> None:
        """Show the words, and ask for the figure to be drawn."""
        self.title.set_text(self.heading())
        self.status.set_text(self.message or self.hint())
        self.status.set_color(INK["DROP"] if self.message else INK["text"])
        for command, text in self.buttons:
            text.set_bbox(BUTTON | {"facecolor": INK["on" if command.holds(self) else "key"]})
        self.figure.canvas.draw_idle()

    def heading(self) -> str:
        """Title line."""
        return self.key

    def hint(self) -> str:
        """Status line while there is no fault."""
        return ""

    def layout(self) -> None:
        """Lay everything out on the figure of this size."""

    def rescale(self) -> None:
        """Show the images in the present grey scale."""

    # ---- commands that both windows have

    def go(self, key: str) -> None:
        """Show a scan."""

    def neighbour(self, step: int) -> str | None:
        """Next or previous scan, if there is one."""
        place = self.keys.index(self.key) + step
        return self.keys[place] if 0 <= place < len(self.keys) else None

    def turn_scan(self, step: int) -> None:
        """Go to the next or previous scan, or say that there is none."""
        if key := self.neighbour(step):
            self.go(key)
        else:
            self.message = f"no scan {'after' if step > 0 else 'before'} this one" + self.among
            self.draw()

    def reset(self) -> None:
        """Grey scale as at first."""
        self.state["window"] = [0.5, 1.0]
        self.remember()
        self.rescale()

    def toggle_help(self) -> None:
        """Show or hide the lines that explain the mouse."""
        self.state["help"] = not self.state["help"]
        self.layout()

    def end(self) -> None:
        """Close the window."""
        self.remember()
        self.on_end()


# ---------------------------------------------------------------- desktop, browser, notebook


class WebCanvas(backend_webagg_core.FigureCanvasWebAggCore):
    """WebAgg's canvas with frames that are hardly compressed: its own way takes half a second of a contact sheet."""

    sent: Array | None = None

    def get_diff_image(self) -> bytes | None:
        """What changed since the last frame, or all of it, as a PNG."""
        if not self._png_is_old:
            return None
        frame = np.array(self.get_renderer().buffer_rgba())  # type: ignore[no-untyped-call]
        full = self._force_full or self.sent is None or self.sent.shape != frame.shape
        self.set_image_mode("full" if full else "diff")  # type: ignore[no-untyped-call]
        changed = frame if full else np.where((frame != self.sent).any(axis=2, keepdims=True), frame, np.uint8(0))
        self.sent, self._force_full, self._png_is_old = frame, False, False
        with BytesIO() as png:
            Image.fromarray(changed[..., :3] if full else changed).save(png, format="png", compress_level=1)
            return png.getvalue()


class Page(tornado.web.RequestHandler):
    """The page, which the figure fills, and the script of its canvas."""

    def get(self, script: str) -> None:
        """Send one of the two."""
        self.set_header("Content-Type", "application/javascript" if script else "text/html; charset=utf-8")
        manager = cast(Any, backend_webagg_core.FigureManagerWebAgg)
        self.write(manager.get_javascript() if script else PAGE)


class Socket(tornado.websocket.WebSocketHandler):
    """Events from the browser to the figure, frames from the figure to the browser."""

    def initialize(self, manager: Any) -> None:
        """Take the figure's manager."""
        self.manager = manager

    def open(self) -> None:
        """The page is there."""
        self.set_nodelay(True)
        self.manager.add_web_socket(self)

    def on_close(self) -> None:
        """The page is gone."""
        self.manager.remove_web_socket(self)

    def on_message(self, message: str | bytes) -> None:
        """An event."""
        event = json.loads(message)
        if event["type"] != "supports_binary":
            self.manager.handle_json(event)

    def send_json(self, content: dict[str, Any]) -> None:
        """Called by the manager."""
        self.write_message(json.dumps(content))

    def send_binary(self, blob: bytes) -> None:
        """Called by the manager."""
        self.write_message(blob, binary=True)


def serve(manager: Any, port: int) -> str:
    """Serve a figure on 127.0.0.1, from this port on the first that is free; gives the address, which none can guess.

    The secret in it keeps out other users of the machine and pages that the browser has open beside this one.
    """
    secret = f"/{secrets.token_urlsafe(12)}/"
    routes = [(secret + "(mpl.js)?", Page), (secret + "socket", Socket, {"manager": manager})]
    application = tornado.web.Application(routes, log_function=lambda _handler: None)  # type: ignore[arg-type]
    for place in range(port, port + 50):
        try:
            application.listen(place, "127.0.0.1")
            break
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    else:
        raise InputError(f"--port {port}: this port and the 49 after it are taken, expected a free one")
    address = f"http://127.0.0.1:{place}{secret}"
    print(f"address: {address}", flush=True)
    print(
        f"over ssh: on your machine run  ssh -L {place}:127.0.0.1:{place} USER@HOST  and open that address", flush=True
    )
    return address


def open_window(make: Callable[[Figure | None], Window], option: str, web: bool, port: int) -> Window:
    """Show a window until it is closed: on the desktop, as a page, or in a notebook, which goes on meanwhile.

    Raises
    ------
    InputError
        If there is no display to open a window on, or no free port.
    """
    if not web:
        windows = cast(Any, backend_registry).list_builtin(BackendFilter.INTERACTIVE)
        with contextlib.suppress(ImportError):  # the backend that was asked for lacks its library or a display
            window = make(None)
            if plt.get_backend().lower() in windows:
                plt.show(block=True)
                return window
        raise InputError(f"{option}: no display found, expected one, or --web for a browser, also over ssh")
    figure = Figure(figsize=(15.2, 9), dpi=100)
    manager = backend_webagg_core.FigureManagerWebAgg(WebCanvas(figure), 1)  # type: ignore[no-untyped-call]
    window = make(figure)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl+C ends the viewer, not what comes after it
            asyncio.run(until_ended(window, manager, port))
        return window
    from IPython.display import IFrame, display

    display(IFrame(serve(manager, port), width="100%", height=700))  # type: ignore[no-untyped-call]
    return window


async def until_ended(window: Window, manager: Any, port: int) -> None:
    """Serve a window until a person ends it."""
    ended = asyncio.Event()
    window.on_end = ended.set
    serve(manager, port)
    print("end with q in the page or Ctrl+C here", flush=True)
    await ended.wait()
