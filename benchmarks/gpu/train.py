"""One kind of training step at full size: time, memory, FLOPs and how much of the card's peak it reaches.

TSCD, and DMD from prompts alone with one update of the fake score model to one of the student; of the model only the
UNet is there.
"""

from __future__ import annotations

import dataclasses

import jax

from benchmarks.gpu import models
from benchmarks.gpu.kernels import program_row
from benchmarks.gpu.peaks import mfu
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.timing import timed
from benchmarks.sides import training
from benchmarks.sides.training_ours import INDEX, Model, Planned, given, make_batch, make_run, part_trained, trees
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import make_mesh
from hypersd_jax.weights.components import default_dtype

CASES = {"tscd": "tscd", "dmd": "dmd-data-free"}
"""The stages of `benchmarks/sides/training.py` by the names that they have here."""
FAKE_UPDATES = 1
"""XLA counts what a loop does once, so that with one update of the fake score model all FLOPs are counted."""
TINY_RANK = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained: a family's UNet by one of `CASES`, at a batch size, with or without rematerialisation."""

    family: str
    case: str
    batch: int
    remat: bool


def train(setting: Setting, rows: Rows, *, tiny: bool) -> None:
    """Compile the step from shapes, say what it will need, and only then read the weights and run it."""
    device = models.start(tiny=tiny)
    mesh = make_mesh(1, 1)
    stored = models.stored_model(setting.family, tiny=tiny)
    model = Model.describe(stored, remat=setting.remat, mesh=mesh)
    shape = training.SHAPES[setting.family]
    if tiny:
        shape = training.Shape(latent=model.structure.unet.sample_size, rank=TINY_RANK)
    case = training.find_case(CASES[setting.case], FAKE_UPDATES)
    case = dataclasses.replace(case, stage={**case.stage, "batch_size": setting.batch})
    values = given(model.structure.unet, shape.latent, setting.batch)
    start, scales = part_trained(stream(0, Stream.ADAPTER, 0), model.unet.shapes, shape.rank)
    run = make_run(shape, case, model, model.unet.shapes, values, scales, start)
    key, batch = stream(run.config.seed, Stream.NOISE, INDEX), make_batch(run, values)
    about = {**dataclasses.asdict(setting), "rank": shape.rank, "latent": shape.latent}
    about |= {"dtype": str(jax.numpy.dtype(default_dtype())), "device": device.device_kind}

    planned = Planned.compile(run, start, batch, key)
    name = f"{setting.case}, batch {setting.batch}{', remat' * setting.remat}"
    row = program_row(name, planned.step.as_text, planned.step.cost_analysis, planned.step.memory_analysis)
    rows.add("program", family=setting.family, **row)

    run = make_run(shape, case, model, model.read(), values, scales, start)
    state, frozen = trees(run)
    held, metrics = [state], []

    def update() -> None:
        state, found = planned.step(held.pop(), frozen, batch, key, run.config.stages[INDEX])
        held.append(jax.block_until_ready(state))
        metrics.append(found)

    times = timed(update)
    reached = mfu(row["flops"], times["median"], device.device_kind)
    last = {name: float(metrics[-1][name]) for name in ("loss", "grad_norm")}
    rows.add(
        "training",
        **about,
        **times,
        **last,
        **{"compile": planned.seconds["wall"], "compiled before": planned.kept, "flops": row["flops"]},
        plan=row["plan"],
        mfu=reached,
        peak=models.peak_bytes(device),
    )
