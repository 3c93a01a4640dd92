"""Whether every stage has rows enough, before the first one is learned: each later one costs what came before it."""

from __future__ import annotations

from llava_cmoe.data.paths import train_file
from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.methods.base import Stage
from llava_cmoe.settings.run import Recipe


def check_sizes(recipe: Recipe, data: TaskData, stages: tuple[Stage, ...], num_learned: int) -> None:
    """Stop at the first stage, of those still to be learned, that the method's settings could not finish.

    Raises:
        DataError: names the file, its rows and what needs more.
    """
    for index, stage in enumerate(stages):
        if index < num_learned or not stage.learns:
            continue
        num_rows = sum(len(data.train[data.sequence.tasks[task].name]) for task in stage.learns)
        if reason := recipe.method.why_too_few(num_rows, first=index == 0):
            file = train_file(recipe.data.root, data.sequence.tasks[stage.learns[0]])
            rows = f"{num_rows} row{'s' if num_rows != 1 else ''} to learn {stage.name} from"
            raise DataError(Problem(file, f"{rows}, too few for {recipe.method.name}: {reason}"))
