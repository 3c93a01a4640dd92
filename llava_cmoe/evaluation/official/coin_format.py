"""Answers out and in, as CoIN's scripts and their descendants write them, so that toolkits can score each other's.

    DIR/scienceqa/textvqa/merge.jsonl      answers to scienceqa after learning textvqa, one JSON object a line
    DIR/scienceqa/textvqa/Result.text      Samples: N, Accuracy: xx.xx%, Protocol: coin

The accuracy is what CoIN's scripts make of those answers; of a task that they do not judge, the run's own.

Answers that come in become a folder with `answers/` and `results.json`, which every command that needs no model takes
for a run. All files are checked before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cmoe.data.coin import raw_ids
from llava_cmoe.data.rows import MARKER
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.aggregate import aggregate
from llava_cmoe.evaluation.eval_spec import EvalSpec, eval_spec_of
from llava_cmoe.evaluation.generate import RouteName
from llava_cmoe.evaluation.log import Answer, Results, RunFacts, read_answers, write_answers, write_results
from llava_cmoe.evaluation.rescoring import Examined
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RegistryError, recipe_facts
from llava_cmoe.settings.base import shown
from llava_cmoe.settings.plain_json import parse_json
from llava_cmoe.settings.run import Recipe

ANSWERS, RESULT = "merge.jsonl", "Result.text"
OWN: dict[str, Any] = {"located": int | None, "score": float | int | None, "failed": str | None}
"""What our own export adds to an answer as `metadata`, and its types."""
ROUTE: RouteName = "located"
"""What answers that come in are kept as; a run without a locator is measured under this name, too."""


@dataclass(frozen=True)
class Stated:
    """What a `Result.text` says beside what is scored here under `protocol`, in percent."""

    task: str
    after: str
    stated: float
    scored: float
    protocol: str


def export_answers(examined: Examined, to: Path, route: str | None = None) -> list[Path]:
    """Write the answers and accuracies of one route.

    Args:
        examined: the run.
        to: a folder that is not there, or empty.
        route: one that was measured; the headline if absent.

    Raises:
        RegistryError: the folder holds something, or no such route was measured.
    """
    results, eval_spec = examined.results, examined.eval_spec
    chosen = next((name for name in eval_spec.settings.routes if route in (None, name)), None)
    if chosen is None:
        raise RegistryError(f"{examined.folder}: no route {route} was measured, only {', '.join(results.routes)}")
    _refuse_full(to)
    partial, written = to.resolve().with_name(f".{to.resolve().name}.partial"), []
    if partial.exists():  # of a call that was killed
        shutil.rmtree(partial)
    for i, task in enumerate(eval_spec.sequence.tasks):
        ids = raw_ids(examined.root, task)
        for j in range(len(results.routes[chosen].matrix)):
            protocol, accuracy = _as_coin(results, chosen, j, i)
            if accuracy is not None:
                inner = Path(task.name, eval_spec.sequence.names[j])
                folder = partial / inner
                folder.mkdir(parents=True)
                by_id = _answers_by_id(eval_spec, j, i, chosen)
                lines = [
                    _line(by_id[name], ids[name], f"{results.run} after {results.tasks[j]}")
                    for name in ids
                    if name in by_id
                ]
                (folder / ANSWERS).write_text("".join(lines), encoding="utf-8")
                (folder / RESULT).write_text(
                    f"Samples: {len(lines)}\nAccuracy: {accuracy:.2f}%\nProtocol: {protocol}\n"
                )
                written.append(to / inner / ANSWERS)
    partial.mkdir(parents=True, exist_ok=True)
    partial.replace(to.resolve())  # an empty folder there makes room
    return written


def _answers_by_id(eval_spec: EvalSpec, after: int, task: int, route: RouteName) -> dict[str, Answer]:
    """The answers of one cell, every question answered once."""
    path, asked = eval_spec.answers_path(after, task, route), eval_spec.rows[eval_spec.sequence.names[task]]["id"]
    answers = read_answers(path)
    by_id = {answer.id: answer for answer in answers}
    if by_id.keys() != set(asked) or len(by_id) < len(answers):
        raise RegistryError(
            f"{path}: holds {len(answers)} answers to {len(by_id)} questions, {len(set(asked))} were asked; "
            "delete the file and ask again with `llava-cmoe eval`"
        )
    return by_id


def _as_coin(results: Results, route: str, after: int, task: int) -> tuple[str, float | None]:
    """One accuracy under protocol `coin`, or under the run's own where `coin` does not judge the task; and which."""
    measured = results.routes[route]
    judged = measured.other_protocols["coin"][after][task] if "coin" in measured.other_protocols else None
    return (results.protocol, measured.matrix[after][task]) if judged is None else ("coin", judged)


def _line(answer: Answer, raw_id: int | str, model: str) -> str:
    """One answer; `answer_id` is made from what it answers, so that the same run gives the same bytes."""
    metadata = {"located": answer.located, "score": answer.score, "failed": answer.failed}
    document = {
        "question_id": raw_id,
        "prompt": _without_marker(answer.prompt),
        "text": answer.text,
        "answer_id": hashlib.sha256(f"{model}/{answer.id}".encode()).hexdigest()[:22],
        "model_id": model,
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }
    return json.dumps(document, ensure_ascii=False) + "\n"


def import_answers(
    source: Path,
    recipe: Recipe,
    method: str,
    base: str = "unknown",
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Results, list[Stated]]:
    """Check, keep and score another toolkit's answers.

    Args:
        source: folder of the layout above; cells that were not measured may lack.
        recipe: says what was asked (`data`, `seed`, `evaluation`) and where the result goes (`run`).
        method: what is to stand for a method's name.
        base: name of the frozen model, where it is known.
        progress: called with how many answers files are read, and then scored.

    Raises:
        RegistryError: no answers, a folder that is no task's, a line that is no answer, an id that is missing, doubled
            or unknown, or a `Result.text` without an accuracy; names file and line.
        DataError: the data root is missing or broken.
    """
    _refuse_full(recipe.run)
    settings = recipe.evaluation.model_copy(update={"routes": (ROUTE,)})
    data = TaskData.of(recipe)
    eval_spec = eval_spec_of(data, settings, recipe.run)
    cells = _cells(source, eval_spec)
    said = {cell: _stated(path.with_name(RESULT)) for cell, path in cells.items() if path.with_name(RESULT).is_file()}
    answers = {}
    for number, (cell, path) in enumerate(cells.items(), start=1):
        answers[cell] = _read(path, eval_spec.rows[eval_spec.sequence.names[cell[1]]], len(eval_spec.rows))
        progress("reading", number, len(cells))
    for (after, task), found in answers.items():
        write_answers(eval_spec.answers_path(after, task, ROUTE), found)
    facts = RunFacts(
        run=recipe.run.name,
        method=method,
        seed=recipe.seed,
        recipe={key: value for key, value in recipe_facts(recipe).items() if key in ("seed", "data", "evaluation")},
        base=base,
        data=data.fingerprint,
        data_files=data.files,
    )
    try:
        results = aggregate(eval_spec, facts, sorted({after for after, _ in cells}), progress)
    except ValueError as error:
        raise RegistryError(str(error)) from error
    write_results(recipe.run / "results.json", results)
    bind_results(recipe.run)
    stated = []
    for (after, task), accuracy in said.items():
        protocol, scored = _as_coin(results, ROUTE, after, task)
        if scored is not None:
            names = eval_spec.sequence.names[task], eval_spec.sequence.names[after]
            stated.append(Stated(*names, stated=accuracy, scored=scored, protocol=protocol))
    return results, stated


def _cells(source: Path, eval_spec: EvalSpec) -> dict[tuple[int, int], Path]:
    """(stage, task), both from 0, to the file of its answers."""
    index = {name.casefold(): position for position, name in enumerate(eval_spec.sequence.names)}
    cells: dict[tuple[int, int], Path] = {}
    for path in sorted(source.glob(f"*/*/{ANSWERS}")):
        for folder in (path.parent.parent, path.parent):
            if folder.name.casefold() not in index:
                raise RegistryError(
                    f"{folder}: no task of {eval_spec.sequence.name} is called so; name folders TASK/STAGE, the stage "
                    f"by the task learned last: {', '.join(eval_spec.sequence.names)}"
                )
        cell = index[path.parent.name.casefold()], index[path.parent.parent.name.casefold()]
        if cell in cells:
            raise RegistryError(f"{path}: holds the same cell as {cells[cell]}; keep one of them")
        cells[cell] = path
    if not cells:
        raise RegistryError(f"{source}: no answers; expected {source}/TASK/STAGE/{ANSWERS}")
    return cells


def _read(path: Path, rows: Any, num_tasks: int) -> list[Answer]:
    """The answers of one file in the rows' order, each row answered once."""
    prompts: Mapping[str, str] = {row["id"]: row["turns"][0]["text"] for row in rows}
    lines: dict[str, int] = {}
    answers: dict[str, Answer] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            answer = _answer(line, f"{path}:{number}")
            if answer.id in lines:
                raise RegistryError(
                    f"{path}:{number}: doubled id {shown(answer.id)}, answered before in line {lines[answer.id]}"
                )
            if answer.id not in prompts:
                raise RegistryError(f"{path}:{number}: unknown id {shown(answer.id)}; no such question is asked")
            if answer.located is not None and not -1 <= answer.located < num_tasks:
                raise RegistryError(f"{path}:{number}: located at {answer.located}, and tasks are 0 to {num_tasks - 1}")
            lines[answer.id] = number
            own = prompts[answer.id]
            same = answer.prompt in ("", _without_marker(own))
            answers[answer.id] = replace(answer, prompt=own) if same else answer
    missing = [sample_id for sample_id in prompts if sample_id not in answers]
    if missing:
        raise RegistryError(
            f"{path}: missing id {shown(missing[0])} ({len(missing)} of {len(prompts)} are not answered)"
        )
    return [answers[sample_id] for sample_id in prompts]


def _answer(line: bytes, where: str) -> Answer:
    try:
        document = parse_json(line)
        raw_id, text, metadata = document["question_id"], document["text"], document.get("metadata") or {}
        prompt, kept = document.get("prompt", ""), {key: metadata.get(key) for key in OWN}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RegistryError(f"{where}: not an answer ({shown(error)}); expected question_id and text") from error
    if isinstance(raw_id, bool) or not isinstance(raw_id, (int, str)) or not isinstance(text, str):
        raise RegistryError(f"{where}: question_id must be a number or a string, and text a string")
    answer = Answer(str(raw_id), text, prompt=str(prompt), **kept)  # blanks stay: they decide under `coin`
    if any(isinstance(kept[key], bool) or not isinstance(kept[key], kinds) for key, kinds in OWN.items()):
        raise RegistryError(f"{where}: metadata: located is the index of a task, score a number, failed says why")
    return answer


def _stated(path: Path) -> float:
    found = re.search(rb"Accuracy:\s*(\d+(?:\.\d+)?)\s*%", path.read_bytes())
    if found is None:
        raise RegistryError(f"{path}: no line `Accuracy: xx.xx%`; correct or remove the file")
    return float(found[1])


def _without_marker(prompt: str) -> str:
    return prompt.replace(MARKER, "").strip()


def _refuse_full(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise RegistryError(f"{folder}: holds files already; give a folder of its own")
