"""SIGINT and SIGTERM: a run saves, says where it resumes, and ends as if it had never been stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypersd_jax import training
from hypersd_jax.cli import main
from hypersd_jax.config import load_config
from hypersd_jax.errors import Interrupted, Terminated
from hypersd_jax.inputs.caching import write_cache
from hypersd_jax.stages import adapter_student, train
from tests.helpers.short_runs import (
    ADAPTER,
    AUTOENCODER,
    half_written,
    recipe,
    records,
    same_tensors,
    sample_cheaply,
    share_steps,
)

ROOT = Path(__file__).parents[2]
STUDENT = {"two": "loras/two.safetensors", "s": "model/vae/diffusion_pytorch_model.safetensors"}
pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread alone"
)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        sample_cheaply(patch)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        name: train(recipe(folder / name, model, "log.checkpoint_every=100", stages=stages))
        for name, stages in (("two", ADAPTER), ("s", AUTOENCODER))
    }


def call_then_signal(number: int, function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The function, after which this process gets a signal the first time that `when` of its arguments says so."""
    sent = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if not sent and when(*args):
            sent.append(True)
            os.kill(os.getpid(), number)
        return found

    return wrapped


@pytest.mark.parametrize(
    ("number", "error", "name", "overrides"),
    [
        (signal.SIGINT, Interrupted, "two", []),
        (signal.SIGTERM, Terminated, "two", ["log.every=5", "log.checkpoint_every=100"]),
        (signal.SIGTERM, Terminated, "s", ["log.checkpoint_every=100"]),
    ],
)
def test_a_signal_saves_the_update_in_hand(
    tmp_path, model, undisturbed, monkeypatch, capsys, number, error, name, overrides
):
    config = recipe(tmp_path, model, *overrides, stages=ADAPTER if name == "two" else AUTOENCODER)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        add = call_then_signal(number, training.SkipWatch.add, lambda _self, update, _skipped: update == 3)
        patch.setattr(training.SkipWatch, "add", add)
        with pytest.raises(error, match=rf"^stopped at 3 of 6 of {name}; the same command resumes there$"):
            train(config)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    out = tmp_path / "out"
    assert training.newest_step(out / "checkpoints" / name) == 3
    assert not half_written(out)
    if error is Terminated:
        assert f"hypersd: stopped at 3 of 6 of {name}; the same command resumes there" in capsys.readouterr().err
    train(config)
    same_tensors(out / STUDENT[name], undisturbed[name] / STUDENT[name])
    if not overrides:
        assert records(out) == records(undisturbed[name])


def test_while_a_preview_is_drawn_nothing_is_lost(tmp_path, model, undisturbed, monkeypatch):
    config = recipe(tmp_path, model, "log.sample_every=3", "log.checkpoint_every=100")
    with monkeypatch.context() as patch:
        patch.setattr(
            adapter_student, "_sampled", call_then_signal(signal.SIGINT, adapter_student._sampled, lambda *_: True)
        )
        with pytest.raises(KeyboardInterrupt, match="at 3 of 6 of two"):
            train(config)
    assert training.newest_step(tmp_path / "out" / "checkpoints" / "two") == 3
    train(config)
    same_tensors(tmp_path / "out" / STUDENT["two"], undisturbed["two"] / STUDENT["two"])


def test_before_the_first_update_there_is_nothing_to_save(tmp_path, model, monkeypatch):
    config = recipe(tmp_path, model)
    monkeypatch.setattr(
        training.MetricsLog,
        "__enter__",
        call_then_signal(signal.SIGTERM, training.MetricsLog.__enter__, lambda *_: True),
    )
    with pytest.raises(SystemExit) as raised:
        train(config)
    assert raised.value.code == 143
    assert str(raised.value) == "stopped at 0 of 6 of two, with nothing new to save; the same command resumes there"
    assert training.newest_step(tmp_path / "out" / "checkpoints" / "two") is None


def test_a_checkpoint_comes_by_time(tmp_path, model):
    """0.001 s is over after every update, so that each but the first two is saved."""
    config = recipe(tmp_path, model, "log.checkpoint_every=100", "log.checkpoint_minutes=1e-5")
    seen: list[int] = []
    save = training.Checkpointer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Checkpointer, "save", lambda *given: (seen.append(given[1]), save(*given)))
        train(config)
    assert seen == [3, 6]


def test_a_cache_keeps_its_finished_shards(tmp_path, model, monkeypatch):
    from hypersd_jax.data import cache as caches

    config = load_config(recipe(tmp_path, model) and tmp_path / "recipe.yaml", ["data.groups=[activities]"])
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        write = call_then_signal(signal.SIGINT, caches.CacheWriter.write, lambda *_: True)
        patch.setattr(caches.CacheWriter, "write", write)
        with pytest.raises(Interrupted, match=r"^stopped at 500 of \d+ rows; the same command resumes there$"):
            write_cache(config, folder, batch_size=100, shard_rows=500)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    rows = write_cache(config, folder, batch_size=100, shard_rows=500)
    assert len(caches.Cache(folder, verify=True)) == rows > 500


def test_at_the_shell(tmp_path, model):
    recipe(tmp_path, model)
    overrides = ["stages.two.updates=4000", "log.checkpoint_every=5000"]
    command = [sys.executable, "train.py", "--config", str(tmp_path / "recipe.yaml"), *overrides]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    log = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 5:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # as `timeout` does
            break
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    done = training.newest_step(tmp_path / "out" / "checkpoints" / "two")
    assert done
    assert err.splitlines()[-1] == f"hypersd: stopped at {done} of 4000 of two; the same command resumes there"
    assert "Traceback" not in err
    assert [line["step"] for line in records(tmp_path / "out")] == list(range(1, done + 1))
    assert not half_written(tmp_path / "out")


def test_the_command_line_ends_with_130_after_ctrl_c(tmp_path, model, monkeypatch, capsys):
    recipe(tmp_path, model)
    add = call_then_signal(signal.SIGINT, training.SkipWatch.add, lambda _self, update, _skipped: update == 1)
    monkeypatch.setattr(training.SkipWatch, "add", add)
    with pytest.raises(SystemExit) as raised:
        main(["train", "--config", str(tmp_path / "recipe.yaml")])
    assert raised.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "hypersd: stopped at 1 of 6 of two; the same command resumes there"
    )


# Python cannot handle a signal while this runs, as while XLA compiles.
DEAF = """
import hashlib, sys
from hypersd_jax.training.stopping import StopSignals
stop = StopSignals(alone=True, leave=lambda: print("left", flush=True))
with stop:
    stop.where = "at 0 of 9 of two"
    if "held" in sys.argv:
        stop.hold()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize("held", [False, True])
def test_while_it_compiles_a_signal_ends_the_process_and_else_a_second_one(held):
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, *(["held"] if held else [])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # until it is deaf; on a machine so busy that it is not, Python ends it, without ``leave``
    process.send_signal(signal.SIGTERM)
    if held:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert out in (("left\n",) if held else ("left\n", ""))
    last = "stopped at once; the same command resumes at the last checkpoint" if held else "stopped at 0 of 9 of two"
    assert err.splitlines()[-1] == f"hypersd: {last}"
