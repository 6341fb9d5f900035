"""Write the reference of all configuration keys: ``python scripts/configuration_reference.py docs/configuration.md``.

Keys, values and defaults are those of the dataclasses in `hypersd_jax.config`. A key's meaning is what its class's
docstring says of it: its entry under ``Attributes:``, or where there is none the sentence that begins with it, or the
part of one behind a semicolon. Its range is what the class's ``__post_init__`` refuses. Keys that no docstring explains
are in `MEANINGS` below.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from hypersd_jax.config import Config, kinds

HEAD = """\
# Configuration

Every key of a recipe, with its values, its default and its meaning. How a key is set on the command line, and how its
value is read: [command_line.md](command_line.md). Which equation a key belongs to: [method.md](method.md).

A recipe is refused as a whole, with one line that names the key, before anything is written. The rules on this page are
checked first; those that depend on the model, the data and the devices follow, such as that `batch_size` is a multiple
of `accumulate` times the devices.

This page is made from the source: `python scripts/configuration_reference.py docs/configuration.md`.
"""

MEANINGS: dict[str, str] = {}
"""What no docstring says, by ``Class.key``. A key that its docstring explains must not stand here."""

SHARED = "StageConfig"
NAMES = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}
_VERBS = r"(?:must (?:be |lie in |have |name )?|at least |above )"


class Key(NamedTuple):
    """One key: what its class is, and what its row shows."""

    owner: type
    name: str
    value: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The keys of one class at one path of a recipe; `rules` are those that belong to no single key."""

    title: str
    text: str
    keys: list[Key]
    rules: list[str]


# MARK: docstrings


class Doc(NamedTuple):
    """A docstring taken apart: `general` is what it says on the whole; the rest is by key."""

    general: str
    explained: dict[str, str]
    mentioned: dict[str, str]


def doc_of(cls: type) -> Doc:
    """What a class's docstring says on the whole, what it explains, and what it says among other things."""
    names = own_fields(cls)
    text, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    listed = _listed(attributes)
    clauses = list(_clauses(text, names))
    explained: dict[str, list[str]] = {name: [] for name in names}
    mentioned: dict[str, list[str]] = {name: [] for name in names}
    for clause in clauses:
        for name in _subjects(clause, names):
            explained[name].append(clause)
        for name in _named(clause, names):
            mentioned[name].append(clause)
    begun = {name: " ".join(map(_ended, parts)) for name, parts in explained.items() if parts}
    general = [clause for clause in clauses if attributes or not _subjects(clause, names)]
    return Doc(
        " ".join(map(_ended, general)),
        {**begun, **listed},
        {name: " ".join(map(_ended, parts)) for name, parts in mentioned.items() if parts},
    )


def _listed(attributes: str) -> dict[str, str]:
    """The entries ``name: text`` of an ``Attributes:`` section; further lines of an entry are indented."""
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", textwrap.dedent(attributes), re.MULTILINE)
    return {name: _ended(" ".join(text.split())) for name, text in entries}


def _clauses(text: str, names: list[str]) -> Iterator[str]:
    """Sentences, and the parts of sentences behind a semicolon that begin with a key."""
    for sentence in re.split(r"(?<=\.)\s+(?=[A-Z`])|(?<=\.\))\s+", " ".join(text.split())):
        parts = sentence.split("; ")
        whole = parts[0]
        for part in parts[1:]:
            if _subjects(part, names):
                yield whole
                whole = part
            else:
                whole += f"; {part}"
        yield whole


def _named(clause: str, names: list[str]) -> list[str]:
    return [name for name in re.findall(r"``(\w+)(?:: [^`]+)?``", clause) if name in names]


def _subjects(clause: str, names: list[str]) -> list[str]:
    """The keys that a clause begins with: ``a``, or ``a``, ``b`` and ``c``."""
    start = re.match(r"(?:``\w+(?:: [^`]+)?``(?:, (?:and )?| and )?)+", clause)
    return _named(start[0], names) if start else []


def _ended(text: str) -> str:
    text = text.replace("``", "`").strip()
    return f"{text[0].upper()}{text[1:]}".rstrip(".;") + "."


# MARK: ranges


def refusals(cls: type) -> Iterator[str]:
    """The messages of the errors that a class's own ``__post_init__`` raises; what they fill in is an ellipsis."""
    if "__post_init__" not in vars(cls):
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__post_init__)))
    yield from _messages(tree, {})


def _messages(node: ast.AST, loops: dict[str, list[str]]) -> Iterator[str]:
    if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Tuple):
        words = [
            item.value for item in node.iter.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)
        ]
        loops = {**loops, node.target.id: words}
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        yield from _filled(node.exc.args[0], loops)
        return
    for child in ast.iter_child_nodes(node):
        yield from _messages(child, loops)


def _filled(message: ast.expr, loops: dict[str, list[str]]) -> list[str]:
    texts = [""]
    for part in message.values if isinstance(message, ast.JoinedStr) else [message]:
        if isinstance(part, ast.FormattedValue):
            name = part.value.id if isinstance(part.value, ast.Name) else ""
            texts = [text + word for text in texts for word in loops.get(name, ["…"])]
        elif isinstance(part, ast.Constant):
            texts = [text + str(part.value) for text in texts]
    return [re.sub(r", not (?:less than )?[^,]*…\W*$|, not \[…, …\]$", "", text) for text in texts]


def ranges(cls: type) -> tuple[dict[str, list[str]], list[str]]:
    """(rules of each key, rules of several keys as they are printed)."""
    word = "|".join(sorted(own_fields(cls), key=len, reverse=True))
    subject = rf"(?:(?:{word})(?:, | and ))*(?:{word})"
    rule = re.compile(rf"({subject})(?: \(…\)| …)? {_VERBS}")
    found: dict[str, list[str]] = {}
    others: list[str] = []
    for message in refusals(cls):
        starts = list(rule.finditer(message))
        if not starts or starts[0].start() != 0:
            others.append(message)
            continue
        ends = [match.start() for match in starts[1:]] + [len(message)]
        for match, end in zip(starts, ends, strict=True):
            text = re.sub(r"^(?: \(…\)| …)? (?:must )?(?:be |lie |name )?", "", message[match.end(1) : end])
            text = re.sub(r" \(…\)|(?:,| and) *$", "", text.replace("not be ", "not ")).strip()
            if "…" not in text:
                for name in re.findall(rf"\b(?:{word})\b", match[1]):
                    found.setdefault(name, []).append(text)
    return found, others


# MARK: fields


def own_fields(cls: type) -> list[str]:
    """The names of the fields that a class declares itself."""
    return [field.name for field in dataclasses.fields(cls) if field.name in vars(cls).get("__annotations__", {})]


def value_of(kind: Any) -> str:
    """The values that a type takes, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        named = [value_of(each) for each in arguments if each is not type(None)]
        return " or ".join([*named, "`null`"] if type(None) in arguments else named)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is Annotated:
        return value_of(arguments[0])
    if origin is tuple:
        plural = {"whole number": "whole numbers", "number": "numbers", "text": "texts"}
        inner = plural.get(value_of(arguments[0]), "parts")
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"list of {len(arguments)} {inner}"
    return "part" if dataclasses.is_dataclass(kind) else NAMES.get(kind, str(kind))


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as YAML has it."""
    if field.default_factory is not dataclasses.MISSING or dataclasses.is_dataclass(field.default):
        return ""
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def classes_in(kind: Any) -> list[type]:
    """The dataclasses that a type names."""
    if dataclasses.is_dataclass(kind):
        cls = typing.cast(type, kind)
        return list(dict.fromkeys(kinds(cls).values())) or [cls]
    return [cls for each in typing.get_args(kind) if not isinstance(each, str) for cls in classes_in(each)]


def keys_of(cls: type) -> list[Key]:
    """The keys that a class declares itself."""
    hints = typing.get_type_hints(cls, include_extras=True)
    doc, limits = doc_of(cls), ranges(cls)[0]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return [
        Key(
            owner=cls,
            name=name,
            value="; ".join([value_of(hints[name]), *limits.get(name, [])]),
            default=default_of(fields[name]),
            meaning=doc.explained.get(name) or MEANINGS.get(f"{cls.__name__}.{name}") or doc.mentioned.get(name, ""),
        )
        for name in own_fields(cls)
    ]


def sections() -> list[Section]:
    """All sections, from the top of a recipe down; a class that stands at several paths is shown once."""
    paths_by_class: dict[type, list[str]] = {}

    def walk(cls: type, path: str) -> None:
        for base in [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]:
            if path not in paths_by_class.setdefault(base, []):
                paths_by_class[base].append(path)
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            several = typing.get_origin(hints[field.name]) is tuple
            for inner in classes_in(hints[field.name]):
                walk(inner, f"{path}{field.name}.{'*.' if several else ''}")

    walk(Config, "")
    # Parts that have parts of their own come before those, not each among its parent's.
    ordered = sorted(paths_by_class, key=lambda cls: min(path.count(".") for path in paths_by_class[cls]))
    return [_section(cls, paths_by_class[cls]) for cls in ordered]


def _section(cls: type, paths: list[str]) -> Section:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    title = ", ".join(f"`{path.removesuffix('.')}`" for path in paths) if paths != [""] else "The top level"
    if cls.__name__ == SHARED:
        title += ", of every kind"
    elif "kind" in fields:
        choices = typing.get_args(typing.get_type_hints(cls)["kind"]) or kinds(cls)
        title += f" with `kind: {' | '.join(map(str, choices))}`"
    return Section(title, doc_of(cls).general, keys_of(cls), ranges(cls)[1])


# MARK: page


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for section in sections():
        parts.append(f"## {section.title}\n")
        if section.text:
            parts.append(_wrapped(section.text) + "\n")
        rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            cells = (f"`{key.name}`", key.value, key.default, key.meaning)
            rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        parts.append("\n".join(rows) + "\n")
        if section.rules:
            parts.append("Refused, with what is printed:\n")
            parts.append("\n".join(_wrapped(f"* `{rule}`", "  ") for rule in section.rules) + "\n")
    return "\n".join(parts)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the page to the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
