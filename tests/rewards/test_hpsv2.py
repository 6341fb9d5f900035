"""HPSv2's weights in OpenCLIP's layout: where its configuration comes from, completeness, and every refusal."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.diffusers.clip import load_clip_model, read_configs
from hypersd_jax.weights.single_file.clip import from_open_clip
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.tiny_clip import CONFIG, tiny_tensors

MODEL = {
    "embed_dim": 6,
    "vision_cfg": {"width": 12, "layers": 1, "head_width": 6, "mlp_ratio": 5 / 3, "patch_size": 4, "image_size": 12},
    "text_cfg": {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 1.25,
        "context_length": 24,
        "vocab_size": 2274,
    },
}


def layer(tensors: dict[str, np.ndarray], theirs: str, ours: str) -> dict[str, np.ndarray]:
    """One layer of `CONFIG`'s under OpenCLIP's names."""
    found = {}
    for leaf in ("weight", "bias"):
        parts = [tensors[f"{theirs}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
        found[f"{ours}.attn.in_proj_{leaf}"] = np.concatenate(parts)
        found[f"{ours}.attn.out_proj.{leaf}"] = tensors[f"{theirs}.self_attn.out_proj.{leaf}"]
        for name, module in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
            found[f"{ours}.{name}.{leaf}"] = tensors[f"{theirs}.{module}.{leaf}"]
        for name, module in (("c_fc", "fc1"), ("c_proj", "fc2")):
            found[f"{ours}.mlp.{name}.{leaf}"] = tensors[f"{theirs}.mlp.{module}.{leaf}"]
    return found


def open_clip_tensors() -> dict[str, np.ndarray]:
    """`tiny_tensors` as OpenCLIP would store them."""
    tensors = tiny_tensors()
    embeddings = "vision_model.embeddings"
    found = {
        "visual.class_embedding": tensors[f"{embeddings}.class_embedding"],
        "visual.conv1.weight": tensors[f"{embeddings}.patch_embedding.weight"],
        "visual.positional_embedding": tensors[f"{embeddings}.position_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].T,
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "text_projection": tensors["text_projection.weight"].T,
        "logit_scale": tensors["logit_scale"],
    }
    for theirs, ours in (
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "ln_final"),
    ):
        found |= {f"{ours}.{leaf}": tensors[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    found |= layer(tensors, "vision_model.encoder.layers.0", "visual.transformer.resblocks.0")
    return found | layer(tensors, "text_model.encoder.layers.0", "transformer.resblocks.0")


def write(folder: Path, model: Any = MODEL, **changes: np.ndarray | None) -> Path:
    """The folder of such a CLIP, with tensors changed, or left out where None."""
    if not folder.exists():
        shutil.copytree(assets() / "teacher" / "tokenizer", folder)
    tensors = {**open_clip_tensors(), **{key.replace("__", "."): value for key, value in changes.items()}}
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_tensors(folder / "open_clip_model.safetensors", kept)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    return folder


def test_every_tensor_is_that_of_the_other_layout(tmp_path: Path) -> None:
    folder = write(tmp_path / "clip", attn_mask=np.zeros((24, 24), np.float32))
    save_tensors(tmp_path / "model.safetensors", tiny_tensors())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    wanted = load_clip_model(tmp_path, dtype=np.float32)
    for path in (folder, folder / "open_clip_model.safetensors"):
        found = hs.rewards.load("hpsv2", path)
        assert found.params.keys() == wanted.params.keys()
        for name, value in wanted.params.items():
            np.testing.assert_array_equal(found.params[name], value, err_msg=name)
        assert found.model.steps.mean == (0.5, 0.5, 0.5)
    text, vision = read_configs(from_open_clip({"model_cfg": MODEL}))
    assert (text.hidden_act, vision.hidden_act) == ("gelu", "gelu")
    assert (vision.intermediate_size, vision.num_attention_heads, text.intermediate_size) == (20, 2, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual__proj": None}, r"1 missing \(visual\.proj\)$"),
        (
            {"transformer__resblocks__0__attn__in_proj_weight": None},
            r"1 missing \(transformer\.resblocks\.0\.attn\.in_",
        ),
        ({"visual__head": np.zeros(2, np.float32)}, r"1 unexpected \(visual\.head\)$"),
        ({"visual__proj": np.zeros((6, 12), np.float32)}, r"\(visual\.proj \[6, 12\] instead of \[12, 6\]\)$"),
        ({"ln_final__bias": np.zeros(16, np.int32)}, r"1 ill-fitting \(ln_final\.bias of type int32\)$"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"clip: .*{message}"):
        hs.rewards.load("hpsv2", write(tmp_path / "clip", **changes))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model_cfg=None is not an object"),
        ({**MODEL, "vision_cfg": {"timm_model_name": "x"}}, "unknown key timm_model_name='x'"),
        ({**MODEL, "vision_cfg": {"layers": [3, 4, 6, 3]}}, r"layers=\[3, 4, 6, 3\] is not a positive integer"),
        ({**MODEL, "custom_text": True}, "unknown key custom_text=True"),
        ({**MODEL, "embed_dim": "6"}, "projection_dim='6' is not a positive integer"),
    ],
)
def test_configurations_that_cannot_be_honoured(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"open_clip_config\.json: .*{message}"):
        hs.rewards.load("hpsv2", write(tmp_path / "clip", model))


def test_a_file_alone_is_read_by_its_shapes(tmp_path: Path) -> None:
    """The published file, whose width and activation are known, so that nothing is warned of."""
    tensors = {
        "visual.conv1.weight": (1280, 3, 2, 2),
        "visual.positional_embedding": (10, 1280),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (8, 1280),
        "visual.proj": (1280, 7),
        "token_embedding.weight": (49408, 4),
        "positional_embedding": (77, 4),
        "transformer.resblocks.0.mlp.c_fc.weight": (6, 4),
    }
    save_tensors(tmp_path / "alone.safetensors", {key: np.zeros(shape, np.float32) for key, shape in tensors.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"alone\.safetensors: .* 31 missing \(transformer"):
            hs.rewards.load("hpsv2", tmp_path / "alone.safetensors")
    save_tensors(tmp_path / "odd.safetensors", {"visual.conv1.weight": np.zeros((24, 3, 2, 2), np.float32)})
    with pytest.raises(UserError, match=r"odd\.safetensors: holds no CLIPModel \(no token_embedding\.weight of"):
        hs.rewards.load("hpsv2", tmp_path / "odd.safetensors")
