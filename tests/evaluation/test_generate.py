"""Generation: the same bytes whatever the number of processes, kills and batch mates; routes hang on samples alone."""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from llava_cmoe.data.encoding import Encoding, PromptRows
from llava_cmoe.data.rows import EVAL_FEATURES
from llava_cmoe.evaluation.generate import EvalModel, EvalSet, Route, answer_batch, generate_answers
from llava_cmoe.evaluation.log import read_answers
from llava_cmoe.methods.base import DeferredLocation
from llava_cmoe.records import Located

NUM_ROWS = 10
ORACLE = Route("oracle", task_index=1, num_known=3, seed=0)
LOCATED = replace(ORACLE, name="located")
RANDOM = replace(ORACLE, name="random")


@dataclass
class RecordingMethod:
    """Locates prompts of even length at task 2 and knows no task for the others; records what it is asked."""

    locates: bool = True
    answers_by_task: bool = False
    num_located: int = 0
    plans: list[list[int] | None] = field(default_factory=list)

    @contextmanager
    def answering(self, batch: Mapping[str, Tensor], task_B: Tensor | None = None) -> Iterator[DeferredLocation]:
        located = self.locate(batch) if self.locates and task_B is None else None
        given_B = task_B if located is None else located.task_B
        self.plans.append(None if given_B is None else given_B.tolist())
        yield lambda: located

    def locate(self, batch: Mapping[str, Tensor]) -> Located:
        self.num_located += 1
        length_B = batch["attention_mask"].sum(dim=1)
        score_BN = torch.stack([length_B, length_B, -length_B / 4], dim=1)
        return Located.at(torch.where(length_B % 2 == 0, 2, -1), score_BN)


@dataclass
class Process:
    """One of several processes; without a barrier the others are not there and nobody is waited for."""

    process_index: int = 0
    num_processes: int = 1
    barrier: Barrier | None = None

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        if self.barrier:
            self.barrier.wait(timeout=60)


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Prompts of different lengths, every fourth without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    made: list[dict[str, Any]] = []
    for number in range(NUM_ROWS):
        path = folder / f"{number}.png"
        Image.new("RGB", (20 + number, 30), (25 * number, 255 - 20 * number, 128)).save(path)
        has_image = number % 4 != 3
        question = "<image>\n" * has_image + "What is the object? " * (1 + number % 3) + "yes" * (number % 2)
        made.append(
            {
                "id": f"q{number}", "image": str(path) if has_image else None,
                "turns": [{"role": "user", "text": question}],
                "answer": "cat", "answers": [], "box": [], "choices": [], "size": [],
            }
        )  # fmt: skip
    return Dataset.from_list(made, features=EVAL_FEATURES)


@pytest.fixture
def questions(rows: Dataset, tiny_processor: Any) -> EvalSet:
    texts = tuple(turns[0]["text"] for turns in rows["turns"])
    return EvalSet(tuple(rows["id"]), texts, PromptRows(rows, Encoding(tiny_processor, keep=True)), max_new_tokens=6)


@pytest.fixture
def eval_model(tiny_llava: Any, tiny_processor: Any) -> EvalModel:
    return EvalModel(RecordingMethod(), tiny_llava, tiny_processor)


def generate(
    eval_model: EvalModel, questions: EvalSet, path: Path, route: Route = ORACLE, batch_size: int = 3, **process: int
) -> bytes:
    generate_answers(eval_model, questions, route, path, batch_size=batch_size, processes=Process(**process))
    return path.read_bytes()


def batches_of(questions: EvalSet, size: int = 3) -> list[list[int]]:
    """What is asked together: the longest question first."""
    order = sorted(range(NUM_ROWS), key=lambda place: (-len(questions.texts[place]), place))
    return [order[start : start + size] for start in range(0, NUM_ROWS, size)]


def kill_after(num_batches: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let `num_batches` batches through, then raise; returns the list that the batches are noted in."""
    noted: list[list[int]] = []

    def counted(eval_model: EvalModel, questions: EvalSet, batch: range, route: Route) -> Any:
        if len(noted) == num_batches:
            raise Killed
        noted.append(list(batch))
        return answer_batch(eval_model, questions, batch, route)

    monkeypatch.setattr("llava_cmoe.evaluation.generate.answer_batch", counted)
    return noted


def test_every_question_is_answered_in_order_and_nothing_else_is_left_in_the_folder(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path
) -> None:
    generate(eval_model, questions, tmp_path / "after_01" / "GQA.oracle.jsonl")
    answers = read_answers(tmp_path / "after_01" / "GQA.oracle.jsonl")
    assert [answer.id for answer in answers] == list(questions.ids)
    assert [answer.prompt for answer in answers] == list(questions.texts)
    assert len({answer.text for answer in answers}) > 1
    assert [path.name for path in (tmp_path / "after_01").iterdir()] == ["GQA.oracle.jsonl"]


def test_text_is_the_same_alone_and_in_a_batch_with_padding_and_text_only_mates(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path
) -> None:
    alone = generate(eval_model, questions, tmp_path / "1.jsonl", batch_size=1)
    assert generate(eval_model, questions, tmp_path / "16.jsonl", batch_size=16) == alone


def test_text_is_the_models_own_greedy_continuation(eval_model: EvalModel, questions: EvalSet, tmp_path: Path) -> None:
    """Against a plain loop over full forward passes, without cache, padding or `generate`."""
    generate(eval_model, questions, tmp_path / "a.jsonl")
    tokenizer = eval_model.processor.tokenizer
    for index in (0, 3):
        prompt = questions.prompts[index]
        pictures = {name: value for name, value in prompt.items() if name == "pixel_values"}
        ids = prompt["input_ids"][None]
        length = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < length + 6 and ids[0, -1] != tokenizer.eos_token_id:
                ids = torch.cat([ids, eval_model.model(input_ids=ids, **pictures).logits[:, -1:].argmax(-1)], dim=1)
        text = tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()
        assert read_answers(tmp_path / "a.jsonl")[index].text == text


def test_generation_stops_at_the_end_token_of_the_model(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path
) -> None:
    generate(eval_model, questions, tmp_path / "open.jsonl")
    tokenizer = eval_model.processor.tokenizer
    with torch.no_grad():
        first = eval_model.model(**{k: v if k == "pixel_values" else v[None] for k, v in questions.prompts[0].items()})
    eval_model.model.generation_config.eos_token_id = int(first.logits[0, -1].argmax())
    generate(eval_model, questions, tmp_path / "ended.jsonl")
    opened, ended = (read_answers(tmp_path / name)[0].text for name in ("open.jsonl", "ended.jsonl"))
    end = tokenizer.decode([eval_model.model.generation_config.eos_token_id])
    assert opened.startswith(end.strip()) and ended in ("", end.strip()) and opened != ended


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_several_processes_compute_the_batches_of_one(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_processes: int
) -> None:
    noted = kill_after(99, monkeypatch)
    single = generate(eval_model, questions, tmp_path / "single.jsonl")
    batches = noted.copy()
    assert batches == batches_of(questions) != [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    noted.clear()
    path = tmp_path / "several.jsonl"
    for index in reversed(range(1, num_processes)):
        processes = Process(index, num_processes)
        generate_answers(eval_model, questions, ORACLE, path, batch_size=3, processes=processes)
        assert not path.exists()
    assert generate(eval_model, questions, path, num_processes=num_processes) == single
    assert sorted(noted) == sorted(batches)


@pytest.mark.parametrize("slow", [0, 1])
def test_processes_at_work_together_wait_for_the_slow_one_and_all_find_the_file(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, slow: int
) -> None:
    single = generate(eval_model, questions, tmp_path / "single.jsonl")
    path, barrier = tmp_path / "together.jsonl", Barrier(2)

    def work(index: int) -> bytes:
        def dawdle(what: str, done: int, total: int) -> None:
            time.sleep(0.3 * (index == slow))

        processes = Process(index, 2, barrier)
        generate_answers(eval_model, questions, ORACLE, path, batch_size=3, processes=processes, progress=dawdle)
        return path.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [single, single]


@pytest.mark.parametrize("num_bytes_lost", [0, 1, 30, 10_000])
def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes_lost: int
) -> None:
    whole = generate(eval_model, questions, tmp_path / "whole.jsonl")
    path = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            generate(eval_model, questions, path)
    part = tmp_path / "killed.jsonl.3.0.part"
    done = part.read_bytes().splitlines()
    assert not path.exists() and len(done) == 6 and set(done) <= set(whole.splitlines())
    os.truncate(part, max(0, part.stat().st_size - num_bytes_lost))
    noted = kill_after(99, monkeypatch)
    assert generate(eval_model, questions, path) == whole
    # A whole batch is skipped, one that was cut is computed again whole.
    assert noted == batches_of(questions)[{0: 2, 1: 1, 30: 1, 10_000: 0}[num_bytes_lost] :]
    assert not part.exists()


def test_an_evaluation_interrupted_on_two_processes_goes_on_with_one(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(eval_model, questions, tmp_path / "whole.jsonl")
    path = tmp_path / "killed.jsonl"
    generate_answers(eval_model, questions, ORACLE, path, batch_size=3, processes=Process(1, 2))
    part = tmp_path / "killed.jsonl.3.1.part"
    os.truncate(part, part.stat().st_size - 3)
    noted = kill_after(99, monkeypatch)
    assert generate(eval_model, questions, path) == whole
    first, _, third, fourth = batches_of(questions)
    assert noted == [first, third, fourth]
    assert not part.exists()


def test_an_evaluation_that_goes_on_with_another_batch_size_mixes_no_batches_of_two_sizes(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            generate(eval_model, questions, path)
    noted = kill_after(99, monkeypatch)
    generate(eval_model, questions, path, batch_size=4)
    assert noted == batches_of(questions, 4)
    assert list(tmp_path.iterdir()) == [path]


def test_a_complete_file_is_not_generated_again_and_left_over_parts_go(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    whole = generate(eval_model, questions, path)
    left_over = tmp_path / "a.jsonl.3.0.part"
    left_over.write_bytes(whole[:100])
    kill_after(0, monkeypatch)
    assert generate(eval_model, questions, path) == whole
    assert not left_over.exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.3.0.part"])
def test_answers_to_other_questions_are_refused_by_id(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, name: str
) -> None:
    generate(eval_model, questions, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").rename(tmp_path / name)
    other = replace(questions, ids=("other", *questions.ids[1:]))
    with pytest.raises(ValueError, match=r"a\.jsonl: holds an answer to 'q0', which is not asked"):
        generate(eval_model, other, tmp_path / "a.jsonl")


def with_broken(questions: EvalSet, rows: Dataset, processor: Any, broken: set[int]) -> EvalSet:
    """The same questions, some with a picture that is not there."""
    made = [{**row, "image": "/nowhere.png"} if number in broken else row for number, row in enumerate(rows)]
    return replace(questions, prompts=PromptRows(Dataset.from_list(made, features=EVAL_FEATURES), Encoding(processor)))


def test_a_sample_that_cannot_be_answered_is_recorded_and_its_batch_mates_are_answered_as_ever(
    eval_model: EvalModel, questions: EvalSet, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(eval_model, questions, tmp_path / "whole.jsonl")
    noted = kill_after(99, monkeypatch)
    broken = with_broken(questions, rows, eval_model.processor, {4})
    once = generate(eval_model, broken, tmp_path / "broken.jsonl")
    alone = [[batch, *([index] for index in batch if 4 in batch)] for batch in batches_of(questions)]
    assert noted == [batch for batches in alone for batch in batches]
    for number, (whole, found) in enumerate(
        zip(read_answers(tmp_path / "whole.jsonl"), read_answers(tmp_path / "broken.jsonl"), strict=True)
    ):
        if number == 4:
            assert (found.text, found.located, found.id) == ("", None, "q4") and "nowhere.png" in (found.failed or "")
        else:
            assert found == whole
    assert once.count(b'"failed"') == 1
    assert generate(eval_model, broken, tmp_path / "again.jsonl") == once


@pytest.mark.parametrize("place", ["encode", "answer"])
def test_too_little_memory_for_one_sample_is_that_samples_failure(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    encode = PromptRows.encode

    def out_of_memory(rows: PromptRows, turns: Any, image: Any) -> Any:
        if turns[0]["text"] == questions.texts[4]:
            raise MemoryError
        return encode(rows, turns, image)

    def answer_short(eval_model: EvalModel, questions: EvalSet, batch: Any, route: Route) -> Any:
        if 4 in batch:
            raise MemoryError
        return answer_batch(eval_model, questions, batch, route)

    if place == "encode":
        monkeypatch.setattr(PromptRows, "encode", out_of_memory)
    else:
        monkeypatch.setattr("llava_cmoe.evaluation.generate.answer_batch", answer_short)
    generate(eval_model, questions, tmp_path / "a.jsonl")
    failed = {answer.id: answer.failed for answer in read_answers(tmp_path / "a.jsonl") if answer.failed is not None}
    assert failed.keys() == {"q4"} and "memory" in failed["q4"].lower()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_only_fails_as_a_batch_costs_nothing(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Too little memory for several samples is enough for one."""
    whole = generate(eval_model, questions, tmp_path / "whole.jsonl")

    def short_of_memory(eval_model: EvalModel, questions: EvalSet, batch: Any, route: Route) -> Any:
        if len(batch) > 1:
            raise kind(f"{time.perf_counter()} bytes")
        return answer_batch(eval_model, questions, batch, route)

    monkeypatch.setattr("llava_cmoe.evaluation.generate.answer_batch", short_of_memory)
    assert generate(eval_model, questions, tmp_path / "short.jsonl") == whole


def test_what_no_sample_is_to_blame_for_is_not_swallowed(
    eval_model: EvalModel, questions: EvalSet, rows: Dataset, tmp_path: Path
) -> None:
    broken = with_broken(questions, rows, eval_model.processor, set(range(10)))
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        generate(eval_model, broken, tmp_path / "a.jsonl")
    with pytest.raises(RuntimeError, match=r"none of the first questions can be answered: .*nowhere\.png"):
        generate(eval_model, broken, tmp_path / "b.jsonl", batch_size=1)
    assert not (tmp_path / "a.jsonl").exists() and not (tmp_path / "b.jsonl").exists()
    assert generate(eval_model, questions, tmp_path / "b.jsonl").count(b'"failed"') == 0  # nothing of it is left


def test_located_route_asks_once_per_batch_and_writes_the_verdicts(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path
) -> None:
    generate(eval_model, questions, tmp_path / "a.jsonl", LOCATED)
    method = eval_model.method
    assert isinstance(method, RecordingMethod) and method.num_located == 4
    for index, answer in enumerate(read_answers(tmp_path / "a.jsonl")):
        length = len(questions.prompts[index]["input_ids"])
        assert (answer.located, answer.score) == ((2, -length / 4) if length % 2 == 0 else (-1, None))
    answered = [answer.located for answer in read_answers(tmp_path / "a.jsonl")]
    assert {2, -1} == set(answered)
    order = [index for batch in batches_of(questions) for index in batch]
    assert [task for plan in method.plans for task in plan or []] == [answered[index] for index in order]


def test_a_method_that_does_not_locate_answers_without_a_plan(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path
) -> None:
    method = RecordingMethod(locates=False)
    generate(replace(eval_model, method=method), questions, tmp_path / "a.jsonl", LOCATED)
    assert method.plans == [None] * 4
    assert {(answer.located, answer.score) for answer in read_answers(tmp_path / "a.jsonl")} == {(None, None)}


def test_oracle_route_uses_the_true_task_and_never_locates(
    eval_model: EvalModel, questions: EvalSet, tmp_path: Path
) -> None:
    generate(eval_model, questions, tmp_path / "a.jsonl")
    method = eval_model.method
    assert isinstance(method, RecordingMethod) and method.num_located == 0
    assert method.plans == [[1, 1, 1]] * 3 + [[1]]


def test_random_route_hangs_on_seed_and_id_alone() -> None:
    ids = [str(number) for number in range(300)]
    task_B = RANDOM.given_tasks(ids)
    assert task_B is not None
    by_id = dict(zip(ids, task_B.tolist(), strict=True))
    reversed_B = RANDOM.given_tasks(ids[::-1])
    assert reversed_B is not None and reversed_B.tolist() == [by_id[sample_id] for sample_id in ids[::-1]]
    other_B = replace(RANDOM, seed=1).given_tasks(ids)
    assert other_B is not None and not torch.equal(other_B, task_B)
    assert task_B.bincount().tolist() == pytest.approx([100, 100, 100], abs=30)


def test_progress_counts_the_samples_of_this_process(eval_model: EvalModel, questions: EvalSet, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    generate_answers(
        eval_model, questions, ORACLE, tmp_path / "a.jsonl", batch_size=3, processes=Process(1, 2),
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen == [("oracle", 3, 4), ("oracle", 4, 4)]
