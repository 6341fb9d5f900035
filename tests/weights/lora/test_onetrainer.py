"""OneTrainer's LoRA layouts: its table of names, every module of every family, and the same images as kohya's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hypersd_jax.cli import main
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights import read_lora
from hypersd_jax.weights.families import adaptable_shapes
from tests.helpers.configs import SD15, SD21, SDXL, TINY
from tests.helpers.lora_files import random_adapter, torch_factors
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tiny_xl import tiny_xl

FAMILIES = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
SHAPES = adaptable_shapes(TINY)
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

# OneTrainer's modules/util/convert/lora/convert_sd_lora.py and convert_sdxl_lora.py: (its name, diffusers').
RESNET = (
    ("emb_layers.1", "time_emb_proj"),
    ("in_layers.2", "conv1"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
OUTSIDE = (
    ("input_blocks.0.0", "conv_in"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("out.2", "conv_out"),
)


def table(levels: int) -> dict[str, str]:
    """``{diffusers' prefix: OneTrainer's}``, with two resnets a level down and three up, as all families have them."""
    pairs: list[tuple[str, str]] = list(OUTSIDE)

    def resnet(theirs: str, ours: str) -> None:
        pairs.extend((f"{theirs}.{a}", f"{ours}.{b}") for a, b in RESNET)

    for i in range(levels):
        for j in range(2):
            resnet(f"input_blocks.{3 * i + j + 1}.0", f"down_blocks.{i}.resnets.{j}")
            pairs.append((f"input_blocks.{3 * i + j + 1}.1", f"down_blocks.{i}.attentions.{j}"))
        pairs.append((f"input_blocks.{3 * i + 3}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
        for j in range(3):
            resnet(f"output_blocks.{3 * i + j}.0", f"up_blocks.{i}.resnets.{j}")
            pairs.append((f"output_blocks.{3 * i + j}.1", f"up_blocks.{i}.attentions.{j}"))
        # Always the third, also where no attention stands before it.
        pairs.append((f"output_blocks.{3 * i + 2}.2.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    resnet("middle_block.0", "mid_block.resnets.0")
    pairs.append(("middle_block.1", "mid_block.attentions.0"))
    resnet("middle_block.2", "mid_block.resnets.1")
    return {ours: theirs for theirs, ours in pairs}


def omi(names: dict[str, str], module: str) -> str:
    """A UNet module's name in OneTrainer's "OMI" format."""
    prefix = next(ours for ours in names if module == ours or module.startswith(f"{ours}."))
    return names[prefix] + module.removeprefix(prefix)


Namer = Callable[[str, str], str]
"""(component, module) -> the name before a key's suffix."""


def spellings(levels: int, *, xl: bool) -> dict[str, Namer]:
    """OneTrainer's formats, newest first; its `text_encoder` is `clip_l`, and the only one is `lora_te`."""
    names = table(levels)
    kohya = {"text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return {
        "omi": lambda part, module: f"unet.{omi(names, module)}" if part == "unet" else f"{clip[part]}.{module}",
        "early omi": lambda part, module: (
            f"lora_unet.{omi(names, module)}" if part == "unet" else f"lora_{clip[part]}.{module}"
        ),
        "diffusers": lambda part, module: f"lora_unet.{module}" if part == "unet" else f"{kohya[part]}.{module}",
        "components": lambda part, module: f"{part}.{module}",
    }


def factors(name: str, entry: Any, alpha: float) -> dict[str, np.ndarray]:
    """The tensors of one module, alpha first, as files sort them."""
    down, up = torch_factors(entry)
    scalar = np.array(alpha, np.float32)
    return {f"{name}.alpha": scalar, f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["omi", "early omi", "diffusers", "components"])
def test_every_module_of_every_family(tmp_path: Path, family: str, spelling: str) -> None:
    """Each of them lands where it belongs: its alpha is its number."""
    shapes = adaptable_shapes(FAMILIES[family])
    name = spellings(len(FAMILIES[family]["unet"]["block_out_channels"]), xl=family == "sdxl")[spelling]
    modules = [
        (part, path.removesuffix(".kernel"))
        for part, paths in shapes.items()
        for path in paths
        if path.endswith(".kernel")
    ]
    tensors = {}
    for alpha, (part, module) in enumerate(modules, 1):
        *window, fan_in, fan_out = shapes[part][f"{module}.kernel"].shape
        ones = (1,) * len(window)
        written = module if part == "unet" or module.startswith("text_") else f"text_model.{module}"
        tensors |= {
            f"{name(part, written)}.alpha": np.array(alpha, np.float32),
            f"{name(part, written)}.lora_down.weight": np.zeros((1, fan_in, *window), np.float16),
            f"{name(part, written)}.lora_up.weight": np.zeros((fan_out, 1, *ones), np.float16),
        }
    assert len(tensors) == 3 * len(modules)
    save_file(tensors, tmp_path / "one.safetensors")
    file = read_lora(tmp_path / "one.safetensors", shapes)
    assert file.report.layout == "OneTrainer"
    found = {(part, module): entry["scale"][0] for part, one in file.adapters.items() for module, entry in one.items()}
    assert found == {place: alpha for alpha, place in enumerate(modules, 1)}


@pytest.mark.parametrize("xl", [False, True])
def test_images_are_those_of_the_same_lora_in_kohyas_layout(tmp_path: Path, xl: bool) -> None:
    pipe = Pipeline.from_pretrained((tiny_xl if xl else tiny_model)(tmp_path / "model"), dtype="float32")
    shapes = pipe.base.shapes
    names = _tiny_names()
    text = ("q_proj", "out_proj", "fc1")
    parts = {"unet": random_adapter(shapes["unet"], 0)}
    parts |= {part: random_adapter(shapes[part], 1, targets=text) for part in shapes if part.startswith("text")}
    clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    kohya = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    theirs, same = {}, {}
    for part, adapter in parts.items():
        for module, entry in adapter.items():
            written = module if part == "unet" or module.startswith("text_") else f"text_model.{module}"
            name = f"unet.{omi(names, module)}" if part == "unet" else f"{clip[part]}.{written}"
            theirs |= factors(name, entry, 2.0)
            same |= factors(f"{kohya[part]}_{written.replace('.', '_')}", entry, 2.0)
    call: dict[str, Any] = {"steps": 2, "guidance": 0.0, "output": "np", "seed": 3}
    images = []
    for file, tensors in (("one", theirs), ("kohya", same)):
        save_file(tensors, tmp_path / f"{file}.safetensors")
        pipe.load_lora(tmp_path / f"{file}.safetensors", 0.7, name="it")
        images.append(pipe("red apple", **call))
    np.testing.assert_array_equal(*images)
    pipe.unload_lora()
    assert np.abs(pipe("red apple", **call) - images[0]).max() > 1e-2


def _tiny_names() -> dict[str, str]:
    """OneTrainer's rules on the tiny models' UNet: two levels of one resnet down and two up, without attention."""
    pairs = [*OUTSIDE, ("middle_block.1", "mid_block.attentions.0")]
    resnets = {"input_blocks.1.0": "down_blocks.0.resnets.0", "input_blocks.3.0": "down_blocks.1.resnets.0"}
    resnets |= {f"output_blocks.{2 * i + j}.0": f"up_blocks.{i}.resnets.{j}" for i in range(2) for j in range(2)}
    resnets |= {f"middle_block.{2 * i}": f"mid_block.resnets.{i}" for i in range(2)}
    pairs += [(f"{theirs}.{a}", f"{ours}.{b}") for theirs, ours in resnets.items() for a, b in RESNET]
    pairs += [("input_blocks.2.0.op", "down_blocks.0.downsamplers.0.conv")]
    pairs += [("output_blocks.1.2.conv", "up_blocks.0.upsamplers.0.conv")]
    return {ours: theirs for theirs, ours in pairs}


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_is_kohyas(tmp_path: Path, axis: int) -> None:
    """Both of its decompositions; alpha is sorted before the factors and must not make them PEFT's."""
    fan_out = SHAPES["unet"][f"{TO_Q}.kernel"].shape[-1]
    magnitude = np.linspace(0.5, 1.5, fan_out, dtype=np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
    entry = random_adapter(SHAPES["unet"], 0, targets=("attn1.to_q",))[TO_Q]
    loaded = []
    for name in ("unet.middle_block.1.transformer_blocks.0.attn1.to_q", f"lora_unet_{TO_Q.replace('.', '_')}"):
        tensors = {**factors(name, entry, 3.0), f"{name}.dora_scale": magnitude}
        save_file(tensors, tmp_path / "dora.safetensors")
        file = read_lora(tmp_path / "dora.safetensors", SHAPES)
        assert file.report.kinds == {"LoRA with DoRA": 1}
        loaded.append(file.differences["unet"][TO_Q])
    assert loaded[0].keys() == loaded[1].keys()
    for key in loaded[0]:
        np.testing.assert_array_equal(loaded[0][key], loaded[1][key])


def bundled(tmp_path: Path) -> Path:
    name = "unet.middle_block.1.transformer_blocks.0.attn1.to_q"
    embeddings = {f"bundle_emb.my token.clip_{part}": np.ones((2, 8), np.float32) for part in "lg"}
    entry = random_adapter(SHAPES["unet"], 0, targets=("attn1.to_q",))[TO_Q]
    path = tmp_path / "bundled.safetensors"
    save_file({**embeddings, **factors(name, entry, 4.0)}, path)
    return path


def test_bundled_embeddings_are_counted_and_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"bundled\.safetensors: left out, 2 embeddings .*bundle_emb\.my token\.clip_"):
        file = read_lora(bundled(tmp_path), SHAPES)
    assert sorted(file.report.left_out) == ["bundle_emb.my token.clip_g", "bundle_emb.my token.clip_l"]
    assert "left out, 2 embeddings" in str(file.report)
    save_file({"bundle_emb.x.clip_l": np.ones((1, 8), np.float32)}, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="is not a LoRA file: bundle_emb"):
        read_lora(tmp_path / "alone.safetensors", SHAPES)


@pytest.mark.filterwarnings("default:.*left out, 1 embedding")
def test_conversion_to_kohya(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    shapes = Pipeline.from_pretrained(model).base.shapes
    entry = random_adapter(shapes["unet"], 0, targets=("attn1.to_q",))[TO_Q]
    name = "unet.middle_block.1.transformer_blocks.0.attn1.to_q"
    save_file(
        {**factors(name, entry, 4.0), "bundle_emb.x.clip_l": np.ones((1, 8), np.float32)}, tmp_path / "in.safetensors"
    )
    out = tmp_path / "out.safetensors"
    arguments = ["convert", "lora", str(tmp_path / "in.safetensors"), str(out), "--to", "kohya", "--base", str(model)]
    main(arguments)
    assert "in.safetensors: left out, 1 embedding that came with it: bundle_emb.x.clip_l" in capsys.readouterr().err
    assert sorted(load_file(out)) == [
        f"lora_unet_{TO_Q.replace('.', '_')}.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")
    ]


PEFT_NAMES = {
    "PEFT's factors under sgm's names": "unet.middle_block.1.transformer_blocks.0.attn1.to_q",
    "PEFT's factors under ComfyUI's names": "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
    "PEFT's factors under kohya's names": f"lora_unet_{TO_Q.replace('.', '_')}",
    "PEFT's factors in a folder's names": f"base_model.model.{TO_Q}",
}


@pytest.mark.parametrize("kind", PEFT_NAMES)
def test_mixed_spellings(tmp_path: Path, kind: str) -> None:
    entry = random_adapter(SHAPES["unet"], 0, targets=("attn1.to_q",))[TO_Q]
    down, up = torch_factors(entry)
    name = PEFT_NAMES[kind]
    save_file({f"{name}.lora_A.style.weight": down, f"{name}.lora_B.style.weight": up}, tmp_path / "a.safetensors")
    (module,) = read_lora(tmp_path / "a.safetensors", SHAPES).adapters["unet"]
    assert module == TO_Q


OTHERS = {
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "a transformer model's LoRA",
    "lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight": "a transformer model's LoRA",
    "lora_transformer.transformer_blocks.0.attn.to_q.lora_down.weight": "a transformer model's LoRA",
    "t5.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight": "a transformer model's LoRA",
    "lora_prior_unet_down_blocks_0_1_attention.lora_down.weight": "Stable Cascade",
    "unet:0:up": "numbered LoRA",
    "unet.middle_block.1.transformer_blocks.0.attn1.to_q.oft_R.weight": "OFT",
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_is_not_read_is_not_blamed_on_the_base(tmp_path: Path, key: str) -> None:
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=OTHERS[key]) as refused:
        read_lora(tmp_path / "a.safetensors", SHAPES)
    assert "base" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["unet.input_blocks.4.1.transformer_blocks.0", "lora_unet_input_blocks_4_1_transformer_blocks_0"]
)
def test_another_family_is_named_by_its_width(tmp_path: Path, name: str) -> None:
    key = f"{name}{'.' if '.' in name else '_'}attn2{'.' if '.' in name else '_'}to_k.lora_down.weight"
    save_file({key: np.ones((4, 2048), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="for a model with cross-attention width 2048, this one has 16"):
        read_lora(tmp_path / "a.safetensors", SHAPES)
