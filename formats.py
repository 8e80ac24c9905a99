"""Scans of any format: found, read and written with their place in the scanner and without their subject's name."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from common import Array, InputError, Lazy, atomic_path, fingerprint, safe_name, sha256
from paravision import Scan, index_scan, place_of, read_paravision, recos_of, scan_folders

nibabel: Any = Lazy("nibabel")
pydicom: Any = Lazy("pydicom")

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes from NIfTI's, and back
GROUPS = {"ImagePositionPatient": "PlanePosition", "ImageOrientationPatient": "PlaneOrientation"}
GROUPS |= dict.fromkeys(("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"), "PixelMeasures")
GROUPS |= dict.fromkeys(("RescaleSlope", "RescaleIntercept"), "PixelValueTransformation")
NOT_MAGNITUDE = {"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"}  # in ImageType, or the complex component
MOST = 2**29  # voxels of a scan; a few bytes of a damaged header must not fill the memory


def public_id(subject: str, names: Iterable[str]) -> str:
    """A subject's id as outputs may carry it: a digest where the id holds a part of one of the subject's names."""
    parts = {part for name in names for part in re.split(r"[\W_]+", name.casefold()) if len(part) > 2}
    if any(part in subject.casefold() for part in parts):
        return f"subject-{hashlib.sha256(subject.encode()).hexdigest()[:6]}"
    return safe_name(subject)


@contextlib.contextmanager
def _faults_of(path: Path, expected: str) -> Iterator[None]:
    """Whatever a parser meets in a damaged file is a fault of that file, and what it warns of is no news."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)  # numbers too large for what they become
            yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).replace(str(path), path.name).split())[:150] or type(error).__name__
        raise InputError(f"{path}: {reason}, expected {expected}") from None
    finally:
        logger.setLevel(level)


def as_scan(image: Array, affine: Array, parameters: dict[str, Any]) -> Scan:
    """A scan whose geometry follows from its affine; what its format does not say of it is None or empty."""
    z, y, x = np.linalg.norm(affine[:3, 2::-1], axis=0).tolist()
    unknown: dict[str, Any] = dict.fromkeys(("averages", "tr_ms", "te_ms", "thickness_mm"))
    unknown |= dict.fromkeys(("subject_uid", "study", "study_uid", "scan_name", "protocol", "sequence", "date"), "")
    known = unknown | {"phase_axis": "y"} | place_of(affine, image.shape) | parameters
    return Scan(np.ascontiguousarray(image, np.float32), affine, (z, y, x), known)


def read_source(path: Path) -> Scan:
    """Read a 2dseq of ParaVision, a NIfTI file, or a DICOM series (its folder, or one file that holds it all)."""
    if path.name == "2dseq":
        return read_paravision(path)
    return read_nifti(path) if path.name.lower().endswith((".nii", ".nii.gz")) else read_dicom(path)


def describe_source(path: Path) -> tuple[str, dict[str, Any], str]:
    """Number of the reconstruction (ParaVision only) and parameters of a scan; or why it cannot be used."""
    if (path / "pdata").is_dir():
        return index_scan(path)
    try:
        found = read_source(path).parameters
        if not found.get("placed", True):
            raise InputError("no sform and no qform found, expected the place of the scan in the scanner")
        return "", found, ""
    except InputError as error:
        return "", {}, str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")


def lowest_reco(scan: Path, matrices: Sequence[Sequence[int]] = ()) -> Path:
    """The 2dseq of the lowest reconstruction of a scan that `read_paravision` accepts.

    Raises
    ------
    InputError
        If there is none, or its matrix (y, x) is not among `matrices`; none given: any will do.
    """
    reasons = []
    for reco in recos_of(scan):
        try:
            _, ny, nx = read_paravision(reco / "2dseq", pixels=False).image.shape
        except InputError as error:
            reasons.append(error)
            continue
        if matrices and [ny, nx] not in [list(matrix) for matrix in matrices]:
            sizes = ", ".join(f"{x}x{y}" for y, x in matrices)
            raise InputError(
                f"{reco}: matrix {nx}x{ny} found, expected {sizes} as in training; --all takes every matrix"
            )
        return reco / "2dseq"
    raise reasons[0] if reasons else InputError(f"{scan / 'pdata'}: no reconstruction found, expected one")


def check_input(path: Path) -> None:
    """Raise InputError if a path cannot be what `find_scans` takes."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder, expected a scan")
    if path.is_file() and path.name != "2dseq" and not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: unknown kind of file, expected 2dseq, .nii, .nii.gz or a folder of DICOM files")


def find_scans(path: Path, matrices: Sequence[Sequence[int]] = ()) -> list[Path]:
    """Everything in `path` that `read_scan` may take; `matrices` (y, x) pick among the scans of a study or tree.

    Raises
    ------
    InputError
        If the path is a study or tree without a scan to take.
    """
    if path.is_file():
        return [path]
    if (path / "2dseq").is_file():
        return [path / "2dseq"]
    path = path.parent if path.name == "pdata" else path
    if (path / "pdata").is_dir():
        return [lowest_reco(path)]
    found, reasons = [], []
    for scan in scan_folders(path):
        try:
            found.append(lowest_reco(scan, matrices))
        except InputError as error:
            reasons.append(str(error))
            print(f"left out: {error}", flush=True)
    if reasons and not found:
        raise InputError(f"{path}: none of {len(reasons)} scans can be taken, expected one; the first: {reasons[0]}")
    return found or [path]


def refuse_inside(folder: Path, path: Path) -> None:
    """Raise InputError if a folder of outputs lies inside the study, or the folder of DICOM files, of an input."""
    path, folder = path.resolve(), folder.resolve()
    guarded = study_of(path) if path.name == "2dseq" else path
    if (path.is_dir() or path.name == "2dseq") and (folder == guarded or guarded in folder.parents):
        raise InputError(f"{folder}: output inside the input {guarded} found, expected another --out")


def study_of(path: Path) -> Path:
    """The study that a 2dseq belongs to; the folder it lies in where that is none of ParaVision's."""
    return path.parents[3] if path.parent.parent.name == "pdata" and len(path.parents) > 3 else path.parent


def header_names(path: Path) -> list[str]:
    """Names of the subject in the headers of a reconstruction of ParaVision."""
    found: list[str] = []
    for file in (study_of(path) / "subject", path.with_name("visu_pars")):
        text = file.read_text("latin-1") if file.is_file() else ""
        for value in re.findall(r"##\$(?:SUBJECT_name\w*|VisuSubjectName)=([^#$]*)", text):
            found += re.findall(r"<([^>]*)>", value)
    return found


def read_scan(path: Path) -> tuple[Scan, str, str]:
    """Read a scan of any format.

    Parameters
    ----------
    path : Path
        A 2dseq of ParaVision, a NIfTI file, or the folder of a DICOM series.

    Returns
    -------
    scan, name, digest : Scan, str, str
        `parameters` hold the `subject`'s id and no name; `name` tells the scan from all others, for files made of it;
        `digest` is that of its content.

    Raises
    ------
    InputError
        If the reader refuses the scan, or it holds no image.
    """
    if path.is_dir():
        scan, digest = read_source(path), sha256(path)
        name = f"{scan.parameters['subject']}_series{scan.parameters['series']}"
    elif path.name == "2dseq":
        path = path.resolve()
        scan, digest = read_source(path), fingerprint(sha256(path), sha256(path.with_name("visu_pars")))
        subject = public_id(scan.parameters["subject"] or "unnamed", header_names(path))
        scan.parameters["subject"] = subject
        name = f"{subject}_scan{safe_name(path.parents[2].name)}" if study_of(path) != path.parent else subject
        name += f"_reco{safe_name(path.parent.name)}"
    else:
        scan, digest = read_source(path), sha256(path)
        name = scan.parameters["subject"]
    if not np.isfinite(scan.image).all() or not scan.image.any():
        fault = "only zeros" if np.isfinite(scan.image).all() else "NaN or infinity"
        raise InputError(f"{path}: {fault} found, expected an image")
    return scan, f"{name}_{digest[:6]}", digest


def read_nifti(path: Path) -> Scan:
    """Read a volume: x and y are its first two axes, slices the third.

    Returns
    -------
    Scan
        `parameters` hold `subject` (the file's name), `space` (NIfTI's code of the coordinates) and `placed` (whether
        the file says where the scan lies).

    Raises
    ------
    InputError
        If the file is missing or damaged or is not one volume of real numbers.
    """
    with _faults_of(path, "a NIfTI volume"):
        found = nibabel.load(path)
        if math.prod(found.shape) > MOST:
            raise ValueError(f"{found.shape} voxels")
        with nibabel.openers.Opener(path) as stream:  # as it is in the file: nibabel mends a size of 0 to 1 mm
            header = type(found.header).from_fileobj(stream, check=False)
            end = int(header["vox_offset"]) + math.prod(found.shape) * header.get_data_dtype().itemsize
            stream.seek(end)
            if stream.read(1):
                raise ValueError(f"more than {found.shape} voxels")
        if not (header["pixdim"][1:4] > 0).all():
            raise ValueError(f"voxels of {' x '.join(f'{size:g}' for size in header['pixdim'][1:4])}")
        unit = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}[found.header.get_xyzt_units()[0]]
        data = np.asanyarray(found.dataobj)
        data = data.reshape(data.shape[:3]) if data.ndim > 3 and data.size == math.prod(data.shape[:3]) else data
        if data.ndim != 3 or data.dtype.kind not in "iuf" or not data.size:
            raise InputError(f"{path}: {data.dtype} of shape {data.shape} found, expected real numbers (x, y, slice)")
        affine = np.diag([unit, unit, unit, 1.0]) @ found.affine
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise InputError(f"{path}: affine without volume found, expected voxels of some size")
        space = max(int(found.header["sform_code"]), int(found.header["qform_code"]))
        parameters = {"subject": safe_name(path.name.removesuffix(".gz").removesuffix(".nii")), "space": max(space, 1)}
        parameters |= {"placed": space > 0, "phase_axis": "x" if found.header.get_dim_info()[1] == 0 else "y"}
        return as_scan(data.transpose(2, 1, 0), affine, parameters)


def write_nifti(path: Path, image: Array, affine: Array, space: int = 1, description: str = "") -> None:
    """Write a volume (slice, y, x) as compressed NIfTI, beside its place, then rename.

    The header is new, so that nothing goes with it that the input's may hold.
    """
    volume = nibabel.Nifti1Image(np.asarray(image, np.float32).transpose(2, 1, 0), affine)
    volume.set_sform(affine, space)
    volume.set_qform(affine, space, strip_shears=True)
    volume.header.set_xyzt_units("mm")
    volume.header["descrip"] = description[:79].encode()
    with atomic_path(path) as partial:
        partial.write_bytes(gzip.compress(volume.to_bytes(), 1, mtime=0))


def _frames(data: Any) -> Iterator[dict[str, Any]]:
    """Place and pixels of every frame of a DICOM file, classic or enhanced."""
    groups = data.get("PerFrameFunctionalGroupsSequence") or [None]
    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
    if data.get("SamplesPerPixel", 1) != 1 or data.get("NumberOfFrames", 1) not in (None, len(groups)):
        raise ValueError("colour or frames without a place found")
    if len(groups) * data.Rows * data.Columns > MOST:
        raise ValueError(f"{len(groups)} frames of {data.Columns} x {data.Rows} found")
    pixels = data.pixel_array.reshape(len(groups), data.Rows, data.Columns)
    for group, image in zip(groups, pixels, strict=True):
        found: dict[str, Any] = {}
        parts = [part for part in (group, shared) if part is not None]
        for keyword, macro in GROUPS.items():
            holders = [(part.get(f"{macro}Sequence") or [None])[0] for part in parts]
            values = [holder.get(keyword) for holder in (*holders, data) if holder is not None]
            found[keyword] = next((np.ravel(value).astype(float) for value in values if value is not None), None)
        types = [(part.get("MRImageFrameTypeSequence") or [{}])[0] for part in parts] + [data]
        said = [t.get("ComplexImageComponent", "") for t in types]
        said += [word for t in types for word in np.ravel(t.get("FrameType") or t.get("ImageType") or [])[2:]]
        if odd := NOT_MAGNITUDE & {str(word).upper() for word in said}:
            raise ValueError(f"an image of kind {min(odd)} found")
        slope, intercept = (found[name] for name in ("RescaleSlope", "RescaleIntercept"))
        found["image"] = image * (1.0 if slope is None else slope) + (0.0 if intercept is None else intercept)
        if not np.isfinite(found["image"]).all():
            raise ValueError(f"RescaleSlope {slope}, RescaleIntercept {intercept} found")
        yield found


def _images(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Header and frame of every frame below a folder, or in a file; what is no image is passed by."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for file in files:
        with _faults_of(file, "a readable DICOM image of one channel"):
            try:
                data = pydicom.dcmread(file)
            except pydicom.errors.InvalidDicomError:
                if file == path or file.suffix.lower() in (".dcm", ".ima"):
                    raise
                continue
            kind = pydicom.uid.UID(str(data.file_meta.get("MediaStorageSOPClassUID") or data.get("SOPClassUID") or ""))
            if "PixelData" not in data and kind.type == "SOP Class" and "Image" not in kind.name:
                continue  # an index of the folder, a report; else an image that is cut off
            frames = list(_frames(data))
        yield from ((data, frame) for frame in frames)


def read_dicom(path: Path) -> Scan:
    """Read the one series of a folder of DICOM files, or of one file, as one even stack of slices.

    Returns
    -------
    Scan
        In rescaled units; `parameters` hold `subject` (the patient's id, without a name in it), `series`, `study_uid`,
        `frame_uid`, and what the headers say of `tr_ms`, `te_ms`, `thickness_mm`, `averages`, `date` and `protocol`.

    Raises
    ------
    InputError
        If there is no image, one cannot be decoded or is no magnitude, there are several series, or the slices are
        not one even stack.
    """
    with _faults_of(path, "the DICOM files of one series"):
        return _stack(path, list(_images(path)))


def _stack(path: Path, images: list[tuple[Any, dict[str, Any]]]) -> Scan:
    """One stack of all frames, in order along their normal."""

    def demand(good: Any, found: str, expected: str) -> None:
        if not good:
            raise InputError(f"{path}: {found} found, expected {expected}")

    demand(images, "no scan", "ParaVision scans or the DICOM files of one series")
    first, frames = images[0][0], [frame for _, frame in images]
    series = {str(data.get("SeriesInstanceUID")) for data, _ in images}
    demand(len(series) == 1, f"{len(series)} DICOM series", "the files of one series alone")
    required = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    for name, size in required.items():
        values = [frame[name] for frame in frames]
        demand(all(value is not None for value in values), f"no {name}", "images with their place in the scanner")
        good = all(value.size == size and np.isfinite(value).all() for value in values)
        demand(good, f"odd {name}", f"{size} finite numbers")
        apart = max(np.abs(value - values[0]).max() for value in values)
        demand(apart < 1e-3 or name == "ImagePositionPatient", f"slices of different {name}", "one stack")
    sizes = sorted({frame["image"].shape for frame in frames})
    demand(len(sizes) == 1, f"matrices {sizes}", "one matrix in all slices")
    x, y = frames[0]["ImageOrientationPatient"].reshape(2, 3)
    apart = np.abs([x @ x - 1, y @ y - 1, x @ y]).max()
    row, column = frames[0]["PixelSpacing"]
    demand(apart < 1e-3 and min(row, column) > 0, "odd axes or pixels", "perpendicular axes, pixels of some size")
    normal = np.cross(x, y)
    frames.sort(key=lambda frame: float(frame["ImagePositionPatient"] @ normal))
    position = np.stack([frame["ImagePositionPatient"] for frame in frames])
    thickness = _positive(frames[0]["SliceThickness"])
    distance = _positive(frames[0]["SpacingBetweenSlices"]) or thickness or 1.0
    steps = np.diff(position, axis=0) if len(frames) > 1 else normal[None] * distance
    step = steps.mean(axis=0)
    even = np.abs(steps - step).max() < 0.01 < abs(step @ normal)
    demand(even, "slices at uneven or equal places", "one even stack")
    affine = np.eye(4)
    affine[:3] = np.column_stack([x * column, y * row, step, position[0]])
    subject = public_id(str(first.get("PatientID") or "unnamed"), [str(first.get("PatientName", ""))])
    parameters: dict[str, Any] = {"subject": subject, "series": int(first.get("SeriesNumber") or 0)}
    parameters |= {"study_uid": str(first.get("StudyInstanceUID", "")), "thickness_mm": thickness}
    parameters |= {"frame_uid": str(first.get("FrameOfReferenceUID", "")), "date": _date(first)}
    parameters |= {"protocol": " ".join(str(first.get("ProtocolName") or first.get("SeriesDescription") or "").split())}
    numbers = {"tr_ms": "RepetitionTime", "te_ms": "EchoTime", "averages": "NumberOfAverages"}
    parameters |= {name: _positive(first.get(keyword)) for name, keyword in numbers.items()}
    parameters |= {"phase_axis": "x" if first.get("InPlanePhaseEncodingDirection") == "ROW" else "y"}
    return as_scan(np.stack([frame["image"] for frame in frames]), LPS @ affine, parameters)


def _positive(value: Any) -> float | None:
    """The first number of a value if it is finite and positive."""
    found = [float(number) for number in np.ravel([] if value is None else value)[:1]]
    return next((number for number in found if math.isfinite(number) and number > 0), None)


def _date(data: Any) -> str:
    """When a series was acquired, in ISO form; empty if its header does not say it."""
    texts = [str(data.get("AcquisitionDateTime") or "")]
    texts += [f"{data.get(f'{name}Date') or ''}{data.get(f'{name}Time') or ''}" for name in ("Acquisition", "Series")]
    for text in texts:
        with contextlib.suppress(ValueError):
            return datetime.strptime(text[:14], "%Y%m%d%H%M%S").isoformat()
    return ""


def write_dicom(folder: Path, scan: Scan, mark: str, description: str) -> None:
    """Write a restored scan as a derived series of MR images in a new folder, beside its place, then rename.

    Parameters
    ----------
    folder : Path
        Replaced if it is there.
    scan : Scan
        `parameters` as the readers give them, those of the scan that was restored: a DICOM scan keeps its study and
        its frame of reference, so that both can be shown on each other; every other UID is new.
    mark : str
        Fingerprint of the input and the settings: the same gives the same UIDs.
    description : str
        What was done; 64 characters of it become the name of the series.

    Raises
    ------
    InputError
        If the axes are not perpendicular: DICOM cannot say that.
    """
    from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid
    from pydicom.valuerep import format_number_as_ds

    def number(value: Any) -> str:
        return format_number_as_ds(float(value or 0))

    affine, known = LPS @ scan.affine, scan.parameters
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if abs(axes[:, 0] @ axes[:, 1]) > 1e-3:
        raise InputError(f"{folder.name}: sheared axes found, expected perpendicular ones for DICOM")
    lowest, highest = float(scan.image.min()), float(scan.image.max())
    slope = float(number((highest - lowest) / 65535 or 1.0))
    uids = {}
    for name in ("study", "frame"):
        given = UID(known.get(f"{name}_uid") or "")
        uids[name] = given if given and given.is_valid else generate_uid(entropy_srcs=[mark, name])
    with atomic_path(folder) as partial:
        partial.mkdir()
        for index, pixels in enumerate(scan.image):
            data = pydicom.Dataset()
            data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, generate_uid(entropy_srcs=[mark, str(index)])
            data.SeriesInstanceUID = generate_uid(entropy_srcs=[mark, "series"])
            data.StudyInstanceUID, data.FrameOfReferenceUID = uids["study"], uids["frame"]
            data.Modality, data.ImageType = "MR", ["DERIVED", "SECONDARY", "OTHER"]
            data.DerivationDescription, data.SeriesDescription = description[:1024], description[:64]
            data.PatientID, data.PatientName, data.PatientIdentityRemoved = known["subject"], "", "YES"
            data.DeidentificationMethod = "no name, birth date, sex, dates or physician is written"
            empty = "PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName"
            for keyword in (*empty.split(), "Manufacturer", "PositionReferenceIndicator", "ScanOptions"):
                setattr(data, keyword, "")
            data.SeriesNumber, data.InstanceNumber, data.BurnedInAnnotation = 9000, index + 1, "NO"
            data.ScanningSequence, data.SequenceVariant, data.MRAcquisitionType = "SE", "SK", "2D"
            data.RepetitionTime, data.EchoTime = number(known.get("tr_ms")), number(known.get("te_ms"))
            data.EchoTrainLength = int(known.get("rare_factor") or 1)
            data.ImagePositionPatient = [number(value) for value in (affine @ (0, 0, index, 1))[:3]]
            data.ImageOrientationPatient = [number(value) for value in axes[:, :2].T.ravel()]
            data.PixelSpacing = [number(value) for value in scan.spacing_mm[1:]]
            data.SliceThickness = number(known.get("thickness_mm") or scan.spacing_mm[0])
            data.SpacingBetweenSlices = number(scan.spacing_mm[0])
            data.RescaleSlope, data.RescaleIntercept, data.RescaleType = number(slope), number(lowest), "US"
            data.Rows, data.Columns = pixels.shape
            data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
            data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
            data.PixelData = np.rint((pixels - lowest) / slope).clip(0, 65535).astype("<u2").tobytes()
            data.file_meta = pydicom.dataset.FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.save_as(partial / f"{index + 1:04d}.dcm", enforce_file_format=True)
