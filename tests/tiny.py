"""A tiny run, whole: two tasks on disk, recipes that learn them in seconds, and what is seen while a method learns.

Pictures, answers and models mean nothing here. Every answer of the two tasks is one letter, so all batches of one size
hold equally many learned tokens; those of a third one, where a test wants it, differ in length.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from llava_cmoe import sequence
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.evaluation.eval_spec import eval_sets_of
from llava_cmoe.evaluation.generate import EvalSet
from llava_cmoe.evaluation.log import Results
from llava_cmoe.methods.base import Method
from llava_cmoe.runs.run import Run
from llava_cmoe.settings.recipes import load_recipe
from llava_cmoe.settings.run import Recipe
from llava_cmoe.training.stage import StageTrainer

TASKS = ("colours", "sides")
NUM_TRAIN, NUM_EVAL, BATCH = 24, 6, 4
QUESTIONS = {
    "colours": "Which colour is it?\nA. red\nB. green\nC. blue",
    "sides": "Please provide the longer side that this sentence describes: [up, across]",
    "counts": "Answer with one letter for each thing in the image.",
}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8}
LOCATOR: dict[str, Any] = {"hidden": 16, "latent": 4, "learning_rate": 1e-2, "epochs": 60, "patience": 20}
METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "sequential_lora": LORA,
    "joint": LORA,
    "replay": {**LORA, "fraction": 0.1},
    "ewc": LORA,
    "lwf": LORA,
    "o_lora": LORA,
    "reg_lora": LORA,
    "merging": LORA,
    "lora_per_task": {**LORA, "locator": LOCATOR},
    "hide": LORA,  # one layer sums, one mixes
    "moelora": {"rank": 8, "alpha": 16, "num_experts": 4},
    "inc_moelora": LORA,
    "dymoe": LORA,
    "moe_adapters": {**LORA, "num_experts": 6, "locator": {**LOCATOR, "kind": "autoencoder"}},
    "care": {**LORA, "num_classes": 3},
    "patch_routing": {**LORA, "condition_rank": 2, "locator": LOCATOR},
    "pmoe": {**LORA, "depth": 0.5, "replay": 0.1},  # one layer is shallow, one is deep
    "r2moe": {**LORA, "remove_below": 0.156},  # of the second task's two experts one goes
    "cmoe": {
        "experts": LORA,
        # Of two layers, this scope and any alpha below one let exactly the one grow whose probe is used more.
        "probe": {"fraction": 0.5, "holdout": 0.5, "scope": "global"},
        "locator": LOCATOR,
    },
}


def write_data(root: Path, names: tuple[str, ...] = TASKS, pictures: bool = True) -> None:
    """Tasks in CoIN's layout, with a sequence file beside them; a quarter of the first one's rows is text only.

    Without `pictures` all rows are.
    """
    for task in names:
        for split, count in (("train", NUM_TRAIN), ("test", NUM_EVAL)):
            rows = [_row(root, task, split, number, pictures) for number in range(count)]
            file = root / "Instructions_Original" / task / f"{split}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows))
    tasks = [
        {
            "name": task,
            "train": f"{task}/train.json",
            "evaluate": f"{task}/test.json",
            "scorer": "gqa",
            "max_new_tokens": 3,
        }
        for task in names
    ]
    (root / "sequence.yaml").write_text(json.dumps({"name": "tiny", "tasks": tasks}))


def _row(root: Path, task: str, split: str, number: int, pictures: bool) -> dict[str, Any]:
    kind = number % 3
    question, answer = f"{QUESTIONS[task]} {number}", " ".join("ABC"[: kind + 1]) if task == "counts" else "ABC"[kind]
    row: dict[str, Any] = {"question_id": f"{task}-{split}-{number}"}
    text_only = not pictures or (task == "colours" and number % 4 == 3)
    if not text_only:
        name = f"{task}/{split}/{number}.png"
        path = root / "cl_dataset" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(200 if channel == kind else 30 for channel in range(3))
        Image.new("RGB", (20 + 4 * kind, 24), colour).save(path)
        row["image"] = name
    if split == "test":
        return row | {"text": question, "answer": answer}
    marker = "" if text_only else "<image>\n"
    turns = [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return row | {"conversations": turns}


def recipe(run: Path, root: Path, backbone: Path, method: str = "cmoe", *overrides: str) -> Recipe:
    """How `method` learns the two tasks in `root`, with dotted overrides; read from a file beside the run folder."""
    document = {
        "run": str(run),
        "data": {"sequence": str(root / "sequence.yaml"), "root": str(root), "keep_encoded": True},
        "backbone": {"path": str(backbone)},
        "method": {"name": method, **METHODS[method]},
        "training": {"batch_size": BATCH, "learning_rate": 1e-2},
        "evaluation": {"batch_size": BATCH, "routes": ["located", "oracle", "random"]},
    }
    path = run.parent / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return load_recipe(path, overrides)


@dataclass
class Lesson:
    """What is seen while a method learns the two tasks.

    Attributes:
        recipe: of the run.
        run: the run with its live model, after the last stage.
        results: what `learn` returned.
        base: logits of the backbone alone.
        untrained: logits on the first task's route, grown but before the first training step.
        logits: per stage, per task known then: logits of the live model on that task's route.
        optimized: per stage, names of the parameters that its main training's optimizer held.
        files: per stage, bytes and time of change of every file in the registry.
    """

    recipe: Recipe
    run: Run = field(init=False)
    results: Results = field(init=False)
    base: Tensor = field(init=False)
    untrained: Tensor | None = None
    logits: list[list[Tensor]] = field(default_factory=list)
    optimized: list[set[str]] = field(default_factory=list)
    files: list[dict[str, tuple[bytes, int]]] = field(default_factory=list)

    def prompts(self) -> dict[str, Tensor]:
        """One left-padded batch of prompts of both tasks, one of them text only."""
        rows = [question.prompts[index] for question in self.questions.values() for index in (0, 3)]
        return Collator(tokenizer_of(self.run.backbone.processor).pad_token_id, "left")(rows)

    @property
    def questions(self) -> dict[str, EvalSet]:
        """The exam's questions."""
        return eval_sets_of(self.run.eval_spec, self.run.backbone.processor)

    def logits_of(self, method: Method, task: int) -> Tensor:
        """Logits of the prompts on one task's route."""
        prompts = self.prompts()
        with torch.no_grad(), method.answering(prompts, torch.full((len(prompts["input_ids"]),), task)):
            logits_BTV: Tensor = method.model(**prompts).logits
        return logits_BTV


def attend(recipe: Recipe) -> Lesson:
    """Learn a recipe through `sequence.learn`, looking on."""
    lesson = Lesson(recipe)
    with pytest.MonkeyPatch.context() as patch:
        _look_on(lesson, patch)
        lesson.results = sequence.learn(recipe)
    base = load_backbone(recipe.backbone).model
    with torch.no_grad():
        lesson.base = base(**lesson.prompts()).logits
    return lesson


def _look_on(lesson: Lesson, patch: pytest.MonkeyPatch) -> None:
    open_run, evaluate, fit_fn = sequence.open_run, sequence.evaluate, sequence.fit_fn
    create_optimizer = StageTrainer.create_optimizer
    labels: list[str] = []

    def opened(*args: Any, **kwargs: Any) -> Run:
        lesson.run = open_run(*args, **kwargs)
        return lesson.run

    def fitting(run: Run, *args: Any, **kwargs: Any) -> Any:
        fit = fit_fn(run, *args, **kwargs)

        def fitted(*args: Any, label: str, **kwargs: Any) -> Any:
            if label == "training" and lesson.untrained is None:
                lesson.untrained = lesson.logits_of(run.method, 0)
            labels.append(label)
            return fit(*args, label=label, **kwargs)

        return fitted

    def optimizing(trainer: StageTrainer, *args: Any) -> torch.optim.Optimizer:
        optimizer = create_optimizer(trainer, *args)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if labels[-1] == "training":
            lesson.optimized.append({name for name, value in trainer.model.named_parameters() if id(value) in held})
        return optimizer

    def evaluating(run: Run, questions: Any, stage: Any, at: Any) -> None:
        lesson.logits.append([lesson.logits_of(run.method, task) for task in range(stage.after + 1)])
        lesson.files.append(files_of(run.recipe.run / "tasks"))
        evaluate(run, questions, stage, at)

    patch.setattr(sequence, "open_run", opened)
    patch.setattr(sequence, "fit_fn", fitting)
    patch.setattr(sequence, "evaluate", evaluating)
    patch.setattr(StageTrainer, "create_optimizer", optimizing)


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def backbone_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors under the names they have in the bare backbone, whatever was wrapped around them."""
    wrapping = re.compile(r"\.frozen(?=\.)|\.base_layer|^base_model\.model\.")
    return {wrapping.sub("", name): value for name, value in model.state_dict().items()}
