"""What holds for every method while it reads: nothing but the prompt decides a route, and nothing but it an answer.

The other half of the battery, `test_battery.py`, is about what a method trains and keeps.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from tiny import METHODS, Lesson
from torch import Tensor
from torch.nn.functional import pad

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW, Collator
from llava_cmoe.data.conversation import IGNORED, tokenizer_of
from llava_cmoe.experts.routers.base import Gate
from llava_cmoe.methods.base import Method
from llava_cmoe.records import Located
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.stage import stage_data
from llava_cmoe.training.order import NumberedRows

FREEZES = {
    "o_lora",
    "reg_lora",
    "lora_per_task",
    "hide",
    "inc_moelora",
    "dymoe",
    "moe_adapters",
    "care",
    "patch_routing",
    "pmoe",
    "r2moe",
    "cmoe",
}
"""Methods whose tasks leave something that no later task may change."""
LOCATES = {"lora_per_task", "hide", "moe_adapters", "patch_routing", "pmoe", "cmoe"}
BY_TASK = {"lora_per_task", "patch_routing", "cmoe"}
"""Methods that answer by task."""
COLUMNS = 8
"""Of every gate, so that they compare: more than any tiny site has experts."""
STEPS = 4

Rows = list[dict[str, Tensor]]


@pytest.fixture(params=METHODS)
def lesson(request: pytest.FixtureRequest, lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of(request.param)


@pytest.fixture(params=[name for name in METHODS if name != "zero_shot"])
def learned(request: pytest.FixtureRequest, lesson_of: Callable[[str], Lesson]) -> Lesson:
    """The same, of the methods that learn at all."""
    return lesson_of(request.param)


@pytest.fixture
def prompts(lesson: Lesson) -> Rows:
    """All evaluation prompts of both tasks."""
    return [questions.prompts[index] for questions in lesson.questions.values() for index in range(6)]


@dataclass(frozen=True)
class Reading:
    """What became of one prompt.

    Attributes:
        logits_V: of the first token of the answer.
        gates: site to the gate of each of the prompt's tokens (T, E).
        task: where it was located; None by nobody.
    """

    logits_V: Tensor
    gates: dict[str, Tensor]
    task: int | None


@contextmanager
def gates_seen(method: Method) -> Iterator[dict[str, list[Tensor]]]:
    """Site to the gates (B, T, E) of each forward pass inside, a column per expert, also where tokens share one."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def see(site: str, router: object, args: tuple[Tensor, ...], gate: Gate | None) -> None:
        some_BTE = args[0].new_zeros(1, 1, 0) if gate is None else gate.gate_BTE
        ids = range(some_BTE.shape[-1]) if gate is None or gate.ids is None else gate.ids
        gate_BTE = some_BTE.new_zeros(*some_BTE.shape[:2], COLUMNS)
        gate_BTE[..., list(ids)] = some_BTE
        seen[site].append(gate_BTE.expand(*args[0].shape[:2], -1).detach())

    banks = method.host.banks if method.host is not None else {}
    handles = [bank.router.register_forward_hook(partial(see, site)) for site, bank in banks.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def collate(lesson: Lesson, rows: Rows, longer: int = 0) -> dict[str, Tensor]:
    """Left-padded, by some tokens more than is needed; then other tokens than the padding's stand there."""
    batch = Collator(tokenizer_of(lesson.run.backbone.processor).pad_token_id, "left")(rows)
    if longer:
        for name in ("input_ids", "attention_mask"):
            batch[name] = pad(batch[name], (longer, 0))
        batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, 100)
    return batch


@torch.no_grad()
def read(lesson: Lesson, rows: Rows, longer: int = 0, task_B: Tensor | None = None) -> list[Reading]:
    """What becomes of prompts in one batch, each on the route that is given or that the method finds for it."""
    method, batch = lesson.run.method, collate(lesson, rows, longer)
    with gates_seen(method) as seen, method.answering(batch, task_B) as location:
        logits_BV = method.model(**batch).logits[:, -1]
        located = location() if task_B is None else Located.at(task_B)
    readings = []
    for place, row in enumerate(rows):
        gates = {site: passes[-1][place, -len(row["input_ids"]) :] for site, passes in seen.items()}
        readings.append(Reading(logits_BV[place], gates, None if located is None else int(located.task_B[place])))
    return readings


def assert_same(one: list[Reading], other: list[Reading]) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left.logits_V, right.logits_V, rtol=0, atol=1e-5)
        assert left.task == right.task and left.gates.keys() == right.gates.keys()
        for site, gate_TE in left.gates.items():
            assert torch.equal(gate_TE != 0, right.gates[site] != 0)
            torch.testing.assert_close(gate_TE, right.gates[site], rtol=0, atol=1e-5)


def test_an_answer_does_not_depend_on_batch_mates_their_order_or_padding(lesson: Lesson, prompts: Rows):
    together = read(lesson, prompts)
    assert (together[0].task is not None) == (lesson.recipe.method.name in LOCATES)
    assert_same(together, [reading for row in prompts for reading in read(lesson, [row])])
    assert_same(together, read(lesson, prompts[::-1])[::-1])
    assert_same(together, read(lesson, prompts, longer=9))


def test_a_method_that_answers_by_task_never_answers_otherwise(lesson: Lesson, prompts: Rows):
    method = lesson.run.method
    assert method.answers_by_task == (lesson.recipe.method.name in BY_TASK)
    located = method.locate(collate(lesson, prompts))
    if method.answers_by_task:
        assert located is not None
        readings = read(lesson, prompts)
        assert [reading.task for reading in readings] == located.task_B.tolist()
        assert_same(readings, read(lesson, prompts, task_B=located.task_B))
        for task in range(len(lesson.logits)):
            assert all(torch.equal(later[task], lesson.logits[task][task]) for later in lesson.logits[task:])


def test_tasks_make_no_difference_where_a_method_does_not_locate(lesson: Lesson):
    given = [lesson.logits_of(lesson.run.method, task) for task in (0, 1)]
    assert torch.equal(*given) != lesson.run.method.locates


@torch.no_grad()
def test_decoding_with_a_cache_computes_what_one_pass_over_the_whole_answer_does(lesson: Lesson, prompts: Rows):
    method, batch = lesson.run.method, collate(lesson, prompts)
    num_tokens = batch["input_ids"].shape[1]
    with gates_seen(method) as decoding, method.answering(batch):
        answer = method.model.generate(
            **batch,
            do_sample=False,
            min_new_tokens=STEPS,
            max_new_tokens=STEPS,
            suppress_tokens=[method.model.config.image_token_id],  # an untrained model would write pictures
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=tokenizer_of(lesson.run.backbone.processor).pad_token_id,
        )
    whole = {**batch, "input_ids": answer.sequences[:, :-1]}
    whole["attention_mask"] = pad(batch["attention_mask"], (0, STEPS - 1), value=1)
    unanswered = {**whole, "attention_mask": pad(batch["attention_mask"], (0, STEPS - 1))}
    with method.answering(unanswered), gates_seen(method) as forced:  # what locates reads the prompts alone
        logits_BTV = method.model(**whole).logits[:, num_tokens - 1 :]
    torch.testing.assert_close(torch.stack(answer.logits, dim=1), logits_BTV, rtol=0, atol=1e-4)
    for site, passes in forced.items():
        (gate_BTE,) = passes
        steps = decoding[site][-STEPS:]
        assert len(steps) == STEPS
        torch.testing.assert_close(torch.cat(steps[1:], dim=1), gate_BTE[:, num_tokens:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_answer_reaches_the_prompt_before_it(learned: Lesson):
    method, index = learned.run.method, len(learned.run.stages) - 1
    samples = NumberedRows(stage_data(learned.run, index, learned.run.stages[index]).samples)
    batch = Collator(tokenizer_of(learned.run.backbone.processor).pad_token_id)([samples[row] for row in range(8)])
    answer_BT = batch["labels"] != IGNORED
    other = {**batch, "input_ids": torch.where(answer_BT, (batch["input_ids"] + 100) % 300 + 4, batch["input_ids"])}
    before_BT = batch["attention_mask"].bool() & (answer_BT.cumsum(dim=1) == 0)
    (logits, gates), (other_logits, other_gates) = (_learning(method, rows) for rows in (batch, other))
    assert torch.equal(logits[before_BT], other_logits[before_BT])
    assert not torch.equal(logits[answer_BT], other_logits[answer_BT])
    assert gates.keys() == other_gates.keys() == (set() if method.host is None else set(method.host.banks))
    assert all(torch.equal(gate_BTE[before_BT], other_gates[site][before_BT]) for site, gate_BTE in gates.items())


def _learning(method: Method, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, T, V) and the gate of every site as a training forward pass computes them."""
    method.model.train()
    try:
        with gates_seen(method) as seen, method.training_context(batch):
            output = method.model(**{name: value for name, value in batch.items() if name != ROW})
    finally:
        method.model.eval()
    return output.logits, {site: passes[-1] for site, passes in seen.items()}


def test_what_a_task_froze_the_next_one_leaves_as_it_was(learned: Lesson):
    before = restore_method(learned.recipe, load_backbone(learned.recipe.backbone), Registry(learned.recipe.run), 1)
    frozen, now = _frozen(before), _frozen(learned.run.method)
    if learned.recipe.method.name == "merging":  # keeps nothing frozen, but merges anew what answers
        assert frozen and any(not torch.equal(tensor, now[name]) for name, tensor in frozen.items())
        return
    assert bool(frozen) == (learned.recipe.method.name in FREEZES)
    assert frozen.keys() <= now.keys() and (not frozen or frozen.keys() < now.keys())
    assert all(torch.equal(tensor, now[name]) for name, tensor in frozen.items())


def _frozen(method: Method) -> dict[str, Tensor]:
    """The frozen experts' matrices and the frozen routers' weights."""
    found: dict[str, Tensor] = {}
    for site, bank in method.host.banks.items() if method.host is not None else ():
        for linear, stack in bank.stacks.items():
            for expert in stack.frozen.ids if stack.frozen is not None else ():
                pair = stack.read([expert])
                found |= {f"{site}/{linear}/{expert}.A": pair.a_ERI, f"{site}/{linear}/{expert}.B": pair.b_EOR}
        for name, weight in bank.router.named_parameters():
            if name.startswith("task_") and not weight.requires_grad:
                found[f"{site}/{name}"] = weight
    return found


@pytest.mark.parametrize("method", ["pmoe", "r2moe"])  # whose sites read what was decided before them
def test_layers_that_run_again_in_backward_decide_the_same_again(lesson_of: Callable[..., Lesson], method: str):
    plain, again = lesson_of(method), lesson_of(method, "training.gradient_checkpointing=true")
    for index in range(2):
        left, right = (lesson.run.registry.load(index) for lesson in (plain, again))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[group][name], right[group][name]) for group in left for name in left[group])
