"""README.md of a run on the hub: what was learned by which method, how well it is kept, and how to load it."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from llava_cmoe.evaluation.log import Results
from llava_cmoe.export.adapter_card import hub_name
from llava_cmoe.registry.schema import TaskRecord
from llava_cmoe.report.tables import matrix_markdown
from llava_cmoe.settings.run import Recipe


def run_card(repo_id: str, recipe: Recipe, last: TaskRecord, results: Results | None) -> str:
    """The card as Markdown.

    Args:
        repo_id: where it will lie.
        recipe: of the run.
        last: record of the task learned last; its hash stands for all before it.
        results: what was measured; None if nothing was.
    """
    base, method = hub_name(recipe.backbone.path), recipe.method.name
    tags = ["llava_cmoe", "continual-learning", "lora", method]
    data = ModelCardData(library_name="llava_cmoe", base_model=base, tags=tags)
    name = repo_id.rpartition("/")[2]
    backbone = "" if base == "pocket" else f" --backbone {base or 'FOLDER'}"
    facts = {
        "method": method,
        "seed": str(recipe.seed),
        "tasks learned": str(last.index + 1),
        "sequence": recipe.data.sequence,
        "backbone": base or "a local folder",
        "backbone (sha256)": last.backbone_fingerprint,
        "data (sha256)": last.data_fingerprint,
        "last record (sha256)": last.sha256,
        **last.versions,
    }
    if results is not None:
        facts = {"protocol": f"{results.protocol} {results.protocol_version}", **facts}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    measured = "Nothing is measured yet." if results is None else matrix_markdown(results)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"A sequence of tasks, learned one after another by `{method}` on a frozen vision-language model, with the "
        "toolkit llava_cmoe.\n\n"
        f"```\nllava-cmoe pull {repo_id} --to runs/{name}{backbone}\nllava-cmoe chat runs/{name} --image picture.png\n"
        f"```\n\n## Accuracy\n\nEach row: after learning that task. Each column: percent right on that task.\n\n"
        f"{measured}\n\n## Made by\n\n| | |\n| --- | --- |\n{rows}\n"
    )
