"""CLIP's text tower (Radford et al. 2021, arXiv:2103.00020), with and without the projection into the joint space.

One module serves the encoders of all Stable Diffusion families; they differ in `config.json` only: OpenAI's CLIP-L
(SD1.5 and SDXL, `quick_gelu`), OpenCLIP-H (SD2, exact `gelu`, 23 layers kept) and OpenCLIP-bigG (SDXL, exact `gelu`,
projected). Attribute paths are those of transformers' `CLIPTextModelWithProjection`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.config_reading import LARGEST, natural, number, require, require_layers
from hypersd_jax.models.dot_product import attention
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import Network, describe
from hypersd_jax.models.layers import Embedding, LayerNorm, Linear

NAME = "CLIPTextModel"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LEGACY_EOS = 2


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU, x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}
"""Values of `hidden_act` that can be run."""


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Settings of the layers of either tower, text or image.

    Attributes:
        hidden_act: name in `ACTIVATIONS`.
        projection_dim: width of the joint space; read only by networks with a projection.
    """

    hidden_size: int
    intermediate_size: int
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


def read_tower(
    kind: type[TowerConfig], config: Mapping[str, Any], *, name: str, model_type: str, sizes: tuple[str, ...]
) -> dict[str, Any]:
    """The fields of a `kind` out of a `config.json`, with its defaults for what that leaves out.

    Keys that do not bear on inference (dropout, initialisation, other token ids) are passed over.

    Raises:
        UserError: naming a key whose value cannot be honoured; `sizes` are those that must be positive integers.
    """
    defaults: dict[str, Any] = {"model_type": model_type, **{field.name: field.default for field in fields(kind)}}
    values: dict[str, Any] = {
        key: default if config.get(key) is None else config[key] for key, default in defaults.items()
    }
    require(values, name, {"model_type": (model_type,), "hidden_act": tuple(ACTIVATIONS)})
    for key in sizes:
        natural(values, name, key)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UserError(f"{name} config: hidden_size={width} is not a multiple of num_attention_heads={heads}")
    require_layers(name, "num_hidden_layers", values["num_hidden_layers"])
    values["layer_norm_eps"] = number(values, name, "layer_norm_eps", positive=True)
    return {field.name: values[field.name] for field in fields(kind)}


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig(TowerConfig):
    """The keys of a text encoder's `config.json` that shape the network; the defaults are those of transformers.

    Attributes:
        eos_token_id: where the pooled vector is taken: the first position that holds this id. Configurations from
            before transformers 4.31 say 2, which was never the tokenizer's; with it the highest id is taken instead.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ClipTextConfig:
        """Read the content of a `config.json`; UserError names a key whose value cannot be honoured."""
        values = read_tower(cls, config, name=NAME, model_type="clip_text_model", sizes=SIZES)
        end = values["eos_token_id"]
        if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end <= LARGEST:
            raise UserError(f"{NAME} config: eos_token_id={shown(end)} is not supported, only one token's id")
        return cls(**values)


class TextOutput(NamedTuple):
    """Outputs of a text encoder.

    Attributes:
        last: (B, S, D) the final layer norm of the last hidden state.
        penultimate: (B, S, D) what enters the last layer, without the final norm (transformers' `hidden_states[-2]`).
        pooled: the final-norm state at the end-of-text token: (B, D), or (B, P) projected into the joint space.
    """

    last: jax.Array
    penultimate: jax.Array
    pooled: jax.Array


class Embeddings(nnx.Module):
    """Token plus position embedding: ids (B, S) to (B, S, D)."""

    def __init__(self, config: ClipTextConfig, *, dtype: Any) -> None:
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, dtype=dtype)
        self.positions = config.max_position_embeddings

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Embed ids (B, S); ValueError where S is beyond the position table."""
        length = input_ids.shape[1]
        if length > self.positions:
            raise ValueError(f"{length} tokens, but the text encoder has {self.positions} positions")
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))[None]


class SelfAttention(nnx.Module):
    """Multi-head self-attention over (B, S, D); causal, a token sees itself and those before it."""

    def __init__(self, config: TowerConfig, *, causal: bool, how: Execution) -> None:
        width = config.hidden_size
        self.causal = causal
        self.how = how
        self.heads = config.num_attention_heads
        self.q_proj = Linear(width, width, dtype=how.dtype)
        self.k_proj = Linear(width, width, dtype=how.dtype)
        self.v_proj = Linear(width, width, dtype=how.dtype)
        self.out_proj = Linear(width, width, dtype=how.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, S, D)."""
        heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        how = self.how
        y = attention(q, k, v, causal=self.causal, platform=how.platform, batch_sharding=how.batch_sharding)
        return self.out_proj(y.reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers with the configuration's activation between them."""

    def __init__(self, config: TowerConfig, *, dtype: Any) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, S, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: TowerConfig, *, causal: bool, how: Execution) -> None:
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=how.dtype)
        self.self_attn = SelfAttention(config, causal=causal, how=how)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=how.dtype)
        self.mlp = Mlp(config, dtype=how.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Keep the shape (B, S, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: TowerConfig, *, causal: bool, how: Execution) -> None:
        self.how = how
        self.layers = nnx.List([Layer(config, causal=causal, how=how) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map (B, S, D) to the states after the last layer and before it."""
        before = x
        for layer in self.layers:
            before, x = x, self.how.constrain_batch(layer(x))
        return x, before


class TextTransformer(nnx.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: ClipTextConfig, *, how: Execution) -> None:
        self.eos_token_id = config.eos_token_id
        self.embeddings = Embeddings(config, dtype=how.dtype)
        self.encoder = Encoder(config, causal=True, how=how)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=how.dtype)

    def __call__(self, input_ids: jax.Array) -> TextOutput:
        """Encode ids (B, S); `pooled` is not projected here."""
        last, penultimate = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(last)
        # argmax takes the first of equals, which is what matters where the padding is the end-of-text token too.
        marks = input_ids if self.eos_token_id == LEGACY_EOS else input_ids == self.eos_token_id
        ends = jnp.argmax(marks, axis=1)
        pooled = jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0]
        return TextOutput(last=last, penultimate=penultimate, pooled=pooled)


class ClipText(nnx.Module):
    """The text tower: ids (B, S) int32 to `TextOutput`."""

    def __init__(self, config: ClipTextConfig, *, projection: bool, how: Execution) -> None:
        self.text_model = TextTransformer(config, how=how)
        self.text_projection = (
            Linear(config.hidden_size, config.projection_dim, bias=False, dtype=how.dtype) if projection else None
        )

    def __call__(self, input_ids: jax.Array) -> TextOutput:
        """Encode ids (B, S) of S at most `max_position_embeddings`."""
        output = self.text_model(input_ids)
        if self.text_projection is None:
            return output
        return output._replace(pooled=self.text_projection(output.pooled))


def clip_text(
    config: ClipTextConfig, *, dtype: Any = jnp.float32, projection: bool, batch_sharding: NamedSharding | None = None
) -> Network:
    """The text encoder as a `Network`: `network(params, input_ids (B, S) int32) -> TextOutput`.

    Args:
        config: the encoder's own configuration.
        dtype: of parameters and computation; norms and softmax are float32 whatever it is.
        projection: whether `pooled` is projected (`CLIPTextModelWithProjection`) or not (`CLIPTextModel`).
        batch_sharding: how the prompts of a batch are laid out over devices, see `Execution`.
    """
    how = Execution(dtype=jnp.dtype(dtype), batch_sharding=batch_sharding)
    return describe(ClipText, config, projection=projection, how=how)
