"""README.md of what `export` writes: what it is, whether it answers as its run does, how to load it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from llava_cmoe.export.agreement import Agreement
from llava_cmoe.provenance.versions import versions
from llava_cmoe.registry.schema import TaskRecord
from llava_cmoe.settings.run import Recipe

ADAPTER = """{imports}import torch
from peft import PeftModel
from transformers import {auto_class}
base = {auto_class}.from_pretrained({base}, dtype=torch.{dtype}, attn_implementation="{attention}")
model = PeftModel.from_pretrained(base, "{folder}")"""
MERGED = """import torch
from transformers import {auto_class}, AutoProcessor
model = {auto_class}.from_pretrained("{folder}", dtype=torch.{dtype}, attn_implementation="{attention}")
processor = AutoProcessor.from_pretrained("{folder}")"""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        task: whose experts it holds; None where all tasks are answered alike.
        merged: whether it is a whole checkpoint, and no adapter.
        agreement: with the run, measured where it is an approximation; None where it is exact.
        files: names in the folder.
    """

    task: str | None
    merged: bool
    agreement: Agreement | None
    files: tuple[str, ...] = ()


def hub_name(path: str) -> str | None:
    """A backbone's name on the hub, or `pocket`; None of a local folder, whose path means nothing to others."""
    is_local = path != "pocket" and Path(path).expanduser().exists()
    return path if not is_local and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) else None


def exactness(agreement: Agreement | None) -> str:
    """One sentence: that it is exact, or how far it is not."""
    if agreement is None:
        return "exact: the same experts at the same weights, summed"
    return (
        f"approximate: of {agreement.questions} questions that were not learned {100 * agreement.answers:.1f} % get "
        f"the run's answer, of {agreement.tokens} next tokens {100 * agreement.next_tokens:.1f} % are the run's"
    )


def adapter_card(
    exported: Exported, recipe: Recipe, record: TaskRecord, base: str | None, auto_class: str, folder: str
) -> str:
    """The card as Markdown; `record` is the last one that is in it, `base` the backbone's name where it has one."""
    data = ModelCardData(
        library_name="transformers" if exported.merged else "peft",
        base_model=base,
        tags=["llava_cmoe", "continual-learning", *([] if exported.merged else ["lora"])],
    )
    ships = base == "pocket"
    code = (MERGED if exported.merged else ADAPTER).format(
        imports="from llava_cmoe.pocket.backbone import POCKET_DIR\n" if ships else "",
        base="POCKET_DIR" if ships else f'"{base or "BACKBONE"}"',
        auto_class=auto_class,
        folder=folder,
        dtype=recipe.backbone.dtype,
        attention=recipe.backbone.attention,
    )
    whose = "all its tasks" if exported.task is None else f"its task {exported.task}"
    facts = {
        "method": recipe.method.name,
        "seed": str(recipe.seed),
        "learned last": record.name,
        "record": record.sha256,
        "backbone (sha256)": record.backbone_fingerprint,
        **versions(),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    kind = "merged into its backbone" if exported.merged else "as a LoRA adapter"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {recipe.run.name}, {kind}\n\n"
        f"What the run {recipe.run.name} has learned for {whose}, {kind}: {exactness(exported.agreement)}. Decode "
        f"greedily, as the run does.\n\n```python\n{code}\n```\n\n| | |\n| --- | --- |\n{rows}\n"
    )
