"""Search the hyperparameters of the U-Net and of its training with Optuna (report 4.2 and 6.2).

Reads data/pairs.zarr. Writes runs/<study>/: journal.log (the study), trial_<number>/, trials.csv, best.json and
summary.json. The same command again goes on with the study; the same command beside a running one is one more worker.

Usage:
    python 04_tune.py --preset demo
    python 04_tune.py --space wide --trials 100 --trial-minutes 60 --trial-memory 16 --final-seeds 3
    python 04_tune.py --study lr --choose loss=MSE activation=ReLU lr=1e-5,1e-3 --training.epochs 30
    python 03_train_unet.py --run best --config-from runs/tune/best.json
"""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import InputError, Lazy, main, open_pairs, write_json, write_table

train = importlib.import_module("03_train_unet")

if TYPE_CHECKING:
    import optuna

    import networks
    import studies

    Training = Any
else:
    networks, studies = Lazy("networks"), Lazy("studies")
    Training = train.Config

STAGE = 4
BUDGET = ("slices", "epochs", "steps_per_epoch", "patience", "min_epochs", "seed", "memory", "precision", "compile")
METRICS = ("validation_mse", "validation_ssim")
COLUMNS = ("trial", "folder", "name", "state", "reason", *METRICS, "best_epoch", "epochs", "minutes")


@dataclass(frozen=True)
class Config:
    """Settings of one search."""

    root: Path = Path(".")
    """Folder that holds data/ and runs/."""
    study: str = "tune"
    """Name of the study and of its folder in runs/."""
    storage: str = ""
    """URL of a database, or path of a journal file; empty = runs/<study>/journal.log."""

    space: Literal["report", "wide", "demo"] = "report"
    """The report's choices (4.2); all widths in all levels and more (128-128-64 is in it); networks for two cores."""
    choose: tuple[str, ...] = ()
    """Narrow parameters: name=value fixes one, name=a,b,c lists its choices, or gives the ends if it is continuous."""
    objective: Literal["mse", "ssim", "both"] = "mse"
    """Of the validation slices at the epoch that 03 keeps: MSE (report), SSIM, or the Pareto front of both."""
    trials: int = 100
    """Trials to finish (pruned ones count), by all workers together."""
    minutes: float = 0.0
    """This worker stops after that time, and gives an unfinished trial back; 0 = no limit."""
    startup: int = 10
    """Trials that are drawn at random before TPE takes over."""
    pruner: Literal["halving", "median", "none"] = "halving"
    """Go on with the best third after 1, 3, 9 ... epochs, with what beats the median of the finished, or with all."""
    prune_from: int = 1
    """First epoch after which a trial is judged: 2 makes it 2, 6, 18, ... epochs."""
    seed: int = 0
    """Of the sampler."""

    trial_minutes: float = 0.0
    """Longest training of a trial; it is pruned beyond; 0 = no limit."""
    trial_memory: float = 0.0
    """Largest memory of a trial in GiB (of the process, or of the GPU); it is pruned beyond; 0 = no limit."""
    training: Training = train.PRESETS["paper"]
    """What the search does not vary, and the budget of a trial."""
    final_seeds: int = 0
    """Train the best settings again with that many seeds that the search has not seen."""
    final_epochs: int = 0
    """Largest number of epochs of these; 0 = that of a trial."""

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        return self.root / "runs" / self.study


PRESETS = {
    "paper": Config(),
    "demo": Config(
        space="demo", trials=8, startup=4,
        training=replace(train.PRESETS["demo"], slices=24, steps_per_epoch=0, epochs=3),
    ),
    "smoke": Config(
        space="demo", trials=3, choose=("features_main_1=2,4", "features_main_2=4,8"), startup=1,
        training=replace(train.PRESETS["smoke"], slices=4, steps_per_epoch=0, patch=32),
    ),
}  # fmt: skip


# ---------------------------------------------------------------- search space

Space = dict[str, Any]  # name of a parameter: (choice, ...), or [low, high] of a continuous one
ALWAYS = ("downsampling", "upsampling", "activation", "residual", "loss", "optimiser", "lr", "scheduler", "batch")
LOGARITHMIC = ("lr", "weight_decay")
REPORT: Space = {
    "levels": (3,),
    "features_main_1": (32, 64, 128),
    "features_main_2": (64, 128, 256),
    "features_main_3": (128, 256, 512),
    "downsampling": ("maxpool", "meanpool", "convStrided"),
    "upsampling": ("nearest", "bilinear", "bicubic", "upconv"),
    "activation": ("ReLU", "LeakyReLU", "ELU", "PReLU"),
    "residual": (True, False),
    "loss": ("MSE", "MAE", "hybrid"),
    "alpha": [0.0, 1.0],
    "optimiser": ("Adam", "AdamW", "SGD", "RMSprop"),
    "lr": [1e-6, 1e-2],
    "scheduler": ("ExponentialLR", "StepLR", "ReduceLROnPlateau"),
    "decay": (0.1, 0.3, 0.5),
    "step_size": (5, 10, 20),
    "batch": (8, 16, 32, 64),
}
WIDE: Space = REPORT | {f"features_main_{level}": (32, 64, 128, 256, 512) for level in (1, 2, 3, 4)} | {
    "levels": (2, 3, 4),
    "weight_decay": [1e-6, 1e-1],
    "scheduler": (*REPORT["scheduler"], "cosine", "none"),
    "batch": (4, 8, 16, 32, 64),
}  # fmt: skip
DEMO: Space = WIDE | {f"features_main_{level}": (8, 16, 32) for level in (1, 2, 3)} | {
    "levels": (2, 3), "lr": [1e-4, 1e-2], "step_size": (1, 2, 4), "batch": (4, 8),
}  # fmt: skip
SPACES = {"report": REPORT, "wide": WIDE, "demo": DEMO}


def narrow(space: Space, choices: Sequence[str]) -> Space:
    """The space after --choose."""
    space = dict(space)
    for item in choices:
        name, _, text = item.partition("=")
        if name not in WIDE:
            raise InputError(f"--choose {item}: unknown parameter {name!r}, expected one of {', '.join(WIDE)}")
        usual = WIDE[name]
        kind = type(usual[0])
        number = kind in (int, float)
        parse = kind if number else {str(value): value for value in usual}.__getitem__
        try:
            values = [parse(word) for word in text.split(",")]
        except (ValueError, KeyError):
            values = []
        if len(set(values)) < max(1, len(values)) or (number and not all(0 <= value < math.inf for value in values)):
            raise InputError(f"--choose {item}: found {text!r}, expected values of {name} such as {usual}")
        space[name] = [min(values), max(values)] if isinstance(usual, list) and len(values) > 1 else tuple(values)
    if not set(space["levels"]) <= set(WIDE["levels"]):
        raise InputError(f"--choose: levels {space['levels']} found, expected some of {WIDE['levels']}")
    widths = [f"features_main_{level}" for level in range(1, max(space["levels"]) + 1)]
    space = {name: WIDE[name] for name in widths} | space
    if all(len(values) == 1 for values in space.values()):
        raise InputError("--choose: the space is empty, every parameter is fixed; expected one or more to search")
    return space


def propose(pick: Callable[[str], Any], space: Space) -> dict[str, Any]:
    """One set of settings for 03; a parameter is picked only where it applies."""
    levels = range(1, pick("levels") + 1)
    settings: dict[str, Any] = {"features_main": tuple(pick(f"features_main_{level}") for level in levels)}
    settings |= {"features_skip": ()} | {name: pick(name) for name in ALWAYS}
    applies = {
        "alpha": settings["loss"] == "hybrid",
        "weight_decay": settings["optimiser"] == "AdamW" and "weight_decay" in space,
        "decay": settings["scheduler"] in REPORT["scheduler"],
        "step_size": settings["scheduler"] == "StepLR",
    }
    return settings | {name: pick(name) for name, holds in applies.items() if holds}


def within(values: Any, value: Any) -> bool:
    """Whether a search over these values can come to this one."""
    return values[0] <= value <= values[-1] if isinstance(values, list) else len(values) > 1 and value in values


def known_trials(space: Space) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The report's first settings and its tuned ones; what a space cannot come to is pinned to the trial."""
    trials = {}
    for name, preset in (("report first", "paper"), ("report tuned", "tuned")):
        setting = train.PRESETS[preset]
        values = networks.plain(setting) | {"levels": len(setting.features_main)}
        values |= {f"features_main_{level}": width for level, width in enumerate(setting.features_main, start=1)}
        values = {key: values[key] for key in WIDE if key in values}
        searched = {key: value for key, value in values.items() if key in space and within(space[key], value)}
        trials[name] = (searched, {"pinned": {key: value for key, value in values.items() if key not in searched}})
    return trials


# ---------------------------------------------------------------- one trial


def run_folder(cfg: Config, trial: Any) -> Path:
    """Where a trial trains; the attempts at a trial share it."""
    return cfg.folder / str(trial.user_attrs.get("folder", f"trial_{studies.first(trial)}"))


def past_epochs(cfg: Config, trial: Any) -> list[dict[str, Any]]:
    """Epochs in the checkpoint that a trial left."""
    with contextlib.suppress(InputError):
        return list(networks.load_checkpoint(run_folder(cfg, trial) / "last.pt")["history"])
    return []


def figures(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a trial reached: at the epoch of the lowest loss, whose weights 03 keeps."""
    best = min(history, key=lambda row: row["validation"])
    values = {name: best[name] for name in METRICS} | {"best_epoch": best["epoch"]}
    return values | {"epochs": len(history), "minutes": sum(row["seconds"] for row in history) / 60}


def train_trial(trial: optuna.Trial, cfg: Config, space: Space, deadline: float) -> list[float]:
    """Train with the settings of a trial; its values, or TrialPruned with the reason."""
    from optuna import TrialPruned

    pinned, picked = trial.user_attrs.get("pinned", {}), {}

    def pick(name: str) -> Any:
        if name in pinned:
            picked[name] = pinned[name]
        elif isinstance(space[name], list):
            picked[name] = trial.suggest_float(name, *space[name], log=name in LOGARITHMIC)
        else:
            picked[name] = trial.suggest_categorical(name, space[name]) if len(space[name]) > 1 else space[name][0]
        return picked[name]

    settings = propose(pick, space) | ({"seed": pinned["seed"]} if "seed" in pinned else {})
    trial.set_user_attr("parameters", picked)
    history = past_epochs(cfg, trial) if "retry_of" in trial.user_attrs else []
    folder = str(run_folder(cfg, trial).relative_to(cfg.root / "runs"))
    setting = replace(cfg.training, root=cfg.root, run=folder, fresh=not history, **settings)
    metrics = {"mse": METRICS[:1], "ssim": METRICS[1:]}.get(cfg.objective, METRICS)
    seconds = 60 * cfg.trial_minutes - sum(row["seconds"] for row in history) if cfg.trial_minutes else math.inf

    def report(row: dict[str, Any], past: bool = False) -> None:
        with shield():
            if not past:
                history.append(row)
            if len(metrics) == 1:  # Optuna prunes by one value only
                trial.report(row[metrics[0]], row["epoch"])
            if row is history[-1] and len(metrics) == 1 and trial.should_prune() and "name" not in trial.user_attrs:
                raise TrialPruned(f"pruner: {row[metrics[0]]:.4g} after epoch {row['epoch']} is behind other trials")
            if time.monotonic() > deadline:
                raise studies.Postponed

    try:
        with (
            studies.time_limit(seconds, f"time limit: not done in {cfg.trial_minutes:g} minutes") as shield,
            studies.memory_limit(cfg.trial_memory, networks.pick_device(setting.device)),
        ):
            for row in history:
                report(row, past=True)
            train.run(setting, report)
    except train.TrainingFailed as error:
        raise TrialPruned(str(error)) from None
    except (MemoryError, RuntimeError) as error:  # in other places than the training's steps
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise TrialPruned(f"out of memory: {str(error).splitlines()[0]}") from None
    finally:
        if history:
            trial.set_user_attr("figures", figures(history))
    values = [figures(history)[name] for name in metrics]
    if not all(map(math.isfinite, values)):
        raise TrialPruned(f"not finite: validation {values}")
    return values


# ---------------------------------------------------------------- results


def search(study: optuna.Study, cfg: Config, space: Space, target: int, deadline: float) -> None:
    """Run trials until enough are finished, one line each."""
    for trial in studies.work(
        study,
        lambda chosen: train_trial(chosen, cfg, space, deadline),
        lambda left: len(past_epochs(cfg, left)),
        target,
        deadline,
    ):
        done = sum(state in ("complete", "pruned") for _, state, _ in studies.outcomes(study))
        values = " ".join(f"{value:.4g}" for value in trial.values or []) or "no value"
        found = f"best {best[0].number}" if (best := studies.best_trials(study)) else "none finished"
        reason = trial.user_attrs["reason"]
        print(f"trial {trial.number} | {done}/{target} | {values} | {reason or 'finished'} | {found}", flush=True)
        for name in ("last.pt", "best.pt") if reason else ("last.pt",):  # nothing goes on from here
            (run_folder(cfg, trial) / name).unlink(missing_ok=True)


def write_results(study: optuna.Study, cfg: Config, space: Space) -> dict[str, Any]:
    """Write trials.csv and best.json, and give the summary."""
    rows = [
        {"trial": trial.number, "folder": run_folder(cfg, trial).name, "state": state, "reason": reason}
        | {"name": trial.user_attrs.get("name", "")}
        | trial.user_attrs.get("figures", {})
        | trial.user_attrs.get("parameters", {})
        for trial, state, reason in studies.outcomes(study)
    ]
    finished = [row for row in rows if row["state"] in ("complete", "pruned")]
    best = studies.best_trials(study)
    summary: dict[str, Any] = {
        "study": cfg.study, "space": cfg.space, "objective": cfg.objective, "finished": len(finished),
        "trials": Counter(row["state"] for row in rows), "minutes": sum(row.get("minutes", 0.0) for row in finished),
        "pruned": Counter(row["reason"].partition(":")[0] for row in finished if row["reason"]),
        "known": {row["name"]: row.get("validation_mse") for row in rows if row["name"]},
        "best": [{name: value for name, value in rows[trial.number].items() if value != ""} for trial in best],
        "importances": studies.importances(study),
    }  # fmt: skip
    write_table(cfg.folder / "trials.csv", (*COLUMNS, *WIDE), rows)
    if best:
        settings = propose(best[0].user_attrs["parameters"].__getitem__, space)
        config = networks.plain(replace(cfg.training, **settings))
        config = {name: value for name, value in config.items() if name not in (*train.FREE, *BUDGET)}
        values = {name: rows[best[0].number][name] for name in ("trial", *METRICS)}
        write_json(cfg.folder / "best.json", {"study": cfg.study, "config": config} | values)
    return summary


def train_again(
    cfg: Config, storage: Any, best: optuna.trial.FrozenTrial, about: dict[str, Any], space: Space, deadline: float
) -> dict[str, Any]:
    """Train the best settings with new seeds, as a study of their own: workers share it, a kill loses nothing."""
    epochs = cfg.final_epochs or cfg.training.epochs
    cfg = replace(cfg, trial_minutes=0.0, training=replace(cfg.training, epochs=epochs))
    parameters = best.user_attrs["parameters"]
    known: dict[str, Any] = {}
    for seed in range(cfg.training.seed + 1, cfg.training.seed + 1 + cfg.final_seeds):  # none that the search has seen
        known[f"seed {seed}"] = ({}, {"pinned": parameters | {"seed": seed}, "folder": f"final_{best.number}_{seed}"})
    name, pruner = f"{cfg.study}-final-{best.number}-{epochs}", studies.build_pruner("none", 1)
    about = about | {"parameters": parameters}
    study = studies.open_study(storage, name, cfg.folder, cfg.objective, None, pruner, about, known)
    search(study, cfg, space, cfg.final_seeds, deadline)
    runs = [trial.user_attrs["figures"] for trial in studies.best_trials(study, every=True)]
    result: dict[str, Any] = {"runs": len(runs), "epochs": epochs}
    for metric in METRICS if len(runs) > 1 else ():
        values = [run[metric] for run in runs]
        result[metric] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values), "values": values}
    return result


def check(cfg: Config) -> None:
    """Refuse limits and counts that make no sense."""
    least = {"trials": 1, "startup": 1, "prune_from": 1, "minutes": 0, "seed": 0, "trial_minutes": 0, "trial_memory": 0}
    for name, lowest in (least | {"final_seeds": 0, "final_epochs": 0}).items():
        if not lowest <= getattr(cfg, name) < math.inf:
            raise InputError(f"{name}: found {getattr(cfg, name)}, expected {lowest} or more")


def run(cfg: Config) -> dict[str, Any]:
    """Search, and give the summary."""
    start = time.monotonic()
    check(cfg)
    space = narrow(SPACES[cfg.space], cfg.choose)
    about = {"pairs fingerprint": open_pairs(cfg.root).attributes["fingerprint"], "objective": cfg.objective}
    about |= {f"choices of {name}": values for name, values in space.items()} | {"seed": cfg.seed}
    fixed = networks.plain(cfg.training).items()
    about |= {f"training {name}": value for name, value in fixed if name not in train.FREE and name not in space}
    deadline = start + 60 * cfg.minutes if cfg.minutes else math.inf
    if cfg.objective == "both" and cfg.pruner != "none":
        print("objective both: the pruner, which judges one value, stops no trial", flush=True)
    where = cfg.storage or str(cfg.folder / "journal.log")
    with studies.storage_errors(where):
        storage = studies.open_storage(where)
        sampler, known = studies.SeededTPE(cfg.startup, cfg.seed, STAGE), known_trials(space)
        pruner = studies.build_pruner(cfg.pruner, cfg.prune_from)
        study = studies.open_study(storage, cfg.study, cfg.folder, cfg.objective, sampler, pruner, about, known)
        search(study, cfg, space, cfg.trials, deadline)
        with studies.one_at_a_time(cfg.folder / "results"):
            summary = write_results(study, cfg, space)
            write_json(cfg.folder / "summary.json", summary)
        done = summary["finished"] >= cfg.trials
        if done and not summary["best"]:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in summary["pruned"].items())
            raise InputError(f"{cfg.folder}: no trial came to its end ({reasons}), expected wider limits")
        if done and cfg.final_seeds and not summary["trials"]["running"]:
            best = studies.best_trials(study)[0]
            summary["final"] = train_again(cfg, storage, best, about, space, deadline)
            with studies.one_at_a_time(cfg.folder / "results"):
                write_json(cfg.folder / "summary.json", summary)
    return summary


if __name__ == "__main__":
    main(run, PRESETS)
