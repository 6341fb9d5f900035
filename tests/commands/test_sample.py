"""``hypersd sample``: its images hold their settings, and can be sampled again from them."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from hypersd_jax.cli import main
from hypersd_jax.diffusion import SOLVERS
from hypersd_jax.errors import UserError
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.paths import parse_lora
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.pipeline.arguments import NotFiniteWarning
from hypersd_jax.png_text import SCHEDULES, lora_hash
from hypersd_jax.weights.lora import write_lora
from tests.helpers.infotext import Infotext, parse, text_of
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import UNET, tiny_model

PROMPTS = ("red apple, fluent flat style", "lion: blob style")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One whose header says how to sample with it, and one that says nothing."""
    folder = tmp_path_factory.mktemp("loras")
    shapes = unet(UNetConfig.from_dict(UNET), dtype=jnp.float32).shapes
    fast = {"sampler": "tcd", "steps": "2", "eta": "0.4", "guidance": "0.0"}
    for seed, (name, header) in enumerate((("style", {}), ("fast", fast))):
        write_lora(folder / f"{name}.safetensors", {"unet": random_adapter(shapes, seed)}, metadata=header)
    return folder / "fast.safetensors", folder / "style.safetensors"


def sampled(output: Path, *arguments: str) -> list[Infotext]:
    """The texts of the images that a command makes."""
    main(["sample", *arguments, "--output", str(output)])
    return [parse(text_of(path)) for path in sorted(output.parent.glob(f"{output.stem}*"))]


def sampled_again(pipe: Pipeline, text: Infotext, **more) -> np.ndarray:
    """The last image of a call with nothing but what the text says."""
    values = text.values
    i, j = map(int, values["Image"].split("."))
    names = {solver.webui_name: name for name, solver in SOLVERS.items()}
    spacings = {name: key for key, name in SCHEDULES.items()}
    images = pipe(
        [""] * i + [text.bare_prompt],
        text.negative or None,
        steps=int(values["Steps"]),
        sampler=names[values["Sampler"]],
        spacing=spacings.get(values.get("Schedule type", "")),
        eta=float(values.get("Eta", values.get("Eta DDIM", 0))),
        guidance=float(values["CFG scale"]),
        seed=int(values["Seed"]),
        num_images=j + 1,
        width=int(values["Size-1"]),
        height=int(values["Size-2"]),
        **more,
    )
    return np.asarray(images[-1])


def test_an_image_is_sampled_again_from_its_text(tmp_path: Path, model: Path, loras: tuple[Path, Path]) -> None:
    fast, style = loras
    output = tmp_path / "out.png"
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    texts = sampled(
        output,
        "--model",
        str(model),
        *prompts,
        "--num-images=2",
        "--seed=-5",
        "--lora",
        f"{style}@0.5",
        "--lora",
        str(fast),
    )
    assert [text.bare_prompt for text in texts] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [text.values["Image"] for text in texts] == ["0.0", "0.1", "1.0", "1.1"]
    for text in texts:
        assert text.loras == [("style", 0.5), ("fast", 1.0)]
        # The last LoRA's header decides, and the model's own name is its folder's.
        shown = {key: text.values[key] for key in ("Steps", "Sampler", "Eta", "CFG scale", "Model")}
        assert shown == {"Steps": "2", "Sampler": "TCD", "Eta": "0.4", "CFG scale": "1", "Model": "tiny-model"}
        assert text.values["Seed"] == str(2**32 - 5)
        assert text.values["Lora hashes"] == f"style: {lora_hash(style)}, fast: {lora_hash(fast)}"

    pipe = Pipeline.from_pretrained(model)
    for name, scale in texts[3].loras:
        pipe.load_lora(style.with_name(f"{name}.safetensors"), scale)
    images = [np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())]
    again = sampled_again(pipe, texts[3])
    # Another batch size may round a last bit otherwise.
    assert np.abs(again.astype(int) - images[3]).max() <= 1
    assert np.abs(again.astype(int) - images[2]).max() > 20


@pytest.mark.filterwarnings("default:negative_prompt is ignored")
def test_guidance_presets_and_spacing(tmp_path: Path, model: Path) -> None:
    arguments = ["--model", str(model), "--prompt=a cat", "--negative-prompt=ugly: yes, very"]
    (text,) = sampled(
        tmp_path / "guided.webp", *arguments, "--guidance=3.5", "--steps=2", "--sampler=euler", "--seed=1"
    )
    assert text.negative == "ugly: yes, very"
    assert [text.values[key] for key in ("CFG scale", "Sampler", "Schedule type")] == ["3.5", "Euler", "Uniform"]
    assert "Lora hashes" not in text.values
    assert text.prompt == "a cat"

    (text,) = sampled(tmp_path / "preset.jpg", *arguments, "--preset=sdxl-lightning-2steps")
    assert text.negative == ""  # it had no part in the image
    shown = [text.values[key] for key in ("Steps", "CFG scale", "Sampler", "Schedule type")]
    assert shown == ["2", "1", "Euler", "SGM Uniform"]

    (text,) = sampled(tmp_path / "own.png", *arguments[:3], "--preset=sdxl-lightning-4steps", "--timesteps=900,400")
    assert (text.values["Steps"], text.values["Timesteps"]) == ("2", "900, 400")
    assert "Schedule type" not in text.values


def test_steering_stands_in_the_text(
    tmp_path: Path, model: Path, loras: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--prompt=a cat", "--negative-prompt=ugly", "--lora", str(loras[0])]
    (text,) = sampled(tmp_path / "nag.png", *arguments, "--nag-scale=4", "--nag-alpha=0.5", "--base-steps=1")
    assert text.negative == "ugly"
    shown = {key: value for key, value in text.values.items() if key.startswith(("NAG", "Base", "Guidance"))}
    assert shown == {"NAG scale": "4", "NAG tau": "2.5", "NAG alpha": "0.5", "Base steps": "1"}
    assert "guidance 0, NAG 4, base alone in step 1, eta" in capsys.readouterr().err
    pipe = Pipeline.from_pretrained(model)
    pipe.load_lora(loras[0])
    again = sampled_again(pipe, text, nag_scale=4.0, nag_alpha=0.5, base_steps=(1, 1))
    assert np.abs(again.astype(int) - np.asarray(Image.open(tmp_path / "nag.png"))).max() <= 1
    (text,) = sampled(tmp_path / "by.png", *arguments, "--guidance=3", "--guidance-steps=2-")
    assert (text.values["Guidance steps"], text.values["CFG scale"], text.negative) == ("2-", "3", "ugly")
    assert "guidance 3 in steps 2-, eta" in capsys.readouterr().err


def test_a_start_image_and_a_mask(tmp_path: Path, model: Path) -> None:
    rng = np.random.default_rng(0)
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(start)
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(mask)
    arguments = ["--model", str(model), "--prompt=a cat", "--steps=5", "--guidance=0", "--image", str(start)]
    (text,) = sampled(tmp_path / "img.png", *arguments)
    assert text.values["Denoising strength"] == "0.8"
    assert text.values["Steps"] == "5"
    again = sampled_again(Pipeline.from_pretrained(model), text, image=start, strength=0.8)
    assert np.abs(again.astype(int) - np.asarray(Image.open(tmp_path / "img.png"))).max() <= 1
    (text,) = sampled(tmp_path / "painted.png", *arguments, "--mask", str(mask))
    assert text.values["Denoising strength"] == "1"


def test_other_parts_are_named(tmp_path: Path, model: Path) -> None:
    latents = tmp_path / "start.npy"
    np.save(latents, np.zeros((1, 8, 8, 4), np.float32))
    arguments = ["--model", str(model), "--prompt=a cat", "--steps=1", "--guidance=0", "--long-prompts=chunk"]
    (text,) = sampled(tmp_path / "out.png", *arguments, "--vae", str(model / "vae"), "--latents", str(latents))
    shown = [text.values[key] for key in ("VAE", "Latents", "Long prompts")]
    assert shown == ["vae", str(latents), "chunk"]
    assert "Denoising strength" not in text.values


def test_a_style_after_a_fast_lora_leaves_its_settings(
    tmp_path: Path, model: Path, loras: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fast, style = loras
    foreign = tmp_path / "foreign.safetensors"
    header = {"steps": "1500 / 3000", "sampler": "prodigy", "guidance": "none", "timesteps": "uniform", "eta": "auto"}
    save_file(load_file(style), foreign, {"format": "pt", "ss_network_dim": "4", **header})
    given = ["--lora", str(fast), "--lora", f"{style}@0.25", "--lora", f"{foreign}@0.25"]
    (text,) = sampled(tmp_path / "out.png", "--model", str(model), "--prompt=a cat", *given)
    assert [text.values[key] for key in ("Steps", "Sampler", "Eta", "CFG scale")] == ["2", "TCD", "0.4", "1"]
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out.png'}\n"
    used = "sampled with model tiny-model, LoRA fast@1 + style@0.25 + foreign@0.25, tcd, 2 steps, guidance 0, eta 0.4, "
    assert f"{used}seed 0, 16x16, 1 image in " in printed.err
    # A call that gives its settings is not stopped by another program's header.
    call = ["--steps=1", "--guidance=0", "--sampler=lcm", "--lora", str(foreign)]
    (text,) = sampled(tmp_path / "own.png", "--model", str(model), "--prompt=a cat", *call)
    assert [text.values[key] for key in ("Steps", "Sampler")] == ["1", "LCM"]


@pytest.mark.filterwarnings("default:the")
def test_rare_characters_are_counted_in_tokens(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model's encoder reads 22 tokens; each of these characters is three."""
    han = "".join(chr(0x4E05 + 37 * i) for i in range(9))
    call = [
        "sample",
        "--model",
        str(model),
        "--prompt",
        han,
        "--negative-prompt",
        f"{han}x",
        "--steps=1",
        "--guidance=2",
    ]
    main([*call, "--output", str(tmp_path / "cut.png")])
    found = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
    assert found == [
        f"hypersd: warning: the prompt is longer than 22 tokens; ignored: {han[7:]!r}",
        f"hypersd: warning: the negative prompt is longer than 22 tokens; ignored: {han[7:] + 'x'!r}",
    ]
    main([*call, "--long-prompts=chunk", "--output", str(tmp_path / "chunk.png")])
    assert "longer than" not in capsys.readouterr().err
    cut, chunk = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("cut", "chunk"))
    assert np.any(cut != chunk)


@pytest.fixture
def one_breaks(tmp_path: Path) -> Path:
    """Latents of three images, of which the second overflows where its noise is scaled."""
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
    latents[1] = 1e38
    np.save(tmp_path / "latents.npy", latents)
    return tmp_path / "latents.npy"


def test_an_image_that_is_not_finite_is_not_saved(
    tmp_path: Path, model: Path, one_breaks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "images" / "out.png"
    call = ["--model", str(model), "--prompt=a cat", "--num-images=3", "--steps=1", "--guidance=0"]
    with pytest.raises(SystemExit) as stop:
        main(["sample", *call, "--latents", str(one_breaks), "--output", str(output)])
    assert stop.value.code == 2
    saved = [output.with_name(f"out-{index:03d}.png") for index in (0, 2)]
    assert sorted(output.parent.iterdir()) == saved
    printed = capsys.readouterr()
    assert printed.out.split() == [str(path) for path in saved]
    assert printed.err.splitlines()[-1].startswith("hypersd: of 3 images 2 is not finite (NaN or infinity): ")
    assert [parse(text_of(path)).values["Image"] for path in saved] == ["0.0", "0.2"]

    alone = tmp_path / "alone.png"
    shapes = unet(UNetConfig.from_dict(UNET), dtype=jnp.float32).shapes
    write_lora(tmp_path / "wild.safetensors", {"unet": random_adapter(shapes, 0)})
    with pytest.raises(SystemExit):
        main(
            [
                "sample",
                *call[:2],
                *call[3:],
                "--lora",
                f"{tmp_path / 'wild.safetensors'}@1e30",
                "--prompt=x",
                "--output",
                str(alone),
            ]
        )
    assert not alone.exists()
    assert "hypersd: of 3 images 1, 2, 3 are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["pil", "np", "latent"])
def test_python_warns_of_an_image_that_is_not_finite(model: Path, one_breaks: Path, output: str) -> None:
    pipe = Pipeline.from_pretrained(model)
    call = {"steps": 1, "guidance": 0.0, "num_images": 3, "latents": np.load(one_breaks), "output": output}
    with pytest.warns(NotFiniteWarning, match="of 3 images 2 is not finite"):
        images = pipe("a cat", **call)
    assert len(images) == 3
    if output == "np":
        assert np.isfinite(images).all(axis=(1, 2, 3)).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors@-0.5", "a.safetensors", -0.5),
        ("owner/name", "owner/name", 1.0),
        ("owner/name@0.5", "owner/name", 0.5),
        ("owner/name@main", "owner/name@main", 1.0),
        ("owner/name@main@0.5", "owner/name@main", 0.5),
        ("owner/name@main/x.safetensors", "owner/name@main/x.safetensors", 1.0),
        ("owner/name@main/x.safetensors@0.5", "owner/name@main/x.safetensors", 0.5),
    ],
)
def test_a_scale_and_a_revision_are_told_apart(text: str, file: str, scale: float) -> None:
    assert parse_lora(text) == (Path(file), scale)


@pytest.mark.parametrize(
    "text",
    [
        "a.safetensors@high",
        "loras/a.safetensors@high",
        "owner/name@main@high",
        "owner/name@main/x.safetensors@high",
    ],
)
def test_a_scale_that_is_no_number(text: str) -> None:
    with pytest.raises(UserError, match=r"--lora .*: the scale 'high' is not a number"):
        parse_lora(text)


def test_a_lora_by_name(tmp_path: Path, model: Path, loras: tuple[Path, Path]) -> None:
    fast, _ = loras
    given = ["--model", str(model), "--prompt=a cat", "--lora", "fast@0.5", "--lora-dir", str(fast.parents[1])]
    (text,) = sampled(tmp_path / "out.png", *given)
    assert text.loras == [("fast", 0.5)]
    assert text.values["Lora hashes"] == f"fast: {lora_hash(fast)}"


def test_new_images_overwrite_none(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default and in a folder; a file that is named is written, whatever was there."""
    monkeypatch.chdir(tmp_path)
    call = ["sample", "--model", str(model), "--prompt=a cat", "--steps=1", "--guidance=0"]

    def written(*more: str) -> list[str]:
        main([*call, *more])
        return capsys.readouterr().out.split()

    assert written() == ["sample.png"]
    first = Path("sample.png").read_bytes()
    assert written("--seed=1") == ["sample-000.png"]
    assert written("--num-images=2") == ["sample-001.png", "sample-002.png"]
    assert Path("sample.png").read_bytes() == first
    assert written("--seed=1", "--overwrite") == ["sample.png"]
    assert Path("sample.png").read_bytes() != first
    assert written("--output=images/") == ["images/sample-000.png"]
    assert written("--output=images", "--num-images=2") == ["images/sample-001.png", "images/sample-002.png"]
    assert written("--output=images", "--overwrite") == ["images/sample-000.png"]
    assert written("--output=named.png") == written("--output=named.png") == ["named.png"]
    assert sorted(path.name for path in Path().glob("named*")) == ["named.png"]


def test_a_random_seed_is_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["--model", str(model), "--prompt=a cat", "--steps=1", "--guidance=0"]
    seeds = []
    for name in ("one", "two"):
        (text,) = sampled(tmp_path / f"{name}.png", *call, "--seed=random")
        assert f", seed {text.values['Seed']}, " in capsys.readouterr().err
        seeds.append(text.values["Seed"])
    assert len(set(seeds)) == 2
    sampled(tmp_path / "again.png", *call, f"--seed={seeds[1]}")
    again, two = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("again", "two"))
    np.testing.assert_array_equal(again, two)
