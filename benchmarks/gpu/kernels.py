"""Which kernels a compiled program runs, and what its attention costs, read from XLA's own text of it."""

from __future__ import annotations

import math
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

GROUPS = {
    "cuDNN attention": re.compile(r"__cudnn\$fmha"),
    "cuDNN convolution": re.compile(r"__cudnn\$(conv|fusion)"),
    "cuBLAS product": re.compile(r"__cublas\$"),
    "Triton product": re.compile(r"__triton_.*gemm|__triton_gemm"),
    "Triton, other": re.compile(r"__triton"),
    "oneDNN": re.compile(r"__onednn\$"),
    "XLA's own product": re.compile(r"^(convolution|dot)$"),
    "fusion": re.compile(r"^fusion "),
}
"""Name and pattern of each group of kernels, the first that matches; a ``fusion`` is code that XLA generates."""
OTHER = "other"

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_KIND = re.compile(r'"kind":"(__[^"]+)"')
_FUSION = re.compile(r" fusion\(.*kind=(\w+)")
_CALLS = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_PLAIN = re.compile(r" = [^=]*? (convolution|dot)\(")
_SHAPE = re.compile(r"\b(?:bf16|f16)\[([\d,]+)\]")
# Forward there are two products; backward the weights again and a product for each of four gradients.
_FORWARD, _BACKWARD = 2, 5


def count_kernels(text: str) -> dict[str, int]:
    """Count the kernels of a compiled program by their names in its HLO: library calls, fusions by kind, the rest."""
    fused = set(_CALLS.findall(text))
    found: Counter[str] = Counter()
    counted = True
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            counted = computation[1] not in fused  # what is within a fusion is no kernel of its own
        elif not counted:
            continue
        elif target := _TARGET.search(line):
            found[target[1]] += 1
        elif fusion := _FUSION.search(line):
            kind = _KIND.search(line)
            found[kind[1] if kind else f"fusion {fusion[1]}"] += 1
        elif plain := _PLAIN.search(line):
            found[plain[1]] += 1
    return dict(found)


def grouped(counts: Mapping[str, int]) -> dict[str, int]:
    """Sum kernels by group, in the order of `GROUPS`, and what is in none as `OTHER`."""
    found = dict.fromkeys([*GROUPS, OTHER], 0)
    for name, count in counts.items():
        group = next((group for group, pattern in GROUPS.items() if pattern.search(name)), OTHER)
        found[group] += count
    return found


def attention_flops(text: str) -> float:
    """Sum the FLOPs of cuDNN's attention calls, which XLA counts as nothing.

    Of self-attention, as only that goes to cuDNN here: queries and keys are as many. Results are (batch, heads, tokens,
    width).
    """
    total = 0.0
    for line in text.splitlines():
        target = _TARGET.search(line)
        shape = _SHAPE.search(line)
        if target is None or shape is None or not GROUPS["cuDNN attention"].search(target[1]):
            continue
        sizes = [int(size) for size in shape[1].split(",")]
        products = _BACKWARD if "Backward" in target[1] else _FORWARD
        total += products * 2.0 * math.prod(sizes) * sizes[-2]
    return total


def program_row(
    name: str, text: Callable[[], str], cost: Callable[[], Any], memory: Callable[[], Any]
) -> dict[str, Any]:
    """Describe a compiled program: kernels, FLOPs with those of attention, and the memory that XLA plans, in bytes.

    What this version of JAX does not say of it is None: the program is to run all the same.

    Args:
        name: of the program.
        text: returns its optimised HLO.
        cost: returns XLA's cost analysis.
        memory: returns XLA's memory analysis.
    """
    written, counted, planned = (_tried(each) for each in (text, cost, memory))
    hidden = attention_flops(written or "")
    known = counted is not None and "flops" in counted
    return {
        "program": name,
        "kernels": count_kernels(written or ""),
        "flops": float(counted["flops"]) + hidden if known else None,
        "attention flops": hidden,
        "plan": None
        if planned is None
        else {
            "arguments": planned.argument_size_in_bytes,
            "temporary": planned.temp_size_in_bytes,
            "new outputs": planned.output_size_in_bytes - planned.alias_size_in_bytes,
        },
    }


def live_programs(device: Any) -> dict[str, tuple[str, Any]]:
    """Return name and executable of each of the device's compiled programs by what tells it apart."""
    found = {}
    for each in _tried(lambda: device.client.live_executables()) or []:
        module = _tried(lambda each=each: each.hlo_modules()[0])
        if module is not None:
            found[f"{module.name} {each.fingerprint!r}"] = (module.name, each)
    return found


def _tried(ask: Callable[[], Any]) -> Any:
    """What a library says of a program; None, and a traceback in the log, where it fails."""
    try:
        return ask()
    except Exception:
        traceback.print_exc()
        return None
