"""What was measured, measured again from the answers on disk: no model is loaded, nothing is generated.

Everything comes from a folder's own `results.json` and `answers/` and from the data root they name, so it works for a
run and for predictions that were brought along (`official/coin_format.py`) alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.aggregate import aggregate
from llava_cmoe.evaluation.eval_spec import EvalSpec, eval_spec_of
from llava_cmoe.evaluation.log import Results, RunFacts, read_results, write_results
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.inside import check_inside
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.settings.base import shown
from llava_cmoe.settings.data import DataSettings
from llava_cmoe.settings.evaluation import EvaluationSettings
from llava_cmoe.settings.recipes import parse_settings


@dataclass(frozen=True)
class Examined:
    """A measured run without its model.

    Attributes:
        folder: where it lies.
        results: what came out.
        eval_spec: what it was asked.
        root: data root of these questions.
        data_files: sha256 of each data file, as it was measured and as it is now.
    """

    folder: Path
    results: Results
    eval_spec: EvalSpec
    root: Path
    data_files: dict[str, str]

    @property
    def rows(self) -> list[int]:
        """Rows of the matrix that were measured; a joint method has only the last."""
        matrices = [measured.matrix for measured in self.results.routes.values()]
        return [
            j for j in range(len(matrices[0])) if any(value is not None for matrix in matrices for value in matrix[j])
        ]


@dataclass(frozen=True)
class Change:
    """An accuracy that is another one after scoring again; None where there is none."""

    route: str
    after: str
    task: str
    before: float | None
    now: float | None


def open_examined(folder: Path, root: Path | None = None, bound: bool = True) -> Examined:
    """Read what a run was asked and what came out.

    Args:
        folder: with `results.json` and `answers/`.
        root: the data root, where it is not the one that the results name.
        bound: whether results that were changed are an error; who scores again makes new ones.

    Raises:
        RegistryError: no results here, or the data or the answers are not those that were measured.
        DataError: the data root is missing or broken.
    """
    results, source = results_of(folder, bound), str(folder / "results.json")
    moved = {} if root is None else {"root": root}
    data = parse_settings(DataSettings, results.recipe["data"] | moved, source, recorded=True)
    asked = results.recipe["evaluation"] | {"routes": tuple(results.routes), "limit": None}
    if results.subset is not None and results.subset.by == "evaluation.limit":  # maybe against its recipe
        asked |= {"limit": results.subset.limit, "subset_seed": results.subset.seed}
    evaluation = parse_settings(EvaluationSettings, asked, source, recorded=True)
    tasks = TaskData.open(data, results.seed, evaluation.split)
    files, names = tasks.files, tasks.sequence.names
    if results.tasks != names:
        others = f"{shown(list(results.tasks))}, and {data.sequence} lists {shown(list(names))}"
        raise RegistryError(f"{source}: is of the tasks {others}; bring that sequence back, or measure the run again")
    if tasks.fingerprint != results.data:
        changed = [name for name in files if results.data_files.get(name, files[name]) != files[name]]
        raise RegistryError(
            f"{source}: was measured on other data than {data.root} holds now{_listed(changed)}; "
            "bring those files back, or name the folder that has them with --root"
        )
    eval_spec = eval_spec_of(tasks, evaluation, folder)
    _check_answers(results, eval_spec)
    return Examined(folder, results, eval_spec, data.root, files)


def results_of(folder: Path, bound: bool = True) -> Results:
    """A run's results; `bound` as above.

    Raises:
        RegistryError: none are here, or not of a known format, or changed; says how to get them.
    """
    check_inside(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise RegistryError(f"{path}: no such file; `llava-cmoe eval {folder}` writes it")
    try:
        return read_results(path, bound)
    except ValueError as error:
        raise RegistryError(str(error)) from error


def rescore(
    examined: Examined, progress: Callable[[str, int, int], None] = lambda *_: None
) -> tuple[Results, list[Change]]:
    """Score the stored answers again and write `results.json`; equal scores give the same bytes."""
    known = examined.results.model_dump(include=set(RunFacts.model_fields))
    facts = RunFacts(**known | {"data_files": examined.data_files})  # an old file has none
    try:
        now = aggregate(examined.eval_spec, facts, examined.rows, progress)
    except ValueError as error:
        raise RegistryError(str(error)) from error
    write_results(examined.folder / "results.json", now)
    bind_results(examined.folder)
    return now, changes(examined.results, now)


def changes(before: Results, now: Results) -> list[Change]:
    """Every accuracy that differs."""
    return [
        Change(route, now.tasks[j], now.tasks[i], old, new)
        for route, measured in now.routes.items()
        for j, (old_row, new_row) in enumerate(zip(before.routes[route].matrix, measured.matrix, strict=True))
        for i, (old, new) in enumerate(zip(old_row, new_row, strict=True))
        if old != new
    ]


def _check_answers(results: Results, eval_spec: EvalSpec) -> None:
    """No cell may vanish because its answers did."""
    for route in eval_spec.settings.routes:
        for j, row in enumerate(results.routes[route].matrix):
            for i, value in enumerate(row):
                path = eval_spec.answers_path(j, i, route)
                if value is not None and not path.is_file():
                    raise RegistryError(
                        f"{path}: is missing, and results.json states its accuracy; "
                        "bring it back, or ask its questions again with `llava-cmoe eval`"
                    )


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""
