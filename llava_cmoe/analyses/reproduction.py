"""The same run again, in a folder of its own, and what differs in the end.

On a CPU a recipe, its data and the same versions give the same bytes; what this finds otherwise has a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_cmoe.evaluation.log import Results, comparable, read_answers, read_results
from llava_cmoe.evaluation.rescoring import results_of
from llava_cmoe.registry.schema import RegistryError, differing_keys
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.run import Progress
from llava_cmoe.sequence import learn


@dataclass(frozen=True)
class Reproduction:
    """What differs between a run and its repetition; nothing, where all three are empty.

    Attributes:
        results: dotted keys of results.json, each with both values; times apart.
        answers: answers file to the number of answers that differ; all of one that only one of them has.
        stages: stages whose tensors or facts differ.
    """

    results: tuple[str, ...]
    answers: Mapping[str, int]
    stages: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.results or self.answers or self.stages)


def reproduce(run: Path, to: Path, progress: Progress = lambda *_: None) -> Reproduction:
    """Learn a finished run's recipe again in `to`, going on where it was stopped, and compare.

    Raises:
        RegistryError: the run has no results yet, or `to` is the run itself.
    """
    results_of(run)  # raises where there is nothing to compare with
    if to.resolve() == run.resolve():
        raise RegistryError(f"{to}: that is the run itself; give the repetition a folder of its own")
    learn(Registry(run).recipe().model_copy(update={"run": to}), progress)
    return differences(run, to)


def differences(run: Path, again: Path) -> Reproduction:
    """What differs between two runs of one recipe, under the routes that both were asked; others came later."""
    both = [read_results(folder / "results.json") for folder in (run, again)]
    routes = both[0].routes.keys() & both[1].routes.keys()
    before, after = (_facts(results, routes) for results in both)
    records = [{record.name: record for record in Registry(folder).records()} for folder in (run, again)]
    stages = [
        name
        for name in records[0] | records[1]
        if name not in records[0] or name not in records[1] or _learned(records[0][name]) != _learned(records[1][name])
    ]
    return Reproduction(tuple(differing_keys(before, after)), dict(_answers(run, again, routes)), tuple(stages))


def _facts(results: Results, routes: Collection[str]) -> dict[str, Any]:
    """A run's results under some routes, without times and without the folder's name."""
    facts = {key: value for key, value in comparable(results).items() if key != "run"}
    return facts | {"routes": {name: facts["routes"][name] for name in results.routes if name in routes}}


def _learned(record: Any) -> tuple[object, object]:
    """Hashes of the tensors, and what was told about the stage."""
    return record.files, record.facts


def _answers(run: Path, again: Path, routes: Collection[str]) -> Iterator[tuple[str, int]]:
    """Answers files of which any answer differs, and how many do."""
    names = sorted(
        {str(path.relative_to(folder)) for folder in (run, again) for path in folder.glob("answers/*/*.jsonl")}
    )
    for name in (name for name in names if Path(name).stem.rpartition(".")[2] in routes):
        told = [
            {answer.id: answer for answer in read_answers(folder / name)} if (folder / name).exists() else {}
            for folder in (run, again)
        ]
        differing = sum(told[0].get(key) != told[1].get(key) for key in told[0].keys() | told[1].keys())
        if differing:
            yield name, differing
