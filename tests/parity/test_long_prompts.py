"""Long prompts in windows: each by transformers' text encoder, and what diffusers samples from the embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from hypersd_jax.bases.prompting import make_prompt_encoder
from hypersd_jax.conditioning import Conditioning, size_ids
from hypersd_jax.diffusion import guided, sample, solver_table
from hypersd_jax.weights.components import load_components
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import relative_error

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background, " * 6]
NEGATIVE = ["blob style", ""]
HAN = "".join(chr(0x4E05 + 37 * i) for i in range(24))
STEPS, SCALE = 4, 5.0


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline, our components and our prompt encoder of one tiny model."""
    xl = request.param == "sdxl"
    folder = (tiny_sdxl if xl else tiny_sd)(tmp_path_factory.mktemp(request.param))
    cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    theirs = cls.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    components = load_components(folder, dtype=jnp.float32)
    return theirs, components, make_prompt_encoder(components)


def marked(tokenizer: Any, piece: list[int], length: int) -> list[int]:
    """A piece between begin and end, filled up: as A1111 and ComfyUI make a window of it."""
    ids = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def test_rare_characters(models: Any) -> None:
    """Of three tokens each, so that windows end within characters."""
    theirs, components, encoder = models
    prompts = [HAN, "red apple"]
    windows = encoder.windows(prompts)
    assert windows == -(-3 * len(HAN) // (encoder.lengths[0] - 2))
    text_params = {name: components.params[name] for name in components.text_encoders}
    cond = jax.jit(lambda ids: encoder.encode(text_params, ids))(encoder.tokenize(prompts, windows=windows))
    embeds, pooled = by_hand(theirs, prompts, windows)
    assert relative_error(cond.context, embeds.numpy()) < 1e-5
    if pooled is not None:
        assert relative_error(cond.pooled, pooled.numpy()) < 1e-5


def by_hand(pipe: Any, prompts: list[str], windows: int) -> tuple[Any, Any]:
    """Embeddings (B, windows * S, D) and pooled (B, P) or None: pieces of the prompt, each read by transformers."""
    length = pipe.tokenizer.model_max_length
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    joined, pooled = [], None
    for encoder in encoders:
        rows = []
        for prompt in prompts:
            tokens = pipe.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            pieces = [tokens[i * (length - 2) : (i + 1) * (length - 2)] for i in range(windows)]
            ids = torch.tensor([marked(pipe.tokenizer, piece, length) for piece in pieces])
            with torch.no_grad():
                rows.append(encoder(ids, output_hidden_states=True))
        if len(encoders) == 1:
            joined.append(torch.stack([row.last_hidden_state.flatten(0, 1) for row in rows]))
        else:
            joined.append(torch.stack([row.hidden_states[-2].flatten(0, 1) for row in rows]))
            pooled = torch.stack([row[0][0] for row in rows])  # of the last encoder: its first window's projection
    return torch.cat(joined, dim=-1), pooled if len(encoders) > 1 else None


def test_embeddings_and_images(models: Any) -> None:
    theirs, components, encoder = models
    windows = encoder.windows([*PROMPTS, *NEGATIVE])
    assert windows == 3
    text_params = {name: components.params[name] for name in components.text_encoders}
    encode = jax.jit(lambda ids: encoder.encode(text_params, ids))
    cond, uncond = (encode(encoder.tokenize(texts, windows=windows)) for texts in (PROMPTS, NEGATIVE))
    embeds, pooled = by_hand(theirs, PROMPTS, windows)
    negative, negative_pooled = by_hand(theirs, NEGATIVE, windows)
    assert cond.context.shape == (2, windows * encoder.lengths[0], embeds.shape[-1])
    for ours, reference in ((cond.context, embeds), (uncond.context, negative)):
        assert relative_error(ours, reference.numpy()) < 1e-5
    extra: dict[str, Any] = {}
    if pooled is not None:
        assert relative_error(cond.pooled, pooled.numpy()) < 1e-5
        assert relative_error(uncond.pooled, negative_pooled.numpy()) < 1e-5
        extra = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}

    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    expected = theirs(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        latents=torch.from_numpy(latents).permute(0, 3, 1, 2),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
        **extra,
    ).images
    generate = make_generate(components, latents)
    found = generate(cond, uncond)
    assert relative_error(found, expected.permute(0, 2, 3, 1).numpy()) < 1e-4
    # what stands beyond the first window does change the image
    other = generate(cond._replace(context=cond.context.at[:, encoder.lengths[0] :].set(0)), uncond)
    assert relative_error(other[1:], found[1:]) > 1e-2


def make_generate(components: Any, latents: np.ndarray) -> Any:
    """A function of the conditional and the unconditional: the last latents of `STEPS` guided DDIM steps."""
    sizes = jnp.asarray(size_ids(16, 16, 2)) if components.is_xl else None
    table = solver_table("ddim", STEPS, scheduler_config=dict(components.scheduler_config))

    @jax.jit
    def jitted(*parts: Conditioning) -> jax.Array:
        cond, uncond = (part._replace(time_ids=sizes) for part in parts)

        def predict(x: jax.Array, t: jax.Array) -> jax.Array:
            outputs = [
                components.unet(components.params["unet"], x, t, part.context, **part.unet_kwargs())
                for part in (uncond, cond)
            ]
            return guided(*outputs, SCALE)

        return sample(predict, table, latents, None, prediction_type="epsilon")

    return lambda cond, uncond: np.asarray(jitted(cond, uncond))
