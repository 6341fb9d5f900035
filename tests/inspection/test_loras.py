"""``hypersd inspect`` of LoRAs of every layout: what they are, and the scale that each program gives their modules."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypersd_jax import cli
from hypersd_jax.inspection.report import labelled
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.lora.convert import family_shapes
from hypersd_jax.weights.lora.sgm import sgm_names
from tests.helpers.lora_files import dotted_tensors, kohya_tensors, random_adapter

RANK = 4
Tensors = dict[str, np.ndarray]
ALL = ("hypersd", "diffusers", "ComfyUI", "A1111", "sd-scripts")


def unet(family: str = "sd15", *, rank: int = RANK, sgm: bool = False) -> Any:
    """An attention module, one of the feed-forward and a convolution."""
    shapes = family_shapes(family)["unet"]
    block = "mid_block.attentions.0.transformer_blocks.0"
    paths = [f"{block}.{name}" for name in ("attn2.to_k", "attn1.to_out.0", "ff.net.2")]
    paths.append("down_blocks.0.downsamplers.0.conv")
    adapter = random_adapter({f"{path}.kernel": shapes[f"{path}.kernel"] for path in paths}, 0, rank=rank)
    names = sgm_names({path.rpartition(".")[0] for path in shapes}) if sgm else {}
    return {names.get(path, path): entry for path, entry in adapter.items()}


def text() -> Any:
    shapes = family_shapes("sd15")["text_encoder"]
    prefix = next(path for path in shapes if path.endswith("encoder.layers.0.self_attn.q_proj.kernel"))
    prefix = prefix.removesuffix("self_attn.q_proj.kernel")
    paths = [f"{prefix}{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
    adapter = random_adapter(
        {f"{path}.kernel": shapes[f"{path}.kernel"] for path in paths},
        1,
        rank=RANK,
        targets=("q_proj", "out_proj", "fc1"),
    )
    return {"text_model." + path.removeprefix("text_model."): entry for path, entry in adapter.items()}


def kohya(alpha: float | None = 2.0, **which: Any) -> Tensors:
    return kohya_tensors("lora_unet_", unet(**which), alpha)


def dotted(prefix: str, down: str, up: str, **which: Any) -> Tensors:
    return dotted_tensors(prefix, unet(**which), down, up)


def early() -> Tensors:
    found = {}
    for key, value in dotted("unet.", "_lora.down.weight", "_lora.up.weight").items():
        if ".to_" in key:
            found[key.replace(".to_out.0_lora", ".to_out_lora").replace(".to_", ".processor.to_")] = value
    return found


def inspected(file: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    cli.main(["inspect", str(file), "--json", *more])
    return json.loads(capsys.readouterr().out)


def saved(folder: Path, tensors: Tensors, name: str = "a", metadata: Mapping[str, str] | None = None) -> Path:
    file = folder / f"{name}.safetensors"
    save_file(tensors, file, {"format": "pt", **(metadata or {})})
    return file


# Layout, its tensors, what the report calls it, its family, and the scale in each program: of all modules, or of
# attention and of the others. None: left out, or the file refused.
PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")
KOHYA_ENDS = (".lora_down.weight", ".lora_up.weight")
CASES: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "kohya": (kohya, "kohya", "sd15", dict.fromkeys(ALL, 0.5)),
    "kohya for SDXL": (lambda: kohya(family="sdxl"), "kohya", "sdxl", dict.fromkeys(ALL, 0.5)),
    "kohya, no alpha": (lambda: kohya(None), "kohya", "sd15", dict.fromkeys(ALL, 1.0)),
    "kohya, sgm names": (lambda: kohya(family="sdxl", sgm=True), "kohya-sgm", "sdxl", dict.fromkeys(ALL, 0.5)),
    "sgm names of SD 1.x": (
        lambda: kohya(sgm=True),
        "kohya-sgm",
        "sd15",
        {**dict.fromkeys(ALL, 0.5), "diffusers": None, "sd-scripts": None},
    ),
    "kohya with text": (
        lambda: {**kohya(), **kohya_tensors("lora_te_", text(), 2.0)},
        "kohya",
        "sd15",
        dict.fromkeys(ALL, 0.5),
    ),
    "PEFT": (
        lambda: dotted("unet.", *PEFT_ENDS),
        "PEFT",
        "sd15",
        {"hypersd": 1.0, "diffusers": 1.0, "ComfyUI": (None, 1.0), "A1111": None, "sd-scripts": None},
    ),
    "PEFT's own": (
        lambda: dotted("base_model.model.", *PEFT_ENDS),
        "PEFT",
        "sd15",
        {"hypersd": 1.0, "diffusers": None, "ComfyUI": None, "A1111": None, "sd-scripts": None},
    ),
    "diffusers, late 2023": (
        lambda: dotted("unet.", ".lora.down.weight", ".lora.up.weight"),
        "diffusers",
        "sd15",
        {"hypersd": 1.0, "diffusers": 1.0, "ComfyUI": (None, 1.0), "A1111": None, "sd-scripts": None},
    ),
    "diffusers, early 2023": (
        early,
        "diffusers",
        "sd15",
        {"hypersd": 1.0, "diffusers": 1.0, "ComfyUI": 1.0, "A1111": None, "sd-scripts": None},
    ),
    "SimpleTuner": (
        lambda: kohya_tensors("lycoris_", unet(), 2.0),
        "kohya",
        "sd15",
        {"hypersd": 0.5, "diffusers": None, "ComfyUI": 0.5, "A1111": None, "sd-scripts": None},
    ),
    "ComfyUI": (
        lambda: dotted("diffusion_model.", *KOHYA_ENDS, family="sdxl", sgm=True),
        "ComfyUI",
        "sdxl",
        {"hypersd": 1.0, "diffusers": None, "ComfyUI": 1.0, "A1111": None, "sd-scripts": None},
    ),
    "OneTrainer": (
        lambda: dotted("unet.", *KOHYA_ENDS, family="sdxl", sgm=True),
        "OneTrainer",
        "sdxl",
        {"hypersd": 1.0, "diffusers": None, "ComfyUI": None, "A1111": None, "sd-scripts": None},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layout(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, layout, family, scales = CASES[case]
    found = inspected(saved(tmp_path, make()), capsys)
    assert (found["what"], found["layout"]) == ("LoRA", layout)
    assert (found["base"]["family"], found["base"]["keys_not_matching"]) == (family, 0)
    assert {module["rank"] for module in found["modules"]} == {RANK}
    for module in found["modules"]:
        for program, scale in scales.items():
            attention, other = scale if isinstance(scale, tuple) else (scale, scale)
            expected = attention if ".to_" in f".{module['module']}" else other
            assert module["scales"][program] == expected, (program, module["module"])
    agreed = all(scale == scales["hypersd"] for scale in scales.values())
    others = [text for text in found["remarks"] if not text.startswith(("alpha", "no alpha"))]
    assert agreed == (not others)


def test_the_wrong_eighth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alpha 8 at rank 64 as a tensor, in PEFT's folder, and lost, as exporters lose it."""
    file = saved(tmp_path, kohya(8.0, rank=64), "told")
    found = inspected(file, capsys)
    assert {tuple(module["scales"].values()) for module in found["modules"]} == {(0.125,) * 5}
    assert found["remarks"] == [
        "alpha 8 at rank 64 (4 modules): a loader that ignores alpha makes it 8 times as strong"
    ]
    folder = tmp_path / "peft"
    folder.mkdir()
    saved(folder, dotted("base_model.model.", *PEFT_ENDS, rank=64), "adapter_model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 64, "lora_alpha": 8}))
    found = inspected(folder, capsys)
    assert {(module["alpha"], module["scales"]["hypersd"]) for module in found["modules"]} == {(8.0, 0.125)}
    found = inspected(saved(tmp_path, dotted("unet.", *PEFT_ENDS, rank=64), "lost"), capsys)
    silent = "no alpha is stated, so all take 1; if it was trained at PEFT's default alpha 8: 0.125 at rank 64"
    assert silent in found["remarks"]


def test_an_alpha_of_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(saved(tmp_path, kohya(0.0)), capsys)
    assert {tuple(module["scales"].values()) for module in found["modules"]} == {(0.0,) * 5}


def test_alpha_in_a_header_that_only_diffusers_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"unet.r": RANK, "unet.lora_alpha": 2, "unet.peft_type": "LORA"}
    header = {"lora_adapter_metadata": json.dumps(fields)}
    found = inspected(saved(tmp_path, dotted("unet.", *PEFT_ENDS), metadata=header), capsys)
    scales = {(each["scales"]["diffusers"], each["scales"]["ComfyUI"]) for each in found["modules"]}
    assert scales == {(0.5, None), (0.5, 1.0)}
    assert "ComfyUI applies 2 modules at 1, not at 0.5, 2 times as strong" in found["remarks"]
    assert "ComfyUI leaves out 2 of 4 modules: attention without .processor in its names" in found["remarks"]
    assert any("convert lora IN OUT --to kohya" in remark for remark in found["remarks"])


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA"])
def test_lycoris_kinds(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, entry = next((name, entry) for name, entry in unet().items() if "to_k" in name)
    key = "lora_unet_" + name.replace(".", "_")
    fan_in, fan_out = entry["down"].shape[0], entry["up"].shape[1]
    out, inner = np.ones((fan_out, RANK), np.float32), np.ones((RANK, fan_in), np.float32)
    halves = ((2, 2), (fan_out // 2, fan_in // 2))
    alpha = {f"{key}.alpha": np.array(2.0, np.float32)}
    tensors = {
        "LoHa": {f"{key}.hada_w{half}_{side}": value for half in (1, 2) for side, value in (("a", out), ("b", inner))},
        "LoKr": {f"{key}.lokr_w{i}": np.ones(shape, np.float32) for i, shape in enumerate(halves, start=1)},
        "DoRA": {**kohya(None), f"{key}.dora_scale": np.ones((fan_out, 1), np.float32)},
    }[kind]
    found = inspected(saved(tmp_path, {**tensors, **alpha}), capsys)
    (module,) = [each for each in found["modules"] if kind in each["kind"]]
    expected = 1.0 if kind == "LoKr" else 0.5  # a LoKr of whole factors has no rank
    assert [module["scales"][name] for name in ("hypersd", "ComfyUI", "A1111", "sd-scripts")] == [expected] * 4
    assert module["scales"]["diffusers"] == (0.5 if kind == "DoRA" else None)
    words = "drops DoRA's magnitude" if kind == "DoRA" else "refuses it: it reads pairs of factors alone"
    assert any(words in remark for remark in found["remarks"])


def test_a_lora_that_fits_several_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its header knows."""
    tensors = {key: value for key, value in kohya().items() if "to_k" not in key}
    assert inspected(saved(tmp_path, tensors), capsys)["base"]["family"] == "sd15"
    file = saved(tmp_path, tensors, "stated", {"ss_base_model_version": "sdxl_base_v1-0"})
    found = inspected(file, capsys)
    assert (found["base"]["family"], found["base"]["fits"]) == ("sdxl", ["sd15", "sd21", "sdxl"])


def test_the_upsampler_that_a1111_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "up_blocks.0.upsamplers.0.conv"
    shapes = family_shapes("sdxl")["unet"]
    adapter = random_adapter({f"{path}.kernel": shapes[f"{path}.kernel"]}, 0, rank=RANK)
    found = inspected(saved(tmp_path, {**kohya(family="sdxl"), **kohya_tensors("lora_unet_", adapter, 2.0)}), capsys)
    assert [module["module"] for module in found["modules"] if module["scales"]["A1111"] is None] == [path]
    assert any("convert lora IN OUT --to kohya-sgm" in remark for remark in found["remarks"])


def test_what_does_not_fit_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**kohya(), "lora_unet_nowhere.alpha": np.array(1.0, np.float32), "odd.key": np.zeros(1, np.float32)}
    key = next(key for key in tensors if key.endswith("ff_net_2.lora_up.weight"))
    tensors[key] = tensors[key][:-1]
    tensors["bundle_emb.a.string_to_param.*"] = np.zeros(3, np.float32)
    file = saved(tmp_path, tensors)
    found = inspected(file, capsys)
    assert (found["base"]["family"], found["base"]["keys_not_matching"]) == ("sd15", 5)
    assert {reason: len(keys) for reason, keys in found["base"]["not_matching"].items()} == {
        "in no known layout": 1,
        "no such module in the base": 1,
        "another shape than the base's": 3,
    }
    assert found["loaders"]["hypersd"]["refused"] == "it refuses a file of which 5 keys would be left out"
    assert found["left_out"] == ["bundle_emb.a.string_to_param.*"]
    cli.main(["inspect", str(file)])
    printed = capsys.readouterr().out
    assert "not fitting 1 key, in no known layout: odd.key\n" in printed
    assert "  * 1 embedding came with it, and it is not used: bundle_emb.a" in printed
    # Held against another family nothing of the attention to the text fits.
    other = inspected(file, capsys, "--family", "sdxl")
    assert other["base"]["keys_not_matching"] > 5
    for found in (other, inspected(saved(tmp_path, kohya(family="sdxl", sgm=True), "xl"), capsys, "--family=sd15")):
        assert found["loaders"]["hypersd"]["refused"]


def test_a_base_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        f"lora_unet_strange_{i}.lora_{way}.weight": np.ones((2, 2), np.float32)
        for i in range(3)
        for way in ("up", "down")
    }
    found = inspected(saved(tmp_path, tensors), capsys)
    assert (found["base"]["family"], len(found["modules"])) == (None, 3)
    assert {module["rank"] for module in found["modules"]} == {2}
    assert found["loaders"]["hypersd"]["refused"] == "it fits no base that is known here; name one with --base"


@pytest.mark.parametrize("name", ["tscd-4", "unified"])
def test_the_call_of_a_lora_of_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = assets() / "loras" / f"{name}.safetensors"
    found = inspected(file, capsys)
    assert found["base"]["family"] == "embedded"
    assert found["settings"]["source"] == "header"
    options = cli._parser().parse_args(shlex.split(found["call"])[1:])
    settings = {"tscd-4": ("ddim", 4, "999,749,499,249"), "unified": ("tcd", 1, "999")}[name]
    assert (options.sampler, options.steps, options.timesteps) == settings
    assert (options.model, options.eta, options.guidance, options.lora) == ("embedded", 0.0, 0.0, [str(file)])


def test_the_call_of_a_released_file_and_of_a_style(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = {"ss_base_model_version": "sdxl_base_v1-0", "steps": "1500"}
    found = inspected(saved(tmp_path, kohya(family="sdxl"), "Hyper-SDXL-4steps-lora", foreign), capsys)
    assert found["settings"]["source"] == "hyper-sdxl-4steps"
    options = cli._parser().parse_args(shlex.split(found["call"])[1:])
    assert (options.sampler, options.steps, options.spacing) == ("ddim", 4, "trailing")
    assert options.model == "stabilityai/stable-diffusion-xl-base-1.0"
    found = inspected(saved(tmp_path, kohya(), "style", {"steps": "1500"}), capsys)
    assert found["settings"] == {"source": None}
    assert "--steps" not in found["call"]


def test_text_for_a_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {**kohya(2.0), **kohya_tensors("lora_te_", text(), 1.0)}
    cli.main(
        [
            "inspect",
            str(saved(tmp_path, tensors, metadata={"ss_base_model_version": "sd_v1", "note": "\x1b[2J" + "x" * 500})),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" kB, float32")
    assert labelled("base", "SD 1.x: every key fits; its header says sd_v1") in lines
    assert labelled("modules", "4 unet, 3 text_encoder") in lines
    rows = [line.split() for line in lines if ("LoRA" in line and "unet," in line) or "text_encoder, LoRA" in line]
    assert [row[-7:] for row in rows] == [["4", "1", *["0.25"] * 5], ["4", "2", *["0.5"] * 5]]
    assert max(map(len, lines)) < 200
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: {"transformer.x.lora_A.weight": np.ones((2, 2), np.float32)},
            "a transformer model's LoRA (FLUX, SD3)",
        ),
        (lambda: {"lora_unet_a.oft_blocks": np.ones((2, 2), np.float32)}, "OFT, which is not read here"),
        (lambda: {"lora_unet_a.lora_up.weight": np.ones((2, 2), np.float32)}, "a factor is missing"),
    ],
)
def test_a_lora_of_which_nothing_is_read(
    make: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path, make())
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(file)])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith(f"hypersd: {file}: no module of it is read here: ")
    assert words in printed
    assert printed.count("\n") == 1
