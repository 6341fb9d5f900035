"""SOLOv2 and its loss against PyTorch in float64, built here from the papers under the names of the authors' files.

Outputs agree to 1e-5 of their scale, losses to 1e-5, gradients to the pixels to 1e-4 in the relative L2 norm.
"""

from __future__ import annotations

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.distill.structure import InstanceTargets, instance_loss
from hypersd_jax.errors import UserError
from hypersd_jax.models.solov2 import SoloV2Config, resize, solov2
from hypersd_jax.rewards.conversion import convert_reward
from hypersd_jax.rewards.solov2 import load_solov2
from hypersd_jax.weights.keys import torch_key, torch_shape
from hypersd_jax.weights.tensors import save_tensors

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F

from tests.helpers.torch_weights import relative_error

TINY = SoloV2Config(
    blocks=(2, 1, 1, 1),
    width=4,
    pyramid_width=12,
    head_width=16,
    head_layers=2,
    mask_width=8,
    kernel_width=12,
    groups=4,
    classes=3,
    grids=(7, 5, 4, 3, 2),
)
IMAGES = np.random.default_rng(0).random((2, 64, 96, 3), dtype=np.float32)
BUFFERS = ("running_mean", "running_var")


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            project = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        inputs = config.width
        for stage, count in enumerate(config.blocks):
            blocks = []
            for index in range(count):
                width = config.width * 2**stage
                blocks.append(Bottleneck(inputs, width, 2 if stage and not index else 1))
                inputs = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found


class Normed(nn.Module):
    """With a group norm and ReLU, or with a bias alone."""

    def __init__(self, inputs, outputs, size, groups=None):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=groups is None)
        self.gn = nn.GroupNorm(groups, outputs) if groups else None

    def forward(self, x):
        return F.relu(self.gn(self.conv(x))) if self.gn else self.conv(x)


class Neck(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.pyramid_width
        self.lateral_convs = nn.ModuleList(Normed(4 * config.width * 2**stage, width, 1) for stage in range(4))
        self.fpn_convs = nn.ModuleList(Normed(width, width, 3) for _ in range(4))

    def forward(self, stages):
        merged = [conv(x) for conv, x in zip(self.lateral_convs, stages, strict=True)]
        for level in (3, 2, 1):
            merged[level - 1] = merged[level - 1] + F.interpolate(merged[level], scale_factor=2, mode="nearest")
        levels = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def bilinear(x, **size):
    return F.interpolate(x, **size, mode="bilinear", align_corners=False)


def coordinates(x):
    rows, columns = (torch.linspace(-1, 1, length, dtype=x.dtype) for length in x.shape[-2:])
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([x, torch.stack([columns, rows]).expand(len(x), -1, -1, -1)], dim=1)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()

        def branch(inputs):
            widths = [inputs] + [config.head_width] * config.head_layers
            return nn.ModuleList(Normed(*pair, 3, config.groups) for pair in pairwise(widths))

        self.grids = config.grids
        self.kernel_convs, self.cate_convs = branch(config.pyramid_width + 2), branch(config.pyramid_width)
        self.solo_kernel = nn.Conv2d(config.head_width, config.kernel_width, 3, padding=1)
        self.solo_cate = nn.Conv2d(config.head_width, config.classes, 3, padding=1)

    def forward(self, levels):
        levels = [bilinear(levels[0], scale_factor=0.5), *levels[1:4], bilinear(levels[4], size=levels[3].shape[-2:])]
        categories, kernels = [], []
        for level, side in zip(levels, self.grids, strict=True):
            kernel = bilinear(coordinates(level), size=(side, side))
            category = bilinear(level, size=(side, side))
            for conv in self.kernel_convs:
                kernel = conv(kernel)
            for conv in self.cate_convs:
                category = conv(category)
            categories.append(self.solo_cate(category))
            kernels.append(self.solo_kernel(kernel))
        return categories, kernels


class MaskHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.convs_all_levels = nn.ModuleList()
        for level, count in enumerate((1, 1, 2, 3)):
            own = nn.Sequential()
            for index in range(count):
                inputs = config.mask_width if index else config.pyramid_width + 2 * (level == 3)
                own.add_module(f"conv{index}", Normed(inputs, config.mask_width, 3, config.groups))
                if level:
                    doubled = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
                    own.add_module(f"upsample{index}", doubled)
            self.convs_all_levels.append(own)
        self.conv_pred = nn.Sequential(Normed(config.mask_width, config.kernel_width, 1, config.groups))

    def forward(self, levels):
        inputs = [*levels[:3], coordinates(levels[3])]
        return self.conv_pred(sum(own(x) for own, x in zip(self.convs_all_levels, inputs, strict=True)))


class Solo(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.backbone, self.neck = Backbone(config), Neck(config)
        self.bbox_head, self.mask_feat_head = Head(config), MaskHead(config)

    def forward(self, images):
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        levels = self.neck(self.backbone(((255 * images - mean) / std).permute(0, 3, 1, 2)))
        categories, kernels = self.bbox_head(levels)
        last = [[x.permute(0, 2, 3, 1) for x in found] for found in (categories, kernels)]
        return *last, self.mask_feat_head(levels[:4]).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def theirs():
    """Random and nowhere symmetric, the running statistics included; in evaluation mode."""
    torch.manual_seed(0)
    model = Solo(TINY)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.ndim == 1:
                value.copy_(float(name.endswith("weight")) + 0.2 * torch.randn(value.shape))
    return model.double().eval()


def stored(model):
    """The tensors of its file, in float32."""
    return {
        key: np.asarray(value.float() if value.is_floating_point() else value)
        for key, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """From a file as mmdetection's training writes it, with an ImageNet classifier that was left in."""
    folder = tmp_path_factory.mktemp("solov2")
    tensors = {key: torch.tensor(array) for key, array in stored(theirs).items()}
    tensors["backbone.fc.weight"] = torch.zeros(2, 2)
    torch.save({"meta": {"epoch": 36}, "state_dict": tensors}, folder / "SOLOv2.pth")
    convert_reward(folder / "SOLOv2.pth", folder / "model.safetensors")
    return load_solov2(folder, TINY)


@pytest.fixture(scope="module")
def gradient_and_loss(ours):
    """One program for all targets of a shape."""

    def total(images, targets):
        found = instance_loss(*ours.network(ours.params, images), targets)
        return found.total, found

    return jax.jit(jax.grad(total, has_aux=True))


def pixels():
    return torch.tensor(IMAGES, dtype=torch.float64, requires_grad=True)


def test_outputs_and_gradient(theirs, ours):
    images = pixels()
    wanted = theirs(images)
    wanted = [*wanted[0], *wanted[1], wanted[2]]
    random = np.random.default_rng(1)
    factors = [random.standard_normal(x.shape).astype(np.float32) for x in wanted]
    sum((x * torch.tensor(factor)).sum() for x, factor in zip(wanted, factors, strict=True)).backward()

    def total(images):
        found = ours.network(ours.params, images)
        leaves = [*found.categories, *found.kernels, found.features]
        return sum(jnp.sum(x * factor) for x, factor in zip(leaves, factors, strict=True)), leaves

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(IMAGES))
    for x, expected in zip(found, wanted, strict=True):
        expected = expected.detach().numpy()
        assert x.shape == expected.shape
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert expected.std() > 0.05
    assert found[0].shape == (2, 7, 7, TINY.classes)
    assert found[-1].shape == (2, 16, 24, TINY.kernel_width)
    assert relative_error(gradient, images.grad) < 1e-4


def targets():
    """Cells of several levels; the second image has one positive, at the cell and class that padding points at."""
    masks = np.random.default_rng(2).random((2, 3, 16, 24), dtype=np.float32) < 0.3
    return InstanceTargets(
        cells=np.asarray([[0, 60, 80, 101], [0, 0, 0, 0]], np.int32),
        classes=np.asarray([[2, 0, 1, 1], [0, 0, 0, 0]], np.int32),
        instances=np.asarray([[0, 0, 2, 1], [1, 0, 0, 0]], np.int32),
        weights=np.asarray([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32),
        masks=masks.astype(np.float32),
    )


def their_loss(categories, kernels, features, found):
    """Cell by cell; focal loss by way of cross entropy."""
    logits, kernels = (torch.cat([x.flatten(1, 2) for x in levels], dim=1) for levels in (categories, kernels))
    labels, mask = torch.zeros_like(logits), 0.0
    count = max(float(found.weights.sum()), 1.0)
    for image, index in zip(*np.nonzero(found.weights), strict=True):
        cell = found.cells[image, index]
        labels[image, cell, found.classes[image, index]] = 1.0
        p = torch.sigmoid(features[image] @ kernels[image, cell])
        q = torch.tensor(found.masks[image, found.instances[image, index]], dtype=p.dtype)
        mask = mask + (1 - 2 * (p * q).sum() / ((p * p).sum() + (q * q).sum() + 1e-3)) / count
    p = torch.sigmoid(logits)
    right = torch.where(labels > 0, p, 1 - p)
    alpha = torch.where(labels > 0, 0.25, 0.75)
    entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    category = (alpha * (1 - right) ** 2 * entropy).sum() / count
    return category + 3 * mask, category, torch.as_tensor(mask)


@pytest.mark.parametrize("empty", [False, True])
def test_loss_and_gradient(theirs, gradient_and_loss, empty):
    """Also with no instance in the batch, where only categories count."""
    given = targets()
    if empty:
        given = given._replace(weights=np.zeros_like(given.weights))
    images = pixels()
    wanted = their_loss(*theirs(images), given)
    wanted[0].backward()
    gradient, found = gradient_and_loss(jnp.asarray(IMAGES), given)
    np.testing.assert_allclose(found, [float(x.detach()) for x in wanted], rtol=1e-5)
    assert (found.mask == 0.0) == empty
    assert relative_error(gradient, images.grad) < 1e-4
    assert images.grad.abs().max() > 1e-5


def test_perfect_predictions_cost_nothing():
    """Logits and masks far on the right side: both terms vanish; on the wrong side they are large, and finite."""
    given = targets()
    given = given._replace(weights=given.weights * [[1.0], [0.0]])
    positive, kernels = np.zeros((2, 103, 3), np.float32), np.zeros((2, 103, 3), np.float32)
    positive[0, given.cells[0], given.classes[0]] = 1.0
    kernels[0, given.cells[0], given.instances[0]] = 1.0
    features = 80.0 * (2.0 * given.masks.transpose(0, 2, 3, 1) - 1.0)
    sides = np.cumsum([side * side for side in TINY.grids])[:-1]

    def levels(cells):
        parts = zip(np.split(cells, sides, axis=1), TINY.grids, strict=True)
        return [jnp.asarray(part.reshape(2, side, side, -1)) for part, side in parts]

    right, wrong = (
        instance_loss(
            levels(sign * 80.0 * (2.0 * positive - 1.0)), levels(sign * kernels), jnp.asarray(features), given
        )
        for sign in (1.0, -1.0)
    )
    assert float(right.total) < 1e-4
    assert float(wrong.mask) > 0.999
    assert float(wrong.category) == pytest.approx(80.0 * (0.25 * 4 + 0.75 * (2 * 103 * 3 - 4)) / 4, rel=1e-5)


@pytest.mark.parametrize(("old", "new"), [((8, 12), (16, 24)), ((8, 12), (4, 6)), ((9, 5), (4, 7)), ((1, 2), (2, 3))])
def test_resize(old, new):
    x = np.random.default_rng(3).standard_normal((1, *old, 2)).astype(np.float32)
    wanted = bilinear(torch.tensor(x).permute(0, 3, 1, 2), size=new).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resize(jnp.asarray(x), new), wanted, rtol=0, atol=2e-6)


def test_the_sizes_of_the_published_network():
    """Names and shapes of all tensors; ResNet-50 has 25,557,032 parameters, less its classifier's 2,049,000."""
    config = SoloV2Config()
    with torch.device("meta"):
        wanted = {key: tuple(x.shape) for key, x in Solo(config).state_dict().items() if "num_batches" not in key}
    network = solov2(config)
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in network.shapes.items()} == wanted
    for key in (
        "backbone.layer1.0.downsample.1.running_var",
        "backbone.layer3.5.conv2.weight",
        "neck.fpn_convs.3.conv.bias",
        "bbox_head.kernel_convs.3.gn.weight",
        "bbox_head.solo_cate.bias",
        "mask_feat_head.convs_all_levels.3.conv2.conv.weight",
        "mask_feat_head.conv_pred.0.gn.bias",
    ):
        assert key in wanted
    assert wanted["bbox_head.kernel_convs.0.conv.weight"] == (512, 258, 3, 3)
    assert wanted["mask_feat_head.convs_all_levels.3.conv0.conv.weight"] == (128, 258, 3, 3)
    learnt = {path: math.prod(x.shape) for path, x in network.shapes.items() if not path.endswith(BUFFERS)}
    assert sum(count for path, count in learnt.items() if path.startswith("backbone.")) == 25_557_032 - 2_049_000
    images = jax.ShapeDtypeStruct((1, 512, 768, 3), jnp.float32)
    found = jax.eval_shape(network, network.shapes, images)
    assert [x.shape for x in found.categories] == [(1, side, side, 80) for side in (40, 36, 24, 16, 12)]
    assert [x.shape for x in found.kernels] == [(1, side, side, 256) for side in (40, 36, 24, 16, 12)]
    assert found.features.shape == (1, 128, 192, 256)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("bbox_head.solo_kernel.bias", None, "missing"),
        ("mask_feat_head.conv_pred.0.conv.bias", (12,), "mask_feat_head.conv_pred.0.conv.bias"),
        ("bbox_head.solo_cate.weight", (4, 16, 3, 3), r"\[4, 16, 3, 3\] instead of \[3, 16, 3, 3\]"),
    ],
)
def test_a_file_that_does_not_fit(theirs, tmp_path, key, change, message):
    tensors = stored(theirs)
    tensors.pop(key, None)
    if change:
        tensors[key] = np.zeros(change, np.float32)
    save_tensors(tmp_path / "solo.safetensors", tensors)
    with pytest.raises(UserError, match=message) as caught:
        load_solov2(tmp_path / "solo.safetensors", TINY)
    text = str(caught.value)
    assert str(tmp_path / "solo.safetensors") in text
    assert key in text
    assert "\n" not in text


def test_what_is_refused(ours, tmp_path):
    (tmp_path / "SOLOv2_R50_3x.pth").write_bytes(b"")
    with pytest.raises(UserError, match="hypersd convert reward"):
        load_solov2(tmp_path / "SOLOv2_R50_3x.pth")
    with pytest.raises(ValueError, match="divisible by 32"):
        jax.eval_shape(ours.network, ours.params, jnp.zeros((1, 64, 48, 3)))
    with pytest.raises(ValueError, match="5 levels"):
        SoloV2Config(grids=(40, 36))
