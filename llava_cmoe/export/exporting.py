"""A task of a run as a folder that stock libraries load: a PEFT adapter, or a checkpoint with it in the weights.

Which experts a task's gates weigh, and whether any token moves them, is asked of banks and routers (`exact_lora.py`);
what a token moves is approximated only if that is wanted (`fitted_lora.py`), and then measured (`agreement.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from llava_cmoe.backbones.loading import reads_images
from llava_cmoe.backbones.model_types import auto_model
from llava_cmoe.chat.opening import LearnedRun, open_learned
from llava_cmoe.data.batches import Batch, batches
from llava_cmoe.data.encoding import SampleRows
from llava_cmoe.data.task_data import TaskData, sequence_of, subsample
from llava_cmoe.evaluation.answer_end import end_arguments
from llava_cmoe.export.adapter_card import Exported, adapter_card, hub_name
from llava_cmoe.export.agreement import Agreement, Questions, agreement, answers, counted, next_tokens
from llava_cmoe.export.exact_lora import exact_adapters, fixed_gates
from llava_cmoe.export.fitted_lora import fitted_adapters
from llava_cmoe.export.lora import on_bare_backbone
from llava_cmoe.methods import method_of
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.run import Progress
from llava_cmoe.settings.base import RecipeError, shown
from llava_cmoe.settings.run import Recipe


def export(
    run: Path,
    to: Path,
    task: str | None = None,
    *,
    merged: bool = False,
    approximate: bool = False,
    rows: int = 200,
    progress: Progress = lambda *_: None,
) -> Exported:
    """Write what a run answers with when a task is given, as an adapter or merged into the backbone's weights.

    Args:
        run: folder of the run.
        to: folder to make.
        task: name of a learned task; may be left out where all tasks are answered alike, exactly.
        merged: a whole checkpoint instead of an adapter.
        approximate: write the closest adapter where tokens move the gates; needs the run's data.
        rows: that it is fitted on, and questions that it is then compared on, at most.
        progress: called with what is done.

    Raises:
        RegistryError: nothing is learned, or tokens move the gates and nothing approximate is wanted.
        RecipeError: no such task, none is named where it matters, the folder is there already, or quantized weights
            are to be merged into.
    """
    registry = Registry(run)
    recipe = registry.recipe()
    index = _index_of(task, recipe, registry, approximate)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RecipeError(f"{to}: is there already; name a folder that is not")
    if merged and recipe.backbone.quantization != "none":
        raise RecipeError(
            f"{run}: its backbone is loaded with {recipe.backbone.quantization}, and nothing can be added to rounded "
            "weights; leave out --merged"
        )
    data = _data_of(recipe, registry) if approximate else None
    learned = open_learned(run)
    found, measured = _adapted(learned, recipe, index, data, rows, progress)
    return _write(Exported(task, merged, measured), found, learned, recipe, registry, to)


def _index_of(task: str | None, recipe: Recipe, registry: Registry, approximate: bool) -> int:
    """Place of the task in the sequence; that of any where it makes no difference."""
    method, names, num_learned = method_of(recipe.method), sequence_of(recipe.data).names, len(registry.records())
    known = [names[place] for stage in method.stages(names)[:num_learned] for place in stage.learns]
    if not known:
        raise RegistryError(f"{registry.run}: nothing is learned that could be exported; its backbone is all there is")
    if task is None and (method.locates or approximate):
        raise RecipeError(f"--task: tasks of {registry.run} leave one by one; name one of {', '.join(known)}")
    if task is not None and task not in known:
        raise RecipeError(f"--task: {registry.run} has learned no {shown(task)}; name one of {', '.join(known)}")
    return names.index(known[0] if task is None else task)


def _data_of(recipe: Recipe, registry: Registry) -> TaskData:
    data = TaskData.of(recipe)
    data.check(reads_images(recipe.backbone))
    registry.check_data(recipe, data.files)
    return data


def _adapted(
    learned: LearnedRun, recipe: Recipe, index: int, data: TaskData | None, rows: int, progress: Progress
) -> tuple[PeftModel, Agreement | None]:
    """The backbone with stock LoRA layers; how far it agrees with the run, where it is not exact."""
    method, host = learned.method, learned.method.host
    if host is None:
        assert isinstance(method.model, PeftModel), "whatever learns holds banks or is stock PEFT"
        return method.model.eval(), None
    gates = fixed_gates(method, learned.backbone.processor, index)
    moved = [site for site, gate in gates.items() if gate is None]
    if not moved:
        return on_bare_backbone(method.model, exact_adapters(host, gates)), None
    spec = sequence_of(recipe.data).tasks[index]
    if data is None:
        raise RegistryError(
            f"{recipe.run}: at {len(moved)} of {len(host.banks)} sites (the first is {moved[0]}) the experts' weights "
            f"for {spec.name} depend on what is read, and an adapter has none that do; --approximate writes the "
            "closest one, and measures it"
        )
    encoding, max_length = data.encoding(spec, learned.backbone.processor), recipe.training.max_length
    batch_size, device = recipe.evaluation.batch_size, method.model.device
    samples = SampleRows(subsample(data.train[spec.name], rows, recipe.seed), encoding, max_length)
    asked = subsample(data.evaluate[spec.name], rows, recipe.seed)
    questions = Questions(asked, encoding, spec.max_new_tokens, max_length, batch_size)

    def given(batch: Batch) -> AbstractContextManager[Any]:
        return method.answering(batch, torch.full((len(batch["input_ids"]),), index))

    def none(batch: Batch) -> AbstractContextManager[Any]:
        return nullcontext()

    at = partial(progress, spec.name)
    whole = batches(samples, learned.backbone.processor, batch_size, device)
    fitted = fitted_adapters(method, index, counted(whole, len(samples), partial(at, "fitting")))
    said = answers(method.model, questions, given, partial(at, "answering as the run"))
    likeliest = next_tokens(method.model, questions, said, given)
    adapted = on_bare_backbone(method.model, fitted)
    others = answers(adapted, questions, none, partial(at, "answering as exported"))
    return adapted, agreement(said, others, likeliest, next_tokens(adapted, questions, said, none))


def _write(
    exported: Exported, adapted: PeftModel, learned: LearnedRun, recipe: Recipe, registry: Registry, to: Path
) -> Exported:
    """Write beside `to`, and put it there whole."""
    base, auto_class = hub_name(recipe.backbone.path), auto_model(learned.backbone.model.config).__name__
    partial_folder = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    if exported.merged:
        model = adapted.merge_and_unload()
        ends: Mapping[str, Any] = end_arguments(model, learned.backbone.processor)
        model.generation_config.update(do_sample=False, eos_token_id=ends["eos_token_id"])
        model.save_pretrained(partial_folder)
        learned.backbone.processor.save_pretrained(partial_folder)
    else:
        config: Any = adapted.peft_config["default"]
        config.base_model_name_or_path = base or ""  # where it is None, PEFT writes this machine's path
        config.target_modules = sorted(config.target_modules)  # a set, which no two processes write alike
        adapted.save_pretrained(str(partial_folder), save_embedding_layers=False)  # which asks the hub otherwise
    card = adapter_card(exported, recipe, registry.records()[-1], base, auto_class, to.name)
    (partial_folder / "README.md").write_text(card, encoding="utf-8")
    if to.exists():
        to.rmdir()  # empty
    os.rename(partial_folder, to)
    return replace(exported, files=tuple(sorted(os.listdir(to))))
