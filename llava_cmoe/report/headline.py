"""Several methods on one sequence, each over several seeds: the headline, as a document and as tables.

The document is committed under `eval/results/`; the tables of README.md and docs/results.md are generated from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava_cmoe.evaluation.log import Results
from llava_cmoe.registry.schema import differing_keys
from llava_cmoe.report.summary import (
    SeedSummary,
    Shared,
    check_comparable,
    difference,
    difference_cell,
    measures,
    over_seeds,
    spread,
    spread_cell,
    spread_table,
)
from llava_cmoe.report.tables import NOTHING, markdown

COLUMNS = measures(
    *("immediate", "last", "last_coin", "maa", "bwt", "forgetting", "located_right", "words_alone"),
    *("oracle_minus_located", "located_minus_random", "trained_thousands", "grown_later", "stored_kilobytes"),
    *("seconds", "last_of_first"),
)
README_COLUMNS = measures("immediate", "last", "bwt", "located_right", "words_alone", "trained_thousands")
CONTROL = "lora_per_task"
"""The row that every other is compared with: what locating alone is worth."""


class Headline(Shared):
    """What is the same in all runs, and the summary of every row."""

    tasks: tuple[str, ...]
    rows: dict[str, SeedSummary]


SHARED = Headline.model_fields.keys() - {"rows"}
"""Fields of the results in which all runs must agree."""

PER_RUN = Results.model_fields.keys() - SHARED - {"format", "method", "recipe", "definitions"}
"""Fields that the summary keeps of every run."""


def summarise(runs: Sequence[Results]) -> Headline:
    """Group finished runs by name (`replay_1_3` of seed 3: `replay_1`), or else by method, in order of occurrence.

    Raises:
        ValueError: a run that is not finished, or runs that cannot stand in one table: they differ in one of `SHARED`,
            or a row has several recipes, or one seed twice.
    """
    check_comparable(runs, SHARED)
    groups: dict[str, list[Results]] = {}
    for run in runs:
        seed = f"_{run.seed}"
        groups.setdefault(run.run.removesuffix(seed) if run.run.endswith(seed) else run.method, []).append(run)
    rows = {name: over_seeds(name, group, COLUMNS, PER_RUN) for name, group in groups.items()}
    return Headline(**runs[0].model_dump(include=SHARED), rows=rows)


def joined(before: Headline, now: Headline) -> Headline:
    """The rows measured before, those of now in their place or behind them.

    Raises:
        ValueError: they differ in one of `SHARED`, so that they cannot stand in one table.
    """
    one, other = (headline.model_dump(include=SHARED) for headline in (before, now))
    if differences := list(differing_keys(one, other)):
        raise ValueError(f"rows measured before differ in {', '.join(differences)}; write to another file")
    return now.model_copy(update={"rows": before.rows | now.rows})


def headline_markdown(headline: Headline) -> str:
    """Every number of the headline: a line per row."""
    return spread_table("method", headline.rows, COLUMNS)


def against_control_markdown(headline: Headline) -> str | None:
    """What separates every other row from the control, seed by seed; None where there is no control."""
    if CONTROL not in headline.rows:
        return None
    control, keys = headline.rows[CONTROL], ("immediate", "last", "maa", "bwt")
    rows = [
        [name, *(difference_cell(difference(summary, control, key)) for key in keys)]
        for name, summary in headline.rows.items()
        if name != CONTROL
    ]
    return markdown([f"minus {CONTROL}", *(COLUMNS[key].heading for key in keys)], rows, num_text_columns=1)


def readme_markdown(headline: Headline) -> str:
    """The README's table: a line per method, and below it what the numbers are of."""
    seeds = max((summary.seeds for summary in headline.rows.values()), key=len)
    note = (
        f"*{len(headline.tasks)} tasks, protocol `{headline.protocol}`; percent and percent points, mean ± standard "
        f"deviation over the seeds {', '.join(map(str, seeds))}.*"
    )
    tables = (spread_table("method", headline.rows, README_COLUMNS), against_control_markdown(headline), note)
    return "\n\n".join(filter(None, tables))


def tasks_markdown(headline: Headline) -> str:
    """Accuracy on each task after the last one: a line per method."""
    rows = []
    for name, summary in headline.rows.items():
        last_rows = [next(iter(run["routes"].values()))["matrix"][-1] for run in summary.results]
        by_task = [[value for value in values if value is not None] for values in zip(*last_rows, strict=True)]
        cells = [spread_cell(spread(values)) if len(values) == len(last_rows) else NOTHING for values in by_task]
        rows.append([name, str(len(summary.seeds)), *cells])
    return markdown(["method", "seeds", *headline.tasks], rows, num_text_columns=1)
