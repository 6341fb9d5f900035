"""ControlNets in single files, by both spellings, against diffusers' ControlNetModel and its converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import save_file

from hypersd_jax.errors import UserError
from hypersd_jax.models import ControlNetConfig, UNetConfig, residual_scales
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet, load_controlnet
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
XL: dict[str, Any] = {
    **SMALL,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 46,
}
# Four widths, as diffusers' converter expects of the original spelling.
FOUR: dict[str, Any] = {"conditioning_embedding_out_channels": [2, 3, 4, 5]}
# What the ControlNet has, beside what its UNet says; SDXL's come without transformer layers and without attention too.
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd": (SMALL, FOUR),
    "sdxl": (XL, {"conditioning_embedding_out_channels": [4, 6], "conditioning_channels": 1}),
    "mid": (XL, {**FOUR, "transformer_layers_per_block": [1, 0]}),
    "small": (XL, {**FOUR, "down_block_types": ["DownBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"}),
}

ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    **{f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)},
    **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(4)},
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_key(key: str) -> str:
    """The key of the small network in its original program."""
    module = next(name for name in ORIGINAL if key.startswith(name + "."))
    first, _, rest = key.removeprefix(module + ".").partition(".")
    return f"{ORIGINAL[module]}.{RESNET.get(first, first)}{'.' + rest if rest else ''}"


def made(name: str) -> ControlNetModel:
    torch.manual_seed(0)
    return perturb(ControlNetModel(**{**FILES[name][0], **FILES[name][1]}), seed=1).requires_grad_(False)


def read(path: Path, name: str) -> LoadedControlNet:
    config = FILES[name][0]
    unet_config = UNetConfig.from_dict({**config, "up_block_types": ["UpBlock2D"] * 2, "time_cond_proj_dim": 5})
    factor = 2 ** (len(FILES[name][1]["conditioning_embedding_out_channels"]) - 1)
    return load_controlnet(path, unet_config=unet_config, downscale=factor, dtype=jnp.float32)


def require_same(loaded: LoadedControlNet, theirs: ControlNetModel) -> None:
    wanted = params_from_torch(theirs, loaded.network.shapes)
    assert loaded.params.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(loaded.params[path], leaf, err_msg=path)


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_the_original_spelling(tmp_path: Path, prefix: str) -> None:
    theirs = made("sd")
    state = theirs.state_dict()
    original = {prefix + original_key(key): tensor for key, tensor in state.items()}
    back = convert_controlnet_checkpoint(dict(original), dict(theirs.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    beside = {"model.diffusion_model.out.2.bias": torch.zeros(4)} if prefix else {}
    save_file({**original, **beside}, tmp_path / "control.safetensors")
    loaded = read(tmp_path / "control.safetensors", "sd")
    require_same(loaded, theirs)
    assert not loaded.config.global_pool


@pytest.mark.parametrize("name", FILES)
def test_the_spelling_of_diffusers(tmp_path: Path, name: str) -> None:
    """The structure is found in the tensors, and the network of that structure gives diffusers' residuals."""
    theirs = made(name)
    save_file(theirs.state_dict(), tmp_path / "control_shuffle.safetensors")
    loaded = read(tmp_path / "control_shuffle.safetensors", name)
    require_same(loaded, theirs)
    stated = ControlNetConfig.from_dict({**FILES[name][0], **FILES[name][1]})
    assert loaded.config.embedding_channels == stated.embedding_channels
    assert loaded.config.encoder.down_transformers == stated.encoder.down_transformers
    assert loaded.config.global_pool  # by the file's name

    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    factor, channels = loaded.config.downscale, loaded.config.conditioning_channels
    sample, context, image = normal(2, 4, 4, 4), normal(2, 3, 12), normal(2, 4 * factor, 4 * factor, channels)
    added = {"pooled": normal(2, 10), "time_ids": normal(2, 6)} if loaded.config.encoder.text_time else {}
    times, scales = np.array([7, 981]), residual_scales(loaded.config, 1.0)
    down, mid = quick_jit(loaded.network)(loaded.params, sample, times, context, image, scales, **added)
    their_down, their_mid = theirs(
        torch.tensor(sample).permute(0, 3, 1, 2),
        torch.tensor(times),
        torch.tensor(context),
        torch.tensor(image).permute(0, 3, 1, 2),
        added_cond_kwargs={
            {"pooled": "text_embeds"}.get(key, key): torch.tensor(value) for key, value in added.items()
        },
        return_dict=False,
    )
    for ours, reference in zip((*down, mid), (*their_down, their_mid), strict=True):
        assert relative_error(ours, reference.mean((2, 3))[:, None, None, :]) < 1e-5


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "control.safetensors"
    state = made("sd").state_dict()

    def reason(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(UserError) as caught:
            read(file, "sd")
        text = str(caught.value)
        assert text.startswith(f"{file}: ")
        assert "\n" not in text
        return text

    assert "is a Control-LoRA" in reason({"lora_controlnet": torch.zeros(0), **state})
    assert "holds no ControlNet (no input_hint_block.0.weight" in reason({"a": torch.zeros(1)})
    key = "down_blocks.0.resnets.0.conv1.weight"
    assert f"1 missing ({key})" in reason({name: tensor for name, tensor in state.items() if name != key})
    assert f"{key} [8, 8, 3] instead of [8, 8, 3, 3]" in reason({**state, key: torch.zeros(8, 8, 3)})
    assert f"{key} of type int32" in reason({**state, key: state[key].int()})
    assert "1 unexpected (task_embedding)" in reason({**state, "task_embedding": torch.zeros(6, 8)})
    assert f"tensor {key} holds NaN or infinity" in reason({**state, key: state[key] / 0})
    assert "conv_in.weight of four dimensions" in reason(
        {**state, "controlnet_cond_embedding.conv_in.weight": torch.zeros(2)}
    )
