"""The scales that `hypersd inspect` says diffusers gives each module, against those that diffusers gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.numpy import save_file

from hypersd_jax.inspection.lora import inspect_lora
from hypersd_jax.weights.lora.sgm import sgm_names
from tests.helpers.lora_files import TEXT_TARGETS, dotted_tensors, kohya_tensors, random_adapter
from tests.helpers.lora_images import Both
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl

FEW = ("attn2.to_q", "attn1.to_out.0", "resnets.0.conv1", "ff.net.2", "proj_in")
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    make = {"sd": tiny_sd, "sdxl": tiny_sdxl}[request.param]
    return Both(make(tmp_path_factory.mktemp(request.param), attentive=True))


class Maker:
    """Tensors of LoRAs for one base, each rank another seed."""

    def __init__(self, both: Both) -> None:
        self.shapes = both.ours.base.shapes
        self.is_xl = both.ours.base.reads_size

    def unet(self, rank: int = 4, targets: tuple[str, ...] = FEW) -> Any:
        return random_adapter(self.shapes["unet"], rank, rank=rank, targets=targets)

    def text(self, targets: tuple[str, ...] = TEXT_TARGETS) -> Any:
        return random_adapter(self.shapes["text_encoder"], 9, rank=3, targets=targets)

    @property
    def te(self) -> str:
        return "lora_te1_text_model_" if self.is_xl else "lora_te_text_model_"

    def text_named(self, targets: tuple[str, ...] = TEXT_TARGETS) -> Any:
        return {path.removeprefix("text_model."): entry for path, entry in self.text(targets).items()}

    def sgm(self) -> Any:
        names = sgm_names({path.rpartition(".")[0] for path in self.shapes["unet"]})
        return {names[path]: entry for path, entry in self.unet().items()}


def kohya(maker: Maker) -> Tensors:
    return kohya_tensors("lora_unet_", maker.unet(), 1.0)


def silent(maker: Maker) -> Tensors:
    return kohya_tensors("lora_unet_", maker.unet(), None)


def several_alphas(maker: Maker) -> Tensors:
    """Most at 2, one of attention and one convolution at 8, one without."""
    tensors = kohya_tensors("lora_unet_", maker.unet(), 2.0)
    alphas = [key for key in tensors if key.endswith(".alpha")]
    for end in ("attn2_to_q.alpha", "conv1.alpha"):
        tensors[next(key for key in alphas if key.endswith(end))] = np.array(8.0, np.float32)
    del tensors[next(key for key in alphas if key.endswith("ff_net_2.alpha"))]
    return tensors


def several_ranks(maker: Maker) -> Tensors:
    return {
        **kohya_tensors("lora_unet_", maker.unet(4, ("attn2.to_q", "conv1")), 4.0),
        **kohya_tensors("lora_unet_", maker.unet(8, ("proj_in",)), 2.0),
    }


def several_silent_ranks(maker: Maker) -> Tensors:
    return {
        **kohya_tensors("lora_unet_", maker.unet(4, ("attn2.to_q", "conv1")), None),
        **kohya_tensors("lora_unet_", maker.unet(8, ("proj_in",)), None),
    }


def with_text(maker: Maker) -> Tensors:
    return {**kohya(maker), **kohya_tensors(maker.te, maker.text_named(), 1.5)}


def text_alphas(maker: Maker) -> Tensors:
    tensors = with_text(maker)
    key = next(key for key in tensors if key.endswith("mlp_fc1.alpha"))
    tensors[key] = np.array(6.0, np.float32)
    return tensors


def text_without_out(maker: Maker) -> Tensors:
    return {**kohya(maker), **kohya_tensors(maker.te, maker.text_named(("q_proj", "fc1")), 1.5)}


def sgm(maker: Maker) -> Tensors:
    return kohya_tensors("lora_unet_", maker.sgm(), 1.0)


def two_namings(maker: Maker) -> Tensors:
    half = {path: entry for path, entry in maker.unet().items() if "conv1" in path}
    rest = {path: entry for path, entry in maker.sgm().items() if "to_" in path}
    return {**kohya_tensors("lora_unet_", half, 1.0), **kohya_tensors("lora_unet_", rest, 1.0)}


def simple_tuner(maker: Maker) -> Tensors:
    return kohya_tensors("lycoris_", maker.unet(), 1.0)


def comfyui(maker: Maker) -> Tensors:
    return dotted_tensors("diffusion_model.", maker.sgm(), ".lora_down.weight", ".lora_up.weight")


def one_trainer(maker: Maker) -> Tensors:
    found = dotted_tensors("unet.", maker.sgm(), ".lora_down.weight", ".lora_up.weight")
    alphas = {f"unet.{path}.alpha": np.array(2.0, np.float32) for path in maker.sgm()}
    return {**found, **alphas}


def peft(maker: Maker) -> Tensors:
    return dotted_tensors("unet.", maker.unet(), ".lora_A.weight", ".lora_B.weight")


def peft_ranks(maker: Maker) -> Tensors:
    return {**peft(maker), **dotted_tensors("unet.", maker.unet(8, ("proj_in",)), ".lora_A.weight", ".lora_B.weight")}


def own_peft(maker: Maker) -> Tensors:
    return dotted_tensors("base_model.model.", maker.unet(), ".lora_A.weight", ".lora_B.weight")


def late_2023(maker: Maker) -> Tensors:
    return dotted_tensors("unet.", maker.unet(), ".lora.down.weight", ".lora.up.weight")


def early_2023(maker: Maker) -> Tensors:
    found = dotted_tensors("unet.", maker.unet(4, ("attn2.to_q",)), "_lora.down.weight", "_lora.up.weight")
    return {key.replace(".to_q_lora", ".processor.to_q_lora"): value for key, value in found.items()}


def tucker(maker: Maker) -> Tensors:
    found = kohya(maker)
    key = next(key for key in found if key.endswith("conv1.lora_down.weight"))
    rank, _, *window = found[key].shape
    found[key] = found[key][:, :, :1, :1].copy()
    found[key.replace("lora_down", "lora_mid")] = np.ones((rank, rank, *window), np.float32)
    return found


def dora(maker: Maker) -> Tensors:
    found = kohya(maker)
    key = next(key for key in found if key.endswith("attn2_to_q.lora_up.weight"))
    size = len(found[key])
    found[key.replace("lora_up.weight", "dora_scale")] = np.ones((size, 1), np.float32)
    return found


def loha(maker: Maker) -> Tensors:
    found = kohya(maker)
    down = next(key for key in found if key.endswith("attn2_to_q.lora_down.weight"))
    up = down.replace("lora_down", "lora_up")
    a, b = found.pop(up), found.pop(down)
    for half in (1, 2):
        found[down.replace("lora_down.weight", f"hada_w{half}_a")] = a.copy()
        found[down.replace("lora_down.weight", f"hada_w{half}_b")] = b.copy()
    return found


MAKERS: tuple[Callable[[Maker], Tensors], ...] = (
    *(kohya, silent, several_alphas, several_ranks, several_silent_ranks, with_text, text_alphas, text_without_out),
    *(sgm, two_namings, simple_tuner, comfyui, one_trainer, peft, peft_ranks, own_peft, late_2023, early_2023),
    *(tucker, dora, loha),
)


def measured(both: Both, file: Path) -> dict[tuple[str, str], float] | None:
    """(component, module) -> the scale in diffusers; None where it raises."""
    pipe = both.theirs
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="x")
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError):
        return None
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in () if model is None else model.named_modules():
            if "x" in getattr(module, "scaling", {}):
                found[component, name] = module.scaling["x"]
    return found


def said(both: Both, file: Path) -> dict[tuple[str, str], float] | None:
    data = inspect_lora(file, base=str(both.ours.base.source)).data
    if data["loaders"]["diffusers"]["refused"] is not None:
        return None
    scales = {(each["component"], each["module"]): each["scales"]["diffusers"] for each in data["modules"]}
    return {place: scale for place, scale in scales.items() if scale is not None}


def same(found: Mapping[tuple[str, str], float] | None, expected: Mapping[tuple[str, str], float] | None) -> None:
    if expected is None or found is None:
        assert found is expected
        return
    known = {(component, name.removeprefix("text_model.")): scale for (component, name), scale in expected.items()}
    mine = {(component, name.removeprefix("text_model.")): scale for (component, name), scale in found.items()}
    assert mine.keys() == known.keys()
    assert mine == pytest.approx(known)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_the_scales_are_those_of_diffusers(both: Both, tmp_path: Path, make: Callable[[Maker], Tensors]) -> None:
    file = tmp_path / "a.safetensors"
    save_file(make(Maker(both)), file, {"format": "pt"})
    expected = measured(both, file)
    both.unload()
    same(said(both, file), expected)


@pytest.mark.filterwarnings("ignore")
def test_alpha_in_the_header(both: Both, tmp_path: Path) -> None:
    maker = Maker(both)
    fields = {
        "unet.r": 4,
        "unet.lora_alpha": 2,
        "unet.peft_type": "LORA",
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {"mid_block.resnets.0.conv1": 8},
        "unet.target_modules": sorted(maker.unet()),
    }
    file = tmp_path / "a.safetensors"
    save_file(peft(maker), file, {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})
    expected = measured(both, file)
    both.unload()
    assert expected is not None
    assert set(expected.values()) == {0.5, 2.0}
    same(said(both, file), expected)
