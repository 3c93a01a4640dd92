"""One stage of training: one `transformers.Trainer` from start to end over whatever requires gradients.

Knows no method: what a method adds to the loss comes in as a context around the forward pass. A stage that was killed
is learned again from its last checkpoint, or from its start, and a seed per stage makes that the same stage.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from llava_cmoe.data.collator import ROW, Collator, dummy_image_row
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.experts.ledger import trained_parameters
from llava_cmoe.methods.base import ExtraLoss, TrainingContext, no_extra_loss
from llava_cmoe.records import StageReport
from llava_cmoe.settings.training import TrainingSettings
from llava_cmoe.training.checkpoints import CheckpointTrainer
from llava_cmoe.training.drawing import drawing
from llava_cmoe.training.finite import FiniteSteps, check_weights
from llava_cmoe.training.order import LengthGroupedSampler, NumberedRows, kinds_of
from llava_cmoe.training.processes import deepspeed_asked, processes
from llava_cmoe.training.trackers import tensorboard_callbacks, trackers_of, trainer_integrations
from llava_cmoe.training.zero import check_engine, configure_deepspeed, teardown_deepspeed


class Progress(Protocol):
    """Called after an optimizer step."""

    def __call__(self, done: int, total: int, loss: float | None = None, /) -> None:
        """Steps done, all steps, and the mean loss since the last one that was logged, at the steps that log one."""
        ...


LOGGED = 5
"""Optimizer steps between two logged losses: one host sync each."""


class StageTrainer(CheckpointTrainer):
    """The stock Trainer, with the method's context around each forward pass and its terms added to the loss."""

    def __init__(self, training_context: TrainingContext, grouped: bool = False, **kwargs: Any) -> None:
        """`training_context` comes from the method, all else is the Trainer's; `grouped` rows come with their like."""
        with _hide_quantized_flag(kwargs["model"]):
            super().__init__(**kwargs)
        self._training_context, self._grouped = training_context, grouped
        self._extra_loss: ExtraLoss = no_extra_loss
        self.loss_is_scaled_for_ga = True  # by `compute_loss`, for every family
        self._finite = FiniteSteps(kwargs["train_dataset"].rows)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward inside the method's context: checkpointing runs layers again in backward.

        What is drawn in it, as dropout is, depends on seed, step and process alone: not on who else drew before, such
        as a data loader that begins anew after a restart.
        """
        place = (self.args.seed, self.state.global_step, self._finite.num_passes, self.args.process_index)
        with drawing(*place, device=self.args.device), self._training_context(inputs) as self._extra_loss:
            tensors = {name: value for name, value in inputs.items() if name != ROW}
            loss = super().training_step(model, tensors, *args, **kwargs)
        self._finite.add(inputs[ROW], loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, before the optimizer's: the last moment at which the weights are still good."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self._finite.check(self.state.global_step + 1, norm)
        return norm

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        """The Trainer's own way of grouping would encode every row to know its length."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not self._grouped or rows is None:
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(kinds_of(rows), step, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Language-modelling loss, a mean over the learned tokens of a whole step on all processes, plus the method's.

        A family whose `forward` takes no number of tokens returns the mean of a batch, which counts here by its share
        of the step's. The method's terms are means per forward pass; a step's is the mean of these.
        """
        loss, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not self.model_accepts_loss_kwargs:
            num_learned = (inputs["labels"][:, 1:] != IGNORED).sum()
            loss = loss * (num_learned * self.accelerator.num_processes / num_items_in_batch)
        return loss + self._extra_loss(output) / self.current_gradient_accumulation_steps

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """Learned tokens of a step on all processes; the Trainer counts them only for families that ask for them."""
        with _as_found(self, "model_accepts_loss_kwargs"):
            self.model_accepts_loss_kwargs = True
            return super()._get_num_items_in_batch(batch_samples, device)


PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""What accelerate leaves in a model: an autocast, and a mark at which the next fit would not wrap it again."""


@contextmanager
def _as_found(model: Any, *names: str) -> Iterator[None]:
    """Give these attributes of a model's instance back what they were, or take them away."""
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)


@contextmanager
def _hide_quantized_flag(model: Any) -> Iterator[None]:
    """Let a Trainer be made for a quantized model: it looks for adapters beside the weights, but knows only PEFT's."""
    with _as_found(model, "is_quantized"):
        model.is_quantized = False
        yield


class _Report(TrainerCallback):
    """Reports how far the stage is, and the losses that the Trainer logs: no host sync of its own."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:
            self._progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:  # at the end of a training other things are logged
            self._progress(state.global_step, state.max_steps, logs["loss"])


def train_stage(
    model: PreTrainedModel,
    samples: Dataset[dict[str, Tensor]],
    training_context: TrainingContext,
    settings: TrainingSettings,
    *,
    pad_token_id: int,
    seed: int,
    folder: Path,
    progress: Progress = lambda *_: None,
    config_hash: str = "",
    workers: int = 0,
    logs: Path | None = None,
) -> StageReport:
    """Train the parameters that require gradients, in place.

    Args:
        model: the backbone with a method's parameters in it.
        samples: encoded rows with labels.
        training_context: the method's context around a forward pass; yields its loss term.
        settings: one stage's settings.
        pad_token_id: fills short rows of a batch, on the right.
        seed: of the rows' order and of dropout.
        folder: where its checkpoints are, if any are kept.
        progress: called after every optimizer step.
        config_hash: fingerprint of recipe, data and backbone; only a checkpoint made from the same is gone on from.
        workers: processes that encode rows.
        logs: folder for TensorBoard's files; without it nothing is reported to any tracker.

    Raises:
        NotFiniteError: a step's loss or gradient is not finite, or what was trained.
    """
    began = time.monotonic()
    trackers = () if logs is None else trackers_of(settings)
    on_cpu = model.device.type == "cpu"
    with _as_found(model, *PREPARED):
        state = _train(
            training_context,
            settings.group_by_length,
            config_hash,
            model=model,
            args=training_arguments(settings, seed, folder, on_cpu, workers, trainer_integrations(trackers)),
            train_dataset=NumberedRows(samples),
            data_collator=Collator(pad_token_id, dummy=_dummy_row(samples)),
            callbacks=[_Report(progress), *(tensorboard_callbacks(trackers, logs) if logs else ())],
        )
    gc.collect()  # engine, optimizer and hooks refer to each other: the next stage needs their memory
    check_weights(trained_parameters(model))
    if settings.gradient_checkpointing:
        model.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    tenth = max(1, len(losses) // 10)
    return StageReport(
        steps=state.global_step,
        samples=len(samples),  # type: ignore[arg-type]
        first_loss=statistics.fmean(losses[:tenth]),
        last_loss=statistics.fmean(losses[-tenth:]),
        seconds=time.monotonic() - began,
    )


def _train(training_context: TrainingContext, grouped: bool, config_hash: str, **kwargs: Any) -> TrainerState:
    """One Trainer from start to end; nothing of it is left but its state."""
    trainer = StageTrainer(training_context, grouped, **kwargs)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):  # the run has a progress bar of its own
            trainer.remove_callback(callback)
    check_engine(trainer)
    trainer.resume(Path(str(trainer.args.output_dir)), config_hash)
    teardown_deepspeed(trainer)
    return trainer.state


def _dummy_row(samples: Dataset[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """A row for batches of text alone: ZeRO-3 and DDP wait for all processes in the vision encoder, too."""
    if processes().num_processes == 1:
        return None
    pictured = (index for index, (has_picture, _) in enumerate(kinds_of(samples)) if has_picture)
    first = next(pictured, None)
    return None if first is None else dummy_image_row(samples[first])


def training_arguments(
    settings: TrainingSettings, seed: int, folder: Path, on_cpu: bool, workers: int, trackers: list[str]
) -> TrainingArguments:
    """The settings in the Trainer's words; everything else stays at its defaults."""
    bf16 = settings.precision == "bf16"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        optim=TrainingArguments.optim if settings.optimizer == "adamw" else settings.optimizer,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16 and not deepspeed_asked(),
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,  # what they keep lasts for all epochs
        use_cpu=on_cpu,
        seed=seed,
        data_seed=seed,
        logging_steps=LOGGED,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # such a loss ends the stage; the filter would report another one
        save_strategy="no" if settings.checkpoint_steps is None else "steps",
        save_steps=settings.checkpoint_steps or LOGGED,
        save_total_limit=2,  # the last one may be half written
        report_to=trackers,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    configure_deepspeed(arguments, bf16)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs one process takes one, not a copy of the model on each
    return arguments
