"""Curate: find the scans of ParaVision studies, pair fast ones with slow ones, judge every slice.

Reads data/raw/ (or --raw), zip archives of studies there too; NIfTI and DICOM files named in data/cohort.csv; what a
person has edited in that table and in data/slices.csv.
Writes data/cohort.csv, data/slices.csv and data/curated.zarr. Section 3.1 of the report.

Usage:
    python 01_curate.py
    python 01_curate.py --only-index                              # then edit data/cohort.csv and run again
    python 01_curate.py --raw /archive/studies --root /scratch/mice --workers 8
    python 01_curate.py --review --web                            # then look at the slices in a browser and decide
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.errors import BaseZarrError

from cohort import (
    SLICES,
    Entry,
    Tolerance,
    index,
    is_kept,
    name_pairs,
    pair_up,
    read_slices,
    rename_slices,
    short,
    write_cohort,
)
from common import (
    Array,
    InputError,
    Lazy,
    Progress,
    fingerprint,
    finish_store,
    main,
    run_parallel,
    scan_attributes,
    sha256,
    write_scan,
    write_table,
)
from formats import read_source
from paravision import Scan, find_archives, unpack
from quality import MEASURES, measure, suggest

contact_sheet = Lazy("contact_sheet")

VERSION = 3  # raised when the import or a quality measure changes, so that every scan is done again


@dataclass(frozen=True)
class Config:
    """Settings of the curation."""

    root: Path = Path(".")
    """Folder that holds data/."""
    raw: Path | None = None
    """Folder of ParaVision studies and of zip archives of them, at any depth; none: data/raw."""
    only_index: bool = False
    """Write data/cohort.csv and stop, so that it can be edited before anything is imported."""
    tolerance_mm: float = 0.05
    """Largest difference of slice centres, field of view, thickness and distance within a pair, mm."""
    tolerance_degrees: float = 0.5
    """Largest angle between the image axes of a pair, degrees."""
    threshold: float = 2.5
    """Robust standard deviations off its neighbours from which a slice is suggested for dropping."""
    workers: int = 0
    """Processes; 0 takes every core."""
    review: bool = False
    """After that, look at the slices in a window and decide which to keep; what was decided holds at once."""
    web: bool = False
    """Review in a browser, also over ssh: the page is served on 127.0.0.1 only."""
    port: int = 8988
    """Of that page; the next free one if it is taken."""

    @property
    def studies(self) -> Path:
        """Folder of the studies."""
        return self.raw or self.root / "data" / "raw"

    @property
    def unpacked(self) -> Path:
        """Folder of what is read from archives, as long as the stage runs."""
        return self.root / "data" / ".unpacked"


PRESETS = {"paper": Config(), "demo": Config(), "smoke": Config(workers=1)}


class Task(NamedTuple):
    """A pair to import: its key, low and high as the tables name them and where they lie, the decision per slice."""

    key: str
    names: tuple[str, str]
    paths: tuple[Path, Path]
    decisions: tuple[str, ...]


def unpack_one(archive: str, cfg: Config) -> str:
    """Unpack an archive, named relative to the studies; gives why it cannot be read."""
    try:
        unpack(cfg.studies / archive, cfg.unpacked / archive)
    except InputError as error:
        return str(error).replace(f"{cfg.studies / archive}: ", "")
    return ""


def unpack_archives(cfg: Config) -> dict[str, str]:
    """Unpack what is read from every archive of the studies; gives those that cannot be, with the reason."""
    shutil.rmtree(cfg.unpacked, ignore_errors=True)
    archives = find_archives(cfg.studies)
    done = run_parallel(functools.partial(unpack_one, cfg=cfg), archives, cfg.workers if len(archives) > 3 else 1)
    return {archive: reason for archive, reason in sorted(done) if reason}


# ---------------------------------------------------------------- import


def judge(low: Scan, high: Scan, threshold: float) -> tuple[dict[str, Any], dict[str, Array]]:
    """Attributes and arrays of a pair; pixels that are no number become 0 and their slice is suggested for dropping."""
    attributes: dict[str, Any] = {}
    arrays, empty = dict[str, Array](), dict[str, Array]()
    for name, scan in (("low", low), ("high", high)):
        finite, black = (np.all(test, axis=(1, 2)) for test in (np.isfinite(scan.image), scan.image == 0))
        if np.mean(scan.image < 0) > 0.01:  # interpolation may leave a few
            raise InputError(f"{np.mean(scan.image < 0):.0%} of the {name} scan below zero, expected magnitude images")
        empty |= {f"NaN in {name}": ~finite, f"{name} is empty": black}
        arrays[name] = np.nan_to_num(scan.image, posinf=0, neginf=0)
        geometry = {f"affine_{name}": scan.affine, f"spacing_{name}_mm": scan.spacing_mm}
        attributes |= geometry | {f"parameters_{name}": scan.parameters}
    if np.any(list(empty.values()), axis=0).all():
        raise InputError("every slice is empty or holds NaN in one of the two scans, expected images")
    measures = measure(arrays["low"], arrays["high"], *(scan.parameters["phase_axis"] for scan in (low, high)))
    suggestion, reason = suggest(measures, empty, threshold)
    attributes["quality"] = measures | {"suggestion": suggestion, "reason": reason}
    return attributes, arrays


def stored(store: Path, key: str, mark: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Attributes and arrays of a pair in the store; none if it is of other data or settings, or damaged."""
    attributes = scan_attributes(store, key) or {}
    if attributes.get("fingerprint") != mark:
        return {}, {}
    try:
        arrays = {n: np.asarray(zarr.open_array(store / key / n, mode="r")[...]) for n in ("low", "high", "keep")}
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, BaseZarrError):
        return {}, {}
    return (attributes, arrays) if arrays["low"].any() and arrays["high"].any() else ({}, {})  # lost data read as 0


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of everything a scan is read from, of its pixels first."""
    if path.name != "2dseq":
        return {path.name: sha256(path)}
    parts = ("2dseq", "visu_pars", "../../method", "../../acqp", "../../../subject")
    return {part: sha256(file) for part in parts if (file := path.parent / part).is_file()}


def import_pair(task: Task, cfg: Config) -> tuple[dict[str, Any], str]:
    """Read, judge and write one pair unless the store has it; gives its attributes, or why it cannot be used."""
    store, files = cfg.root / "data" / "curated.zarr", [digests(path) for path in task.paths]
    mark = fingerprint(VERSION, (task.key, *task.names), files, cfg.threshold)
    attributes, arrays = stored(store, task.key, mark)
    if not attributes:
        try:
            attributes, arrays = judge(read_source(task.paths[0]), read_source(task.paths[1]), cfg.threshold)
        except InputError as error:
            return {}, str(error).replace(f"{cfg.unpacked}/", "").replace(f"{cfg.studies}/", "")
        subject, region, plane = re.sub(r"_\d+$", "", task.key).split("/")
        attributes |= {"subject": subject, "region": region, "plane": plane, "fingerprint": mark}
        for role, name, found in zip(("low", "high"), task.names, files, strict=True):
            attributes |= {f"source_{role}": name, f"sha256_{role}": next(iter(found.values()))}
    suggestions = attributes["quality"]["suggestion"]
    rows = [{"suggestion": s, "decision": d} for s, d in zip(suggestions, task.decisions, strict=True)]
    keep = np.array([is_kept(row) for row in rows])
    if not np.array_equal(arrays.get("keep", []), keep):
        write_scan(store, task.key, arrays | {"keep": keep}, attributes)
    return attributes, ""


def read_decisions(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines of the slice table where a person decided, by key and slice."""
    return {(row["key"], row["slice"]): row for row in read_slices(path) if row["decision"]}


def run(cfg: Config) -> dict[str, Any]:
    """Index, pair, import what changed, write the tables, declare the store complete."""
    try:
        counts = curate(cfg)
    finally:
        shutil.rmtree(cfg.unpacked, ignore_errors=True)
    if cfg.review and not cfg.only_index and contact_sheet.review(cfg.root, cfg.web, cfg.port):
        return run(dataclasses.replace(cfg, review=False))  # which brings the store's fingerprint in line
    return counts


def print_unused(entries: list[Entry], most: int = 10) -> None:
    """Say why scans are not used, one line each; of many scans the first ones."""
    reasons = [(f"{e.row['study']}/{e.row['scan']}".rstrip("/"), e.row["reason"]) for e in entries if e.row["reason"]]
    for place, reason in reasons[:most]:
        print(f"not used: {place}: {reason}", flush=True)
    if len(reasons) > most:
        print(f"not used: {len(reasons) - most} more, the reasons in cohort.csv", flush=True)


def curate(cfg: Config) -> dict[str, Any]:
    """The stage, with what it reads from archives unpacked beside the tables."""
    data = cfg.root / "data"
    entries = index(cfg.studies, cfg.unpacked, unpack_archives(cfg), data / "cohort.csv", cfg.workers)
    usable = [entry for entry in entries if entry.found]
    pairs = name_pairs(pair_up(usable, Tolerance(cfg.tolerance_mm, cfg.tolerance_degrees)))
    rename_slices(data / "slices.csv", {low.pair: key for key, (low, high) in pairs.items() if low.pair == high.pair})
    write_cohort(data / "cohort.csv", entries)
    print(f"{data / 'cohort.csv'}: {len(entries)} scans, {len(usable)} usable, {len(pairs)} pairs", flush=True)
    print_unused(entries)
    if not pairs:
        why = ": ".join((f"{usable[0].row['study']}/{usable[0].row['scan']}".rstrip("/"), usable[0].row["reason"]))
        raise InputError(f"{cfg.studies}: {len(usable)} usable scans, no pair found, expected low and high; {why}")
    if cfg.only_index:
        return {"scans": len(entries), "usable": len(usable), "pairs": len(pairs)}

    store, decided = data / "curated.zarr", read_decisions(data / "slices.csv")
    tasks: dict[str, Task] = {}
    for key, pair in sorted(pairs.items()):
        (low, low_path), (high, high_path) = (entry.source for entry in pair)
        lines = [decided.get((key, str(i)), {}) for i in range(pair[0].found["slices"])]
        decisions = tuple(line.get("decision", "") for line in lines)
        tasks[key] = Task(key, (low, high), (low_path, high_path), decisions)
    (store / "zarr.json").unlink(missing_ok=True)  # not complete until every pair is of these data and settings
    progress, done, work = Progress(len(tasks), "pair"), {}, functools.partial(import_pair, cfg=cfg)
    for (key, *_), (attributes, why) in run_parallel(work, tasks.values(), cfg.workers):
        done[key] = attributes
        for entry in pairs[key] if why else ():
            entry.row |= {"use": "no", "role": "", "pair": "", "reason": why}
        progress.step(f"{key} | {why or str(attributes['quality']['suggestion'].count('drop')) + ' slices to drop'}")
    write_cohort(data / "cohort.csv", entries)
    good = sorted(key for key in tasks if done[key])
    if not good:
        raise InputError(f"{cfg.studies}: no pair of {len(tasks)} can be used; {why}")
    rows: list[dict[str, Any]] = []
    for key in good:
        quality = done[key]["quality"]
        for i, decision in enumerate(tasks[key].decisions):
            row = {name: short(quality[name][i]) for name in MEASURES} | {"key": key, "slice": i, "decision": decision}
            rows.append(row | {name: quality[name][i] for name in ("suggestion", "reason")})
    dropped = sum(not is_kept(row) for row in rows)
    if read_decisions(data / "slices.csv") != decided:  # somebody decided meanwhile
        return curate(cfg)
    lost = [row for (key, _), row in decided.items() if key not in good]  # no decision is ever forgotten
    write_table(data / "slices.csv", SLICES, rows + lost)
    marks = [((key, *tasks[key].names, tasks[key].decisions), done[key]["fingerprint"]) for key in good]
    finish_store(store, good, {"fingerprint": fingerprint(marks)})
    print(f"{store}: {len(good)} pairs, {len(rows)} slices, {dropped} of them dropped", flush=True)
    counts = {"scans": len(entries), "usable": len(usable), "pairs": len(good), "slices": len(rows)}
    return counts | {"dropped": dropped}


if __name__ == "__main__":
    main(run, PRESETS)
