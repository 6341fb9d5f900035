"""What a value means is for its key: text stays as it is written, numbers are decimal, a key is given once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hypersd_jax.config import Config, load_config, save_config
from hypersd_jax.errors import UserError

BASE = """
output_dir: out
data: {resolution: 64}
stages:
  - {name: a, k: 4, updates: 5, batch_size: 2}
  - {name: b, k: 1, updates: 5, batch_size: 2, kind: dmd, times: [999]}
"""
BASE = BASE.replace("k: 1, ", "")
ODD = (
    "/pics/best #1",
    "2024-01-05",
    "2024",
    "007",
    "1e5",
    "1_000",
    "0x10",
    "1:30",
    ".inf",
    "true",
    "no",
    "Null",
    "[artist] set",
    "{a}",
    "{a,b}/x",
    "a: b",
    "a, b",
    "- a",
    "*x",
    "&x",
    "!x",
    "%x",
    "@x",
    "`x`",
    "|",
    ">",
    "=",
    "<<",
    "'quoted'",
    '"quoted"',
    "it's",
    "#",
    " spaces ",
    "a=b",
    "back\\slash",
    "café",
    "日本",
    "caf\udce9",  # a file name that is not UTF-8
    "null",
)
# Each list holds the one before ten times.
BLOWN_UP = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


@pytest.mark.parametrize("text", ODD)
def test_text_on_the_command_line_is_taken_as_it_is_and_written_back(base: Path, text: str, tmp_path: Path) -> None:
    for key in ("data", "data.source", "model", "output_dir", "reuse", "data.cache"):
        if text == "null" and key in ("reuse", "data.cache"):
            continue
        if "\udce9" in text and key not in ("model", "data.cache"):  # checkpoints and tables hold no such names
            continue
        config = load_config(base, [f"{key}={text}"])
        assert at(config, {"data": "data.source", "model": "model.source"}.get(key, key)) == text
        assert config.data.resolution == 64  # the rest of the recipe stays
        save_config(config, tmp_path / "again.yaml")
        again = load_config(tmp_path / "again.yaml")
        assert again == config
        assert type(at(again, "data.source")) is str


@pytest.mark.parametrize("text", ODD[:13])
def test_unquoted_text_in_a_recipe_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    if " #" in text or text.startswith("["):  # a comment and a list, in YAML
        text = text.replace(" #", "#").replace("[", "(")
    path.write_text(BASE.replace("{resolution: 64}", f"\n  source: {text}\n  split: {text}"))
    config = load_config(path)
    assert (config.data.source, config.data.split) == (text, text)


def test_null_is_nothing_where_a_key_may_be_empty_and_text_in_quotes(base: Path, tmp_path: Path) -> None:
    for nothing in ("null", "~", ""):
        config = load_config(base, ["reuse=x", "data.cache=x", f"reuse={nothing}", f"data.cache={nothing}"])
        assert (config.reuse, config.data.cache) == (None, None)
        assert load_config(base, [f"lora.alpha={nothing}"]).lora.alpha is None
    assert load_config(base, ["reuse='null'", 'data.cache="null"']).reuse == "null"
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "reuse: ~\nmodel: {source: 'null'}\nmesh: {data: }\nevaluation: {samples: null}\n")
    config = load_config(path)
    assert (config.reuse, config.model.source, config.mesh.data, config.evaluation.samples) == (
        None,
        "null",
        None,
        None,
    )


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "010", 10),
        ("seed", "08", 8),
        ("seed", "+3", 3),
        ("seed", "-3", -3),
        ("stages.0.updates", "007", 7),
        ("stages.0.learning_rate", "1e-4", 1e-4),
        ("stages.0.learning_rate", "1E-4", 1e-4),
        ("stages.0.learning_rate", "1.e-4", 1e-4),
        ("stages.0.learning_rate", ".5", 0.5),
        ("stages.0.learning_rate", "5.", 5.0),
        ("stages.0.learning_rate", "010", 10.0),
        ("stages.0.learning_rate", "3", 3.0),
        ("stages.0.skip", "true", True),
        ("log.tensorboard", "False", False),
        ("stages.0.guidance", "[2, 3.5]", (2.0, 3.5)),
        ("stages.0.guidance", "2,08", (2.0, 8.0)),
        ("stages.1.times", "800", (800,)),
        ("stages.1.times", "[0999, 0500]", (999, 500)),
        ("data.groups", "food & drink", ("food & drink",)),
        ("data.groups", "[*a, 007, no, x: y]", ("*a", "007", "no", "x: y")),
        ("data.groups", "'a, b', c", ("a, b", "c")),
        ("data.groups", '[it\'s, "q",]', ("it's", "q")),
        ("model.fresh", "[]", ()),
    ],
)
@pytest.mark.parametrize("place", ["key=value", "recipe"])
def test_numbers_are_decimal_and_lists_have_two_forms(
    base: Path, tmp_path: Path, key: str, text: str, value: object, place: str
) -> None:
    if place == "key=value":
        assert at(load_config(base, [f"{key}={text}"]), key) == value
        return
    if "*" in text or "'" in text:
        return  # YAML's own
    tree = yaml.safe_load(BASE)
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = "VALUE"
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree).replace("VALUE", text))
    assert at(load_config(path), key) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.updates=1:30", "stages.0.updates must be a whole number, not '1:30'"),
        ("stages.0.updates=0x10", "not '0x10' .write 16."),
        ("stages.0.updates=0b11", "not '0b11' .write 3."),
        ("stages.0.updates=0o17", "not '0o17' .write 15."),
        ("stages.0.updates=1_000", "not '1_000' .write 1000."),
        ("stages.0.updates=1e3", "not 1e3 .write 1000."),
        ("stages.0.updates=5.0", "not 5.0 .write 5."),
        ("stages.0.updates=1,000", "must be a whole number"),
        ("stages.0.updates=٣", "must be a whole number"),
        ("stages.0.updates=", "must be a whole number, not ''"),
        ("stages.0.updates=null", "must be a whole number, not 'null'"),
        ("stages.0.updates=" + "9" * 5000, "must be a whole number"),
        ("stages.0.learning_rate=inf", "must be a finite number"),
        ("stages.0.learning_rate=-.inf", "must be a finite number"),
        ("stages.0.learning_rate=1e999", "must be a finite number"),
        ("stages.0.learning_rate=1_0.5", "must be a finite number"),
        ("stages.0.learning_rate=1:30", "must be a finite number"),
        ("stages.0.learning_rate=0,5", "must be a finite number"),
        ("log.tensorboard=yes", "log.tensorboard must be true or false, not 'yes' .write true."),
        ("log.tensorboard=Off", "not 'Off' .write false."),
        ("log.tensorboard=0", "not 0 .write false."),
        ("log.tensorboard=nope", "must be true or false, not 'nope'$"),
        ("output_dir=", "output_dir must be text, not nothing"),
        ("output_dir=caf\udce9", r"output_dir must be UTF-8 text, not 'caf\\xe9'"),  # which checkpoints need
        ("data=caf\udce9", r"data.source must be UTF-8 text, not 'caf\\xe9'"),
        ("data.split=caf\udce9", r"data.split must be UTF-8 text, not 'caf\\xe9'"),
        ("stages.0.guidance=4", "stages.0.guidance must be a list, not 4"),
        ("data.groups=[a,,b]", "data.groups.1 must be text, not nothing"),
        ("lora=5", "lora must be a mapping of keys, not 5"),
        ("data={sorce: x}", "unknown key data.sorce; did you mean source"),
        ("stages=[{name: a, name: b}]", "stages: 0.name is given twice"),
    ],
)
def test_what_is_no_value_of_its_key_is_refused(base: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config(base, [override])
    assert "\n" not in str(error.value)


def test_sub_trees_are_yaml(base: Path) -> None:
    config = load_config(
        base,
        [
            "stages=[{name: x, k: 2, updates: 010, batch_size: 1}, {name: y, k: 1, updates: 3, batch_size: 1}]",
            "stages.x.updates=11",
            "stages.1={name: z, k: 1, updates: 3, batch_size: 1}",
            "stages.z.adversarial={weight: 1e-2}",
            "stages.z.adversarial.features=mid",
            "model={source: 1e5, dtype: float32}",
            "lora={rank: 08}",
        ],
    )
    assert [(stage.name, stage.updates) for stage in config.stages] == [("x", 11), ("z", 3)]
    last = config.stages[1]
    assert last.adversarial is not None  # type: ignore[union-attr]
    assert (last.adversarial.weight, last.adversarial.features) == (0.01, "mid")  # type: ignore[union-attr]
    assert (config.model.source, config.model.dtype, config.lora.rank) == ("1e5", "float32", 8)


def test_of_two_overrides_of_one_key_the_last_counts(base: Path) -> None:
    assert load_config(base, ["seed=1", "data=x", "seed=2", "data=y"]).seed == 2
    assert load_config(base, ["data=x", "data.flip=true", "data=y"]).data.flip is True


def test_a_stage_by_a_name_that_is_an_index_too(base: Path) -> None:
    overrides = ["stages.b.name=2", "stages.a.name=1"]
    assert [s.updates for s in load_config(base, [*overrides, "stages.2.updates=9"]).stages] == [5, 9]
    with pytest.raises(UserError, match=r"stages.1.updates: 1 is the name of entry 0 and the index of another"):
        load_config(base, [*overrides, "stages.1.updates=9"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + "output_dir: other\n", "c.yaml, line 7: output_dir is given twice, first in line 2"),
        (BASE.replace("updates: 5", "updates: 5, updates: 6", 1), "line 5: stages.0.updates is given twice"),
        (BASE + "log:\n  every: 1\n  'every': 2\n", "line 9: log.every is given twice, first in line 8"),
        (BASE.replace("{resolution: 64}", "{resolution: 64, resolution: 64}"), "data.resolution is given twice"),
        ("x: &x {every: 1, every: 2}\n" + BASE, "x.every is given twice"),
        (BASE + "log: {<<: {every: 1}, <<: {every: 2}}\n", "log.<< is given twice.* <<: .*a, .*b"),
        (BASE + "? [a, b]\n: c\n", "a key must be a word"),
        (BASE + "seed: !!python/object:os.system x\n", "line 7: seed: the tag .* is not read"),
        (BASE + "seed: !x 3\n", "seed: the tag !x is not read"),
        (BASE + "seed: &a [*a]\n", "seed.0: holds itself"),
        (BASE + "seed: *nothing\n", "line 7: not valid YAML"),
        (BASE + "\tseed: 1\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        (BLOWN_UP, "more than"),
    ],
)
def test_a_recipe_that_says_a_thing_twice_or_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_anchors_merge_keys_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        """\ufeffoutput_dir: out
stages:
  - &a {name: a, k: 4, updates: 5, batch_size: 2}
  - {<<: *a, name: b, updates: 006}
  - {name: c, <<: [{k: 2}, *a], updates: 7}
""",
        encoding="utf-8",
    )
    config = load_config(path, ["stages.a.batch_size=3"])
    assert [(s.name, s.k, s.updates, s.batch_size) for s in config.stages] == [  # type: ignore[union-attr]
        ("a", 4, 5, 3),
        ("b", 4, 6, 2),
        ("c", 2, 7, 2),
    ]


def test_a_recipe_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("output_dir: café".encode("cp1252"))
    with pytest.raises(UserError, match=r"c.yaml: is not UTF-8 text"):
        load_config(path)


def test_the_home_folder_in_every_path(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    overrides = [f"{key}=~/x" for key in ("model", "data", "data.cache", "output_dir", "reuse")]
    config = load_config(base, overrides)
    paths = (config.model.source, config.data.source, config.data.cache, config.output_dir, config.reuse)
    assert set(paths) == {f"{home}/x"}
    again = dataclasses.replace(config, output_dir="~/y", data=dataclasses.replace(config.data, source="~"))
    assert (again.output_dir, again.data.source) == (f"{home}/y", str(home))
    (home / "r.yaml").write_text(BASE.replace("output_dir: out", "output_dir: ~/out"))
    assert load_config("~/r.yaml").output_dir == f"{home}/out"
    Path("~pics").mkdir()  # what exists as it is spelled stays
    Path("~").mkdir()
    Path("~/x").mkdir()
    config = load_config(base, ["data=~pics", "model=~/x"])
    assert (config.data.source, config.model.source) == ("~pics", "~/x")
    assert load_config(base, ["data=~nobody-of-this-name/x"]).data.source == "~nobody-of-this-name/x"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=1e-4", "unknown key lr; did you mean stages.*.learning_rate?"),
        ("learning_rate=1", "did you mean stages.*.learning_rate?"),
        ("learning-rate=1", "did you mean stages.*.learning_rate?"),
        ("batch_size=4", "did you mean stages.*.batch_size or evaluation.batch_size?"),
        ("updates=4", "did you mean stages.*.updates?"),
        ("learning_rat=1", "did you mean stages.*.learning_rate?"),
        ("rank=4", "did you mean lora.rank or stages.*.rank?"),
        ("resolution=4", "did you mean data.resolution?"),
        ("dtype=float32", "did you mean model.dtype?"),
        ("source=x", "did you mean model.source or data.source?"),
        ("output=x", "did you mean output_dir?"),
        ("fsdp=2", "did you mean mesh.fsdp?"),
        ("data.batch_size=2", "unknown key data.batch_size; did you mean stages.*.batch_size"),
        ("stages.0.lr=1", "unknown key stages.0.lr; did you mean learning_rate?"),
        ("stages.0.steps=1", "unknown key stages.0.steps; did you mean updates?"),
        ("seed", "must look like key.path=value; did you mean seed=VALUE, without spaces?"),
        ("configs/emoji.yaml", "a recipe is given as --config configs/emoji.yaml"),
    ],
)
def test_a_wrong_form_names_the_right_one(base: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(base, [override])
    assert words in str(error.value)
