"""The anchored path from a high to a low image (report 4.3, appendix C): its noise, its sampler, its trained model.

Apart from networks.py, on which it builds, because only the stages that offer this model need it. The mathematics as
built, with its corrections of the report, stand in docs/APDDM.md.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from common import Array, InputError
from networks import Batch, UNet, UNetConfig, autocast, load_checkpoint, pick_dtype, seeded

SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "parabola": lambda u: 4 * u * (1 - u),  # Eq. 21
    "halfsine": lambda u: np.sin(np.pi * u),
    "constant": np.ones_like,
}


Noise = Callable[[Sequence[float], tuple[int, int], torch.Generator], Tensor]  # sum of one draw per weight, (h, w)


# ---------------------------------------------------------------- path


def schedule_values(schedule: str | Callable[[Array], Array], length: int) -> Array:
    """Noise schedule f(1..T) from a name, ``module:function`` or a function of an array u = t / T."""
    function = SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    if isinstance(schedule, str) and ":" in schedule:
        module, _, name = schedule.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"schedule: found {schedule!r} ({error}), expected an importable function") from None
    if not callable(function):
        raise InputError(f"schedule: found {schedule!r}, expected {', '.join(SCHEDULES)} or module:function")
    if length < 1:
        raise InputError(f"length: found {length}, expected 1 or more")
    values = np.asarray(function(np.arange(1, length + 1) / length), np.float64)
    if values.shape != (length,) or not np.isfinite(values).all() or not abs(values).max() > 1e-9:
        raise InputError(f"schedule: found {values} for {length} steps, expected one finite value each, not all 0")
    return values


def beta_critical(weights: Array, rms: float) -> float:
    """The beta at which a step's noise is as large as its share of a residual of this root mean square (Eq. 37)."""
    return rms * math.sqrt(np.square(weights).sum()) / len(weights)


class AnchoredPath:
    """x_t = x_0 + u R + sigma sum_{s <= t} f(s) e'_s with R = y - x_0 and u = t / T (Eq. 31).

    `weights` are f(1..T) of any scale, `beta` the standard deviation of the end about y, whatever T is.
    """

    def __init__(self, weights: Float[Tensor, " length"], beta: float) -> None:
        self.weights, self.beta, self.length = weights, beta, len(weights)
        self.sums = functional.pad(weights.square().cumsum(0), (1, 0))  # S_0..S_T
        self.sigma = beta / math.sqrt(self.sums[-1])  # Eq. 32 with beta outside the root
        self.variance = self.sigma**2 * self.sums  # Eq. 29: V_0..V_T; V_T = beta^2, Eq. 33

    def noise(
        self, noise: Noise, step: int, shape: tuple[int, int], generator: torch.Generator, chain: bool
    ) -> Float[Tensor, "h w"]:
        """x_t - x_0 - u R: a sum of t draws, or one draw of the same variance, cheap but heavier in the tails."""
        weights = self.sigma * self.weights[:step] if chain else self.variance[step : step + 1].sqrt()
        return noise(weights.tolist(), shape, generator)


# ---------------------------------------------------------------- noise


def walk(path: AnchoredPath, noise: Noise, shape: tuple[int, int], generator: torch.Generator) -> Iterator[Tensor]:
    """Noise of one chain at t = 1..T (Eq. 31)."""
    total = torch.zeros(())
    for weight in (path.sigma * path.weights).tolist():
        total = total + noise([weight], shape, generator)
        yield total


def gaussian(weights: Sequence[float], shape: tuple[int, int], generator: torch.Generator) -> Float[Tensor, "h w"]:
    """White noise in place of a bank: one draw, because a sum of them is Gaussian too."""
    return math.hypot(*weights) * torch.randn(shape, generator=generator)


class NoiseBank:
    """Residuals (y, x) of training slices, centred and divided by their standard deviation (Eq. 23, 30).

    Every residual pixel is as likely as any other, so that a draw has variance 1 whatever its size: it starts anywhere
    (`positions`; else at the centre) and goes on beyond a slice's rim as in a mirror. It is turned by a random multiple
    of 90 degrees (`rotations`), so that no direction of edges adds up along a chain.
    """

    def __init__(self, slices: Sequence[Tensor], rotations: bool = True, positions: bool = True) -> None:
        self.slices, self.rotations, self.positions = list(slices), rotations, positions
        self.ends = list(itertools.accumulate(residual.numel() for residual in slices))

    def __call__(
        self, weights: Sequence[float], shape: tuple[int, int], generator: torch.Generator
    ) -> Float[Tensor, "h w"]:
        """Sum of one draw for each weight, on the device of the slices."""
        total = torch.zeros(shape, device=self.slices[0].device)
        rows = torch.rand(len(weights), 4, generator=generator, dtype=torch.float64).tolist()
        for weight, (number, turns, *starts) in zip(weights, rows, strict=True):
            residual = self.slices[bisect.bisect_right(self.ends, number * self.ends[-1])]
            turn = int(4 * turns) if self.rotations else 0
            sides = shape[::-1] if turn % 2 else shape  # of the cut before it is turned
            for axis, (size, side, place) in enumerate(zip(residual.shape, sides, starts, strict=True)):
                start = int(place * 2 * size) if self.positions else (size - side) // 2
                if start < 0 or start + side > size:
                    index = torch.arange(start, start + side, device=residual.device) % (2 * size)
                    residual = residual.index_select(axis, torch.minimum(index, 2 * size - 1 - index))
                else:
                    residual = residual.narrow(axis, start, side)
            total.add_(torch.rot90(residual, turn), alpha=weight)
        return total


def standardise(residuals: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """Residuals less their mean, divided by their standard deviation (Eq. 30 put right), and both with RMS(R)."""
    count = sum(r.numel() for r in residuals)
    mean = sum(float(r.double().sum()) for r in residuals) / count
    rms = math.sqrt(sum(float(r.double().square().sum()) for r in residuals) / count)
    deviation = math.sqrt(max(rms**2 - mean**2, 0.0))
    if not deviation > 1e-6 * rms:
        raise InputError(f"noise bank: residuals of standard deviation {deviation:g}, expected low and high to differ")
    figures = {"mean": mean, "deviation": deviation, "rms": rms}
    return [((r - mean) / deviation).half() for r in residuals], figures


def draw_batch(noise: Noise, like: Float[Tensor, "n 1 h w"], generators: Sequence[torch.Generator]) -> Tensor:
    """One standardised draw for each image of a batch, each from its own generator."""
    height, width = like.shape[2:]
    return torch.stack([noise([1.0], (height, width), one) for one in generators])[:, None].to(like)


def state_at(
    path: AnchoredPath,
    noise: Noise,
    batch: Batch,
    steps: Sequence[int],
    levels: Sequence[float],
    chain: bool,
    generator: torch.Generator,
) -> Tensor:
    """x_t of each image of a batch at its own t, with a share `levels` of the path's beta."""
    height, width = batch.low.shape[2:]
    drawn = [
        level * path.noise(noise, step, (height, width), generator, chain)
        for step, level in zip(steps, levels, strict=True)
    ]
    share = torch.tensor(steps).to(batch.low)[:, None, None, None] / path.length
    return batch.high + share * (batch.low - batch.high) + torch.stack(drawn)[:, None].to(batch.low)


def illustrate(
    path: AnchoredPath, critical: float, pairs: Sequence[Float[Tensor, "slice 2 y x"]], generator: torch.Generator
) -> dict[str, Array]:
    """Numbers of the figures: variance along chains, their end's error against beta, edges without turns, one walk."""
    scans = [scan.cpu() for scan in pairs]
    residuals, stats = standardise([low - high for scan in scans for low, high in scan])
    bank, side, walks = NoiseBank(residuals), (64, 64), max(20, 5000 // path.length)
    square = [[float(x.square().mean()) for x in walk(path, bank, side, generator)] for _ in range(walks)]
    times = np.arange(1, path.length + 1)
    found = {"time": times, "variance": path.variance[1:].numpy(), "variance_walked": np.mean(square, axis=0)}

    betas = critical * 2.0 ** np.arange(-3, 8)
    ends = [AnchoredPath(path.weights, beta) for beta in betas]  # Fig. 30
    errors = [
        np.mean([float(end.noise(bank, end.length, side, generator, True).square().mean()) for _ in range(walks // 4)])
        for end in ends
    ]
    found |= {
        "beta": betas,
        "mse_end": np.array(errors),
        "beta_critical": np.array(critical),
        "rms": np.array(stats["rms"]),
    }

    # Fig. 29: whole slices of one scan in place, so that the edges of the residuals meet.
    number = len(scans) // 2
    first, shape = sum(len(scan) for scan in scans[:number]), scans[number].shape[2:]
    for name, rotations in (("edges_plain", False), ("edges_turned", True)):
        place = NoiseBank(residuals[first : first + len(scans[number])], rotations, positions=False)
        found[name] = (
            AnchoredPath(path.weights, 1.0).noise(place, path.length, (shape[0], shape[1]), generator, True).numpy()
        )

    low, high = scans[number][len(scans[number]) // 2]
    noises = [torch.zeros(shape), *walk(path, bank, (shape[0], shape[1]), generator)]
    stops = [path.length * quarter // 4 for quarter in range(5)]
    images = [high + t / path.length * (low - high) + noises[t] for t in stops]  # Fig. 10
    return found | {"path_time": np.array(stops), "path": torch.stack([*images, low]).numpy()}


# ---------------------------------------------------------------- use


def sampling_times(length: int, steps: int) -> list[int]:
    """T and `steps` - 1 earlier times, evenly spaced, descending."""
    return [round(length * (1 - i / steps)) for i in range(steps)]


def sample(
    estimate: Callable[[Tensor, int], Tensor],
    end: Tensor,
    path: AnchoredPath,
    times: Sequence[int],
    eta: float,
    noisy_start: bool,
    draw: Callable[[], Tensor],
) -> Tensor:
    """Walk from the end of the path to x_0 by q(x_s | x_t, x_0, y); see docs/APDDM.md.

    Parameters
    ----------
    estimate : callable
        (x_t, t) -> estimate of x_0.
    end : Tensor
        y, the low image.
    times : sequence of int
        T and any earlier times, descending.
    eta : float
        Share of fresh noise, from 0 (deterministic) to 1 (ancestral).
    noisy_start : bool
        Start at y + beta z instead of y.
    draw : callable
        Gives standardised noise z of the shape of `end`.
    """
    state = end + path.beta * draw() if noisy_start else end
    for t, s in itertools.pairwise((*times, 0)):
        clean = estimate(state, t)
        share = float(path.sums[s] / path.sums[t]) if path.sums[t] > 0 else 0.0  # V_s / V_t
        fresh = eta * float(path.variance[s]) * (1 - share)
        far, near = (clean + u / path.length * (end - clean) for u in (t, s))  # m_t, m_s
        state = near + math.sqrt(share * (1 - eta * (1 - share))) * (state - far)
        state = state + math.sqrt(fresh) * draw() if fresh > 0 else state
    return state


class APDDM:
    """Network, path and noise of a checkpoint; without ``weights`` in it the network is new.

    Raises
    ------
    InputError
        By `check`, if the model cannot restore in that way, or the samples would be equal.
    """

    def __init__(self, content: dict[str, Any], generator: torch.Generator | None = None) -> None:
        self.timesteps, self.parametrization, self.condition, width = (
            content["config"][name] for name in ("timesteps", "parametrization", "condition", "embedding")
        )
        self.sampling: dict[str, Any] = {
            name: content["config"][name] for name in ("steps", "samples", "eta", "noisy_start")
        }
        self.interval = content.get("interval")  # of this sampling
        width = 0 if self.timesteps == "last" else width
        if self.timesteps == "last" and self.parametrization == "paper" and abs(content["path"]["weights"][-1]) < 1e-9:
            raise InputError("timesteps: found 'last' with parametrization 'paper': f(T) = 0 leaves nothing to train")
        self.net = UNet(UNetConfig(**content["network"]), generator, 1 + self.condition, width)
        if "weights" in content:
            self.net.load_state_dict(content["weights"])
        self.path = AnchoredPath(content["path"]["weights"], content["path"]["beta"])
        self.noise: Noise = (
            gaussian if not content["bank"] else NoiseBank(content["bank"], content["config"]["rotations"])
        )

    def take_weights(self, weights: dict[str, Tensor]) -> None:
        """Start from a plain U-Net's weights: a second channel counts for nothing at first, and so does t."""
        own = self.net.state_dict()
        for name, value in weights.items():
            own[name].zero_()[tuple(slice(size) for size in value.shape)] = value

    def estimate(self, state: Tensor, step: int | Tensor, end: Tensor) -> Tensor:
        """x_0 from x_t and y (n, 1, h, w) at t (n,): x_t - r, or x_t - f(t) r (Eq. 10); the net gives x_t - r."""
        image = torch.cat((state, end), 1) if self.condition else state
        steps = torch.as_tensor(step).expand(len(state))
        place = steps.to(state.device, torch.float32) / self.path.length
        output: Tensor = self.net(image.contiguous(memory_format=torch.channels_last), place)
        if self.parametrization == "residual":
            return output
        return state + self.path.weights[steps - 1].to(state)[:, None, None, None] * (output - state)

    def asked(self, steps: int, samples: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Sampling with these steps and samples, 0 as trained, and the interval if it is calibrated for that."""
        sampling = self.sampling | {name: n for name, n in (("steps", steps), ("samples", samples)) if n}
        self.check(**sampling)
        return sampling, self.interval if sampling == self.sampling else None

    def check(self, steps: int, samples: int, eta: float, noisy_start: bool) -> None:
        """Refuse what the network was not trained for."""
        if not 1 <= steps <= (1 if self.timesteps == "last" else self.path.length):
            wanted = (
                f"1 to {self.path.length}, the path's length" if self.timesteps == "all" else "1: trained at T alone"
            )
            raise InputError(f"steps: found {steps}, expected {wanted}")
        if not 0 <= eta <= 1:
            raise InputError(f"eta: found {eta}, expected 0 to 1")
        if self.parametrization == "paper" and abs(self.path.weights[-1]) < 1e-9:
            reason = "f(T) = 0, so Eq. 10 gives back the low image whatever the network says"
            raise InputError(f"parametrization: found 'paper' ({reason}), expected 'residual' to restore from t = T")
        if samples < 1 or (samples > 1 and not (self.path.beta > 0 and (noisy_start or (eta > 0 and steps > 1)))):
            wanted = "1, or noisy_start, or eta > 0 with 2 or more steps: without noise all samples are equal"
            raise InputError(f"samples: found {samples}, expected {wanted}")


def load_apddm(path: Path, data_settings: dict[str, Any] | None = None) -> tuple[APDDM, dict[str, Any]]:
    """Read a trained APDDM and its checkpoint; see `load_checkpoint`."""
    content = load_checkpoint(path, data_settings)
    if content.get("stage") != "apddm":
        raise InputError(f"{path}: stage {content.get('stage')!r} found, expected 'apddm'")
    return APDDM(content), content


def restore_apddm(
    model: APDDM,
    low: Float[np.ndarray, "slice y x"],
    scale: Float[np.ndarray, " slice"],
    offset: Float[np.ndarray, " slice"],
    steps: int,
    samples: int,
    eta: float,
    noisy_start: bool,
    generator: torch.Generator,
    batch: int = 8,
    precision: str = "auto",
) -> tuple[Float[np.ndarray, "slice y x"], Float[np.ndarray, "slice y x"]]:
    """Restore a scan as `restore` does, `batch` images at a time, on the network's device.

    Returns
    -------
    mean, deviation : float32 (slice, y, x)
        Over the samples, in units of the low scan; the deviation of one sample is 0.
    """
    model.check(steps, samples, eta, noisy_start)
    net = model.net.eval()
    device = next(net.parameters()).device
    base = int(torch.randint(2**62, (), generator=generator))
    _, height, width = low.shape
    margin = ((0, 0), (0, -height % net.config.multiple), (0, -width % net.config.multiple))
    total, square = np.zeros(low.shape), np.zeros(low.shape)
    items = [(number, draw) for number in range(len(low)) for draw in range(samples)]
    for start in range(0, len(items), batch):
        part = [number for number, _ in items[start : start + batch]]
        image = (low[part] - offset[part, None, None]) / scale[part, None, None]
        end = torch.from_numpy(np.pad(image, margin, mode="reflect")).to(device)[:, None]
        # One generator an image: the result does not depend on what else is in the batch.
        generators = [seeded(base, *item) for item in items[start : start + batch]]
        draw = functools.partial(draw_batch, model.noise, end, generators)
        estimate = functools.partial(model.estimate, end=end)
        with torch.inference_mode(), autocast(device, pick_dtype(precision, device)):
            times = sampling_times(model.path.length, steps)
            output = sample(estimate, end, model.path, times, eta, noisy_start, draw)
        for number, value in zip(part, output[:, 0, :height, :width].double().cpu().numpy(), strict=True):
            total[number] += value
            square[number] += np.square(value)
    total /= samples
    spread = np.sqrt(np.maximum(square - samples * total**2, 0) / max(samples - 1, 1))
    factor = scale[:, None, None]
    return (total * factor + offset[:, None, None]).astype(np.float32), (spread * factor).astype(np.float32)


def conformal_factor(scores: Array, coverage: float) -> float:
    """Factor on the deviation so that a share `coverage` of new errors lies within: split conformal (Lei 2018)."""
    rank = math.ceil((len(scores) + 1) * coverage)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= len(scores) else math.inf
