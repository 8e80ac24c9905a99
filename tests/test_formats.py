"""NIfTI and DICOM readers: what they say of a scan, what they refuse, and damaged files of every format."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

import formats
from common import InputError
from paravision import place_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import fuzz

AFFINE = np.array([[0, 0, 0, 9], [0, 0, 0, -8], [0, 0, -1.5, 4], [0, 0, 0, 1.0]])
AFFINE[:2, :2] = 0.3 * np.array([[-0.96, 0.28], [0.28, 0.96]])


@pytest.fixture
def image() -> np.ndarray:
    """Integers (slice, y, x), so that every format holds them as they are."""
    return np.random.default_rng(4).integers(1, 3000, (4, 6, 8)).astype(np.float32)


def nifti(path: Path, image: np.ndarray, dtype: type = np.int16, **header: object) -> Path:
    """A NIfTI file of a placed volume, with changed fields of its header."""
    volume = nibabel.Nifti1Image(image.astype(dtype).transpose(2, 1, 0), AFFINE)
    data = bytearray(volume.to_bytes())
    for name, value in header.items():
        base, start = nibabel.Nifti1Header.template_dtype.fields[name][:2]
        values = np.asarray(value, base.base).tobytes()
        data[start : start + len(values)] = values
    path.write_bytes(gzip.compress(bytes(data)) if path.name.endswith(".gz") else bytes(data))
    return path


def dicom(folder: Path, image: np.ndarray, change: Callable[[pydicom.Dataset], object] | None = None) -> Path:
    """A series of DICOM files, every header changed."""
    scan = formats.as_scan(image, AFFINE, {"subject": "m7", "tr_ms": 4000.0, "te_ms": 37.0, "thickness_mm": 1.2})
    formats.write_dicom(folder, scan, "mark", "T2 RARE")
    for path in sorted(folder.iterdir()) if change else ():
        data = pydicom.dcmread(path)
        change(data)
        data.save_as(path)
    return folder


# ---------------------------------------------------------------- what they say of a scan


def test_both_formats_give_the_geometry_that_paravision_scans_have(tmp_path, image):
    found = formats.read_nifti(nifti(tmp_path / "m7_HT.nii.gz", image))
    series = formats.read_dicom(dicom(tmp_path / "series", image))
    np.testing.assert_array_equal(found.image, image)
    np.testing.assert_allclose(series.image, image, atol=0.03)  # 16 bits over the range
    np.testing.assert_allclose(series.affine, AFFINE, atol=1e-6)
    for scan, thickness in ((found, None), (series, pytest.approx(1.2))):
        said = scan.parameters
        np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-6)
        assert (said["matrix"], said["slices"], said["plane"]) == ([8, 6], 4, "axial")
        np.testing.assert_allclose(said["fov_mm"], [2.4, 1.8], rtol=1e-6)
        assert said["thickness_mm"] == thickness
        assert said["distance_mm"] == pytest.approx(1.5)
        # Pixel (4, 3), half of the matrix, is the centre.
        np.testing.assert_allclose(said["centres_mm"][2], (AFFINE @ [4, 3, 2, 1])[:3], atol=1e-6)
        assert said["phase_axis"] == "y"
    assert found.parameters["subject"] == "m7_HT"
    assert series.parameters["subject"] == "m7"
    assert (series.parameters["tr_ms"], series.parameters["te_ms"]) == (4000, 37)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_plane_from_the_affine(plane):
    normal = {"axial": 2, "coronal": 1, "sagittal": 0}[plane]
    others = [axis for axis in range(3) if axis != normal]
    affine = np.eye(4)[:, [*others, normal, 3]]
    affine[:3, :3] += 0.2
    assert place_of(affine, (3, 4, 5))["plane"] == plane


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"AcquisitionDate": "20240506", "AcquisitionTime": "070809.5"}, "date", "2024-05-06T07:08:09"),
        ({"AcquisitionDateTime": "20240506070809.123+0200"}, "date", "2024-05-06T07:08:09"),
        ({"SeriesDate": "20240506", "SeriesTime": "070809"}, "date", "2024-05-06T07:08:09"),
        ({"SeriesDate": "20240506"}, "date", ""),
        ({"NumberOfAverages": "5"}, "averages", 5),
        ({"InPlanePhaseEncodingDirection": "ROW"}, "phase_axis", "x"),
        ({"ProtocolName": "T2_HT_axial"}, "protocol", "T2_HT_axial"),
        ({"SliceThickness": "0"}, "thickness_mm", None),
        ({"PatientID": "Lovelace-7", "PatientName": "Ada^Lovelace"}, "subject", "subject-cd5a23"),
    ],
)
def test_what_a_dicom_header_says(tmp_path, image, change, name, value):
    folder = dicom(tmp_path / "series", image, lambda data: [setattr(data, *item) for item in change.items()])
    found = formats.read_dicom(folder).parameters
    assert found[name] == value or (name == "subject" and found[name].startswith("subject-"))
    assert "Lovelace" not in str(found)


def test_phase_axis_of_nifti(tmp_path, image):
    assert formats.read_nifti(nifti(tmp_path / "a.nii", image, dim_info=1 << 2)).parameters["phase_axis"] == "x"
    assert formats.read_nifti(nifti(tmp_path / "b.nii", image, dim_info=2 << 2)).parameters["phase_axis"] == "y"


def test_one_file_may_hold_a_series(tmp_path, image):
    folder = dicom(tmp_path / "series", image[:1])
    one, alone = formats.read_dicom(folder), formats.read_source(folder / "0001.dcm")
    np.testing.assert_array_equal(one.image, alone.image)
    np.testing.assert_array_equal(one.affine, alone.affine)


def test_what_is_no_image_is_passed_by(tmp_path, image):
    folder = dicom(tmp_path / "series", image)
    whole = formats.read_dicom(folder)
    (folder / "notes.txt").write_text("scanned on a Monday")
    report = pydicom.dcmread(folder / "0001.dcm")
    del report.PixelData
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = pydicom.uid.BasicTextSRStorage
    report.save_as(folder / "report.dcm")
    np.testing.assert_array_equal(formats.read_dicom(folder).image, whole.image)


# ---------------------------------------------------------------- what they refuse


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"dim": [3, 8, 6, 3, 1, 1, 1, 1]}, r"more than \(8, 6, 3\) voxels, expected a NIfTI volume"),
        ({"dim": [3, 8, 6, 5, 1, 1, 1, 1]}, "expected a NIfTI volume"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "voxels, expected a NIfTI volume"),
        ({"dim": [4, 8, 6, 2, 2, 1, 1, 1]}, r"int16 of shape \(8, 6, 2, 2\) found, expected real numbers"),
        ({"dim": [3, 8, 6, 0, 1, 1, 1, 1]}, "expected"),
        ({"pixdim": [1, 0, 0.3, 1.5, 0, 0, 0, 0]}, "voxels of 0 x 0.3 x 1.5, expected a NIfTI volume"),
        ({"pixdim": [1, 0.3, np.nan, 1.5, 0, 0, 0, 0]}, "voxels of 0.3 x nan x 1.5"),
        ({"srow_x": [0, 0, 0, 0]}, "affine without volume found"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine without volume found"),
        ({"datatype": 32, "bitpix": 64}, "expected"),
        ({"datatype": 128, "bitpix": 24}, "expected"),
        ({"xyzt_units": 5}, "expected a NIfTI volume"),
        ({"scl_slope": 1e38, "scl_inter": 0}, "overflow"),
    ],
)
def test_odd_headers_of_nifti(tmp_path, image, header, reason):
    path = nifti(tmp_path / "m.nii", image, **header)
    with pytest.raises(InputError, match=reason) as caught:
        formats.read_nifti(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert formats.describe_source(path)[2] == str(caught.value).removeprefix(f"{path}: ")


def test_nifti_without_a_place_is_restored_but_never_paired(tmp_path, image):
    path = nifti(tmp_path / "m.nii", image, sform_code=0, qform_code=0)
    assert formats.read_nifti(path).parameters["placed"] is False
    assert formats.describe_source(path)[1:] == (
        {},
        "no sform and no qform found, expected the place of the scan in the scanner",
    )


DICOM_FAULTS: dict[str, Callable[[pydicom.Dataset], object]] = {
    "kind P found": lambda data: setattr(data, "ImageType", ["ORIGINAL", "PRIMARY", "P", "ND"]),
    "kind PHASE found": lambda data: setattr(data, "ComplexImageComponent", "PHASE"),
    "kind REAL found": lambda data: setattr(data, "ComplexImageComponent", "REAL"),
    "odd axes or pixels found": lambda data: setattr(data, "ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0]),
    "odd axes": lambda data: setattr(data, "PixelSpacing", [0, 0.3]),
    "no PixelSpacing found": lambda data: delattr(data, "PixelSpacing"),
    "odd PixelSpacing found": lambda data: setattr(data, "PixelSpacing", [0.3, 0.3, 0.3]),
    "uneven or equal places": lambda data: setattr(data, "ImagePositionPatient", [1, 2, 3]),
    "colour or frames": lambda data: setattr(data, "NumberOfFrames", 3),
    "colour": lambda data: setattr(data, "SamplesPerPixel", 3),
    "0001.dcm: .*expected a readable DICOM image": lambda data: delattr(data, "PixelData"),
    "RescaleSlope .*1e.400": lambda data: setattr(data, "RescaleSlope", "1e400"),
    "4 DICOM series found": lambda data: setattr(data, "SeriesInstanceUID", pydicom.uid.generate_uid()),
}


@pytest.mark.parametrize("reason", DICOM_FAULTS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of pydicom, at writing what is odd
def test_odd_headers_of_dicom(tmp_path, image, reason):
    folder = dicom(tmp_path / "series", image, DICOM_FAULTS[reason])
    with pytest.raises(InputError, match=reason.replace("1e.400", "inf")) as caught:
        formats.read_dicom(folder)
    assert "expected" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_last_slice_cut_at_any_byte_is_never_left_out(tmp_path, image):
    """A stack without its last slice looks whole, so that a file that lost its end must not count as no image."""
    folder = dicom(tmp_path / "series", image)
    last = folder / "0004.dcm"
    data = last.read_bytes()
    for length in [*range(0, len(data) - 1, 37), len(data) - 1]:
        last.write_bytes(data[:length])
        with pytest.raises(InputError, match="expected"):
            formats.read_dicom(folder)


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_end_in_a_sound_scan_or_in_one_line(name):
    counts, faults = fuzz.try_cases(name, 60)
    assert faults == []
    assert min(counts["accepted"], counts["refused"]) > 0
