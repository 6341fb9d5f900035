"""Autoencoders in single files, by both spellings and within a whole checkpoint, against diffusers' converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from hypersd_jax.errors import UserError
from hypersd_jax.models import TinyVaeConfig, VaeConfig
from hypersd_jax.weights.diffusers.vae import load_vae
from tests.helpers.torch_weights import params_from_torch, perturb

CONFIG: dict[str, Any] = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
OWN = VaeConfig.from_dict(CONFIG)


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKL:
    torch.manual_seed(0)
    return perturb(AutoencoderKL(**CONFIG), seed=1).requires_grad_(False)


def original_key(key: str) -> str:
    """The key of the small autoencoder in its original program."""
    pairs = (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        *((f"mid_block.attentions.0.to_{x}", f"mid.attn_1.{x}") for x in "qkv"),
        *((f"mid_block.resnets.{i}", f"mid.block_{i + 1}") for i in range(2)),
        *((f"down_blocks.{i}.resnets.0", f"down.{i}.block.0") for i in range(2)),
        ("down_blocks.0.downsamplers.0", "down.0.downsample"),
        # The decoder's blocks count backwards.
        *((f"up_blocks.{i}.resnets.{j}", f"up.{1 - i}.block.{j}") for i in range(2) for j in range(2)),
        ("up_blocks.0.upsamplers.0", "up.1.upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    )
    for ours, other in pairs:
        key = key.replace(ours, other)
    return key


def original(theirs: AutoencoderKL, prefix: str) -> dict[str, torch.Tensor]:
    state = {original_key(key): tensor for key, tensor in theirs.state_dict().items()}
    return {
        prefix + key: tensor[:, :, None, None] if "attn_1" in key and tensor.ndim == 2 else tensor.clone()
        for key, tensor in state.items()
    }


# How diffusers spelt the middle's attention before 0.16.
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("spelling", ["alone", "whole", "newer", "diffusers", "older diffusers"])
def test_files(tmp_path: Path, theirs: AutoencoderKL, spelling: str) -> None:
    state = theirs.state_dict()
    if spelling == "diffusers":
        tensors = dict(state)
    elif spelling == "older diffusers":
        tensors = dict(state)
        for now, then in OLDER.items():
            tensors = {
                key.replace(f".attentions.0.{now}.", f".attentions.0.{then}."): tensor
                for key, tensor in tensors.items()
            }
        assert len(tensors.keys() - state.keys()) == 16  # weights and biases, of encoder and decoder
    else:
        tensors = original(theirs, "first_stage_model." if spelling == "whole" else "")
        back = convert_ldm_vae_checkpoint(dict(tensors), dict(theirs.config))
        assert all(torch.equal(back[key].reshape(state[key].shape), state[key]) for key in state)
        tensors["loss.logvar"] = torch.zeros(1)
    if spelling == "whole":
        tensors["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    if spelling == "newer":  # as some converters wrote it
        for x in "qkv":
            tensors = {key.replace(f".attn_1.{x}.", f".attn_1.to_{x}."): tensor for key, tensor in tensors.items()}
        tensors = {key.replace(".attn_1.proj_out.", ".attn_1.to_out.0."): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors", vae_config=OWN, dtype=jnp.float32)
    assert loaded.config == OWN
    wanted = params_from_torch(theirs, loaded.network.shapes)
    assert loaded.params.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(loaded.params[path], leaf, err_msg=path)


def test_damaged_files(tmp_path: Path, theirs: AutoencoderKL) -> None:
    file = tmp_path / "vae.safetensors"
    key = "decoder.up.1.block.0.conv1.weight"

    def reason(tensors: dict[str, torch.Tensor], own: Any = OWN) -> str:
        save_file(tensors, file)
        with pytest.raises(UserError) as caught:
            load_vae(file, vae_config=own, dtype=jnp.float32)
        text = str(caught.value)
        assert text.startswith(f"{file}: ")
        assert "\n" not in text
        return text

    state = original(theirs, "")
    assert f"1 missing ({key})" in reason({name: tensor for name, tensor in state.items() if name != key})
    assert f"{key} [8, 8, 3] instead of [8, 8, 3, 3]" in reason({**state, key: torch.zeros(8, 8, 3)})
    assert "1 unexpected (encoder.other)" in reason({**state, "encoder.other": torch.zeros(1)})
    assert "1 unexpected (a)" in reason({"a": torch.zeros(1)})
    assert "tiny" in reason(state, TinyVaeConfig.from_dict({}))
