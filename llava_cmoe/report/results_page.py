"""docs/results.md as a whole, from the JSON that is committed in `eval/results`.

A section is a function from that folder to Markdown. Its sentences name what was measured and what to compare it
with; every number comes from a file, so new results need new files only. A section without its file is marked so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_cmoe.report.analysis_tables import (
    merges_section,
    probe_section,
    similarity_section,
    unseen_section,
)
from llava_cmoe.report.headline import Headline, against_control_markdown, headline_markdown, tasks_markdown
from llava_cmoe.report.page_parts import missing, named, pictures, read_document, source
from llava_cmoe.report.speed_tables import locating_section, steps_section, tasks_section
from llava_cmoe.report.studies import differences_markdown, read_study, study_markdown
from llava_cmoe.report.tables import markdown, number

HEADLINE = "pocket.json"
"""The document that the README's table comes from, too."""

INTRODUCTION = """# Results

<!-- Generated as a whole by `python eval/results_page.py` from the JSON in eval/results/; do not edit. -->

Everything here was measured on the pocket sequence: rendered tasks in CoIN's order and formats, learned on the pocket
backbone that ships with this package. The numbers are comparable with each other, not with CoIN's. Accuracies are in
percent and differences in percent points; *a ± b* is mean and standard deviation over seeds. The words are those of the
[glossary](glossary.md).

The headline's settings were chosen on a validation split of the training rows, three learning rates a method, and its
runs read the test questions once, by seeds and on rendered data that nothing was chosen on. Its seconds were measured
beside other work: they rank nothing. Of one method test answers chose the rate, in its favour: sequential LoRA's
best on validation rows by 0.2 points, 3e-3, ended at a last of 0.1 with seed 14, so its row is of 1.5e-3. Sections
whose source line says protocol `strict` version 1, and the analyses without such a line, are older: measured on test
questions of an easier pocket sequence, in which the words alone named every task, with the recipes of that time."""


@dataclass(frozen=True)
class StudyText:
    """The question of a study, and which of its variants are compared: pairs whose difference is stated."""

    question: str
    pairs: tuple[tuple[str, str], ...]


STUDIES = {
    "growth": StudyText(
        "Where experts grow, and what that costs; one seed, so no difference is claimed. `everywhere` and `nowhere` "
        "are the bounds; `need` grows the more the less a learned task knows of the new one; `global_A` and "
        "`layer_A` grow where probes are used more than the threshold of Eq. 2; `random_A` grows in as many layers, "
        "drawn at random: the control of the choice of layers.",
        (),
    ),
    "design": StudyText(
        "How a task of few rows begins, on validation rows; one seed, so no difference is claimed. `need` is the "
        "recipe: a task begins as its nearest if that one is near, and afresh otherwise. `as_nearest` always does.",
        (),
    ),
    "old_experts": StudyText(
        "How many old experts a task's routers know (`probe.old_experts`), on validation rows; one seed, so no "
        "difference is claimed. `need` of the study design knew all of them.",
        (),
    ),
    "locator": StudyText(
        "What tells tasks apart, on validation rows; one seed, so no difference is claimed. `default` is the "
        "headline's locator: probabilistic PCA of words and picture as they enter the LLM. `paper` is a VAE of the "
        "last token of the last layer. All variants answer with the same experts.",
        (),
    ),
    "low_data": StudyText(
        "Few rows: what a pool of experts is for. 100 and 400 training rows a task, on test questions.",
        (("cmoe_100", "lora_100"), ("cmoe_400", "lora_400")),
    ),
    "sites": StudyText(
        "Experts before the LLM, on the three tasks that need visual detail: in the LLM alone, also in the projector, "
        "also in the vision encoder; one seed, so no difference is claimed.",
        (),
    ),
}
"""Studies that are known by name; any other committed study is shown without a question and without differences."""


def results_page(results: Path) -> str:
    """The whole page, for the JSON in a folder; pictures are linked as `docs/` sees them."""
    sections = [INTRODUCTION, _headline(results), _backbone(results)]
    sections += [_study(path, results) for path in sorted(results.glob("study_*.json"))]
    sections += [section(results) for section in (merges_section, probe_section, similarity_section, unseen_section)]
    sections += [section(results) for section in (steps_section, tasks_section, locating_section)]
    return "\n\n".join(sections) + "\n"


def _headline(results: Path) -> str:
    path = results / HEADLINE
    if not path.exists():
        return missing("Headline", path)
    found = Headline.model_validate_json(path.read_bytes())
    text = (
        "*Immediate* is the mean accuracy on each task right after learning it, *last* the mean over all tasks after "
        "the last one, *MAA* the mean over stages of the mean over the tasks so far, *BWT* the mean of last minus "
        "immediate. *Last by `coin`* is what CoIN's released scripts make of the same answers. *Oracle gap* is what "
        "*last* loses because the task is located and not given; *gain over random* is what it gains over the routers "
        "of a random task."
    )
    seed = min(seed for summary in found.rows.values() for seed in summary.seeds)
    shown = {
        "matrix.png": f"accuracy matrices of seed {seed} (row: after learning that task; column: on that task)",
        "confusion.png": f"which task the locator chose, seed {seed}",
        "growth.png": f"where experts were added, seed {seed}",
    }
    parts = (
        *("## Headline", text, headline_markdown(found)),
        *filter(
            None, ("Differences, paired over the seeds, with their 95 % intervals:", against_control_markdown(found))
        ),
        *("After the last task, task by task:", tasks_markdown(found)),
        *pictures(results, shown),
        source(path, found),
    )
    return "\n\n".join(parts)


def _backbone(results: Path) -> str:
    path = results / "pocket_base.json"
    if not path.exists():
        return missing("Backbone", path)
    found = read_document(path)
    text = (
        "What the pocket backbone can do before it learns a task, from its pretraining on captions and on text-only "
        "questions (`train/pretrain_pocket.py`). It has never met a question about a picture."
    )
    rows = [[ability, number(right)] for ability, right in found["percent_right"].items()]
    table = markdown(["ability", "right (%)"], rows, num_text_columns=1)
    return "\n\n".join(("## Backbone", text, table, named(path, f"base {found['base'][:12]}, seed {found['seed']}")))


def _study(path: Path, results: Path) -> str:
    found = read_study(path)
    name = found.study["name"]
    parts = [f"## Study {name}"]
    if name in STUDIES:
        parts.append(STUDIES[name].question)
    parts.append(study_markdown(found))
    if name in STUDIES and (pairs := [pair for pair in STUDIES[name].pairs if set(pair) <= found.variants.keys()]):
        parts.append(
            "One variant minus another, seed by seed, with the 95 % interval of the paired difference (t over seeds)."
        )
        parts.append(differences_markdown(found, pairs))
    return "\n\n".join((*parts, *pictures(results, {f"study_{name}.png": f"study {name}"}), source(path, found)))
