"""The sbatch wrappers on a real Slurm of this machine alone: a chain by dependency, a time limit that is survived."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start Slurm's daemons"),
    pytest.mark.skipif(not (REPO / ".venv").exists(), reason="the wrappers use .venv, which make setup makes"),
]
SMALL = "sbatch --cpus-per-task 1 --mem 500M"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment in which sbatch reaches a cluster that lasts as long as this module."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    command = ["slurm/local_cluster.sh", "start", str(folder)]
    started = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    try:
        if started.returncode:
            pytest.skip(f"Slurm does not start here: {started.stderr.strip()}")
        yield environment
    finally:
        subprocess.run(["slurm/local_cluster.sh", "stop", str(folder)], cwd=REPO, env=environment, check=True)


def shell(environment: dict[str, str], *command: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition, seconds: float = 120) -> None:
    """Until it is true, or the test fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.3)


def losses(folder: Path) -> list[tuple[str, str]]:
    """Losses of every epoch, to the last digit."""
    path = folder / "history.csv"
    with path.open() if path.exists() else io.StringIO() as stream:
        return [(row["train"], row["validation"]) for row in csv.DictReader(stream)]


def test_chain_runs_each_stage_after_the_one_before_it(cluster, smoke, tmp_path):
    environment = cluster | {"SBATCH": f"{SMALL} --output {tmp_path}/%x.out"}
    shutil.copytree(smoke / "data" / "raw", tmp_path / "data" / "raw")
    lines = shell(environment, "slurm/chain.sh", "01 02 03", "--preset", "smoke", "--root", str(tmp_path)).split("\n")
    assert [line.split(":")[0] for line in lines[:3]] == ["01", "02", "03"]
    wait_until(lambda: not shell(cluster, "squeue", "--noheader"))
    assert (tmp_path / "runs" / "unet" / "summary.json").exists(), (tmp_path / "unet.out").read_text()


def test_job_behind_a_failed_one_never_starts(cluster, tmp_path):
    environment = cluster | {"SBATCH": f"{SMALL} --output {tmp_path}/%x.out"}
    shell(environment, "slurm/chain.sh", "01 02", "--preset", "smoke", "--root", str(tmp_path))  # no studies there
    wait_until(lambda: not shell(cluster, "squeue", "--noheader"))
    assert "\nerror: " in (tmp_path / "curate.out").read_text()
    assert not (tmp_path / "preprocess.out").exists()


@pytest.mark.slow
def test_time_limit_requeues_and_the_job_goes_on_where_it_was(cluster, smoke, tmp_path, request):
    """Slurm itself sends the signal; what two runs of the job trained equals what one run trains."""
    (tmp_path / "data").symlink_to(smoke / "data")
    training = ["--preset", "smoke", "--root", str(tmp_path), "--threads", "1", "--epochs", "500", "--patience", "500"]
    slurm = [*SMALL.split(), "--parsable", "--time", "60", "--signal", "B:USR1@300", f"--output={tmp_path}/job.out"]
    job = shell(cluster, *slurm, "slurm/03_train_unet.sbatch", *training, "--run", "limited").strip()
    text, limited, whole = (tmp_path / name for name in ("job.out", "runs/limited", "runs/whole"))
    command = [str(REPO / ".venv" / "bin" / "python"), "03_train_unet.py", *training, "--run", "whole"]
    undisturbed = subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    request.addfinalizer(undisturbed.wait)
    request.addfinalizer(undisturbed.kill)
    wait_until(lambda: len(losses(limited)) >= 2)
    shell(cluster, "scontrol", "update", f"jobid={job}", "TimeLimit=5")
    wait_until(lambda: "is requeued" in text.read_text())
    wait_until(lambda: re.search(r"JobState=PENDING.*Restarts=1", shell(cluster, "scontrol", "show", "job", job), re.S))
    done = len(losses(limited))
    assert 2 <= done < 500
    # Slurm lets a requeued job wait for two minutes, as within some seconds its node takes it for the one just killed.
    time.sleep(5)
    shell(cluster, "scontrol", "update", f"jobid={job}", "StartTime=now", "TimeLimit=60")
    wait_until(lambda: len(losses(limited)) >= done + 2)
    assert f"goes on after epoch {done}" in text.read_text()
    shell(cluster, "scancel", job)
    wait_until(lambda: len(losses(whole)) >= done + 2)
    assert losses(limited)[: done + 2] == losses(whole)[: done + 2]
