"""An Optuna study that several workers share and that outlives them: storage, seeds, retries, limits of a trial.

Apart from 04_tune.py, because nothing in it knows what a trial trains. Loaded lazily: Optuna takes its time to import.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import resource
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from common import InputError

if TYPE_CHECKING:
    import torch

BEAT, GRACE, UNSIGNED = 20.0, 120.0, 10.0  # seconds: between signs of life, until silence means death, to sign a trial
PATIENCE = 30.0  # seconds until a lock that does not change hands is taken for abandoned
RETRIES = 5  # attempts in a row without one more epoch after which a trial is given up
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Postponed(Exception):
    """The worker's time is over: the trial goes back into the queue."""


class _TimeIsUp(BaseException):
    """Interrupts whatever runs; no `except Exception` on its way (those of type checkers, say) may catch it."""


# ---------------------------------------------------------------- storage


class Lock:
    """A file that exists while one worker has it (safe on NFS), and that says whose it is.

    A killed worker's lock is taken away at once on its own machine, and after half a minute elsewhere. (Optuna's locks
    always wait that long, the default one for ever: it is a symlink, which dangles if the path is relative.) The lock
    of a journal first cuts off a line that a killed writer left unfinished: the next record would stand on that line,
    and nobody could read the journal any more.
    """

    def __init__(self, path: Path, journal: bool = False) -> None:
        self.path, self.journal = path, path.with_name(path.name.removesuffix(".lock")) if journal else None
        self.owner = ""

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.owner = json.dumps([place(), os.getpid(), birth(os.getpid()), threading.get_ident()])
        seen, since = "", time.monotonic()
        while True:
            with contextlib.suppress(FileExistsError), self.path.open("x") as stream:
                stream.write(self.owner)
                break
            if (found := self._read()) != seen:
                seen, since = found, time.monotonic()
            if time.monotonic() - since > PATIENCE or is_dead(seen):
                self._break(seen)
            time.sleep(0.005)
        if self.journal and (loose := unfinished(self.journal)):
            os.truncate(self.journal, self.journal.stat().st_size - loose)
        return True

    def release(self) -> None:
        """Give it back, unless it was taken away."""
        if self._read() == self.owner:
            self.path.unlink()

    def _read(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_text()
        return ""

    def _break(self, owner: str) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # or the slower of two would take away the lock that the faster has got
            if self._read() == owner:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(folder)


def is_dead(owner: str) -> bool:
    """Whether a lock's owner was a process of this machine and is gone; not known of one who has not signed yet."""
    with contextlib.suppress(ValueError):
        where, pid, born, _ = json.loads(owner)
        return bool(where and where == place() and birth(pid) != born)
    return False


def unfinished(path: Path) -> int:
    """Bytes after the last end of a line."""
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return 0 if stream.read(1) == b"\n" else len(path.read_bytes().rpartition(b"\n")[2])


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Keep the other workers out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = Lock(path)
    held.acquire()
    try:
        yield
    finally:
        held.release()


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """Open the URL of a database, or a journal file (safe on NFS, needs no server).

    Raises
    ------
    InputError
        If it cannot be reached, written or read, or if the journal ends within a line.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in where:
        try:
            return RDBStorage(where)
        except Exception as error:  # each driver of a database raises its own
            found = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{where.split('@')[-1]}: {found}, expected a database that can be reached") from None
    path = Path(where)
    lock = path.with_name(f"{path.name}.lock")
    try:
        with one_at_a_time(lock):
            loose = unfinished(path)
            whole = path.stat().st_size - loose if path.exists() else 0
            for line in path.read_bytes().splitlines()[-1:] if whole and not loose else ():
                json.loads(line)  # Optuna looks at the last line only when there is a further one
        if loose:
            found = f"cut off, {loose} bytes of an unfinished last line"
            raise InputError(f"{path}: {found}, expected whole lines; `truncate -s {whole} {path}` drops it")
        backend = JournalFileBackend(str(path), Lock(lock, journal=True))  # type: ignore[arg-type]
        return JournalStorage(backend)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a place where a file can be written") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}), expected the journal of a study") from None


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn a database that stops answering into one line."""
    try:
        yield
    except StorageInternalError as error:
        found = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{where.split('@')[-1]}: {found}, expected a database that answers") from None


# ---------------------------------------------------------------- study


class SeededTPE:
    """TPE whose draws depend on the seed and on how many trials came before, not on the worker or on its attempts.

    With one worker, a search that was killed and goes on proposes what an undisturbed one does.
    """

    def __init__(self, startup: int, *entropy: int) -> None:
        self.startup, self.entropy = startup, entropy
        self.tpe = self._fresh(0)

    def _fresh(self, number: int) -> optuna.samplers.TPESampler:
        seed = int(np.random.SeedSequence([*self.entropy, number]).generate_state(1)[0])
        with warnings.catch_warnings():  # `group` is experimental, and what conditional parameters need
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=self.startup, multivariate=True, group=True, constant_liar=True
            )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Start anew before Optuna draws."""
        trials = study.get_trials(deepcopy=False)
        self.tpe = self._fresh(sum(t.number < first(trial) and "retry_of" not in t.user_attrs for t in trials))
        self.tpe.before_trial(study, trial)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tpe, name)


class Thirds(optuna.pruners.BasePruner):
    """Asynchronous successive halving by thirds, without a state: attempts that were cut off are not counted twice.

    After `start`, 3 start, 9 start ... epochs a trial goes on if it is in the best third of those that came so far.
    """

    def __init__(self, start: int) -> None:
        self.rungs = {start * 3**power for power in range(12)}

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to be stopped after its last reported epoch."""
        step = trial.last_step
        if step is None or step not in self.rungs:
            return False
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        others = [
            t for t in study.get_trials(deepcopy=False) if t.state != TrialState.FAIL and t.number != trial.number
        ]
        values = [sign * t.intermediate_values[step] for t in others if step in t.intermediate_values]
        better = sum(value < sign * trial.intermediate_values[step] for value in values)
        return better >= max(1, (len(values) + 1) // 3)


def open_study(
    storage: optuna.storages.BaseStorage,
    name: str,
    folder: Path,
    objective: str,
    sampler: Any,
    pruner: optuna.pruners.BasePruner,
    about: dict[str, Any],
    known: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> optuna.Study:
    """Make a study, or find one of the same settings and data.

    Parameters
    ----------
    storage, name, sampler, pruner
        As Optuna has them.
    folder : Path
        Seen by all workers; takes the lock.
    objective : str
        mse, ssim or both.
    about : dict
        Plain data that have to be the same for all workers at all times.
    known : dict
        First trials, by their names: parameters, and attributes.

    Raises
    ------
    InputError
        If the study exists with another `about`; names the differences.
    """
    directions: Any = {"mse": ["minimize"], "ssim": ["maximize"], "both": ["minimize", "maximize"]}[objective]
    about = json.loads(json.dumps(about))
    with one_at_a_time(folder / "setup"):  # of several workers that start together, one makes the study
        if name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        else:
            study = optuna.create_study(
                study_name=name, storage=storage, sampler=sampler, pruner=pruner, directions=directions
            )
        found = study.user_attrs.get("about", about)
        if found != about:
            names = sorted(key for key in found.keys() | about.keys() if found.get(key) != about.get(key))
            text = ", ".join(f"{key} {found.get(key)!r} -> {about.get(key)!r}" for key in names)
            found = f"study {name!r}: other settings or data found ({text})"
            raise InputError(f"{found}, expected the same, or a new --study")
        there = {trial.user_attrs.get("name") for trial in study.get_trials(deepcopy=False)}
        for label, (values, attributes) in known.items():
            if label not in there:
                study.enqueue_trial(values, user_attrs=attributes | {"name": label})
        if "about" not in study.user_attrs:
            study.set_user_attr("about", about)
    return study


def build_pruner(kind: str, start: int) -> optuna.pruners.BasePruner:
    """Successive halving, the median rule, or none; `start` is the first epoch that is judged."""
    if kind == "halving":
        return Thirds(start)
    if kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=start - 1)
    return optuna.pruners.NopPruner()


def outcomes(study: optuna.Study) -> list[tuple[FrozenTrial, str, str]]:
    """Each trial with its state and the reason; a failed one was tried again, or was one too many."""
    trials = study.get_trials(deepcopy=False)
    heirs = {trial.user_attrs.get("retry_of") for trial in trials}
    found = []
    for trial in trials:
        state, reason = trial.state.name.lower(), trial.user_attrs.get("reason", "")
        if state == "fail":
            state = "retried" if trial.number in heirs else "superfluous"
        if state == "pruned" and not reason:
            reason = f"given up: its worker died {RETRIES + 1} times without one more epoch"
        found.append((trial, state, reason))
    return found


def best_trials(study: optuna.Study, every: bool = False) -> list[FrozenTrial]:
    """Complete trials: the best one (of two objectives the Pareto front, nearest to its ideal point first), or all."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if every or not complete:
        return complete
    if len(study.directions) == 1:
        return [study.best_trial]
    front = study.best_trials
    points = np.array([trial.values for trial in front]) * [1, -1]
    spread = np.ptp(points, axis=0)
    distances = np.hypot(*((points - points.min(axis=0)) / np.where(spread > 0, spread, 1)).T)
    return [front[i] for i in np.argsort(distances, kind="stable")]


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of each parameter in what sets the best trials apart (PED-ANOVA); nothing with fewer than 10 trials."""
    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < 10:
        return {}
    target = None if len(study.directions) == 1 else lambda trial: trial.values[0]
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a remark that the target is minimised
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, target=target))


# ---------------------------------------------------------------- workers that die


def first(trial: Trial | FrozenTrial) -> int:
    """Number of the trial that this one is, or is a further attempt at."""
    return int(trial.user_attrs.get("first", trial.number))


def birth(pid: int) -> str:
    """When a process of this machine started; nothing if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state == "Z" else fields[18]


def place() -> str:
    """Where a process number means what it means here; nothing if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_stale(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial is gone: known at once on its own machine, elsewhere from its silence."""
    if "worker" not in trial.user_attrs:  # killed between taking the trial and signing it
        return trial.datetime_start is None or datetime.now() - trial.datetime_start > timedelta(seconds=UNSIGNED)
    where, pid, born = trial.user_attrs["worker"]
    if where and where == place():
        return bool(birth(pid) != born)
    return bool(time.time() - trial.user_attrs["alive"] > GRACE)


def give_back(study: optuna.Study, trial: FrozenTrial, epochs: int) -> None:
    """Queue a running trial once more; it goes on after `epochs`. A kill between the two steps loses nothing."""
    before, attempts = trial.user_attrs.get("attempts", (0, 0))
    attempts = attempts + 1 if epochs == before else 1
    heirs = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("retry_of") == trial.number]
    given_up = attempts > RETRIES
    if not heirs and not given_up:
        attributes = {name: value for name, value in trial.user_attrs.items() if name not in ("worker", "alive")}
        attributes |= {"first": first(trial), "retry_of": trial.number, "attempts": (epochs, attempts)}
        drawn = "parameters" in trial.user_attrs  # else it draws all of them anew, and in one row
        heir = optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=trial.params if drawn else {},
            distributions=trial.distributions if drawn else {},
            user_attrs=attributes,
            system_attrs=trial.system_attrs,
        )
        study.add_trial(heir)
    with contextlib.suppress(ValueError, UpdateFinishedTrialError):  # another worker did it meanwhile
        study.tell(trial.number, state=TrialState.PRUNED if given_up else TrialState.FAIL)


def is_superfluous(study: optuna.Study, trial: Trial, target: int) -> bool:
    """Whether two workers queued the same trial once more, or together started more trials than are wanted."""
    trials = study.get_trials(deepcopy=False)
    parent = trial.user_attrs.get("retry_of", -1)
    twins = [t.number for t in trials if parent >= 0 and t.user_attrs.get("retry_of", -1) == parent]
    earlier = {first(t) for t in trials if t.state != TrialState.FAIL and first(t) < first(trial)}
    return trial.number > min(twins, default=trial.number) or len(earlier) >= target


@contextlib.contextmanager
def signed(trial: Trial) -> Iterator[None]:
    """Say in the storage whose trial this is, and again and again that its worker is alive."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(UpdateFinishedTrialError, StorageInternalError, OSError):
                trial.set_user_attr("alive", time.time())

    trial.set_user_attr("alive", time.time())
    trial.set_user_attr("worker", (place(), os.getpid(), birth(os.getpid())))
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def work(
    study: optuna.Study,
    objective: Callable[[Trial], Sequence[float]],
    epochs: Callable[[FrozenTrial], int],
    target: int,
    deadline: float = math.inf,
) -> Iterator[FrozenTrial]:
    """Run trials until `target` of them are finished, or the rest is in other workers' hands, or the time is over.

    Parameters
    ----------
    study : optuna.Study
        As `open_study` gave it.
    objective : callable
        The values of a trial, whose attribute `parameters` it sets when all are drawn; raises TrialPruned with the
        reason, or Postponed.
    epochs : callable
        How many epochs of a trial its checkpoint holds.
    target : int
        Trials, finished or pruned, of all workers.
    deadline : float
        On time.monotonic.

    Yields
    ------
    FrozenTrial
        Each trial that this worker finished.
    """
    while time.monotonic() < deadline:
        running = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
        for trial in running:
            if is_stale(trial):
                give_back(study, trial, epochs(trial))
        trials = study.get_trials(deepcopy=False)
        running = [t for t in trials if t.state == TrialState.RUNNING]
        if not all("worker" in t.user_attrs for t in running):  # its worker signs it this moment, or is dead
            time.sleep(0.05)
            continue
        if sum(t.state in FINISHED for t in trials) + len(running) >= target:
            return
        chosen = study.ask()
        if is_superfluous(study, chosen, target):
            study.tell(chosen, state=TrialState.FAIL)
            continue
        try:
            with signed(chosen):
                state, values, reason = TrialState.COMPLETE, [*objective(chosen)], ""
        except optuna.TrialPruned as error:
            state, values, reason = TrialState.PRUNED, None, str(error)
        except UpdateFinishedTrialError:  # asleep for so long that another worker took it over
            continue
        except BaseException as error:
            trial = study.get_trials(deepcopy=False)[chosen.number]
            give_back(study, trial, epochs(trial))
            if isinstance(error, Postponed):
                return
            raise
        chosen.set_user_attr("reason", reason)  # first: a finished trial cannot be added to
        study.tell(chosen, values, state)
        yield study.get_trials(deepcopy=False)[chosen.number]


# ---------------------------------------------------------------- limits of a trial


@contextlib.contextmanager
def time_limit(seconds: float, text: str) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Raise TrialPruned(text) after that time, in the midst of whatever runs but a block under the context it gives.

    The storage is used in such blocks: an exception in there could release another worker's lock.
    """

    shielded, late = False, False

    def over(*_: Any) -> None:
        nonlocal late
        late = True
        if not shielded:
            raise _TimeIsUp

    @contextlib.contextmanager
    def shield() -> Iterator[None]:
        nonlocal shielded
        shielded = True
        try:
            yield
        finally:
            shielded = False
        if late:
            raise _TimeIsUp

    if math.isinf(seconds):
        yield contextlib.nullcontext
        return
    before = signal.signal(signal.SIGALRM, over)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        yield shield
    except _TimeIsUp:
        raise optuna.TrialPruned(text) from None
    finally:
        shielded = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(gib: float, device: torch.device) -> Iterator[None]:
    """Let allocations beyond the limit fail: of the GPU if that is the device, else of the process; 0 = no limit."""
    if not gib:
        yield
    elif device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    else:
        before, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
