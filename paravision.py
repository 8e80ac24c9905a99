"""Reader of ParaVision scans, for the stages that take data from a scanner."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import shutil
import warnings
import zipfile
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from common import Array, InputError, atomic_path

ARCHIVES = (".zip", ".pvdatasets")  # ParaVision's own archives are zip files too
READ = ("2dseq", "visu_pars", "method", "acqp", "subject")  # files that the reader needs


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan as it was reconstructed.

    `image` (slice, y, x) is float32 in scaled units; `affine` (4x4) maps voxel index (x, y, slice) to mm of voxel
    centres, RAS; `spacing_mm` (slice, y, x) is the distance of voxel centres, for slices not their thickness;
    `parameters` is plain data that says what the scan is, never the name of a subject.
    """

    image: Array
    affine: Array
    spacing_mm: tuple[float, float, float]
    parameters: dict[str, Any]


class _Folder:
    """A path in the form brukerapi takes for archives, so that Latin-1 text can be read too (it knows UTF-8 only)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Any:
        return _Folder(self.path.parent) if name == "parent" else getattr(self.path, name)

    def __truediv__(self, name: str) -> _Folder:
        return _Folder(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def open(self, mode: str = "r", encoding: str = "utf-8") -> io.BytesIO | io.StringIO:
        data = self.path.read_bytes()
        if "b" in mode:
            return io.BytesIO(data)
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        if "##END=" not in text:
            raise InputError(f"{self.path}: no ##END= found, expected a whole parameter file; it is cut off or damaged")
        if re.search(r"@\d{6,}\*\(|@\d+\*\([^()]*@", text):  # a few bytes must not unpack into all memory
            raise InputError(f"{self.path}: run-length array nested or above 99999 values, expected a shorter one")
        return io.StringIO(text, newline=None)


class _Parameters:
    """The parameter files of a reconstruction; an odd value ends in an InputError that names it."""

    def __init__(self, path: Path) -> None:
        from brukerapi.dataset import LOAD_STAGES, Dataset

        self.visu = path.with_name("visu_pars")
        for file, why in ((path, "was the scan never run?"), (self.visu, "was the scan aborted?")):
            if not file.is_file() or not file.stat().st_size:
                raise InputError(f"{file}: {'empty' if file.is_file() else 'no such'} file, expected an image; {why}")
        stage = LOAD_STAGES["parameters"]
        self.files = Dataset(_Folder(path), load=stage, optional_parameter_files=[], scale=False)
        for name in ("method", "acqp", "subject"):
            with contextlib.suppress(FileNotFoundError):
                self.files.add_parameter_file(name)

    def get(self, *names: str) -> Any:
        """The first of `names` that has a value, else None."""
        found = (self.files[name] for name in names if name in self.files)
        return next((parameter.value for parameter in found if parameter.val_str.strip()), None)

    def text(self, *names: str) -> str:
        """The distinct values as one text."""
        return " ".join(dict.fromkeys(str(v) for v in np.ravel(self.get(*names)) if v is not None)).strip()

    def number(self, *names: str) -> float | None:
        """The value, or the first of an array of numbers."""
        value = np.ravel(self.get(*names))
        return float(value[0]) if value.dtype.kind in "iuf" and value.size else None

    def array(self, name: str, *shape: int) -> Array:
        """Finite numbers of this shape; where all frames share a value it may be written once."""
        value, one = np.asarray(self.get(name)), math.prod(shape[1:])
        if value.dtype.kind not in "iuf" or value.size not in (one, one * shape[0]) or not np.isfinite(value).all():
            self.demand(name, f"{value.size} of {self.text(name)}", f"{'x'.join(map(str, shape))} numbers")
        return np.broadcast_to(value.astype(np.float64).reshape(-1, *shape[1:]), shape)

    def demand(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            raise InputError(f"{self.visu}: {name}: {found[:60] or 'nothing'} found, expected {expected}")


def number(name: str) -> float:
    """The number of a scan or reconstruction from its folder's name; infinity, to come last, if it is none."""
    return float(name) if name.isdecimal() else math.inf


def scan_folders(raw: Path) -> list[Path]:
    """Every folder below raw that holds pdata, sorted by study and scan number; links are followed once.

    Hidden folders are not entered: they hold snapshots of the file system and what was thrown away.
    """
    if not raw.is_dir():
        raise InputError(f"{raw}: no such folder, expected ParaVision studies")
    scans, seen = [], set()
    for folder, names, _ in os.walk(raw, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "pdata" in names and os.path.realpath(folder) not in seen:
            scans.append(Path(folder))
        if "pdata" in names or os.path.realpath(folder) in seen:
            names.clear()
        seen.add(os.path.realpath(folder))
    return sorted(scans, key=lambda scan: (scan.parent, number(scan.name), scan.name))


def find_archives(raw: Path) -> list[str]:
    """Every zip archive below raw that is not inside of a scan, relative to it."""
    found = []
    for folder, names, files in os.walk(raw):
        names[:] = sorted(name for name in names if not name.startswith(".") and "pdata" not in names)
        archives = (file for file in files if file.lower().endswith(ARCHIVES) and not file.startswith("."))
        found += [str((Path(folder) / file).relative_to(raw)) for file in archives]
    return sorted(found)


def unpack(archive: Path, folder: Path) -> None:
    """Write what the reader needs of the ParaVision scans in a zip archive to a new folder.

    Raises
    ------
    InputError
        If the archive is damaged, encrypted, too large for the disk, names a place outside of the folder, or holds
        no scan.
    """
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
    try:
        with zipfile.ZipFile(archive) as packed, atomic_path(folder) as partial:
            _unpack(packed, partial)
    except InputError as error:
        raise InputError(f"{archive}: {error}") from None
    except OSError as error:
        if error.errno in full:
            raise
        raise InputError(f"{archive}: {error.strerror or error}, expected a whole zip archive") from None
    except Exception as error:  # whatever the parser meets in a damaged archive is a fault of it
        reason = " ".join(f"{type(error).__name__} {error}".split())[:150]
        raise InputError(f"{archive}: {reason}, expected a whole zip archive") from None


def _unpack(packed: zipfile.ZipFile, folder: Path) -> None:
    folder.mkdir()
    names = {item: PurePosixPath(item.filename) for item in packed.infolist()}
    scans = {item: name for item, name in names.items() if "pdata" in name.parts or name.name in READ}
    scans = {item: name for item, name in scans.items() if name.parts[0] != "__MACOSX"}  # what a Mac adds
    if not any("pdata" in name.parts for name in scans.values()):
        raise InputError("no scan found, expected an archive of ParaVision studies")
    if odd := [name for name in scans.values() if name.is_absolute() or ".." in name.parts]:
        raise InputError(f"file {str(odd[0])!r} outside of the archive found, expected relative names")
    wanted = {item: name for item, name in scans.items() if name.name in READ and not item.is_dir()}
    if any(item.flag_bits & 1 for item in wanted):
        raise InputError("encrypted files found, expected an archive without a password")
    size, free = sum(item.file_size for item in wanted), shutil.disk_usage(folder).free
    if size > 0.9 * free:  # the sizes are those of the archive's directory, and no more is ever read
        raise InputError(f"{size / 1e9:.1f} GB unpacked found, expected less than what is free, {free / 1e9:.1f} GB")
    for item, name in scans.items():
        place = folder / name
        (place if item.is_dir() else place.parent).mkdir(parents=True, exist_ok=True)
        if item in wanted:
            with packed.open(item) as source, place.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def recos_of(scan: Path) -> list[Path]:
    """Folders of a scan's reconstructions, the lowest first."""
    return sorted((path for path in (scan / "pdata").iterdir() if path.is_dir()), key=lambda p: (number(p.name), p))


def index_scan(scan: Path) -> tuple[str, dict[str, Any], str]:
    """Number and parameters of the lowest reconstruction that counts; or why the lowest does not."""
    recos, reasons = recos_of(scan), []
    for reco in recos:
        try:
            return reco.name, read_paravision(reco / "2dseq", pixels=False).parameters, ""
        except InputError as error:
            reasons.append(str(error).replace(f"{scan}/", ""))
    return (recos[0].name, {}, reasons[0]) if recos else ("", {}, "pdata: empty folder, expected a reconstruction")


def read_paravision(path: Path, pixels: bool = True) -> Scan:
    """Read a reconstruction ``<study>/<scan>/pdata/<reco>/2dseq`` of a 2-D RARE scan (ParaVision 5.1 to 360).

    With ``pixels=False`` everything is checked but no pixel is read; the image is then zeros that take no memory.
    Slice `i` is the one at ``VisuCorePosition[i]``, also where the disk holds the slices in reverse.

    Raises
    ------
    InputError
        If a file is missing, cut off or damaged, or if the scan is not one stack of magnitude images of a RARE
        sequence with one frame per slice.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # brukerapi warns where it guesses
            return _read_2dseq(path, _Parameters(path), pixels)
    except InputError:
        raise
    except Exception as error:  # whatever a parser meets in a damaged file is a fault of that file
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise InputError(f"{path}: {reason}, expected a ParaVision reconstruction") from None


def _read_2dseq(path: Path, data: _Parameters, pixels: bool) -> Scan:
    sequence, frames = data.text("Method", "VisuAcqSequenceName"), int(data.number("VisuCoreFrameCount") or 0)
    data.demand("sequence", sequence, sequence if "RARE" in sequence.upper() else "RARE")
    for name, expected in (("Dim", "2"), ("DimDesc", "spatial"), ("Units", "mm"), ("FrameType", "MAGNITUDE_IMAGE")):
        data.demand(f"VisuCore{name}", data.text(f"VisuCore{name}"), expected)
    groups = (
        data.files["VisuFGOrderDesc"].nested if data.get("VisuFGOrderDesc") else [[1, "FG_SLICE"]]
    )  # one slice: no group
    data.demand("frame groups", " ".join(f"{size} {name}" for size, name, *_ in groups), f"{frames} FG_SLICE")
    packages = data.get("VisuCoreSlicePacksDef")  # ParaVision 5 does not write it
    data.demand("slice packages", "1" if packages is None else str(np.ravel(packages)[-1]), "1")
    nx, ny = data.array("VisuCoreSize", 2).astype(int).tolist()
    word = data.text("VisuCoreWordType")
    width = {"_8BIT_UNSGN_INT": 1, "_16BIT_SGN_INT": 2, "_32BIT_SGN_INT": 4, "_32BIT_FLOAT": 4}.get(word, 0)
    found, wanted = path.stat().st_size, frames * ny * nx * width
    if found != wanted or min(frames, nx, ny) < 1:
        raise InputError(f"{path}: {found} bytes found, expected {wanted} ({frames} x {ny} x {nx} of {word})")
    affine, spacing = _place(data, frames, (nx, ny))
    slope, offset = (data.array(f"VisuCoreData{name}", frames)[:, None, None] for name in ("Slope", "Offs"))
    image = np.broadcast_to(np.float32(0), (frames, ny, nx))
    if pixels:
        data.files.load_properties()
        data.files.load_schema()
        data.files.load_data()  # raw: where the disk holds the slices in reverse, brukerapi would mix up their slopes
        raw = np.asarray(data.files.data).reshape(nx, ny, frames, order="F").transpose(2, 1, 0)
        image = (raw * slope + offset).astype(np.float32)
    return Scan(image, affine, spacing, _describe(data, affine, image.shape))


def _place(data: _Parameters, frames: int, size: tuple[int, int]) -> tuple[Array, tuple[float, float, float]]:
    """Affine (RAS) and distances (slice, y, x) of voxel centres in mm."""
    axes, position = data.array("VisuCoreOrientation", frames, 3, 3), data.array("VisuCorePosition", frames, 3)
    rows, extent = axes[0], data.array("VisuCoreExtent", 2)  # rows: directions of x, y and the normal in LPS
    if np.abs(axes - rows).max() > 1e-3 or np.abs(rows @ rows.T - np.eye(3)).max() > 1e-3 or extent.min() <= 0:
        data.demand("VisuCoreOrientation", "no single orientation", "one slice package")
    distance = data.number("VisuCoreSlicePacksSliceDist", "PVM_SPackArrSliceDistance", "VisuCoreFrameThickness")
    # A stack may run against its normal (coronal), so the step comes from the positions.
    steps = np.diff(position, axis=0) if frames > 1 else rows[2:] * (distance or 1.0)
    step = steps.mean(axis=0)
    if np.abs(steps - step).max() > 0.01 or np.linalg.norm(step) < 0.01:
        data.demand("VisuCorePosition", "slices at uneven or no distances", "an even stack")
    affine = np.eye(4)
    affine[:3] = np.column_stack([rows[0] * extent[0] / size[0], rows[1] * extent[1] / size[1], step, position[0]])
    affine[:2] *= -1  # LPS to RAS
    z, y, x = np.linalg.norm(affine[:3, 2::-1], axis=0).tolist()
    return affine, (z, y, x)


def place_of(affine: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    """Geometry of a stack (slice, y, x) as plain data.

    Returns
    -------
    dict
        `matrix` and `fov_mm` [x, y], `slices`, `distance_mm`, `plane` (nearest), `axes` (directions of x, y and the
        step from slice to slice, RAS) and `centres_mm` of each slice's field of view, where pixel n / 2 lies.
    """
    frames, ny, nx = shape
    size = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / size
    centres = affine[:3, 3] + affine[:3, :2] @ (nx / 2, ny / 2) + np.arange(frames)[:, None] * affine[:3, 2]
    return {
        "matrix": [nx, ny],
        "fov_mm": [float(size[0] * nx), float(size[1] * ny)],
        "slices": frames,
        "distance_mm": float(size[2]),
        "plane": ("sagittal", "coronal", "axial")[int(np.abs(np.cross(axes[:, 0], axes[:, 1])).argmax())],
        "axes": axes.T.tolist(),
        "centres_mm": centres.tolist(),
    }


def _describe(data: _Parameters, affine: Array, shape: tuple[int, ...]) -> dict[str, Any]:
    """What the scan is."""
    geometry = place_of(affine, shape)
    axes = np.transpose(geometry["axes"])
    main = np.abs(axes).argmax(axis=0)  # the patient's axis (0 left-right, 1 front-back, 2 head-foot) nearest to each
    read = {"L": 0, "A": 1, "H": 2}.get(data.text("PVM_SPackArrReadOrient")[:1], -1)
    across = read == main[1] or (read != main[0] and data.text("VisuAcqImagePhaseEncDir") == "row_dir")
    date = " ".join(data.text("VisuAcqDate", "VisuCreationDate", "VisuStudyDate").split())
    try:
        clock = re.match(r"\d+:", date)  # ParaVision 5 writes 16:10:12 4 May 2016, later ones ISO with a decimal comma
        when = datetime.strptime(date, "%H:%M:%S %d %b %Y") if clock else datetime.fromisoformat(date)
        date = when.replace(tzinfo=None).isoformat(timespec="seconds")
    except ValueError:
        date = ""
    return geometry | {
        "subject": data.text("VisuSubjectId", "SUBJECT_id"),
        "subject_uid": data.text("VisuSubjectUid", "SUBJECT_instance_uid", "SUBJECT_patient_instance_uid"),
        "study": data.text("VisuStudyId", "SUBJECT_study_name"),
        "study_uid": data.text("VisuStudyUid", "SUBJECT_study_instance_uid"),
        "scan_name": data.text("ACQ_scan_name", "VisuSeriesComment"),
        "protocol": data.text("VisuAcquisitionProtocol", "ACQ_protocol_name"),
        "sequence": data.text("Method", "VisuAcqSequenceName"),
        "averages": data.number("PVM_NAverages", "VisuAcqNumberOfAverages"),
        "tr_ms": data.number("PVM_RepetitionTime", "VisuAcqRepetitionTime"),
        "te_ms": data.number("EffectiveTE", "VisuAcqEchoTime"),
        "rare_factor": data.number("PVM_RareFactor", "VisuAcqEchoTrainLength"),
        "acquired_matrix": np.ravel(data.get("PVM_EncMatrix", "VisuAcqSize")).tolist(),
        "fov_mm": data.array("VisuCoreExtent", 2).tolist(),
        "thickness_mm": float(data.array("VisuCoreFrameThickness", shape[0])[0]),
        "phase_axis": "x" if across else "y",
        "date": date,
        "paravision": data.text("VisuCreatorVersion", "VisuAcqSoftwareVersion", "ACQ_sw_version"),
        "subject_position": data.text("VisuSubjectPosition"),
    }
