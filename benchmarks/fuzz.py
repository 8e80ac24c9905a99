"""Feed damaged files to every reader: each case ends in a sound scan or in one line, never in a traceback.

A sound small scan of each format is written, hypothesis damages it (bytes changed, cut, repeated; values replaced by
odd ones), and the reader is called as 01_curate.py calls it. An accepted case must give an image of the shape that its
header and its file say, finite where it was stored as integers, at a finite place. tests/test_formats.py runs a few.

Usage:
    python benchmarks/fuzz.py
    python benchmarks/fuzz.py --cases 5000 --seed 3
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import importlib
import io
import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import formats  # noqa: E402
import paravision_writer  # noqa: E402
from common import Array, InputError, write_table  # noqa: E402
from paravision import Scan, index_scan, read_paravision, scan_folders, unpack  # noqa: E402

SHAPE = (4, 8, 8)  # slice, y, x
ODD_NUMBERS = ["nan", "inf", "-inf", "1e308", "-1", "0", "1e-30", "2147483647", "99999999999999", "3.7", "", "x"]
ODD_WORDS = ["<>", "( 0 )", "( 999999 )", "( -1 )", "@9*(1)", "@99999*(0)", "(1, 2", "<\xe4\xff>", "$$", "##END=", "\0"]


# ---------------------------------------------------------------- damage


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes changed, deleted, inserted, repeated or cut off at one to four places."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "delete", "insert", "repeat", "cut"]))
        length = draw(st.integers(1, 16))
        new = draw(st.binary(min_size=1, max_size=length)) if kind in ("change", "insert") else b""
        new = data[start : start + 4 * length] * 2 if kind == "repeat" else new
        end = {"change": start + len(new), "delete": start + length, "insert": start, "cut": len(data)}
        data = data[:start] + new + data[end.get(kind, start + 4 * length) :]
    return data


@st.composite
def odd_parameters(draw: Any, data: bytes) -> bytes:
    """A parameter file in which values are replaced by odd ones, or lines lost, doubled or exchanged."""
    lines = data.decode("latin-1").splitlines()
    for _ in range(draw(st.integers(1, 3))):
        here, there = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        kind = draw(st.sampled_from(["number", "number", "word", "lose", "double", "exchange"]))
        if kind in ("number", "word"):
            words = lines[here].replace("=", "= ").split() or [""]
            at = draw(st.integers(min(1, len(words) - 1), len(words) - 1))
            words[at] = draw(st.sampled_from(ODD_NUMBERS if kind == "number" else ODD_WORDS))
            lines[here] = " ".join(words).replace("= ", "=", 1)
        elif kind == "exchange":
            lines[here], lines[there] = lines[there], lines[here]
        else:
            lines[here : here + 1] = [lines[here]] * 2 * (kind == "double")
        lines = lines or [""]
    return "\n".join([*lines, ""]).encode("latin-1")


# ---------------------------------------------------------------- readers


def sound(scan: Scan, finite: bool = True) -> None:
    """Hold an accepted scan against what it says of itself."""
    found, (n, ny, nx) = scan.parameters, scan.image.shape
    assert (found["slices"], *found["matrix"]) == (n, nx, ny), "the shape is not that of the header"
    assert min(scan.image.shape) > 0
    assert scan.image.dtype == np.float32
    assert np.isfinite(scan.affine).all()
    assert abs(np.linalg.det(scan.affine)) > 0, "voxels of no size"
    assert np.allclose(np.linalg.norm(scan.affine[:3, :3], axis=0)[::-1], scan.spacing_mm)
    assert np.allclose(found["fov_mm"], np.multiply(scan.spacing_mm[:0:-1], (nx, ny)), rtol=1e-4)
    assert np.isfinite(found["centres_mm"]).all()
    assert found["thickness_mm"] is None or (np.isfinite(found["thickness_mm"]) and found["thickness_mm"] > 0)
    assert not finite or np.isfinite(scan.image).all(), "NaN or infinity out of integers"


class Reader:
    """A format: a sound scan of it in a folder, what damages it, and how it is read."""

    def __init__(self, folder: Path, image: Array) -> None:
        self.folder, self.image = folder, image
        write_study(folder / "sound", image)
        self.scan = read_paravision(folder / "sound/m/1/pdata/1/2dseq")

    def damage(self, draw: Any) -> None:
        """Write a damaged scan."""
        raise NotImplementedError

    def read(self) -> None:
        """Read it and hold it against the facts."""
        raise NotImplementedError


def write_study(raw: Path, image: Array) -> None:
    """A study of ParaVision 6.0.1 with one scan."""
    date = datetime.datetime(2024, 5, 6, 10)
    cfg = SimpleNamespace(fov_mm=20.0, thickness_mm=0.8, tr_ms=4000.0, te_ms=37.0, echo_spacing_ms=9.0)
    cfg.rare_factor, cfg.coils = 2, 1
    session = paravision_writer.session_of("m", "fuzz", date)
    scan = paravision_writer.Scan(
        *(1, "T2_HT", "axial", image.shape[1], 1, len(image), 1.0, np.zeros(3), date, 60, np.arange(image.shape[1]))
    )
    paravision_writer.write_subject(raw / "m", session, date)
    paravision_writer.write_scan_folder(cfg, raw / "m", session, scan, image)


class ParaVision(Reader):
    """Parameter files and pixels of a study."""

    def damage(self, draw: Any) -> None:
        """Write a damaged scan."""
        shutil.rmtree(self.folder / "m", ignore_errors=True)
        shutil.copytree(self.folder / "sound/m", self.folder / "m")
        name = draw(st.sampled_from(["pdata/1/visu_pars"] * 4 + ["method", "acqp", "../subject", "pdata/1/2dseq"]))
        data = (self.folder / "m/1" / name).read_bytes()
        text = name != "pdata/1/2dseq" and draw(st.booleans())
        (self.folder / "m/1" / name).write_bytes(draw((odd_parameters if text else damaged)(data)))

    def read(self) -> None:
        """Read it and hold it against the facts."""
        _, found, reason = index_scan(self.folder / "m/1")
        if not found:
            raise InputError(reason)
        path = self.folder / "m/1/pdata/1/2dseq"
        scan = read_paravision(path)
        sound(scan)
        assert scan.image.size * 2 == path.stat().st_size, "not every pixel was read"
        assert {k: v for k, v in found.items() if v == v} == {k: v for k, v in scan.parameters.items() if v == v}


class Archive(Reader):
    """A zip archive of a study."""

    def damage(self, draw: Any) -> None:
        """Write a damaged scan."""
        archive = Path(shutil.make_archive(str(self.folder / "sound"), "zip", self.folder / "sound"))
        (self.folder / "m.zip").write_bytes(draw(damaged(archive.read_bytes())))

    def read(self) -> None:
        """Read it and hold it against the facts."""
        shutil.rmtree(self.folder / "unpacked", ignore_errors=True)
        unpack(self.folder / "m.zip", self.folder / "unpacked")
        inside = {path.name for path in self.folder.iterdir()}
        assert inside <= {"sound", "sound.zip", "m.zip", "unpacked"}, "written outside of the folder"
        for folder in scan_folders(self.folder / "unpacked"):
            _, found, reason = index_scan(folder)
            if not found:
                raise InputError(reason)
            scan = read_paravision(folder / "pdata/1/2dseq")
            assert np.array_equal(scan.image, self.scan.image), "other pixels than were packed"


class Nifti(Reader):
    """A NIfTI file, compressed or not: fields of its header, and bytes anywhere."""

    FIELDS = ("dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "xyzt_units", "dim_info")
    FIELDS += ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "sizeof_hdr", "magic")

    def damage(self, draw: Any) -> None:
        """Write a damaged scan."""
        import nibabel

        dtype = draw(st.sampled_from([np.int16, np.uint8, np.float32, np.float64, np.complex64]))
        voxels = np.clip(self.image, 0, 200).astype(dtype).transpose(2, 1, 0)
        data = bytearray(nibabel.Nifti1Image(voxels, self.scan.affine).to_bytes())
        for _ in range(draw(st.integers(0, 2))):
            field, start = nibabel.Nifti1Header.template_dtype.fields[draw(st.sampled_from(self.FIELDS))][:2]
            base, count = field.base, max(int(np.prod(field.shape)), 1)
            at = start + base.itemsize * draw(st.integers(0, count - 1))
            value = np.zeros(1, base)
            if base.kind in "iu":
                value[0] = draw(st.integers(np.iinfo(base).min, np.iinfo(base).max) | st.integers(0, 20))
            elif base.kind == "f":
                value[0] = draw(st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0]))
            data[at : at + base.itemsize] = value.tobytes()
        packed = draw(st.booleans())
        found = gzip.compress(bytes(data), 1) if packed else bytes(data)
        found = draw(damaged(found)) if draw(st.booleans()) else found
        for old in self.folder.glob("scan.*"):
            old.unlink()
        (self.folder / f"scan.nii{'.gz' * packed}").write_bytes(found)

    def read(self) -> None:
        """Read it and hold it against the facts."""
        import nibabel

        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # for the oracle's own look at the file
        path = next(self.folder.glob("scan.*"))
        _, found, reason = formats.describe_source(path)
        if not found:
            raise InputError(reason)
        scan, header = formats.read_source(path), nibabel.load(path).header
        sound(scan, finite=header.get_data_dtype().kind in "iu" and not np.isnan(header["scl_inter"]))
        assert sorted(scan.image.shape) == sorted(n for n in self.image.shape), "another shape"
        assert scan.parameters["matrix"] == list(header.get_data_shape()[:2])


class Dicom(Reader):
    """A folder of DICOM files: elements of one of them, and its bytes."""

    def __init__(self, folder: Path, image: Array) -> None:
        super().__init__(folder, image)
        formats.write_dicom(folder / "dicom", self.scan, "fuzz", "fuzz")
        self.sound = formats.read_dicom(folder / "dicom")

    def damage(self, draw: Any) -> None:
        """Write a damaged scan."""
        import pydicom

        shutil.rmtree(self.folder / "series", ignore_errors=True)
        shutil.copytree(self.folder / "dicom", self.folder / "series")
        path = draw(st.sampled_from(sorted((self.folder / "series").iterdir())))
        kind = draw(st.sampled_from(["element", "element", "bytes", "cut"]))
        if kind == "element":
            data = pydicom.dcmread(path)
            element = data[draw(st.sampled_from(sorted(data.keys())))]
            if draw(st.booleans()):
                del data[element.tag]
            else:
                raw = draw(st.sampled_from(ODD_NUMBERS).map(str.encode) | st.binary(max_size=24))
                raw += b" " * (len(raw) % 2)
                data._dict[element.tag] = pydicom.dataelem.RawDataElement(
                    element.tag, element.VR, len(raw), raw, 0, False, True
                )
            with contextlib.suppress(Exception):  # what the library will not write is no case
                data.save_as(path, enforce_file_format=False)
        elif kind == "cut":
            path.write_bytes(path.read_bytes()[: draw(st.integers(0, path.stat().st_size - 1))])
        else:
            path.write_bytes(draw(damaged(path.read_bytes())))

    def read(self) -> None:
        """Read it and hold it against the facts."""
        _, found, reason = formats.describe_source(self.folder / "series")
        if not found:
            raise InputError(reason)
        scan = formats.read_source(self.folder / "series")
        sound(scan)
        assert scan.image.shape == self.sound.image.shape, "a slice was left out"


class Cohort(Reader):
    """The tables that a person edits, read by the whole stage."""

    def __init__(self, folder: Path, image: Array) -> None:
        super().__init__(folder, image)
        self.curate = importlib.import_module("01_curate")
        fine = np.repeat(np.repeat(image, 2, axis=1), 2, axis=2)
        formats.write_nifti(folder / "low.nii.gz", image, self.scan.affine)
        formats.write_nifti(folder / "high.nii.gz", fine, self.scan.affine @ np.diag([0.5, 0.5, 1, 1]))
        rows = [{"study": f"{role}.nii.gz", "subject": "m", "role": role} for role in ("low", "high")]
        write_table(folder / "data/cohort.csv", ["study", "subject", "role"], rows)
        self.index()
        self.tables = {name: (folder / "data" / name).read_bytes() for name in ("cohort.csv", ".cohort.automatic.csv")}

    def index(self) -> dict[str, Any]:
        """What the stage finds."""
        config = self.curate.Config(root=self.folder, raw=self.folder, workers=1, only_index=True)
        with contextlib.redirect_stdout(io.StringIO()):
            return self.curate.run(config)

    def damage(self, draw: Any) -> None:
        """Write a damaged scan."""
        for name, data in self.tables.items():
            (self.folder / "data" / name).write_bytes(data)
        name = draw(st.sampled_from(["cohort.csv", "cohort.csv", ".cohort.automatic.csv"]))
        data = self.tables[name]
        if draw(st.booleans()):
            cells = data.decode().split(",")
            for _ in range(draw(st.integers(1, 3))):
                cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from(ODD_NUMBERS + ODD_WORDS) | st.text())
            data = ",".join(cells).encode("utf-8", "surrogatepass")
        (self.folder / "data" / name).write_bytes(draw(damaged(data)) if draw(st.booleans()) else data)

    def read(self) -> None:
        """Read it and hold it against the facts."""
        assert self.index()["pairs"] == 1


READERS: dict[str, Callable[[Path, Array], Reader]] = {
    "ParaVision": ParaVision,
    "archive": Archive,
    "NIfTI": Nifti,
    "DICOM": Dicom,
    "cohort": Cohort,
}


# ---------------------------------------------------------------- cases


def try_cases(name: str, cases: int, start: int = 0) -> tuple[Counter[str], list[str]]:
    """Count accepted and refused cases of a reader, and what ended in anything else."""
    counts, faults = Counter[str](), list[str]()
    image = np.random.default_rng(0).gamma(2, 100, SHAPE).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[name](Path(folder), image)

        @seed(start)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def one(data: Any) -> None:
            reader.damage(data.draw)
            try:
                reader.read()
                counts["accepted"] += 1
            except InputError as error:
                counts["refused"] += 1
                if " expected " not in str(error):
                    faults.append(f"does not say what is expected: {error!r}")
            except Exception:
                counts["traceback"] += 1
                faults.append(traceback.format_exc(limit=-4))

        one()
    return counts, faults


def main() -> None:
    """Run all readers, print a table of counts, end in status 1 at any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each reader (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    args = parser.parse_args()
    faults: list[str] = []
    print("| reader | cases | accepted | refused | faults | seconds |\n|---|---|---|---|---|---|")
    for name in args.readers:
        start = time.monotonic()
        counts, found = try_cases(name, args.cases, args.seed)
        faults += [f"{name}: {text}" for text in found]
        row = [
            name,
            counts.total(),
            counts["accepted"],
            counts["refused"],
            len(found),
            f"{time.monotonic() - start:.0f}",
        ]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    for text, count in Counter(faults).most_common(10):
        print(f"\n{count} x {text}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
