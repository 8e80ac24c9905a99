"""What two or more stages share: command line, files and stores, image geometry.

The networks live in networks.py, so that a stage that trains nothing starts without torch: ``--help`` answers in a
fraction of a second and worker processes stay small.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro
import zarr
from scipy import fft, ndimage
from zarr.codecs import ZstdCodec
from zarr.errors import BaseZarrError, ContainsGroupError

FORMAT = 1
SPLITS = ("unused", "train", "validation", "test", "lego")

ConfigT = TypeVar("ConfigT")
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------- command line


class InputError(Exception):
    """Bad input from outside: one line with the file, the value found and what is expected."""


class Lazy:
    """A module that is imported when something of it is first asked for, so that ``--help`` need not wait for it.

    It does not stand in ``sys.modules`` before, where libraries that look at every module would import it half-way.

    Parameters
    ----------
    name : str
        Of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def parse_config(presets: dict[str, ConfigT], args: Sequence[str] | None = None) -> ConfigT:
    """Read the command line into a config.

    Parameters
    ----------
    presets : dict
        Named configs; ``--preset NAME`` picks the one whose values are the defaults, the first one if none is named.
    args : sequence of str, optional
        Arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    config
        An instance of the presets' dataclass.

    Raises
    ------
    InputError
        If the preset is unknown.
    """
    rest = list(sys.argv[1:] if args is None else args)
    name = next(iter(presets))
    for i, word in enumerate(rest):
        if word == "--preset" or word.startswith("--preset="):
            _, _, name = word.partition("=")
            width = 1
            if word == "--preset":
                name, width = (rest[i + 1] if i + 1 < len(rest) else ""), 2
            del rest[i : i + width]
            break
    if name not in presets:
        raise InputError(f"--preset: found {name!r}, expected one of {', '.join(presets)}")
    default = presets[name]
    text = f"--preset {{{','.join(presets)}}} picks the defaults; those of {name!r} are shown."
    doc = (sys.modules["__main__"].__doc__ or "") if args is None else ""
    config = tyro.cli(type(default), default=default, args=rest, description=f"{doc}\n{text}")
    return config


def main(run: Callable[[ConfigT], dict[str, Any]], presets: dict[str, ConfigT]) -> None:
    """Parse the command line, print the config, run the stage; bad input ends in one line and exit status 2."""
    place: Any = "output"
    try:
        config = parse_config(presets)
        place = getattr(config, "root", place)
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
            print(" | ".join(f"{name} {value}" for name, value in fields.items()), flush=True)
        run(config)
    except InputError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        known = {errno.ENOSPC: "no space left on the disk", errno.EROFS: "read-only file system"}
        known |= {errno.EACCES: "permission denied", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}
        if error.errno not in known:
            raise
        sys.exit(_complain(f"{error.filename or place}: {known[error.errno]}, expected a writable place"))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return 2


class Progress:
    """Progress of a loop: one line rewritten on a terminal, a plain line every `interval` seconds elsewhere."""

    def __init__(self, total: int, label: str, interval: float = 10.0) -> None:
        self.total, self.label, self.interval = total, label, interval
        self.start = self.last = time.monotonic()
        self.done = 0

    def step(self, note: str = "") -> None:
        """Count one more item; `note` carries the numbers that matter."""
        self.done += 1
        now = time.monotonic()
        finished = self.done >= self.total
        terminal = sys.stdout.isatty()
        if not (terminal or finished or now - self.last >= self.interval):
            return
        self.last = now
        left = (now - self.start) / self.done * (self.total - self.done)
        line = f"{self.label} {self.done}/{self.total} | {note}{' | ' if note else ''}eta {left / 60:.1f} min"
        print(f"\r\x1b[K{line}" if terminal else line, end="\n" if finished or not terminal else "", flush=True)


# ---------------------------------------------------------------- files


def available_cores() -> int:
    """Cores this process may use (a Slurm allocation's share, not the node's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def follow_parent() -> None:
    """End a worker whose parent was killed, so that it never writes beside the next run."""

    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_parallel(
    function: Callable[[TaskT], ResultT], tasks: Iterable[TaskT], workers: int = 0
) -> Iterator[tuple[TaskT, ResultT]]:
    """Yield (task, function(task)) as they finish, in one process per core; at most 2 tasks a worker wait in memory.

    Parameters
    ----------
    function : callable
        Importable by name (a function at module level, or a functools.partial of one).
    tasks : iterable
        Small picklable values: keys and paths, not images.
    workers : int
        Number of processes; 0 takes every core, 1 stays in this process.
    """
    workers = workers or available_cores()
    if workers == 1:
        for task in tasks:
            yield task, function(task)
        return
    waiting: dict[Any, TaskT] = {}
    queue = iter(tasks)
    with ProcessPoolExecutor(workers, get_context("spawn"), follow_parent) as pool:
        try:
            while True:
                for task in itertools.islice(queue, 2 * workers - len(waiting)):
                    waiting[pool.submit(function, task)] = task
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write a file or folder to; rename it into `path` if the block succeeds.

    What an interrupted run left there is removed first, and what a failed block wrote is removed at once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir() and path.exists():  # no folder is replaced in one step: keep the old one until the end
            old = path.with_name(f".{path.name}.old")
            _remove(old)
            path.rename(old)
            partial.rename(path)
            _remove(old)
        else:
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def safe_name(text: str) -> str:
    """A text as the name of a folder: letters, digits, dots, hyphens and underscores, at most 60."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60] or "unnamed"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, or of every file below a folder in sorted order."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """Short digest of settings and of other fingerprints; a dataclass counts by its fields, a path by its text."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside its place, then rename."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV table with a header, beside its place, then rename."""
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path, columns: Sequence[str], optional: Collection[str] = ()) -> list[dict[str, str]]:
    """Read a CSV table; `optional` columns that it lacks are empty.

    Raises
    ------
    InputError
        If the file is missing, is no text, or its columns are not exactly `columns`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            found = list(reader.fieldnames or [])
            if odd := sorted((set(found) - set(columns)) | (set(columns) - set(found) - set(optional))):
                raise InputError(f"{path}: unknown or missing column {', '.join(odd)}, expected {', '.join(columns)}")
            rows = list(reader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a table with columns {', '.join(columns)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}, expected a CSV table in UTF-8") from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"{path}: line {number} has not {len(found)} fields, expected one per column")
    return [dict.fromkeys(columns, "") | row for row in rows]


# ---------------------------------------------------------------- stores


def write_scan(store: Path, key: str, arrays: dict[str, Array], attributes: dict[str, Any]) -> None:
    """Write one scan's group into a store: one chunk per slice, one shard per array, then rename into place.

    Parameters
    ----------
    store : Path
        Folder of the store; its parent folder takes the unfinished group.
    key : str
        ``subject/region/plane``.
    arrays : dict
        Name to array; the first axis is the slice for arrays of 3 axes, other arrays are one chunk.
    attributes : dict
        Plain data.
    """
    store.mkdir(parents=True, exist_ok=True)
    partial = store.with_name(f".{store.name}.{key.replace('/', '+')}.partial")
    _remove(partial)
    try:
        group = zarr.open_group(partial, mode="w", zarr_format=3, attributes=_plain(attributes))
        for name, array in arrays.items():
            chunk = (1, *array.shape[1:]) if array.ndim == 3 else array.shape
            group.create_array(
                name,
                data=np.ascontiguousarray(array),
                chunks=chunk,
                shards=array.shape if array.ndim == 3 else None,
                compressors=ZstdCodec(level=3, checksum=True),
                config={"write_empty_chunks": True},  # all zeros are data too: a missing file is always a fault
            )
        for parent in list((store / key).relative_to(store).parents)[-2::-1]:
            if not (store / parent / "zarr.json").exists():
                with contextlib.suppress(ContainsGroupError):  # another process was first
                    zarr.open_group(store / parent, mode="a", zarr_format=3)
        _remove(store / key)
        partial.rename(store / key)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


def finish_store(store: Path, scans: Sequence[str], attributes: dict[str, Any]) -> None:
    """Declare a store complete: remove groups that are not in `scans`, then write the root attributes."""
    for path in store.glob("*/*/*/zarr.json"):
        if str(path.parent.relative_to(store)) not in scans:
            _remove(path.parent)
    for path in store.parent.glob(f".{store.name}.*.partial"):
        _remove(path)
    attributes = {"format": FORMAT, "complete": True, "scans": sorted(scans)} | attributes
    meta = {"zarr_format": 3, "node_type": "group", "attributes": _plain(attributes)}
    write_json(store / "zarr.json", meta)


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, paths and tuples as JSON data."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def scan_attributes(store: Path, key: str) -> dict[str, Any] | None:
    """Attributes of one finished scan of a store that may be incomplete; None if the scan is not there."""
    try:
        return dict(json.loads((store / key / "zarr.json").read_text())["attributes"])
    except (FileNotFoundError, NotADirectoryError, KeyError, ValueError, TypeError):
        return None


class Store:
    """A complete store, opened for reading; every fault of a file ends in an InputError that names it."""

    def __init__(self, path: Path, made_by: str) -> None:
        self.path = path
        try:
            self.attributes: dict[str, Any] = dict(json.loads((path / "zarr.json").read_text())["attributes"])
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: no such store, expected the output of {made_by}") from None
        except (KeyError, ValueError, TypeError, RecursionError):
            raise InputError(f"{path}: zarr.json is damaged, run {made_by} again") from None
        if not self.attributes.get("complete"):
            raise InputError(f"{path}: the store is incomplete, run {made_by} again")
        if self.attributes.get("format") != FORMAT:
            raise InputError(f"{path}: format {self.attributes.get('format')!r} found, expected {FORMAT}")
        self.scans: list[str] = self.attributes["scans"]
        self.made_by = made_by

    def attrs(self, key: str) -> dict[str, Any]:
        """Attributes of a scan."""
        attributes = scan_attributes(self.path, key)
        if attributes is None:
            raise InputError(f"{self.path / key}: scan is missing or damaged, run {self.made_by} again")
        return attributes

    def read(self, key: str, name: str, ndim: int | None = None, dtype: str | None = None) -> Array:
        """Read a whole array of a scan and check its number of axes and its dtype.

        Raises
        ------
        InputError
            If the array is missing, cut off, damaged (checksum) or of another kind.
        """
        path = self.path / key / name
        try:
            array = zarr.open_array(path, mode="r")
            # Zarr reads a missing or empty shard as zeros, so it is looked for by name.
            if array.size and not any(p.is_file() and p.stat().st_size for p in (path / "c").rglob("*")):
                raise InputError(f"{path}: data are missing, run {self.made_by} again")
            value = np.asarray(array[...])
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, BaseZarrError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be read ({reason}), run {self.made_by} again") from None
        if (ndim is not None and value.ndim != ndim) or (dtype is not None and value.dtype != dtype):
            raise InputError(f"{path}: {value.ndim} axes of {value.dtype} found, expected {ndim} of {dtype}")
        return value


def open_truth(root: Path) -> Store:
    """The simulated scanner's truth, ``data/truth.zarr``."""
    return Store(root / "data" / "truth.zarr", "00_simulate.py")


def open_curated(root: Path) -> Store:
    """Paired scans, ``data/curated.zarr``."""
    return Store(root / "data" / "curated.zarr", "01_curate.py")


def open_pairs(root: Path) -> Store:
    """Training pairs, ``data/pairs.zarr``."""
    return Store(root / "data" / "pairs.zarr", "02_preprocess.py")


# ---------------------------------------------------------------- geometry and intensity


def upsample(low: Array, ratio: int | Sequence[int], method: str, offset: Sequence[float] | None = (0, 0)) -> Array:
    """Bring low images to the high grid: output pixel i takes the low image at coordinate i / ratio + offset.

    Parameters
    ----------
    low : array (slice, y, x)
        Real images; the field of view is taken as periodic.
    ratio : int or (int, int)
        High matrix / low matrix, along y and x.
    method : str
        ``nearest`` repeats pixels, after a Fourier shift by what the repetition does not give by itself; ``linear``
        and ``cubic`` (spline); ``fourier`` zero-fills k-space.
    offset : (float, float) or None
        y and x of high pixel (0, 0) in pixels of the low image; 0 if both centres agree. None is that of a plain zoom
        (report 3.3), 0.5 / ratio - 0.5: half a high pixel off for ratio 2.

    Returns
    -------
    array (slice, y * ratio, x * ratio), float32
    """
    image = np.asarray(low, np.float32)
    ratios = [ratio, ratio] if isinstance(ratio, int) else list(ratio)
    zoom = [0.5 / r - 0.5 for r in ratios]
    start = zoom if offset is None else list(offset)
    if method in ("linear", "cubic"):
        shape = tuple(n * r for n, r in zip(image.shape[1:], ratios, strict=True))
        how = {"output_shape": shape, "order": 1 if method == "linear" else 3, "mode": "grid-wrap"}
        return np.stack([ndimage.affine_transform(s, [1 / r for r in ratios], start, **how) for s in image])
    if method not in ("nearest", "fourier"):
        raise ValueError(f"unknown method {method!r}")
    for axis, (r, first, plain) in enumerate(zip(ratios, start, zoom, strict=True), start=1):
        image = _fourier(image, r, first, axis) if method == "fourier" else _fourier(image, 1, first - plain, axis)
        image = np.repeat(image, r, axis) if method == "nearest" else image
    return image


def _fourier(image: Array, ratio: int, offset: float, axis: int) -> Array:
    """Interpolate real images along one axis by zero-filling."""
    if ratio == 1 and offset == 0:
        return image
    n = image.shape[axis]
    phase = np.exp(2j * np.pi * offset / n * np.arange(n // 2 + 1)) * ratio
    if n % 2 == 0 and ratio > 1:
        phase[-1] /= 2  # the Nyquist component stays a cosine: half of it at n/2, half at -n/2
    phase = phase.astype(np.complex64)
    spectrum = fft.rfft(image, axis=axis) * (phase if axis == 2 else phase[:, None])
    return np.asarray(fft.irfft(spectrum, n * ratio, axis=axis), np.float32)


def grid_relation(affine_low: Array, affine_high: Array, low_shape: Any, high_shape: Any) -> tuple[Array, Array]:
    """Ratio (y, x) of the matrices and place (y, x) of high voxel (0, 0, 0) in pixels of the low image.

    Shapes are (slice, y, x), affines (4, 4) of voxel indices (x, y, slice).

    Raises
    ------
    InputError
        If the high grid is not the low one, each pixel divided into a whole number along y and x.
    """
    relation = np.linalg.inv(affine_low) @ affine_high
    ratio = np.array(high_shape[1:]) // np.array(low_shape[1:])
    if tuple(high_shape) != (low_shape[0], *(ratio * low_shape[1:])) or min(ratio) < 1:
        expected = "equal slices and an integer multiple in plane"
        raise InputError(f"matrices low {tuple(low_shape)}, high {tuple(high_shape)} found, expected {expected}")
    steps = np.diag([1 / ratio[1], 1 / ratio[0], 1])
    error = np.abs(relation[:3, :3] - steps) @ high_shape[::-1]  # low voxels off at the far corner
    if error.max() > 0.25 or abs(relation[2, 3]) > 0.1:
        found = np.array2string(relation[:3], precision=3, suppress_small=True).replace("\n", "")
        expected = f"a pure scaling by 1/{ratio[1]}, 1/{ratio[0]}, 1"
        raise InputError(f"high grid in low voxels {found} found, expected {expected}")
    return ratio, relation[[1, 0], 3]


def body_mask(low: Array) -> Array:
    """Animal or phantom in low images (slice, y, x), upsampled or not: bool of the same shape.

    Otsu's threshold between air and two classes of tissue, on the logarithm of the smoothed volume: a surface coil
    spreads tissue over a decade while air keeps one level. Then its large pieces, the holes of each slice filled.
    """
    from skimage.filters import threshold_multiotsu, threshold_otsu

    width = 0.005 * (low.shape[1] + low.shape[2])
    smooth = ndimage.gaussian_filter(np.asarray(low, np.float32), (0, width, width))
    level = np.log(np.maximum(smooth, 0.02 * np.quantile(smooth, 0.99) + 1e-30))
    if level.max() - level.min() < 1e-3:
        return np.zeros(level.shape, bool)
    three, two = threshold_multiotsu(level)[0], threshold_otsu(level)  # type: ignore[no-untyped-call]
    lowest, lower = np.quantile(level[level <= two], (0.05, 0.25))  # of air, at -1.64 and -0.67 standard deviations
    mask = level > min(two, max(three, lower + 4.8 * (lower - lowest)))  # three classes must not part the noise of air
    pieces, _ = ndimage.label(ndimage.binary_opening(mask, np.ones((1, 3, 3)), iterations=max(round(width), 1)))
    size = np.bincount(pieces[pieces > 0], minlength=1)
    large = (size >= max(0.1 * size.max(), 1))[pieces]
    return np.stack([ndimage.binary_fill_holes(s) for s in large])


def crop_box(mask: Array, margin: int, step: int = 8) -> tuple[int, int, int, int]:
    """Box (y0, y1, x0, x1) around a mask (slice, y, x); sides are multiples of `step`, or the full field if less."""
    box: list[int] = []
    for axis, n in enumerate(mask.shape[1:], start=1):
        hits = np.flatnonzero(mask.any(axis=(0, 3 - axis)))
        first, last = (max(hits[0] - margin, 0), min(hits[-1] + 1 + margin, n)) if hits.size else (0, n)
        length = min(-(-(last - first) // step) * step, n)
        start = min(max((first + last - length) // 2, 0), n - length)
        box += [int(start), int(start + length)]
    return box[0], box[1], box[2], box[3]


def normalisation(low: Array, mode: str) -> tuple[Array, Array]:
    """Scale and offset (slice,) of low images (slice, y, x): normalised = (image - offset) / scale.

    `mode` is ``mean`` (report 3.4), ``zscore``, or ``eq15`` (Eq. 15 of the report).
    """
    stack = np.asarray(low, np.float64)
    mean, std, power = stack.mean((1, 2)), stack.std((1, 2)), np.sqrt(np.square(stack).mean((1, 2)))
    scale = {"mean": mean, "zscore": std, "eq15": power}[mode]
    return scale.astype(np.float32), (mean * (mode != "mean")).astype(np.float32)
