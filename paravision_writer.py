"""Writer of ParaVision 6.0.1 studies, for the simulated scanner; paravision.py reads them and real ones.

It is apart from 00_simulate.py because it is all of a file format and nothing of a scanner: names of parameters, the
way they are spelt, and which way the axes point.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Per plane: directions of the image's x (read) and y (phase) and of the slice order in scanner coordinates (LPS), the
# third row of VisuCoreOrientation, and ParaVision's name of the read direction. Coronal stacks run against the normal.
PLANES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1), "L_R"),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, -1, 0), (0, 1, 0), "L_R"),
    "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0), (-1, 0, 0), "A_P"),
}

# Parameters of each file. <text> is a string, {name} a value of the scan; the rest is what every scan has in common.
METHOD = """Method={sequence} PVM_EchoTime={spacing} EffectiveTE={te_list} PVM_RareFactor={rare} PVM_RepetitionTime={tr}
PVM_NAverages={averages} PVM_NRepetitions=1 PVM_NEchoImages=1 PVM_ScanTime={scan_ms} PVM_Nucleus1=<1H>
PVM_SpatDimEnum=<2D> PVM_Matrix={size} PVM_AntiAlias={ones} PVM_EncNReceivers={coils} PVM_EncZf={ones} PVM_EncPft={ones}
PVM_EncPpi={ones} PVM_EncOrder={linear} PVM_EncMatrix={size} PVM_EncSteps1={steps} PVM_EffSWh=50000 PVM_Fov={fov}
PVM_SpatResol={resolution} PVM_SliceThick={thickness} PVM_ObjOrderScheme=Interlaced PVM_ObjOrderList={order}
PVM_NSPacks=1 PVM_SPackArrNSlices={slices_list} PVM_SPackArrSliceOrient={plane} PVM_SPackArrReadOrient={read_name}
PVM_SPackArrReadOffset={read_offset} PVM_SPackArrPhase1Offset={phase_offset} PVM_SPackArrPhase2Offset={zero}
PVM_SPackArrSliceOffset={slice_offset} PVM_SPackArrSliceGap={gap} PVM_SPackArrSliceDistance={distance}
PVM_SPackArrGradOrient={gradients} PVM_TriggerModule=Off PVM_FovSatOnOff={saturation}"""
ACQP = """PULPROG=<RARE.ppg> ACQ_dim=2 ACQ_dim_desc={spatial} ACQ_size={acq_size} ACQ_phase_factor={rare} NI={slices}
NA={averages} NAE=1 NR=1 SW_h=50000 BF1={mhz} NUCLEUS=<1H> ACQ_protocol_name={name} ACQ_scan_name={scan_name}
ACQ_method={sequence_40} ACQ_completed=Yes NECHOES={rare} ACQ_n_echo_images=1 ACQ_fov={fov_cm}
ACQ_patient_pos=Head_Prone ACQ_slice_sepn={distance} ACQ_slice_thick={thickness} ACQ_obj_order={order}
ACQ_flip_angle=90 ACQ_echo_time={te_list} ACQ_inter_echo_time={spacing_list} ACQ_repetition_time={tr_list}
ACQ_time={started} ACQ_sw_version={acq_version} BYTORDA=little NSLICES={slices} ACQ_rare_factor={rare}"""
VISU = """VisuVersion=3 VisuUid={image_uid} VisuCreator=<ParaVision> VisuCreatorVersion=<6.0.1>
VisuCreationDate={finished} VisuInstanceModality=<MR> VisuCoreFrameCount={slices} VisuCoreDim=2 VisuCoreSize={size}
VisuCoreDimDesc={spatial_visu} VisuCoreExtent={fov} VisuCoreFrameThickness={thickness_list} VisuCoreUnits={units}
VisuCoreOrientation={orientation} VisuCorePosition={position} VisuCoreDataMin={least} VisuCoreDataMax={most}
VisuCoreDataOffs={zeros} VisuCoreDataSlope={slope} VisuCoreFrameType={frame_type} VisuCoreSlicePacksDef={packs}
VisuCoreSlicePacksSlices={pack_slices} VisuCoreSlicePacksSliceDist={distance} VisuCoreWordType=_16BIT_SGN_INT
VisuCoreByteOrder=littleEndian VisuFGOrderDescDim=1 VisuFGOrderDesc={frame_groups} VisuGroupDepVals={dependent}
VisuSubjectName={subject} VisuSubjectId={subject} VisuSubjectUid={subject_uid} VisuSubjectType=OtherAnimal
VisuStudyUid={study_uid} VisuStudyDate={study_date} VisuStudyId={subject} VisuStudyNumber=1
VisuExperimentNumber={number} VisuProcessingNumber=1 VisuSeriesDate={finished} VisuSubjectPosition=Head_Prone
VisuSeriesTypeId=<ACQ_BRUKER_PVM> VisuSeriesComment={name} VisuManufacturer={maker} VisuAcqSoftwareVersion=<6.0.1>
VisuInstitution=<simulated> VisuStation=<00_simulate.py> VisuAcqDate={started} VisuAcqEchoTrainLength={rare}
VisuAcqSequenceName={sequence_40} VisuAcqNumberOfAverages={averages} VisuAcqImagingFrequency={mhz}
VisuAcqImagedNucleus=<1H> VisuAcqRepetitionTime={tr_list} VisuAcqPhaseEncSteps={matrix} VisuAcqPixelBandwidth={hertz}
VisuAcqFlipAngle=90 VisuAcqSize={size} VisuAcqGradEncoding={encoding} VisuAcqEchoTime={te_list}
VisuAcquisitionProtocol={name} VisuAcqScanTime={scan_ms} VisuRespSynchUsed=No"""
RECO = """RecoDim=2 RECO_inp_size={size} RECO_ft_size={size} RECO_fov={fov_cm} RECO_size={size}
RECO_wdw_mode={no_window} RECO_transposition={zeros} RECO_image_type=MAGNITUDE_IMAGE
RECO_wordtype=_16BIT_SGN_INT RECO_map_slope={map_slope}
RECO_map_offset={zeros} RECO_byte_order=littleEndian RECO_time={finished} RECO_base_image_uid={image_uid}
RecoNumInputChan={coils} RecoCombineMode=SumOfSquares"""
SUBJECT = """SUBJECT_id={subject} SUBJECT_type=OtherAnimal SUBJECT_remarks={remarks} SUBJECT_study_name={subject}
SUBJECT_study_nr=1 SUBJECT_study_instance_uid={study_uid} SUBJECT_entry=SUBJ_ENTRY_HeadFirst
SUBJECT_position=SUBJ_POS_Prone SUBJECT_date={study_date}"""


class Word(str):
    """Text that a parameter file holds as it is: a keyword, a date, a structure."""


def jcamp(value: Any) -> str:
    """A parameter's value as ParaVision writes it: ( shape ) and wrapped elements, ( length ) and <text>, or plain."""
    if isinstance(value, Word):
        return value
    if isinstance(value, str):
        return f"( {max(65, len(value) + 1)} )\n<{value}>"
    if isinstance(value, int | float):
        return f"{value:.15g}"
    array, text = np.asarray(value), ""
    for item in array.ravel().tolist():
        word = item if isinstance(item, str) else f"{item:.15g}"
        # A wrapped line ends with a space on the scanner, and readers join lines relying on it.
        text += ("\n" if len(text) - text.rfind("\n") + len(word) > 78 else "") + word + " "
    return f"( {', '.join(str(n) for n in array.shape)} )\n{text.rstrip()}"


def write_parameters(path: Path, template: str, values: dict[str, Any], date: datetime.datetime) -> None:
    """Write a parameter file of ParaVision 6.0.1."""
    stamp = f"{date:%Y-%m-%d %H:%M:%S}.000 +0000"
    lines = ["##TITLE=Parameter List, ParaVision 6.0.1", "##JCAMPDX=4.24", "##DATATYPE=Parameter Values"]
    lines += ["##ORIGIN=Bruker BioSpin MRI GmbH", "##OWNER=simulator", f"$$ {stamp}  simulator"]
    for name, value in (item.split("=", 1) for item in template.split()):
        literal = value[1:-1] if value[0] == "<" else Word(value)
        lines.append(f"##${name}={jcamp(values[value[1:-1]] if value[0] == '{' else literal)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "##END=", f"$$ File finished by PARX at {stamp}", ""]), encoding="latin-1")


def uid(*parts: Any) -> str:
    """An identifier below Bruker's root that follows from its parts."""
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return "2.16.756.5.5.100." + ".".join(str(int(digest[i : i + 8], 16)) for i in range(0, 32, 8))


def iso(date: datetime.datetime) -> Word:
    """A date as ParaVision 6 writes it, with a decimal comma."""
    return Word(f"<{date:%Y-%m-%dT%H:%M:%S},000+0000>")


@dataclass(frozen=True)
class Scan:
    """One scan of a study."""

    number: int
    name: str
    plane: str
    matrix: int
    averages: int
    slices: int
    distance_mm: float
    centre: Array
    """Centre of the field of view, scanner coordinates (LPS), mm."""
    date: datetime.datetime
    seconds: int
    steps: Array
    """Phase-encode lines in the order of their acquisition."""


def session_of(subject: str, mark: str, date: datetime.datetime) -> dict[str, Any]:
    """What all files of a study say; `mark` identifies the settings of the simulation."""
    session = {"subject": subject, "subject_uid": uid(mark, subject), "study_uid": uid(mark, subject, "study")}
    return session | {"study_date": iso(date), "remarks": f"simulated, settings {mark}"}


def study_mark(study: Path) -> str:
    """The mark that a simulated study carries in its subject file; empty where there is no simulated study."""
    try:
        text = (study / "subject").read_text(encoding="latin-1")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    found = re.search(r"<simulated, settings ([0-9a-f]+)>", text)
    return found.group(1) if found else ""


def write_subject(study: Path, session: dict[str, Any], date: datetime.datetime) -> None:
    """Write the file that makes a folder a study."""
    write_parameters(study / "subject", SUBJECT, session, date)


def write_scan_folder(cfg: Any, study: Path, session: dict[str, Any], scan: Scan, volume: Array) -> None:
    """Write a reconstructed scan (slice, y, x), in scaled units, as ParaVision does: int16, one slope per slice.

    `cfg` holds the sequence: fov_mm, thickness_mm, tr_ms, te_ms, echo_spacing_ms, rare_factor and coils.
    """
    n, s = scan.matrix, scan.slices
    slope = np.maximum(volume.max(axis=(1, 2)).astype(float), 1e-6) / 32766
    stored = np.rint(volume / slope[:, None, None]).astype("<i2")
    read, phase, step, normal = (np.array(v, float) for v in PLANES[scan.plane][:4])
    first = scan.centre - cfg.fov_mm / 2 * (read + phase)  # of the first pixel: k = 0 is index n/2
    steps = (np.arange(s) - (s - 1) / 2) * scan.distance_mm
    offset = scan.centre * [-1, -1, 1]  # ParaVision's own frame has x and y reversed
    finished = scan.date + datetime.timedelta(seconds=scan.seconds)
    order = [*range(0, s, 2), *range(1, s, 2)]
    values = session | {
        "sequence": Word("<Bruker:RARE>"), "sequence_40": Word("( 40 )\n<Bruker:RARE>"), "mhz": 300.319057478109,
        "spacing": cfg.echo_spacing_ms, "spacing_list": [cfg.echo_spacing_ms], "te_list": [cfg.te_ms], "tr": cfg.tr_ms,
        "tr_list": [cfg.tr_ms], "rare": cfg.rare_factor, "averages": scan.averages, "scan_ms": 1000 * scan.seconds,
        "matrix": n, "size": [n, n], "acq_size": [2 * n, n], "ones": [1, 1], "zero": [0], "zeros": np.zeros(s, int),
        "coils": cfg.coils, "linear": 2 * ["LINEAR_ENC"], "no_window": 2 * ["NO_WDW"], "hertz": 50000 / n,
        "steps": scan.steps, "fov": 2 * [cfg.fov_mm], "fov_cm": 2 * [cfg.fov_mm / 10],
        "resolution": 2 * [cfg.fov_mm / n], "thickness": cfg.thickness_mm, "thickness_list": [cfg.thickness_mm],
        "order": order, "slices": s, "slices_list": [s], "plane": [scan.plane], "read_name": [PLANES[scan.plane][4]],
        "read_offset": [offset @ read + 0.0], "phase_offset": [offset @ np.abs(phase) + 0.0],
        "slice_offset": [offset @ np.abs(normal) + 0.0], "gap": [round(scan.distance_mm - cfg.thickness_mm, 6)],
        "distance": [scan.distance_mm], "gradients": np.abs([[read, phase, normal]]).astype(int),
        "saturation": Word("Off" if scan.plane == "axial" else "On"), "spatial": 2 * ["Spatial"],
        "spatial_visu": 2 * ["spatial"], "units": Word("( 2, 65 )\n<mm> <mm>"), "encoding": ["read_enc", "phase_enc"],
        "name": scan.name, "scan_name": f"{scan.name} (E{scan.number})", "number": scan.number,
        "started": iso(scan.date), "finished": iso(finished), "acq_version": "PV 6.0.1",
        "maker": "Bruker BioSpin MRI GmbH", "image_uid": uid(session["study_uid"], scan.number),
        "orientation": np.tile(np.ravel([read, phase, normal]), (s, 1)).astype(int),
        "position": np.round(first + steps[:, None] * step, 6) + 0.0, "frame_type": ["MAGNITUDE_IMAGE"],
        "least": stored.min(axis=(1, 2)), "most": stored.max(axis=(1, 2)), "slope": slope, "map_slope": 1 / slope,
        "packs": Word("(0, 1)"), "pack_slices": Word(f"( 1 )\n(0, {s})"),
        "frame_groups": Word(f"( 1 )\n({s}, <FG_SLICE>, <>, 0, 2)"),
        "dependent": Word("( 2 )\n(<VisuCoreOrientation>, 0) (<VisuCorePosition>, 0)"),
    }  # fmt: skip
    folder = study / str(scan.number)
    files = {"method": METHOD, "acqp": ACQP, "pdata/1/visu_pars": VISU, "pdata/1/reco": RECO}
    for file, template in files.items():
        write_parameters(folder / file, template, values, finished)
    (folder / "pdata" / "1" / "2dseq").write_bytes(stored.tobytes())
