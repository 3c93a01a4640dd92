"""Comparing runs: the same questions, answered by each, tell whether a difference is more than chance.

The test is a paired bootstrap over questions (`bootstrap.py`): both runs are drawn the same questions, so what makes a
question hard for both cancels. It speaks of these two models on other questions, not of other seeds of their methods.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from llava_cmoe.evaluation.bootstrap import DESCRIPTION, Floats, interval, p_value, resampled_means
from llava_cmoe.evaluation.log import Results
from llava_cmoe.evaluation.rescoring import open_examined, results_of
from llava_cmoe.evaluation.scoring import score_cell
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.report.comparison import Comparison, Difference, published_columns, run_column, warnings_of
from llava_cmoe.report.published import published

Scores = Mapping[str, Mapping[str, float]]
"""Task to question id to score, after the last task."""


def compare(
    folders: Sequence[Path],
    published_name: str | None = None,
    root: Path | None = None,
    without: Collection[str] = (),
) -> Comparison:
    """Put runs side by side, and test each against the first.

    Args:
        folders: with `results.json`; those that also have their answers, and their data, are tested.
        published_name: a table of `published_results.yaml`.
        root: the data root, where it is not the one that the results name.
        without: scorers whose tasks are not tested.

    Raises:
        RegistryError: a folder without results.
        RecipeError: an unknown published table.
    """
    table = None if published_name is None else published(published_name)
    runs = list(zip(run_names(folders), map(results_of, folders), strict=True))
    warnings = list(warnings_of(runs, table))
    scores: dict[str, Scores] = {}
    for (name, _), folder in zip(runs, folders, strict=True) if len(runs) > 1 else ():
        try:
            scores[name] = final_scores(folder, root, without)
        except (RegistryError, ValueError) as error:
            warnings.append(f"{name} is not tested: {error}")
    differences: list[Difference] = []
    (reference, first), *others = runs
    for name, results in others:
        if reference in scores and name in scores:
            if reason := _untestable(first, results):
                warnings.append(f"{name} is not tested against {reference}: {reason}")
                continue
            alike, unlike = _shared(scores[reference], scores[name])
            if unlike:
                warnings.append(f"{name} was asked other questions than {reference}: {', '.join(unlike)}; not tested")
            differences += paired_differences(reference, scores[reference], name, scores[name], alike)
    return Comparison(
        runs=tuple(run_column(name, results) for name, results in runs),
        published=() if table is None else published_columns(table, first.tasks),
        source=None if table is None else f"{table.title}; {table.source}",
        differences=tuple(differences),
        bootstrap=DESCRIPTION,
        warnings=tuple(warnings),
    )


def final_scores(folder: Path, root: Path | None = None, without: Collection[str] = ()) -> Scores:
    """Score of every question of the headline route's last row; of tasks whose accuracy is the mean of these alone."""
    examined = open_examined(folder, root)
    eval_spec, last = examined.eval_spec, examined.rows[-1]
    route = eval_spec.settings.routes[0]
    scores = {}
    for task, name in enumerate(eval_spec.sequence.names):
        is_asked = eval_spec.sequence.tasks[task].scorer not in without
        if is_asked and examined.results.headline.matrix[last][task] is not None:
            cell = score_cell(eval_spec, last, task, route)
            if cell.is_mean:
                scores[name] = dict(zip(eval_spec.rows[name]["id"], cell.scores, strict=True))
    return scores


def paired_differences(
    first: str, first_scores: Scores, second: str, second_scores: Scores, tasks: Sequence[str]
) -> list[Difference]:
    """Second minus first, in percent points: each of the tasks, then the mean over them."""
    drawn_NR, found = [], []
    for index, task in enumerate(tasks):
        ours, theirs = first_scores[task], second_scores[task]
        scores_QC = 100 * np.array([[ours[sample], theirs[sample]] for sample in ours])
        means_RC = resampled_means(scores_QC, index)
        drawn_NR.append(means_RC[:, 1] - means_RC[:, 0])
        value = float(np.mean(scores_QC[:, 1] - scores_QC[:, 0]))
        found.append(_difference(first, second, (task,), value, drawn_NR[-1]))
    if len(tasks) > 1:
        value = sum(one.value for one in found) / len(found)
        found.append(_difference(first, second, tuple(tasks), value, np.mean(drawn_NR, axis=0)))
    return found


def _difference(first: str, second: str, tasks: tuple[str, ...], value: float, drawn_R: Floats) -> Difference:
    return Difference(
        first=first, second=second, tasks=tasks, value=value, interval=interval(drawn_R), p=p_value(drawn_R)
    )


def _shared(ours: Scores, theirs: Scores) -> tuple[list[str], list[str]]:
    """Tasks that both answered: those of which the same questions, and the others."""
    both = [task for task in ours if task in theirs]
    alike = [task for task in both if ours[task].keys() == theirs[task].keys()]
    return alike, [task for task in both if task not in alike]


def _untestable(first: Results, other: Results) -> str | None:
    """Why two runs' scores of a question cannot be subtracted; other bases can, with the warning that there is."""
    for key in ("data", "task_versions", "protocol", "protocol_version"):
        if getattr(first, key) != getattr(other, key):
            return f"another {key.replace('_', ' ')}"
    return None


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of those above them as tell all apart.

    Raises:
        RegistryError: a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RegistryError("a run is given twice; a run does not differ from itself")
    parts, num = [folder.resolve().parts for folder in folders], 1
    while len({one[-num:] for one in parts}) < len(parts):
        num += 1
    return ["/".join(one[-num:]) for one in parts]
