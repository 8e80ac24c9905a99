"""Notebooks run on a small experiment as `make report` runs them; in git they are short and hold no output."""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from test_06_evaluate import write_cohort, write_network, write_pairs

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
evaluate = importlib.import_module("06_evaluate")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("notebooks")
    write_cohort(root, slices=3)
    write_pairs(root)
    write_network(root)
    evaluate.run(dataclasses.replace(evaluate.PRESETS["smoke"], root=root, workers=1))
    return root


def papermill(root: Path, output: Path, *parameters: str) -> subprocess.CompletedProcess[str]:
    """Execute the notebook of the output's name."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-p", "root", str(root), *parameters]
    command += [str(REPO / "notebooks" / output.name), str(output)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def outputs(notebook: dict, kind: str) -> list[str]:
    found = [o.get("data", {}) for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return ["".join(data[kind]) for data in found if kind in data]


@pytest.fixture(scope="module")
def executed(experiment) -> Path:
    output = experiment / "reports" / "results.ipynb"
    output.parent.mkdir()
    done = papermill(experiment, output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_every_table_and_figure_is_there(executed, experiment):
    notebook = json.loads(executed.read_text())
    tables, figures = outputs(notebook, "text/markdown"), outputs(notebook, "image/png")
    # merit, masks, regions and planes, tuning, LEGO, boxes / loss, intervals, animals, detail, LEGO, boxes
    assert (len(tables), len(figures)) == (6, 6)
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] in ("error", "stream")]
    summary = json.loads((experiment / "results" / "summary.json").read_text())
    assert f"{summary['unet']['test']['mse_body']['mean']:.3f}" in tables[0]
    assert f"{summary['unet']['lego']['ssim_body']['mean']:.3f}" in tables[4]
    for number in ("0.1269", "0.0737", "0.4548", "0.4624"):
        assert number in tables[4]
    assert "other data" in tables[4]
    assert "0.001 to 0.055" in tables[2]
    for region, plane in (("HT", "axial"), ("TA", "sagittal")):
        assert f"| {region} | {plane} |" in tables[2]
    assert "nan" not in "".join(tables)


def test_the_report_is_a_page_with_tables_and_pictures(executed):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--log-level", "ERROR", "--to", "html", str(executed)]
    subprocess.run(command, check=True, capture_output=True)
    page = executed.with_suffix(".html").read_text()
    assert page.count("<table") == 6
    assert page.count('src="data:image/png;base64') == 6
    assert "Restored micro-MRI of mice" in page
    assert "Traceback" not in page


def evaluated_cells(root: Path, notebook: str = "results", **parameters) -> list:
    """What the notebook's code cells end with, in this process: no kernel to wait for."""
    plt.switch_backend("Agg")
    names: dict = {}
    ends = []
    for cell in json.loads((REPO / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "cell", "exec"), names)
            names |= {"root": str(root)} | parameters if "parameters" in cell["metadata"].get("tags", []) else {}
            ends += [eval(compile(ast.Expression(last.value), "cell", "eval"), names)] if last else []
    return ends


def test_another_split_without_phantom_and_truth(experiment, tmp_path):
    """Real scans: no truth, no LEGO brick."""
    root = tmp_path / "real"
    shutil.copytree(experiment, root, ignore=shutil.ignore_patterns("truth.zarr", "reports", "results"))
    config = dataclasses.replace(evaluate.PRESETS["smoke"], root=root, workers=1, splits=("validation",))
    summary = evaluate.run(config)
    before = len(plt.get_fignums())
    tables = [end.data for end in evaluated_cells(root, split="validation", models="unet") if hasattr(end, "data")]
    assert len(tables) == 6
    assert f"{summary['unet']['validation']['mse_body']['mean']:.3f}" in tables[0]
    figures = [plt.figure(number) for number in plt.get_fignums()][before:]
    assert sum(bool(figure.axes) for figure in figures) == 5  # all but the phantom's
    plt.close("all")


def test_a_missing_model_is_named(experiment):
    with pytest.raises(AssertionError, match=r"no results of \['apddm'\]: run 06_evaluate.py --models apddm"):
        evaluated_cells(experiment, models="apddm")


@pytest.mark.parametrize("files", [[], ["cohort.csv"], ["cohort.csv", "truth.zarr/zarr.json"]])
def test_make_report_simulates_nothing_beside_a_cohort_of_own_studies(tmp_path, files):
    for name in files:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    command = ["make", "--dry-run", "report", f"ROOT={tmp_path}"]
    planned = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    assert ("00_simulate.py" in planned) == (files == [])
    assert re.search(r"01_curate\.py.*06_evaluate\.py.*curation\.ipynb", planned, flags=re.S)


def dropped_slices(root: Path) -> list[dict[str, str]]:
    with (root / "data" / "slices.csv").open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if (row["decision"] or row["suggestion"]) == "drop"]


def test_the_cohort_at_a_glance(smoke, tmp_path):
    done = papermill(smoke, tmp_path / "curation.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = json.loads((tmp_path / "curation.ipynb").read_text())
    tables, figures = outputs(notebook, "text/markdown"), outputs(notebook, "image/png")
    # scans, slices kept, unused scans, reasons / middle slices, an animal, quality, dropped slices, crop, shift
    assert (len(tables), len(figures)) == (4, 6)
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] in ("error", "stream")]
    assert "Text(" not in "".join(outputs(notebook, "text/plain"))
    assert f"| **dropped in all** | **{len(dropped_slices(smoke))}** of " in tables[3]
    assert all(why in tables[3] for row in dropped_slices(smoke) for why in row["reason"].split("; "))
    assert re.search(r"\| high \| \d+x\d+ \| 5 \|", tables[0])


def test_a_cohort_with_decisions_by_hand_and_unused_scans(smoke, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("curated.zarr", "pairs.zarr"):
        (tmp_path / "data" / name).symlink_to(smoke / "data" / name)
    shutil.copyfile(smoke / "data" / "cohort.csv", tmp_path / "data" / "cohort.csv")
    text = (smoke / "data" / "slices.csv").read_text()
    (tmp_path / "data" / "slices.csv").write_text(text.replace(",\n", ",keep\n"))
    line = ["", "", "", "", "odd", "7", *[""] * 10, "no", "", "no partner; no other usable scan in its study"]
    with (tmp_path / "data" / "cohort.csv").open("a") as stream:
        stream.write(",".join(line) + "\n")
    before = len(plt.get_fignums())
    tables = [end.data for end in evaluated_cells(tmp_path, "curation") if hasattr(end, "data")]
    assert "| no partner; no other usable scan in its study | 1 |" in tables[2]
    assert "| **dropped in all** | **0** of " in tables[3]
    assert f"| suggested, kept by hand | {len(dropped_slices(smoke))} |" in tables[3]
    assert len(plt.get_fignums()) - before == 6
    plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_obey_the_house_rules(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["cells"][0]["source"][0].startswith("# ")
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for node in ast.parse("".join(tagged[0]["source"])).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
    for cell in code:
        source = "".join(cell["source"])
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert len(source.splitlines()) <= 15
        assert len(re.findall(r"plt\.(?:subplots|figure)\(|^Markdown\(", source, flags=re.M)) <= 1
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef}
        assert not re.search(r"import torch|import networks|import_module", source)
