"""The house rules: sizes, help, usage lines, README commands, notebooks without output."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import common

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in REPO.glob("0?_*.py"))
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
README = (REPO / "README.md").read_text()


def test_files_stay_small():
    ceilings = {"common.py": 600} | {f"{name}.py": 400 for name in SCRIPTS}
    sizes = {name: len((REPO / name).read_text().splitlines()) for name in ceilings}
    assert {name: size for name, size in sizes.items() if size > ceilings[name]} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_says_what_it_reads_writes_and_how_it_is_used(script):
    tree = ast.parse((REPO / f"{script}.py").read_text())
    doc = ast.get_docstring(tree) or ""
    for word in ("Reads", "Writes", "Usage:"):
        assert word in doc
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main(run, PRESETS)"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_explained_and_every_preset_exists(script):
    module = importlib.import_module(script)
    assert set(module.PRESETS) >= {"paper", "demo", "smoke"}
    assert module.PRESETS["paper"].root == Path(".")
    source = next(n for n in ast.parse((REPO / f"{script}.py").read_text()).body if getattr(n, "name", "") == "Config")
    body = source.body
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            text = getattr(getattr(after, "value", None), "value", None)
            assert isinstance(text, str), f"{script}: Config.{ast.unparse(field.target)} has no docstring"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_loading_torch(script):
    """Importing torch alone takes longer than the two seconds that --help may take."""
    code = (
        f"import runpy, sys; sys.argv = ['{script}.py', '--help']\n"
        f"try: runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'torchmetrics', 'optuna', 'matplotlib.pyplot', 'skimage.metrics'} & set(sys.modules)\n"
        "print('heavy:', heavy); assert not any(getattr(sys.modules[m], '__file__', None) and "
        "type(sys.modules[m]).__name__ == 'module' for m in heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    assert "--root" in done.stdout
    assert "--preset" in done.stdout


def usage_lines(text: str) -> list[str]:
    return re.findall(r"(?:python|torchrun[^\n]*?)\s+(0\d_\w+\.py[^\n`#]*)", text)


def check_command(line: str) -> None:
    name, *args = shlex.split(line)
    common.parse_config(importlib.import_module(name.removesuffix(".py")).PRESETS, args)


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage_lines_parse(script):
    lines = usage_lines(ast.get_docstring(ast.parse((REPO / f"{script}.py").read_text())) or "")
    assert len(lines) >= 2
    for line in lines:
        check_command(line)


def test_readme_commands_parse():
    lines = usage_lines("\n".join(re.findall(r"```(?:\w*)\n(.*?)```", README, flags=re.S)))
    assert lines
    for line in lines:
        check_command(line)


def test_readme_make_targets_exist():
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=REPO, check=True, capture_output=True)


def test_readme_names_only_files_that_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert name.startswith("http") or (REPO / name).exists(), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stripped_and_short(path):
    notebook = json.loads(path.read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert any("parameters" in c["metadata"].get("tags", []) for c in code)
    for cell in code:
        source = "".join(cell["source"])
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert len(source.splitlines()) <= 15
        assert not re.search(r"^\s*(def|class) ", source, flags=re.M)


def test_no_script_imports_a_script_but_04():
    for path in REPO.glob("*.py"):
        found = re.findall(r"import_module\(['\"](0\d_\w+)", path.read_text())
        assert found == [] or (path.name == "04_tune.py" and set(found) == {"03_train_unet"})
