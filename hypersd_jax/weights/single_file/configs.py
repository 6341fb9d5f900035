"""Configuration of a model from a single file's tensors: family, structure, schedule.

Shapes show all of the structure but for the number of attention heads, the groups of the norms and the sizes of time-id
embeddings; these are the families' own (SD 1.x has 8 heads at every level, the later ones 64 channels a head). The
scheduler is the one of the family's first diffusers release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from hypersd_jax.errors import UserError, shown
from hypersd_jax.weights import families
from hypersd_jax.weights.single_file.keys import CLIP, CLIP_XL, OPEN_CLIP, OPEN_CLIP_XL, UNET, VAE

Generation = Literal["sd1", "sd2", "sdxl"]
Sizes = Mapping[str, tuple[int, ...]]
"""``{stored key in its canonical spelling: shape}``."""

HEAD_WIDTH = 64
EPSILON_STEP = 875000
"""`global_step` of Stable Diffusion 2-base, by which diffusers tells it from the 768-v model."""

_GUIDANCE = f"{UNET}time_embedding.cond_proj.weight"
_VAE_LEVELS = VAE + "encoder.down.{}.block.0.conv1.weight"

# OpenCLIP-H, of which SD 2.x reads the state before the last of 24 layers.
_H_WIDTH, _H_LAYERS = 1024, 23

# Spellings of the model specification's `modelspec.prediction_type`.
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def generation(sizes: Sizes, file: Path) -> Generation:
    """The generation that the text encoders belong to; UserError names the part that the file lacks or is not."""
    present = {prefix: any(key.startswith(prefix) for key in sizes) for prefix in (CLIP, OPEN_CLIP, OPEN_CLIP_XL)}
    if f"{UNET}time_embed.0.weight" not in sizes or f"{UNET}input_blocks.0.0.weight" not in sizes:
        found = (
            f"its {UNET}* is not of SD 1.x, 2.x or XL"
            if any(key.startswith(UNET) for key in sizes)
            else (f"no UNet in it ({UNET}*); it holds {next(iter(sizes), 'no tensors')}")
        )
        raise UserError(f"{file}: not a single-file model: {found}")
    if "edm_mean" in sizes or any(key.startswith("edm_vpred") for key in sizes):
        raise UserError(f"{file}: EDM's parametrisation (edm_mean, edm_vpred) is not supported")
    if present[OPEN_CLIP] and f"{UNET}label_emb.0.0.weight" in sizes:
        raise UserError(f"{file}: the SDXL refiner is not supported")
    if not any(key.startswith(VAE) for key in sizes):
        raise UserError(f"{file}: holds no autoencoder ({VAE}*); only complete models are read")
    if f"{UNET}label_emb.0.0.weight" in sizes:
        for prefix in (CLIP_XL, OPEN_CLIP_XL):
            if not any(key.startswith(prefix) for key in sizes):
                raise UserError(f"{file}: holds no text encoder {prefix}*; SDXL has two")
        return "sdxl"
    if present[CLIP] != present[OPEN_CLIP]:
        return "sd1" if present[CLIP] else "sd2"
    which = "two kinds of" if present[CLIP] else "no"
    raise UserError(f"{file}: holds {which} text encoder ({CLIP}*, {OPEN_CLIP}*)")


def component_configs(
    sizes: Sizes, kind: Generation, file: Path, *, prediction: str, given: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """`config.json` of every component: as given, else derived; `prediction` tells SD 2-base's size from 768-v's.

    Raises:
        UserError: a tensor is missing or of no known structure.
    """
    shape = _Shapes(sizes, file)
    size = families.NATIVE_SIZES["sd1" if kind == "sd2" and prediction == "epsilon" else kind]
    derive: dict[str, Callable[[], dict[str, Any]]] = {
        "unet": lambda: _unet(shape, kind, size),
        "vae": lambda: _vae(shape, kind, size),
        "text_encoder": lambda: _clip(shape, CLIP if kind == "sd1" else CLIP_XL),
    }
    if kind == "sd2":
        derive["text_encoder"] = lambda: _open_clip(shape, OPEN_CLIP, projection=False)
    if kind == "sdxl":
        derive["text_encoder_2"] = lambda: _open_clip(shape, OPEN_CLIP_XL, projection=True)
    return {name: given[name] if name in given else make() for name, make in derive.items()}


def prediction_type(sizes: Sizes, kind: Generation, metadata: Mapping[str, str], step: float | None, file: Path) -> str:
    """Find what the UNet predicts, which no shape shows.

    A `v_pred` tensor says it, else the header's `modelspec.prediction_type`. Else SD 2.x with its four input channels
    is taken for the 768-v model unless `global_step` is that of 2-base, which is diffusers' guess, and all others
    predict noise.
    """
    if "v_pred" in sizes:
        return "v_prediction"
    if stated := metadata.get("modelspec.prediction_type"):
        if stated not in _PREDICTIONS:
            known = list(_PREDICTIONS)
            raise UserError(f"{file}: modelspec.prediction_type={shown(stated)} is not supported, only {known}")
        return _PREDICTIONS[stated]
    plain = sizes[f"{UNET}input_blocks.0.0.weight"][1:2] == (4,)
    return "v_prediction" if kind == "sd2" and plain and step != EPSILON_STEP else "epsilon"


class _Shapes:
    """Shapes by key, with a clear error for a missing one."""

    def __init__(self, sizes: Sizes, file: Path) -> None:
        self.sizes, self.file = sizes, file

    def __call__(self, key: str, rank: int) -> tuple[int, ...]:
        if key not in self.sizes:
            raise UserError(f"{self.file}: tensor {key} is missing")
        found = self.sizes[key]
        if len(found) != rank:
            raise UserError(f"{self.file}: tensor {key} has shape {list(found)}, not of {rank} dimensions")
        return found

    def __contains__(self, key: str) -> bool:
        return key in self.sizes

    def count(self, pattern: str) -> int:
        """Count the keys of a pattern with one `{}`, which counts from 0."""
        number = 0
        while pattern.format(number) in self.sizes:
            number += 1
        return number

    def heads(self, key: str, width: int) -> int:
        """Attention heads of 64 channels each."""
        if width % HEAD_WIDTH:
            raise UserError(
                f"{self.file}: {key} is {width} wide, so its attention heads are unknown: not a multiple of "
                f"{HEAD_WIDTH}; pass the component's own configuration"
            )
        return width // HEAD_WIDTH


def _unet(shape: _Shapes, kind: Generation, size: int) -> dict[str, Any]:
    def transformers(block: str) -> int | None:
        """Transformer layers of a resnet, None without a transformer."""
        if f"{UNET}{block}.norm.weight" not in shape:
            return None
        return shape.count(f"{UNET}{block}.transformer_blocks.{{}}.norm1.weight")

    channels: list[int] = []
    down: list[list[int | None]] = [[]]
    number = 1
    while True:
        block = f"{UNET}input_blocks.{number}.0"
        if f"{block}.op.weight" in shape:
            down.append([])
        elif f"{block}.out_layers.3.weight" in shape:
            if not down[-1]:
                channels.append(shape(f"{block}.out_layers.3.weight", 4)[0])
            down[-1].append(transformers(f"input_blocks.{number}.1"))
        else:
            break
        number += 1
    layers = [len(level) for level in down]
    if not all(layers):
        raise UserError(f"{shape.file}: {UNET}input_blocks.1 to {number - 1} are not those of SD 1.x, 2.x or XL")
    up, number = [], 0
    for count in reversed(layers):
        up.append([transformers(f"output_blocks.{number + layer}.1") for layer in range(count + 1)])
        number += count + 1
    middle = transformers("middle_block.1")
    mid_type = None if f"{UNET}middle_block.0.in_layers.0.weight" not in shape else "UNetMidBlock2D"
    first = next((f"{UNET}{key}" for key in _attention_modules(down)), f"{UNET}middle_block.1")
    config = {
        **families.UNET,
        "block_out_channels": channels,
        "cross_attention_dim": shape(f"{first}.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "down_block_types": [_block_type(level, "Down") for level in down],
        "in_channels": shape(f"{UNET}input_blocks.0.0.weight", 4)[1],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "mid_block_type": mid_type if middle is None else "UNetMidBlock2DCrossAttn",
        "out_channels": shape(f"{UNET}out.2.weight", 4)[0],
        "sample_size": size // 2 ** max(shape.count(_VAE_LEVELS) - 1, 0),
        "up_block_types": [_block_type(level, "Up") for level in up],
        "use_linear_projection": len(shape.sizes.get(f"{first}.proj_in.weight", ())) == 2,
        "time_cond_proj_dim": shape(_GUIDANCE, 2)[1] if _GUIDANCE in shape else None,
        **_depths(down, middle, up),
    }
    config["attention_head_dim"] = 8
    if kind != "sd1":
        config["attention_head_dim"] = [shape.heads(f"{UNET}input_blocks", width) for width in channels]
    if kind == "sd2":
        config["upcast_attention"] = True
    if kind == "sdxl":
        added = shape(f"{UNET}label_emb.0.0.weight", 2)[1]
        pooled = shape(f"{OPEN_CLIP_XL}text_projection", 2)[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // 6,
            "projection_class_embeddings_input_dim": added,
        }
    return config


def _attention_modules(down: list[list[int | None]]) -> list[str]:
    """LDM's names of the transformers on the way down."""
    locations, number = [], 1
    for level in down:
        locations += [f"input_blocks.{number + i}.1" for i, depth in enumerate(level) if depth is not None]
        number += len(level) + 1
    return locations


def _block_type(level: list[int | None], direction: str) -> str:
    return f"{'' if level[0] is None else 'CrossAttn'}{direction}Block2D"


def _depths(down: list[list[int | None]], middle: int | None, up: list[list[int | None]]) -> dict[str, Any]:
    """`transformer_layers_per_block`, and its way back where that does not mirror it.

    The middle takes the coarsest level's entry, so that where that level has no transformer it is the middle's own.
    """

    def entry(level: list[int | None], default: int) -> Any:
        depths = [default if depth is None else depth for depth in level]
        return depths[0] if len(set(depths)) == 1 else depths

    forth = [entry(level, 1) for level in down[:-1]] + [entry(down[-1], middle or 1)]
    back = [entry(level, forth[-1 - i] if isinstance(forth[-1 - i], int) else 1) for i, level in enumerate(up)]
    if back == forth[::-1] and all(isinstance(depth, int) for depth in forth):
        return {"transformer_layers_per_block": 1 if set(forth) == {1} else forth}
    return {"transformer_layers_per_block": forth, "reverse_transformer_layers_per_block": back}


def _vae(shape: _Shapes, kind: Generation, size: int) -> dict[str, Any]:
    levels = shape.count(_VAE_LEVELS)
    channels = [shape(f"{VAE}encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    if not channels:
        raise UserError(f"{shape.file}: tensor {VAE}encoder.down.0.block.0.conv1.weight is missing")
    return {
        **families.VAE,
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "latent_channels": shape(f"{VAE}decoder.conv_in.weight", 4)[1],
        "layers_per_block": shape.count(VAE + "encoder.down.0.block.{}.conv1.weight"),
        "mid_block_add_attention": f"{VAE}encoder.mid.attn_1.norm.weight" in shape,
        "sample_size": size,
        "scaling_factor": families.SCALING_FACTORS[kind],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": f"{VAE}post_quant_conv.weight" in shape,
        "use_quant_conv": f"{VAE}quant_conv.weight" in shape,
    }


def _clip(shape: _Shapes, prefix: str) -> dict[str, Any]:
    prefix += "text_model."
    layer = prefix + "encoder.layers.{}.layer_norm1.weight"
    config = _text(
        shape,
        tokens=f"{prefix}embeddings.token_embedding.weight",
        positions=f"{prefix}embeddings.position_embedding.weight",
        wide=f"{prefix}encoder.layers.0.mlp.fc1.weight",
        layers=shape.count(layer),
    )
    return {**config, "hidden_act": "quick_gelu", "projection_dim": config["hidden_size"]}


def _open_clip(shape: _Shapes, prefix: str, *, projection: bool) -> dict[str, Any]:
    layers = shape.count(prefix + "transformer.resblocks.{}.ln_1.weight")
    if not projection:
        # The original files hold the last layer all the same, and the projection that it was trained for; diffusers'
        # own, and what is written here, hold neither.
        real = shape(f"{prefix}token_embedding.weight", 2)[1] == _H_WIDTH
        layers = min(layers, _H_LAYERS) if real else layers - (f"{prefix}text_projection" in shape)
    config = _text(
        shape,
        tokens=f"{prefix}token_embedding.weight",
        positions=f"{prefix}positional_embedding",
        wide=f"{prefix}transformer.resblocks.0.mlp.c_fc.weight",
        layers=layers,
    )
    config["hidden_act"] = "gelu"
    if not projection:
        return {**config, "projection_dim": 512}
    joint = shape(f"{prefix}text_projection", 2)[1]
    return {**config, "architectures": ["CLIPTextModelWithProjection"], "projection_dim": joint}


def _text(shape: _Shapes, *, tokens: str, positions: str, wide: str, layers: int) -> dict[str, Any]:
    vocabulary, width = shape(tokens, 2)
    return {
        **families.CLIP,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_size": width,
        "intermediate_size": shape(wide, 2)[0],
        "max_position_embeddings": shape(positions, 2)[0],
        "num_attention_heads": shape.heads(tokens, width),
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
