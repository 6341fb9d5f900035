"""`hypersd train --dry-run`: nothing is written, what a run refuses is refused, and the figures are those of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import hypersd_jax as hs
from hypersd_jax.cli import main
from hypersd_jax.config import load_config
from hypersd_jax.inputs.caching import write_cache
from hypersd_jax.planning import timing
from hypersd_jax.planning.opening import abstract_mesh
from hypersd_jax.planning.plan import plan_run
from hypersd_jax.planning.sizes import split_bytes
from hypersd_jax.rewards import REWARDS, LoadedReward
from hypersd_jax.stages import consistency, train
from hypersd_jax.stages.kinds import kind_of
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.score_runs import counted, open_stage, size
from tests.helpers.score_runs import recipe as score_recipe
from tests.helpers.short_runs import TWO, recipe, records, sample_cheaply, share_steps, tensors
from tests.helpers.tiny_model import smaller, tiny_model

DMD2 = """
  - {name: few, kind: dmd, times: [999, 749, 499, 249], updates: 2, batch_size: 4, learning_rate: 1.0e-2,
     fake_updates: 3, guidance: 8.0, adversarial: {features: mid, loss: non_saturating, weight: 1.0e-3}}
"""
PAIR = """
  - {name: pair, k: 2, solver_steps: 8, updates: 2, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4],
     adversarial: {features: pair, updates: 2}}
"""


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["train", "--dry-run", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    return int(stop.value.code or 0)


def files(folder: Path) -> set[tuple[str, int]]:
    """All files and folders, and when each was changed."""
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with a recipe, its plan from before the run, and the run."""
    folder = tmp_path_factory.mktemp("planned")
    config = recipe(folder, model, stages=TWO)
    before = files(folder)
    plan = plan_run(config)
    assert files(folder) == before
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        sample_cheaply(patch)
        train(config)
    return folder, {stage.name: stage for stage in plan.stages}


# MARK: against a run


def test_checkpoints_and_exported_files(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, plan = ran
    for name, stage in plan.items():
        exported = tensors(folder / "out" / "loras" / f"{name}.safetensors")
        leaves = 4 * 2 * len(exported) / 3  # weights, two moments and the average of each module's two factors
        kept = [path for path in (folder / "out" / "checkpoints" / name).iterdir() if path.name.isdigit()]
        assert len(kept) == stage.disk.kept == 2
        for checkpoint in kept:
            on_disk = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
            # Orbax packs floats a little tighter, and adds an index of some 1,000 bytes a leaf and the run's metadata.
            assert 0.85 * stage.disk.checkpoint < on_disk - 900 * leaves < stage.disk.checkpoint + 300 * leaves
        assert sum(array.nbytes for array in exported.values()) == stage.disk.exported


def test_calls_are_those_that_the_run_logs(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, plan = ran
    logged = records(folder / "out")
    for name, stage in plan.items():
        lines = [line for line in logged if line["stage"] == name]
        assert len(lines) == stage.updates
        assert {line["calls"] for line in lines} <= {stage.calls.most, stage.calls.most - 1}  # the target's was spared
        assert (stage.calls.fewest, stage.calls.most, stage.images) == (4, 4, 4 * stage.updates)


def test_what_is_done_already(ran: tuple[Path, dict[str, Any]], model: Path) -> None:
    folder, _ = ran
    before = files(folder)
    plan = plan_run(recipe(folder, model, stages=TWO))
    assert [(stage.updates, stage.done) for stage in plan.stages] == [(6, 6), (4, 4)]
    changed = {path for path, _ in before ^ files(folder)}
    assert changed <= {str(folder), str(folder / "recipe.yaml")}  # which was written again


@pytest.mark.parametrize("stages", [PAIR, DMD2], ids=["pair", "dmd2"])
def test_state_and_calls_of_a_real_stage(stages: str, tmp_path: Path) -> None:
    """The same arrays, to the byte; and no other number of calls than is counted while the losses run."""
    model = smaller(tiny_model(tmp_path / "model"), middle=True)
    config = score_recipe(tmp_path, model, stages)
    (plan,) = plan_run(config).stages
    assert not (tmp_path / "out").exists()
    opened = open_stage(config)
    state = opened.state()
    assert plan.memory.trained == size(state.trainable)
    assert plan.memory.moments == size(state.opt_state)
    assert plan.memory.average == size(state.ema)
    assert plan.disk.checkpoint == size(state)
    assert plan.memory.base == sum(size(part) for part in opened.run.base.params.values())
    assert plan.memory.batch == size(opened.batch)
    whole = []
    phases = kind_of(opened.stage).phases(opened.run.base, opened.stage)
    for index, phase in enumerate(phases):
        keys = [jax.random.key(seed) for seed in range(16)]
        found = counted(opened, index, keys)
        whole.append([phase.repeats * (full + half / 2) for _, full, half in found])
    fewest, most = (sum(pick(each) for each in whole) for pick in (min, max))
    assert plan.calls is not None
    assert (plan.calls.fewest, plan.calls.most) == (fewest, most)


def test_the_operations_of_several_steps_are_those_of_their_mean(tmp_path: Path) -> None:
    """A student of two steps is before the gradient's 0.5 steps on average; each is a forward pass more."""
    model = smaller(tiny_model(tmp_path / "model"), middle=True)
    one = "  - {{name: s, kind: dmd, times: {times}, updates: 2, batch_size: 4, guidance: 1.0, fake_updates: 1}}\n"
    flops = []
    for times in ([999], [999, 749], [999, 749, 499]):
        (stage,) = plan_run(score_recipe(tmp_path, model, one.format(times=times))).stages
        assert stage.flops is not None
        flops.append(stage.flops)
    assert flops[1] > flops[0]
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], rel=1e-9)


# MARK: hardware that is not here


def test_eight_chips(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(tmp_path, model, stages=TWO)
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "mesh.fsdp=auto", "stages.*.batch_size=16"]
    before = files(tmp_path)
    found = json.loads(dry_run(capsys, "--json", "--device", "v5e", "--devices", "8", *arguments))
    assert files(tmp_path) == before
    assert found["mesh"] == {"data": 8, "fsdp": 1}
    assert (found["dtype"], found["device"]["count"], found["device"]["here"]) == ("bfloat16", 8, False)
    first, second = found["stages"]
    assert first["roofline"]["computing"] == pytest.approx(first["flops"] / 8 / 197e12)
    assert first["roofline"]["seconds"] == max(first["roofline"]["computing"], first["roofline"]["reading"])
    assert first["flops"] == second["flops"]
    assert found["total"]["images"] == 160
    assert found["total"]["all_calls"] == 4 * 160
    assert found["total"]["all_seconds"] == pytest.approx(first["all_seconds"] + second["all_seconds"])
    assert found["total"]["disk"] == first["disk"]["total"] + second["disk"]["total"]
    (note,) = found["notes"]
    assert note.startswith("mesh: 8 x 1 (data x fsdp)")


def test_large_leaves_are_split_and_small_ones_are_not(model: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, model, "mesh.data=2", "mesh.fsdp=4")
    mesh, reason = abstract_mesh(config, 8, 16e9, jnp.float32)
    assert reason is None
    large, small = jax.ShapeDtypeStruct((4096, 1024), jnp.float32), jax.ShapeDtypeStruct((1024,), jnp.float32)
    assert split_bytes(mesh, [large, small]) == 4096 * 1024 * 4 // 4 + 1024 * 4


def test_no_time_without_peaks(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(tmp_path, model, stages=TWO)
    printed = dry_run(capsys, "--config", str(tmp_path / "recipe.yaml")).splitlines()
    assert printed[0] == f"plan of {tmp_path}/out: nothing is trained or written"
    assert "note: the peaks of cpu are not known, so that no time is given" in printed
    (row,) = (line.split() for line in printed if line.startswith("two") and "tscd" in line)
    assert row[:6] == ["two", "tscd", "6", "4", "4", "24"]
    assert row[-2:] == ["-", "-"]


def test_a_kind_that_does_not_say_what_its_batches_hold(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(consistency, "batch_shapes")
    plan = plan_run(recipe(tmp_path, model), device="v5e", devices=2)
    (stage,) = plan.stages
    assert (stage.flops, stage.calls, stage.roofline, stage.memory.batch) == (None, None, None, None)
    assert plan.total("all_flops") is None
    assert plan.notes == ("two: its kind does not say what a batch holds, so that no work is counted",)


def test_the_stage_after_feedback_trains_the_ranks_of_both(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And margins that a run would measure on the teacher's images are not measured."""

    def tokens(prompts: Sequence[str]) -> np.ndarray:
        return np.ones((len(prompts), 3), np.int32)

    def bright(params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
        return params["scale"] * jnp.mean(images, axis=(1, 2, 3))

    loaded = LoadedReward(model=bright, params={"scale": jnp.float32(3.0)}, tokenize=tokens)  # type: ignore[arg-type]
    monkeypatch.setitem(REWARDS, "bright", lambda path: loaded)
    liked = """
  - {name: liked, kind: feedback, updates: 6, batch_size: 4, learning_rate: 1.0e-2, rank: 2, guidance: 1.0,
     feedback: {rewards: [{name: bright, path: here}]}}
"""
    after = TWO.replace("name: two", "name: a").replace("name: one", "name: b")
    first, _, feedback, last, _ = plan_run(recipe(tmp_path, model, stages=TWO + liked + after)).stages
    assert feedback.memory.trained == first.memory.trained / 2  # rank 2 of 4
    assert last.memory.trained == first.memory.trained + feedback.memory.trained
    assert feedback.memory.frozen > first.memory.trained  # the student before, below the second LoRA
    module = feedback.disk.exported - last.memory.trained - feedback.memory.trained
    assert module == 2 * (first.disk.exported - first.memory.trained)  # alphas of both files
    assert not (tmp_path / "out").exists()


def test_a_cache_spares_the_encoding(model: Path, tmp_path: Path) -> None:
    """Its encoders are compared with the model's, as a run does."""
    cache, images, other = tmp_path / "cache", tmp_path / "images", tiny_model(tmp_path / "other")
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "a.png")
    (images / "a.txt").write_text("a black square")
    config = recipe(tmp_path, model, f"data={images}")
    write_cache(config, cache, batch_size=1, shard_rows=16)
    with_cache = [f"data={images}", f"data.cache={cache}"]
    (without,), (cached,) = plan_run(config).stages, plan_run(recipe(tmp_path, model, *with_cache)).stages
    assert cached.flops is not None
    assert without.flops is not None
    assert cached.flops < without.flops
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_tensors(weights, {name: array * 2 for name, array in tensors(weights).items()}, {"format": "pt"})
    with pytest.raises(hs.UserError, match=r"data\.cache"):
        plan_run(recipe(tmp_path, other, *with_cache))


def test_a_single_file_is_planned_as_its_folder(tmp_path: Path) -> None:
    """Its shapes are told by the header."""
    file = tmp_path / "model.safetensors"
    with pytest.warns(UserWarning, match="only this package reads these"):
        hs.convert_model("embedded", file, "single-file")
    of_folder, of_file = (plan_run(recipe(tmp_path, source, "data.resolution=64")) for source in ("embedded", file))
    assert of_file.stages == of_folder.stages


def test_stages_that_train_a_model(model: Path, tmp_path: Path) -> None:
    both = """
  - {name: vae, kind: autoencoder, updates: 2, batch_size: 4, learning_rate: 1.0e-3}
  - {name: teacher, kind: teacher, updates: 2, batch_size: 4, learning_rate: 1.0e-3}
"""
    plan = plan_run(recipe(tmp_path, model, stages=both), device="v5e")
    autoencoder, teacher = plan.stages
    assert autoencoder.calls is None
    assert autoencoder.flops is not None
    assert teacher.flops is not None
    assert autoencoder.memory.trained + teacher.memory.trained == autoencoder.memory.base  # float32, once each
    assert (autoencoder.disk.exported, teacher.disk.exported) == (0, teacher.memory.base)


# MARK: refusals

BAD = [
    (["stages.two.updats=3"], "updats"),
    (["model=nowhere"], "nowhere"),
    (["data=/no/such/folder"], "data.source"),
    (["mesh.fsdp=3"], "mesh.fsdp=3"),
    (["stages.two.accumulate=3"], "batch_size"),
    (["stages.two.solver_steps=6"], "solver_steps"),
    (["lora.start=none.safetensors"], "lora.start"),
    (["reuse=none"], "reuse"),
    (["data.cache=none"], "data.cache"),
    (["data.resolution=15"], "data.resolution"),
    (["output_dir={file}/out"], "output_dir"),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[words for _, words in BAD])
def test_what_a_run_refuses(
    overrides: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same words but for a folder that cannot be written, which a run tries to."""
    recipe(tmp_path, model)
    (tmp_path / "file").touch()
    given = [override.format(file=tmp_path / "file") for override in overrides]
    lines = []
    for first in ([], ["--dry-run"]):
        assert status(*first, "--config", str(tmp_path / "recipe.yaml"), *given) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert words in printed.err
        lines.append(printed.err)
    assert lines[0] == lines[1] or words == "output_dir"


def test_the_folder_of_another_run(ran: tuple[Path, dict[str, Any]], model: Path, capsys: Any) -> None:
    folder, _ = ran
    before = files(folder / "out")
    assert status("--dry-run", "--config", str(folder / "recipe.yaml"), "seed=7") == 2
    assert "holds a run of another configuration, seed" in capsys.readouterr().err
    assert files(folder / "out") == before


def test_weights_that_do_not_fit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are told by the files' headers."""
    other = tiny_model(tmp_path / "model")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [24]}))
    recipe(tmp_path, other)
    assert status("--dry-run", "--config", str(tmp_path / "recipe.yaml")) == 2
    assert "the tensors do not fit the configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--json"], "--json is an option of --dry-run"),
        (["--device", "v5e"], "--device is an option of --dry-run"),
        (["--timed-updates", "3"], "--timed-updates is an option of --dry-run"),
        (["--dry-run", "--device", "v9"], "invalid choice: 'v9'"),
        (["--dry-run", "--devices", "0"], "must be at least 1"),
        (["--dry-run", "--topology", "v5e:2x4", "--devices", "8"], "--device and --devices do not go with it"),
    ],
)
def test_options_that_do_not_go(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*arguments) == 2
    printed = capsys.readouterr()
    assert line in printed.err
    assert printed.err.count("\n") == 1


def test_from_python(model: Path, tmp_path: Path) -> None:
    recipe(tmp_path, model)
    config = load_config(tmp_path / "recipe.yaml")
    with pytest.raises(hs.UserError, match="--device tpu: not one of v4, v5e"):
        hs.plan_run(config, device="tpu")
    plan = hs.plan_run(config, device="h100", devices=4)
    assert (plan.device.name, plan.mesh) == ("h100", {"data": 4, "fsdp": 1})
    assert dataclasses.asdict(plan)["resolution"] == 16


# MARK: measured and compiled


def test_timed_updates(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    share_steps(monkeypatch)
    monkeypatch.setattr(timing, "use_compilation_cache", lambda: None)
    recipe(tmp_path, model, stages=TWO)
    before = files(tmp_path)
    printed = dry_run(capsys, "--json", "--timed-updates", "2", "--config", str(tmp_path / "recipe.yaml"))
    assert files(tmp_path) == before
    found = json.loads(printed)
    timed = [stage["timed"] for stage in found["stages"]]
    assert all(each["updates"] == 2 and each["each"] > 0 and each["first"] > 0 for each in timed)
    total = sum(
        each["first"] + each["each"] * (stage["updates"] - 1)
        for each, stage in zip(timed, found["stages"], strict=True)
    )
    assert found["total"]["timed_seconds"] == pytest.approx(total)


def test_a_topology_needs_libtpu(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else real(name, *rest)
    )
    recipe(tmp_path, model)
    assert status("--dry-run", "--topology", "v5e:2x4", "--config", str(tmp_path / "recipe.yaml")) == 2
    printed = capsys.readouterr().err
    assert "needs the libtpu package, which is not installed" in printed
    assert printed.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiled_for_eight_chips(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtpu itself writes to standard error."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another test run may have loaded it
    recipe(tmp_path, model, stages=TWO)
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "mesh.fsdp=auto", "stages.*.batch_size=8"]
    main(["train", "--dry-run", "--json", "--topology", "v5e:2x4", *arguments])
    found = json.loads(capfd.readouterr().out)
    assert (found["device"]["name"], found["mesh"]) == ("v5e", {"data": 1, "fsdp": 8})
    first, second = (stage["compiled"] for stage in found["stages"])
    assert first == second  # one program
    assert first["arguments"] > found["stages"][0]["memory"]["state"]
    assert first["temporary"] > 0
    assert first["flops"] > 0
