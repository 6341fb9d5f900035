"""Several LoRAs on one model: their names, and what those change that are not pairs of factors."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from hypersd_jax.pipeline.lora_stack import LoraStack, Params
from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora import write_lora
from tests.helpers.configs import TINY
from tests.helpers.lora_files import random_adapter
from tests.helpers.lora_kinds import ours, random_kind

SHAPES = adaptable_shapes(TINY)
TO_K, TO_V = (f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{name}" for name in "kv")
FC = "text_model.encoder.layers.0.mlp.fc1"


def test_files_of_one_name_in_two_folders_are_both_kept(tmp_path: Path) -> None:
    files = [tmp_path / folder / "pytorch_lora_weights.safetensors" for folder in "ab"]
    for seed, file in enumerate(files):
        write_lora(file, {"unet": random_adapter(SHAPES["unet"], seed)}, layout="kohya", dtype=np.float32)
    stack = LoraStack(SHAPES)
    for file in (*files, files[0]):  # the third is the first again, which it replaces
        stack.load(file, 1.0, None)
    path, entry = next(iter(stack.adapters()["unet"].items()))
    rank = random_adapter(SHAPES["unet"], 0)[path]["scale"].shape[0]
    assert np.count_nonzero(np.asarray(entry["scale"])) == 2 * rank
    stack.remove("pytorch_lora_weights-2")
    stack.set_scale("pytorch_lora_weights", 0.5)


@pytest.fixture
def params() -> Params:
    rng = np.random.default_rng(0)
    return {
        name: {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in shapes.items()}
        for name, shapes in SHAPES.items()
    }


def lokr_file(path: Path, modules: dict[str, str], seed: int) -> dict[str, np.ndarray]:
    """Writes a LoKr of modules ``{kohya's name: our path}`` and returns its changes in our layout."""
    tensors, changes = {}, {}
    for name, module in modules.items():
        component = "unet" if name.startswith("lora_unet") else "text_encoder"
        found, change = random_kind("LoKr whole pair", SHAPES[component][f"{module}.kernel"].shape[::-1], seed)
        tensors |= {f"{name}.{suffix}": value for suffix, value in found.items()}
        changes[module] = ours(change)
    save_file(tensors, path)
    return changes


def unet_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def test_pairs_of_factors_leave_the_weights_alone(tmp_path: Path, params: Params) -> None:
    write_lora(tmp_path / "a.safetensors", {"unet": random_adapter(SHAPES["unet"], 0)})
    stack = LoraStack(SHAPES)
    assert stack.altered(params) is params
    stack.load(tmp_path / "a.safetensors", 1.0, None)
    assert stack.altered(params) is params


def test_differences_follow_the_scales_and_leave_no_trace(tmp_path: Path, params: Params) -> None:
    before = {path: np.array(value) for path, value in params["unet"].items()}
    first = lokr_file(tmp_path / "a.safetensors", {unet_name(TO_K): TO_K, unet_name(TO_V): TO_V}, 1)
    second = lokr_file(tmp_path / "b.safetensors", {unet_name(TO_K): TO_K, "lora_te_" + FC.replace(".", "_"): FC}, 2)
    stack = LoraStack(SHAPES)
    stack.load(tmp_path / "a.safetensors", 0.5, None)
    stack.load(tmp_path / "b.safetensors", -1.0, None)
    for scale in (0.5, 0.25):
        stack.set_scale("a", scale)
        altered = stack.altered(params)
        for component, module, change in (
            ("unet", TO_K, scale * first[TO_K] - second[TO_K]),
            ("unet", TO_V, scale * first[TO_V]),
            ("text_encoder", FC, -second[FC]),
        ):
            name = f"{module}.kernel"
            np.testing.assert_allclose(altered[component][name], params[component][name] + change, rtol=0, atol=1e-5)
        assert sum(altered["unet"][path] is not params["unet"][path] for path in params["unet"]) == 2
        assert stack.altered(params) is altered  # once, not at every call
    stack.remove("a")
    assert stack.altered(params)["unet"][f"{TO_V}.kernel"] is params["unet"][f"{TO_V}.kernel"]
    stack.remove(None)
    assert stack.altered(params) is params
    for path, value in params["unet"].items():
        np.testing.assert_array_equal(value, before[path])


def test_a_file_of_both_sorts_goes_both_ways(tmp_path: Path, params: Params) -> None:
    factors, _ = random_kind("LoRA", SHAPES["unet"][f"{TO_V}.kernel"].shape[::-1], 3)
    lokr, change = random_kind("LoKr whole pair", SHAPES["unet"][f"{TO_K}.kernel"].shape[::-1], 3)
    tensors = {f"{unet_name(TO_V)}.{name}": value for name, value in factors.items()}
    save_file(tensors | {f"{unet_name(TO_K)}.{n}": value for n, value in lokr.items()}, tmp_path / "a.safetensors")
    stack = LoraStack(SHAPES)
    report = stack.load(tmp_path / "a.safetensors", 0.3, None)
    assert report.modules == {"unet": 2}
    assert stack.adapters()["unet"].keys() == {TO_V}
    name = f"{TO_K}.kernel"
    expected = params["unet"][name] + np.float32(0.3) * ours(change)
    np.testing.assert_allclose(stack.altered(params)["unet"][name], expected, rtol=0, atol=1e-6)


def test_another_base_is_altered_for_itself(tmp_path: Path, params: Params) -> None:
    lokr_file(tmp_path / "a.safetensors", {unet_name(TO_K): TO_K}, 1)
    stack = LoraStack(SHAPES)
    stack.load(tmp_path / "a.safetensors", 1.0, None)
    name = f"{TO_K}.kernel"
    other = {**params, "unet": {**params["unet"], name: params["unet"][name] + 1}}
    change = stack.altered(params)["unet"][name] - params["unet"][name]
    np.testing.assert_allclose(stack.altered(other)["unet"][name], other["unet"][name] + change, rtol=0, atol=1e-5)
