"""Rows of every kind, annotation files and pictures: what the check takes, training and evaluation read whole."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from campaign.mutations import damaged, mutated, written
from campaign.workers import Met, meet
from PIL import Image

SCORERS = ("gqa", "grounding", "textvqa", "scienceqa", "captions", "vqa_soft", "numeric")
PICTURED = {"id": "t", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhich one is it?"},
                                                           {"from": "gpt", "value": "the left"}]}  # fmt: skip
TEXT = {"question_id": 7, "conversations": [{"from": "human", "value": "Is ice cold?"}, {"from": "gpt", "value": "yes"},
                                            {"from": "human", "value": "And fire?"},
                                            {"from": "gpt", "value": "no"}]}  # fmt: skip
LISTED = {"id": "l", "images": ["a.png"], "conversations": PICTURED["conversations"], "metadata": {"source": "x"}}
ASKED = {"question_id": "e", "image": "a.png", "text": "Which one is it?", "answer": "left", "answers": ["left"] * 10,
         "choices": ["left", "right"], "answer_bbox": "[0, 0, 1, 1]", "size": [20, 30]}  # fmt: skip
NUMERIC = {**ASKED, "answer": "3"}


class Rows:
    """A data root of one task that every case writes anew, read by the check and by what learns."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        from llava_cmoe.backbones.loading import load_processor

        self.root, self.backbone = folder / "root", backbone
        pictures = self.root / "cl_dataset"
        pictures.mkdir(parents=True, exist_ok=True)
        for name, size in (("a.png", (20, 30)), ("b.png", (3, 3))):
            Image.new("RGB", size, (200, 30, 30)).save(pictures / name)
        (self.root / "Instructions_Original").mkdir(exist_ok=True)
        self.processor = load_processor(str(backbone))

    def rows(self, rng: random.Random) -> tuple[str, str, str | None]:
        """One change of one row, or of the text of its file."""
        split, scorer = rng.choice(("train", "test")), rng.choice(SCORERS)
        sound = (
            rng.choice((PICTURED, TEXT, LISTED)) if split == "train" else (NUMERIC if scorer == "numeric" else ASKED)
        )
        rows: list[Any] = [sound, {**sound, "id" if "id" in sound else "question_id": "other"}]
        if rng.random() < 0.7:
            rows[0], how = mutated(sound, rng)
            content = written(rows, rng)
        else:
            content, how = damaged(written(rows, rng), rng)
        self._write(scorer, **{split: content})
        found, broken = self._judge(f"{split}.json", content, split)
        return f"rows ({split})", found, _told(broken, split, scorer, how)

    def annotations(self, rng: random.Random) -> tuple[str, str, str | None]:
        """One change of what evaluation rows lack: choices, ten answers, captions."""
        scorer = rng.choice(("scienceqa", "textvqa", "captions"))
        row = {key: value for key, value in ASKED.items() if key not in ("answers", "choices")}
        document: Any = {
            "scienceqa": {"e": {"choices": ["left", "right"], "answer": 0}, "x": {"choices": ["up", "down"]}},
            "textvqa": {"data": [{"question_id": "e", "answers": ["left"] * 10}]},
            "captions": {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "c"}]},
        }[scorer]
        row = {**row, "answer": "A"} if scorer == "scienceqa" else row
        if rng.random() < 0.7:
            document, how = mutated(document, rng)
            content = written(document, rng)
        else:
            content, how = damaged(written(document, rng), rng)
        (self.root / "annotations.json").write_bytes(content)
        self._write(scorer, test=json.dumps([row]).encode(), annotations="annotations.json")
        found, broken = self._judge("annotations.json", content, None)
        return f"annotations ({scorer})", found, _told(broken, how)

    def pictures(self, rng: random.Random) -> tuple[str, str, str | None]:
        """One change of a picture's bytes, or a picture of an odd mode or size; both geometries."""
        kind = rng.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"))
        mode = rng.choice(("RGB", "L", "1", "RGBA", "P", "LA", "I;16", "I", "F", "CMYK"))
        size = rng.choice(((20, 30), (1, 1), (2000, 1), (60_000, 4), (37, 53)))
        content = io.BytesIO()
        try:
            Image.new(mode, size).save(content, kind)
        except (OSError, ValueError):  # no such mode in this format
            Image.new("RGB", (20, 30)).save(content, "PNG")
        changed, how = (content.getvalue(), "as it is") if rng.random() < 0.25 else damaged(content.getvalue(), rng)
        (self.root / "cl_dataset/a.png").write_bytes(changed)
        self._write("gqa", geometry=rng.choice(("pad", "crop")))
        found, broken = self._judge("a.png", b"", None)
        Image.new("RGB", (20, 30), (200, 30, 30)).save(self.root / "cl_dataset/a.png")
        return "pictures", found, _told(broken, kind, mode, size, how)

    def _write(self, scorer: str, train: bytes | None = None, test: bytes | None = None, **keys: str) -> None:
        folder = self.root / "Instructions_Original"
        asked = {**(NUMERIC if scorer == "numeric" else ASKED), **({"answer": "A"} if scorer == "scienceqa" else {})}
        (folder / "train.json").write_bytes(json.dumps([PICTURED, TEXT]).encode() if train is None else train)
        (folder / "test.json").write_bytes(json.dumps([asked]).encode() if test is None else test)
        task = {"name": "t", "train": "train.json", "evaluate": "test.json", "scorer": scorer, "max_new_tokens": 3}
        (self.root / "sequence.yaml").write_text(json.dumps({"name": "one", "tasks": [{**task, **keys}]}))

    def _judge(self, file: str, content: bytes, split: str | None) -> tuple[str, str | None]:
        """What the check and what learns make of it: the outcome, and which promise it broke."""
        checked, learned = meet(self._check), meet(self._learn)
        for met in (checked, learned):
            if fault := met.faults(*([file, "the row"] if met is learned else [])):
                return "traceback" if met.outcome == "traceback" else "not in one line", fault
        found = checked.value or []
        if any(len(line.splitlines()) != 1 or len(line) > 900 or "\x1b" in line for line in found):
            return "not in one line", f"{found[0][:300]}"
        if bool(found) != (learned.outcome == "refused"):
            return "SILENT", f"the check says {found[:1]}, learning {learned.told[:300]!r}"
        if learned.outcome == "refused":
            return "refused", None
        lost = _lost(content, split, learned) if split else None
        return ("SILENT", lost) if lost else ("accepted whole", None)

    def _check(self) -> list[str]:
        from llava_cmoe.data.check import check_sequence
        from llava_cmoe.data.sequences import load_sequence

        tasks = load_sequence(str(self.root / "sequence.yaml"))
        return [str(problem) for problem in check_sequence(self.root, tasks, processor=self.processor).problems]

    def _learn(self) -> dict[str, list[dict[str, Any]]]:
        """What training and evaluation read: the texts of every row as they come out of its tokens, and its answer."""
        import tiny

        from llava_cmoe.data.encoding import PromptRows, SampleRows
        from llava_cmoe.data.task_data import TaskData
        from llava_cmoe.runs.run import check_rows

        recipe = tiny.recipe(
            self.root / "run", self.root, self.backbone, "sequential_lora", "training.max_length=100000"
        )
        data = TaskData.of(recipe)
        data.check(reads_images=True)
        check_rows(recipe, data, 0)
        (task,) = data.sequence.tasks
        encoding = data.encoding(task, self.processor)
        read: dict[str, list[dict[str, Any]]] = {}
        samples = SampleRows(data.train["t"], encoding, 100_000)
        for split, rows in (("train", samples), ("test", PromptRows(data.evaluate["t"], encoding))):
            decode = self.processor.tokenizer.decode
            read[split] = [{**row, "tokens": decode(rows[at]["input_ids"])} for at, row in enumerate(rows.rows)]
        return read


def _lost(content: bytes, split: str, learned: Met) -> str | None:
    """Which text of an accepted file is not in what is learned or asked."""
    from llava_cmoe.data.fields import ENDINGS, NOTES, PICTURE_NAMES, READ

    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        return f"no JSON is accepted ({error})"
    for raw, read in zip(rows, learned.value[split], strict=True):
        spoken = [turn["value"] for turn in raw.get("conversations", [])] if split == "train" else [raw["text"]]
        for text in spoken:
            if _plain(text) not in _plain(read["tokens"]):
                return f"{text[:80]!r} is not in {read['tokens'][:300]!r}"
        judged = split == "test" and isinstance(raw.get("answer"), str) and not read["box"]
        if judged and raw["answer"] not in (read["answer"], *read["answers"]):
            return f"the answer {raw['answer'][:80]!r} became {read['answer'][:80]!r}"
        for key in raw.keys() - READ - NOTES - PICTURE_NAMES:
            if isinstance(raw[key], str) and raw[key].strip("\ufeff\u200b \t\r\n\0") and not key.endswith(ENDINGS):
                return f"{key[:40]!r}: {raw[key][:40]!r} is dropped"
    return None


def _plain(text: str) -> str:
    """A text without the marker and blanks, which templates and formats set."""
    return "".join(text.replace("<image>", "").split())


def _told(broken: str | None, *how: object) -> str | None:
    return None if broken is None else f"{', '.join(map(str, how))}: {broken}"


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
