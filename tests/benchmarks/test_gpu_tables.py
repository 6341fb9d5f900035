"""What the benchmark on a GPU reads from compiled programs, and the tables of rows as a GPU would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.kernels import attention_flops, count_kernels, grouped, program_row
from benchmarks.gpu.peaks import mfu, peak_of
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.summary import summarise
from benchmarks.gpu.timing import WARM_UP, timed

# As XLA writes it for a GPU, shortened: convolutions and attention by cuDNN, products by cuBLAS and Triton.
HLO = """HloModule jit_predict, is_scheduled=true

%fused_computation (param_0: bf16[8,8]) -> bf16[8,8] {
  %param_0 = bf16[8,8]{1,0} parameter(0)
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%param_0, %param_0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_tanh (param_0.1: bf16[8,8]) -> bf16[8,8] {
  ROOT %tanh.1 = bf16[8,8]{1,0} tanh(%param_0.1)
}

ENTRY %main.1 (p: bf16[8,8]) -> bf16[8,8] {
  %conv = (bf16[1,64,64,320]{3,2,1,0}, u8[4]{0}) custom-call(%p, %p), custom_call_target="__cudnn$convBiasActivationForward"
  %fmha = (bf16[2,8,4096,40]{3,1,2,0}, u8[0]{0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"
  %back = (bf16[2,8,4096,40]{3,1,2,0}, bf16[2,8,4096,40]{3,1,2,0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %gemm = (bf16[8,8]{1,0}, s8[4]{0}) custom-call(%p, %p), custom_call_target="__cublas$lt$matmul"
  %fusion = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %fusion.1 = bf16[8,8]{1,0} fusion(%p), kind=kLoop, calls=%fused_tanh
  ROOT %dot.2 = bf16[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


def test_kernels_are_counted_by_name() -> None:
    counts = count_kernels(HLO)
    assert counts == {
        "__cudnn$convBiasActivationForward": 1,
        "__cudnn$fmhaSoftmax": 1,
        "__cudnn$fmhaSoftmaxBackward": 1,
        "__cublas$lt$matmul": 1,
        "__triton_gemm": 1,
        "fusion kLoop": 1,
        "dot": 1,  # and not the one within the fusion
    }
    assert {name: count for name, count in grouped({**counts, "AllReduce": 3}).items() if count} == {
        "cuDNN attention": 2,
        "cuDNN convolution": 1,
        "cuBLAS product": 1,
        "Triton product": 1,
        "XLA's own product": 1,
        "fusion": 1,
        "other": 3,
    }


def test_a_program_that_says_nothing_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    row = program_row("step", lambda: HLO, lambda: 1 / 0, lambda: None)
    assert (row["flops"], row["plan"]) == (None, None)
    assert row["kernels"] == count_kernels(HLO)
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert mfu(row["flops"], 1.0, "NVIDIA H200") is None


def test_attention_that_xla_does_not_count() -> None:
    one = 2.0 * 2 * 8 * 4096 * 4096 * 40  # of one product
    assert attention_flops(HLO) == (2 + 5) * one


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_peaks(device: str, peak: float | None) -> None:
    assert peak_of(device) == peak
    assert mfu(989.4e12, 2.0, "NVIDIA H200") == pytest.approx(0.5)
    assert mfu(1.0, 1.0, "cpu") is None


def test_the_first_calls_are_not_timed() -> None:
    calls: list[int] = []
    found = timed(lambda: calls.append(1), lambda: calls.append(2), repeats=3)
    assert calls == [1, 2] * (WARM_UP + 3)
    assert found["least"] <= found["median"] <= found["most"]


def rows(folder: Path) -> None:
    """What a GPU would leave; decoding at batch 8 did not fit, and the last image is PyTorch's alone."""
    times = {"first": 9.0, "least": 0.01, "most": 0.03}
    for side, seconds in (("this package", 0.02), ("diffusers", 0.04)):
        some = Rows(folder=folder, part="sd15")
        some.add("side", side=side, family="sd15", device="NVIDIA H200", versions={"x": "1"})
        some.add("sampling", side=side, family="sd15", batch=1, what="unet", median=seconds, peak=2**31, **times)
    some.add("sampling", side="this package", family="sd15", batch=8, what="decode", error="RESOURCE_EXHAUSTED")
    some.add("sampling", side="diffusers", family="sd15", batch=8, what="image, 1 step", median=0.5, peak=1, **times)
    step: dict[str, Any] = {"family": "sdxl", "case": "tscd", "batch": 1, "remat": True, "dtype": "bfloat16"}
    step |= {"rank": 64, "plan": {"arguments": 2**30, "temporary": 2**30}, "compile": 99.0, "compiled before": False}
    for device, reached in (("NVIDIA H200", 0.412), ("a new card", None)):
        Rows(folder=folder, part="sdxl-tscd-1").add(
            "training", **step, **times, median=0.25, flops=4e13, mfu=reached, peak=2**34, device=device
        )
    Rows(folder=folder, part="sd15").add(
        "program", family="sd15", program="UNet call, batch 1", kernels=count_kernels(HLO), flops=1e12, mfu=0.3
    )
    shape = {"where": "level 1", "queries": 4096, "keys": 4096, "heads": 8, "width": 40}
    seconds = {"forward": 0.001, "forward and backward": 0.002, "xla forward and backward": 0.008}
    errors = {"error": [0.1, 0.5], "xla error": [0.1, 0.2], "good": False}
    for found in (
        {"chosen": "cudnn", "fell back": True, "kernels": {"fusion": 3}, **errors, **seconds},
        {"failure": "cuDNN | is old"},
    ):
        Rows(folder=folder, part="attention").add("attention", **shape, **found)
    Rows(folder=folder, part="tests").add("test", test="test_values[unet]", outcome="failed", seconds=1.0, reason="0.2")
    Rows(folder=folder, part="tests").add("part", status="failed", seconds=61.0, reason="1 failed")


def test_the_page(tmp_path: Path) -> None:
    rows(tmp_path)
    summarise(tmp_path)
    page = (tmp_path / "README.md").read_text()
    for line in (
        "| tests | failed | 61 | 1 failed |",
        "| `test_values[unet]` | failed | 1.0 | 0.2 |",
        "| unet | 1 | 20 | 40 | 0.50 | 2.00 | 2.00 | 9.0 | 9.0 |  |",
        "| decode | 8 |  |  |  |  |  |  |  | RESOURCE_EXHAUSTED |",
        "| image, 1 step | 8 |  | 500 |  |  | 0.00 |  | 9.0 |  |",
        "| sdxl | tscd | 1 | yes | 250 | 40 | 41.2 % | 16.00 | 2.00 | 99 |",
        "has no published peak of a new card",
        "| sd15 | UNet call, batch 1 | 1 | 30.0 % | 2 | 1 | 1 | 1 | 1 | 1 |",
        "cudnn, **fell back to XLA's form** | 3 fusion | **no** | 5.0e-01 / 2.0e-01 | 1 | 2 | 8 |",
        "cuDNN \\| is old",
        "What it was measured on is not known",
    ):
        assert line in page
