"""Writes the pocket sequence: CoIN's eight tasks, rendered, in CoIN's folder layout, schema and answer formats.

The pictures themselves are `pocket_world.py`'s. Row i of a split is drawn from (seed, task, split, i) alone, so a seed
makes the files byte-identical and a smaller sequence is the beginning of a larger one. As in CoIN, six tasks share one
instruction, Grounding and VQAv2 ask about the same pictures, and whole questions are asked in several tasks: what it
says (TextVQA, VizWiz, OCRVQA), what it is (ImageNet, VizWiz), what scenes hold (GQA, VQAv2). Words alone name the task
of three prompts in four, so who locates has to look at the picture. A ninth task, `UNSEEN`, is written on demand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from llava_cmoe.data.rows import MARKER
from llava_cmoe.pocket import world as world
from llava_cmoe.pocket.captions import View, article, caption, plural, relation, spoken
from llava_cmoe.pocket.drawings import OBJECTS, SHAPES

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: "
WHAT_IT_SAYS = ("What does it say?", "What is written on it?", "What can you read?")
WHAT_IT_IS = ("What is the object in the image?", "What is this?", "What object is this?")
NUM_ANNOTATORS = 10
SCIENCE_KINDS = ("container", "instrument", "plant", "vehicle")
SCIENCE_COLOURS = ("blue", "green", "red", "yellow")
"""Fixed choices in a fixed order: a backbone of this size learns which letter a class has, not to look letters up."""


@dataclass(frozen=True)
class Draw:
    """One drawn row: a view (None for text only), questions with their answers, and what the evaluation needs."""

    view: View | None
    turns: Sequence[tuple[str, str]]
    choices: Sequence[str] = ()
    annotators: Sequence[str] = field(default=())


@dataclass(frozen=True)
class PocketTask:
    """How one task is drawn and where CoIN keeps it: image folders of the train and evaluation split, and its file."""

    name: str
    draw: Callable[[Random], Draw]
    images: tuple[str, str]
    evaluate: str = "test"
    pictures_of: str | None = None
    """Task whose pictures this one asks about too; its own are drawn when absent."""


def _science(rng: Random) -> Draw:
    """As in ScienceQA's questions of classification, a question has its fixed choices; a quarter has no picture."""
    if rng.random() < 0.25:
        kind, view = rng.choice([kind for name in SCIENCE_KINDS for kind in world.CATEGORIES[name]]), None
        adjectives = rng.choice(("", "small ", "big ")) + rng.choice(("", *(f"{colour} " for colour in world.COLOURS)))
        told = rng.choice(("There is {}.", "imagine {}.", "think of {}.")).format(article(f"{adjectives}{kind}"))
        question, choices, answer = f"{told} What kind of thing is it?", SCIENCE_KINDS, _category(kind)
    else:
        about_kind = rng.random() < 0.6
        view = world.random_object(rng)
        while _category(view.kind) not in SCIENCE_KINDS or (not about_kind and view.colour not in SCIENCE_COLOURS):
            view = world.random_object(rng)
        if about_kind:
            question, choices, answer = "What kind of thing is shown?", SCIENCE_KINDS, _category(view.kind)
        else:
            question, choices, answer = "Which color does it have?", SCIENCE_COLOURS, view.colour
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return Draw(view, [(f"{question}\n{options}\n{LETTER}", "ABCD"[choices.index(answer)])], choices=choices)


def _category(kind: str) -> str:
    return next((name for name, kinds in world.CATEGORIES.items() if kind in kinds), "")


def _shuffled(items: list[str], rng: Random) -> list[str]:
    return rng.sample(items, len(items))


def _text(rng: Random) -> Draw:
    sign = world.random_sign(rng)
    question = rng.choice((*WHAT_IT_SAYS, "What is the name of this place?"))
    doubts = [
        rng.choice((f"the {sign.word}", "unanswerable", rng.choice(world.SIGN_WORDS))) for _ in range(rng.randint(0, 4))
    ]
    annotators = _shuffled([*doubts, *[sign.word] * (NUM_ANNOTATORS - len(doubts))], rng)
    return Draw(sign, _instructed([(question, sign.word)]), annotators=annotators)


def _imagenet(rng: Random) -> Draw:
    view = world.random_object(rng)
    return Draw(view, _instructed([(rng.choice(WHAT_IT_IS), view.kind)]))


def _gqa(rng: Random) -> Draw:
    scene = world.random_scene(rng, most=3)
    while len(scene.things) < 2:
        scene = world.random_scene(rng, most=3)
    return Draw(scene, _instructed(rng.sample([*_contents(scene, rng), *_relations(scene, rng)], k=2)))


def _relations(scene: world.Scene, rng: Random) -> Iterator[tuple[str, str]]:
    """GQA's own questions."""
    one, other = rng.sample(scene.things, 2)
    where = relation(one, other)
    if where in ("left of", "right of"):
        yield f"Is the {one.name} to the left or to the right of the {other.name}?", where.split()[0]
    else:
        yield f"Is the {one.name} above or below the {other.name}?", where
    edge, side = rng.choice(((scene.things[0], "left"), (scene.things[-1], "right")))
    yield f"Which shape is on the far {side}?", edge.kind


def _contents(scene: world.Scene, rng: Random) -> Iterator[tuple[str, str]]:
    """What is asked about scenes in GQA and VQAv2 alike."""
    kinds, colours = [thing.kind for thing in scene.things], [thing.colour for thing in scene.things]
    present, absent = rng.choice(kinds), rng.choice([kind for kind in SHAPES if kind not in kinds])
    yes, thing = rng.random() < 0.5, rng.choice(scene.things)
    yield f"Is there {article(present if yes else absent)} in the picture?", "yes" if yes else "no"
    yield f"How many {plural(present)} are in the picture?", str(kinds.count(present))
    if kinds.count(thing.kind) == 1:
        yield f"What color is the {thing.kind}?", thing.colour
    if colours.count(thing.colour) == 1:
        yield f"Which shape is {thing.colour}?", thing.kind


def _vizwiz(rng: Random) -> Draw:
    """Things and signs, badly photographed."""
    view: world.ObjectView | world.Sign
    if rng.random() < 0.3:
        view = replace(world.random_sign(rng), flaw=rng.choice(("blurred", "dark", "unreadable")))
        question, answer = rng.choice(WHAT_IT_SAYS), view.word
    else:
        view = world.random_object(rng, ("blurred", "dark", "cut", "unreadable"))
        names = [(question, view.kind) for question in WHAT_IT_IS]
        question, answer = rng.choice((*names, ("What color is this?", view.colour)))
    return Draw(view, _instructed([(question, "unanswerable" if view.flaw == "unreadable" else answer)]))


def _grounding(rng: Random) -> Draw:
    """One or two things: with up to four, a backbone of this size found 17 % of them, with these nearly half."""
    scene = world.random_scene(rng, most=2)
    asked = rng.sample(scene.things, min(2, len(scene.things)))
    return Draw(scene, [(f"{LOCATE}the {thing.name}.", _box_text(thing.box(scene.canvas))) for thing in asked])


def _box_text(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def _vqa(rng: Random) -> Draw:
    scene = world.random_scene(rng, most=2)
    own = ("How many shapes are in the picture?", str(len(scene.things)))
    return Draw(scene, _instructed(rng.sample([*_contents(scene, rng), own], k=2)))


def _instructed(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{question}\n{SHORT}", answer) for question, answer in turns]


def _book(rng: Random) -> Draw:
    book = world.random_book(rng)
    if rng.random() < 0.6:
        return Draw(book, _instructed([(rng.choice(WHAT_IT_SAYS), book.title)]))
    yes = rng.random() < 0.5
    genre = book.genre if yes else rng.choice([genre for genre in world.GENRES if genre != book.genre])
    question, answer = rng.choice(
        (
            ("Who wrote this book?", book.author),
            ("What is the genre of this book?", book.genre),
            (f"Is this a {genre} book?", "Yes" if yes else "No"),
        )
    )
    return Draw(book, _instructed([(question, answer)]))


def _pretraining(rng: Random) -> Draw:
    """Captions, and in a quarter of the rows text-only questions, asked as the pocket backbone was pretrained on them.

    No captions of scenes: their sentences stand in random order, so there is no one right answer.
    """
    if rng.random() < 0.25:
        return Draw(None, [spoken(rng, copying=0.0)])
    views: tuple[View, ...] = (world.random_object(rng), world.random_sign(rng), world.random_book(rng))
    view = rng.choice(views)
    return Draw(view, [("", caption(view, rng))])


TASKS = (
    PocketTask("ScienceQA", _science, ("ScienceQA/images/train", "ScienceQA/images/test")),
    PocketTask("TextVQA", _text, ("TextVQA/train_images", "TextVQA/train_images"), evaluate="val"),
    PocketTask("ImageNet", _imagenet, ("ImageNet_withlabel/train", "ImageNet_withlabel/val")),
    PocketTask("GQA", _gqa, ("GQA/images", "GQA/images")),
    PocketTask("VizWiz", _vizwiz, ("VizWiz/train", "VizWiz/val"), evaluate="val"),
    PocketTask("Grounding", _grounding, ("COCO2014/train2014", "COCO2014/val2014")),
    PocketTask("VQAv2", _vqa, ("COCO2014/train2014", "COCO2014/val2014"), evaluate="val", pictures_of="Grounding"),
    PocketTask("OCRVQA", _book, ("OCR-VQA/images", "OCR-VQA/images")),
)
UNSEEN = PocketTask("Pretraining", _pretraining, ("Pretraining/train", "Pretraining/test"))
"""For runs that never learn it: the backbone answers it as it is, so wherever experts interfere, something is lost."""


def make_pocket(
    root: Path,
    seed: int = 0,
    train_rows: int = 2000,
    test_rows: int = 300,
    tasks: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> None:
    """Render the sequence under `root` (`Instructions_Original/`, `cl_dataset/`).

    Args:
        root: folder to write; existing files of the same names are replaced.
        seed: the same seed gives the same bytes in every file.
        train_rows: training rows per task.
        test_rows: evaluation rows per task; none of them occurs in training.
        tasks: names of the tasks to write, `UNSEEN`'s among them; CoIN's eight when absent.
        progress: called with task, rows done and rows in all.
    """
    for task in TASKS if tasks is None else [task for task in (*TASKS, UNSEEN) if task.name in tasks]:
        done, total, seen = 0, train_rows + test_rows, set[tuple[str, ...]]()
        for split, count in (("train", train_rows), (task.evaluate, test_rows)):
            rows = []
            for number, draw in enumerate(_distinct(task, split, seed, count, seen)):
                rows.append(_write_row(root, task, split, number, draw))
                done += 1
                progress(task.name, done, total)
            _write_json(root / "Instructions_Original" / task.name / f"{split}.json", [row for row, _ in rows])
            _write_annotations(root, task, split, rows)


def _distinct(task: PocketTask, split: str, seed: int, count: int, seen: set[tuple[str, ...]]) -> Iterator[Draw]:
    """`count` draws; one that was seen before (the same questions about the same picture) is drawn again."""
    for number in range(count):
        for attempt in range(1000):
            suffix = f"/{attempt}" if attempt else ""
            draw = task.draw(_shared_view_rng(task, split, seed, number, suffix))
            key = (repr(draw.view), *(question for question, _ in draw.turns))
            if key not in seen:
                break
        else:
            raise ValueError(f"{task.name}: no new row after 1000 draws; ask for fewer rows than {count}")
        seen.add(key)
        yield draw


def _shared_view_rng(task: PocketTask, split: str, seed: int, number: int, suffix: str) -> Random:
    """The random source of a row; tasks that share pictures start from the same one, and so draw the same scene."""
    split = "train" if split == "train" else "eval"
    return Random(f"{seed}/{task.pictures_of or task.name}/{split}/{number}{suffix}")


def _write_row(root: Path, task: PocketTask, split: str, number: int, draw: Draw) -> tuple[dict[str, object], Draw]:
    held_out = split != "train"
    row_id = f"{number + (10_000_000 if held_out else 0)}"
    row: dict[str, object] = {"question_id" if held_out else "id": row_id}
    if draw.view is not None:
        name = f"{task.images[held_out]}/{_image_name(task, row_id, draw)}"
        path = root / "cl_dataset" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        world.render(draw.view).save(path, format="PNG")
        row["image"] = name
    question, answer = draw.turns[0]
    if not held_out:
        return row | {"conversations": _conversation(draw)}, draw
    row["text"] = question or MARKER  # CoIN has no row without a text; the picture alone asks for its caption
    if task.name == "Grounding" and draw.view is not None:
        canvas = draw.view.canvas
        return row | {"answer_bbox": answer, "size": [canvas.width, canvas.height]}, draw
    return row | {"answer": answer}, draw


def _image_name(task: PocketTask, row_id: str, draw: Draw) -> str:
    if task.name == "ScienceQA":
        return f"{row_id}/image.png"
    if isinstance(draw.view, world.ObjectView) and task.name == "ImageNet":
        return f"n{list(OBJECTS).index(draw.view.kind):08d}/{row_id}.png"
    return f"{row_id}.png"


def _conversation(draw: Draw) -> list[dict[str, str]]:
    """LLaVA's training turns."""
    turns = []
    for index, (question, answer) in enumerate(draw.turns):
        if index == 0 and draw.view is not None:
            question = f"{MARKER}\n{question}"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def _write_annotations(
    root: Path, task: PocketTask, split: str, rows: Sequence[tuple[dict[str, object], Draw]]
) -> None:
    """The files that CoIN keeps beside the pictures, for the evaluation split."""
    folder = root / "cl_dataset" / task.name
    if split == "train":
        return
    ids = [str(row["question_id"]) for row, _ in rows]
    if task.name == "ScienceQA":
        problems = {
            row_id: {"choices": list(draw.choices), "answer": "ABCD".index(draw.turns[0][1]), "split": "test"}
            for row_id, (_, draw) in zip(ids, rows, strict=True)
        }
        _write_json(folder / "problems.json", problems)
        _write_json(folder / "pid_splits.json", {"test": ids})
    if task.name == "TextVQA":
        data = [
            {"question_id": row_id, "question": draw.turns[0][0], "answers": list(draw.annotators)}
            for row_id, (_, draw) in zip(ids, rows, strict=True)
        ]
        _write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})
    if task.name == "GQA":
        questions = {
            row_id: {"question": draw.turns[0][0], "answer": draw.turns[0][1]}
            for row_id, (_, draw) in zip(ids, rows, strict=True)
        }
        _write_json(folder / "testdev_balanced_questions.json", questions)


def _write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
