"""A cohort: every scan below a folder or named by hand, and which fast one and which slow one are a pair.

Apart from 01_curate.py, which imports and judges the pairs: where scans are found, what a person changed and what
makes a pair would make it longer than can be read in one sitting.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from common import InputError, read_table, run_parallel, safe_name, write_table
from formats import describe_source
from paravision import ARCHIVES, number, scan_folders
from quality import MEASURES

COHORT = [
    *("subject", "region", "plane", "role", "study", "scan", "reco", "matrix", "averages", "tr_ms", "te_ms", "fov_mm"),
    *("slices", "thickness_mm", "protocol", "date", "use", "pair", "reason"),
]
SLICES = ["key", "slice", *MEASURES, "suggestion", "reason", "decision"]
AUTOMATIC = ".cohort.automatic.csv"  # the cohort without a person's changes: what differs from it was set by hand
BY_HAND = ("subject", "region", "plane", "role", "use")  # columns of the cohort that a person may change
# Region by the first form found in the names of protocol, scan, study, subject and folder.
REGIONS = {"HT": r"(?<![a-z])ht(?![a-z])|head.?thorax", "TA": r"(?<![a-z])ta(?![a-z])|thorax.?abdomen"}
REGIONS |= {"lego": "lego", "head": "head|brain", "thorax": "thorax|chest", "abdomen": "abdom"}
Place = tuple[str, str]  # study and scan as the cohort names them: unique


@dataclass
class Entry:
    """A scan: its automatic line of the cohort, parameters, what a person set by hand, and earlier automatic lines."""

    row: dict[str, str]
    found: dict[str, Any]
    path: Path  # a scan's folder, or the file or folder that a person named
    hand: dict[str, str]
    earlier: list[dict[str, str]]
    name: str  # of the subject, in an earlier run
    pair: str  # key in an earlier run

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorting by time, then by place."""
        return self.row["date"], self.row["study"], number(self.row["scan"]), self.row["scan"]

    @property
    def named(self) -> bool:
        """Whether a person named its path, so that no study tells which scans belong together."""
        return not self.row["scan"]

    @property
    def label(self) -> str:
        """What a reason calls it."""
        return self.row["study"] if self.named else f"scan {self.row['scan']}"

    @property
    def source(self) -> tuple[str, Path]:
        """What the readers take: its name in the tables, and where it lies."""
        inner = f"pdata/{self.row['reco']}/2dseq"
        if self.named:
            return self.row["study"], self.path / inner if self.row["reco"] else self.path
        return f"{self.row['study']}/{self.row['scan']}/{inner}", self.path / inner


# ---------------------------------------------------------------- index


def short(*values: float | None) -> str:
    """Numbers as in 30x30; nothing for a missing one."""
    return "x".join("" if value is None else f"{value:.6g}" for value in values)


def cohort_row(place: Place, reco: str, found: dict[str, Any], reason: str) -> dict[str, str]:
    """A scan's automatic line of the cohort, before it is paired."""
    study, scan = place
    row = dict.fromkeys(COHORT, "") | {"study": study, "scan": scan, "reco": reco, "reason": reason, "use": "no"}
    if not found:
        return row
    folder = study if scan else Path(study).name  # what lies above a path named by hand says nothing
    names = [
        text.replace("_", " ") for text in (*(found[n] for n in ("protocol", "scan_name", "study", "subject")), folder)
    ]
    tests = itertools.product(names, REGIONS.items())
    row["region"] = next((region for text, (region, form) in tests if re.search(form, text, re.I)), "unknown")
    row |= {name: found[name] for name in ("plane", "protocol", "date")}
    row |= {name: short(found[name]) for name in ("averages", "tr_ms", "te_ms", "slices", "thickness_mm")}
    return row | {name: short(*found[name]) for name in ("matrix", "fov_mm")} | {"use": "yes"}


def read_cohort(path: Path) -> dict[Place, dict[str, str]]:
    """Lines of a cohort table by study and scan; a table written by hand needs no column but the study."""
    table: dict[Place, dict[str, str]] = {}
    rows = read_table(path, COHORT, optional=set(COHORT) - {"study"}) if path.exists() else []
    for line, row in enumerate(rows, start=2):
        names = [name for name in ("subject", "region", "plane") if row[name] and safe_name(row[name]) != row[name]]
        names += ["role"] * (row["role"] not in ("low", "high", "")) + ["use"] * (row["use"] not in ("yes", "no", ""))
        names += ["study"] * (not row["study"])
        if names or (row["study"], row["scan"]) in table:
            found = f"{names[0]} {row[names[0]]!r}" if names else "the scan of an earlier line"
            wanted = "low or high, yes or no, names of letters, digits, dots, - and _, one line a scan"
            raise InputError(f"{path}: line {line}: {found} found, expected {wanted}")
        table[row["study"], row["scan"]] = row
    return table


def index(raw: Path, unpacked: Path, refused: dict[str, str], cohort: Path, workers: int) -> list[Entry]:
    """Every scan below raw, in its archives or named in the cohort, with what a person changed there.

    `unpacked` holds the archives of raw that could be read, `refused` the reasons of the others.
    """
    table, automatic = read_cohort(cohort), cohort.with_name(AUTOMATIC)
    proposed = read_table(automatic, COHORT) if automatic.exists() else []
    by_hand = [study for study, scan in table if not scan and not study.lower().endswith(ARCHIVES)]
    places: dict[Place, Path] = {(study, ""): raw / study for study in by_hand}
    for top in [raw] * (raw.is_dir() or not by_hand) + [unpacked] * unpacked.is_dir():
        places |= {(str(scan.parent.relative_to(top)), scan.name): scan for scan in scan_folders(top)}
    lost = tuple(f"{archive}/" for archive in refused)  # scans of an archive that cannot be read any more
    gone = [place for place in table if not (place in places and os.path.exists(places[place]))]
    gone = [place for place in gone if not f"{place[0]}/".startswith(lost)]
    if gone := [place for place in gone if place[1] or place[0] in by_hand]:  # the others are archives, now or before
        what = "no scan" if gone[0][1] else "no file or folder"
        raise InputError(f"{cohort}: {raw.joinpath(*gone[0])} is {what}, expected one or no such line")
    paths = list(places.values())
    results = dict(run_parallel(describe_source, paths, workers if len(paths) > 100 else 1))
    results |= {raw / archive: ("", {}, reason) for archive, reason in refused.items()}
    places |= {(archive, ""): raw / archive for archive in refused}
    if not any(found for _, found, _ in results.values()):
        why = "".join(f", the first: {reason}" for _, _, reason in list(results.values())[:1])
        raise InputError(f"{raw}: {len(results)} scans found, none usable{why}; expected studies with RARE scans")
    entries = []
    for place in sorted(places, key=lambda place: (Path(place[0]), number(place[1]), place[1])):
        reco, found, reason = results[places[place]]
        row, line = cohort_row(place, reco, found, reason), table.get(place, {})
        earlier = [auto for auto in proposed if (auto["study"], auto["scan"]) == place]
        known = {name: {"", row[name], *(auto[name] for auto in earlier)} for name in BY_HAND}
        hand = {name: line[name] for name in BY_HAND if line and line[name] not in known[name]}
        name = next((auto["subject"] for auto in earlier if auto["subject"]), "")
        entries.append(Entry(row, found, places[place], hand, earlier, name, line.get("pair", "")))
    leave_out_copies(entries, unpacked)
    name_subjects([entry for entry in entries if entry.found])
    return entries


def leave_out_copies(entries: list[Entry], unpacked: Path) -> None:
    """Use a scan once where a study and an archive of it lie side by side."""
    usable = [entry for entry in entries if entry.found and not entry.named and entry.found["study_uid"]]
    usable.sort(key=lambda entry: unpacked in entry.path.parents)
    first: dict[tuple[str, ...], Entry] = {}
    for entry in usable:
        mark = entry.found["study_uid"], entry.row["scan"], entry.row["reco"], entry.row["date"]
        if first.setdefault(mark, entry) is not entry and unpacked in entry.path.parents:
            entry.row |= {"use": "no", "reason": f"the same as {first[mark].row['study']}/{entry.row['scan']}"}
            entry.found = {}


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


@dataclass(frozen=True)
class Tolerance:
    """What two scans of the same slices may differ by."""

    mm: float
    degrees: float


def differences(one: dict[str, Any], other: dict[str, Any], within: Tolerance) -> list[str]:
    """What keeps two scans from showing the same slices."""
    if one["slices"] != other["slices"]:
        return [f"{one['slices']} slices against {other['slices']}"]
    found = []
    for name, text in (("fov_mm", "field of view"), ("thickness_mm", "thickness"), ("distance_mm", "slice distance")):
        if one[name] is None or other[name] is None:
            continue  # NIfTI does not say how thick a slice is
        a, b = np.atleast_1d(one[name]), np.atleast_1d(other[name])
        if np.abs(a - b).max() > within.mm:
            found.append(f"{text} {short(*a)} against {short(*b)} mm")
    cosines = np.einsum("ij,ij->i", one["axes"], other["axes"])
    angle = np.degrees(np.arccos(np.clip(cosines, -1, 1))).max()
    if angle > within.degrees:
        found.append(f"orientation {angle:.1f} degrees off")
    apart = np.linalg.norm(np.subtract(one["centres_mm"], other["centres_mm"]), axis=1).max()
    if "paravision" not in one:  # other programs let the edges of both grids agree, not their pixels n / 2
        middles = [
            np.subtract(f["centres_mm"], np.divide(f["fov_mm"], f["matrix"]) / 2 @ f["axes"][:2]) for f in (one, other)
        ]
        apart = min(apart, np.linalg.norm(middles[0] - middles[1], axis=1).max())
    if apart > within.mm:
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


def obstacles(one: Entry, other: Entry, within: Tolerance) -> list[str]:
    """What keeps two scans from being a pair."""
    found = differences(one.found, other.found, within)
    for name in ("region", "plane") if one.named else ():  # a person tells sessions apart by these
        values = [entry.hand.get(name, "") for entry in (one, other)]
        found += [f"{name} {values[0]} against {values[1]}"] if all(values) and values[0] != values[1] else []
    if not is_low(one, other) and not is_low(other, one):
        sizes = (
            f"{e.row['matrix']}" + f" with {e.row['averages']} averages" * bool(e.row["averages"]) for e in (one, other)
        )
        found.append(f"neither is the lower one, {' and '.join(sizes)}")
    return found


def gap(one: Entry, other: Entry) -> float:
    """Seconds between two scans, infinite if a date is missing."""
    times = [datetime.fromisoformat(entry.row["date"]) for entry in (one, other) if entry.row["date"]]
    return abs((times[0] - times[1]).total_seconds()) if len(times) == 2 else math.inf


def groups_of(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Scans that may be partners: of one study and animal; scans named by hand if their subject is the same."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        if entry.hand.get("use") == "no":
            entry.row["reason"] = "use is no in the cohort"
            continue
        own = ("", "", entry.hand.get("subject", entry.row["subject"]))
        animal = own if entry.named else (entry.row["study"], entry.found["study_uid"], entry.row["subject"])
        groups.setdefault(animal, []).append(entry)
    return list(groups.values())


def pair_up(entries: list[Entry], within: Tolerance) -> list[tuple[Entry, Entry]]:
    """Low and high scans of each group that show the same slices, nearest in time first; the others get a reason."""
    pairs = list[tuple[Entry, Entry]]()
    for group in groups_of(entries):
        partner: dict[int, Entry] = {}
        fitting = [
            (gap(low, high), low.order, high.order, low, high)
            for low, high in itertools.permutations(group, 2)
            if is_low(low, high) and not obstacles(low, high, within)
        ]
        # Without a study and without dates nothing but a person tells which of several is the partner.
        open_ = Counter(id(e) for item in fitting if math.isinf(item[0]) and item[3].named for e in item[3:])
        fitting = [item for item in fitting if max(open_[id(e)] for e in item[3:]) < 2]
        for *_, low, high in sorted(fitting, key=lambda item: item[:3]):
            if id(low) not in partner and id(high) not in partner:
                partner |= {id(low): high, id(high): low}
                pairs.append((low, high))
                low.row["role"], high.row["role"] = "low", "high"
        for entry in group:
            if id(entry) not in partner:
                entry.row |= {"use": "no", "reason": why_alone(entry, group, within)}
    return sorted(pairs, key=lambda pair: pair[0].order)


def why_alone(entry: Entry, group: list[Entry], within: Tolerance) -> str:
    """Why a scan has no partner: what keeps it from the scan of its group that is most like it."""
    found = []
    for other in (other for other in group if other is not entry):
        reasons, apart = obstacles(entry, other, within), gap(entry, other)
        rest = "has a partner nearer in time"
        if entry.named and math.isinf(apart):
            rest = "one of them fits several scans, tell them apart by subject or region"
        found.append((len(reasons), apart, f"{other.label}: {', '.join(reasons) or rest}"))
    where = f"named for subject {entry.hand.get('subject', entry.row['subject'])}" if entry.named else "in its study"
    return f"no partner; {min(found)[2]}" if found else f"no partner; no other usable scan {where}"


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


# ---------------------------------------------------------------- slices


def read_slices(path: Path) -> list[dict[str, str]]:
    """Lines of the slice table, those of an earlier version too; none if there is no such table yet."""
    rows = read_table(path, SLICES, optional=MEASURES) if path.exists() else []
    for line, row in enumerate(rows, start=2):
        if row["decision"] not in ("keep", "drop", ""):
            raise InputError(f"{path}: line {line}: decision {row['decision']!r} found, expected keep, drop or nothing")
    return rows


def is_kept(row: Mapping[str, Any]) -> bool:
    """Whether a slice is used: a person's decision, else the suggestion."""
    return bool((row["decision"] or row["suggestion"]) == "keep")


def rename_slices(path: Path, names: dict[str, str]) -> None:
    """Let the lines of a pair that has another key now, as its animal or region was put right, go with it."""
    if all(old in ("", new) for old, new in names.items()) or not (rows := read_slices(path)):
        return
    taken = set(names.values())
    left = [row for row in rows if row["key"] in names or row["key"] not in taken]
    write_table(path, SLICES, [row | {"key": names.get(row["key"], row["key"])} for row in left])
