"""Bad input at the shell: what each kind prints, and its exit status, as a table.

python benchmarks/bad_input.py      # writes benchmarks/results/bad_input.md
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "hypersd_jax" / "assets" / "teacher"
RESULT = ROOT / "benchmarks" / "results" / "bad_input.md"
UNET = "unet/diffusion_pytorch_model.safetensors"


def model(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A copy of the embedded model, damaged, as ``--model``."""

    def make(folder: Path) -> list[str]:
        copy = folder / "model"
        shutil.copytree(TEACHER, copy)
        change(copy)
        return ["sample.py", "--model", str(copy), "--prompt", "red apple"]

    return make


def lora(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], list[str]]:
    """A small LoRA, damaged, as ``--lora``."""

    def make(folder: Path) -> list[str]:
        name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {
            f"{name}.lora_down.weight": np.ones((4, 128), np.float32),
            f"{name}.lora_up.weight": np.ones((128, 4), np.float32),
            f"{name}.alpha": np.asarray(4.0, np.float32),
        }
        change(tensors)
        save_file(tensors, folder / "lora.safetensors")
        return ["sample.py", "--lora", str(folder / "lora.safetensors")]

    return make


def edit_json(name: str, **values: object) -> Callable[[Path], object]:
    """Set keys of a JSON file of the model."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def edit_tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    """Change the tensors of a file of the model."""

    def run(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return run


def write(name: str, content: bytes) -> Callable[[Path], object]:
    """Replace a file of the model."""
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / UNET
    path.write_bytes(path.read_bytes()[:100_000])


def pickled(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def rename_key(tensors: dict[str, np.ndarray]) -> None:
    tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3]


def poison(tensors: dict[str, np.ndarray]) -> None:
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan


def drop_up(tensors: dict[str, np.ndarray]) -> None:
    tensors.pop(next(key for key in tensors if "lora_up" in key))


def unknown_module(tensors: dict[str, np.ndarray]) -> None:
    for key in list(tensors):
        tensors[key.replace("down_blocks_1", "down_blocks_7")] = tensors.pop(key)


def wrong_width(tensors: dict[str, np.ndarray]) -> None:
    key = next(key for key in tensors if "lora_down" in key)
    tensors[key] = np.ones((4, 320), np.float32)


def nan_factor(tensors: dict[str, np.ndarray]) -> None:
    tensors[next(key for key in tensors if "lora_down" in key)][0, 0] = np.nan


def loha(tensors: dict[str, np.ndarray]) -> None:
    tensors["lora_unet_conv_in.hada_w1_a"] = np.ones((4, 4), np.float32)


def latents(folder: Path) -> list[str]:
    np.save(folder / "latents.npy", np.zeros((1, 8, 8, 4), np.float32))
    return ["sample.py", "--latents", str(folder / "latents.npy"), "--prompt", "red apple"]


def other_run(folder: Path) -> list[str]:
    out = folder / "out"
    out.mkdir()
    recipe = (ROOT / "configs" / "emoji.yaml").read_text()
    (out / "config.yaml").write_text(recipe.replace("seed: 0", "seed: 1"))
    return ["train.py", f"output_dir={out}"]


def empty_folder(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    return ["train.py", f"output_dir={folder / 'out'}", f"data={folder / 'images'}"]


def dataset(files: dict[str, bytes], *more: str, source: str = "") -> Callable[[Path], list[str]]:
    """A dataset of these files, each with its image, as ``data``; ``source`` names one of them."""

    def make(folder: Path) -> list[str]:
        for name, content in files.items():
            path = folder / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            Image.new("RGB", (64, 64), "red").save(path.with_name("a.png"))
        return ["train.py", f"output_dir={folder / 'out'}", f"data={folder / 'set' / source}", *more]

    return make


def recipe(*lines: str) -> Callable[[Path], list[str]]:
    """The default recipe with lines added, as ``--config``."""

    def make(folder: Path) -> list[str]:
        text = (ROOT / "configs" / "emoji.yaml").read_text()
        (folder / "recipe.yaml").write_text("\n".join([text, *lines, ""]))
        return ["train.py", "--config", str(folder / "recipe.yaml"), f"output_dir={folder / 'out'}"]

    return make


def given(option: str, name: str, content: bytes, *more: str) -> Callable[[Path], list[str]]:
    """A file as an option of ``sample.py``."""

    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["sample.py", option, str(folder / name), *more, "--output", str(folder / "out" / "x.png")]

    return make


def floating_mask(folder: Path) -> list[str]:
    Image.new("RGB", (64, 64), "red").save(folder / "image.png")
    Image.new("F", (64, 64), 0.5).save(folder / "mask.tiff")
    options = ["--image", str(folder / "image.png"), "--mask", str(folder / "mask.tiff")]
    return ["sample.py", "--prompt", "lion", *options, "--output", str(folder / "out" / "x.png")]


def few_real_images(folder: Path) -> list[str]:
    (folder / "real").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "real" / "a.png")
    return [
        "-m",
        "hypersd_jax",
        "evaluate",
        "--n",
        "3",
        "--reference",
        str(folder / "real"),
        "--output",
        str(folder / "out"),
    ]


def lora_of_no_family(folder: Path) -> list[str]:
    lora(lambda tensors: None)(folder)
    return [
        "-m",
        "hypersd_jax",
        "convert",
        "lora",
        str(folder / "lora.safetensors"),
        str(folder / "x.safetensors"),
        "--to",
        "peft",
    ]


def plain(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(arguments)


CAFE = '{"file_name": "a.png", "text": "café"}'
LONG_HEADER = struct.pack("<Q", 2**40) + b"{}"
CASES: dict[str, Callable[[Path], list[str]]] = {
    "no such model folder": plain("sample.py", "--model", "nowhere", "--prompt", "x"),
    "a folder that is no model": plain("sample.py", "--model", "configs", "--prompt", "x"),
    "broken JSON": model(write("unet/config.json", b"{oops")),
    "another pipeline class": model(edit_json("model_index.json", _class_name="FluxPipeline")),
    "unsupported UNet option": model(edit_json("unet/config.json", class_embed_type="timestep")),
    "unknown block type": model(edit_json("unet/config.json", mid_block_type="UNetMidBlockX")),
    "an inpainting UNet": model(edit_json("unet/config.json", in_channels=9)),
    "a text encoder of another width": model(edit_json("unet/config.json", cross_attention_dim=768)),
    "null where a number belongs": model(edit_json("vae/config.json", scaling_factor=None)),
    "betas above 1": model(edit_json("scheduler/scheduler_config.json", beta_end=2.0)),
    "unsupported scheduler option": model(edit_json("scheduler/scheduler_config.json", thresholding=True)),
    "truncated weights": model(truncate),
    "weights with an absurd header": model(write(UNET, LONG_HEADER)),
    "a Git LFS pointer": model(write(UNET, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
    "pickled weights only": model(pickled),
    "a missing and an extra tensor": model(edit_tensors(UNET, rename_key)),
    "a tensor of another shape": model(edit_tensors(UNET, reshape)),
    "NaN in the weights": model(edit_tensors(UNET, poison)),
    "no tokenizer": model(lambda folder: shutil.rmtree(folder / "tokenizer")),
    "no such LoRA": plain("sample.py", "--lora", "nothing.safetensors"),
    "a LoRA scale that is no number": plain("sample.py", "--lora", "nothing.safetensors@big"),
    "a LoRA without its up factor": lora(drop_up),
    "a LoRA for another model": lora(unknown_module),
    "a LoRA of another width": lora(wrong_width),
    "NaN in a LoRA": lora(nan_factor),
    "a LoHa file": lora(loha),
    "an unknown sampler": plain("sample.py", "--sampler", "dimm"),
    "zero steps": plain("sample.py", "--steps", "0"),
    "more steps than the TCD grid": plain("sample.py", "--sampler", "tcd", "--steps", "51"),
    "endless guidance": plain("sample.py", "--guidance", "inf"),
    "steps that are not those of the timesteps": plain("sample.py", "--steps", "4", "--timesteps", "999,500"),
    "timesteps that ascend": plain("sample.py", "--timesteps", "100,200"),
    "latents of another shape": latents,
    "an odd height": plain("sample.py", "--height", "65"),
    "an unknown preset": plain("sample.py", "--preset", "hyper-sd15-4step"),
    "an output that is no image": plain("sample.py", "--output", "apple.txt"),
    "an unknown option": plain("sample.py", "--stepps", "4"),
    "no such recipe": plain("train.py", "--config", "configs/emojy.yaml"),
    "an unknown key": plain("train.py", "stages.0.learning_rat=1"),
    "a value of another type": plain("train.py", "stages.0.updates=many"),
    "an N that does not divide 1000": plain("train.py", "stages.3.solver_steps=48", "output_dir=OUT"),
    "noise for a sampler without it": plain("train.py", "stages.3.sampler=lcm", "stages.3.eta=1", "output_dir=OUT"),
    "an uneven batch": plain("train.py", "stages.1.accumulate=3", "output_dir=OUT"),
    "a k that does not divide N": plain("train.py", "stages.0.k=3"),
    "an output folder of another run": other_run,
    "an empty image folder": empty_folder,
    "a metadata.jsonl that is not UTF-8": dataset({"metadata.jsonl": CAFE.encode("cp1252")}),
    "a csv with a comma too many": dataset({"metadata.csv": b"file_name,text\na.png,one, two\n"}),
    "a csv with a quote that does not end": dataset({"metadata.csv": b'file_name,text\na.png,"one\n'}),
    "a csv with a column twice": dataset({"metadata.csv": b"text,text\na.png,one\n"}),
    "captions in UTF-16 alone": dataset({"a.txt": "one".encode("utf-16")}),
    "a folder of another split alone": dataset({"val/a.txt": b"one"}),
    "a parquet file that is none": dataset({"a.parquet": b"PAR1"}, source="a.parquet"),
    "a pattern that matches nothing": dataset({"a.txt": b"one"}, source="*.parquet"),
    "a split that is not there": dataset({"a.txt": b"one"}, "data.split=valid"),
    "a key given twice": recipe("seed: 1", "seed: 2"),
    "a time for a number": plain("train.py", "stages.0.updates=1:30", "output_dir=OUT"),
    "a yes for true": plain("train.py", "log.tensorboard=yes", "output_dir=OUT"),
    "an endless learning rate": plain("train.py", "stages.*.learning_rate=inf", "output_dir=OUT"),
    "a key without its stage": plain("train.py", "lr=1e-4", "output_dir=OUT"),
    "an option for a key": plain("train.py", "--seed", "3", "output_dir=OUT"),
    "a recipe without --config": plain("train.py", "configs/emoji.yaml", "output_dir=OUT"),
    "a prompts file that is not UTF-8": given("--prompts-file", "prompts.txt", "café\n".encode("utf-16")),
    "a prompts file without a prompt": given("--prompts-file", "prompts.txt", b"\n \n"),
    "an image that is none": given("--image", "a.png", b"no image", "--prompt", "lion"),
    "no such image": plain("sample.py", "--prompt", "lion", "--image", "nowhere.png"),
    "a mask of floating-point pixels": floating_mask,
    "an empty LoRA folder": lambda folder: ["sample.py", "--lora", str(folder)],
    "an empty model folder": lambda folder: ["sample.py", "--model", str(folder), "--prompt", "x"],
    "too few real images": few_real_images,
    "a LoRA of no known family": lora_of_no_family,
    "an option of no command": plain("-m", "hypersd_jax", "trainn"),
    "a mesh of more devices than there are": plain("train.py", "mesh.fsdp=7", "output_dir=OUT"),
    "converting what is no LoRA": plain("-m", "hypersd_jax", "convert", "lora", "README.md", "x.st", "--to", "kohya"),
}


def main() -> None:
    rows = ["| kind | printed | exit status |", "|---|---|---|"]
    wrong = 0
    for kind, make in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [argument.replace("OUT", f"{name}/out") for argument in make(folder)]
            before = set(ROOT.iterdir())
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
            text = done.stderr.strip().replace(name, "TMP").replace(str(ROOT), "ROOT")
            clean = done.returncode == 2 and "\n" not in text and set(ROOT.iterdir()) == before
            wrong += not clean
            rows.append(f"| {kind} | `{text.replace('|', '/')}` | {done.returncode} |")
            print("ok " if clean else "BAD", kind, "|", text, flush=True)
    RESULT.write_text("# Bad input at the shell\n\n" + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(CASES)} kinds, {wrong} wrong; {RESULT}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
