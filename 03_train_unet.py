"""Train one U-Net on pairs of low and high images (report 4.1-4.2.2).

Reads data/pairs.zarr. Writes runs/<run>/best.pt, last.pt, history.csv and summary.json.
The same command again goes on where a stopped run was; a finished run is not run again.

Usage:
    python 03_train_unet.py --preset demo
    python 03_train_unet.py --run first --epochs 200 --batch 32
    python 03_train_unet.py --preset tuned --run tuned --loss hybrid --alpha 0.8
    python 03_train_unet.py --run best --config-from runs/tune/best.json
    torchrun --nproc-per-node 4 -- 03_train_unet.py --preset paper  # one process for each GPU, the batch shared out
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from common import InputError, Lazy, fingerprint, main, open_pairs, write_json, write_table
from likeness import training_range

if TYPE_CHECKING:
    import torch

    import networks
    import parallel
else:
    networks, parallel = Lazy("networks"), Lazy("parallel")

STAGE = 3
COLUMNS = (
    "epoch", "train", "validation", "validation_mse", "validation_ssim", "lr", "seconds", "images_per_second",
)  # fmt: skip
# What may differ between the runs of one training: where it is computed and how long it may last.
FREE = ("root", "run", "fresh", "config_from", "device", "threads", "max_minutes")


class TrainingFailed(InputError):
    """Settings that no training ends well with here: out of memory, or a loss that is not finite."""


@dataclass(frozen=True)
class Config:
    """Settings of one training; the defaults are the report's first run (6.1)."""

    root: Path = Path(".")
    """Folder that holds data/ and runs/."""
    run: str = "unet"
    """Name of the folder in runs/."""
    fresh: bool = False
    """Start over: what the run's folder holds is replaced."""
    config_from: Path | None = None
    """best.json of 04_tune: its settings of network and training take the place of those given here."""

    batch: int = 32
    """Slices of a step."""
    patch: int = 0
    """Side of random crops in pixels; 0 = whole slices, padded to the largest of the batch (report 3.5)."""
    flips: bool = True
    """Flip each slice along y and along x, each with a probability of 50 % (report 3.5)."""
    turns: bool = False
    """Also exchange y and x in half of the cases."""
    memory: Literal["float32", "float16"] = "float32"
    """Number format of the images in memory."""
    slices: int = 0
    """Train and validate on this many slices each, spread evenly over the split; 0 = all."""

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
    """The network predicts what is to be added to the low image."""
    unshuffle: int = 1
    """Work on a grid coarser by this factor, with a channel for each pixel of a block."""

    loss: Literal["MSE", "MAE", "hybrid"] = "MSE"
    """hybrid = alpha MSE + (1 - alpha) (1 - SSIM), Eq. 7."""
    alpha: float = 0.8
    """Weight of the MSE in the hybrid loss, 0 to 1."""
    optimiser: Literal["Adam", "AdamW", "SGD", "RMSprop"] = "RMSprop"
    """Adam, AdamW, SGD (with momentum 0.9) or RMSprop."""
    lr: float = 1e-4
    """Learning rate of the first epoch."""
    weight_decay: float = 0.0
    """Weight decay of the optimiser."""
    scheduler: Literal["ExponentialLR", "StepLR", "ReduceLROnPlateau", "cosine", "none"] = "ReduceLROnPlateau"
    """Learning rate over the epochs: Eq. 5, Eq. 6, on a plateau of the validation loss, or half a cosine to 0."""
    decay: float = 0.1
    """Factor of the learning rate at each decay (0.1, 0.3, 0.5 in the report)."""
    step_size: int = 10
    """Epochs between two decays of StepLR."""
    plateau: int = 3
    """Epochs without improvement before ReduceLROnPlateau decays; fewer than `patience`, or it never does."""
    warm_up: float = 0.0
    """Epochs over which the learning rate rises from 0."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 = no limit."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is what is validated and saved; 0 = off."""

    epochs: int = 200
    """Largest number of epochs."""
    steps_per_epoch: int = 0
    """Steps between two validations; 0 = one pass through the training slices."""
    patience: int = 6
    """Stop after this many epochs without improvement (report 4.2.2)."""
    min_epochs: int = 10
    """Never stop earlier for lack of improvement."""
    max_minutes: float = 0.0
    """Stop before an epoch that would end later than this; 0 = no limit. Not reproducible from machine to machine."""
    seed: int = 0
    """Of weights, order, crops and flips."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Convolutions in bfloat16 where the processor has it, or always, or never."""
    compile: bool = False
    """Compile the network with torch.compile."""
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
    "tuned": dataclasses.replace(
        PAPER, features_main=(128, 128, 64), downsampling="convStrided", upsampling="bilinear", residual=False,
        lr=3.139e-4, optimiser="Adam", scheduler="StepLR",
    ),
    "demo": dataclasses.replace(
        PAPER, batch=8, patch=128, features_main=(48, 96, 192), upsampling="bilinear", unshuffle=2, optimiser="AdamW",
        lr=1e-3, scheduler="cosine", warm_up=0.5, ema=0.99, clip=1.0, epochs=26, steps_per_epoch=100,
    ),
    "smoke": dataclasses.replace(
        PAPER, batch=4, patch=64, features_main=(16, 32), upsampling="bilinear", unshuffle=2, optimiser="AdamW",
        lr=3e-3, scheduler="cosine", epochs=2, steps_per_epoch=20, min_epochs=2,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- rules of the training


def validate(
    net: networks.UNet, pairs: networks.PairSet, cfg: Config, dtype: torch.dtype, group: parallel.Group
) -> dict[str, float]:
    """Mean over the slices of loss, MSE and SSIM, on whole slices, which the processes share."""
    import torch

    sums = torch.zeros(3, dtype=torch.float64)
    # Scan by scan: slices of equal size, so that no figure depends on what else is in the batch.
    scans = (list(items) for _, items in itertools.groupby(range(len(pairs)), lambda item: pairs.places[item][0]))
    batches = [scan[start : start + cfg.batch] for scan in scans for start in range(0, len(scan), cfg.batch)]
    for items in batches[group.rank :: group.size]:
        batch = pairs.batch(items, net.config.multiple)
        with torch.inference_mode():
            with networks.autocast(pairs.device, dtype):
                restored = net(batch.low.contiguous(memory_format=torch.channels_last))
            losses = networks.image_losses(cfg.loss, cfg.alpha, restored, batch)
            mse = networks.image_losses("MSE", 1.0, restored, batch)
            ssim = networks.structural_similarity(restored, batch.high, batch.mask, batch.data_range)
        sums += torch.stack([values.double().sum() for values in (losses, mse, ssim)]).cpu()
    return dict(zip(COLUMNS[2:5], (group.total(sums.to(pairs.device)) / len(pairs)).tolist(), strict=True))


def learning_rate(cfg: Config, progress: float, validation: Sequence[float]) -> float:
    """Learning rate after `progress` epochs (with fractions) that ended with these validation losses."""
    epoch = int(progress)
    factor = 1.0
    if cfg.scheduler == "ExponentialLR":  # Eq. 5
        factor = cfg.decay**epoch
    elif cfg.scheduler == "StepLR":  # Eq. 6
        factor = cfg.decay ** (epoch // cfg.step_size)
    elif cfg.scheduler == "ReduceLROnPlateau":
        best, waited = math.inf, 0
        for loss in validation[:epoch]:
            best, waited = (loss, 0) if loss < best * (1 - 1e-4) else (best, waited + 1)
            if waited > cfg.plateau:
                factor, waited = factor * cfg.decay, 0
    elif cfg.scheduler == "cosine":
        factor = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress / cfg.epochs))
    return cfg.lr * factor * (min(1.0, progress / cfg.warm_up) if cfg.warm_up else 1.0)


def reason_to_stop(cfg: Config, history: Sequence[dict[str, Any]]) -> str:
    """Why no further epoch is due, or nothing."""
    seconds = sum(row["seconds"] for row in history)
    if reason := networks.reason_to_stop(history, cfg.epochs, cfg.min_epochs, cfg.patience):
        return reason
    if cfg.max_minutes and history and seconds + history[-1]["seconds"] > 60 * cfg.max_minutes:
        return f"{cfg.max_minutes:g} minutes are over"
    return ""


def build_optimiser(cfg: Config, net: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser by its name."""
    import torch

    options: dict[str, Any] = {"lr": cfg.lr, "weight_decay": cfg.weight_decay} | (
        {"momentum": 0.9} if cfg.optimiser == "SGD" else {}
    )
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, cfg.optimiser)
    return kind(net.parameters(), **options)


def with_settings(cfg: Config) -> Config:
    """The config with the settings of `config_from` in place of its own."""
    if cfg.config_from is None:
        return cfg
    try:
        found = json.loads(cfg.config_from.read_text())["config"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{cfg.config_from}: cannot be read, expected a best.json of 04_tune.py") from None
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found}
    for name, value in values.items():
        known = name not in FREE and hasattr(cfg, name)
        if not known or type(value) is not type(getattr(cfg, name)):
            raise InputError(f"{cfg.config_from}: {name} {value!r} found, expected settings as 04_tune.py writes them")
    print(f"{cfg.config_from}: {networks.differences(networks.plain(cfg), networks.plain(cfg) | dict(found))}")
    return dataclasses.replace(cfg, **values)


def check(cfg: Config) -> None:
    """Refuse settings that cannot be trained with."""
    positive = ("batch", "epochs", "lr", "decay", "step_size")
    others = ("patch", "slices", "steps_per_epoch", "weight_decay", "warm_up", "clip", "max_minutes", "threads")
    for name in positive + others:
        value = getattr(cfg, name)
        if not (value > 0 if name in positive else value >= 0) or not math.isfinite(value):
            wanted = "a positive number" if name in positive else "0 or more"
            raise InputError(f"{name}: found {value}, expected {wanted}")
    if 0 < cfg.patch < 16:
        raise InputError(f"patch: found {cfg.patch}, expected 0, or 16 or more: the window of the SSIM has to fit in")
    if not 0 <= cfg.alpha <= 1:
        raise InputError(f"alpha: found {cfg.alpha}, expected 0 to 1")
    if not 0 <= cfg.ema < 1:
        raise InputError(f"ema: found {cfg.ema}, expected 0 or more and less than 1")


@contextlib.contextmanager
def memory_errors(cfg: Config) -> Iterator[None]:
    """Turn a failed allocation into one line."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        found = f"batch {cfg.batch}, patch {cfg.patch}"
        raise TrainingFailed(f"{found}: out of memory, expected a smaller --batch or --patch") from None


# ---------------------------------------------------------------- training


def run(cfg: Config, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train, and give the best epoch's figures; `report` is called with each epoch's row of history.csv."""
    import torch

    cfg = with_settings(cfg)
    check(cfg)
    store = open_pairs(cfg.root)
    group = parallel.Group(cfg.device)
    device = group.device
    dtype = networks.pick_dtype(cfg.precision, device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    settings = networks.plain(cfg)
    parts = {field.name for field in dataclasses.fields(networks.UNetConfig)}
    network = networks.UNetConfig(**{name: value for name, value in settings.items() if name in parts})
    data = {name: store.attributes.get(name) for name in ("fingerprint", "settings", "splits")}
    data |= {"range": training_range(store)}
    state: dict[str, Any] = {"stage": "unet", "config": settings, "network": networks.plain(network), "data": data}
    content = None if cfg.fresh else networks.previous_run(cfg.folder, state, FREE)

    net = networks.UNet(network, networks.seeded(cfg.seed, STAGE, 0)).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = build_optimiser(cfg, net)
    judged = copy.deepcopy(net) if cfg.ema else net  # the weights that are validated and saved for use
    history: list[dict[str, Any]] = []
    if content:
        history = content["history"]
        net.load_state_dict(content["training"]["weights"])
        judged.load_state_dict(content["weights"])
        optimiser.load_state_dict(content["training"]["optimiser"])
        if group.leads:
            print(f"{cfg.folder}: goes on after epoch {len(history)}", flush=True)

    memory = getattr(torch, cfg.memory)
    train, validation = (networks.PairSet(store, split, device, memory) for split in ("train", "validation"))
    for pairs in (train, validation):
        if 0 < cfg.slices < len(pairs):
            pairs.places = [pairs.places[i * len(pairs) // cfg.slices] for i in range(cfg.slices)]
    draws = cfg.steps_per_epoch * cfg.batch or len(train)
    steps = math.ceil(draws / cfg.batch)
    forward: Callable[..., torch.Tensor] = group.wrap(net)
    forward = torch.compile(forward) if cfg.compile else forward
    while not (reason := reason_to_stop(cfg, history)):
        epoch, start = len(history) + 1, time.monotonic()
        losses = [row["validation"] for row in history]
        # Each epoch has its own generator: a run that goes on draws what an undisturbed one draws.
        generator = networks.seeded(cfg.seed, STAGE, epoch)
        order = networks.draw_order(len(train), draws, generator)
        total = torch.zeros((), device=device)
        with memory_errors(cfg):
            quiet = None if group.leads else True  # None: a bar on a terminal only
            for step in tqdm(range(steps), f"epoch {epoch:03d}/{cfg.epochs}", leave=False, disable=quiet):
                items = order[step * cfg.batch : (step + 1) * cfg.batch]
                part = group.part(len(items))
                batch = train.batch(items, network.multiple, cfg.patch, cfg.flips, cfg.turns, generator, part)
                lr = learning_rate(cfg, epoch - 1 + (step + 0.5) / steps, losses)
                for parameters in optimiser.param_groups:
                    parameters["lr"] = lr
                with networks.autocast(device, dtype):
                    restored = forward(batch.low.contiguous(memory_format=torch.channels_last))
                # The mean over the whole batch, as the gradients are means over the processes.
                loss = networks.image_losses(cfg.loss, cfg.alpha, restored, batch).sum() * (group.size / len(items))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if cfg.clip:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
                optimiser.step()
                if cfg.ema:
                    networks.average_weights(judged, net, cfg.ema, step + steps * (epoch - 1))
                total += loss.detach() * (len(items) / group.size)
            seconds = time.monotonic() - start
            figures = validate(judged, validation, cfg, dtype, group)
        row = {"epoch": epoch, "train": float(group.total(total)) / draws} | figures
        row |= {"lr": lr, "seconds": time.monotonic() - start, "images_per_second": draws / seconds}
        row = group.agreed(row)
        if not math.isfinite(row["train"] + row["validation"]):
            wanted = "a lower --lr, a --warm-up or a --clip"
            raise TrainingFailed(f"epoch {epoch}: the loss is not finite, expected {wanted}")

        history.append(row)
        state |= {"weights": judged.state_dict(), "history": history}
        if group.leads:
            networks.save_epoch(cfg.folder, state, net, optimiser, [cfg.seed, STAGE, epoch + 1])
            write_table(cfg.folder / "history.csv", COLUMNS, history)
            networks.print_epoch(history, cfg.epochs, "ssim", "validation_ssim")
        if report:
            report(row)

    best = min(history, key=lambda row: row["validation"])
    summary = {f"best_{name}": value for name, value in best.items() if name in COLUMNS[:5]}
    summary |= {"epochs": len(history), "stopped": reason, "minutes": sum(row["seconds"] for row in history) / 60}
    summary |= {"parameters": sum(p.numel() for p in net.parameters()), "train_slices": len(train)}
    summary |= {"validation_slices": len(validation), "device": device.type, "precision": str(dtype).split(".")[1]}
    if group.leads:
        write_table(cfg.folder / "history.csv", COLUMNS, history)
        write_json(cfg.folder / "summary.json", summary | {"fingerprint": fingerprint(settings, data)})
        print(f"{cfg.folder}: best epoch {best['epoch']}, validation {best['validation']:.4f} ({reason})", flush=True)
    group.close()
    return summary


if __name__ == "__main__":
    main(run, PRESETS)
