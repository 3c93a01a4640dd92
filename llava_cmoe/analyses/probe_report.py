"""Probing without consequences: where would each task grow, asked of a run as it is.

How much a probe is used says something only beside how much it is used for a task that needs nothing, one that is
learned already. Nothing is added and nothing is written; learning is `sequence.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from rich import box
from rich.table import Table
from transformers import set_seed

from llava_cmoe.evaluation.log import RunFacts
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.probing import probe_use
from llava_cmoe.records import Growth
from llava_cmoe.report.figures import site_label
from llava_cmoe.runs.facts import facts_of_run
from llava_cmoe.runs.run import Progress, check_learned, open_learned
from llava_cmoe.runs.stage import fit_fn, stage_data
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.cmoe import CmoeSettings, ProbeSettings
from llava_cmoe.settings.run import Recipe


@dataclass(frozen=True)
class Probed:
    """What probing says of one task.

    Attributes:
        task: its name.
        learned: whether the probed model had learned it.
        use: site name to the mean frequency of its probes.
        growth: where it would grow, by which frequencies and thresholds.
    """

    task: str
    learned: bool
    use: dict[str, float]
    growth: Growth


class ProbeReport(RunFacts):
    """What probing said of every task of a run's sequence, and of which model by which settings."""

    after: int
    """Tasks that the probed model had learned."""
    probe: ProbeSettings
    """How it was probed; the recipe says how the run itself was."""
    tasks: tuple[Probed, ...]
    """In the order in which they are learned."""


def probe_tasks(recipe: Recipe, after: int | None = None, progress: Progress = lambda *_: None) -> ProbeReport:
    """Probe every task of a run's sequence on the model as it was after its first `after` tasks (as it is if absent).

    A task is probed on the rows, and from the seed, with which learning probes it: of the next task this tells the
    very growth that learning it would begin with.

    Raises:
        RecipeError: the run's method does not probe.
        RegistryError: so many tasks are not learned, or none.
    """
    training = recipe.training.model_copy(update={"checkpoint_steps": None})  # nothing is left in the run's folder
    if not isinstance(recipe.method, CmoeSettings):
        raise RecipeError(f"{recipe.run}: method {recipe.method.name} does not probe; cmoe does")
    wanted = check_learned(recipe, after) if after is None else after
    run = open_learned(recipe.model_copy(update={"training": training}), after)
    assert isinstance(run.method, Cmoe)
    probed = []
    for index, stage in enumerate(run.stages):
        data = stage_data(run, wanted, stage)
        set_seed(data.seed)
        fit = fit_fn(run, data, partial(progress, f"{index + 1}/{len(run.stages)} {stage.name}"))
        growth, _ = run.method.probe(data, fit)
        use = {site: probe_use(used, run.method.settings.probe) for site, used in growth.frequencies.items()}
        probed.append(Probed(stage.name, index < wanted, use, growth))
    return ProbeReport(
        **facts_of_run(run).model_dump(), after=wanted, probe=run.method.settings.probe, tasks=tuple(probed)
    )


def render(calibration: ProbeReport) -> Table:
    """A row per task: how much the probe of each layer was used, bold where the layer would grow."""
    sites = list(dict.fromkeys(site for one in calibration.tasks for site in one.use))
    title = "use of the probes, percent of a token's slots (bold: the layer would grow)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("task", style="bold", no_wrap=True)
    table.add_column("learned")
    for site in sites:
        table.add_column(site_label(site), justify="right")
    table.add_column("would grow", justify="right")
    for one in calibration.tasks:
        grown = one.growth.new_experts
        # No number where no counted row has the picture that a site reads.
        cells = [f"{'[bold]' * (site in grown)}{100 * one.use[site]:.0f}" if site in one.use else "" for site in sites]
        table.add_row(one.task, "yes" if one.learned else "no", *cells, f"{len(grown)} of {len(sites)}")
    return table
