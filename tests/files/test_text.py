"""Files of prompts: lines, PartiPrompts' table, GenEval's objects; and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd_jax.files import read_prompts

TABLE = """Prompt\tCategory\tChallenge\tNote
a "STOP" sign\tSigns\tWriting\t
\t\t\t
1+1=2\tAbstract\tBasic\tx
"""
OBJECTS = """{"tag": "single_object", "prompt": "a photo of a bench"}

{"prompt": "a photo of two clocks"}
"""


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "a tower\n\n  007 \r\nsnow\ton ice\n", ["a tower", "007", "snow\ton ice"]),
        ("PartiPrompts.tsv", TABLE, ['a "STOP" sign', "1+1=2"]),
        ("evaluation_metadata.jsonl", OBJECTS, ["a photo of a bench", "a photo of two clocks"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, name: str, text: str, prompts: list[str]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "cannot be read"),
        ("a.tsv", b"text\tkind\na\tb\n", "has no column Prompt, only text, kind"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 is no object with a text under the key prompt"),
        ("a.jsonl", b'{"prompt": "a"\n', "line 1 is no object"),
        ("a.jsonl", b'{"prompt": 7}\n', "line 1 is no object"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=complaint):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")
