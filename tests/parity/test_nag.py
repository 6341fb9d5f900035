"""Normalised attention guidance against diffusers with attention processors written for this test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel

from hypersd_jax.models import UNetConfig, unet
from hypersd_jax.models.attention_guidance import AttentionGuidance
from hypersd_jax.pipeline import Pipeline
from tests.helpers.quick import quick_jit
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error
from tests.parity.test_unet import CONFIGS

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
NEGATIVES = ["blue background", "noto style"]
SCALE, TAU, ALPHA = 5.0, 1.3, 0.4


class Steered:
    """An attention processor that reads the negative text of the last samples behind the batch's own text."""

    def __init__(self, count: int) -> None:
        self.count = count  # of the samples that are steered
        self.clipped = 0

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        own, negative = encoder_hidden_states.split([len(hidden_states), self.count])
        z = self.attend(attn, hidden_states, own)
        plus, minus = z[-self.count :], self.attend(attn, hidden_states[-self.count :], negative)
        beyond = plus * SCALE - minus * (SCALE - 1)
        ratio = beyond.norm(p=1, dim=-1, keepdim=True) / plus.norm(p=1, dim=-1, keepdim=True)
        self.clipped += int((ratio > TAU).sum())
        beyond = beyond / ratio * ratio.clamp(max=TAU)
        return attn.to_out[0](torch.cat([z[: -self.count], ALPHA * beyond + (1 - ALPHA) * plus]))

    def attend(self, attn: Any, x: Any, text: Any) -> Any:
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


@contextmanager
def steered(network: Any, count: int) -> Iterator[Steered]:
    """Put the processor into each attention that is given text."""
    before, mine = network.attn_processors, Steered(count)
    text = {
        f"{name}.processor"
        for name, module in network.named_modules()
        if getattr(module, "is_cross_attention", False) or name.endswith("attn2")
    }
    network.set_attn_processor({name: mine if name in text else old for name, old in before.items()})
    try:
        yield mine
    finally:
        network.set_attn_processor(before)


@pytest.mark.parametrize(("name", "size"), [("sd1", (7, 5)), ("sdxl", (6, 10)), ("asymmetric", (4, 8))])
@pytest.mark.parametrize("guided", [False, True])
def test_values(name: str, size: tuple[int, int], guided: bool) -> None:
    """One call, alone and as the second half of a batch under guidance; text of another length, odd sizes."""
    config, random = CONFIGS[name], np.random.default_rng(3)
    torch.manual_seed(0)
    theirs = perturb(UNet2DConditionModel(**config), seed=1)
    network = unet(UNetConfig.from_dict(config))
    params = params_from_torch(theirs, network.shapes)
    batch, count = (4, 2) if guided else (2, 2)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    x, context, negative = normal(batch, *size, 4), normal(batch, 3, 12), normal(count, 3, 12)
    t = np.array([7, 981] * (batch // 2))
    more: dict[str, Any] = {}
    added = None
    if "addition_embed_type" in config:
        more = {"pooled": normal(batch, 10), "time_ids": random.integers(0, 1024, (batch, 6)).astype(np.float32)}
        added = {"text_embeds": torch.tensor(more["pooled"]), "time_ids": torch.tensor(more["time_ids"])}
    numbers = [np.float32(value) for value in (SCALE, TAU, ALPHA)]
    ours = quick_jit(lambda params, x, context, nag: network(params, x, t, context, nag=nag, **more))
    found = ours(params, x, context, AttentionGuidance(negative, *numbers))
    with torch.no_grad(), steered(theirs, count) as processor:
        given = torch.tensor(np.concatenate([context, negative]))
        wanted = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), given, added_cond_kwargs=added).sample
    assert processor.clipped > 0
    assert relative_error(found, wanted.permute(0, 2, 3, 1)) < 1e-5
    plain = np.asarray(network(params, x, t, context, **more))
    assert relative_error(found[-count:], plain[-count:]) > 1e-3
    if guided:
        np.testing.assert_allclose(found[:-count], plain[:-count], rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipelines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline]:
    xl = request.param == "sdxl"
    folder = (tiny_sdxl if xl else tiny_sd)(tmp_path_factory.mktemp(request.param), attentive=True)
    cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    theirs = cls.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    return theirs, Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("negatives", [NEGATIVES, None])
def test_images(pipelines: tuple[Any, Pipeline], guidance: float, negatives: list[str] | None) -> None:
    """Three steps; without a negative prompt attention is steered away from the empty one."""
    theirs, ours = pipelines
    guided, texts = guidance > 1, negatives or ["", ""]
    latents = np.random.default_rng(5).standard_normal((2, 4, 12, 4)).astype(np.float32)
    prompt, uncond, *pooled = theirs.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negatives
    )
    away = theirs.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    extra = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]} if pooled else {}
    network, forward = theirs.unet, theirs.unet.forward

    def with_negatives(*args: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        return forward(*args, encoder_hidden_states=torch.cat([encoder_hidden_states, away]), **kwargs)

    with torch.no_grad(), steered(network, 2):
        network.forward = with_negatives
        try:
            wanted = theirs(
                prompt_embeds=prompt,
                negative_prompt_embeds=uncond if guided else None,
                latents=torch.tensor(latents).permute(0, 3, 1, 2),
                height=8,
                width=24,
                num_inference_steps=3,
                guidance_scale=guidance,
                output_type="np",
                **(extra if guided else dict(list(extra.items())[:1])),
            ).images
        finally:
            network.forward = forward
    call: dict[str, Any] = {"latents": latents, "height": 8, "width": 24, "steps": 3, "guidance": guidance}
    call |= {"sampler": "ddim", "output": "np", "nag_tau": TAU, "nag_alpha": ALPHA}
    found = ours(PROMPTS, negatives, **call, nag_scale=SCALE)
    assert relative_error(found, wanted) < 1e-4
    assert relative_error(found, ours(PROMPTS, negatives if guided else None, **call)) > 1e-3
