"""A stage stops at the first step that is not finite, before the optimizer's, and names the step and its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import LlavaForConditionalGeneration

from llava_cmoe import sequence
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.methods.base import ExtraLoss, no_extra_loss
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.finite import NotFiniteError
from llava_cmoe.training.order import name_of
from llava_cmoe.training.stage import train_stage

INF, NAN = float("inf"), float("nan")
NUM_ROWS, TRAINED = 12, "lm_head.weight"


class Rows(Dataset[dict[str, Tensor]]):
    """Samples of which the last two tokens are learned."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._rows = [torch.randint(4, 300, (6 + number % 4,), generator=generator) for number in range(NUM_ROWS)]

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = self._rows[index]
        labels_T = torch.cat([torch.full_like(ids_T[:-2], -100), ids_T[-2:]])
        return {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T), "labels": labels_T}


class Named(Rows):
    """Rows that know their ids."""

    def id_of(self, index: int) -> str:
        return f"id-{index}"


@contextmanager
def plain(batch: Batch) -> Iterator[ExtraLoss]:
    yield no_extra_loss


@pytest.fixture
def student(tiny_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model of which one matrix may be trained."""
    tiny_llava.requires_grad_(False).get_parameter(TRAINED).requires_grad_()
    return tiny_llava


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("batch_size", "accumulation", "max_grad_norm"), [(4, 1, 1.0), (2, 2, 1.0), (4, 1, 0.0), (1, 3, 0.0)]
)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_first_step_that_is_not_finite_is_the_last(
    student: LlavaForConditionalGeneration,
    tmp_path: Path,
    odd: float,
    where: str,
    batch_size: int,
    accumulation: int,
    max_grad_norm: float,
    step: int,
) -> None:
    """Whatever is not finite, and wherever: no weight has seen it, and the step and its rows are named."""
    learner, passes, rows, weights = deepcopy(student), [0], [], []
    fatal = step * accumulation  # the last forward pass of that step

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        passes[0] += 1
        rows.append(batch[ROW].tolist())
        weights.append(learner.get_parameter(TRAINED).detach().clone())
        bad = passes[0] == fatal
        handle = learner.get_parameter(TRAINED).register_hook(lambda grad: grad * odd if bad else grad)
        yield (lambda output: odd) if bad and where == "loss" else no_extra_loss
        handle.remove()

    settings = TrainingSettings(
        batch_size=batch_size, accumulation=accumulation, max_grad_norm=max_grad_norm, learning_rate=1e-2
    )
    with pytest.raises(NotFiniteError) as error:
        train_stage(learner, Named(), training_context, settings, pad_token_id=0, seed=0, folder=tmp_path)
    assert passes[0] == fatal and torch.equal(learner.get_parameter(TRAINED), weights[-1])
    named = rows[-1] if where == "loss" else [row for batch in rows[-accumulation:] for row in batch]
    found = "the loss is" if where == "loss" else "the gradient's norm is"
    expected = f"step {step}: {found} "
    assert str(error.value).startswith(expected)
    assert f"(rows {', '.join(f'id-{row}' for row in named)}); nothing of this stage is kept; " in str(error.value)
    assert "backbone.dtype" in str(error.value) and "training.learning_rate" in str(error.value)


def test_weights_that_the_last_step_left_without_a_number_are_no_result(
    student: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    settings = TrainingSettings(batch_size=NUM_ROWS, max_grad_norm=0.0, warmup=0.0)
    settings = settings.model_copy(update={"learning_rate": 1e38})  # which no recipe may ask for
    with pytest.raises(NotFiniteError, match=rf"after the last step {TRAINED} is not finite"):
        train_stage(student, Rows(), plain, settings, pad_token_id=0, seed=0, folder=tmp_path)


def test_rows_of_parts_are_named_by_their_ids() -> None:
    parts: Any = ConcatDataset([Named(), Subset(Named(), [5, 0, 9]), Subset(ConcatDataset([Named(), Named()]), [13])])
    names = [name_of(parts, index) for index in range(len(parts))]
    assert names == [*(f"id-{index}" for index in range(NUM_ROWS)), "id-5", "id-0", "id-9", "id-1"]
    assert name_of(Rows(), 3) == "3"


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A backbone whose activations leave what float16 can hold."""
    made = families.make("qwen2_5_vl")
    with torch.no_grad():
        for name, value in made.model.named_parameters():
            if name.endswith(("up_proj.weight", "down_proj.weight")):
                value *= 15000
    return made.save(tmp_path / "half")


def test_a_run_in_half_precision_that_overflows_commits_nothing(half: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        tmp_path / "run", tiny_data, half, "sequential_lora", "backbone.dtype=float16", "evaluation.routes=[oracle]"
    )
    with pytest.raises(NotFiniteError, match=r"step 1: the loss is nan \(rows colours-train-"):
        sequence.learn(recipe)
    assert Registry(recipe.run).records() == () and not list((recipe.run / "tasks").iterdir())


def test_a_healthy_stage_reports_the_losses_that_it_had(student: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    seen: list[float] = []

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        def read(output: Any) -> float:
            seen.append(float(output.loss.detach()))
            return 0.0

        yield read

    settings = TrainingSettings(batch_size=4, learning_rate=1e-2)
    report = train_stage(student, Rows(), training_context, settings, pad_token_id=0, seed=0, folder=tmp_path)
    assert report.first_loss == pytest.approx(seen[0], rel=1e-5)
