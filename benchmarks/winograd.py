"""3x3 convolutions on a CPU: direct, Winograd F(2x2) and F(4x4), and PyTorch: ``python benchmarks/winograd.py OUT``.

Milliseconds, medians of calls taken in turn, forward and with the input's gradient; float32, frozen kernels. Writes
winograd.json and winograd.md into OUT. The shapes are those of SD 1.5 at 512 pixels, its autoencoder, SDXL and the
embedded model. With --unet, SD 1.5's whole UNet at 512 pixels instead, of random weights, as it is and prepared: a
call, or one with the gradient of a LoRA of rank 16 (unet_call.json, unet_gradient.json).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.model_configs import model_configs
from hypersd_jax.adapters import init, join, split
from hypersd_jax.models import UNetConfig, unet
from hypersd_jax.models.layers import convolve
from hypersd_jax.models.prepared import prepare
from hypersd_jax.models.winograd import convolve_tiles, transform

# batch, side, channels in, channels out
SHAPES = {
    "SD 1.5 UNet": [
        (1, 64, 320, 320),
        (1, 64, 640, 320),
        (1, 32, 640, 640),
        (1, 32, 1280, 640),
        (1, 16, 1280, 1280),
        (1, 16, 2560, 1280),
        (1, 8, 1280, 1280),
    ],
    "autoencoder": [(1, 64, 512, 512), (1, 128, 512, 512), (1, 256, 256, 256), (1, 512, 128, 128)],
    "SDXL UNet": [(1, 128, 320, 320), (1, 64, 640, 640), (1, 32, 1280, 1280)],
    "embedded": [(16, 16, 64, 64), (16, 8, 128, 128), (16, 4, 192, 192), (1, 16, 64, 64)],
}
PADS = ((1, 1), (1, 1))


def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as it is without Winograd."""
    return convolve(x, kernel, (1, 1), PADS, platform="cpu")


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Value and the input's gradient, for a given gradient of the output."""

    def both(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x: function(x, kernel), x)
        return y, pull(g)

    return both


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; all are taken once before the first is repeated."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def measure(batch: int, side: int, inputs: int, outputs: int, rounds: int) -> dict[str, Any]:
    """Time one shape, and state the errors of Winograd's against float64."""
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, side, side, inputs), np.float32)
    k = random.standard_normal((3, 3, inputs, outputs), np.float32) * np.float32((9 * inputs) ** -0.5)
    g = random.standard_normal((batch, side, side, outputs), np.float32)
    row: dict[str, Any] = {"batch": batch, "side": side, "in": inputs, "out": outputs}
    theirs = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    theirs = theirs.to(memory_format=torch.channels_last)
    weight = torch.from_numpy(np.ascontiguousarray(k.transpose(3, 2, 0, 1))).to(memory_format=torch.channels_last)
    cotangent = torch.from_numpy(np.ascontiguousarray(g.transpose(0, 3, 1, 2))).to(memory_format=torch.channels_last)

    def torch_forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.conv2d(theirs, weight, padding=1).numel()

    def torch_both() -> Any:
        leaf = theirs.detach().requires_grad_(True)
        y = torch.nn.functional.conv2d(leaf, weight, padding=1)
        return torch.autograd.grad(y, leaf, cotangent)[0].numel()

    x, k, g = jnp.asarray(x), jnp.asarray(k), jnp.asarray(g)
    forward: dict[str, Callable[[], Any]] = {"torch": torch_forward}
    both: dict[str, Callable[[], Any]] = {"torch": torch_both}
    compiles: dict[str, float] = {}
    for name, function, kernel in (
        ("direct", direct, k),
        *((f"F{m}", convolve_tiles, jax.jit(transform, static_argnums=1)(k, m)) for m in (2, 4)),
    ):
        run, pull = jax.jit(function), jax.jit(with_gradient(function))
        start = time.perf_counter()
        run.lower(x, kernel).compile()
        compiles[name] = round(time.perf_counter() - start, 2)
        forward[name] = lambda run=run, kernel=kernel: run(x, kernel)
        both[name] = lambda pull=pull, kernel=kernel: pull(x, kernel, g)
    row["forward"], row["both"] = in_turn(forward, rounds), in_turn(both, rounds)
    row["compile_s"] = compiles
    make = jax.jit(transform, static_argnums=1)
    row["transform"] = in_turn({f"F{m}": lambda m=m: make(k, m) for m in (2, 4)}, rounds)
    exact = np.asarray(forward["direct"](), np.float64)
    row["error"] = {
        name: float(np.linalg.norm(np.asarray(forward[name](), np.float64) - exact) / np.linalg.norm(exact))
        for name in ("F2", "F4")
    }
    row["gflop"] = round(2 * 9 * batch * side * side * inputs * outputs / 1e9, 3)
    return row


def whole_unet(rounds: int, *, gradient: bool) -> dict[str, Any]:
    """Time SD 1.5's UNet at 512 pixels, batch 1, with its own and with prepared parameters, and what that costs."""
    network = unet(UNetConfig.from_dict(dict(model_configs("sd15")["unet"])))
    params = network.init(0, gain=3**0.5)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, 64, 64, 4), np.float32))
    context = jnp.asarray(random.standard_normal((1, 77, 768), np.float32))
    start = time.perf_counter()
    added = jax.block_until_ready(prepare(params, 8, 2**40))
    found: dict[str, Any] = {"gradient": gradient, "prepare_s": round(time.perf_counter() - start, 2)}
    found |= {"kernels": len(added), "prepared_mb": round(sum(leaf.nbytes for leaf in added.values()) / 1e6)}
    factors, scales = split(init(jax.random.key(0), network.shapes, rank=16))
    factors = jax.tree.map(lambda leaf: leaf + 0.01, factors)

    def call(params: Any, factors: Any) -> Any:
        adapter = join(factors, scales) if gradient else None
        return network(params, x, jnp.asarray([500.0]), context, adapter=adapter)

    def step(params: Any, factors: Any) -> Any:
        return jax.grad(lambda factors: jnp.mean(call(params, factors) ** 2))(factors)

    calls: dict[str, Callable[[], Any]] = {}
    for name, weights in (("direct", params), ("prepared", {**params, **added})):
        start = time.perf_counter()
        run = jax.jit(step if gradient else call).lower(weights, factors).compile()
        found[name] = {"compile_s": round(time.perf_counter() - start, 1)}
        found[name]["temp_mb"] = round(run.memory_analysis().temp_size_in_bytes / 1e6)
        calls[name] = lambda run=run, weights=weights: run(weights, factors)
    one, other = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(run())]) for run in calls.values())
    found["difference"] = float(np.linalg.norm(other - one) / np.linalg.norm(one))
    for name, value in in_turn(calls, rounds).items():
        found[name]["ms"] = value
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    names = ("direct", "F2", "F4", "torch")
    lines = [
        "| model | batch, side, in, out | forward: "
        + " / ".join(names)
        + " | with input gradient | transform F2 / F4 |"
        " compile direct / F2 / F4, s | difference F2 / F4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['batch']}, {row['side']}, {row['in']}, {row['out']}"]
        cells += [" / ".join(f"{row[what][name]:.1f}" for name in names) for what in ("forward", "both")]
        cells += [" / ".join(f"{value:.1f}" for value in row["transform"].values())]
        cells += [" / ".join(f"{value:.2f}" for value in row["compile_s"].values())]
        cells += [" / ".join(f"{value:.0e}" for value in row["error"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--unet", nargs="?", const="call", choices=("call", "gradient"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.unet:
        text = json.dumps(whole_unet(options.rounds, gradient=options.unet == "gradient"), indent=1)
        (options.out / f"unet_{options.unet}.json").write_text(text + "\n")
        print(text)
        sys.exit()
    rows = []
    for model in options.models:
        for shape in SHAPES[model]:
            rows.append({"model": model, **measure(*shape, options.rounds)})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "cores": os.cpu_count()}
    (options.out / "winograd.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    head = f"Milliseconds, medians of {options.rounds} calls taken in turn, float32; {versions}\n\n"
    (options.out / "winograd.md").write_text(head + table(rows))
