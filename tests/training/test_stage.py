"""A stage trains what requires gradients, the same from the same seed, with the method's terms in the loss."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import LlavaForConditionalGeneration
from transformers.utils.generic import ModelOutput

from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW
from llava_cmoe.methods.base import ExtraLoss, TrainingContext, no_extra_loss
from llava_cmoe.records import StageReport
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.stage import StageTrainer, train_stage

NUM_ROWS, TRAINED = 12, "lm_head.weight"


class Rows(Dataset[dict[str, Tensor]]):
    """Samples of 6 to 9 tokens of which the last two are learned."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(4, 300, (6 + number % 4,), generator=generator) for number in range(NUM_ROWS)]

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = self.rows[index]
        labels_T = ids_T.clone()
        labels_T[:-2] = -100
        return {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T), "labels": labels_T}


@contextmanager
def plain(batch: Batch) -> Iterator[ExtraLoss]:
    yield no_extra_loss


@pytest.fixture
def student(tiny_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A model of which one matrix may be trained."""
    tiny_llava.requires_grad_(False).get_parameter(TRAINED).requires_grad_()
    return tiny_llava


def train(
    model: LlavaForConditionalGeneration,
    folder: Path,
    training_context: TrainingContext = plain,
    seed: int = 0,
    **settings: Any,
) -> tuple[Tensor, StageReport]:
    """Train a copy of the model; what its one matrix became, and the report."""
    student = deepcopy(model)
    given = TrainingSettings(**{"batch_size": 4, "learning_rate": 1e-2, **settings})
    report = train_stage(student, Rows(), training_context, given, pad_token_id=0, seed=seed, folder=folder)
    assert not student.training
    changed = [name for name, value in student.named_parameters() if not torch.equal(value, model.get_parameter(name))]
    assert changed == [TRAINED]
    return student.get_parameter(TRAINED).detach(), report


def test_a_seed_makes_a_stage_the_same_bits(student: LlavaForConditionalGeneration, tmp_path: Path):
    first, report = train(student, tmp_path)
    torch.rand(3)  # what was drawn before does not matter
    second, again = train(student, tmp_path)
    other, _ = train(student, tmp_path, seed=1)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert (report.first_loss, report.last_loss) == (again.first_loss, again.last_loss)


def test_after_a_bf16_stage_the_model_computes_what_the_same_weights_compute_elsewhere(
    student: LlavaForConditionalGeneration, tmp_path: Path
):
    elsewhere, given = deepcopy(student), TrainingSettings(batch_size=4, learning_rate=1e-2, precision="bf16")
    for _ in range(2):
        train_stage(student, Rows(), plain, given, pad_token_id=0, seed=0, folder=tmp_path)
    elsewhere.load_state_dict(student.state_dict())
    prompt = {"input_ids": Rows()[0]["input_ids"][None]}
    with torch.no_grad():
        assert torch.equal(student(**prompt).logits, elsewhere.eval()(**prompt).logits)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_every_fit_of_a_process_computes_in_the_precision_asked_for_and_leaves_the_model_as_it_was(
    student: LlavaForConditionalGeneration, tmp_path: Path, precision: str
):
    seen: list[bool] = []
    student.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    before = set(vars(student))
    for number in range(3):
        given = TrainingSettings(batch_size=4, learning_rate=1e-2, precision=precision)
        train_stage(student, Rows(), plain, given, pad_token_id=0, seed=number, folder=tmp_path)
        assert seen == [precision == "bf16"] * (NUM_ROWS // 4)
        assert set(vars(student)) == before
        seen.clear()


def test_a_report_counts_steps_and_samples_and_the_loss_falls(student: LlavaForConditionalGeneration, tmp_path: Path):
    _, report = train(student, tmp_path, epochs=10)
    assert (report.steps, report.samples) == (10 * NUM_ROWS // 4, NUM_ROWS)
    assert report.last_loss < report.first_loss - 0.5 and report.seconds > 0


def test_progress_is_told_after_every_step_and_the_loss_where_one_is_logged(
    student: LlavaForConditionalGeneration, tmp_path: Path
):
    told: list[tuple[Any, ...]] = []
    train_stage(
        student,
        Rows(),
        plain,
        TrainingSettings(batch_size=4, epochs=4),
        pad_token_id=0,
        seed=0,
        folder=tmp_path,
        progress=lambda *given: told.append(given),
    )
    assert [given[:2] for given in told] == [(step, 12) for step in range(1, 13)]
    logged = {given[0]: given[2] for given in told if len(given) == 3}
    assert list(logged) == [1, 5, 10] and logged[1] > logged[5] > logged[10] > 0


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_an_optimizer_of_bitsandbytes_learns_nearly_what_adamw_does(
    student: LlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    made: list[Any] = []
    create = StageTrainer.create_optimizer
    monkeypatch.setattr(StageTrainer, "create_optimizer", lambda *given: made.append(create(*given)) or made[-1])
    plain_adamw, report = train(student, tmp_path, epochs=4)
    learned, near = train(student, tmp_path, epochs=4, optimizer=name)
    assert torch.equal(learned, train(student, tmp_path, epochs=4, optimizer=name)[0])
    (moments,) = made[1].state.values()
    assert moments["state1"].dtype == (torch.float32 if "32bit" in name else torch.uint8)
    change = plain_adamw - student.get_parameter(TRAINED)
    assert (learned - plain_adamw).norm() < (0.001 if "32bit" in name else 0.15) * change.norm()
    assert near.last_loss == pytest.approx(report.last_loss, rel=0.02)


def test_nothing_is_written(student: LlavaForConditionalGeneration, tmp_path: Path):
    train(student, tmp_path / "trainer")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_constant_term_raises_the_loss_and_teaches_nothing(student: LlavaForConditionalGeneration, tmp_path: Path):
    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        yield lambda output: 3.0

    without, report = train(student, tmp_path)
    with_term, raised = train(student, tmp_path, training_context)
    assert torch.equal(without, with_term)
    assert raised.first_loss == pytest.approx(report.first_loss + 3, abs=1e-5)


def test_terms_are_read_after_forward_and_the_context_lasts_through_backward(
    student: LlavaForConditionalGeneration, tmp_path: Path
):
    seen: list[str] = []

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        seen.append(f"open {len(batch['input_ids'])}")
        yield lambda output: seen.append("term") or 0.0
        seen.append("close")

    watched = deepcopy(student)
    watched.lm_head.register_forward_hook(lambda *_: seen.append("forward"))
    watched.lm_head.weight.register_post_accumulate_grad_hook(lambda _: seen.append("backward"))
    settings = TrainingSettings(batch_size=12)
    train_stage(watched, Rows(), training_context, settings, pad_token_id=0, seed=0, folder=tmp_path)
    assert seen == ["open 12", "forward", "term", "backward", "close"]


def test_a_term_is_computed_from_what_the_model_returned_and_is_learned_from(
    student: LlavaForConditionalGeneration, tmp_path: Path
):
    shapes: list[tuple[int, ...]] = []
    expected: list[tuple[int, ...]] = []

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        def small_logits(output: ModelOutput) -> Tensor:
            shapes.append(tuple(output.logits.shape))
            expected.append((*batch["input_ids"].shape, student.config.text_config.vocab_size))
            return output.logits.square().mean()

        yield small_logits

    plainly, _ = train(student, tmp_path)
    small, _ = train(student, tmp_path, training_context)
    assert len(shapes) == NUM_ROWS // 4 and shapes == expected
    assert small.norm() < plainly.norm()


class Different(Rows):
    """Other samples of other lengths."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[1:] for name, value in super().__getitem__(index).items()}


@pytest.mark.parametrize(
    "samples",
    [Rows(), Subset(Rows(), [7, 2, 4, 11, 3]), ConcatDataset([Rows(), Subset(Different(), [5, 0, 9])])],
    ids=["whole", "part", "several"],
)
def test_each_sample_says_which_it_is_and_every_one_comes_once_an_epoch(
    student: LlavaForConditionalGeneration, tmp_path: Path, samples: Any
):
    batches: list[dict[str, Tensor]] = []

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        batches.append(dict(batch))
        yield no_extra_loss

    def model_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args and "input_ids" in kwargs and ROW not in kwargs

    student.register_forward_pre_hook(model_input, with_kwargs=True)
    settings = TrainingSettings(batch_size=4, epochs=2)
    train_stage(student, samples, training_context, settings, pad_token_id=0, seed=0, folder=tmp_path)
    rows = [row for batch in batches for row in batch[ROW].tolist()]
    size = len(samples)
    assert sorted(rows[:size]) == sorted(rows[size:]) == list(range(size)) and rows[:size] != rows[size:]
    for batch in batches:
        for row, ids_T, mask_T in zip(batch[ROW].tolist(), batch["input_ids"], batch["attention_mask"], strict=True):
            assert torch.equal(ids_T[mask_T.bool()], samples[row]["input_ids"])


def batches(
    model: LlavaForConditionalGeneration, folder: Path, config_hash: str, killed_at: int = 0, **settings: Any
) -> tuple[int, Tensor]:
    """Train a copy of the model for 18 steps, checkpoints every 5; how many batches it took, and what was learned.

    It is interrupted at the `killed_at`-th batch, from 1.
    """
    student, learned = deepcopy(model), []

    @contextmanager
    def training_context(batch: Batch) -> Iterator[ExtraLoss]:
        learned.append(batch)
        if len(learned) == killed_at:
            raise KeyboardInterrupt
        yield no_extra_loss

    given = TrainingSettings(**{"batch_size": 2, "epochs": 3, "checkpoint_steps": 5, **settings})
    with suppress(KeyboardInterrupt) if killed_at else nullcontext():
        train_stage(
            student, Rows(), training_context, given, pad_token_id=0, seed=0, folder=folder, config_hash=config_hash
        )
    return len(learned), student.get_parameter(TRAINED).detach()


def test_only_a_checkpoint_of_the_same_recipe_and_data_is_gone_on_with(
    student: LlavaForConditionalGeneration, tmp_path: Path
):
    assert batches(student, tmp_path, "one")[0] == 18
    assert batches(student, tmp_path, "one")[0] == 0  # its last step left a checkpoint
    assert batches(student, tmp_path, "another")[0] == 18


def test_checkpoints_of_another_origin_are_removed_however_far_they_are(
    student: LlavaForConditionalGeneration, tmp_path: Path
):
    def there() -> set[str]:
        return {path.name for path in tmp_path.glob("checkpoint-*")}

    _, whole = batches(student, tmp_path / "elsewhere", "one")
    batches(student, tmp_path, "another", killed_at=12)
    for step, further in ((5, 300), (10, 400)):
        (tmp_path / f"checkpoint-{step}").rename(tmp_path / f"checkpoint-{further}")
    shutil.copytree(tmp_path / "checkpoint-400", tmp_path / "checkpoint-500", ignore=lambda *_: ["complete.json"])
    assert batches(student, tmp_path, "one", checkpoint_steps=None)[0] == 18
    assert there() == {"checkpoint-300", "checkpoint-400", "checkpoint-500"}  # it keeps none and may only look on
    assert batches(student, tmp_path, "one", killed_at=3)[0] == 3
    assert not there()
    assert batches(student, tmp_path, "one", killed_at=12)[0] == 12
    assert there() == {"checkpoint-5", "checkpoint-10"}
    left, learned = batches(student, tmp_path, "one")
    assert left == 18 - 10 and torch.equal(learned, whole)


def test_accumulated_batches_are_one_large_batch(student: LlavaForConditionalGeneration, tmp_path: Path):
    whole, report = train(student, tmp_path, batch_size=4)
    parts, same = train(student, tmp_path, batch_size=2, accumulation=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert same.steps == report.steps and same.first_loss == pytest.approx(report.first_loss, abs=1e-5)
