"""What tests of methods write formulas with: what went through a module, experts and batches, all in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tiny import Lesson
from torch import Tensor, nn

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import tokenizer_of
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.methods.base import Method, StageData
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.stage import stage_data
from llava_cmoe.training.order import NumberedRows


@contextmanager
def through(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a module was given first, and what it returned, for each call inside."""
    calls: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((args[0].detach().double(), output.detach().double()))

    handle = module.register_forward_hook(see)
    try:
        yield calls
    finally:
        handle.remove()


def experts_of(bank: ExpertBank, linear: str = "linear") -> dict[int, tuple[Tensor, Tensor]]:
    """Id to A (R, I) and B (O, R) of every expert on one linear of a site."""
    pairs = {expert: bank.stacks[linear].read([expert]) for expert in bank.ids}
    return {expert: (pair.a_ERI[0].double(), pair.b_EOR[0].double()) for expert, pair in pairs.items()}


def layer_norm(x_BD: Tensor) -> Tensor:
    """Without weights, with PyTorch's epsilon."""
    centred_BD = x_BD - x_BD.mean(dim=-1, keepdim=True)
    return centred_BD / (centred_BD.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def restored(lesson: Lesson, stages: int) -> Method:
    """The method as it was after its first stages, on a backbone of its own."""
    return restore_method(
        lesson.recipe, load_backbone(lesson.recipe.backbone), Registry(lesson.recipe.run), stages=stages
    )


def data_of(lesson: Lesson, stage: int) -> StageData:
    """What one stage of the run learned from."""
    return stage_data(lesson.run, stage, lesson.run.stages[stage])


def samples_of(lesson: Lesson, rows: torch.utils.data.Dataset, places: Sequence[int]) -> dict[str, Tensor]:
    """Some of these rows as a batch to learn from."""
    numbered = NumberedRows(rows)
    return Collator(tokenizer_of(lesson.run.backbone.processor).pad_token_id)([numbered[place] for place in places])


def doubled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch for a model in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
