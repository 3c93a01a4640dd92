"""Official files of CoIN's tasks in small, and answers to them in LLaVA's format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_json(folder: Path, name: str, document: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document))
    return folder


def write_rows(folder: Path, name: str, answers: dict[Any, str] | Sequence[tuple[Any, str]]) -> Path:
    """Evaluation rows with one answer each."""
    pairs = answers.items() if isinstance(answers, dict) else answers
    rows = [{"question_id": i, "image": "x.jpg", "text": "?", "answer": answer} for i, answer in pairs]
    return write_json(folder, name, rows)


def write_answers(path: Path, *texts: tuple[Any, Any]) -> Path:
    """An answers file: pairs of id and text."""
    lines = [
        {"question_id": i, "prompt": "?", "text": text, "answer_id": "a", "model_id": "m", "metadata": {}}
        for i, text in texts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
