"""One mutated input, loaded, and the verdict: refused in one sentence, loaded soundly, or wrong."""

from __future__ import annotations

import gc
import itertools
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import bases
from benchmarks.fuzz.json_mutations import flip, mutate_json
from benchmarks.fuzz.samples import Sample
from benchmarks.fuzz.weight_mutations import mutate_weights
from hypersd_jax.errors import UserError

SECONDS = 5.0
SLACK = 64 * 2**20
"""Memory that a load may take beside twice the input, in bytes."""

LONGEST = 4000
"""Characters of a refusal, beyond which it is no line to read."""


class Hang(BaseException):
    """Loading took longer than `SECONDS`; no library catches this by accident."""


@dataclass(frozen=True, kw_only=True)
class Mutated:
    """An input with one thing or two wrong."""

    sample: Sample
    number: int
    mutation: str
    changed: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of one load.

    Attributes:
        outcome: "refused", "loaded" or "wrong".
        reason: the refusal, or of what is wrong the kind, in one line.
        trace: of what is wrong.
        seconds: that loading took.
        memory: bytes at its peak beyond those in use before.
    """

    outcome: str
    reason: str
    trace: str
    seconds: float
    memory: int


def mutate(every: Sequence[Sample], seed: int, number: int, kind: str | None = None) -> Mutated:
    """Input `number` of a run; it depends on nothing but the arguments."""
    random = Random(f"{seed}/{number}")
    sample = random.choices(every, [one.weight for one in every])[0]
    if kind is not None:
        sample = next(one for one in every if one.kind == kind)
    changed: dict[str, bytes] = {}
    names = []
    for _ in range(random.choice((1, 1, 1, 1, 2))):
        path = random.choice(sorted(sample.files))
        content = changed.get(path, sample.files[path])
        # A second change needs something left of the first to work on.
        with suppress(*((Exception,) if path in changed else ())):
            name, changed[path] = _mutate_file(path, content, random)
            names.append(f"{path}: {name}")
    return Mutated(sample=sample, number=number, mutation="; ".join(names), changed=changed)


def _mutate_file(path: str, content: bytes, random: Random) -> tuple[str, bytes]:
    if path.endswith(".safetensors"):
        return mutate_weights(content, random)
    if path.endswith(".json"):
        return mutate_json(content, random)
    return "flipped", flip(content, random)


@contextmanager
def placed(mutated: Mutated, folder: Path) -> Iterator[Path]:
    """Put a mutated input into a folder that holds the sound sample, and the sound sample back afterwards."""
    try:
        bases.write(folder, mutated.changed)
        yield folder / mutated.sample.target
    finally:
        bases.write(folder, {path: mutated.sample.files[path] for path in mutated.changed})


def verdict_of(mutated: Mutated, path: Path) -> Verdict:
    """Load it, in this process."""
    size = sum(len(mutated.changed.get(name, content)) for name, content in mutated.sample.files.items())
    outcome, reason, trace = "loaded", "", ""
    before = _reset_peak()
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)  # again, for where an exception is lost, as in a callback
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mutated.sample.load(path)
    except UserError as error:
        outcome, reason = "refused", str(error)
        if not reason or len(reason) > LONGEST:
            outcome, reason, trace = "wrong", f"a refusal of {len(reason)} characters", reason[:LONGEST]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic inside a library written in Rust is no Exception
        outcome, reason, trace = "wrong", _signature(error), traceback.format_exc(limit=-20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - start
    memory = _peak() - before
    if outcome != "wrong" and memory > 2 * size + SLACK:
        outcome, reason = "wrong", f"{memory / 2**20:.0f} MB for {size / 2**20:.1f} MB"
    return Verdict(outcome=outcome, reason=reason, trace=trace, seconds=seconds, memory=max(memory, 0))


def guard_memory(room: int = 6 * 2**30) -> None:
    """Lets an allocation that no file justifies fail, in place of taking the machine's memory."""
    tidy()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))


def tidy() -> None:
    """Forgets what is no longer used, and spares the collector what stays, which would take most of the time."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _hang(_number: int, _frame: Any) -> None:
    raise Hang(f"more than {SECONDS:g} s")


def _signature(error: BaseException) -> str:
    """Kind and place of what was raised, alike for all inputs that run into it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hypersd_jax" in frame.filename] or list(frames)
    last = ours[-1]
    first_line = next(itertools.chain(str(error).splitlines(), ("",)))
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {first_line[:120]}"


def _reset_peak() -> int:
    """Memory in use, in bytes, from which the peak is counted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:  # only Linux can forget a peak; elsewhere the growth of the process's own is seen
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text[text.index(key) :].split(maxsplit=2)[1]) * 1024
