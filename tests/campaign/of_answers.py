"""Files of answers and of questions: stored ones, another toolkit's in both protocols, questions for a chat."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from campaign.mutations import damaged, mutated, written
from campaign.of_rows import fresh
from campaign.workers import Met, Verdict, meet
from campaign.world import World

ROWS = {"1": "left", "2": "right", "3": "up"}
LINE = {"question_id": "1", "prompt": "?", "text": "left", "answer_id": "a", "model_id": "m", "metadata": {}}


class Answers:
    """Small files of each kind, mutated."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder / "answers", world

    def stored(self, rng: random.Random) -> Verdict:
        """A run's answers file: every line an answer, or none is read."""
        from llava_cmoe.evaluation.log import Answer, read_answers

        lines = [Answer(one, text, 0, 0.5, "?").to_line() for one, text in ROWS.items()]
        content, how = _changed(lines, rng)
        path = self._write("colours.located.jsonl", content)
        met = meet(lambda: read_answers(path))
        return _judged("stored answers", met, how, path, content, lambda answer: answer.text)

    def imported(self, rng: random.Random) -> Verdict:
        """Another toolkit's answers: all ids once, each text scored as it stands."""
        from llava_cmoe.evaluation.log import read_answers
        from llava_cmoe.evaluation.official.coin_format import import_answers

        run, source = fresh(self.folder / "import") / "run", self.folder / "import/source"
        ids = [f"colours-test-{number}" for number in range(6)]
        lines = [
            written({**LINE, "question_id": one, "text": "ABC"[at % 3]}, rng) + b"\n" for at, one in enumerate(ids)
        ]
        content, how = _changed(lines, rng)
        path = source / "colours/colours/merge.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        protocol = rng.choice(("strict", "coin"))
        recipe = self.world.write_recipe(run, f"evaluation.protocol={protocol}", "data.eval_rows=null")
        met = meet(lambda: import_answers(source, recipe, "imported"))
        if met.outcome == "accepted":
            met = Met("accepted", read_answers(next(run.rglob("*.jsonl"))), met.told)
        return _judged(f"imported answers ({protocol})", met, how, path, content, lambda answer: answer.text)

    def scored(self, rng: random.Random) -> Verdict:
        """Answers and official files of a task, scored without a run."""
        from llava_cmoe.evaluation.official.files import ScoringError
        from llava_cmoe.evaluation.official.score_file import score_file
        from llava_cmoe.settings.base import RecipeError

        task = rng.choice(("VizWiz", "GQA", "OCRVQA", "ImageNet"))
        place = fresh(self.folder / "score")
        rows = [{"question_id": one, "image": "x.jpg", "text": "?", "answer": text} for one, text in ROWS.items()]
        content, how = written(rows, rng), "as they are"
        lines = [written({**LINE, "question_id": one, "text": text}, rng) + b"\n" for one, text in ROWS.items()]
        answers = b"".join(lines)
        if rng.random() < 0.5:
            answers, how = _changed(lines, rng)
        else:
            changed, how = mutated(rows, rng)
            content = written(changed, rng)
        for name in ("val.json", "test.json", "testdev_balanced_questions.json"):
            (place / name).write_bytes(content)
        path = place / "merge.jsonl"
        path.write_bytes(answers)
        protocol = rng.choice(("strict", "coin"))

        def scoring() -> float:
            try:
                return score_file(task, place, path, protocol).accuracy
            except ScoringError as error:
                raise RecipeError(str(error)) from error

        met = meet(scoring)
        kind = f"scored answers ({protocol})"
        if fault := met.faults(place):
            return kind, "traceback" if met.outcome == "traceback" else "not in one line", f"{task}, {how}: {fault}"
        if met.outcome == "accepted" and not 0 <= met.value <= 100:
            return kind, "SILENT", f"{task}, {how}: {met.value} percent"
        return kind, met.outcome, None

    def questions(self, rng: random.Random) -> Verdict:
        """A file of questions for `chat --questions`."""
        from llava_cmoe.chat.questions import read_questions

        lines = [written({"question": text, "image": None}, rng) + b"\n" for text in ROWS.values()]
        content, how = _changed(lines, rng)
        path = self._write("questions.jsonl", content)
        met = meet(lambda: read_questions(path))
        return _judged("questions", met, how, path, content, lambda asked: asked.question, key="question")

    def _write(self, name: str, content: bytes) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)
        return self.folder / name


def _changed(lines: list[bytes], rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(lines))
    if rng.random() < 0.6:
        document, how = mutated(json.loads(lines[at]), rng)
        return b"".join([*lines[:at], written(document, rng) + b"\n", *lines[at + 1 :]]), f"line {at + 1}: {how}"
    return damaged(b"".join(lines), rng)


def _judged(kind: str, met: Met, how: str, path: Path, content: bytes, text_of: Any, key: str = "text") -> Verdict:
    if fault := met.faults(path, path.parent):
        return kind, "traceback" if met.outcome == "traceback" else "not in one line", f"{how}: {fault}"
    if met.outcome == "refused":
        return kind, "refused", None
    try:
        said = sorted(json.loads(line)[key] for line in content.split(b"\n") if line.strip())
    except (ValueError, KeyError, TypeError) as error:
        return kind, "SILENT", f"{how}: accepted, and is no file of JSON lines ({error!r})"
    read = sorted(text_of(one) for one in met.value)
    if said != read:
        return kind, "SILENT", f"{how}: says {str(said)[:200]}, read as {str(read)[:200]}"
    return kind, "accepted whole", None
