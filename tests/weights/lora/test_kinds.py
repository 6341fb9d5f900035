"""LoHa, LoKr, DoRA, Tucker and full differences: what is read changes the weights as the published formulas say."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from hypersd_jax.adapters import altered, delta
from hypersd_jax.errors import UserError
from hypersd_jax.weights import read_lora
from hypersd_jax.weights.families import adaptable_shapes
from tests.helpers.configs import TINY
from tests.helpers.lora_kinds import ALPHA, KINDS, RANK, dora, is_for, ours, random_kind

SHAPES = adaptable_shapes(TINY)
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.1.resnets.0.conv1"
POINTWISE = "mid_block.attentions.0.proj_in"
NORM = "mid_block.resnets.0.norm1"
FC = "text_model.encoder.layers.1.mlp.fc1"

TIGHT = 1e-6
"""Largest error over the largest value of the change; float32 against float64, what is measured is 2e-7 or less."""


def torch_shape(component: str, module: str) -> tuple[int, ...]:
    *window, fan_in, fan_out = SHAPES[component][f"{module}.kernel"].shape
    return (fan_out, fan_in, *window)


def file_of(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return path


def keyed(name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.{suffix}": value for suffix, value in tensors.items()}


def kohya(module: str, component: str = "unet") -> str:
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + module.replace(".", "_")


def base_weight(component: str, module: str, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=torch_shape(component, module)).astype(np.float32)


def change_of(path: Path, component: str, module: str, weight: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """How a file changes one weight, adapters and differences together, in our layout."""
    loaded = read_lora(path, SHAPES)
    base = {f"{module}.kernel": jnp.asarray(ours(weight))}
    entries = loaded.differences.get(component, {})
    changed = altered(base, [({path: entries[path] for path in entries if path == module}, scale)])
    total = np.asarray(changed.get(f"{module}.kernel", base[f"{module}.kernel"]), np.float64) - ours(weight)
    if module in loaded.adapters.get(component, {}):
        total = total + scale * np.asarray(delta(loaded.adapters[component][module]), np.float64)
    return total


def assert_change(found: np.ndarray, expected: np.ndarray, tolerance: float = TIGHT) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


LYCORIS = {
    ("LoRA", 2): (0.749462, 0.0478715),
    ("LoHa", 2): (0.0978594, -0.0100031),
    ("LoKr whole whole", 2): (0.544045, 0.0839139),
    ("LoKr whole pair", 2): (0.1041, -0.0239615),
    ("LoKr pair whole", 2): (0.197095, 0.000286307),
    ("LoKr pair pair", 2): (0.0709274, 0.00311198),
    ("LoRA", 4): (3.62528, 0.100751),
    ("LoRA tucker", 4): (1.23426, -0.00627374),
    ("LoHa", 4): (0.336738, 0.00045167),
    ("LoHa tucker", 4): (0.10587, 2.37494e-05),
    ("LoKr whole whole", 4): (1.8185, 0.257982),
    ("LoKr whole pair", 4): (0.463707, 0.00729251),
    ("LoKr whole tucker", 4): (0.266073, -0.0329925),
    ("LoKr pair whole", 4): (0.556875, -0.00211429),
    ("LoKr pair pair", 4): (0.2811, 0.00250212),
    ("LoKr pair tucker", 4): (0.175432, -0.000914513),
}
"""Norm, and element [3, 5] or [3, 5, 1, 2], of what LyCORIS 4.1.3 (`lycoris.functional`) makes of `random_kind` with
seed 11 for a weight of (8, 12) or (8, 12, 3, 3)."""


@pytest.mark.parametrize(("kind", "rank"), LYCORIS)
def test_the_formulas_of_these_tests_are_lycoris_s(kind: str, rank: int) -> None:
    _, change = random_kind(kind, (8, 12) if rank == 2 else (8, 12, 3, 3), seed=11)
    norm, element = LYCORIS[kind, rank]
    assert np.linalg.norm(change) == pytest.approx(norm, rel=1e-5)
    assert change[(3, 5) if rank == 2 else (3, 5, 1, 2)] == pytest.approx(element, rel=1e-5)


PLACES = (("unet", LINEAR), ("unet", CONV), ("unet", POINTWISE), ("text_encoder", FC))


@pytest.mark.parametrize(
    ("kind", "component", "module"),
    [(kind, *place) for place in PLACES for kind in KINDS if is_for(kind, torch_shape(*place))],
)
def test_every_kind(tmp_path: Path, kind: str, component: str, module: str) -> None:
    shape = torch_shape(component, module)
    tensors, expected = random_kind(kind, shape, seed=3)
    file = file_of(tmp_path / "a.safetensors", keyed(kohya(module, component), tensors))
    zero = np.zeros(shape, np.float32)  # so that the change is all there is, to the last bit of its own size
    assert_change(change_of(file, component, module, zero), ours(expected))
    report = read_lora(file, SHAPES).report
    assert report.kinds == {kind.split()[0]: 1}
    assert report.layout == "kohya"
    has_rank = kind not in ("LoKr whole whole", "full")
    assert report.ranks == ((RANK, RANK) if has_rank else None)
    assert report.alphas == ((ALPHA, ALPHA) if has_rank else None)
    assert report.scales == pytest.approx((ALPHA / RANK,) * 2 if has_rank else (1, 1))


@pytest.mark.parametrize("per", ["output", "input", "output, flat"])
@pytest.mark.parametrize(
    ("kind", "module"),
    [
        *((kind, module) for kind in ("LoRA", "LoHa", "LoKr whole pair", "full") for module in (LINEAR, CONV)),
        ("LoRA tucker", CONV),
    ],
)
def test_dora_beside_any_kind(tmp_path: Path, kind: str, module: str, per: str) -> None:
    shape = torch_shape("unet", module)
    tensors, change = random_kind(kind, shape, seed=4)
    weight = base_weight("unet", module)
    axis = 1 if per == "input" else 0
    kept = tuple(length if i == axis else 1 for i, length in enumerate(shape))
    magnitude = np.random.default_rng(5).uniform(0.5, 3, size=kept).astype(np.float32)
    stored = magnitude.reshape(-1) if per == "output, flat" else magnitude
    file = file_of(tmp_path / "a.safetensors", keyed(kohya(module), tensors | {"dora_scale": stored}))
    expected = ours(dora(weight, change, magnitude) - weight)
    assert_change(change_of(file, "unet", module, weight), expected)
    # The user's scale goes straight from the base to the file's weights.
    assert_change(change_of(file, "unet", module, weight, scale=0.3), 0.3 * expected)
    loaded = read_lora(file, SHAPES)
    assert loaded.report.kinds == {f"{kind.split()[0]} with DoRA": 1}
    assert loaded.adapters == {}


def test_square_weights_have_dora_per_output_unless_the_shape_says_otherwise(tmp_path: Path) -> None:
    module = LINEAR.replace("to_k", "to_q")  # (16, 16)
    shape = torch_shape("unet", module)
    tensors, change = random_kind("LoRA", shape, seed=4)
    weight = base_weight("unet", module)
    for kept in ((shape[0], 1), (1, shape[1])):
        magnitude = np.random.default_rng(5).uniform(0.5, 3, size=kept).astype(np.float32)
        file = file_of(tmp_path / "a.safetensors", keyed(kohya(module), tensors | {"dora_scale": magnitude}))
        assert_change(change_of(file, "unet", module, weight), ours(dora(weight, change, magnitude) - weight))


def test_peft_s_magnitudes_are_per_output(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {}
    expected = {}
    for module in (LINEAR, CONV):
        shape = torch_shape("unet", module)
        parts, change = random_kind("LoRA", shape, seed=6)
        size = (1, shape[0], 1, 1) if len(shape) == 4 else (shape[0],)
        magnitude = np.random.default_rng(7).uniform(0.5, 3, size=size).astype(np.float32)
        tensors |= {
            f"unet.{module}.lora_A.weight": parts["lora_down.weight"],
            f"unet.{module}.lora_B.weight": parts["lora_up.weight"],
            f"unet.{module}.lora_magnitude_vector": magnitude,
        }
        weight = base_weight("unet", module)
        change = change * RANK / ALPHA  # PEFT without alpha: scale 1
        expected[module] = ours(dora(weight, change, magnitude.reshape(-1, *[1] * (len(shape) - 1))) - weight)
    file = file_of(tmp_path / "a.safetensors", tensors)
    for module, change in expected.items():
        assert_change(change_of(file, "unet", module, base_weight("unet", module)), change)


def test_biases_and_norms(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    factors, _ = random_kind("LoRA", torch_shape("unet", CONV), seed=1)
    width, norm = SHAPES["unet"][f"{CONV}.bias"].shape, SHAPES["unet"][f"{NORM}.scale"].shape
    new = {name: rng.normal(size=size).astype(np.float32) for name, size in (("b", width), ("w", norm), ("n", norm))}
    tensors = keyed(kohya(CONV), factors | {"diff_b": new["b"]}) | keyed(
        kohya(NORM), {"w_norm": new["w"], "b_norm": new["n"]}
    )
    loaded = read_lora(file_of(tmp_path / "a.safetensors", tensors), SHAPES)
    assert loaded.adapters["unet"].keys() == {CONV}
    names = (f"{CONV}.bias", f"{NORM}.scale", f"{NORM}.bias")
    base = {name: jnp.ones(SHAPES["unet"][name].shape) for name in names}
    changed = altered(base, [(loaded.differences["unet"], 0.5)])
    assert changed.keys() == set(names)
    for name, key in zip(names, ("b", "w", "n"), strict=True):
        np.testing.assert_allclose(changed[name], 1 + 0.5 * new[key], rtol=1e-6)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_mixed_kinds_in_one_file_under_either_prefix(tmp_path: Path, prefix: str) -> None:
    parts = {LINEAR: "LoKr pair pair", CONV: "LoHa tucker", POINTWISE: "LoRA"}
    tensors: dict[str, np.ndarray] = {}
    changes = {}
    for seed, (module, kind) in enumerate(parts.items()):
        found, changes[module] = random_kind(kind, torch_shape("unet", module), seed)
        tensors |= keyed(prefix + module.replace(".", "_"), found)
    file = file_of(tmp_path / "a.safetensors", tensors)
    for module, change in changes.items():
        assert_change(change_of(file, "unet", module, np.zeros(change.shape, np.float32)), ours(change))
    loaded = read_lora(file, SHAPES)
    assert loaded.report.kinds == {"LoHa": 1, "LoKr": 1, "LoRA": 1}
    assert loaded.adapters["unet"].keys() == {POINTWISE}
    assert str(loaded.report) == (
        f"{file}: kohya LoHa+LoKr+LoRA, 3 unet modules, rank 3, alpha 2 (scale 0.666667), float32"
    )


LOHA, _ = random_kind("LoHa", torch_shape("unet", LINEAR), 0)
LOKR, _ = random_kind("LoKr pair tucker", torch_shape("unet", CONV), 0)
LORA, _ = random_kind("LoRA tucker", torch_shape("unet", CONV), 0)
LINEAR_LORA, _ = random_kind("LoRA", torch_shape("unet", LINEAR), 0)
NAN = np.full((2, 4), np.nan, np.float32)

BAD = {
    "half a LoHa": (
        LINEAR,
        {k: v for k, v in LOHA.items() if k != "hada_w2_b"},
        "factor is missing beside .*hada_w1_a",
    ),
    "LoHa narrow": (LINEAR, LOHA | {"hada_w1_b": LOHA["hada_w1_b"][:, :-1]}, r"do not fit.*hada_w1_b \(3, 15\)"),
    "LoHa flat": (LINEAR, LOHA | {"hada_w1_b": LOHA["hada_w1_b"][0]}, "do not fit"),
    "LoKr without w1": (CONV, {k: v for k, v in LOKR.items() if "w1" not in k}, "factor is missing beside"),
    "LoKr of other taps": (CONV, LOKR | {"lokr_t2": LOKR["lokr_t2"][:, :, :2]}, r"do not fit.*lokr_t2 \(3, 3, 2, 3\)"),
    "LoKr of another size": (CONV, LOKR | {"lokr_w1_b": LOKR["lokr_w1_b"][:, :3]}, "do not fit"),
    "LoKr ranks disagree": (CONV, LOKR | {"lokr_w1_a": LOKR["lokr_w1_a"][:, :2]}, "do not fit"),
    "LoKr is NaN": (CONV, LOKR | {"lokr_w1_b": NAN[:1].repeat(3, 0)}, "NaN or infinite values in .*lokr_w1_b"),
    "Tucker rank": (CONV, LORA | {"lora_mid.weight": LORA["lora_mid.weight"][:2]}, r"do not fit.*\(2, 3, 3, 3\)"),
    "Tucker on a Linear": (LINEAR, LINEAR_LORA | {"lora_mid.weight": np.ones((3, 3), np.float32)}, "do not fit"),
    "two kinds": (LINEAR, LINEAR_LORA | LOHA, "factors of several kinds: .*hada_w2_b, .*lora_up"),
    "magnitude alone": (LINEAR, {"dora_scale": np.ones((16, 1), np.float32)}, "factor is missing beside .*dora_scale"),
    "magnitude of another size": (LINEAR, LINEAR_LORA | {"dora_scale": np.ones((1, 7), np.float32)}, "do not fit"),
    "full of another shape": (LINEAR, {"diff": np.ones((4, 4), np.float32)}, r"do not fit.*diff \(4, 4\)"),
    "bias where there is none": (LINEAR, {"diff_b": np.ones(16, np.float32)}, "do not fit.*diff_b"),
    "bias of another size": (CONV, {"diff_b": np.ones(3, np.float32)}, r"do not fit.*diff_b \(3,\)"),
    "LoRA on a norm": (NORM, LINEAR_LORA, "no such module.*norm1"),
    "GLoRA": (LINEAR, {"a1.weight": NAN, "b1.weight": NAN}, r"GLoRA files are not read here \(key .*a1\.weight\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_by_name(tmp_path: Path, case: str) -> None:
    module, tensors, message = BAD[case]
    file = file_of(tmp_path / "bad.safetensors", keyed(kohya(module), tensors))
    with pytest.raises(UserError, match=message) as raised:
        read_lora(file, SHAPES)
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)
