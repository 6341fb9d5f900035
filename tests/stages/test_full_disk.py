"""A disk that refuses: one line that names the file, nothing half-written, and the same command resumes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypersd_jax import training
from hypersd_jax.cli import main
from hypersd_jax.data import cache as caches
from hypersd_jax.stages import adapter_student, train
from hypersd_jax.training import output
from tests.helpers.short_runs import half_written, recipe, records, same_tensors, sample_cheaply, share_steps


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        sample_cheaply(patch)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return train(recipe(tmp_path_factory.mktemp("undisturbed"), model, "log.checkpoint_every=100"))


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """From the n-th call of a function on, no file may grow beyond so many bytes; until the test lifts it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def begin(owner: Any, name: str, size: int, call: int = 1) -> None:
        function = getattr(owner, name)

        def limited(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                if isinstance(args[0], training.Checkpointer):
                    args[0].wait()  # the one before, so that it is this one which fails
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, limited)

    yield begin
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line prints last, before it ends with 2; tracebacks of threads would be seen."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    err = capsys.readouterr().err
    assert raised.value.code == 2, err
    assert "Traceback" not in err
    assert "ERROR" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("owner", "name", "size", "call", "named", "saved"),
    [
        (output, "save_config", 100, 1, "out cannot be written", None),
        (training.MetricsLog, "write", 100, 1, "metrics.jsonl: cannot be written", None),
        (training.Checkpointer, "save", 20_000, 1, "checkpoints/two: a checkpoint cannot be written", None),
        (training.Checkpointer, "save", 20_000, 2, "checkpoints/two: a checkpoint cannot be written", 2),
        (training.Checkpointer, "save", 20_000, 3, "checkpoints/two: a checkpoint cannot be written", 4),
        (adapter_student, "write_strips", 10, 1, "samples/two.png: cannot be written", 6),
        (adapter_student, "export_student", 1000, 1, "loras/two.safetensors: cannot be written", 6),
    ],
    ids=("config", "metrics", "first-save", "second-save", "last-save", "preview", "export"),
)
def test_a_run_says_it_and_resumes(
    tmp_path, model, undisturbed, refuse, monkeypatch, capsys, owner, name, size, call, named, saved
):
    recipe(tmp_path, model)
    command = ["train", "--config", str(tmp_path / "recipe.yaml")]
    refuse(owner, name, size, call)
    line = one_line(command, capsys)
    assert line.startswith("hypersd: ")
    assert named in line
    assert "File too large" in line
    out = tmp_path / "out"
    assert not half_written(out)
    assert training.newest_step(out / "checkpoints" / "two") == saved
    monkeypatch.undo()
    main(command)
    same_tensors(out / "loras" / "two.safetensors", undisturbed / "loras" / "two.safetensors")
    assert records(out) == records(undisturbed)
    assert not half_written(out)


def test_tensorboard_says_it_and_does_not_hang(tmp_path, model, refuse, capsys):
    recipe(tmp_path, model)
    refuse(training.MetricsLog, "flush", 2000)
    settings = ["stages.two.updates=2", "log.tensorboard=true"]
    line = one_line(["train", "--config", str(tmp_path / "recipe.yaml"), *settings], capsys)
    assert "cannot be written (File too large)" in line
    assert not half_written(tmp_path / "out")


@pytest.mark.parametrize(("name", "named"), [("write", "shard-00000.safetensors"), ("_save_manifest", "manifest.json")])
def test_a_cache_says_it_and_resumes(tmp_path, model, refuse, monkeypatch, capsys, name, named):
    recipe(tmp_path, model)
    settings = ["data.groups=[activities]", "--output", str(tmp_path / "cache"), "--shard-rows", "500"]
    command = ["cache", "--config", str(tmp_path / "recipe.yaml"), *settings]
    refuse(caches.CacheWriter, name, 100)
    line = one_line(command, capsys)
    assert f"{named}: cannot be written (" in line
    assert not half_written(tmp_path / "cache")
    monkeypatch.undo()
    main(command)
    assert len(caches.Cache(tmp_path / "cache", verify=True)) > 500


def test_metrics_in_the_midst_of_a_run(tmp_path, model, undisturbed, refuse, monkeypatch, capsys):
    """A checkpoint that is still being written may fail first; what was whole before stays whole."""
    recipe(tmp_path, model)
    command = ["train", "--config", str(tmp_path / "recipe.yaml")]
    refuse(training.MetricsLog, "write", 1100, 5)
    line = one_line(command, capsys)
    assert "cannot be written (File too large)" in line
    assert training.newest_step(tmp_path / "out" / "checkpoints" / "two") in (2, 4)
    assert not half_written(tmp_path / "out")
    monkeypatch.undo()
    main(command)
    assert records(tmp_path / "out") == records(undisturbed)
