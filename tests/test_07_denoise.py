"""Stage 07 and its modules: geometry, intensities, formats, privacy, watching, refusals."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import importlib
import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from scipy import fft

import anchored
import common
import formats
import likeness
import networks
from common import InputError
from paravision import Scan, read_paravision

stage = importlib.import_module("07_denoise")
training = importlib.import_module("03_train_unet")

REPO = Path(__file__).resolve().parents[1]
BRUKER = REPO.parent / "shared" / "bruker"
real = pytest.mark.real
needs_real = pytest.mark.skipif(not BRUKER.is_dir(), reason="no real scanner data beside the project")
LOW, SLICES = 32, 4
NAME, SUBJECT = "Ada^Lovelace", "m42"


# ---------------------------------------------------------------- data


def animal(seed: int, matrix: int = LOW, noise: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """A noisy low image, and a high one of twice its matrix, of the same round animal with spots, around 100."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: 2 * matrix, : 2 * matrix] / (2 * matrix) - 0.5
    high = []
    for _ in range(SLICES):
        image = 100 / (1 + np.exp((np.hypot(y / 0.34, x / 0.28) - 1) * 25))
        for _ in range(12):
            cy, cx = rng.uniform(-0.2, 0.2, 2)
            image += rng.uniform(-40, 60) * np.exp(
                -(((y - cy) ** 2 + (x - cx) ** 2) / (2 * rng.uniform(0.02, 0.05) ** 2))
            )
        high.append(np.abs(image))
    spectrum = fft.fftshift(fft.fft2(np.array(high)), axes=(1, 2))[
        :, matrix // 2 : -matrix // 2, matrix // 2 : -matrix // 2
    ]
    pair = []
    for k in (spectrum, fft.fftshift(fft.fft2(np.array(high)), axes=(1, 2))):
        image = fft.ifft2(fft.ifftshift(k, axes=(1, 2))) * k[0].size / (4 * matrix**2)
        pair.append(
            np.abs(image + noise * (rng.normal(size=k.shape) + 1j * rng.normal(size=k.shape))).astype(np.float32)
        )
    return pair[0], pair[1]


def jcamp(**values: object) -> str:
    lines = [f"##${name}={value}" for name, value in values.items()]
    return "\n".join(["##TITLE=Parameter List", "##JCAMPDX=4.24", *lines, "##END=", ""])


def listed(values: object, *shape: int) -> str:
    return f"( {', '.join(map(str, shape))} )\n" + " ".join(f"{v:.12g}" for v in np.ravel(values))


def write_study(
    study: Path, scans: dict[int, np.ndarray], fov_mm: tuple[float, float] = (30.0, 30.0), subject: str = SUBJECT
) -> None:
    """A study of ParaVision with oblique RARE scans, as few parameters as the reader needs."""
    c, s = np.cos(0.3), np.sin(0.3)
    axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    for number, image in scans.items():
        n, ny, nx = image.shape
        folder = study / str(number) / "pdata" / "1"
        folder.mkdir(parents=True)
        slope = float(image.max()) / 32000
        np.rint(image / slope).astype("<i2").tofile(folder / "2dseq")
        position = [[-14.0, -15.5, 1.5 * i - 2] for i in range(n)]
        visu = jcamp(
            VisuCreatorVersion="( 65 )\n<6.0.1>",
            VisuCoreFrameCount=n,
            VisuCoreDim=2,
            VisuCoreSize=listed([nx, ny], 2),
            VisuCoreDimDesc="( 2 )\nspatial spatial",
            VisuCoreUnits="( 2, 65 )\n<mm> <mm>",
            VisuCoreExtent=listed(fov_mm, 2),
            VisuCoreFrameType="( 1 )\nMAGNITUDE_IMAGE",
            VisuCoreWordType="_16BIT_SGN_INT",
            VisuCoreByteOrder="littleEndian",
            VisuCoreFrameThickness=listed([0.6], 1),
            VisuCoreOrientation=listed([axes] * n, n, 9),
            VisuCorePosition=listed(position, n, 3),
            VisuCoreDataSlope=listed([slope] * n, n),
            VisuCoreDataOffs=listed([0] * n, n),
            VisuFGOrderDescDim=1,
            VisuFGOrderDesc=f"( 1 )\n({n}, <FG_SLICE>, <>, 0, 2)",
            VisuSubjectName=f"( 65 )\n<{NAME}>",
            VisuSubjectId=f"( 65 )\n<{subject}>",
            VisuStudyUid="( 65 )\n<1.2.3.4>",
            VisuAcqSequenceName="( 40 )\n<Bruker:RARE>",
        )
        (folder / "visu_pars").write_text(visu)
        (study / str(number) / "method").write_text(
            jcamp(
                Method="<Bruker:RARE>",
                PVM_RepetitionTime=4000,
                EffectiveTE="( 1 )\n37.1",
                PVM_EncMatrix=listed([nx, ny], 2),
            )
        )
        (study / str(number) / "acqp").write_text(jcamp(ACQ_scan_name="( 64 )\n<low>"))
    (study / "subject").write_text(jcamp(SUBJECT_id=f"( 60 )\n<{subject}>", SUBJECT_name_string=f"( 64 )\n<{NAME}>"))


def write_pairs(root: Path, subjects: dict[str, str]) -> None:
    """Training pairs of round animals, one scan a subject."""
    store, settings = root / "data" / "pairs.zarr", {"align": "centres", "upsample": "fourier", "normalise": "mean"}
    for number, (subject, split) in enumerate(subjects.items()):
        low, high = animal(number)
        low = common.upsample(low, 2, "fourier")
        y0, y1, x0, x1 = box = common.crop_box(common.body_mask(low), 8)
        scale, offset = common.normalisation(low[:, y0:y1, x0:x1], "mean")
        images = {
            name: volume[:, y0:y1, x0:x1] / scale[:, None, None] for name, volume in (("low", low), ("high", high))
        }
        arrays = images | {"scale": scale, "offset": offset, "slice_index": np.arange(SLICES, dtype=np.int32)}
        arrays["split"] = np.full(SLICES, common.SPLITS.index(split), np.uint8)
        spacing = (1.5, 30 / (2 * LOW), 30 / (2 * LOW))
        attributes = {"box": box, "full_shape": high.shape, "ratio": (2, 2), "spacing_mm": spacing, "subject": subject}
        common.write_scan(store, f"{subject}/HT/axial", arrays, attributes)
    keys = [f"{subject}/HT/axial" for subject in subjects]
    common.finish_store(store, keys, {"fingerprint": "pairs", "settings": settings | {"margin": 8}, "splits": {}})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An experiment with a network that was trained for seconds."""
    root = tmp_path_factory.mktemp("experiment")
    write_pairs(root, {"a1": "train", "a2": "train", "a3": "train", "b1": "validation"})
    settings = dataclasses.replace(
        training.PRESETS["smoke"], root=root, features_main=(8, 16), patch=48, precision="float32", threads=1
    )
    training.run(settings)
    return root


@pytest.fixture
def study(tmp_path) -> Path:
    """A low scan (2) and a high one (1)."""
    low, high = animal(9)
    write_study(tmp_path / "study", {1: high, 2: low})
    return tmp_path / "study"


def settings(root: Path, tmp_path: Path, *inputs: Path, **changes: object):
    return dataclasses.replace(stage.PRESETS["smoke"], root=root, inputs=inputs, out=tmp_path / "out", **changes)


def run(root: Path, tmp_path: Path, *inputs: Path, **changes: object) -> list[dict]:
    return stage.run(settings(root, tmp_path, *inputs, **changes))["scans"]


def load(tmp_path: Path, record: dict, kind: str = "restored") -> tuple[np.ndarray, np.ndarray]:
    """A written volume (slice, y, x) and its affine."""
    found = nibabel.load(tmp_path / "out" / f"{record['name']}_{kind}.nii.gz")
    return np.asarray(found.dataobj).transpose(2, 1, 0), found.affine


def low_of(study: Path) -> Scan:
    return read_paravision(study / "2" / "pdata" / "1" / "2dseq")


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    return {str(p): (p.stat().st_mtime_ns, common.sha256(p)) for p in sorted(folder.rglob("*")) if p.is_file()}


def header_names(folder: Path) -> set[str]:
    """Every name in the headers below a folder, whole and in parts, found by another rule than the stage's."""
    names: set[str] = set()
    for file in folder.rglob("*"):
        if file.name in ("subject", "visu_pars"):
            lines = file.read_text("latin-1").splitlines()
            for line, after in zip(lines, [*lines[1:], ""], strict=True):
                if line.startswith(("##$SUBJECT_name", "##$VisuSubjectName")):
                    names.update(re.findall("<(.+?)>", line if "<" in line else after))
    parts = {part for name in names for part in re.split(r"[ ^_,-]+", name) if len(part) > 4}
    return {name.casefold() for name in names | parts if len(name) > 4}


def everything_written(folder: Path) -> str:
    """All bytes of all outputs, and their names."""
    text = ""
    for file in folder.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        text += f"{file.name} " + (gzip.decompress(data) if file.name.endswith(".gz") else data).decode("latin-1")
    return text.casefold()


# ---------------------------------------------------------------- geometry and intensity


def corners(shape: tuple[int, ...], affine: np.ndarray, step: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Scanner coordinates of the corner voxels and of the centre of a grid (slice, y, x)."""
    n, ny, nx = shape
    points = [(x, y, z, 1) for x in (0, nx - 1) for y in (0, ny - 1) for z in (0, n - 1)]
    points.append(((nx - 1) / 2, (ny - 1) / 2, (n - 1) / 2, 1))
    return (affine @ (np.array(points) * (step[1], step[0], 1, 1)).T).T[:, :3]


@real
@needs_real
def test_every_accepted_real_scan_lies_on_its_input_and_stays_untouched(root, tmp_path, capsys):
    before = tree(BRUKER)
    records = {r["name"]: r for r in run(root, tmp_path, BRUKER, all=True)}
    said = capsys.readouterr().out
    assert tree(BRUKER) == before
    accepted = 0
    for path in sorted(BRUKER.rglob("2dseq")):
        try:
            scan = read_paravision(path)
        except InputError:
            continue
        name = formats.read_scan(path)[1]
        if name not in records:
            assert path.parent.name != "1"  # a second reconstruction: the lowest one is taken
            continue
        accepted += 1
        image, affine = load(tmp_path, records[name])
        assert image.shape == (len(scan.image), *(2 * n for n in scan.image.shape[1:]))
        apart = corners(scan.image.shape, affine, (2, 2)) - corners(scan.image.shape, scan.affine)
        assert np.abs(apart).max() < 1e-3  # mm
        assert np.isfinite(image).all()
        assert records[name]["warnings"]  # none of them is like the round animals
    assert accepted >= 14
    written = everything_written(tmp_path / "out") + said.casefold()
    names = header_names(BRUKER)
    assert {"anon perso", "fantome-nouille", "anonym", "test_irm"} <= names
    assert [name for name in names if name in written] == []


@real
@needs_real
def test_golden_affines_of_an_independent_decoder(root, tmp_path):
    folder = BRUKER / "mouse_brain_rare_pv360_36_9T4"
    golden = json.loads((folder / "EXPECTED.json").read_text())["study/5/pdata/1/2dseq"]
    (record,) = run(root, tmp_path, folder / "study" / "5")
    image, affine = load(tmp_path, record)
    nx, ny, n = golden["shape"]
    wanted = np.diag([-1, -1, 1, 1]) @ np.array(golden["packages"][0]["affine_LPS"])
    apart = corners((n, ny, nx), affine, (2, 2)) - corners((n, ny, nx), wanted)
    assert np.abs(apart).max() < 1e-3
    assert image.shape == (n, 2 * ny, 2 * nx)


@pytest.mark.parametrize("ratio", [(2, 2), (3, 1)])
def test_grid_and_consistency_of_any_ratio(ratio):
    rng = np.random.default_rng(3)
    low = rng.normal(size=(2, 12, 10)).astype(np.float32) + 5
    affine = np.vstack([rng.normal(size=(3, 4)), [0, 0, 0, 1]])
    fine = common.upsample(low, ratio, "fourier")
    point = np.array([7, 5, 1, 1])
    assert np.allclose(stage.high_affine(affine, ratio) @ (point * (ratio[1], ratio[0], 1, 1)), affine @ point)
    image = rng.normal(size=fine.shape).astype(np.float32)
    kept = np.abs(fft.fftfreq(fine.shape[1], 1 / 12 / ratio[0]))[:, None] <= 6
    kept = kept & (np.abs(fft.fftfreq(fine.shape[2], 1 / 10 / ratio[1])) <= 5)
    wanted, was = fft.fft2(fine.astype(float)), fft.fft2(image.astype(float))
    for amount in (0.5, 1.0):
        found = fft.fft2(stage.consistent(image, fine, ratio, amount).astype(float))
        scale = np.abs(wanted).max()
        assert np.abs(found - was - amount * (wanted - was))[:, kept].max() < 1e-6 * scale
        assert np.abs(found - was)[:, ~kept].max(initial=0) < 1e-6 * scale


def test_consistency_one_gives_the_measured_centre_of_k_space(root, tmp_path, study):
    (free,) = run(root, tmp_path, study / "2")
    image, _ = load(tmp_path, free)
    (record,) = run(root, tmp_path, study / "2", consistency=1.0)
    bound, _ = load(tmp_path, record)
    low = low_of(study).image.astype(float)
    half = LOW // 2
    inner = (slice(None), slice(half + 1, -half), slice(half + 1, -half))  # of the high k-space, without Nyquist
    centre = fft.fftshift(fft.fft2(low), axes=(1, 2))[:, 1:, 1:] * 4  # straight from the measured pixels
    found, before = (fft.fftshift(fft.fft2(i.astype(float)), axes=(1, 2)) for i in (bound, image))
    size = np.linalg.norm(centre)
    assert np.linalg.norm(found[inner] - centre) < 1e-6 * size
    assert np.abs(found[inner] - centre).max() < 1e-6 * np.abs(centre).max()
    assert np.linalg.norm(before[inner] - centre) > 1e-3 * size  # the network alone does not do that
    outer = np.ones(found.shape[1:], bool)
    outer[half : -half + 1, half : -half + 1] = False
    assert np.allclose(found[:, outer], before[:, outer], atol=1e-6 * np.abs(centre).max())


def test_strength_blends_with_the_upsampled_low_image(root, tmp_path, study):
    low = common.upsample(low_of(study).image, 2, "fourier")
    images = {s: load(tmp_path, run(root, tmp_path, study / "2", strength=s)[0])[0] for s in (0.0, 0.5, 1.0)}
    assert np.array_equal(images[0.0], low)
    assert np.allclose(images[0.5], (images[0.0] + images[1.0]) / 2, atol=1e-4 * low.max())
    assert np.abs(images[1.0] - low).max() > 0.02 * low.max()


def test_restored_keeps_the_intensities_of_its_input(root, tmp_path, study):
    (record,) = run(root, tmp_path, study / "2", residual=True)
    image, _ = load(tmp_path, record)
    residual, _ = load(tmp_path, record, "residual")
    low = common.upsample(low_of(study).image, 2, "fourier")
    body = common.body_mask(low)
    assert abs(image[body].mean() / low[body].mean() - 1) < 0.01
    assert abs(record["figures"]["mean_ratio"] - image[body].mean() / low[body].mean()) < 1e-6
    assert np.allclose(residual, image - low, atol=1e-4)
    high = read_paravision(study / "1" / "pdata" / "1" / "2dseq").image  # and it is nearer to the truth
    assert np.square(image - high)[body].mean() < np.square(low - high)[body].mean()


def test_scale_of_the_input_is_that_of_the_output(root, tmp_path, study):
    (one,) = run(root, tmp_path, study / "2")
    visu = study / "2" / "pdata" / "1" / "visu_pars"
    text = visu.read_text()
    slope = re.search(r"VisuCoreDataSlope=\( 4 \)\n(\S+)", text)[1]
    visu.write_text(text.replace(slope, f"{float(slope) * 1000:.12g}"))
    (other,) = run(root, tmp_path, study / "2")
    small, large = load(tmp_path, one)[0], load(tmp_path, other)[0]
    assert np.allclose(large, 1000 * small, rtol=1e-4, atol=1e-3 * large.max())


def test_zoom_of_the_report_is_given_to_the_network_but_the_low_image_stays_aligned(root, tmp_path, study):
    content = networks.load_checkpoint(root / "runs" / "unet" / "best.pt")
    content["data"]["settings"] |= {"align": "none", "upsample": "nearest"}
    networks.save_checkpoint(tmp_path / "none.pt", content)
    (record,) = run(root, tmp_path, study / "2", model=tmp_path / "none.pt", strength=0.0)
    image, _ = load(tmp_path, record)
    low = low_of(study).image
    assert np.array_equal(image, common.upsample(low, 2, "nearest"))
    (record,) = run(root, tmp_path, study / "2", model=tmp_path / "none.pt")
    image, _ = load(tmp_path, record)
    zoomed = low.repeat(2, axis=1).repeat(2, axis=2)
    y0, y1, x0, x1 = common.crop_box(common.body_mask(zoomed), 8)
    mean = zoomed[:, y0:y1, x0:x1].mean(axis=(1, 2))
    net, _ = networks.load_unet(tmp_path / "none.pt")
    wanted = networks.restore(net, zoomed, mean, 0 * mean, flips=True)
    assert np.allclose(image, wanted, atol=1e-2 * wanted.max())
    assert not np.allclose(image[:, 1:], wanted[:, :-1], atol=1e-2 * wanted.max())


def test_slices_without_signal_pass_through(root, tmp_path):
    low, _ = animal(9)
    low[1] = 0
    write_study(tmp_path / "study", {2: low})
    image, _ = load(tmp_path, run(root, tmp_path, tmp_path / "study" / "2")[0])
    assert not image[1].any()
    assert np.isfinite(image).all()
    assert image[0].any()


# ---------------------------------------------------------------- formats


def test_nifti_in_equals_paravision_in(root, tmp_path, study):
    scan = low_of(study)
    (record,) = run(root, tmp_path, study / "2")
    wanted, affine = load(tmp_path, record)
    volume = nibabel.Nifti1Image(scan.image.transpose(2, 1, 0)[..., None], np.diag([1e3, 1e3, 1e3, 1]) @ scan.affine)
    volume.header.set_xyzt_units("micron")
    volume.header["descrip"] = b"Ada Lovelace"
    nibabel.save(volume, tmp_path / "scan.nii")
    (other,) = run(root, tmp_path, tmp_path / "scan.nii")
    image, found = load(tmp_path, other)
    assert np.allclose(image, wanted, atol=1e-5 * wanted.max())
    assert np.abs(corners(image.shape, found) - corners(image.shape, affine)).max() < 1e-3
    header = nibabel.load(tmp_path / "out" / f"{other['name']}_restored.nii.gz").header
    assert header.get_xyzt_units()[0] == "mm"
    assert b"restored by unet" in bytes(header["descrip"])
    assert np.allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_dicom_out_and_in(root, tmp_path):
    study = tmp_path / "study"
    write_study(study, {2: animal(9)[0]}, fov_mm=(30.0, 24.0))
    (record,) = run(root, tmp_path, study / "2", dicom=True)
    wanted, affine = load(tmp_path, record)
    folder = tmp_path / "out" / f"{record['name']}_dicom"
    scan = formats.read_dicom(folder)
    half = (wanted.max() - wanted.min()) / 65535 / 2
    assert np.abs(scan.image - wanted).max() <= half + 4e-7 * wanted.max()
    assert np.abs(corners(wanted.shape, scan.affine) - corners(wanted.shape, affine)).max() < 1e-3
    assert (scan.parameters["tr_ms"], scan.parameters["te_ms"], scan.parameters["subject"]) == (4000, 37.1, SUBJECT)
    headers = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    first = headers[0]
    assert list(first.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    assert "restored by unet" in first.DerivationDescription
    assert (str(first.PatientName), first.PatientID, first.StudyInstanceUID) == ("", SUBJECT, "1.2.3.4")
    assert len({h.SOPInstanceUID for h in headers}) == len(headers) == SLICES
    assert len({h.SeriesInstanceUID for h in headers}) == 1

    # A low scan in DICOM: the same result as from ParaVision up to 16 bits, in its own study and frame of reference.
    formats.write_dicom(tmp_path / "low", low_of(study), "mark", "low")
    given = pydicom.dcmread(tmp_path / "low" / "0001.dcm")
    (other,) = run(root, tmp_path, tmp_path / "low", dicom=True)
    image, found = load(tmp_path, other)
    assert np.abs(image - wanted).max() < 1e-3 * wanted.max()
    assert np.abs(corners(image.shape, found) - corners(image.shape, affine)).max() < 1e-3
    again = pydicom.dcmread(tmp_path / "out" / f"{other['name']}_dicom" / "0001.dcm")
    assert again.FrameOfReferenceUID == given.FrameOfReferenceUID
    assert again.SeriesInstanceUID != given.SeriesInstanceUID


def test_enhanced_dicom_equals_classic(tmp_path, study):
    formats.write_dicom(tmp_path / "low", low_of(study), "mark", "low")
    classic = formats.read_dicom(tmp_path / "low")
    headers = [pydicom.dcmread(path) for path in sorted((tmp_path / "low").iterdir())]
    whole = copy.deepcopy(headers[0])
    whole.NumberOfFrames = len(headers)
    frames = []
    for header in headers[::-1]:  # frames out of order
        frame, place = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = header.ImagePositionPatient
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    whole.PixelData = b"".join(h.PixelData for h in headers[::-1])
    shared, measures, plane = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = whole.PixelSpacing, whole.SliceThickness
    plane.ImageOrientationPatient = whole.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(whole, name)
    whole.PerFrameFunctionalGroupsSequence, whole.SharedFunctionalGroupsSequence = frames, [shared]
    (tmp_path / "enhanced").mkdir()
    whole.save_as(tmp_path / "enhanced" / "all.dcm")
    found = formats.read_dicom(tmp_path / "enhanced")
    assert np.array_equal(found.image, classic.image)
    assert np.allclose(found.affine, classic.affine)


def test_page_and_picture_say_what_is_unlike_the_training(root, tmp_path):
    low, _ = animal(9, noise=25.0)
    write_study(tmp_path / "study", {2: low}, fov_mm=(60.0, 60.0))
    (record,) = run(root, tmp_path, tmp_path / "study", png=True, html=True)
    text = " ".join(record["warnings"])
    for word in ("pixel along y is 1.875 mm", "field of view along x is 60 mm", "signal-to-noise ratio is"):
        assert word in text
    assert "matrix" not in text
    assert (tmp_path / "out" / f"{record['name']}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / f"{record['name']}.html").read_text()
    assert "60 mm" in page
    assert "<td>30 mm</td>" in page
    assert page.count("src=") == 1
    assert "data:image/png" in page


def test_a_scan_like_the_training_scans_has_no_warning(root, tmp_path, study):
    known = networks.load_checkpoint(root / "runs" / "unet" / "best.pt")["data"]["range"]
    assert known["scans"] == 3
    assert (known["ratios"], known["matrices"]) == ([[2, 2]], [[LOW, LOW]])
    assert known["limits"]["fov_x_mm"] == [30, 30]
    (record,) = run(root, tmp_path, study)  # of the study only the low scan has the matrix of the training scans
    unlike = [row[0] for row in record["comparison"] if not row[3]]
    assert set(unlike) <= {likeness.FIGURES["snr"][0], likeness.FIGURES["contrast"][0]}
    assert len(record["warnings"]) == len(unlike)


@pytest.mark.parametrize("noise", [0.5, 2.0])
@pytest.mark.parametrize("air", [True, False])
def test_noise_level_is_measured(noise, air):
    rng = np.random.default_rng(1)
    signal = np.full((6, 60, 60), 30.0)
    body = np.ones(signal.shape, bool)
    if air:
        body[:, :15] = False
    signal[~body] = 0
    image = np.abs(signal + noise * (rng.normal(size=signal.shape) + 1j * rng.normal(size=signal.shape)))
    assert abs(likeness.noise_level(image, body) / noise - 1) < 0.05


# ---------------------------------------------------------------- models


def test_what_the_checkpoint_does_not_say_is_measured_from_its_pairs(root, tmp_path, study):
    content = networks.load_checkpoint(root / "runs" / "unet" / "best.pt")
    known = content["data"].pop("range")
    networks.save_checkpoint(tmp_path / "old.pt", content)
    with_pairs = settings(root, tmp_path, study / "2", model=tmp_path / "old.pt")
    assert stage.load_model(with_pairs).known == known
    alone = dataclasses.replace(with_pairs, root=tmp_path)
    with pytest.raises(InputError, match="--ratio"):
        stage.run(alone)
    (record,) = stage.run(dataclasses.replace(alone, ratio=2))["scans"]
    assert any("unknown" in text for text in record["warnings"])


def test_uncertainty_of_an_apddm(root, tmp_path, study):
    unet = networks.load_checkpoint(root / "runs" / "unet" / "best.pt")
    how = {"timesteps": "all", "parametrization": "residual", "condition": False, "embedding": 8, "rotations": True}
    how |= {"steps": 2, "samples": 3, "eta": 1.0, "noisy_start": True}
    content = {"stage": "apddm", "config": how, "network": unet["network"], "bank": [], "data": unet["data"]}
    content["path"] = {"weights": torch.sin(torch.linspace(0.1, 3, 8, dtype=torch.float64)), "beta": 0.2}
    content |= {"weights": anchored.APDDM(content).net.state_dict(), "interval": {"factor": 2.5, "coverage": 0.9}}
    networks.save_checkpoint(tmp_path / "apddm.pt", content)
    asked = {"model": tmp_path / "apddm.pt", "uncertainty": True}
    (record,) = run(root, tmp_path, study / "2", **asked)
    image, _ = load(tmp_path, record)
    width, _ = load(tmp_path, record, "uncertainty")
    assert record["uncertainty"] == "half width of the 90% interval"
    assert width.shape == image.shape
    assert (width > 0).mean() > 0.9
    (raw,) = run(root, tmp_path, study / "2", samples=4, **asked)
    assert raw["uncertainty"] == "standard deviation over the samples"
    with pytest.raises(InputError, match="2 or more samples"):
        run(root, tmp_path, study / "2", samples=1, **asked)
    with pytest.raises(InputError, match="unet"):
        run(root, tmp_path, study / "2", uncertainty=True)


# ---------------------------------------------------------------- privacy


def test_no_output_holds_the_name(root, tmp_path, study, capsys):
    run(root, tmp_path, study / "2", png=True, html=True, dicom=True, residual=True)
    written = everything_written(tmp_path / "out") + capsys.readouterr().out.casefold()
    names = header_names(study)
    assert names == {"ada^lovelace", "lovelace"}
    assert [name for name in names if name in written] == []
    assert SUBJECT in written


def test_an_id_that_holds_a_name_is_replaced(root, tmp_path):
    write_study(tmp_path / "study", {2: animal(9)[0]}, subject="group7 lovelace")
    (record,) = run(root, tmp_path, tmp_path / "study", html=True, dicom=True)
    assert record["name"].startswith("subject-")
    assert "lovelace" not in everything_written(tmp_path / "out")
    assert formats.public_id("mouse07", ["Ada^Lovelace"]) == "mouse07"
    assert formats.public_id("x lovelace 3", ["Ada^Lovelace"]).startswith("subject-")
    assert formats.public_id("group^3/a", [""]) == "group-3-a"


# ---------------------------------------------------------------- runs and watching


def test_what_is_up_to_date_stays(root, tmp_path, study, capsys):
    (first,) = run(root, tmp_path, study / "2")
    before = tree(tmp_path / "out")
    (again,) = run(root, tmp_path, study / "2")
    assert tree(tmp_path / "out") == before
    assert again["fingerprint"] == first["fingerprint"]
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "out" / first["files"][0]).unlink()
    run(root, tmp_path, study / "2")
    assert (tmp_path / "out" / first["files"][0]).exists()
    (full,) = run(root, tmp_path, study / "2", residual=True, dicom=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*full["files"], f"{full['name']}.json"}
    assert len(full["files"]) == 3
    (changed,) = run(root, tmp_path, study / "2", consistency=0.5)  # what belongs to other settings goes
    assert changed["fingerprint"] != first["fingerprint"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*first["files"], f"{first['name']}.json"}


def test_a_study_gives_the_scans_of_the_trained_matrix_or_all(root, tmp_path, study):
    assert [record["shape"] for record in run(root, tmp_path, study)] == [[SLICES, 2 * LOW, 2 * LOW]]
    for inside in (study / "2", study / "2" / "pdata", study / "2" / "pdata" / "1"):
        assert len(run(root, tmp_path, inside)) == 1
    both = run(root, tmp_path, study.parent, all=True)
    assert sorted(record["shape"][1] for record in both) == [2 * LOW, 4 * LOW]


def test_one_bad_scan_does_not_keep_the_others(root, tmp_path, study):
    shutil.copytree(study / "2", study / "3")
    data = np.zeros(SLICES * LOW * LOW, "<i2")
    data.tofile(study / "3" / "pdata" / "1" / "2dseq")
    with pytest.raises(InputError, match=r"1 of 2 scans failed.*only zeros"):
        run(root, tmp_path, study)
    assert len(list((tmp_path / "out").glob("*_restored.nii.gz"))) == 1


def test_watch_waits_until_a_scan_is_complete(root, tmp_path, study, monkeypatch, capsys):
    source, place = study / "2", tmp_path / "today" / "study" / "2"
    (tmp_path / "today").mkdir()
    reco = place / "pdata" / "1"
    pixels = (source / "pdata" / "1" / "2dseq").read_bytes()
    visu = (source / "pdata" / "1" / "visu_pars").read_text()
    looks: list[int] = []

    def write(file: Path, data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def nothing() -> None:
        pass

    steps = [
        lambda: shutil.copytree(source, place, ignore=lambda *_: ["pdata"]),
        lambda: reco.mkdir(parents=True),
        lambda: write(reco / "2dseq", b""),
        nothing,
        lambda: write(reco / "2dseq", pixels[: len(pixels) // 2]),
        nothing,
        lambda: write(reco / "visu_pars", visu[: len(visu) // 3].encode()),
        nothing,
        lambda: write(reco / "visu_pars", visu.encode()),
        nothing,
        lambda: write(reco / "2dseq", pixels),
        nothing,
        nothing,
        lambda: shutil.copytree(study / "1", place.with_name("3")),  # a scan of another matrix
        nothing,
    ]

    def sleep(_: float) -> None:
        looks.append(len(list((tmp_path / "out").glob("*_restored.nii.gz"))))
        if len(looks) > len(steps):
            raise KeyboardInterrupt
        steps[len(looks) - 1]()

    monkeypatch.setattr(stage.time, "sleep", sleep)
    found = run(root, tmp_path, watch=tmp_path / "today")
    said = capsys.readouterr().out
    assert looks == [0] * 12 + [1] * 4  # one look after the last change it is new, at the next it is taken
    assert len(found) == 1
    assert "not taken" in said
    assert "matrix 64x64" in said
    assert "stopped, 1 scans restored" in said
    monkeypatch.undo()
    again = run(root, tmp_path, watch=tmp_path / "today", once=True, poll=0.01)
    assert [record["fingerprint"] for record in again] == [found[0]["fingerprint"]]
    assert "up to date" in capsys.readouterr().out


def test_a_reconstruction_away_from_its_study(root, tmp_path, study):
    shutil.copytree(study / "2" / "pdata" / "1", tmp_path / "alone")
    (record,) = run(root, tmp_path, tmp_path / "alone" / "2dseq")
    assert record["name"].startswith(f"{SUBJECT}_recoalone_")
    with pytest.raises(InputError, match="inside the input"):
        stage.run(dataclasses.replace(settings(root, tmp_path, tmp_path / "alone"), out=tmp_path / "alone" / "x"))


# ---------------------------------------------------------------- refusals


def refuse(root: Path, tmp_path: Path, *inputs: Path, match: str, **changes: object) -> None:
    with pytest.raises(InputError, match=match) as caught:
        run(root, tmp_path, *inputs, **changes)
    assert "expected" in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def test_output_inside_the_input_is_refused(root, tmp_path, study):
    before = tree(study)
    for out in (study, study / "new", study / "2" / "pdata"):
        with pytest.raises(InputError, match="inside the input"):
            stage.run(dataclasses.replace(settings(root, tmp_path, study / "2"), out=out))
    assert tree(study) == before


def test_bad_values_are_refused(root, tmp_path, study):
    refuse(root, tmp_path, match="inputs: found")
    refuse(root, tmp_path, study, watch=study, match="inputs: found")
    refuse(root, tmp_path, study, strength=1.5, match="strength: found 1.5, expected 0 to 1")
    refuse(root, tmp_path, study, consistency=-0.1, match="consistency")
    refuse(root, tmp_path, study, ratio=-1, match="ratio")
    refuse(root, tmp_path, watch=tmp_path / "none", match="watch")
    refuse(root, tmp_path, study, model=tmp_path / "none.pt", match="no such file")


def test_bad_scans_are_refused(root, tmp_path, study):
    refuse(root, tmp_path, tmp_path / "nowhere", match="no such file or folder")
    refuse(root, tmp_path, study / "subject", match="unknown kind of file")
    (tmp_path / "empty").mkdir()
    refuse(root, tmp_path, tmp_path / "empty", match="no scan found")
    reco = study / "2" / "pdata" / "1"
    (reco / "2dseq").write_bytes((reco / "2dseq").read_bytes()[:-2])
    refuse(root, tmp_path, study / "2", match="bytes found")
    refuse(root, tmp_path, study, match="none of 2 scans")
    (reco / "visu_pars").unlink()
    refuse(root, tmp_path, reco / "2dseq", match="visu_pars")


def test_bad_nifti_is_refused(root, tmp_path):
    low = animal(9)[0].transpose(2, 1, 0)

    def case(name: str, data: np.ndarray, match: str) -> None:
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / name)
        refuse(root, tmp_path, tmp_path / name, match=match)

    case("four.nii.gz", np.stack([low, low], -1), "shape")
    case("complex.nii", low.astype(np.complex64), "complex64")
    case("zeros.nii", np.zeros_like(low), "only zeros")
    case("nan.nii", np.full_like(low, np.nan), "NaN")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "four.nii.gz").read_bytes()[:3000])
    refuse(root, tmp_path, tmp_path / "cut.nii.gz", match="cut.nii.gz")
    (tmp_path / "text.nii").write_text("no image")
    refuse(root, tmp_path, tmp_path / "text.nii", match="text.nii")


def test_bad_dicom_is_refused(root, tmp_path, study):
    scan = low_of(study)

    def case(match: str, change) -> None:
        folder = tmp_path / "series"
        formats.write_dicom(folder, scan, "mark", "low")
        path = folder / "0002.dcm"
        data = pydicom.dcmread(path)
        change(data)
        data.save_as(path)
        refuse(root, tmp_path, folder, match=match)

    case("2 DICOM series", lambda d: setattr(d, "SeriesInstanceUID", "1.2.3"))
    case("uneven", lambda d: setattr(d, "ImagePositionPatient", [0, 0, 50]))
    case("different PixelSpacing", lambda d: setattr(d, "PixelSpacing", [1, 2]))
    case("different ImageOrientationPatient", lambda d: setattr(d, "ImageOrientationPatient", [0, 1, 0, 0, 0, 1]))
    case("no ImagePositionPatient", lambda d: delattr(d, "ImagePositionPatient"))
    case("0002.dcm", lambda d: setattr(d, "PixelData", d.PixelData[:100]))
    case("0002.dcm", lambda d: setattr(d, "NumberOfFrames", 2))
    shutil.copyfile(tmp_path / "series" / "0001.dcm", tmp_path / "series" / "0002.dcm")
    refuse(root, tmp_path, tmp_path / "series", match="uneven or equal places")
    with pytest.raises(InputError, match="inside the input"):
        stage.run(dataclasses.replace(settings(root, tmp_path, tmp_path / "series"), out=tmp_path / "series" / "new"))


def test_bad_input_on_the_command_line_is_one_line_and_status_two(root, tmp_path, study, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["07_denoise.py", str(tmp_path / "none"), "--root", str(root)])
    with pytest.raises(SystemExit) as stop:
        common.main(stage.run, stage.PRESETS)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert stage.Config(root=tmp_path).checkpoint == tmp_path / "runs" / "unet" / "best.pt"
    assert stage.Config(root=tmp_path).folder == tmp_path / "results" / "denoised"
