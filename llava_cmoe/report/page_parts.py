"""What the sections of docs/results.md share: reading a committed document, naming it below its table, pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_cmoe.report.summary import Shared

Document = Mapping[str, Any]

FROM_DOCS = "../eval/results"
"""Where the committed files lie, seen from `docs/`."""


def read_document(path: Path) -> Document:
    """A committed JSON file as plain values."""
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def missing(title: str, path: Path) -> str:
    """The section whose file is not there."""
    return f"## {title}\n\nNot measured yet: there is no `{path.name}`."


def pictures(results: Path, alt: Mapping[str, str]) -> list[str]:
    """The pictures among these file names that are there, each with its alternative text."""
    return [f"![{text}]({FROM_DOCS}/{name})" for name, text in alt.items() if (results / name).exists()]


def named(path: Path, facts: str) -> str:
    """The line below a table: its file, and what was measured."""
    return f"*[{path.name}]({FROM_DOCS}/{path.name}): {facts}.*"


def source(path: Path, shared: Shared) -> str:
    """The line below a table of several runs: its file, and what its numbers depend on."""
    subset = "" if shared.subset is None else f" ({shared.subset.words})"
    packages = ", ".join(f"{name} {shared.versions[name]}" for name in ("torch", "transformers", "peft"))
    return named(
        path,
        f"base {shared.base[:12]}, data {shared.data[:12]}, {questions(shared.num_samples)} questions a task{subset}, "
        f"protocol `{shared.protocol}` version {shared.protocol_version}, {packages}",
    )


def run_facts(document: Document) -> str:
    """Which run a document is of."""
    return f"run {document['run']}, seed {document['seed']}, base {document['base'][:12]}, data {document['data'][:12]}"


def questions(num_samples: Mapping[str, int]) -> str:
    """Number of questions per task: one, or the least and the most."""
    least, most = min(num_samples.values()), max(num_samples.values())
    return str(least) if least == most else f"{least} to {most}"
