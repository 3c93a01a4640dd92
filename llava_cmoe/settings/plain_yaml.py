"""YAML as settings need it: plain values alone, each key once, nothing that stands for something else.

PyYAML follows YAML 1.1, in which `12:30:45` is the number 45045, `010` is 8, `no` is false, a date is no text, and the
last of two equal keys counts. Here numbers are decimal (or 0x, 0o), only `true` and `false` are truth values, and the
rest is text, as in YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, NoReturn

import yaml

from llava_cmoe.settings.base import shown

MOST_VALUES = 100_000
"""Values of a document, whatever its aliases stand for counted each time."""
MOST_DIGITS = 400
"""Of a number; no float has more before its point."""

TAG = "tag:yaml.org,2002:"
PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
"""Kind of value to what is written so, and what it begins with; first come, first served."""


class PlainYamlError(ValueError):
    """Text that is no YAML of plain values; the message names line, reason and fix, in one line."""


def parse_yaml(text: str) -> Any:
    """A document of mappings, lists, text, numbers and truth values.

    Raises:
        PlainYamlError: broken YAML, a key twice, a tag, an alias that stands for too much, nesting without end.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise PlainYamlError(where + " ".join(str(error.problem or error.context).split())) from error
    except yaml.YAMLError as error:
        raise PlainYamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise PlainYamlError("nested too deep; settings are nested a few levels") from error


def _refuse(problem: str, where: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


class _Loader(yaml.SafeLoader):
    """Reads what `parse_yaml` describes."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(TAG) in ("null", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: set[str] = set()
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; an alias counts as all that it stands for."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        anchor = event.anchor
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                _refuse(f"alias {shown(anchor)} is a part of itself", event)
            return super().compose_node(parent, index)
        self._open |= {anchor} - {None}
        node: Any = super().compose_node(parent, index)
        self._open.discard(anchor)
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = parts if isinstance(node, yaml.CollectionNode) else ()
        self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in inner)
        if self._sizes[id(node)] > MOST_VALUES:
            _refuse("more values than settings can have", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping in which every key is text or a plain value, and stands once."""
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key is plain text; put quotes around it", key)
            if (key.tag, key.value) in seen:
                _refuse(f"key {shown(key.value)} occurs twice; keep one of them", key)
            seen.add((key.tag, key.value))
        return node

    def construct_number(self, node: Any) -> Any:
        """A number of a sensible length."""
        text, kind = self.construct_scalar(node), node.tag.removeprefix(TAG)
        if len(text) > MOST_DIGITS or not re.fullmatch(PLAIN[kind][0], text):
            _refuse(f"{shown(text)} is no number", node)
        if kind == "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        return float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # Python writes `.inf` as `inf`

    def construct_truth(self, node: Any) -> bool:
        """`true` or `false`."""
        text = self.construct_scalar(node)
        if not re.fullmatch(PLAIN["bool"][0], text):
            _refuse(f"{shown(text)} is no truth value", node)
        return text.lower() == "true"


for _kind, (_written, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(
        TAG + _kind, re.compile(f"^(?:{_written})$"), list(_first) + ([""] if _kind == "null" else [])
    )
_Loader.add_constructor(TAG + "int", _Loader.construct_number)
_Loader.add_constructor(TAG + "float", _Loader.construct_number)
_Loader.add_constructor(TAG + "bool", _Loader.construct_truth)
