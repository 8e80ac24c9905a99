"""What the stages that use torch share: the U-Net, its training pairs, checkpoints, and the restoring of a scan.

Apart from common.py, because importing torch takes longer than ``--help`` may: scripts load this module lazily.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import pickle
import platform
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from common import FORMAT, SPLITS, InputError, Store, atomic_path

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POOLS = {
    "maxpool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "meanpool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
}
INTERPOLATIONS = {"linear": (1,), "bilinear": (2,), "bicubic": (2,), "trilinear": (3,), "nearest": (1, 2, 3)}
ACTIVATIONS: dict[
    str, Callable[[], nn.Module]
] = {  # in place where the gradient allows it: the memory of an activation is what a step costs
    "ReLU": lambda: nn.ReLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(inplace=True),
    "ELU": lambda: nn.ELU(inplace=True),
    "PReLU": nn.PReLU,
}


# ---------------------------------------------------------------- network


@dataclass(frozen=True)
class UNetConfig:
    """Structure of a U-Net (report 4.2.1); the defaults are those of the stage that trains it.

    Parameters
    ----------
    features_main : sequence of int
        Feature channels of each level, two levels or more.
    features_skip : sequence of int
        Channels of each skip connection; empty: those of `features_main` without its last.
    downsampling : str
        maxpool, meanpool or convStrided.
    upsampling : str
        nearest, bilinear, bicubic (trilinear with ``dims=3``, linear with ``dims=1``) or upconv.
    activation : str
        ReLU, LeakyReLU, ELU or PReLU (Eq. 1-4).
    residual : bool
        The network's output is added to its input.
    unshuffle : int
        The network works on a grid coarser by this factor, with a channel for each pixel of a block.
    dims : int
        Spatial axes of an image: 1, 2 or 3.
    """

    features_main: Sequence[int]
    features_skip: Sequence[int]
    downsampling: str
    upsampling: str
    activation: str
    residual: bool
    unshuffle: int = 1
    dims: int = 2

    def __post_init__(self) -> None:
        # A checkpoint's plain data hold lists.
        object.__setattr__(self, "features_main", tuple(self.features_main))
        object.__setattr__(self, "features_skip", tuple(self.features_skip) or self.features_main[:-1])
        if len(self.features_main) < 2 or min(self.features_main) < 1:
            raise InputError(f"features_main: found {self.features_main}, expected two or more positive numbers")
        if len(self.features_skip) != len(self.features_main) - 1 or min(self.features_skip) < 1:
            wanted = f"{len(self.features_main) - 1} positive numbers, one fewer than features_main"
            raise InputError(f"features_skip: found {self.features_skip}, expected {wanted}")
        if self.dims not in (1, 2, 3):
            raise InputError(f"dims: found {self.dims}, expected 1, 2 or 3")
        upsamplings = ["upconv", *(name for name, dims in INTERPOLATIONS.items() if self.dims in dims)]
        if self.upsampling not in upsamplings:
            raise InputError(f"upsampling: found {self.upsampling!r}, expected one of {', '.join(upsamplings)}")
        if self.downsampling not in (*POOLS, "convStrided"):
            wanted = ", ".join((*POOLS, "convStrided"))
            raise InputError(f"downsampling: found {self.downsampling!r}, expected one of {wanted}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation: found {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if self.unshuffle < 1 or (self.unshuffle > 1 and self.dims != 2):
            raise InputError(f"unshuffle: found {self.unshuffle}, expected 1 or more, and 1 unless dims is 2")

    @property
    def multiple(self) -> int:
        """The sides of an image have to be multiples of this."""
        return self.unshuffle << (len(self.features_main) - 1)


class DoubleConv(nn.Module):
    """Two convolutions of width 3, each with its activation, on one level."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, activation: str) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims - 1]
        self.first = convolution(channels_in, channels_out, 3, padding=1)
        self.first_activation = ACTIVATIONS[activation]()
        self.second = convolution(channels_out, channels_out, 3, padding=1)
        self.second_activation = ACTIVATIONS[activation]()

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels_in, ...) to (n, channels_out, ...)."""
        features = self.first_activation(self.first(features))
        features = self.second_activation(self.second(features))
        return features


class Upsampling(nn.Module):
    """Twice the grid: a transposed convolution, or interpolation with a convolution of width 1.

    That convolution stands before the interpolation: the two commute, and it is cheaper on the coarse grid.
    """

    def __init__(self, config: UNetConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.mode = config.upsampling
        if self.mode == "upconv":
            self.convolution: nn.Module = TRANSPOSED[config.dims - 1](channels_in, channels_out, 2, stride=2)
        else:
            self.convolution = CONVOLUTIONS[config.dims - 1](channels_in, channels_out, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels_in, h, w) to (n, channels_out, 2h, 2w)."""
        features = self.convolution(features)
        if self.mode != "upconv":
            features = functional.interpolate(features, scale_factor=2, mode=self.mode)
        return features


class PathEmbedding(nn.Module):
    """A place on the anchored path as a scale and a shift of the features of each level; they start as 0."""

    def __init__(self, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.levels = nn.ModuleList(nn.Linear(width, 2 * channel) for channel in channels)

    def forward(self, place: Float[Tensor, " n"]) -> list[Tensor]:
        """For each level (n, 2, channels); angles up to 1000 rad tell neighbours of a path of 1000 steps apart."""
        angles = place[:, None] * torch.logspace(0, 3, self.width // 2, device=place.device)
        with torch.autocast(place.device.type, enabled=False):
            hidden = self.hidden(torch.cat((angles.sin(), angles.cos()), 1))
            return [level(hidden).unflatten(1, (2, -1)) for level in self.levels]


def modulate(features: Tensor, change: Tensor) -> Tensor:
    """Features (n, channels, ...) scaled by 1 + change[:, 0] and shifted by change[:, 1]."""
    scale, shift = change.to(features.dtype).reshape(*change.shape, *[1] * (features.ndim - 2)).unbind(1)
    return torch.addcmul(features, features, scale).add_(shift)


class UNet(nn.Module):
    """Encoder and decoder with skip connections (report 4.1).

    Parameters
    ----------
    config : UNetConfig
        Structure.
    generator : torch.Generator, optional
        Draws the first weights; seeded with 0 if none is given.
    channels_in : int
        Channels of the input; the first one is the image that a residual network corrects.
    embedding : int
        Width of the embedding of the place on an anchored path (an even number); 0: the network is told no place.
    """

    def __init__(
        self,
        config: UNetConfig,
        generator: torch.Generator | None = None,
        channels_in: int = 1,
        embedding: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        dims, widths = config.dims, config.features_main
        convolution = CONVOLUTIONS[dims - 1]
        block = config.unshuffle**dims
        self.encoder = nn.ModuleList(
            DoubleConv(dims, before, after, config.activation)
            for before, after in pairwise((channels_in * block, *widths))
        )
        self.down = nn.ModuleList(
            convolution(width, width, 3, stride=2, padding=1)
            if config.downsampling == "convStrided"
            else POOLS[config.downsampling][dims - 1](2)
            for width in widths[:-1]
        )
        self.skip = nn.ModuleList(
            nn.Identity() if skip == width else convolution(width, skip, 1)
            for width, skip in zip(widths, config.features_skip, strict=False)
        )
        self.up = nn.ModuleList(Upsampling(config, below, width) for width, below in pairwise(widths))
        self.decoder = nn.ModuleList(
            DoubleConv(dims, width + skip, width, config.activation)
            for width, skip in zip(widths, config.features_skip, strict=False)
        )
        self.last = convolution(widths[0], block, 1)
        # Behind all others, so that these keep the first weights of a network without it.
        self.embedding = PathEmbedding(embedding, (*widths, *widths[:-1])) if embedding else None
        self._first_weights(generator or torch.Generator().manual_seed(0))

    def _first_weights(self, generator: torch.Generator) -> None:
        """Keep the features' variance from layer to layer (He 2015); a residual network starts as the identity."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.residual:
            nn.init.zeros_(self.last.weight)
        if self.embedding is not None:
            for parameter in self.embedding.levels.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, image: Float[Tensor, "n channels *grid"], place: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n 1 *grid"]:
        """Restore normalised images whose sides are multiples of ``config.multiple``; `place` None is 1, the end."""
        changes: list[Tensor] = []
        if self.embedding is not None:
            changes = self.embedding(image.new_ones(len(image)) if place is None else place)
        features = functional.pixel_unshuffle(image, self.config.unshuffle) if self.config.unshuffle > 1 else image
        skips = []
        for level, encode in enumerate(self.encoder):
            features = encode(features)
            features = modulate(features, changes[level]) if changes else features
            if level < len(self.down):
                skips.append(self.skip[level](features))
                features = self.down[level](features)
        for level in reversed(range(len(self.decoder))):
            features = torch.cat((self.up[level](features), skips[level]), 1)
            features = self.decoder[level](features)
            features = modulate(features, changes[len(self.encoder) + level]) if changes else features
        # The output keeps float32 under autocast: 8 bits of mantissa would show as steps in the image.
        with torch.autocast(image.device.type, enabled=False):
            output: Tensor = self.last(features.float())
        if self.config.unshuffle > 1:
            output = functional.pixel_shuffle(output, self.config.unshuffle)
        return image[:, :1] + output if self.config.residual else output


# ---------------------------------------------------------------- device, precision, randomness


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; auto: a GPU if there is one.

    Raises
    ------
    InputError
        If this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device: found {name!r} ({str(error).splitlines()[0]}), expected auto, cpu or cuda") from None
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Number format of the convolutions; auto: bfloat16 where the processor multiplies it in hardware."""
    if precision != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Context in which convolutions compute in `dtype` and everything else in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def seeded(*entropy: int) -> torch.Generator:
    """Generator on the CPU for one use, told apart by numbers such as seed, stage and epoch."""
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


# ---------------------------------------------------------------- training pairs


@dataclass(frozen=True)
class Batch:
    """Slices padded to one size; `mask` is false where they are padded, `data_range` is that of the high scan."""

    low: Float[Tensor, "n 1 h w"]
    high: Float[Tensor, "n 1 h w"]
    mask: Bool[Tensor, "n 1 h w"]
    data_range: Float[Tensor, " n"]


def mirror(size: int, length: int) -> Tensor:
    """Indices that go on beyond `size` pixels as in mirrors at the first and at the last one (NumPy's reflect)."""
    index = torch.arange(length) % max(1, 2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index) if size > 1 else index


class PairSet:
    """All kept slices of one split of pairs.zarr, in memory, on the device.

    Parameters
    ----------
    store : Store
        As opened by ``common.open_pairs``.
    split : str
        train, validation, test, lego or unused.
    device : torch.device
        Where the images stay: flips, crops and padding are done there.
    dtype : torch.dtype
        Number format in memory; batches are float32.

    Raises
    ------
    InputError
        If the split is empty, or a scan is damaged or not finite.
    """

    def __init__(self, store: Store, split: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.pairs: list[Tensor] = []  # one tensor (slice, low and high, y, x) per scan
        ranges: list[Tensor] = []
        for key in store.scans:
            chosen = store.read(key, "split", 1, "uint8") == SPLITS.index(split)
            if not chosen.any():
                continue
            low, high = (store.read(key, name, 3, "float32") for name in ("low", "high"))
            scale = store.read(key, "scale", 1, "float32")
            if low.shape != high.shape or len(low) != len(chosen) or len(low) != len(scale):
                raise InputError(
                    f"{store.path / key}: low {low.shape} and high {high.shape} found, expected equal shapes"
                )
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise InputError(f"{store.path / key}: values that are not finite, run {store.made_by} again")
            # One range per scan, as the figures of merit have it, in the normalised units of each slice.
            widest = float((high.max(axis=(1, 2)) * scale).max())
            ranges.append(torch.from_numpy(widest / scale[chosen]))
            pair = torch.from_numpy(np.stack((low[chosen], high[chosen]), axis=1))
            self.pairs.append(pair.to(device, dtype))
        if not self.pairs:
            raise InputError(f"{store.path}: no slice of split {split!r} found, expected one or more")
        self.device = device
        self.data_range = torch.cat(ranges).float()
        self.places = [(scan, number) for scan, pair in enumerate(self.pairs) for number in range(len(pair))]

    def __len__(self) -> int:
        return len(self.places)

    def batch(
        self,
        items: Sequence[int],
        multiple: int,
        patch: int = 0,
        flips: bool = False,
        turns: bool = False,
        generator: torch.Generator | None = None,
        part: slice = slice(None),
    ) -> Batch:
        """Slices `items`, cut and turned at random, padded to their largest and to a multiple by mirroring.

        Parameters
        ----------
        items : sequence of int
            Slices, counted through the set.
        multiple : int
            Of the sides, as ``UNetConfig.multiple`` has it.
        patch : int
            Side of a random crop; 0 takes whole slices.
        flips, turns : bool
            Flip along y and along x, and exchange the two, each in half of the cases.
        generator : torch.Generator, optional
            On the CPU; without one the crop is central and nothing is turned.
        part : slice
            Of `items`: what of the batch is made, drawn and padded as the whole one is.

        Returns
        -------
        Batch
            float32 on the set's device.
        """
        draws = torch.rand(len(items), 5, generator=generator).tolist() if generator else [[0.5] * 5] * len(items)
        pairs = []
        for item, (row, column, *turn) in zip(items, draws, strict=True):
            scan, number = self.places[item]
            pair = self.pairs[scan][number]
            if patch:
                top, left = (int(d * max(0, s - patch + 1)) for d, s in zip((row, column), pair.shape[1:], strict=True))
                pair = pair[:, top : top + patch, left : left + patch]
            axes = [axis for axis in (1, 2) if flips and turn[axis - 1] < 0.5]
            pair = pair.flip(axes) if axes else pair
            pairs.append(pair.transpose(1, 2) if turns and turn[2] < 0.5 else pair)
        height, width = (math.ceil(max(p.shape[axis] for p in pairs) / multiple) * multiple for axis in (1, 2))
        pairs = pairs[part]
        images = torch.empty(len(pairs), 2, height, width, device=self.device)
        mask = torch.zeros(len(pairs), 1, height, width, dtype=torch.bool, device=self.device)
        for image, valid, pair in zip(images, mask, pairs, strict=True):
            valid[:, : pair.shape[1], : pair.shape[2]] = True
            for axis, length in ((1, height), (2, width)):
                if pair.shape[axis] < length:
                    pair = pair.index_select(axis, mirror(pair.shape[axis], length).to(self.device))
            image.copy_(pair)
        return Batch(images[:, :1], images[:, 1:], mask, self.data_range[list(items[part])].to(self.device))


# ---------------------------------------------------------------- training


def structural_similarity(
    restored: Float[Tensor, "n 1 h w"],
    high: Float[Tensor, "n 1 h w"],
    mask: Bool[Tensor, "n 1 h w"],
    data_range: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """SSIM of each image (Eq. 8), differentiable, over the windows that hold no padding.

    Wang's setting: a Gaussian window of standard deviation 1.5 cut at 11 pixels. As in scikit-image, windows that
    reach beyond the image do not count.

    Parameters
    ----------
    restored, high : Tensor
        Images of any unit, 16 pixels or more along each axis.
    mask : Tensor
        False where an image is padded.
    data_range : Tensor
        Range of each image, in its unit.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if not len(restored):  # a process without a share of the batch
        return restored.sum((1, 2, 3))
    # Divided by its own range, every image has the range 1: the function takes one range for all.
    unit = data_range[:, None, None, None]
    first, second = (torch.where(mask, image / unit, 0.0) for image in (restored, high))
    _, similarity = structural_similarity_index_measure(
        first, second, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = functional.max_pool2d(1.0 - mask.float(), 11, stride=1) == 0
    similarity = similarity[..., 5:-5, 5:-5]
    return torch.where(inside, similarity, 0.0).sum((1, 2, 3)) / inside.sum((1, 2, 3))


def image_losses(kind: str, alpha: float, restored: Float[Tensor, "n 1 h w"], batch: Batch) -> Float[Tensor, " n"]:
    """Loss of each image outside its padding.

    Parameters
    ----------
    kind : str
        MSE, MAE, or hybrid = alpha MSE + (1 - alpha) (1 - SSIM) (Eq. 7).
    alpha : float
        Weight of the MSE in the hybrid loss.
    restored : Tensor
        Images in normalised units.
    batch : Batch
        What they were restored from; its high images are the target.
    """
    error = torch.where(batch.mask, restored - batch.high, 0.0)
    error = error.abs() if kind == "MAE" else error.square()
    mean = error.sum((1, 2, 3)) / batch.mask.sum((1, 2, 3))
    if kind != "hybrid":
        return mean
    ssim = structural_similarity(restored, batch.high, batch.mask, batch.data_range)
    return alpha * mean + (1 - alpha) * (1 - ssim)


def draw_order(slices: int, count: int, generator: torch.Generator) -> list[int]:
    """Numbers of `count` slices to draw: whole passes through all of them, each in a new order."""
    passes = [torch.randperm(slices, generator=generator) for _ in range(math.ceil(count / slices))]
    return torch.cat(passes)[:count].tolist()


def average_weights(average: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Move an exponential average of the weights on by step `step` (from 0), in place.

    The first steps weigh more than 1 - `decay`, or the start would linger.
    """
    share = 1 - min(decay, (step + 1) / (step + 10))
    with torch.no_grad():
        for mean, value in zip(average.parameters(), net.parameters(), strict=True):
            mean.lerp_(value, share)


# ---------------------------------------------------------------- checkpoints


def plain(config: Any) -> dict[str, Any]:
    """Fields of a dataclass as data that a checkpoint may hold: no paths, no tuples."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in values.items()
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two sets of settings, as ``name old -> new``; empty if nothing does."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)


def versions() -> dict[str, str]:
    """What computed a checkpoint: versions of Python, NumPy and torch, and the commit if there is a repository."""
    commit = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    libraries = {"python": platform.python_version(), "numpy": np.__version__, "torch": str(torch.__version__)}
    return libraries | {"commit": commit}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain data beside `path`, then rename, with the format and the versions added."""
    packed = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError that names no file
    torch.save({"format": FORMAT, "versions": versions()} | content, packed)
    with atomic_path(path) as partial:
        partial.write_bytes(packed.getbuffer())


def reason_to_stop(history: Sequence[dict[str, Any]], epochs: int, min_epochs: int, patience: int) -> str:
    """Why no further epoch is due (report 4.2.2), or nothing; rows of `history` hold the loss `validation`."""
    if len(history) >= epochs:
        return f"all {epochs} epochs done"
    since = len(history) - 1 - int(np.argmin([row["validation"] for row in history])) if history else 0
    return f"no improvement for {patience} epochs" if len(history) >= min_epochs and since >= patience else ""


def save_epoch(
    folder: Path, state: dict[str, Any], net: nn.Module, optimiser: torch.optim.Optimizer, entropy: Sequence[int]
) -> None:
    """Save an epoch as last.pt, from which the run goes on, and as best.pt if no earlier one was better.

    `state` is the checkpoint for use, its last row of `history` the epoch's; `entropy` seeds the next epoch.
    """
    losses = [row["validation"] for row in state["history"]]
    if losses[-1] <= min(losses):
        save_checkpoint(folder / "best.pt", state)
    training = {"weights": net.state_dict(), "optimiser": optimiser.state_dict()}
    more = {"training": training, "generators": {"entropy": list(entropy)}}
    save_checkpoint(folder / "last.pt", state | more)


def print_epoch(history: Sequence[dict[str, Any]], epochs: int, name: str, column: str) -> None:
    """One line of the last of `epochs` epochs, with what a stage looks at besides its losses."""
    row, epoch = history[-1], len(history)
    left = sum(past["seconds"] for past in history) / epoch * (epochs - epoch) / 60
    print(
        f"epoch {epoch:03d}/{epochs} | train {row['train']:.4f} | val {row['validation']:.4f} | "
        f"{name} {row[column]:.4f} | lr {row['lr']:.1e} | {row['images_per_second']:.0f} img/s | eta {left:.0f} min",
        flush=True,
    )


def previous_run(folder: Path, state: dict[str, Any], free: Sequence[str]) -> dict[str, Any] | None:
    """The last checkpoint in a run's folder, for a run of the same settings and data; None if there is none.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    state : dict
        What the run would save: ``config``, ``data`` (with the settings of the pairs) and, for a path, ``path``.
    free : sequence of str
        Names of the config that may differ between the runs of one training.

    Raises
    ------
    InputError
        If the checkpoint is of other settings or data, with the differences, or has no best.pt beside it.
    """
    if not (folder / "last.pt").exists():
        return None
    content = load_checkpoint(folder / "last.pt")
    old, new = (
        {name: value for name, value in part["config"].items() if name not in free}
        | {f"pairs {name}": value for name, value in part["data"]["settings"].items()}
        | {"pairs fingerprint": part["data"]["fingerprint"], "first weights": part["data"].get("init", "")}
        | ({"noise schedule": part["path"]["weights"].tolist()} if "path" in part else {})
        for part in (content, state)
    )
    hint = "name another --run or start over with --fresh"
    if text := differences(old, new):
        raise InputError(f"{folder}: other settings or data found ({text}), expected the same; {hint}")
    if not (folder / "best.pt").exists():
        raise InputError(f"{folder / 'best.pt'}: no such file beside last.pt; {hint}")
    return content


def load_checkpoint(path: Path, data_settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Parameters
    ----------
    path : Path
        best.pt or last.pt of a run.
    data_settings : dict, optional
        Settings of the pairs it is to be used on (attribute ``settings`` of pairs.zarr).

    Returns
    -------
    dict
        As saved by the stage that trained it.

    Raises
    ------
    InputError
        If the file is missing, damaged, holds anything but tensors and plain data, is of another format, or was
        trained on pairs of other settings.
    """
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):  # what torch.load reads in its older formats is not written here
                raise ValueError("no whole archive")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a checkpoint of a training stage") from None
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: found {reason}, expected tensors and plain data only, unharmed") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: format {found!r} found, expected {FORMAT}")
    if data_settings is not None and (text := differences(content["data"]["settings"], data_settings)):
        raise InputError(f"{path}: trained on pairs of other settings ({text}), expected the same: run 02 or 03 again")
    return content


def load_unet(path: Path, data_settings: dict[str, Any] | None = None) -> tuple[UNet, dict[str, Any]]:
    """Read a trained U-Net and its checkpoint; see `load_checkpoint`."""
    content = load_checkpoint(path, data_settings)
    if content.get("stage") != "unet":
        raise InputError(f"{path}: stage {content.get('stage')!r} found, expected 'unet'")
    net = UNet(UNetConfig(**content["network"]))
    net.load_state_dict(content["weights"])
    return net.eval(), content


# ---------------------------------------------------------------- restoring


def restore(
    net: UNet,
    low: Float[np.ndarray, "slice y x"],
    scale: Float[np.ndarray, " slice"],
    offset: Float[np.ndarray, " slice"],
    batch: int = 8,
    device: torch.device | None = None,
    precision: str = "auto",
    flips: bool = False,
) -> Float[np.ndarray, "slice y x"]:
    """Restore a scan of any size, `batch` slices at a time.

    Parameters
    ----------
    net : UNet
        Trained network.
    low : float32 (slice, y, x)
        Low image on the high grid, in units of its scan.
    scale, offset : float32 (slice,)
        Normalised image = (image - offset) / scale, as stage 02 has it.
    batch : int
        Slices in memory at a time; the result does not depend on it.
    device : torch.device, optional
        The network's own by default.
    precision : str
        auto, bf16 or float32.
    flips : bool
        Mean over the four flips of the slice, which the network saw in training: four times the work.

    Returns
    -------
    float32 (slice, y, x)
        Restored image, in units of the low scan.
    """
    device = device or next(net.parameters()).device
    net = net.to(device).eval()
    multiple = net.config.multiple
    _, height, width = low.shape
    margin = ((0, 0), (0, -height % multiple), (0, -width % multiple))
    restored = np.empty_like(low)
    for start in range(0, len(low), batch):
        part = slice(start, start + batch)
        factor, shift = scale[part, None, None], offset[part, None, None]
        image = torch.from_numpy(np.pad((low[part] - shift) / factor, margin, mode="reflect")).to(device)
        with torch.inference_mode(), autocast(device, pick_dtype(precision, device)):
            axes: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3)) if flips else ((),)
            given = image[:, None].contiguous(memory_format=torch.channels_last)
            output = torch.stack([net(given.flip(way)).float().flip(way) for way in axes]).mean(dim=0)
        restored[part] = output[:, 0, :height, :width].cpu().numpy() * factor + shift
    return restored
