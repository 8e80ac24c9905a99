"""Train a network on anchored paths from high to low images, the report's APDDM in full (report 4.3, appendix C).

Reads data/pairs.zarr and, to start from a U-Net, runs/<init-from>/best.pt. Writes runs/<run>/best.pt, last.pt,
history.csv, figures.npz and summary.json. The same command again goes on where a stopped run was. The mathematics as
built, with its corrections of the report, are in docs/APDDM.md.

Usage:
    python 05_apddm.py --preset demo
    python 05_apddm.py --preset last --beta 4
    torchrun --nproc-per-node 4 -- 05_apddm.py --preset paper  # one process for each GPU, the batch shared out
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from tqdm import tqdm

from common import (
    SPLITS,
    Array,
    InputError,
    Lazy,
    atomic_path,
    body_mask,
    fingerprint,
    main,
    open_pairs,
    sha256,
    write_json,
    write_table,
)
from likeness import training_range

if TYPE_CHECKING:
    import torch

    import anchored
    import networks
    import parallel
else:
    networks, anchored, parallel = map(Lazy, ("networks", "anchored", "parallel"))

STAGE, BANK = 5, 64  # BANK: residual slices kept in the checkpoint for sampling; training draws from all
COLUMNS = ["epoch", "train", "validation", "validation_mse", "lr", "seconds", "images_per_second"]
FREE = ("root", "run", "fresh", "device", "threads")  # what may differ between the runs of one training


@dataclass(frozen=True)
class Config:
    """Settings of one training and of the sampling that its intervals are calibrated for."""

    root: Path = Path(".")
    """Folder that holds data/ and runs/."""
    run: str = "apddm"
    """Name of the folder in runs/."""
    fresh: bool = False
    """Start over: what the run's folder holds is replaced."""
    init_from: str = ""
    """Run in runs/ whose U-Net gives structure and first weights; empty = the structure below, random weights."""

    timesteps: Literal["all", "last"] = "all"
    """all = t uniform on 1..T; last = t = T alone, without embedding: the report's simplified APDDM (6.4)."""
    end_share: float = 0.0
    """Share of a step's images that stand at t = T, the state known at use, while the others have t uniform on 1..T."""
    parametrization: Literal["residual", "paper"] = "residual"
    """Estimate of x_0: x_t - r, or x_t - f(t) r (Eq. 10), which cannot restore from t = T."""
    condition: bool = False
    """Give the low image to the network as a second channel."""
    embedding: int = 64
    """Width of the embedding of t / T, an even number."""

    length: int = 100
    """Number of steps T of the path."""
    schedule: str = "parabola"
    """Noise schedule f(t / T): parabola (Eq. 21), halfsine, constant, or module:function of an array in (0, 1]."""
    beta: float = 1.0
    """Standard deviation of the path's end about the low image, in units of beta_crit (Eq. 37)."""
    beta_value: float = 0.0
    """The same in normalised units, which does not depend on T; 0 = beta * beta_crit."""
    beta_range: bool = False
    """Draw each image's beta from 0 to beta, so that the low image itself is a state that was trained on."""
    draws: Literal["jump", "chain"] = "jump"
    """Noise at t from one draw scaled to the variance at t, or from the sum of t draws (exact)."""
    noise: Literal["bank", "gaussian"] = "bank"
    """Draws from the residuals of the training slices, or white Gaussian ones."""
    rotations: bool = True
    """Turn each draw by a random multiple of 90 degrees."""

    batch: int = 32
    """Slices of a step."""
    patch: int = 0
    """Side of random crops in pixels; 0 = whole slices, padded to the largest of the batch (report 3.5)."""
    flips: bool = True
    """Flip each slice along y and along x, each with a probability of 50 % (report 3.5)."""

    features_main: tuple[int, ...] = (64, 128, 256)
    """Feature channels of each level of the network (report 4.2.1)."""
    features_skip: tuple[int, ...] = ()
    """Channels of each skip connection; empty = features_main without its last."""
    downsampling: Literal["maxpool", "meanpool", "convStrided"] = "meanpool"
    """From a level to the next coarser one."""
    upsampling: Literal["nearest", "bilinear", "bicubic", "upconv"] = "upconv"
    """From a level to the next finer one."""
    activation: Literal["ReLU", "LeakyReLU", "ELU", "PReLU"] = "ReLU"
    """Eq. 1-4."""
    residual: bool = True
    """The network's output is added to its input."""
    unshuffle: int = 1
    """Work on a grid coarser by this factor, with a channel for each pixel of a block."""

    lr: float = 1e-4
    """Learning rate of AdamW; it falls to 0 along half a cosine."""
    warm_up: float = 0.0
    """Epochs over which the learning rate rises from 0."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 = no limit."""
    ema: float = 0.99
    """Decay per step of an average of the weights, which is what is validated and saved; 0 = off."""
    epochs: int = 200
    """Largest number of epochs."""
    steps_per_epoch: int = 0
    """Steps between two validations; 0 = one pass through the training slices."""
    patience: int = 6
    """Stop after this many epochs without improvement (report 4.2.2)."""
    min_epochs: int = 10
    """Never stop earlier for lack of improvement."""

    steps: int = 4
    """Sampling: evaluations of the network per sample."""
    samples: int = 8
    """Sampling: their mean is the restored image, their standard deviation its uncertainty."""
    eta: float = 1.0
    """Sampling: share of fresh noise, from 0 (deterministic) to 1 (ancestral)."""
    noisy_start: bool = True
    """Sampling: start at the low image plus noise of the path's end, not at the low image."""
    coverage: float = 0.9
    """Share of pixels that the intervals calibrated on the validation animals hold."""
    calibration_slices: int = 24
    """Validation slices, spread evenly, that calibrate the intervals."""

    seed: int = 0
    """Of weights, order, crops, flips, t and noise."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Convolutions in bfloat16 where the processor has it, or always, or never."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """Threads of a training on the CPU; 0 = all cores."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.root / "runs" / self.run


PAPER = Config()
PRESETS = {
    "paper": PAPER,
    "last": dataclasses.replace(PAPER, run="apddm_last", timesteps="last", steps=1),
    "demo": dataclasses.replace(
        PAPER, init_from="unet", batch=8, patch=128, lr=3e-4, warm_up=0.2, epochs=5, steps_per_epoch=100,
    ),
    "smoke": dataclasses.replace(
        PAPER, batch=4, patch=64, features_main=(16, 32), upsampling="bilinear", unshuffle=2, lr=3e-3, epochs=2,
        steps_per_epoch=20, min_epochs=2, length=10, steps=2, samples=4, calibration_slices=4,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- training


def validate(
    model: anchored.APDDM,
    noise: anchored.Noise,
    pairs: networks.PairSet,
    cfg: Config,
    dtype: torch.dtype,
    group: parallel.Group,
) -> dict[str, float]:
    """Mean over the slices of the training's loss, t spread evenly, and of the MSE of one step from the low image."""
    import torch

    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(pairs), cfg.batch)[group.rank :: group.size]:
        items = range(start, min(start + cfg.batch, len(pairs)))
        batch = pairs.batch(items, model.net.config.multiple)
        generator = networks.seeded(cfg.seed, STAGE, 0, start)
        # Multiples of the golden section: any stretch of slices has its times spread over the path.
        steps = [cfg.length if cfg.timesteps == "last" else 1 + int(cfg.length * (0.618034 * i % 1)) for i in items]
        levels = [0.754878 * i % 1 if cfg.beta_range else 1.0 for i in items]
        state = anchored.state_at(model.path, noise, batch, steps, levels, cfg.draws == "chain", generator)
        with torch.inference_mode(), networks.autocast(pairs.device, dtype):
            along = model.estimate(state, torch.tensor(steps), batch.low)
            once = model.estimate(batch.low, model.path.length, batch.low)
        sums += torch.stack([networks.image_losses("MSE", 1.0, x, batch).double().sum() for x in (along, once)]).cpu()
    return dict(zip(COLUMNS[2:4], (group.total(sums.to(pairs.device)) / len(pairs)).tolist(), strict=True))


def check(cfg: Config) -> None:
    """Refuse settings that cannot be trained with."""
    positive = ["batch", "epochs", "lr", "calibration_slices", "samples", "length"]
    for name in (*positive, "patch", "steps_per_epoch", "warm_up", "clip", "threads", "beta", "beta_value"):
        value, wanted = getattr(cfg, name), "a positive number" if name in positive else "0 or more"
        if not (value > 0 if name in positive else value >= 0) or not math.isfinite(value):
            raise InputError(f"{name}: found {value}, expected {wanted}")
    if cfg.embedding < 2 or cfg.embedding % 2:
        raise InputError(f"embedding: found {cfg.embedding}, expected an even number")
    if not (0 <= cfg.ema < 1 and 0 < cfg.coverage < 1 and 0 <= cfg.end_share <= 1):
        found = f"ema {cfg.ema}, coverage {cfg.coverage}, end_share {cfg.end_share}"
        raise InputError(f"{found} found, expected shares: 0 to 1, ema and coverage less than 1")


# ---------------------------------------------------------------- intervals


def calibrate(cfg: Config, model: anchored.APDDM) -> dict[str, Any]:
    """Factor of the intervals from the bodies of validation animals, and each animal's share of pixels inside."""
    store, code = open_pairs(cfg.root), SPLITS.index("validation")
    places = [(k, i) for k in store.scans for i in np.flatnonzero(store.read(k, "split", 1, "uint8") == code).tolist()]
    few = np.linspace(0, len(places) - 1, min(len(places), cfg.calibration_slices)).astype(int)
    scores: dict[str, list[Array]] = {}
    for key, group in groupby([places[i] for i in few], lambda place: place[0]):
        low, high = (store.read(key, name, 3, "float32") for name in ("low", "high"))
        scale, offset = (store.read(key, name, 1, "float32")[:, None, None] for name in ("scale", "offset"))
        chosen, body = [index for _, index in group], body_mask(low * scale + offset)
        low, high, body = low[chosen], high[chosen], body[chosen] if body.any() else np.ones(low.shape, bool)[chosen]
        unit, zero = np.ones(len(low), np.float32), np.zeros(len(low), np.float32)
        how: dict[str, Any] = model.sampling | {"batch": cfg.batch, "precision": cfg.precision}
        generator = networks.seeded(cfg.seed, STAGE, 1)
        mean, deviation = anchored.restore_apddm(model, low, unit, zero, generator=generator, **how)
        scores.setdefault(key.split("/")[0], []).append((abs(high - mean) / np.maximum(deviation, 1e-9))[body])
    animals = {name: np.concatenate(parts) for name, parts in scores.items()}
    factor = anchored.conformal_factor(np.concatenate(list(animals.values())), cfg.coverage)
    shares = {name: float((values <= factor).mean()) for name, values in animals.items()}
    return {"factor": factor, "coverage": cfg.coverage, "slices": len(few), "animals": shares}


# ---------------------------------------------------------------- the run


def run(cfg: Config) -> dict[str, Any]:
    """Train, calibrate the intervals, draw the figures' numbers, and give the best epoch's figures."""
    import torch

    check(cfg)
    store = open_pairs(cfg.root)
    group = parallel.Group(cfg.device)
    device = group.device
    dtype = networks.pick_dtype(cfg.precision, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    settings = networks.plain(cfg)
    data = {name: store.attributes[name] for name in ("fingerprint", "settings", "splits")}
    data |= {"range": training_range(store), "init": ""}
    parts = {field.name for field in dataclasses.fields(networks.UNetConfig)}
    network, first = {name: value for name, value in settings.items() if name in parts}, None
    if cfg.init_from:
        path = cfg.root / "runs" / cfg.init_from / "best.pt"
        first = networks.load_unet(path, data["settings"])[1]
        network, data["init"] = first["network"], sha256(path)

    train, validation = (networks.PairSet(store, split, device) for split in ("train", "validation"))
    residuals, stats = anchored.standardise([low - high for scan in train.pairs for low, high in scan])
    weights = anchored.schedule_values(cfg.schedule, cfg.length)
    critical = anchored.beta_critical(weights, stats["rms"])
    beta = cfg.beta_value or cfg.beta * critical
    kept = [residuals[i].cpu() for i in np.linspace(0, len(residuals) - 1, min(len(residuals), BANK)).astype(int)]
    state: dict[str, Any] = {
        "stage": "apddm", "config": settings, "network": networks.plain(networks.UNetConfig(**network)), "data": data,
        "path": {"weights": torch.from_numpy(weights), "beta": beta, "beta_critical": critical} | stats,
        "bank": kept if cfg.noise == "bank" else [],
    }  # fmt: skip
    model = anchored.APDDM(state, networks.seeded(cfg.seed, STAGE, 0))
    if cfg.parametrization == "residual":  # Eq. 10 cannot restore: it is trained without a sampling
        model.check(**model.sampling)
    noise = anchored.NoiseBank(residuals, cfg.rotations) if cfg.noise == "bank" else anchored.gaussian
    if group.leads:
        print(f"beta {beta:.4f} = {beta / critical:.3g} beta_crit, RMS(R) {stats['rms']:.4f}", flush=True)

    content = None if cfg.fresh else networks.previous_run(cfg.folder, state, FREE)
    net = model.net.to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=0.0)
    history: list[dict[str, Any]] = []
    if first:
        model.take_weights(first["weights"])
    judged = copy.deepcopy(model)  # its weights are validated and saved for use
    if content:
        history = content["history"]
        net.load_state_dict(content["training"]["weights"])
        judged.net.load_state_dict(content["weights"])
        optimiser.load_state_dict(content["training"]["optimiser"])
        if group.leads:
            print(f"{cfg.folder}: goes on after epoch {len(history)}", flush=True)

    through = copy.copy(model)  # estimates with gradients that are means over the processes
    through.net = cast("networks.UNet", group.wrap(net))
    draws, chain = cfg.steps_per_epoch * cfg.batch or len(train), cfg.draws == "chain"
    steps = math.ceil(draws / cfg.batch)
    while not (reason := networks.reason_to_stop(history, cfg.epochs, cfg.min_epochs, cfg.patience)):
        epoch, start = len(history) + 1, time.monotonic()
        # Each epoch has its own generator: a run that goes on draws what an undisturbed one draws.
        generator = networks.seeded(cfg.seed, STAGE, 3, epoch)
        order = networks.draw_order(len(train), draws, generator)
        total = torch.zeros((), device=device)
        quiet = None if group.leads else True  # None: a bar on a terminal only
        for step in tqdm(range(steps), f"epoch {epoch:03d}/{cfg.epochs}", leave=False, disable=quiet):
            items = order[step * cfg.batch : (step + 1) * cfg.batch]
            batch = train.batch(items, net.config.multiple, cfg.patch, cfg.flips, False, generator)
            times = torch.randint(1, cfg.length + 1, (len(items),), generator=generator)
            times[: len(items) if cfg.timesteps == "last" else round(cfg.end_share * len(items))] = cfg.length
            levels = torch.rand(len(items), generator=generator).tolist() if cfg.beta_range else [1.0] * len(items)
            image = anchored.state_at(model.path, noise, batch, times.tolist(), levels, chain, generator)
            # Each process draws the whole batch, so that all draw the same, and computes with its share.
            part = group.part(len(items))
            batch = networks.Batch(batch.low[part], batch.high[part], batch.mask[part], batch.data_range[part])
            progress = epoch - 1 + (step + 0.5) / steps  # in epochs
            lr = cfg.lr * (0.5 + 0.5 * math.cos(math.pi * progress / cfg.epochs))
            lr *= min(1.0, progress / cfg.warm_up) if cfg.warm_up else 1.0
            for parameters in optimiser.param_groups:
                parameters["lr"] = lr
            with networks.autocast(device, dtype):
                estimate = through.estimate(image[part], times[part], batch.low)
            losses = networks.image_losses("MSE", 1.0, estimate, batch)  # Eq. 11
            loss = losses.sum() * (group.size / len(items))  # the mean over the whole batch
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if cfg.clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
            optimiser.step()
            networks.average_weights(judged.net, net, cfg.ema, step + steps * (epoch - 1))
            total += loss.detach() * (len(items) / group.size)
        seconds = time.monotonic() - start
        figures = validate(judged, noise, validation, cfg, dtype, group)
        row = {"epoch": epoch, "train": float(group.total(total)) / draws} | figures
        row |= {"lr": lr, "seconds": time.monotonic() - start, "images_per_second": draws / seconds}
        row = group.agreed(row)
        if not math.isfinite(row["train"] + row["validation"]):
            raise InputError(f"epoch {epoch}: the loss is not finite, expected a lower --lr, a --warm-up or a --clip")

        history.append(row)
        state |= {"weights": judged.net.state_dict(), "history": history}
        if group.leads:
            networks.save_epoch(cfg.folder, state, net, optimiser, [cfg.seed, STAGE, 3, epoch + 1])
            write_table(cfg.folder / "history.csv", COLUMNS, history)
            networks.print_epoch(history, cfg.epochs, "one step", "validation_mse")

    group.close()
    if not group.leads:
        return {}
    best = min(history, key=lambda row: row["validation"])
    summary = {f"best_{name}": value for name, value in best.items() if name in COLUMNS[:4]}
    summary |= {"epochs": len(history), "stopped": reason, "minutes": sum(row["seconds"] for row in history) / 60}
    summary |= {"train_slices": len(train), "validation_slices": len(validation), "device": device.type}
    summary |= {"parameters": sum(p.numel() for p in net.parameters()), "precision": str(dtype).split(".")[1]}
    summary |= {"beta": beta, "beta_critical": critical} | stats
    if cfg.parametrization == "residual":
        model, content = anchored.load_apddm(cfg.folder / "best.pt")
        model.net.to(device)
        if "interval" not in content and cfg.samples > 1:
            content["interval"] = calibrate(cfg, model)
            networks.save_checkpoint(cfg.folder / "best.pt", content)
        summary |= {"interval": content.get("interval")}
    with atomic_path(cfg.folder / "figures.npz") as partial, partial.open("wb") as stream:
        drawn = anchored.illustrate(model.path, critical, train.pairs, networks.seeded(cfg.seed, STAGE, 2))
        np.savez(stream, **drawn)  # type: ignore[arg-type]
    write_table(cfg.folder / "history.csv", COLUMNS, history)
    write_json(cfg.folder / "summary.json", summary | {"fingerprint": fingerprint(settings, data)})
    print(f"{cfg.folder}: best epoch {best['epoch']}, one step {best['validation_mse']:.4f} ({reason})", flush=True)
    return summary


if __name__ == "__main__":
    main(run, PRESETS)
