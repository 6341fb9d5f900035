"""Aesthetic predictors: which heads are read, what they compute, gradients as users take them, and every refusal."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.rewards import LoadedReward
from hypersd_jax.rewards.heads import apply_head, collapsed, head_params
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.tiny_clip import tiny_clip

IMAGES = np.random.default_rng(0).random((2, 14, 19, 3), dtype=np.float32)
WIDTHS = (6, 5, 4, 3, 2, 1)


def head(indices: tuple[int, ...], widths: tuple[int, ...] = WIDTHS) -> dict[str, np.ndarray]:
    """A random head under the names that PyTorch's `Sequential` gives layers of these indices."""
    rng = np.random.default_rng(1)
    tensors = {}
    for index, before, after in zip(indices, widths, widths[1:], strict=False):
        tensors[f"layers.{index}.weight"] = rng.standard_normal((after, before)).astype(np.float32)
        tensors[f"layers.{index}.bias"] = rng.standard_normal(after).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_clip(tmp_path_factory.mktemp("weights") / "clip")
    save_tensors(folder / "aesthetic_head.safetensors", head((0, 2, 4, 6, 7)))
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> LoadedReward:
    return hs.rewards.load("aesthetic", folder)


def test_gradients_against_finite_differences(reward: LoadedReward) -> None:
    """And prompts do not matter."""

    def total(images: jax.Array) -> jax.Array:
        return jnp.sum(reward(images, ["a", "b"]))

    gradient = np.asarray(jax.grad(total)(jnp.asarray(IMAGES)))
    direction = gradient / np.linalg.norm(gradient)
    ahead, behind = (reward(np.clip(IMAGES + step * direction, 0, 1), ["", "c"]).sum() for step in (0.01, -0.01))
    np.testing.assert_allclose((ahead - behind) / 0.02, np.linalg.norm(gradient), rtol=3e-2)


def test_only_the_image_tower_is_held(reward: LoadedReward) -> None:
    assert not [path for path in reward.params if path.startswith("text")]
    assert reward.params.keys() - reward.model.vision.shapes.keys() == {"head.0.kernel", "head.0.bias"}
    assert reward.tokenize(["a", "b"]).shape == (2, 0)


def test_affine_layers_multiplied_out() -> None:
    rng = np.random.default_rng(2)
    layers = [(rng.standard_normal((b, a)), rng.standard_normal(b)) for a, b in ((768, 64), (64, 16), (16, 1))]
    x = rng.standard_normal((3, 768))
    wanted = x
    for weight, bias in layers:
        wanted = wanted @ weight.T + bias
    found = apply_head(head_params(collapsed(layers)), jnp.asarray(x, jnp.float32), 1)
    np.testing.assert_allclose(found, wanted[:, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": np.zeros((1, 6), np.float32)}, r"is no aesthetic head .* but holds weight$"),
        (head((0, 2, 4, 6)), "is no aesthetic head"),
        (head((0, 2, 4, 6, 8)), "is no aesthetic head"),
        ({**head((0, 2, 4, 6, 7)), "extra": np.zeros(1, np.float32)}, "is no aesthetic head .* but holds extra"),
        (head((0, 2, 4, 6, 7), (6, 5, 4, 3, 2, 2)), r"give \[5, 4, 3, 2, 2\] are no chain to one$"),
        (head((0, 3, 6, 9, 11), (7, 5, 4, 3, 2, 1)), r"reads embeddings 7 wide, but those of \S+ are 6 wide$"),
        ({"weight": np.zeros((1, 6), np.float32), "bias": np.zeros((2,), np.float32)}, r"\[2\] do not fit each other$"),
        (
            {"weight": np.full((1, 6), np.nan, np.float32), "bias": np.zeros((1,), np.float32)},
            "tensor weight holds NaN or infinity",
        ),
    ],
)
def test_heads_that_do_not_fit(folder: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    save_tensors(folder / "other.safetensors", tensors)
    with pytest.raises(UserError, match=rf"other\.safetensors: .*{message}"):
        hs.rewards.load("aesthetic", folder / "other.safetensors")


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"aesthetic_head\.safetensors: no such file$"):
        hs.rewards.load("aesthetic", tmp_path)
    save_tensors(tmp_path / "aesthetic_head.safetensors", head((0, 2, 4, 6, 7)))
    with pytest.raises(UserError, match=r"no CLIP beside aesthetic_head\.safetensors"):
        hs.rewards.load("aesthetic", tmp_path)
