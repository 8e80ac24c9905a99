"""Curate: find the scans of ParaVision studies, pair fast ones with slow ones, judge every slice.

Reads data/raw/ (or --raw), and what a person has edited in data/cohort.csv and data/slices.csv.
Writes data/cohort.csv, data/slices.csv and data/curated.zarr. Section 3.1 of the report.

Usage:
    python 01_curate.py
    python 01_curate.py --only-index                              # then edit data/cohort.csv and run again
    python 01_curate.py --raw /archive/studies --root /scratch/mice --workers 8
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.errors import BaseZarrError

from common import (
    Array,
    InputError,
    Progress,
    fingerprint,
    finish_store,
    main,
    read_table,
    run_parallel,
    safe_name,
    scan_attributes,
    sha256,
    write_scan,
    write_table,
)
from paravision import Scan, index_scan, number, read_paravision, scan_folders
from quality import MEASURES, measure, suggest

VERSION = 1  # raised when the import or a quality measure changes, so that every scan is done again
COHORT = [
    *("subject", "region", "plane", "role", "study", "scan", "reco", "matrix", "averages", "tr_ms", "te_ms", "fov_mm"),
    *("slices", "thickness_mm", "protocol", "date", "use", "pair", "reason"),
]
AUTOMATIC = ".cohort.automatic.csv"  # the cohort without a person's changes: what differs from it was set by hand
Task = tuple[str, str, str, tuple[str, ...]]  # key of a pair, low and high 2dseq below the studies, decision per slice
BY_HAND = ("subject", "region", "plane", "role", "use")  # columns of the cohort that a person may change
SLICES = ["key", "slice", *MEASURES, "suggestion", "reason", "decision"]
# Region by the first form found in the names of protocol, scan, study, subject and folder.
REGIONS = {"HT": r"(?<![a-z])ht(?![a-z])|head.?thorax", "TA": r"(?<![a-z])ta(?![a-z])|thorax.?abdomen"}
REGIONS |= {"lego": "lego", "head": "head|brain", "thorax": "thorax|chest", "abdomen": "abdom"}


@dataclass(frozen=True)
class Config:
    """Settings of the curation."""

    root: Path = Path(".")
    """Folder that holds data/."""
    raw: Path | None = None
    """Folder of ParaVision studies, at any depth; none: data/raw."""
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

    @property
    def studies(self) -> Path:
        """Folder of the studies."""
        return self.raw or self.root / "data" / "raw"


PRESETS = {"paper": Config(), "demo": Config(), "smoke": Config(workers=1)}


# ---------------------------------------------------------------- index


@dataclass
class Entry:
    """A scan: its automatic line of the cohort, parameters, what a person set by hand, and earlier automatic lines."""

    row: dict[str, str]
    found: dict[str, Any]
    hand: dict[str, str]
    earlier: list[dict[str, str]]
    name: str  # of the subject, in an earlier run
    pair: str  # key in an earlier run

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorting by time, then by place."""
        return self.row["date"], self.row["study"], number(self.row["scan"]), self.row["scan"]


def short(*values: float | None) -> str:
    """Numbers as in 30x30; nothing for a missing one."""
    return "x".join("" if value is None else f"{value:.6g}" for value in values)


def cohort_row(study: str, scan: str, reco: str, found: dict[str, Any], reason: str) -> dict[str, str]:
    """A scan's automatic line of the cohort, before it is paired."""
    row = dict.fromkeys(COHORT, "") | {"study": study, "scan": scan, "reco": reco, "reason": reason, "use": "no"}
    if not found:
        return row
    names = [found[name].replace("_", " ") for name in ("protocol", "scan_name", "study", "subject")]
    tests = itertools.product([*names, study.replace("_", " ")], REGIONS.items())
    row["region"] = next((region for text, (region, form) in tests if re.search(form, text, re.I)), "unknown")
    row |= {name: found[name] for name in ("plane", "protocol", "date")}
    row |= {name: short(found[name]) for name in ("averages", "tr_ms", "te_ms", "slices", "thickness_mm")}
    return row | {name: short(*found[name]) for name in ("matrix", "fov_mm")} | {"use": "yes"}


def read_cohort(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Lines of a cohort table by study and scan."""
    table = {}
    for line, row in enumerate(read_table(path, COHORT) if path.exists() else [], start=2):
        names = [name for name in ("subject", "region", "plane") if row[name] and safe_name(row[name]) != row[name]]
        names += ["role"] * (row["role"] not in ("low", "high", "")) + ["use"] * (row["use"] not in ("yes", "no", ""))
        if names or (row["study"], row["scan"]) in table:
            found = f"{names[0]} {row[names[0]]!r}" if names else "the scan of an earlier line"
            wanted = "low or high, yes or no, names of letters, digits, dots, - and _, one line a scan"
            raise InputError(f"{path}: line {line}: {found} found, expected {wanted}")
        table[row["study"], row["scan"]] = row
    return table


def index(raw: Path, cohort: Path, workers: int) -> list[Entry]:
    """Every scan below raw, with what a person changed in the cohort."""
    scans = scan_folders(raw)
    results = dict(run_parallel(index_scan, scans, workers if len(scans) > 100 else 1))
    if not any(found for _, found, _ in results.values()):
        why = "".join(f", the first: {reason}" for _, _, reason in list(results.values())[:1])
        raise InputError(f"{raw}: {len(scans)} scans found, none usable{why}; expected studies with RARE scans")
    places = {(str(scan.parent.relative_to(raw)), scan.name): scan for scan in scans}
    table, automatic = read_cohort(cohort), cohort.with_name(AUTOMATIC)
    proposed = read_table(automatic, COHORT) if automatic.exists() else []
    if lost := [place for place in table if place not in places]:
        raise InputError(f"{cohort}: {raw.joinpath(*lost[0])} is no scan, expected one or no such line")
    entries = []
    for place, scan in places.items():
        reco, found, reason = results[scan]
        row, line = cohort_row(*place, reco, found, reason), table.get(place, {})
        earlier = [auto for auto in proposed if (auto["study"], auto["scan"]) == place]
        known = {name: {"", row[name], *(auto[name] for auto in earlier)} for name in BY_HAND}
        hand = {name: line[name] for name in BY_HAND if line and line[name] not in known[name]}
        name = next((auto["subject"] for auto in earlier if auto["subject"]), "")
        entries.append(Entry(row, found, hand, earlier, name, line.get("pair", "")))
    name_subjects([entry for entry in entries if entry.found])
    return entries


def name_subjects(entries: list[Entry]) -> None:
    """Give every animal one name, also where two were entered under one subject id; names of earlier runs stay."""
    names: dict[str, dict[str, str]] = {}  # subject id: UID: name
    for entry in sorted(entries, key=lambda entry: (not entry.name, entry.order)):
        subject, uid = entry.found["subject"] or entry.row["study"], entry.found["subject_uid"]
        animals = names.setdefault(subject, {})
        if uid not in animals:
            taken = {name for known in names.values() for name in known.values()}
            free = (safe_name(subject) + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
            name = entry.name or next(name for name in free if name not in taken)
            animals[uid] = next(iter(animals.values()), name) if "" in (uid, *animals) else name
        entry.row["subject"] = animals[uid]
    for subject, animals in names.items():
        if len(set(animals.values())) > 1:
            found = ", ".join(sorted(set(animals.values())))
            print(f"subject id {subject!r} was given to several animals (UIDs differ), kept apart: {found}", flush=True)


def write_cohort(path: Path, entries: list[Entry]) -> None:
    """Write the cohort as it holds, and beside it the automatic values, such that no kill can mix up the two."""
    autos = [entry.row | dict.fromkeys(entry.hand, "") for entry in entries]
    write_table(path.with_name(AUTOMATIC), COHORT, autos + [auto for entry in entries for auto in entry.earlier])
    write_table(path, COHORT, [entry.row | entry.hand for entry in entries])
    write_table(path.with_name(AUTOMATIC), COHORT, autos)


# ---------------------------------------------------------------- pairs


def differences(one: dict[str, Any], other: dict[str, Any], cfg: Config) -> list[str]:
    """What keeps two scans from showing the same slices."""
    if one["slices"] != other["slices"]:
        return [f"{one['slices']} slices against {other['slices']}"]
    found = []
    for name, text in (("fov_mm", "field of view"), ("thickness_mm", "thickness"), ("distance_mm", "slice distance")):
        a, b = np.atleast_1d(one[name]), np.atleast_1d(other[name])
        if np.abs(a - b).max() > cfg.tolerance_mm:
            found.append(f"{text} {short(*a)} against {short(*b)} mm")
    cosines = np.einsum("ij,ij->i", one["axes"], other["axes"])
    angle = np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()
    if angle > cfg.tolerance_degrees:
        found.append(f"orientation {angle:.1f} degrees off")
    apart = np.linalg.norm(np.subtract(one["centres_mm"], other["centres_mm"]), axis=1).max()
    if apart > cfg.tolerance_mm:
        found.append(f"slice centres {apart:.2f} mm apart")
    return found


def is_low(one: Entry, other: Entry) -> bool:
    """Whether `one` may be the low scan to `other`: smaller matrix, or the same and fewer averages, or so by hand."""
    a, b = one.found["matrix"], other.found["matrix"]
    if one.hand.get("role") == "high" or other.hand.get("role") == "low":
        return False
    if a != b:
        return all(n % m == 0 for m, n in zip(a, b, strict=True))
    return "role" in one.hand | other.hand or (one.found["averages"] or 0) < (other.found["averages"] or 0)


def gap(one: Entry, other: Entry) -> float:
    """Seconds between two scans, infinite if a date is missing."""
    times = [datetime.fromisoformat(entry.row["date"]) for entry in (one, other) if entry.row["date"]]
    return abs((times[0] - times[1]).total_seconds()) if len(times) == 2 else math.inf


def pair_up(entries: list[Entry], cfg: Config) -> list[tuple[Entry, Entry]]:
    """Low and high scans of each study that show the same slices, nearest in time first; the others get a reason."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        animal = entry.row["study"], entry.found["study_uid"], entry.row["subject"]
        if entry.hand.get("use") == "no":
            entry.row["reason"] = "use is no in the cohort"
        else:
            groups.setdefault(animal, []).append(entry)
    pairs, partner = list[tuple[Entry, Entry]](), dict[int, Entry]()
    for group in groups.values():
        fitting = [
            (gap(low, high), low.order, high.order, low, high)
            for low, high in itertools.permutations(group, 2)
            if is_low(low, high) and not differences(low.found, high.found, cfg)
        ]
        for *_, low, high in sorted(fitting, key=lambda item: item[:3]):
            if id(low) not in partner and id(high) not in partner:
                partner |= {id(low): high, id(high): low}
                pairs.append((low, high))
                low.row["role"], high.row["role"] = "low", "high"
        for entry in group:
            if id(entry) not in partner:
                entry.row |= {"use": "no", "reason": why_alone(entry, group, cfg)}
    return sorted(pairs, key=lambda pair: pair[0].order)


def why_alone(entry: Entry, group: list[Entry], cfg: Config) -> str:
    """Why a scan has no partner: what keeps it from the scan of its study that is most like it."""
    found = []
    for other in group:
        reasons = differences(entry.found, other.found, cfg)
        if not is_low(entry, other) and not is_low(other, entry):
            sizes = (f"{e.row['matrix']} with {e.row['averages']} averages" for e in (entry, other))
            reasons.append(f"neither is the lower one, {' and '.join(sizes)}")
        text = f"scan {other.row['scan']}: {', '.join(reasons) or 'has a partner nearer in time'}"
        found += [(len(reasons), gap(entry, other), text)] if other is not entry else []
    return f"no partner; {min(found)[2]}" if found else "no partner; no other usable scan in its study"


def name_pairs(pairs: list[tuple[Entry, Entry]]) -> dict[str, tuple[Entry, Entry]]:
    """Pairs by key subject/region/plane; a pair keeps the key it had, a further one gets _2, _3 and so on."""
    named: dict[str, tuple[Entry, Entry]] = {}
    for low, high in pairs:
        for name in ("subject", "region", "plane"):
            values = sorted({entry.hand[name] for entry in (low, high) if name in entry.hand}) or [high.row[name]]
            if len(values) > 1:
                where = f"cohort.csv: {low.row['study']}: scans {low.row['scan']} and {high.row['scan']}"
                raise InputError(f"{where}: {name} {' and '.join(values)} found, expected one for the pair")
            low.row[name] = high.row[name] = values[0]
    for low, high in sorted(pairs, key=lambda pair: not pair[0].pair):
        base = "/".join(low.row[name] for name in ("subject", "region", "plane"))
        earlier = [low.pair] if low.pair == high.pair and re.fullmatch(re.escape(base) + r"(_\d+)?", low.pair) else []
        keys = itertools.chain(earlier, [base], (f"{base}_{n}" for n in itertools.count(2)))
        low.row["pair"] = high.row["pair"] = key = next(key for key in keys if key not in named)
        named[key] = (low, high)
    return named


# ---------------------------------------------------------------- import


def judge(low: Scan, high: Scan, threshold: float) -> tuple[dict[str, Any], dict[str, Array]]:
    """Attributes and arrays of a pair; pixels that are no number become 0 and their slice is suggested for dropping."""
    attributes: dict[str, Any] = {}
    arrays, empty = dict[str, Array](), dict[str, Array]()
    for name, scan in (("low", low), ("high", high)):
        finite, black = (np.all(test, axis=(1, 2)) for test in (np.isfinite(scan.image), scan.image == 0))
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


def import_pair(task: Task, cfg: Config) -> tuple[dict[str, Any], str]:
    """Read, judge and write one pair unless the store has it; gives its attributes, or why it cannot be used."""
    key, *places, decisions = task
    store, paths = cfg.root / "data" / "curated.zarr", [cfg.studies / place for place in places]
    parts = ("2dseq", "visu_pars", "../../method", "../../acqp", "../../../subject")
    files = [{part: sha256(file) for part in parts if (file := path.parent / part).is_file()} for path in paths]
    mark = fingerprint(VERSION, task[:3], files, cfg.threshold)
    attributes, arrays = stored(store, key, mark)
    if not attributes:
        try:
            attributes, arrays = judge(read_paravision(paths[0]), read_paravision(paths[1]), cfg.threshold)
        except InputError as error:
            return {}, str(error).replace(f"{cfg.studies}/", "")
        subject, region, plane = re.sub(r"_\d+$", "", key).split("/")
        attributes |= {"subject": subject, "region": region, "plane": plane, "fingerprint": mark}
        for name, place, digests in zip(("low", "high"), places, files, strict=True):
            attributes |= {f"source_{name}": place, f"sha256_{name}": digests["2dseq"]}
    pairs = zip(attributes["quality"]["suggestion"], decisions, strict=True)
    keep = np.array([(decision or suggestion) == "keep" for suggestion, decision in pairs])
    if not np.array_equal(arrays.get("keep", []), keep):
        write_scan(store, key, arrays | {"keep": keep}, attributes)
    return attributes, ""


def read_decisions(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Lines of the slice table where a person decided, by key and slice."""
    rows = read_table(path, SLICES) if path.exists() else []
    for line, row in enumerate(rows, start=2):
        if row["decision"] not in ("keep", "drop", ""):
            raise InputError(f"{path}: line {line}: decision {row['decision']!r} found, expected keep, drop or nothing")
    return {(row["key"], row["slice"]): row for row in rows if row["decision"]}


def run(cfg: Config) -> dict[str, Any]:
    """Index, pair, import what changed, write the tables, declare the store complete."""
    data = cfg.root / "data"
    entries = index(cfg.studies, data / "cohort.csv", cfg.workers)
    usable = [entry for entry in entries if entry.found]
    pairs = name_pairs(pair_up(usable, cfg))
    write_cohort(data / "cohort.csv", entries)
    print(f"{data / 'cohort.csv'}: {len(entries)} scans, {len(usable)} usable, {len(pairs)} pairs", flush=True)
    if not pairs:
        why = "{study}/{scan}: {reason}".format(**usable[0].row)
        raise InputError(f"{cfg.studies}: {len(usable)} usable scans, no pair found, expected low and high; {why}")
    if cfg.only_index:
        return {"scans": len(entries), "usable": len(usable), "pairs": len(pairs)}

    store, decided = data / "curated.zarr", read_decisions(data / "slices.csv")
    tasks: dict[str, Task] = {}
    for key, pair in sorted(pairs.items()):
        low, high = ("{study}/{scan}/pdata/{reco}/2dseq".format(**entry.row) for entry in pair)
        lines = [decided.get((key, str(i)), {}) for i in range(pair[0].found["slices"])]
        tasks[key] = (key, low, high, tuple(line.get("decision", "") for line in lines))
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
        for i, decision in enumerate(tasks[key][3]):
            row = {name: short(quality[name][i]) for name in MEASURES} | {"key": key, "slice": i, "decision": decision}
            rows.append(row | {name: quality[name][i] for name in ("suggestion", "reason")})
    dropped = sum((row["decision"] or row["suggestion"]) == "drop" for row in rows)
    lost = [row for (key, _), row in decided.items() if key not in good]  # no decision is ever forgotten
    write_table(data / "slices.csv", SLICES, rows + lost)
    finish_store(store, good, {"fingerprint": fingerprint([(tasks[key], done[key]["fingerprint"]) for key in good])})
    print(f"{store}: {len(good)} pairs, {len(rows)} slices, {dropped} of them dropped", flush=True)
    counts = {"scans": len(entries), "usable": len(usable), "pairs": len(good), "slices": len(rows)}
    return counts | {"dropped": dropped}


if __name__ == "__main__":
    main(run, PRESETS)
