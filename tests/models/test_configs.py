"""Model configurations: real files are accepted, what is not ported is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.models import UNetConfig, VaeConfig, unet, vae

# The file of an SD 1.x UNet, written by diffusers 0.6: a third of today's keys.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21 = {
    **SD15,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = {
    **SD21,
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_stable_diffusion_1() -> None:
    config = UNetConfig.from_dict(SD15)
    assert config.cross_attention_dim == 768
    assert config.heads == (8, 8, 8, 8)
    assert config.time_embedding_dim == 1280
    assert not config.text_time
    assert config.down_transformers == ((1, 1), (1, 1), (1, 1), ())
    assert config.up_transformers == ((), (1, 1, 1), (1, 1, 1), (1, 1, 1))


def test_stable_diffusion_2() -> None:
    config = UNetConfig.from_dict(SD21)
    assert config.heads == (5, 10, 20, 20)
    assert config.use_linear_projection


def test_stable_diffusion_xl() -> None:
    config = UNetConfig.from_dict(SDXL)
    assert config.text_time
    assert config.pooled_dim == 1280
    assert config.down_transformers == ((), (2, 2), (10, 10))
    assert config.mid_transformers == 10
    assert config.up_transformers == ((10, 10, 10), (2, 2, 2), ())


@pytest.mark.parametrize(("size", "read"), [(64, 64), ([48, 64], (48, 64)), (None, 0)])
def test_sample_size(size: Any, read: Any) -> None:
    assert UNetConfig.from_dict({**SD15, "sample_size": size}).sample_size == read


def test_asymmetric_transformers() -> None:
    config = UNetConfig.from_dict(
        {
            **SDXL,
            "transformer_layers_per_block": [0, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        }
    )
    assert config.down_transformers == ((), (2, 2), (4, 4))
    assert config.up_transformers == ((4, 4, 10), (2, 1, 1), ())


def test_small_autoencoder_teacher() -> None:
    """A small 64 px model: three levels, one layer, no attention in the middle of the autoencoder."""
    small = {
        **SD15,
        "attention_head_dim": [2, 4, 6],
        "block_out_channels": [64, 128, 192],
        "cross_attention_dim": 160,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "layers_per_block": 1,
        "sample_size": 16,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    }
    network = unet(UNetConfig.from_dict(small))
    assert network.shapes["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.kernel"].shape == (128, 128)
    assert network.shapes["mid_block.attentions.0.transformer_blocks.0.ff.net.2.kernel"].shape == (768, 192)
    config = VaeConfig.from_dict(
        {
            **SD_VAE,
            "block_out_channels": [32, 64, 96],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
            "scaling_factor": 0.8,
        }
    )
    assert config.downscale == 4
    assert config.scaling_factor == 0.8
    assert not any("attentions" in path for path in vae(config).shapes)


def test_autoencoder() -> None:
    config = VaeConfig.from_dict(SD_VAE)
    assert (config.downscale, config.scaling_factor, config.shift_factor) == (8, 0.18215, 0.0)
    assert config.force_upcast
    shapes = vae(config).shapes
    assert shapes["decoder.mid_block.attentions.0.to_out.0.kernel"].shape == (512, 512)
    assert shapes["quant_conv.kernel"].shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DModel"}, "UNet2DModel"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image'"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"act_fn": "tanh"}, "act_fn='tanh'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types"),
        ({"layers_per_block": [2, 2]}, "layers_per_block=\\[2, 2\\]"),
        ({"block_out_channels": [320, 640, 1280]}, "block_out_channels"),
        ({"norm_num_groups": 7}, "norm_num_groups=7"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"attention_head_dim": 7}, "attention_head_dim=7"),
        ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "reverse_transformer_layers_per_block"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim=None"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"time_cond_proj_dim": -1}, "time_cond_proj_dim=-1"),
        ({"position_net": "gligen"}, "position_net='gligen'"),
        ({"down_block_types": None}, "down_block_types=None"),
        ({"up_block_types": []}, "up_block_types=\\[\\]"),
        ({"norm_eps": None}, "norm_eps=None"),
        ({"norm_eps": 0}, "norm_eps=0"),
        ({"freq_shift": None}, "freq_shift=None"),
        ({"freq_shift": float("nan")}, "freq_shift=nan"),
        ({"downsample_padding": None}, "downsample_padding=None"),
        ({"mid_block_scale_factor": "1"}, "mid_block_scale_factor='1'"),
        ({"transformer_layers_per_block": None}, "transformer_layers_per_block=None"),
        ({"sample_size": "64"}, "sample_size='64'"),
        ({"sample_size": [64]}, "sample_size=\\[64\\]"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ({"layers_per_block": 200}, "layers_per_block makes 800 layers, more than 512"),
        ({"transformer_layers_per_block": 100}, "transformer_layers_per_block makes 800 layers"),
        ({"block_out_channels": [32 * 10**12] * 4}, "block_out_channels=.*from 1 to 1048576"),
        ({"norm_eps": 10**400}, "norm_eps=1000.*is not a finite number"),
        ({"cross_attention_dim": [768] * 2000}, "cross_attention_dim=.{200}\\.\\.\\. needs 4 entries"),
        ({"down_block_types": ["DownBlock2D"] * 600, "up_block_types": ["UpBlock2D"] * 600}, "600 layers"),
    ],
)
def test_unet_refusals_name_the_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        UNetConfig.from_dict({**SD15, **change})


def test_unknown_keys_that_ask_for_nothing_are_ignored() -> None:
    UNetConfig.from_dict({**SD15, "_name_or_path": "x", "later_option": None, "another": False})
    VaeConfig.from_dict({**SD_VAE, "_name_or_path": "x", "later_option": None})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"latents_std": [1.0]}, "latents_std"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"block_out_channels": 128}, "block_out_channels=128"),
        ({"norm_num_groups": 48}, "norm_num_groups=48"),
        ({"tiling": 4}, "tiling=4"),
        ({"scaling_factor": None}, "scaling_factor=None"),
        ({"scaling_factor": "0.2"}, "scaling_factor='0.2'"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0 is not positive"),
        ({"shift_factor": "0"}, "shift_factor='0'"),
        ({"down_block_types": None}, "down_block_types=None"),
        ({"block_out_channels": []}, "block_out_channels=\\[\\]"),
        ({"layers_per_block": 129}, "layers_per_block makes 516 layers"),
        ({"scaling_factor": 1e39}, "scaling_factor=1e\\+39 is not a finite number"),
    ],
)
def test_vae_refusals_name_the_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        VaeConfig.from_dict({**SD_VAE, **change})
