"""What a person types in a chat is done or refused in a line, and what was said is remembered as it was said."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from llava_cmoe.chat import terminal
from llava_cmoe.chat.location import Verdict
from llava_cmoe.chat.session import BASE, Reply
from llava_cmoe.chat.talk import Talk
from llava_cmoe.chat.terminal import COMMANDS, converse, describe, in_words

PICTURE = Path("picture.png")
TASKS = ("gqa", "vqa")


class Parrot:
    """Stands in for a session: says the question back, one word at a time; `interrupted` is Ctrl-C at that word."""

    def __init__(self, interrupted: int | None = None, tasks: Sequence[str] = TASKS) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.interrupted, self.tasks = interrupted, tasks

    def check_picture(self, image: Path) -> None:
        if not image.exists():
            raise FileNotFoundError(f"{image}: missing")

    def ask(self, image: Path | None, text: str, earlier: Sequence[Any] = (), task: int | None = None) -> Reply:
        self.asked.append((image, text, [turn["text"] for turn in earlier], task))
        verdict = Verdict("gqa", {"gqa": 0.25, "vqa": 7.0}) if task is None else None
        stop = threading.Event()
        return Reply(verdict, self._words(text, stop), stop, lambda: {"model.layers.3.mlp": {0: 0.25, 2: 0.75, 5: 0.0}})

    def _words(self, text: str, stop: threading.Event) -> Iterator[str]:
        for number, word in enumerate(text.split()):
            if stop.is_set():
                return
            yield f"[{word}] "
            if number == self.interrupted:
                raise KeyboardInterrupt


def chatted(lines: list[str], talk: Talk) -> str:
    """What is printed while a person types some lines, then Ctrl-D."""
    typed = iter(lines)

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=80)
    converse(console, talk, read)
    assert next(typed, None) in (None, "never read")
    return console.file.getvalue()  # type: ignore[attr-defined]


def talk_of(parrot: Parrot, **more: Any) -> Talk:
    return Talk(parrot, PICTURE, **more)  # type: ignore[arg-type]


def test_the_task_stands_before_the_answer():
    said = chatted(["what is", "", "it"], talk_of(Parrot()))
    assert said.splitlines()[1:5] == ["(located: gqa, score 0.2)", "[what] [is] ", "(located: gqa, score 0.2)", "[it] "]


def test_an_instruction_can_stand_on_its_own_line():
    parrot = Parrot()
    chatted([r"What is it?\nAnswer with one word."], talk_of(parrot))
    assert parrot.asked[0][1] == "What is it?\nAnswer with one word."


def test_exit_ends_the_chat():
    assert "located" not in chatted(["exit", "never read"], talk_of(Parrot()))


@given(st.lists(st.sampled_from(["one", "two words", "/reset"]), max_size=8), st.booleans())
def test_a_question_comes_after_all_that_was_said_since_the_last_reset_or_alone(lines: list[str], alone: bool):
    parrot = Parrot()
    chatted(lines, talk_of(parrot, alone=alone))
    before: list[str] = []
    asked = iter(parrot.asked)
    for line in lines:
        if line == "/reset":
            before = []
            continue
        assert next(asked) == (PICTURE, line, [] if alone else before, None)
        before = [*before, line, " ".join(f"[{word}]" for word in line.split())]
    assert next(asked, None) is None


def test_a_route_holds_until_another_one_and_a_picture_begins_anew(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    parrot = Parrot()
    lines = ["a", "/route oracle:vqa", "b", "/route base", "c", f"/image {tmp_path / 'other.png'}", "d", "/image", "e"]
    said = chatted([*lines, "/route located", "f"], talk_of(parrot))
    assert [(image, len(earlier), task) for image, _, earlier, task in parrot.asked] == [
        *((PICTURE, 0, None), (PICTURE, 2, 1), (PICTURE, 4, BASE)),
        *((tmp_path / "other.png", 0, BASE), (None, 0, BASE), (None, 2, None)),
    ]
    assert "(oracle:vqa)\n[b]" in said and "(base)\n[c]" in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/rout", "no command /rout; there is /image, /route"),
        ("/route vqa", "no route 'vqa'; there is located, base, oracle:gqa, oracle:vqa"),
        ("/route", "no route ''; there is located"),
        ("/image no.png", "no.png: missing"),
        ("/why", "nothing was asked yet"),
        ("/save out.jsonl", "nothing was said yet"),
        ("/save", "name the file"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(line: str, reason: str):
    said = chatted([line, "still here"], talk_of(Parrot()))
    assert reason in said and "[still] [here]" in said


def test_where_all_tasks_are_answered_alike_there_is_one_route():
    assert "answers alike for all tasks" in chatted(["/route base"], talk_of(Parrot(tasks=())))


def test_ctrl_c_ends_the_answer_and_not_the_chat_and_forgets_it():
    parrot = Parrot(interrupted=1)
    said = chatted(["one two three", "four"], talk_of(parrot))
    assert "[one] [two] \n(stopped)" in said and "three" not in said and "[four]" in said
    assert parrot.asked[1][2] == []


def test_why_tells_all_scores_and_the_experts_by_use():
    said = chatted(["what", "/why"], talk_of(Parrot()))
    assert "located: gqa, score 0.2; scores, the closest first:\n  gqa 0.2\n  vqa 7.0\n" in said
    assert "2 75 %, 0 25 %\n" in said and "5 0 %" not in said


def test_what_was_said_is_saved_once_as_json(tmp_path: Path):
    file = tmp_path / "said.jsonl"
    said = chatted(["what is", "/route base", "/reset", "it", f"/save {file}", f"/save {file}"], talk_of(Parrot()))
    assert f"({file}: 2 answers)" in said.replace("\n", "") and "is there already" in said
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["question"], first["answer"], first["located"]) == ("what is", "[what] [is]", "gqa")
    assert (second["route"], second["located"], second["scores"]) == ("base", None, None)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("/ro", {"/route"}),
        ("/", set(COMMANDS)),
        ("/route ", {"located", "base", "oracle:gqa", "oracle:vqa"}),
        ("/route oracle:v", {"oracle:vqa"}),
        ("what is /ro", set()),
        ("/reset ", set()),
    ],
)
def test_commands_and_what_follows_them_are_completed(typed: str, found: set[str]):
    words = terminal._Words(talk_of(Parrot()))
    assert {one.text for one in words.get_completions(Document(typed), CompleteEvent())} == found


def test_files_are_completed(tmp_path: Path):
    (tmp_path / "picture.png").touch()
    words = terminal._Words(talk_of(Parrot()))
    found = [one.text for one in words.get_completions(Document(f"/image {tmp_path}/pic"), CompleteEvent())]
    assert found == ["ture.png"]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (None, "locates no task"),
        (Verdict(None, {}), "no task is learned yet"),
        (Verdict(None, {"gqa": 9.0}), "no task fits: the base model answers; the closest is gqa, score 9.0"),
        (Verdict("gqa", {"gqa": -0.5}), "located: gqa, score -0.5"),
    ],
)
def test_every_verdict_has_its_words(verdict: Verdict | None, words: str):
    assert words in describe(verdict)
    assert terminal.GOODBYE not in describe(verdict)


def test_experts_that_nothing_used_are_not_named():
    assert in_words({0: 0.0, 4: 0.5, 7: 0.5}) == "4 50 %, 7 50 %" and in_words({0: 0.0}) == "none"
