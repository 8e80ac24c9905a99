"""The search: its space, its limits, several workers, workers that are killed, storages that fail."""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

import common
import studies
from common import InputError

REPO = Path(__file__).resolve().parent.parent
tune = importlib.import_module("04_tune")
train = importlib.import_module("03_train_unet")


def write_pairs(root: Path, size: int = 24, mark: str = "a") -> None:
    """Pairs of blurred and sharp blobs: six slices to train on, two to validate with."""
    store = root / "data" / "pairs.zarr"
    splits = {"mouse01": 1, "mouse02": 1, "mouse03": 2}
    for number, (subject, split) in enumerate(splits.items()):
        rng = np.random.default_rng(np.random.SeedSequence([4, number]))
        slices = 3 if split == 1 else 2
        y, x = np.mgrid[:size, :size] / size - 0.5
        high = np.stack(
            [(np.hypot(y, x) < 0.4) * (1 + 0.5 * np.sin(rng.uniform(8, 20) * x + k)) for k in range(slices)]
        )
        low = np.repeat(np.repeat(high[:, ::2, ::2], 2, 1), 2, 2) + 0.2 * rng.normal(size=high.shape)
        scale = np.ones(slices, np.float32)
        arrays = {"low": np.abs(low).astype(np.float32), "high": high.astype(np.float32), "scale": scale}
        arrays |= {"offset": 0 * scale, "split": np.full(slices, split, np.uint8)}
        arrays |= {"slice_index": np.arange(slices, dtype=np.int32)}
        attributes = {"box": [0, size, 0, size], "full_shape": [slices, size, size], "ratio": [2, 2], "gain": 1.0}
        attributes |= {"shift": [0, 0], "affine": np.eye(4), "spacing_mm": [0.6, 0.1, 0.1], "fingerprint": mark}
        common.write_scan(store, f"{subject}/HT/axial", arrays, attributes)
    attributes = {"fingerprint": mark, "settings": {"align": "centres"}, "split_by": "animal", "splits": {}}
    common.finish_store(store, [f"{subject}/HT/axial" for subject in splits], attributes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root)
    return root


@pytest.fixture
def root(pairs, tmp_path) -> Path:
    """A folder of its own for the runs, with the shared pairs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.zarr").symlink_to(pairs / "data" / "pairs.zarr")
    return tmp_path


TRAINING = dataclasses.replace(
    train.PRESETS["smoke"], patch=0, epochs=3, min_epochs=3, steps_per_epoch=0, threads=1, device="cpu",
    precision="float32",
)  # fmt: skip
CHOOSE = ("levels=2", "features_main_1=2,4", "features_main_2=2,4,8", "loss=MSE,MAE", "batch=2,4", "lr=1e-4,1e-2")


def config(root: Path, **changes):
    training = dataclasses.replace(TRAINING, **changes.pop("training", {}))
    plain = {"root": root, "space": "wide", "choose": CHOOSE, "trials": 6, "startup": 3, "training": training}
    return tune.Config(**(plain | changes))


def command(cfg) -> list[str]:
    """The command line of a worker with that config."""
    words = [sys.executable, "04_tune.py", "--preset", "smoke", "--root", str(cfg.root), "--space", cfg.space]
    words += ["--choose", *cfg.choose, "--trials", str(cfg.trials), "--startup", str(cfg.startup)]
    words += ["--pruner", cfg.pruner]
    for name in ("patch", "epochs", "min_epochs", "steps_per_epoch", "slices", "threads", "device", "precision"):
        words += [f"--training.{name.replace('_', '-')}", str(getattr(cfg.training, name))]
    return words


def journal(cfg) -> optuna.Study:
    return optuna.load_study(study_name=cfg.study, storage=studies.open_storage(str(cfg.folder / "journal.log")))


def table(cfg) -> list[dict[str, str]]:
    """trials.csv without how long the trials took."""
    with (cfg.folder / "trials.csv").open(newline="") as stream:
        return [{name: value for name, value in row.items() if name != "minutes"} for row in csv.DictReader(stream)]


def finished(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The trials that count, in the order in which they were first tried."""
    found = [row for row in rows if row["state"] in ("complete", "pruned")]
    return sorted(found, key=lambda row: int(row["folder"].removeprefix("trial_")))


# ---------------------------------------------------------------- space


def draw(space, seed: int) -> tuple[dict, dict]:
    """Settings drawn at random from a space, and the parameters that were asked for."""
    rng, asked = np.random.default_rng(np.random.SeedSequence([4, seed])), {}

    def pick(name):
        assert name not in asked
        values = space[name]
        asked[name] = float(rng.uniform(*values)) if isinstance(values, list) else values[rng.integers(len(values))]
        return asked[name]

    return tune.propose(pick, space), asked


@pytest.mark.parametrize("name", ["report", "wide", "demo"])
def test_parameters_are_asked_for_only_where_they_apply(name):
    seen = set()
    for seed in range(300):
        settings, asked = draw(tune.SPACES[name], seed)
        assert ("alpha" in asked) == (settings["loss"] == "hybrid")
        assert ("decay" in asked) == (settings["scheduler"] in ("ExponentialLR", "StepLR", "ReduceLROnPlateau"))
        assert ("step_size" in asked) == (settings["scheduler"] == "StepLR")
        assert ("weight_decay" in asked) == (name != "report" and settings["optimiser"] == "AdamW")
        assert (
            sum(key.startswith("features_main") for key in asked) == asked["levels"] == len(settings["features_main"])
        )
        train.check(dataclasses.replace(TRAINING, **settings))
        seen |= asked.keys()
    assert seen == {key for key in tune.SPACES[name] if key != "features_main_4" or name != "demo"}


def test_space_of_the_report_is_that_of_section_4_2():
    space = tune.SPACES["report"]
    widths = [space[f"features_main_{level}"] for level in (1, 2, 3)]
    assert widths == [(32, 64, 128), (64, 128, 256), (128, 256, 512)]
    assert space["downsampling"] == ("maxpool", "meanpool", "convStrided")
    assert space["activation"] == ("ReLU", "LeakyReLU", "ELU", "PReLU")
    assert space["optimiser"] == ("Adam", "AdamW", "SGD", "RMSprop")
    assert space["decay"] == (0.1, 0.3, 0.5)
    assert space["lr"] == [1e-6, 1e-2]


@pytest.mark.parametrize("name", ["report", "wide", "demo"])
@pytest.mark.parametrize(("trial", "preset"), [("report first", "paper"), ("report tuned", "tuned")])
def test_known_trials_are_the_reports_settings_in_every_space(name, trial, preset):
    searched, attributes = tune.known_trials(tune.SPACES[name])[trial]
    assert not searched.keys() & attributes["pinned"].keys()
    settings = tune.propose((searched | attributes["pinned"]).__getitem__, tune.SPACES[name])
    wanted = train.PRESETS[preset]
    assert {key: getattr(wanted, key) for key in settings} == settings


def test_tuned_network_can_be_reached_in_the_wide_space_only():
    assert "features_main_3" in tune.known_trials(tune.WIDE)["report tuned"][0]
    assert tune.known_trials(tune.REPORT)["report tuned"][1]["pinned"]["features_main_3"] == 64


def test_choices_narrow_the_space():
    space = tune.narrow(tune.REPORT, ["lr=1e-3,1e-5", "loss=MAE", "residual=False,True", "levels=4", "batch=12"])
    assert space["lr"] == [1e-5, 1e-3]
    assert (space["loss"], space["residual"], space["batch"]) == (("MAE",), (False, True), (12,))
    assert space["features_main_4"] == tune.WIDE["features_main_4"]
    assert tune.REPORT["loss"] == ("MSE", "MAE", "hybrid")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("learning_rate=1", "unknown parameter 'learning_rate'"),
        ("lr", "expected values of lr"),
        ("loss=", "found '', expected values of loss"),
        ("loss=L2", "found 'L2'"),
        ("batch=8,8", "found '8,8'"),
        ("batch=x", "found 'x'"),
        ("lr=-1", "found '-1'"),
        ("lr=nan", "found 'nan'"),
        ("residual=1", "found '1'"),
        ("levels=7", "levels"),
    ],
)
def test_wrong_choices_are_named(choice, text):
    with pytest.raises(InputError, match=text):
        tune.narrow(tune.REPORT, [choice])


def test_space_with_nothing_to_search_is_refused():
    fixed = [f"{name}={values[0]}" for name, values in tune.REPORT.items()]
    with pytest.raises(InputError, match="the space is empty"):
        tune.narrow(tune.REPORT, fixed)


# ---------------------------------------------------------------- one worker


@pytest.fixture(scope="module")
def searched(pairs, tmp_path_factory):
    """A finished search of one worker."""
    root = tmp_path_factory.mktemp("searched")
    (root / "data").symlink_to(pairs / "data")
    cfg = config(root)
    return cfg, tune.run(cfg)


def test_search_starts_with_the_report_and_writes_what_it_found(searched):
    cfg, summary = searched
    rows = table(cfg)
    assert [row["name"] for row in rows[:3]] == ["report first", "report tuned", ""]
    assert [rows[1][f"features_main_{level}"] for level in (1, 2, 3)] == ["128", "128", "64"]
    assert len(rows) == summary["finished"] == 6
    complete = [row for row in rows if row["state"] == "complete"]
    best = min(complete, key=lambda row: float(row["validation_mse"]))
    assert summary["best"][0]["trial"] == int(best["trial"])
    assert json.loads((cfg.folder / "summary.json").read_text())["trials"] == summary["trials"]
    for row in rows:
        with (cfg.folder / row["folder"] / "history.csv").open(newline="") as stream:
            history = list(csv.DictReader(stream))
        kept = min(history, key=lambda epoch: float(epoch["validation"]))
        assert (row["best_epoch"], row["validation_mse"]) == (kept["epoch"], kept["validation_mse"])
        assert (cfg.folder / row["folder"] / "best.pt").exists() == (row["state"] == "complete")


def test_pruner_stops_trials_and_says_so_but_never_the_known_ones(searched):
    cfg, _ = searched
    rows = table(cfg)
    assert {row["state"] for row in rows[:2]} == {"complete"}
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned
    assert all(row["reason"].startswith("pruner: ") and int(row["epochs"]) in (1, 3) for row in pruned)


def test_same_seed_same_trials_even_in_two_pieces(searched, root):
    cfg, _ = searched
    tune.run(config(root, trials=3))
    tune.run(config(root, trials=6))
    assert table(config(root)) == table(cfg)


def test_finished_search_is_not_searched_again(searched):
    cfg, summary = searched
    before = (cfg.folder / "journal.log").read_bytes()
    assert tune.run(cfg)["trials"] == summary["trials"]
    assert (cfg.folder / "journal.log").read_bytes() == before


def test_03_trains_with_what_was_found(searched, monkeypatch, capsys):
    cfg, summary = searched
    path = cfg.folder / "best.json"
    plain = dataclasses.replace(TRAINING, root=cfg.root, run="best", config_from=path)
    again = train.run(plain)
    assert again["best_validation_mse"] == summary["best"][0]["validation_mse"]  # same seed and budget
    settings = json.loads(path.read_text())["config"]
    assert settings["features_main"] == [summary["best"][0][f"features_main_{level}"] for level in (1, 2)]
    assert not settings.keys() & {"epochs", "seed", "root", "run", "threads"}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"config": {"speed": 1}}', '{"config": {"lr": "fast"}}'])
def test_03_refuses_what_04_did_not_write(root, text):
    path = root / "best.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"best\.json: "):
        train.run(dataclasses.replace(TRAINING, root=root, config_from=path))


def test_final_trainings_have_new_seeds_and_a_spread(searched, capsys):
    cfg, summary = searched
    final = tune.run(dataclasses.replace(cfg, final_seeds=3, final_epochs=2))["final"]
    values = final["validation_mse"]["values"]
    assert (final["runs"], final["epochs"], len(set(values))) == (3, 2, 3)
    assert final["validation_mse"]["sd"] == pytest.approx(np.std(values, ddof=1))
    number = summary["best"][0]["trial"]
    assert {path.name for path in cfg.folder.glob("final_*")} == {f"final_{number}_{seed}" for seed in (1, 2, 3)}
    assert tune.run(dataclasses.replace(cfg, final_seeds=3, final_epochs=2))["final"] == final


def test_two_objectives_give_a_front_and_no_pruning(root, capsys):
    cfg = config(root, objective="both", trials=5)
    summary = tune.run(cfg)
    assert "stops no trial" in capsys.readouterr().out
    assert summary["trials"] == {"complete": 5}
    points = {int(row["trial"]): (float(row["validation_mse"]), float(row["validation_ssim"])) for row in table(cfg)}
    front = {
        n for n, (m, s) in points.items() if not any(a <= m and b >= s and (a, b) != (m, s) for a, b in points.values())
    }
    assert {row["trial"] for row in summary["best"]} == front


def test_importances_name_what_matters():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(lambda t: t.suggest_float("strong", 0, 1) ** 2 + 0.01 * t.suggest_float("weak", 0, 1), n_trials=9)
    assert studies.importances(study) == {}
    study.optimize(lambda t: t.suggest_float("strong", 0, 1) ** 2 + 0.01 * t.suggest_float("weak", 0, 1), n_trials=60)
    found = studies.importances(study)
    assert found["strong"] > 0.7
    assert sum(found.values()) == pytest.approx(1)


def test_notebook_shows_what_the_files_hold(searched, monkeypatch):
    """Its cells, one after the other, as a kernel runs them."""
    import matplotlib.pyplot as plt

    cfg, summary = searched
    cells = json.loads((REPO / "notebooks" / "tuning.ipynb").read_text())["cells"]
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict = {}
    shown = []
    for cell in [cell for cell in cells if cell["cell_type"] == "code"]:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names["root"] = str(cfg.root)
        if last:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    tables = [value.data for value in shown if hasattr(value, "data")]
    assert (len(tables), len(plt.get_fignums())) == (3, 4)  # no importances: fewer than 10 trials
    plt.close("all")
    assert f"{summary['best'][0]['validation_mse']:.4g}" in tables[1]
    assert f"| {summary['trials']['complete']} |" in tables[0]
    assert "report tuned" in tables[1]
    assert "nan" not in "".join(tables)


# ---------------------------------------------------------------- limits


def test_time_limit_passes_through_code_that_catches_every_exception():
    end = time.monotonic() + 5
    with pytest.raises(optuna.TrialPruned, match="late"), studies.time_limit(0.05, "late"):
        while time.monotonic() < end:
            try:
                time.sleep(1)
            except Exception:
                continue
    assert time.monotonic() < end


def test_trial_over_its_time_is_pruned_in_the_midst_of_an_epoch(root):
    cfg = config(root, trials=3, trial_minutes=0.01, training={"steps_per_epoch": 10_000})
    with pytest.raises(InputError, match=r"no trial came to its end \(time limit \(3\)\)"):
        tune.run(cfg)
    rows = table(cfg)
    assert {(row["state"], row["reason"]) for row in rows} == {("pruned", "time limit: not done in 0.01 minutes")}
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert not (cfg.folder / "best.json").exists()


def test_time_limit_waits_until_the_storage_is_done():
    log = []
    with pytest.raises(optuna.TrialPruned, match="late"), studies.time_limit(0.02, "late") as shield:
        with shield():
            time.sleep(0.1)
            log.append("whole")
        log.append("never")
    assert log == ["whole"]


def test_trial_that_does_not_fit_into_memory_is_pruned_and_the_next_one_runs(root, monkeypatch):
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) / 2**20
    huge = {"features_main_1": 1024, "features_main_2": 2048}
    monkeypatch.setattr(tune, "known_trials", lambda space: {"huge": ({}, {"pinned": huge})})
    cfg = config(root, trials=3, trial_memory=used + 0.2, pruner="none")
    tune.run(cfg)
    rows = table(cfg)
    assert [row["state"] for row in rows] == ["pruned", "complete", "complete"]
    assert "out of memory" in rows[0]["reason"]
    assert rows[0]["validation_mse"] == ""
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_trial_whose_loss_explodes_is_pruned(root):
    cfg = config(root, trials=3, choose=(*CHOOSE[:-1], "lr=1e30,1e31", "optimiser=SGD", "activation=ReLU"))
    tune.run(cfg)
    assert "not finite" in table(cfg)[2]["reason"]


def test_worker_whose_time_is_over_gives_its_trial_back(root):
    cfg = config(root, trials=2, minutes=1e-6)
    assert tune.run(cfg)["trials"] == {"waiting": 2}  # no time to begin
    for _ in studies.work(journal(cfg), lambda chosen: postpone(), lambda left: 0, 2):
        raise AssertionError
    assert [state for _, state, _ in studies.outcomes(journal(cfg))] == ["retried", "waiting", "waiting"]
    summary = tune.run(dataclasses.replace(cfg, minutes=0))
    assert summary["trials"] == {"complete": 2, "retried": 1}
    assert [row["folder"] for row in table(cfg)] == ["trial_0", "trial_1", "trial_0"]


def postpone():
    raise studies.Postponed


# ---------------------------------------------------------------- several workers, killed workers


def start(cfg, log: Path) -> subprocess.Popen:
    """One more worker."""
    with log.open("wb") as stream:
        return subprocess.Popen(command(cfg), cwd=REPO, stdout=stream, stderr=subprocess.STDOUT)


def test_two_workers_share_a_study_without_doubles(root):
    cfg = config(root, trials=9)
    logs = [root / "first.log", root / "second.log"]
    workers = [start(cfg, log) for log in logs]
    assert [worker.wait(120) for worker in workers] == [0, 0], "".join(log.read_text() for log in logs)
    study = journal(cfg)
    counted = [trial for trial, state, _ in studies.outcomes(study) if state in ("complete", "pruned")]
    assert len(counted) == 9
    assert len({json.dumps(trial.user_attrs["parameters"], sort_keys=True) for trial in counted}) == 9
    owners = [trial.user_attrs["worker"][1] for trial in counted]
    assert set(owners) == {worker.pid for worker in workers}
    assert [row["name"] for row in finished(table(cfg))].count("report first") == 1
    assert len(table(cfg)) == len(study.trials)


def forked(cfg) -> int:
    """A worker that starts without the seconds that importing torch takes."""
    if (pid := os.fork()) == 0:
        try:
            tune.run(cfg)
        finally:
            os._exit(0)
    return pid


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
def test_worker_killed_at_random_moments_loses_nothing_and_counts_once(searched, root, monkeypatch):
    """Killed again and again, the search ends as the undisturbed one did."""
    undisturbed, _ = searched
    cfg, path = config(root), root / "runs" / "tune" / "journal.log"
    monkeypatch.setattr(studies, "UNSIGNED", 0.5)
    monkeypatch.setattr(studies, "RETRIES", 10)  # all ten kills may hit one trial before its first epoch ends
    rng = np.random.default_rng(np.random.SeedSequence([4, 1]))
    killed = 0
    for records in np.cumsum(rng.integers(1, 25, 10)):
        worker, stop = forked(cfg), time.monotonic() + 60
        while os.waitpid(worker, os.WNOHANG) == (0, 0) and time.monotonic() < stop:
            if path.exists() and path.read_bytes().count(b"\n") >= records:
                os.kill(worker, signal.SIGKILL)
                os.waitpid(worker, 0)
                killed += 1
                break
            time.sleep(0.001)
    tune.run(cfg)
    assert killed >= 5
    rows = table(cfg)
    assert any(row["state"] == "retried" for row in rows)
    passing = ("trial", "folder")
    for row, wanted in zip(finished(rows), finished(table(undisturbed)), strict=True):
        assert {k: row[k] for k in row if k not in passing} == {k: wanted[k] for k in wanted if k not in passing}
    assert tune.run(cfg)["finished"] == 6


def running(study: optuna.Study, **attributes) -> int:
    """A running trial that a worker left, with these attributes."""
    trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
    study.add_trial(trial)
    return study.trials[-1].number


def test_death_of_a_worker_is_told_by_its_process_here_and_by_its_silence_elsewhere():
    study, now = optuna.create_study(), time.time()
    gone = subprocess.Popen(["sleep", "60"])
    born = studies.birth(gone.pid)
    gone.kill()
    gone.wait()
    cases = {
        running(study, worker=(studies.place(), os.getpid(), studies.birth(os.getpid())), alive=0.0): False,
        running(study, worker=(studies.place(), gone.pid, born), alive=now): True,
        running(study, worker=(studies.place(), os.getpid(), "1"), alive=now): True,  # the number was given again
        running(study, worker=("node7 a pid:[1]", os.getpid(), "1"), alive=now - 5): False,
        running(study, worker=("node7 a pid:[1]", os.getpid(), "1"), alive=now - 1000): True,
        running(study, worker=("", 1, ""), alive=now - 1000): True,
        running(study): False,  # taken this moment, not signed yet
    }
    assert {number: studies.is_stale(study.trials[number]) for number in cases} == cases
    old = optuna.trial.create_trial(state=TrialState.RUNNING)
    old.datetime_start = datetime.now() - timedelta(minutes=5)
    assert studies.is_stale(old)


def test_trial_that_two_workers_queue_again_runs_once():
    study = optuna.create_study()
    lost = running(study, worker=("", 1, ""), alive=0.0)
    twin = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"first": lost, "retry_of": lost})
    study.add_trial(twin)
    study.add_trial(twin)  # by a worker that looked at the same time
    done = list(studies.work(study, lambda trial: [1.0], lambda trial: 0, 2))
    assert sum(studies.first(trial) == lost for trial in done) == 1
    states = [state for _, state, _ in studies.outcomes(study)]
    assert states.count("complete") == 2
    assert states[:3] == ["retried", "complete", "superfluous"]


def test_trials_beyond_the_wanted_number_are_not_counted():
    study = optuna.create_study()
    for _ in range(2):
        running(study, worker=(studies.place(), os.getpid(), studies.birth(os.getpid())), alive=time.time())
    third = study.ask()
    assert studies.is_superfluous(study, third, 2)
    assert not studies.is_superfluous(study, third, 3)


def test_trial_that_kills_its_worker_each_time_is_given_up():
    study = optuna.create_study()
    running(study, worker=("", 1, ""), alive=0.0)
    for _ in range(studies.RETRIES):
        study.get_trials()
        stale = study.trials[-1]
        studies.give_back(study, stale, epochs=0)
        trial = study.ask()
        trial.set_user_attr("worker", ("", 1, ""))
        trial.set_user_attr("alive", 0.0)
    assert [state for _, state, _ in studies.outcomes(study)] == ["retried"] * studies.RETRIES + ["running"]
    studies.give_back(study, study.trials[-1], epochs=0)
    _, state, reason = studies.outcomes(study)[-1]
    assert (state, len(study.trials)) == ("pruned", studies.RETRIES + 1)
    assert reason.startswith("given up: its worker died 6 times")


def test_trial_that_comes_further_each_time_is_never_given_up():
    study = optuna.create_study()
    running(study, worker=("", 1, ""), alive=0.0)
    for epochs in range(3 * studies.RETRIES):
        studies.give_back(study, study.trials[-1], epochs)
        study.ask()
    assert study.trials[-1].state == TrialState.RUNNING


def test_error_in_a_trial_is_raised_and_the_trial_is_not_lost():
    study = optuna.create_study()
    with pytest.raises(ZeroDivisionError):
        list(studies.work(study, lambda trial: [1 / 0], lambda trial: 0, 1))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_thirds_goes_on_with_the_best_third():
    study = optuna.create_study(direction="maximize", pruner=studies.Thirds(2))
    verdicts = []
    for value in (0.5, 0.4, 0.6, 0.55, 0.1, 0.7):
        trial = study.ask()
        trial.report(0.0, 1)
        assert not trial.should_prune()  # no rung
        trial.report(value, 2)
        verdicts.append(trial.should_prune())
    assert verdicts == [False, True, False, True, True, False]


# ---------------------------------------------------------------- storage


def test_journal_that_is_cut_off_is_refused_with_the_cure(root, searched):
    cfg, _ = searched
    path, text = root / "journal.log", (cfg.folder / "journal.log").read_bytes()
    path.write_bytes(text[:-7])
    with pytest.raises(InputError, match=rf"journal\.log: cut off.*truncate -s (\d+) {path}") as stop:
        tune.run(config(root, storage=str(path)))
    assert path.read_bytes() == text[:-7]
    os.truncate(path, int(re.search(r"truncate -s (\d+)", str(stop.value))[1]))
    assert len(optuna.load_study(study_name="tune", storage=studies.open_storage(str(path))).trials) == 6


def test_running_worker_cuts_off_what_a_killed_one_left_in_the_journal(tmp_path):
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=studies.open_storage(str(path)), study_name="a")
    with path.open("ab") as stream:
        stream.write(b'{"op_code":4,"work')
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert [json.loads(line)["op_code"] for line in path.read_text().splitlines()] == [0, 4]
    assert optuna.load_study(study_name="a", storage=studies.open_storage(str(path))).best_value == 1.0


@pytest.mark.parametrize("text", [b"not a journal\n", b'{"op_code": 4}\n', b"[]\n\x80\n"])
def test_damaged_journal_is_named(root, text):
    path = root / "journal.log"
    path.write_bytes(text)
    with pytest.raises(InputError, match=r"journal\.log: damaged"):
        tune.run(config(root, storage=str(path)))


def test_storage_that_cannot_be_written_is_named(root):
    (root / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*expected a place where a file can be written"):
        tune.run(config(root, storage=str(root / "file" / "journal.log")))
    (root / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder.*expected a place where a file can be written"):
        tune.run(config(root, storage=str(root / "folder")))


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "madeup://host/db", "sqlite://host:port/a/b"])
def test_database_that_cannot_be_reached_is_named(root, url):
    with pytest.raises(InputError, match="expected a database that can be reached"):
        tune.run(config(root, storage=url))


def test_password_of_a_database_is_not_shown(root):
    with pytest.raises(InputError) as stop:
        tune.run(config(root, storage="madeup://me:secret@host/db"))
    assert "secret" not in str(stop.value)


def test_study_in_a_database(root, searched):
    cfg = config(root, storage=f"sqlite:///{root / 'study.db'}", trials=3)
    tune.run(cfg)
    assert table(cfg) == table(searched[0])[:3]


@pytest.fixture
def postgres():
    """URL of a PostgreSQL server of our own, reached through a socket in its folder."""
    driver = next((name for name in ("psycopg2", "psycopg") if importlib.util.find_spec(name)), None)
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("initdb") or "none/x").parent]
    binaries = next((place for place in places if (place / "initdb").exists()), None)
    if driver is None or binaries is None:
        pytest.skip("no PostgreSQL server or no Python driver for it (psycopg2 or psycopg) is installed")
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        if user:
            shutil.chown(folder, user)
        quiet = {"user": user, "cwd": folder, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([binaries / "initdb", "-D", folder / "data", "-A", "trust", "-U", "tuner", "-N"], **quiet)
        control = [binaries / "pg_ctl", "-D", folder / "data", "-w"]
        subprocess.run([*control, "-o", f"-k {folder} -h '' -F", "start"], **quiet)
        try:
            yield f"postgresql+{driver}://tuner:secret@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
def test_study_on_a_postgresql_server_outlives_its_killed_worker(postgres, root, searched, monkeypatch):
    monkeypatch.setattr(studies, "UNSIGNED", 0.5)
    cfg = config(root, storage=postgres, trials=4)
    worker, stop = forked(cfg), time.monotonic() + 60
    while len(list(cfg.folder.glob("trial_*/history.csv"))) < 3 and time.monotonic() < stop:
        time.sleep(0.001)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    tune.run(cfg)
    passing = ("trial", "folder")
    for row, wanted in zip(finished(table(cfg)), finished(table(searched[0]))[:4], strict=True):
        assert {k: row[k] for k in row if k not in passing} == {k: wanted[k] for k in wanted if k not in passing}


def test_study_of_other_data_or_settings_is_refused(searched, root, tmp_path_factory):
    cfg, _ = searched
    other = tmp_path_factory.mktemp("other")
    write_pairs(other, mark="b")
    storage = str(cfg.folder / "journal.log")
    with pytest.raises(InputError, match="pairs fingerprint 'a' -> 'b'"):
        tune.run(config(other, storage=storage))
    with pytest.raises(InputError, match="training epochs 3 -> 4"):
        tune.run(dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, epochs=4)))
    with pytest.raises(InputError, match="choices of loss"):
        tune.run(dataclasses.replace(cfg, choose=(*cfg.choose, "loss=MAE")))
    assert len(tune.run(cfg)["best"]) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--choose", "speed=1"], "unknown parameter 'speed'"),
        (["--trials", "0"], "trials: found 0, expected 1 or more"),
        (["--trial-minutes", "nan"], "trial_minutes: found nan"),
        ([], "pairs.zarr: no such store"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(sys, "argv", ["04_tune.py", "--preset", "smoke", "--root", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stop:
        common.main(tune.run, tune.PRESETS)
    lines = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(lines)) == (2, 1)
    assert text in lines[0]
    assert not (tmp_path / "runs").exists()
