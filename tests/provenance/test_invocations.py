"""What a result was made on stands beside it, and changes none of its bytes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from tiny import BATCH, Lesson

from llava_cmoe import sequence
from llava_cmoe.provenance import invocations as provenance
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.provenance.invocations import Manifest


def manifest_of(run: Path) -> Manifest:
    return Manifest.model_validate_json((run / "manifest.json").read_bytes())


def test_a_run_names_its_result_and_what_made_it(lesson_of: Callable[..., Lesson]):
    run = lesson_of("cmoe").recipe.run
    told = manifest_of(run)
    assert told.results_sha256 == fingerprint_file(run / "results.json")
    (call,) = told.calls
    assert call.learned == tuple(call.evaluated) == ("colours", "sides") and min(call.evaluated.values()) > 0
    assert (call.processes, call.effective_batch) == (1, BATCH)
    head = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(head, cwd=Path(provenance.__file__).parent, capture_output=True, text=True)
    assert (call.revision or "").rstrip("+") == done.stdout.strip()
    assert call.hardware.cores >= 1 and call.hardware.processor and call.hardware.memory_gb > 0


def test_a_call_that_does_nothing_new_adds_nothing(lesson_of: Callable[..., Lesson]):
    recipe = lesson_of("cmoe").recipe
    before = (recipe.run / "manifest.json").stat()
    sequence.evaluate_run(recipe)
    assert (recipe.run / "manifest.json").stat() == before


def test_a_later_call_stands_behind_the_first(lesson_of: Callable[..., Lesson]):
    recipe = lesson_of("moelora").recipe
    (recipe.run / "answers/after_02/sides.located.jsonl").unlink()
    sequence.evaluate_run(recipe)
    first, second = manifest_of(recipe.run).calls
    assert first.learned == ("colours", "sides") and second.learned == () and list(second.evaluated) == ["sides"]


def test_a_batch_is_that_of_a_step_on_all_processes(lesson_of: Callable[..., Lesson]):
    training = lesson_of("cmoe").recipe.training.model_copy(update={"batch_size": 3, "accumulation": 4})
    assert provenance.effective_batch(training, processes=2) == 24
