"""Runs studies: renders the data they lack, learns their runs, and writes what came out of each.

runs/studies/NAME/study.json      the study, and every number per variant
                  table.md        the same as a table
                  last.png        last mean of each variant, and against its cost
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llava_cmoe.data.task_data import lacks_pocket
from llava_cmoe.pocket.root import make_pocket_root
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.report.figures import draw_study
from llava_cmoe.report.studies import StudySummary, study_markdown, summarise_study
from llava_cmoe.studies.jobs import Watcher, learn_all, slots
from llava_cmoe.studies.plan import PlannedRun, StudyPlan


def render_missing(plans: Sequence[StudyPlan], progress: Callable[[str, int, int], None]) -> None:
    """Render each missing pocket sequence once, before several runs would render it at the same time."""
    runs = [run for plan in plans for run in plan.runs]
    lacking = {run.recipe.data.root: run.recipe.data.pocket_seed for run in runs if lacks_pocket(run.recipe.data)}
    for root, seed in lacking.items():
        make_pocket_root(root, progress, seed=seed or 0)


def run_studies(plans: Sequence[StudyPlan], jobs: int | None, watcher: Watcher) -> list[PlannedRun]:
    """Learn what is not finished yet, and write what came out of every study that then is.

    Args:
        plans: checked studies, whose runs start in this order.
        jobs: how many runs at a time; what suits the machine where absent.
        watcher: called while the runs are learned, and after each.

    Returns:
        The runs that failed; nothing is written for their studies.
    """
    runs = [run for plan in plans for run in plan.runs]
    failed = learn_all(runs, slots(jobs, len(runs)), watcher)
    for plan in plans:
        if not any(run in failed for run in plan.runs):
            write_study(plan)
    return failed


def write_study(plan: StudyPlan) -> StudySummary:
    """Summarise a study whose runs are all finished, and write its document, table and figure.

    Raises:
        RegistryError: a run is not finished, or its numbers cannot stand in one table with the others'.
    """
    results = [(run, run.results()) for run in plan.runs]
    missing = [run.name for run, found in results if found is None]
    if missing:
        raise RegistryError(f"{', '.join(missing)}: not finished; the same command goes on")
    groups = {
        variant: [found for run, found in results if run.variant == variant and found is not None]
        for variant in plan.study.all_variants()
    }
    try:
        summary = summarise_study(plan.study.model_dump(mode="json"), groups)
    except ValueError as error:
        raise RegistryError(f"{plan.folder}: {error}") from error
    write_atomically(plan.folder / "study.json", f"{summary.model_dump_json(indent=1)}\n".encode())
    write_atomically(plan.folder / "table.md", f"{study_markdown(summary)}\n".encode())
    draw_study(summary, plan.folder / "last.png")
    return summary
