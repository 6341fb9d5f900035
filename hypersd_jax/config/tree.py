"""YAML into plain data whose scalars keep their text: the fields that they are given to decide how it is read."""

from __future__ import annotations

from typing import Any

import yaml

from hypersd_jax.config.scalars import Words
from hypersd_jax.errors import short

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
# Far more than any recipe holds, and what a few lines of aliases can be blown up to.
_MAX_VALUES = 100_000


class TreeError(Exception):
    """An error in a text, and its line, counted from 1; None where that is not known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def read_tree(text: str) -> Any:
    """Read one YAML document.

    Returns:
        dictionaries and lists that share nothing; scalars are `Words`, or ``str`` where they stand in quotes. None for
        an empty document.

    Raises:
        TreeError: it is no YAML, has a key twice, or a tag that is not read.
    """
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _Reader().read(node, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise TreeError(f"not valid YAML ({short(error.problem)})", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise TreeError(f"not valid YAML ({short(str(error).splitlines()[0])})") from None
    except RecursionError:
        raise TreeError("not valid YAML (nested too deeply)") from None


class _Reader:
    """From nodes to data; counts what it has read, and knows the nodes that it is inside of."""

    def __init__(self) -> None:
        self.count = 0
        self.inside: list[yaml.Node] = []

    def read(self, node: yaml.Node, path: str) -> Any:
        line = node.start_mark.line + 1
        self.count += 1
        if self.count > _MAX_VALUES:
            raise TreeError(f"more than {_MAX_VALUES} values", line)
        if node.tag not in _TAGS:
            raise TreeError(f"{path or 'the file'}: the tag {short(node.tag)} is not read", line)
        if isinstance(node, yaml.ScalarNode):
            return Words(node.value) if node.style is None else str(node.value)
        if any(node is each for each in self.inside):
            raise TreeError(f"{path}: holds itself", line)
        self.inside.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, _join(path, str(index))) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self.inside.pop()

    def _mapping(self, node: yaml.Node, path: str) -> dict[str, Any]:
        lines: dict[str, int] = {}
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise TreeError(f"{path or 'the file'}: a key must be a word", line)
            key, where = str(key_node.value), _join(path, key_node.value)
            merges = key == "<<" and key_node.style is None
            if key in lines:
                more = "; several are merged as <<: [*a, *b]" if merges else ""
                raise TreeError(f"{where} is given twice, first in line {lines[key]}{more}", line)
            lines[key] = line
            value = self.read(value_node, where)
            if not merges:
                own[key] = value
                continue
            for each in value if isinstance(value, list) else [value]:
                if not isinstance(each, dict):
                    raise TreeError(f"{where} must be a mapping of keys, or a list of such", line)
                merged = {**each, **merged}
        return {**merged, **own}


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part
