"""Networks, training pairs, checkpoints and the restoring of a scan; shapes are enforced by beartype."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from jaxtyping import install_import_hook

from common import InputError, finish_store, open_pairs, write_scan

if "networks" not in sys.modules:
    install_import_hook("networks", "beartype.beartype")
import torch

import networks


def config(**changes):
    values = {
        "features_main": (8, 12, 16),
        "features_skip": (),
        "downsampling": "meanpool",
        "upsampling": "upconv",
        "activation": "ReLU",
        "residual": True,
    }
    return networks.UNetConfig(**(values | changes))


def trained_once(net, image, target):
    """Loss before and after one step of gradient descent, and whether every weight has a gradient."""
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):  # the zeros of a residual network's last layer keep the others still in the first step
        loss = (net(image) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


OPTIONS = [
    *({"downsampling": name} for name in ("maxpool", "meanpool", "convStrided")),
    *({"upsampling": name} for name in ("nearest", "bilinear", "bicubic", "upconv")),
    *({"activation": name} for name in ("ReLU", "LeakyReLU", "ELU", "PReLU")),
    {"residual": False},
    {"unshuffle": 2},
    {"unshuffle": 3, "residual": False},
    {"features_main": (6, 8)},
    {"features_main": (4, 6, 8, 10)},
    {"features_skip": (3, 20)},
    *({"dims": 1, "upsampling": name} for name in ("linear", "nearest", "upconv")),
    *({"dims": 3, "upsampling": name} for name in ("trilinear", "nearest", "upconv")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_builds_and_learns(options):
    net = networks.UNet(config(**options))
    generator = networks.seeded(1)
    shape = (2, 1, *[2 * net.config.multiple] * net.config.dims)
    image, target = (torch.randn(shape, generator=generator) for _ in range(2))
    losses, learning = trained_once(net, image, target)
    assert net(image).shape == shape
    assert losses[2] < losses[0]
    assert learning


def test_options_differ():
    """Each option changes the function of the network, not only its name."""
    image = torch.randn(1, 1, 32, 32, generator=networks.seeded(1))
    plain = {"residual": False, "upsampling": "bilinear"}
    changes = ({}, {"downsampling": "maxpool"}, {"upsampling": "bicubic"}, {"upsampling": "nearest"})
    changes += ({"activation": "LeakyReLU"}, {"activation": "ELU"}, {"activation": "PReLU"})
    with torch.inference_mode():
        outputs = [networks.UNet(config(**(plain | change)))(image) for change in changes]
    for i, first in enumerate(outputs):
        assert all((first - second).abs().max() > 1e-4 for second in outputs[:i])


def test_structure_is_the_reports():
    """Two 3x3 convolutions a level, skips as wide as features_main without its last, transposed convolution, 1x1."""
    main = (64, 128, 256)
    conv = lambda channels, out, width: channels * out * width**2 + out  # noqa: E731
    encoder = sum(conv(a, b, 3) + conv(b, b, 3) for a, b in ((1, 64), (64, 128), (128, 256)))
    decoder = sum(conv(2 * b, b, 3) + conv(b, b, 3) + conv(a, b, 2) for a, b in ((256, 128), (128, 64)))
    net = networks.UNet(config(features_main=main))
    assert net.config.features_skip == (64, 128)
    assert sum(p.numel() for p in net.parameters()) == encoder + decoder + conv(64, 1, 1)


def test_residual_network_starts_as_the_identity():
    image = torch.randn(2, 1, 24, 32, generator=networks.seeded(1))
    for unshuffle in (1, 2):
        assert torch.equal(networks.UNet(config(unshuffle=unshuffle))(image), image)
    second = networks.UNet(config(), channels_in=2)
    assert torch.equal(second(torch.cat((image, image.flip(0)), 1)), image)


def test_first_weights_keep_the_variance():
    image = torch.randn(1, 1, 64, 64, generator=networks.seeded(1))
    net = networks.UNet(config(features_main=(32, 64, 128), residual=False), networks.seeded(3))
    with torch.inference_mode():
        assert 0.2 < net(image).std() < 5
    other = networks.UNet(config(features_main=(32, 64, 128), residual=False), networks.seeded(4))
    assert not torch.equal(net.last.weight, other.last.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"features_main": (8,)},
        {"features_main": (8, 0)},
        {"features_skip": (8,)},
        {"dims": 4},
        {"dims": 3, "upsampling": "bilinear"},
        {"upsampling": "linear"},
        {"downsampling": "median"},
        {"activation": "tanh"},
        {"unshuffle": 0},
        {"dims": 1, "upsampling": "nearest", "unshuffle": 2},
    ],
    ids=str,
)
def test_impossible_structures_are_refused(options):
    with pytest.raises(InputError, match=r"found .* expected"):
        config(**options)


def test_overfits_one_pair():
    generator = networks.seeded(5)
    low, high = torch.rand(2, 1, 1, 16, 16, generator=generator)
    net = networks.UNet(config(features_main=(24, 32)), generator)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        loss = (net(low) - high).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05 * (low - high).square().mean().item()


# ---------------------------------------------------------------- training pairs


@pytest.fixture
def store(tmp_path):
    """Two scans of different sizes in split train (one slice of the first in validation), one scan in split test."""
    generator = np.random.default_rng(0)
    scans = {
        "m1/HT/axial": ((3, 20, 27), [1, 1, 2]),
        "m2/HT/axial": ((2, 25, 16), [1, 1]),
        "m3/TA/axial": ((1, 8, 8), [3]),
    }
    for key, (shape, split) in scans.items():
        low, high = generator.gamma(4.0, 0.25, (2, *shape)).astype(np.float32)
        values = {"split": np.array(split, np.uint8), "scale": np.linspace(2, 4, shape[0]).astype(np.float32)}
        write_scan(tmp_path / "data" / "pairs.zarr", key, {"low": low, "high": high} | values, {})
    finish_store(tmp_path / "data" / "pairs.zarr", list(scans), {"fingerprint": "f", "settings": {"align": "centres"}})
    return open_pairs(tmp_path)


def test_pairs_of_a_split_and_nothing_else(store):
    pairs = networks.PairSet(store, "train", torch.device("cpu"))
    assert len(pairs) == 4
    batch = pairs.batch(range(4), 8)
    assert batch.low.shape == batch.high.shape == batch.mask.shape == (4, 1, 32, 32)
    first, second = (store.read(key, "high") for key in ("m1/HT/axial", "m2/HT/axial"))
    for item, image in enumerate((first[0], first[1], second[0], second[1])):
        height, width = image.shape
        assert np.array_equal(batch.high[item, 0, :height, :width].numpy(), image)
        assert batch.mask[item].sum() == height * width
        mirrored = np.pad(image, ((0, 32 - height), (0, 32 - width)), mode="reflect")
        assert np.array_equal(batch.high[item, 0].numpy(), mirrored)
    # The range is that of the whole scan, slices outside the split too, in units of each slice.
    widest = max(first[i].max() * scale for i, scale in enumerate((2, 3, 4)))
    assert np.allclose(batch.data_range[:2], [widest / 2, widest / 3])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_mirror_is_numpys(size):
    assert networks.mirror(size, 20).tolist() == np.pad(np.arange(size), (0, 20 - size), mode="reflect").tolist()


def test_flips_crops_and_turns_move_both_images_alike(store):
    pairs = networks.PairSet(store, "train", torch.device("cpu"))
    for pair in pairs.pairs:
        pair[:, 1] = 2 * pair[:, 0]  # so that a high pixel tells the low pixel that belongs to it
    seen = set()
    for number in range(60):
        batch = pairs.batch([0], 4, 0, True, True, networks.seeded(number))
        assert torch.equal(batch.high, 2 * batch.low)
        image = batch.low[0, 0][batch.mask[0, 0].any(1)][:, batch.mask[0, 0].any(0)]
        low = pairs.pairs[0][0, 0]
        forms = {
            (flip_y, flip_x, turned): torch.equal(image, form.T if turned else form)
            for flip_y in (0, 1)
            for flip_x in (0, 1)
            for turned in (0, 1)
            for form in [low.flip([axis for axis, flip in enumerate((flip_y, flip_x)) if flip])]
        }
        assert sum(forms.values()) == 1
        seen.add(next(form for form, same in forms.items() if same))
    assert len(seen) == 8
    starts = set()
    for number in range(40):
        batch = pairs.batch([0], 4, 16, generator=networks.seeded(number))
        assert torch.equal(batch.high, 2 * batch.low)
        assert batch.mask.all()
        match = (pairs.pairs[0][0, 0] == batch.low[0, 0, 0, 0]).nonzero()
        starts.add(tuple(match[0].tolist()))
    assert {row for row, _ in starts} == set(range(5))
    assert {min(column for _, column in starts), max(column for _, column in starts)} == {0, 11}


def test_flips_are_fair_and_repeatable(store):
    pairs = networks.PairSet(store, "train", torch.device("cpu"))
    low = pairs.pairs[0][0, 0]
    batch = pairs.batch([0] * 400, 1, 0, True, False, networks.seeded(9))
    kept = torch.tensor([torch.equal(image[0], low) for image in batch.low]).float().mean()
    assert abs(kept - 0.25) < 0.08
    again = pairs.batch([0] * 400, 1, 0, True, False, networks.seeded(9))
    assert torch.equal(again.low, batch.low)


def test_half_precision_in_memory(store):
    pairs = networks.PairSet(store, "train", torch.device("cpu"), torch.float16)
    exact = networks.PairSet(store, "train", torch.device("cpu")).batch([0, 3], 4)
    batch = pairs.batch([0, 3], 4)
    assert pairs.pairs[0].dtype == torch.float16
    assert batch.low.dtype == torch.float32
    assert (batch.low - exact.low).abs().max() < 2e-3


def test_pairs_that_cannot_be_trained_on(store):
    with pytest.raises(InputError, match="no slice of split 'lego'"):
        networks.PairSet(store, "lego", torch.device("cpu"))
    low = store.read("m2/HT/axial", "low")
    low[0, 0, 0] = np.nan
    arrays = {name: store.read("m2/HT/axial", name) for name in ("high", "split", "scale")}
    write_scan(store.path, "m2/HT/axial", arrays | {"low": low}, {})
    with pytest.raises(InputError, match="m2/HT/axial: values that are not finite"):
        networks.PairSet(store, "train", torch.device("cpu"))
    write_scan(store.path, "m2/HT/axial", arrays | {"low": low[:, 1:]}, {})
    with pytest.raises(InputError, match="expected equal shapes"):
        networks.PairSet(store, "train", torch.device("cpu"))


# ---------------------------------------------------------------- checkpoints


def checkpoint(path, **changes):
    net = networks.UNet(config(residual=False))
    content = {"stage": "unet", "network": networks.plain(net.config), "weights": net.state_dict()}
    content |= {"data": {"fingerprint": "f", "settings": {"align": "centres", "margin": 2}}}
    networks.save_checkpoint(path, content | changes)
    return net


def test_checkpoint_returns_the_same_network(tmp_path):
    net = checkpoint(tmp_path / "best.pt")
    again, content = networks.load_unet(tmp_path / "best.pt", {"align": "centres", "margin": 2})
    image = torch.randn(1, 1, 16, 16, generator=networks.seeded(1))
    with torch.inference_mode():
        assert torch.equal(net(image), again(image))
    assert content["versions"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_pairs_of_other_settings_are_refused_with_the_difference(tmp_path):
    checkpoint(tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"align 'centres' -> 'none', ratio None -> 2") as error:
        networks.load_checkpoint(tmp_path / "best.pt", {"align": "none", "margin": 2, "ratio": 2})
    assert "margin" not in str(error.value)


class Intruder:
    def __reduce__(self):
        return print, ("executed",)


def test_checkpoint_with_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"format": 1, "stage": "unet", "weights": Intruder()}, path)
    with pytest.raises(InputError, match=r"evil\.pt.*tensors and plain data only"):
        networks.load_checkpoint(path)
    path.write_bytes(pickle.dumps(Intruder()))
    with pytest.raises(InputError, match=r"evil\.pt"):
        networks.load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(InputError, match="no such file"):
        networks.load_checkpoint(path)
    checkpoint(path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"best\.pt"):
            networks.load_checkpoint(path)
    checkpoint(path, format=99)
    with pytest.raises(InputError, match="format 99 found, expected 1"):
        networks.load_checkpoint(path)
    checkpoint(path, stage="apddm")
    with pytest.raises(InputError, match="stage 'apddm' found"):
        networks.load_unet(path)


# ---------------------------------------------------------------- restoring


@pytest.fixture(scope="module")
def scan():
    generator = np.random.default_rng(3)
    low = generator.gamma(4.0, 25.0, (5, 37, 50)).astype(np.float32)
    return low, low.mean((1, 2)), np.linspace(-3, 3, 5).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"unshuffle": 2}, {"features_main": (4, 6, 8, 10)}], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 24), (31, 37)])
def test_restores_any_size(scan, options, size):
    low, scale, offset = scan
    part = np.ascontiguousarray(low[:, : size[0], : size[1]])
    restored = networks.restore(networks.UNet(config(**options)), part, scale, offset)
    assert restored.shape == part.shape
    assert np.allclose(restored, part, rtol=1e-5, atol=1e-3)  # a new residual network is the identity


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_restoring_does_not_depend_on_the_batch(scan, precision):
    net = networks.UNet(config(residual=False))
    whole, single, three = (networks.restore(net, *scan, batch, precision=precision) for batch in (8, 1, 3))
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for other in (single, three):
        assert np.abs(other - whole).max() < tolerance * np.abs(whole).max()


def test_restoring_is_the_network_in_normalised_units(scan):
    low, scale, offset = scan
    net = networks.UNet(config(residual=False))
    part = low[:, :32, :48]
    with torch.inference_mode():
        expected = net(torch.from_numpy((part - offset[:, None, None]) / scale[:, None, None])[:, None])[:, 0].numpy()
    restored = networks.restore(net, part, scale, offset, precision="float32")
    assert np.allclose(restored, expected * scale[:, None, None] + offset[:, None, None], rtol=1e-4, atol=1e-2)
    # What lies beyond the image is a mirror of it: the part that the padding does not reach is not changed by it.
    wider = networks.restore(net, low, scale, offset, precision="float32")
    assert np.allclose(wider[:, :8, :8], restored[:, :8, :8], rtol=1e-4, atol=1e-2)


def test_bfloat16_keeps_fine_steps_of_intensity(scan):
    """The last layer computes in float32: more grey values come out than 8 bits of mantissa hold."""
    restored = networks.restore(networks.UNet(config(residual=False)), *scan, precision="bf16")
    assert len(np.unique(restored[0])) > 0.9 * restored[0].size


def test_devices_and_precisions():
    assert networks.pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="device: found 'gpu7'"):
        networks.pick_device("gpu7")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device: found 'cuda'"):
            networks.pick_device("cuda")
    assert networks.pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert networks.pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    able = torch.cpu.get_capabilities()
    expected = torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    assert networks.pick_dtype("auto", torch.device("cpu")) == expected


def test_mean_over_flips_commutes_with_a_flip():
    """What distinguishes it: a plain network answers a flipped image otherwise, its mean over the flips does not."""
    torch.manual_seed(3)
    net = networks.UNet(config(residual=False))
    low = np.random.default_rng(0).random((2, 32, 24), np.float32)
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    answers = {
        flips: [
            networks.restore(net, image, one, zero, precision="float32", flips=flips)
            for image in (low, np.ascontiguousarray(low[:, ::-1]))
        ]
        for flips in (False, True)
    }
    assert np.allclose(answers[True][0], answers[True][1][:, ::-1], atol=1e-5)
    assert not np.allclose(answers[False][0], answers[False][1][:, ::-1], atol=1e-3)
