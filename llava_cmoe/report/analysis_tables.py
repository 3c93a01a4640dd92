"""The sections of docs/results.md about finished runs: merges, probes, experts, unseen inputs.

The documents come from rooms that import this one (merging, analyses), so they are read as plain JSON.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from llava_cmoe.report.figures import site_label
from llava_cmoe.report.page_parts import Document, missing, named, questions, read_document, run_facts, source
from llava_cmoe.report.summary import Shared
from llava_cmoe.report.tables import NOTHING, markdown, number


def merges_section(results: Path) -> str:
    """What leaving experts out saves and costs, run by run."""
    path = results / "merges.json"
    if not path.exists():
        return missing("Merges", path)
    found = read_document(path)
    shared = Shared.model_validate({key: found[key] for key in Shared.model_fields if key in found})
    held_out = questions({f"{run['run']} {task}": rows for run in found["runs"] for task, rows in _held_out(run)})
    text = (
        "A merge leaves out as many experts as keep every task's loss within the bound, measured on training rows that "
        f"were not learned ({held_out} a task). Accuracies are those of the located route."
    )
    headings = (
        *("run", "bound (nats)", "experts kept", "expert bytes (MB)", "saved (%)"),
        *("last", "last, merged", "largest loss of a task"),
    )
    table = markdown(headings, [_merge_cells(run) for run in found["runs"]], num_text_columns=1)
    return "\n\n".join(("## Merges", text, table, source(path, shared)))


def _held_out(run: Document) -> list[tuple[str, int]]:
    return list(run["merge"]["held_out"].items())


def _merge_cells(run: Document) -> list[str]:
    merge = run["merge"]
    before, after = (merge["expert_bytes"][when] for when in ("before", "after"))
    accuracies = list(merge["accuracy"].values())
    kept = [stand_in == expert for of_E in merge["stand_ins"].values() for expert, stand_in in enumerate(of_E)]
    return [
        run["run"],
        f"{merge['bound']:g}",
        f"{sum(kept)} of {len(kept)}",
        f"{after / 1e6:.1f} of {before / 1e6:.1f}",
        number(100 * (1 - after / before)),
        number(fmean(accuracy["before"] for accuracy in accuracies)),
        number(fmean(accuracy["after"] for accuracy in accuracies)),
        number(max(accuracy["before"] - accuracy["after"] for accuracy in accuracies)),
    ]


def probe_section(results: Path) -> str:
    """How much probes are used for tasks that are learned and for new ones, layer by layer."""
    paths = sorted(results.glob("calibration*.json"))
    if not paths:
        return missing("Probe report", results / "calibration.json")
    text = (
        "Every task of the sequence is probed on a run that has learned the first of them, and nothing is changed "
        "(`llava-cmoe probe`). A task that is learned already should need no new experts. The numbers are the use of "
        "the probes in percent of a token's slots, bold where the layer would grow."
    )
    return "\n\n".join(("## Probe report", text, *map(_probed, paths)))


def _probed(path: Path) -> str:
    found = read_document(path)
    sites, probe = found["sites"], found["probe"]
    rows = []
    for one in found["tasks"]:
        grown = one["growth"]["new_experts"]
        used = {site: f"{100 * use:.1f}" for site, use in one["use"].items()}
        cells = [f"**{used[site]}**" if site in grown else used.get(site, NOTHING) for site in sites]
        rows.append([one["task"], "yes" if one["learned"] else "no", *cells, f"{len(grown)} of {len(sites)}"])
    table = markdown(["task", "learned", *map(site_label, sites), "would grow"], rows, num_text_columns=2)
    means = []
    for learned, label in ((True, "learned"), (False, "new")):
        uses = [fmean(one["use"].values()) for one in found["tasks"] if one["learned"] is learned]
        means.append(f"{label} tasks {100 * fmean(uses):.1f} %" if uses else f"no {label} task")
    summary = (
        f"`method.probe.scope={probe['scope']}`, `method.probe.alpha={probe['alpha']:g}`, after "
        f"{found['after']} tasks; mean use: {', '.join(means)}."
    )
    return "\n\n".join((summary, table, named(path, run_facts(found))))


def similarity_section(results: Path) -> str:
    """Whether experts that start as copies stay copies."""
    path = results / "diversity.json"
    if not path.exists():
        return missing("Expert similarity", path)
    found = read_document(path)
    text = (
        "New experts start as copies of one old expert. The cosine between what two experts add, mean over layers, "
        "shows whether they stay copies: among the experts that a task added to a layer, between them and the expert "
        "they copied, and between them and all older ones."
    )
    columns = {"among_new": "among the new", "to_origin": "to the copied one", "to_pool": "to all older ones"}
    rows = [
        [task, *(NOTHING if alike[key] is None else f"{alike[key]:.2f}" for key in columns)]
        for task, alike in found["tasks"].items()
    ]
    table = markdown(["task", *columns.values()], rows, num_text_columns=1)
    return "\n\n".join(("## Expert similarity", text, table, named(path, run_facts(found))))


def unseen_section(results: Path) -> str:
    """Whether questions of a task that was never learned go to the base model."""
    paths = sorted(results.glob("unseen*.json"))
    if not paths:
        return missing("Unseen inputs", results / "unseen.json")
    text = (
        "The run is given questions of a task that it never learned (`llava-cmoe unseen`). They should go to the base "
        "model; of the learned tasks' own questions none should (*false rejection*). The threshold is "
        "`method.locator.unseen_threshold`; one that is a number was chosen by hand after a look at such scores."
    )
    headings = (
        *("run", "threshold", "task", "questions", "sent to the base model (%)"),
        *("accuracy located", "accuracy of the base model", "false rejection (%)"),
    )
    rows, sources = [], []
    for path in paths:
        found = read_document(path)
        threshold = found["recipe"]["method"]["locator"]["unseen_threshold"]
        label = "calibrated" if threshold is None else f"{threshold:g}"
        for task, one in found["unseen"].items():
            numbers = (one["to_base"], one["located"], one["base_alone"], found["false_rejection_rate"])
            rows.append([found["run"], label, task, str(one["rows"]), *map(number, numbers)])
        sources.append(named(path, run_facts(found)))
    return "\n\n".join(("## Unseen inputs", text, markdown(headings, rows, num_text_columns=3), *sources))
