"""Dropout depends on seed, step, pass and process: not on workers, and not on a restart."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration

from llava_cmoe.data.batches import Batch
from llava_cmoe.methods.base import ExtraLoss, no_extra_loss
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.drawing import drawing, pass_seed
from llava_cmoe.training.stage import train_stage

NUM_ROWS, TRAINED = 12, "lm_head.weight"
PLACE = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.integers(0, 512), st.integers(0, 4096))


class Rows(Dataset[dict[str, Tensor]]):
    """Samples of which the last two tokens are learned; reading one draws, as an augmentation would."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        torch.rand(index + 1)
        ids_T = torch.arange(6 + index % 4) * 7 % 250 + 4 + index
        labels_T = torch.cat([torch.full_like(ids_T[:-2], -100), ids_T[-2:]])
        return {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T), "labels": labels_T}


@pytest.fixture
def student(tiny_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model with dropout, of which one matrix may be trained."""
    for layer in tiny_llava.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.4
    tiny_llava.requires_grad_(False).get_parameter(TRAINED).requires_grad_()
    return tiny_llava


def learned(
    model: LlavaForConditionalGeneration, folder: Path, *, killed_at: int = 0, workers: int = 0, **settings: Any
) -> tuple[Tensor, list[float]]:
    """What a copy of the model learns, and a number drawn in each forward pass; it may be killed at one, from 1."""
    student, draws = deepcopy(model), []

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        if len(draws) + 1 == killed_at:
            raise KeyboardInterrupt
        draws.append(float(torch.rand(())))
        yield no_extra_loss

    given = TrainingSettings(**{"batch_size": 2, "epochs": 2, "checkpoint_steps": 5, "learning_rate": 1e-2, **settings})
    with suppress(KeyboardInterrupt) if killed_at else nullcontext():
        train_stage(student, Rows(), training_context, given, pad_token_id=0, seed=3, folder=folder, workers=workers)
    return student.get_parameter(TRAINED).detach(), draws


def test_dropout_is_there(student: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    with_dropout, _ = learned(student, tmp_path / "with")
    for layer in student.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.0
    assert not torch.equal(learned(student, tmp_path / "without")[0], with_dropout)


@pytest.mark.parametrize(("first", "then", "accumulation"), [(0, 2, 1), (2, 0, 2)])
def test_workers_and_a_restart_change_nothing(
    student: LlavaForConditionalGeneration, tmp_path: Path, first: int, then: int, accumulation: int
) -> None:
    """Killed right at a checkpoint, and behind one."""
    settings = {"accumulation": accumulation, "epochs": 2 * accumulation}
    whole, draws = learned(student, tmp_path / "whole", **settings)
    assert len(set(draws)) == len(draws) == 12 * accumulation
    for at in (5 * accumulation + 1, 8 * accumulation):
        torch.rand(at)  # what was drawn before does not matter
        folder = tmp_path / str(at)
        learned(student, folder, killed_at=at, workers=first, **settings)
        resumed, rest = learned(student, folder, workers=then, **settings)
        assert torch.equal(resumed, whole), at
        assert rest == draws[len(draws) - len(rest) :]


@given(PLACE, PLACE)
def test_every_pass_has_a_seed_of_its_own(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
    assert (pass_seed(*one) == pass_seed(*other)) == (one == other)


@given(PLACE)
def test_the_stream_around_it_goes_on(place: tuple[int, int, int, int]) -> None:
    torch.manual_seed(1)
    torch.rand(2)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(2)
    with drawing(*place, device=torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with drawing(*place, device=torch.device("cpu")):
        assert torch.equal(torch.rand(3), inside)
