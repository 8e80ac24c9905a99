"""The ParaVision reader: golden values of real scans, every rule of acceptance, and damaged files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import InputError
from paravision import index_scan, read_paravision, scan_folders

BRUKER = Path(__file__).resolve().parent.parent.parent / "shared" / "bruker"
HEADER = "##TITLE=Parameter List\n##JCAMPDX=4.24\n##DATATYPE=Parameter Values\n##ORIGIN=Bruker\n##OWNER=x\n"
AXES = {
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
}
WORDS = {"int16": "_16BIT_SGN_INT", "uint8": "_8BIT_UNSGN_INT", "int32": "_32BIT_SGN_INT", "float32": "_32BIT_FLOAT"}


def _text(values: dict[str, Any]) -> str:
    """A parameter file: strings are written as they are, arrays with their size."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list | tuple | np.ndarray):
            size = ", ".join(map(str, np.shape(value)))
            value = f"( {size} )\n{' '.join(f'{number:.12g}' for number in np.ravel(value))}"
        lines.append(f"##${name}={value}\n" if value is not None else "")
    return HEADER + "".join(lines) + "##END=\n"


def write_scan(
    scan: Path,
    stored: np.ndarray,
    plane: str = "axial",
    step: float = 1.0,
    fov: float = 20.0,
    reco: int = 1,
    **more: Any,
) -> Path:
    """Write a small scan of ParaVision 6 whose 2dseq holds `stored` (slice, y, x) as it is; gives the 2dseq."""
    n, ny, nx = stored.shape
    folder = scan / "pdata" / str(reco)
    folder.mkdir(parents=True)
    axes = np.array(AXES[plane], float)
    first = -axes[0] * fov / 2 - axes[1] * fov / 2
    visu = {
        "VisuCreatorVersion": "( 65 )\n<6.0.1>",
        "VisuCoreFrameCount": n,
        "VisuCoreDim": 2,
        "VisuCoreSize": [nx, ny],
        "VisuCoreDimDesc": "( 2 )\nspatial spatial",
        "VisuCoreExtent": [fov, fov],
        "VisuCoreFrameThickness": [0.8],
        "VisuCoreUnits": "( 2, 65 )\n<mm> <mm>",
        "VisuCoreOrientation": np.tile(axes.ravel(), (n, 1)),
        "VisuCorePosition": first + step * np.arange(n)[:, None] * axes[2],
        "VisuCoreDataOffs": np.zeros(n),
        "VisuCoreDataSlope": np.full(n, 0.5),
        "VisuCoreFrameType": "MAGNITUDE_IMAGE",
        "VisuCoreWordType": WORDS[stored.dtype.name],
        "VisuCoreByteOrder": "littleEndian" if stored.dtype.byteorder != ">" else "bigEndian",
        "VisuFGOrderDesc": f"( 1 )\n({n}, <FG_SLICE>, <>, 0, 2)",
        "VisuSubjectName": "( 65 )\n<Secret^Name>",
        "VisuSubjectId": "( 65 )\n<mouse01>",
        "VisuSubjectUid": "( 65 )\n<1.2.3>",
        "VisuStudyUid": "( 65 )\n<1.2.3.4>",
        "VisuAcqDate": "<2024-05-06T07:08:09,123+0200>",
        "VisuAcquisitionProtocol": "( 65 )\n<T2_TurboRARE>",
    }
    method = {
        "Method": "<Bruker:RARE>",
        "PVM_NAverages": 1,
        "EffectiveTE": [37.1],
        "PVM_RepetitionTime": 4000,
        "PVM_EncMatrix": [nx, ny],
        "PVM_SPackArrReadOrient": {"sagittal": "( 1 )\nA_P"}.get(plane, "( 1 )\nL_R"),
    }
    method |= {name: more.pop(name) for name in list(more) if name.startswith(("PVM", "Method", "Effective"))}
    (folder / "visu_pars").write_text(_text(visu | more), encoding="latin-1")
    (scan / "method").write_text(_text(method), encoding="latin-1")
    (folder / "2dseq").write_bytes(stored.tobytes())
    return folder / "2dseq"


@pytest.fixture
def stored() -> np.ndarray:
    """Pixels of four slices of 6 x 8."""
    return np.random.default_rng(1).integers(0, 2000, (4, 6, 8)).astype(np.int16)


def golden() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(BRUKER.glob("*/EXPECTED.json"))
    return [
        (f"{file.parent.name}/{name}", value) for file in files for name, value in json.loads(file.read_text()).items()
    ]


REFUSED = {
    "banana_epi_pv51_7T_PDDL/study/18/pdata/1/2dseq": "sequence: EPI found, expected RARE",
    "mouse_body_rare_pv601_7T/study/1/pdata/1/2dseq": "sequence: Bruker:FLASH found",
    "mouse_body_rare_pv601_7T/study/4/pdata/1/2dseq": "sequence: User:cestFISP_Pagel5 found",
    "mouse_brain_rare_pv360_36_9T4/study/1/pdata/1/2dseq": "sequence: Bruker:FLASH found",
    "mouse_brain_rare_pv360_36_9T4/study/2/pdata/1/2dseq": "2dseq: empty file",
    "mouse_brain_rare_pv360_36_9T4/study/6/pdata/1/2dseq": "sequence: Bruker:FLASH found",
    "phantom_letters_rare_pv601_7T/study/1/pdata/1/2dseq": "sequence: Bruker:FLASH found",
    "phantom_letters_rare_pv601_7T/study/28/pdata/1/2dseq": "visu_pars: no such file",
    "phantom_letters_rare_pv601_7T/study/3/pdata/1/2dseq": "slice packages: 2 found, expected 1",
    "phantom_tubes_localizer_pv51_apache/study/100/pdata/1/2dseq": "sequence: mic_flash found",
    "rat_head_rare_pv51_4T7/study/1/pdata/1/2dseq": "sequence: FLASH found",
}


@pytest.mark.real
@pytest.mark.parametrize(("name", "expected"), golden(), ids=[name for name, _ in golden()])
def test_real_scan_reads_as_an_independent_decoder_reads_it(name, expected):
    path = BRUKER / name
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            read_paravision(path)
        return
    scan = read_paravision(path)
    assert scan.image.shape == tuple(expected["shape"][::-1])
    assert scan.image.dtype == np.float32
    np.testing.assert_allclose(scan.image.mean(axis=(1, 2), dtype=float), expected["frame_means"], rtol=2e-7)
    np.testing.assert_allclose(scan.image.ravel()[:4], expected["first_voxels_scaled"], rtol=1e-6)
    np.testing.assert_allclose([scan.image.min(), scan.image.max()], [expected["scaled_min"], expected["scaled_max"]])
    np.testing.assert_allclose(scan.affine, expected["packages"][0]["affine_RAS"], atol=1e-6)
    np.testing.assert_allclose(scan.spacing_mm[:0:-1], expected["voxel_mm"])
    assert scan.parameters["averages"] == float(expected["averages"])
    assert scan.parameters["acquired_matrix"] == [int(n) for n in expected["enc_matrix"].split()]
    assert scan.parameters["plane"] == expected["orient"]
    assert scan.parameters["thickness_mm"] == float(expected["slice_thickness_mm"])
    assert scan.parameters["tr_ms"] == float(expected["tr"])
    assert scan.parameters["subject"] == expected["subject_id"].strip("<>")


@pytest.mark.real
@pytest.mark.parametrize("scan", ["6", "17"])
def test_real_scan_equals_the_nifti_of_another_converter(bruker, scan):
    import nibabel

    folder = bruker / "phantom_letters_rare_pv601_7T"
    other = nibabel.load(next((folder / "independent_nifti_dicomifier").glob(f"{scan}_1_*/1.nii.gz")))
    mine = read_paravision(folder / "study" / scan / "pdata" / "1" / "2dseq")
    np.testing.assert_allclose(mine.affine, other.affine, atol=1e-5)
    np.testing.assert_allclose(mine.image, np.asarray(other.dataobj).squeeze().T, rtol=1e-5, atol=1e-5)


@pytest.mark.real
@pytest.mark.parametrize(
    ("place", "axis"),
    [
        ("rat_head_rare_pv51_4T7/study/2", "x"),
        ("rat_head_rare_pv51_4T7/study/10", "y"),
        ("mouse_brain_rare_pv360_36_9T4/study/5", "y"),
    ],
)
def test_phase_axis_of_real_scans(bruker, place, axis):
    """Scans 2 and 10 of the rat were read along the two axes of the image."""
    assert read_paravision(bruker / place / "pdata/1/2dseq", pixels=False).parameters["phase_axis"] == axis


@pytest.mark.real
def test_no_name_of_a_subject_is_kept(bruker):
    scan = read_paravision(bruker / "pairs/rat_head_a/1/pdata/1/2dseq", pixels=False)
    assert "test_irm" in (bruker / "pairs/rat_head_a/subject").read_text()
    assert "test_irm" not in json.dumps(scan.parameters)


def test_values_place_and_parameters(tmp_path, stored):
    scan = read_paravision(write_scan(tmp_path / "7", stored, step=1.5))
    np.testing.assert_array_equal(scan.image, stored * np.float32(0.5))
    assert scan.spacing_mm == pytest.approx((1.5, 20 / 6, 20 / 8))
    # The first voxel lies at (-10, -10, 0) in LPS, which is (10, 10, 0) in RAS.
    np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [10, 10, 0, 1])
    np.testing.assert_allclose(scan.affine @ [8, 6, 3, 1], [-10, -10, 4.5, 1])
    found = scan.parameters
    assert (found["subject"], found["averages"], found["te_ms"], found["tr_ms"]) == ("mouse01", 1, 37.1, 4000)
    assert (found["thickness_mm"], found["distance_mm"], found["plane"]) == (0.8, 1.5, "axial")
    assert found["date"] == "2024-05-06T07:08:09"
    assert "Secret" not in json.dumps(found)
    np.testing.assert_allclose(found["centres_mm"], [[0, 0, 1.5 * i] for i in range(4)], atol=1e-12)


def test_without_pixels_nothing_is_read_but_all_is_checked(tmp_path, stored):
    path = write_scan(tmp_path / "1", stored)
    scan = read_paravision(path, pixels=False)
    assert scan.image.shape == stored.shape
    assert scan.image.strides == (0, 0, 0)
    path.write_bytes(stored.tobytes()[:-1])
    with pytest.raises(InputError, match="383 bytes found, expected 384"):
        read_paravision(path, pixels=False)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_words_and_byte_orders(tmp_path, dtype, order):
    values = np.random.default_rng(2).integers(0, 255, (3, 4, 5)).astype(np.dtype(dtype))
    disk = values.astype(values.dtype.newbyteorder(order))
    more = {"VisuCoreByteOrder": {"<": "littleEndian", ">": "bigEndian"}[order], "VisuCoreWordType": WORDS[dtype]}
    scan = read_paravision(write_scan(tmp_path / "1", disk, **more))
    np.testing.assert_array_equal(scan.image, values * np.float32(0.5))


def test_every_slice_has_its_slope_and_offset_also_in_reverse_order(tmp_path, stored):
    slope, offset = np.array([1, 2, 4, 0.25]), np.array([0, 10, -3, 1])
    more = {"VisuCoreDataSlope": slope, "VisuCoreDataOffs": offset}
    expected = (stored * slope[:, None, None] + offset[:, None, None]).astype(np.float32)
    plain = read_paravision(write_scan(tmp_path / "1", stored, **more))
    np.testing.assert_array_equal(plain.image, expected)
    more["VisuCoreDiskSliceOrder"] = "disk_reverse_slice_order"
    reverse = read_paravision(write_scan(tmp_path / "2", stored[::-1], **more))
    np.testing.assert_array_equal(reverse.image, expected)
    np.testing.assert_array_equal(reverse.affine, plain.affine)


def test_what_all_frames_share_may_be_written_once_or_run_length(tmp_path, stored):
    plain = read_paravision(write_scan(tmp_path / "1", stored))
    forms = {"VisuCoreDataSlope": "( 4 )\n@4*(0.5)", "VisuCoreDataOffs": "( 4 )\n@4*(0)"}
    packed = read_paravision(write_scan(tmp_path / "2", stored, **forms))
    once = {"VisuCoreDataSlope": [0.5], "VisuCoreDataOffs": [0], "VisuCoreOrientation": np.eye(3).reshape(1, 9)}
    short = read_paravision(write_scan(tmp_path / "3", stored, **once))
    for other in (packed, short):
        np.testing.assert_array_equal(other.image, plain.image)
        np.testing.assert_array_equal(other.affine, plain.affine)


def test_transposed_frames_of_unequal_sides(tmp_path, stored):
    disk = np.ascontiguousarray(stored.transpose(0, 2, 1)).reshape(stored.shape)
    scan = read_paravision(write_scan(tmp_path / "1", disk, VisuCoreTransposition="( 4 )\n1 1 1 1"))
    np.testing.assert_array_equal(scan.image, stored * np.float32(0.5))


@pytest.mark.parametrize("plane", AXES)
@pytest.mark.parametrize("step", [0.5, 0.8, 2.0, -0.8], ids=["overlap", "touching", "gap", "against the normal"])
def test_planes_and_steps(tmp_path, stored, plane, step):
    scan = read_paravision(write_scan(tmp_path / "1", stored, plane=plane, step=step))
    x, y, normal = np.array(AXES[plane]) * [-1, -1, 1]
    expected = np.column_stack([x * 20 / 8, y * 20 / 6, normal * step])
    np.testing.assert_allclose(scan.affine[:3, :3], expected, atol=1e-12)
    assert scan.spacing_mm[0] == pytest.approx(abs(step))
    assert scan.parameters["plane"] == plane
    assert scan.parameters["phase_axis"] == "y"


def test_oblique_stack(tmp_path, stored):
    from scipy.spatial.transform import Rotation

    axes = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix()
    position = np.array([1.0, 2, 3]) + 1.2 * np.arange(4)[:, None] * axes[2]
    more = {"VisuCoreOrientation": np.tile(axes.ravel(), (4, 1)), "VisuCorePosition": position}
    scan = read_paravision(write_scan(tmp_path / "1", stored, **more))
    lps = np.diag([-1, -1, 1, 1]) @ scan.affine
    np.testing.assert_allclose(lps[:3, 3], [1, 2, 3], atol=1e-9)
    np.testing.assert_allclose(lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0), axes.T, atol=1e-9)


@pytest.mark.parametrize(
    ("read", "direction", "axis"),
    [("A_P", None, "x"), ("L_R", "row_dir", "y"), (None, "row_dir", "x"), (None, "col_dir", "y"), (None, None, "y")],
)
def test_phase_axis(tmp_path, stored, read, direction, axis):
    more = {"PVM_SPackArrReadOrient": f"( 1 )\n{read}" if read else None}
    more["VisuAcqImagePhaseEncDir"] = f"( 4 )\n{' '.join([direction] * 4)}" if direction else None
    assert read_paravision(write_scan(tmp_path / "1", stored, **more)).parameters["phase_axis"] == axis


@pytest.mark.parametrize(
    ("written", "date"),
    [
        ("<16:10:12  4 May 2016>", "2016-05-04T16:10:12"),
        ("<2022-03-16T11:57:47,247-0500>", "2022-03-16T11:57:47"),
        ("<yesterday>", ""),
    ],
)
def test_dates_of_all_versions(tmp_path, stored, written, date):
    path = write_scan(tmp_path / "1", stored, VisuAcqDate=written)
    assert read_paravision(path).parameters["date"] == date


def test_one_slice_goes_without_a_frame_group(tmp_path, stored):
    path = write_scan(tmp_path / "1", stored[:1], VisuFGOrderDesc=None, VisuCoreSlicePacksSliceDist="( 1 )\n2.5")
    scan = read_paravision(path)
    assert scan.image.shape == (1, 6, 8)
    np.testing.assert_allclose(scan.affine[:3, 2], [0, 0, 2.5])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_text_in_latin_1_and_utf_8(tmp_path, stored, encoding):
    path = write_scan(tmp_path / "1", stored)
    visu = path.with_name("visu_pars")
    visu.write_bytes(visu.read_text().replace("<mouse01>", "<Mäuschen é>").encode(encoding))
    assert read_paravision(path).parameters["subject"] == "Mäuschen é"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"VisuCoreFrameType": "PHASE_IMAGE"}, "VisuCoreFrameType: PHASE_IMAGE found, expected MAGNITUDE_IMAGE"),
        ({"VisuCoreFrameType": None}, "VisuCoreFrameType: nothing found"),
        ({"VisuCoreDim": 3}, "VisuCoreDim: 3 found, expected 2"),
        ({"VisuCoreDimDesc": "( 2 )\nspectroscopic spatial"}, "VisuCoreDimDesc: spectroscopic spatial found"),
        ({"VisuCoreUnits": "( 2, 65 )\n<ppm> <mm>"}, "VisuCoreUnits: ppm mm found"),
        ({"Method": "<Bruker:MSME>"}, "sequence: Bruker:MSME found, expected RARE"),
        (
            {"VisuFGOrderDesc": "( 1 )\n(4, <FG_CYCLE>, <>, 0, 0)"},
            "frame groups: 4 FG_CYCLE found, expected 4 FG_SLICE",
        ),
        (
            {"VisuFGOrderDesc": "( 2 )\n(2, <FG_COMPLEX>, <>, 0, 0) (2, <FG_SLICE>, <>, 0, 2)"},
            "frame groups: 2 FG_COMPLEX 2 FG_SLICE found",
        ),
        ({"VisuFGOrderDesc": None}, "frame groups: 1 FG_SLICE found, expected 4 FG_SLICE"),
        ({"VisuCoreSlicePacksDef": "(0, 2)"}, "slice packages: 2 found, expected 1"),
        (
            {"VisuCoreFrameCount": 5, "VisuFGOrderDesc": "( 1 )\n(5, <FG_SLICE>, <>, 0, 2)"},
            "384 bytes found, expected 480",
        ),
        ({"VisuCoreSize": [8, 7]}, "384 bytes found, expected 448"),
        ({"VisuCoreWordType": "_64BIT_FLOAT"}, "384 bytes found, expected 0 .* of _64BIT_FLOAT"),
        ({"VisuCorePosition": np.zeros((4, 3))}, "VisuCorePosition: slices at uneven or no distances"),
        ({"VisuCorePosition": np.array([[0, 0, z] for z in (0, 1, 2, 4)])}, "VisuCorePosition: slices at uneven"),
        ({"VisuCorePosition": np.zeros((3, 3))}, "VisuCorePosition: 9 of .* found, expected 4x3 numbers"),
        ({"VisuCorePosition": None}, "VisuCorePosition: .*nothing|VisuCorePosition: 1 of"),
        ({"VisuCoreOrientation": np.full((4, 9), 0.1)}, "VisuCoreOrientation"),
        (
            {"VisuCoreOrientation": np.array([np.eye(3).ravel()] * 3 + [[0, 1, 0, 1, 0, 0, 0, 0, 1]])},
            "VisuCoreOrientation",
        ),
        ({"VisuCoreExtent": [20, 0]}, "VisuCoreOrientation|VisuCoreExtent"),
        ({"VisuCoreDataSlope": [1, 2]}, "VisuCoreDataSlope: 2 of 1 2 found, expected 4 numbers"),
        ({"VisuCoreDataSlope": "( 4 )\nnan 1 1 1"}, "VisuCoreDataSlope"),
        ({"VisuCoreDataOffs": "( 4 )\nall of them"}, "VisuCoreDataOffs"),
        ({"VisuCoreDataSlope": "( 4 )\n@999999999*(0.5)"}, "run-length array"),
        ({"VisuCoreDataSlope": "( 4 )\n@9999*(@9999*(@9999*(0.5)))"}, "run-length array"),
        ({"VisuCoreByteOrder": "middleEndian"}, "expected"),
    ],
)
def test_what_the_rules_do_not_accept_is_refused_with_the_reason(tmp_path, stored, more, reason):
    path = write_scan(tmp_path / "1", stored, **more)
    with pytest.raises(InputError, match=reason) as caught:
        read_paravision(path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["2dseq", "visu_pars"])
@pytest.mark.parametrize("how", ["missing", "empty", "folder", "noise"])
def test_lost_files(tmp_path, stored, lost, how):
    path = write_scan(tmp_path / "1", stored)
    file = path.with_name(lost)
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes(b"" if how == "empty" else bytes(range(256)))
    with pytest.raises(InputError, match=lost):
        read_paravision(path)


def test_scan_without_method_is_known_by_its_visu_pars(tmp_path, stored):
    path = write_scan(tmp_path / "1", stored, VisuAcqSequenceName="( 65 )\n<Bruker:RARE>", VisuAcqNumberOfAverages=3)
    (tmp_path / "1" / "method").unlink()
    assert read_paravision(path).parameters["averages"] == 3


@pytest.mark.parametrize("name", ["pdata/1/visu_pars", "method"])
def test_parameter_files_cut_at_every_tenth_byte(tmp_path, stored, name):
    path = write_scan(tmp_path / "1", stored)
    text = (tmp_path / "1" / name).read_bytes()
    for length in range(0, text.index(b"##END="), 10):
        (tmp_path / "1" / name).write_bytes(text[:length])
        with pytest.raises(InputError, match=rf"{name[-6:]}: (empty file|no ##END= found)"):
            read_paravision(path, pixels=False)


@pytest.mark.real
def test_visu_pars_cut_at_every_tenth_byte_of_a_real_scan(bruker, tmp_path):
    """A number cut in two is still a number, so that a file without its end is never read."""
    folder = bruker / "phantom_letters_rare_pv601_7T/study/6"
    scan = tmp_path / "6"
    (scan / "pdata/1").mkdir(parents=True)
    shutil.copyfile(folder / "method", scan / "method")
    shutil.copyfile(folder / "pdata/1/2dseq", scan / "pdata/1/2dseq")
    text = (folder / "pdata/1/visu_pars").read_bytes()
    whole = read_paravision(folder / "pdata/1/2dseq")
    end = text.index(b"##END=") + 6
    for length in range(0, end, 10):
        (scan / "pdata/1/visu_pars").write_bytes(text[:length])
        with pytest.raises(InputError, match=r"visu_pars: (empty file|no ##END= found)"):
            read_paravision(scan / "pdata/1/2dseq", pixels=False)
    (scan / "pdata/1/visu_pars").write_bytes(text[:end])
    np.testing.assert_array_equal(read_paravision(scan / "pdata/1/2dseq").image, whole.image)


def change(file: Path, **values: str | None) -> None:
    """Give parameters of a real file another value, as text after the = sign; none: take them out."""
    text = file.read_text("latin-1")
    for name, value in values.items():
        text = re.sub(rf"##\${name}=.*?\n(?=##|\$\$)", "", text, flags=re.S)
        line = "" if value is None else f"##${name}={value}\n"
        text = text.replace("##END=", f"{line}##END=")
    file.write_text(text, "latin-1")


def numbers(values: Any) -> str:
    return f"( {len(values)} )\n" + " ".join(f"{value:.12g}" for value in values)


Mutant = Callable[[Path, np.ndarray], np.ndarray | None]


def swapped(path: Path, stored: np.ndarray) -> None:
    path.write_bytes(stored.astype(">i2").tobytes())
    change(path.with_name("visu_pars"), VisuCoreByteOrder="bigEndian")


def sloped(path: Path, stored: np.ndarray, reverse: bool = False) -> np.ndarray:
    slope, offset = 0.5 + np.arange(len(stored)), 10.0 * np.arange(len(stored))
    visu = path.with_name("visu_pars")
    change(visu, VisuCoreDataSlope=numbers(slope), VisuCoreDataOffs=numbers(offset))
    if reverse:
        change(visu, VisuCoreDiskSliceOrder="disk_reverse_slice_order")
        path.write_bytes(stored[::-1].tobytes())
    return (stored * slope[:, None, None] + offset[:, None, None]).astype(np.float32)


def run_length(path: Path, stored: np.ndarray) -> np.ndarray:
    n = len(stored)
    slope, offset = f"( {n} )\n@{n - 1}*(0.25) 4", f"( {n} )\n@{n}*(-3)"
    change(path.with_name("visu_pars"), VisuCoreDataSlope=slope, VisuCoreDataOffs=offset)
    slopes = np.array([0.25] * (n - 1) + [4])
    return (stored * slopes[:, None, None] - 3).astype(np.float32)


def words(dtype: str) -> Mutant:
    def mutant(path: Path, stored: np.ndarray) -> np.ndarray | None:
        values = (stored % 250).astype(dtype)
        path.write_bytes(values.tobytes())
        n = len(stored)
        visu = path.with_name("visu_pars")
        change(
            visu, VisuCoreWordType=WORDS[dtype], VisuCoreDataSlope=numbers([2] * n), VisuCoreDataOffs=numbers([1] * n)
        )
        return 2 * values.astype(np.float32) + 1

    return mutant


def latin(path: Path, stored: np.ndarray) -> None:
    change(path.with_name("visu_pars"), VisuSubjectId="( 65 )\n<M\xe4use\xb5>", VisuSubjectName="( 65 )\n<J\xf6rg>")


def framed(**values: str) -> Mutant:
    def mutant(path: Path, stored: np.ndarray) -> None:
        change(path.with_name("visu_pars"), **values)

    return mutant


def repeated(group: str) -> Mutant:
    def mutant(path: Path, stored: np.ndarray) -> None:
        n = len(stored)
        path.write_bytes(stored.tobytes() * 2)
        groups = f"( 2 )\n(2, <{group}>, <>, 0, 0) ({n}, <FG_SLICE>, <>, 0, 2)"
        change(path.with_name("visu_pars"), VisuCoreFrameCount=str(2 * n), VisuFGOrderDesc=groups)

    return mutant


def moved(*places: int) -> Mutant:
    """The slices of these numbers along the normal in place of the scan's own."""

    def mutant(path: Path, stored: np.ndarray) -> None:
        affine = np.diag([-1, -1, 1, 1]) @ read_paravision(path, pixels=False).affine
        position = affine[:3, 3] + np.array(places)[:, None] * affine[:3, 2]
        text = f"( {len(places)}, 3 )\n" + " ".join(f"{value:.9g}" for value in position.ravel())
        change(path.with_name("visu_pars"), VisuCorePosition=text)

    return mutant


EQUAL: dict[str, Mutant] = {
    "byte order swapped": swapped,
    "a slope and an offset per slice": sloped,
    "slices reversed on the disk": lambda path, stored: sloped(path, stored, reverse=True),
    "run-length arrays": run_length,
    "8 bits": words("uint8"),
    "32 bits": words("int32"),
    "floats": words("float32"),
    "Latin-1 names": latin,
    "no word of packages": framed(VisuCoreSlicePacksDef=None, VisuCoreSlicePacksSlices=None),
}
REFUSED_MUTANTS: dict[str, Mutant] = {
    "VisuCoreFrameType: PHASE_IMAGE found": framed(VisuCoreFrameType="PHASE_IMAGE"),
    "VisuCoreFrameType: REAL_IMAGE IMAGINARY_IMAGE found": framed(
        VisuCoreFrameType="( 2 )\nREAL_IMAGE IMAGINARY_IMAGE"
    ),
    "frame groups: 2 FG_COMPLEX 9 FG_SLICE found": repeated("FG_COMPLEX"),
    "frame groups: 2 FG_CYCLE 9 FG_SLICE found": repeated("FG_CYCLE"),
    "frame groups: 2 FG_MOVIE 9 FG_SLICE found": repeated("FG_MOVIE"),
    "frame groups: 2 FG_ECHO 9 FG_SLICE found": repeated("FG_ECHO"),
    "slice packages: 2 found": framed(VisuCoreSlicePacksDef="(0, 2)"),
    "VisuCorePosition: slices at uneven": moved(0, 1, 2, 3, 4, 5, 6, 7, 9),
    "VisuCorePosition: slices at uneven or no distances": moved(0, 1, 2, 3, 4, 4, 5, 6, 7),
    "VisuCorePosition: slices at uneven or": moved(0, 2, 4, 6, 8, 1, 3, 5, 7),
    "552959 bytes found, expected 552960": lambda path, stored: path.write_bytes(stored.tobytes()[:-1]),
    "1105920 bytes found, expected 552960": lambda path, stored: path.write_bytes(stored.tobytes() * 2),
}


@pytest.fixture
def letters(bruker, tmp_path) -> Path:
    """A copy of a real scan of 9 slices that may be changed; its 2dseq."""
    source, study = bruker / "phantom_letters_rare_pv601_7T/study", tmp_path / "study"
    for name in ("subject", "6/method", "6/acqp", "6/pdata/1/visu_pars", "6/pdata/1/2dseq"):
        if (source / name).exists():
            (study / name).parent.mkdir(parents=True, exist_ok=True)
            (study / name).write_bytes((source / name).read_bytes())
    return study / "6/pdata/1/2dseq"


@pytest.mark.real
@pytest.mark.parametrize("mutant", EQUAL)
def test_other_forms_of_a_real_scan_give_the_same_image_and_place(letters, mutant):
    whole = read_paravision(letters)
    stored = np.fromfile(letters, "<i2").reshape(whole.image.shape)
    expected = EQUAL[mutant](letters, stored)
    scan = read_paravision(letters)
    np.testing.assert_allclose(scan.image, whole.image if expected is None else expected, rtol=1e-6)
    np.testing.assert_array_equal(scan.affine, whole.affine)
    assert scan.parameters | {"subject": ""} == whole.parameters | {"subject": ""}
    assert (scan.parameters["subject"] == "Mäuseµ") == (mutant == "Latin-1 names")
    assert "Jörg" not in json.dumps(scan.parameters, ensure_ascii=False)


@pytest.mark.real
@pytest.mark.parametrize("reason", REFUSED_MUTANTS)
def test_real_scan_made_into_what_is_not_read(letters, reason):
    stored = np.fromfile(letters, "<i2").reshape(read_paravision(letters).image.shape)
    REFUSED_MUTANTS[reason](letters, stored)
    for pixels in (False, True):
        with pytest.raises(InputError, match=reason):
            read_paravision(letters, pixels=pixels)


@pytest.mark.real
def test_lowest_of_several_real_recos_is_taken_and_both_show_the_same(bruker):
    scan = bruker / "phantom_letters_rare_pv601_7T/study/2"
    assert sorted(path.name for path in (scan / "pdata").iterdir()) == ["1", "2"]
    assert index_scan(scan)[0] == "1"
    one, other = (read_paravision(scan / f"pdata/{reco}/2dseq") for reco in ("1", "2"))
    np.testing.assert_array_equal(one.affine, other.affine)
    assert np.corrcoef(one.image.ravel(), other.image.ravel())[0, 1] > 0.99  # 16 and 8 bits


@pytest.mark.real
@pytest.mark.parametrize(("scan", "relation"), [("5", 1), ("6", -1), ("2", 0)], ids=["gap", "overlap", "touching"])
def test_gaps_and_overlaps_of_real_scans(bruker, scan, relation):
    path = bruker / f"rat_head_rare_pv51_4T7/study/{scan}/pdata/1/2dseq"
    found = read_paravision(path, pixels=False)
    assert np.sign(round(found.spacing_mm[0] - found.parameters["thickness_mm"], 3)) == relation


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_text_never_ends_in_a_traceback(tmp_path, stored, data):
    scan = tmp_path / "1"
    path = scan / "pdata/1/2dseq"
    if not path.exists():
        write_scan(scan, stored)
        shutil.copyfile(path.with_name("visu_pars"), tmp_path / "visu_pars")
    text = bytearray((tmp_path / "visu_pars").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        text[start : start + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    path.with_name("visu_pars").write_bytes(text)
    try:
        scan = read_paravision(path)
    except InputError:
        return
    assert np.isfinite(scan.affine).all()
    assert scan.image.size == stored.size


def test_scans_are_found_at_any_depth_and_links_are_followed_once(tmp_path, stored):
    raw = tmp_path / "raw"
    for name in ("b/study/10", "b/study/9", "a/1"):
        write_scan(raw / name, stored)
    (raw / "b" / "notes").mkdir()
    (raw / "again").symlink_to(raw / "b", target_is_directory=True)
    (raw / "b" / "loop").symlink_to(raw, target_is_directory=True)
    found = [str(path.relative_to(raw)) for path in scan_folders(raw)]
    assert sorted(Path(path).name for path in found) == ["1", "10", "9"]
    assert found[-2:] in (["b/study/9", "b/study/10"], ["again/study/9", "again/study/10"])
    with pytest.raises(InputError, match="no such folder"):
        scan_folders(tmp_path / "nothing")


def test_lowest_reconstruction_that_counts(tmp_path, stored):
    scan = tmp_path / "1"
    write_scan(scan, stored, reco=10)
    write_scan(tmp_path / "other", stored, VisuCoreFrameType="PHASE_IMAGE")
    shutil.move(tmp_path / "other/pdata/1", scan / "pdata/2")
    assert index_scan(scan)[0] == "10"
    shutil.rmtree(scan / "pdata/10")
    reco, found, reason = index_scan(scan)
    assert (reco, found) == ("2", {})
    assert reason == "pdata/2/visu_pars: VisuCoreFrameType: PHASE_IMAGE found, expected MAGNITUDE_IMAGE"
    shutil.rmtree(scan / "pdata/2")
    assert index_scan(scan)[2] == "pdata: empty folder, expected a reconstruction"
