"""Probing without consequences: where would each task grow, asked of a run as it is.

How much a probe is used says something only beside how much it is used for a task that needs nothing, one that is
learned already. Nothing is added and nothing is written; learning is `sequence.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory

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
class Agreement:
    """How alike the decisions are that probing makes from several seeds, over all pairs of them; in percent.

    Attributes:
        layers: sites that grow from both seeds, of those that grow from either.
        copied: sites whose most used expert of the pool is the same.
        chance: the same of experts that are drawn at random.
    """

    layers: float
    copied: float
    chance: float


@dataclass(frozen=True)
class Probed:
    """What probing says of one task.

    Attributes:
        task: its name.
        learned: whether the probed model had learned it.
        use: site name to the mean frequency of its probes.
        growth: where it would grow, by which frequencies and thresholds.
        agreement: of probing it again from other seeds; None where it was probed once.
    """

    task: str
    learned: bool
    use: dict[str, float]
    growth: Growth
    agreement: Agreement | None = None


class ProbeReport(RunFacts):
    """What probing said of every task of a run's sequence, and of which model by which settings."""

    after: int
    """Tasks that the probed model had learned."""
    probe: ProbeSettings
    """How it was probed; the recipe says how the run itself was."""
    seeds: int = 1
    """Seeds from which each task was probed; the first is that of learning, whose use and growth are reported."""
    tasks: tuple[Probed, ...]
    """In the order in which they are learned."""


def probe_tasks(
    recipe: Recipe, after: int | None = None, seeds: int = 1, progress: Progress = lambda *_: None
) -> ProbeReport:
    """Probe every task of a run's sequence on the model as it was after its first `after` tasks (as it is if absent).

    A task is probed on the rows, and from the seed, with which learning probes it: of the next task this tells the
    very growth that learning it would begin with. With several `seeds` it is probed again on rows and from weights that
    the others draw, and what is reported is how far the decisions agree.

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
        own, found = stage_data(run, wanted, stage), list[Growth]()
        for number in range(seeds):
            data = own if number == 0 else replace(own, seed=Random(f"{own.seed}/{number}").getrandbits(31))
            set_seed(data.seed)
            with TemporaryDirectory() as folder:  # a Trainer makes one, and would go on with a checkpoint of the run's
                at = partial(progress, f"{index + 1}/{len(run.stages)} {stage.name}")
                found.append(run.method.probe(data, fit_fn(run, data, at, folder=Path(folder)))[0])
        settings = run.method.settings.probe
        use = {site: probe_use(used, settings) for site, used in found[0].frequencies.items()}
        agreement = agreement_of(found, settings) if seeds > 1 else None
        probed.append(Probed(stage.name, index < wanted, use, found[0], agreement))
    return ProbeReport(
        **facts_of_run(run).model_dump(),
        after=wanted,
        probe=run.method.settings.probe,
        seeds=seeds,
        tasks=tuple(probed),
    )


def agreement_of(found: Sequence[Growth], settings: ProbeSettings) -> Agreement:
    """How far the decisions of several seeds agree; a pair that grows nowhere agrees."""
    pairs, layers, copied, chance = list(combinations(found, 2)), list[float](), list[bool](), list[float]()
    for one, other in pairs:
        grown, also = set(one.new_experts), set(other.new_experts)
        layers.append(len(grown & also) / len(grown | also) if grown | also else 1.0)
        for site in one.frequencies.keys() & other.frequencies.keys():
            pools = [growth.frequencies[site][: -settings.max_new_experts] for growth in (one, other)]
            copied.append(pools[0].index(max(pools[0])) == pools[1].index(max(pools[1])))
            chance.append(1 / len(pools[0]))
    return Agreement(100 * fmean(layers), 100 * fmean(copied), 100 * fmean(chance))


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
    if calibration.seeds > 1:
        for heading in ("same layers, %", "same expert, %", "by chance, %"):
            table.add_column(heading, justify="right")
        table.caption = f"agreement over all pairs of {calibration.seeds} seeds"
    for one in calibration.tasks:
        grown = one.growth.new_experts
        # No number where no counted row has the picture that a site reads.
        cells = [f"{'[bold]' * (site in grown)}{100 * one.use[site]:.0f}" if site in one.use else "" for site in sites]
        agreed = () if one.agreement is None else astuple(one.agreement)
        row = (*cells, f"{len(grown)} of {len(sites)}", *(f"{value:.0f}" for value in agreed))
        table.add_row(one.task, "yes" if one.learned else "no", *row)
    return table
