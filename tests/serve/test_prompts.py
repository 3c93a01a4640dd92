"""What a model reads is what the evaluation gives it; everything else is refused before the model sees it."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from serving import SMALL, asked, data_url, message

from llava_cmoe.serve.limits import Limits, Refused
from llava_cmoe.serve.models import offered_models
from llava_cmoe.serve.prompts import Prompt, PromptReader

PICTURE = data_url(Image.new("RGB", (20, 24), "red"))


def prepare(learned, messages: list[dict[str, Any]], model: str = "run", limits: Limits = SMALL) -> Prompt:
    body = json.dumps({"model": model, "messages": messages}).encode()
    return PromptReader(offered_models({"run": learned}), limits).prepare(body).prompt


def refusal(learned, messages: list[dict[str, Any]], **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        prepare(learned, messages, **options)
    return caught.value


@pytest.mark.parametrize(("task", "index"), [("colours", 0), ("colours", 3), ("sides", 1)])
def test_a_request_is_read_as_the_evaluation_reads_the_row(task: str, index: int, learned, lesson):
    [encoded] = prepare(learned, asked(lesson, task, index)).ways.values()
    wanted = lesson.questions[task].prompts[index]
    assert encoded.keys() == wanted.keys()
    assert all(torch.equal(encoded[name], wanted[name]) for name in wanted)


def test_models_name_their_task(learned):
    tasks = {model: prepare(learned, message("Which?"), model).task for model in offered_models({"run": learned})}
    assert tasks == {"run": None, "run:colours": 0, "run:sides": 1, "run:base": -1}
    missing = refusal(learned, message("Which?"), model="run:\x1bother")
    assert (missing.status, missing.param, missing.code) == (404, "model", "model_not_found")
    assert "\x1b" not in missing.message and "run:sides" in missing.message


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:1/a.png", "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "picture.png"),
        *("", "data:", "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,@@@@", "data:;base64,a"),
        *("data:image/png;charset=x;base64,aaaa", "data:image/png;base64,\u00e9", "javascript:1"),
    ],
)
def test_only_data_urls_are_taken(url: str, learned, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("something was opened"))
    refused = refusal(learned, message("Which?", url))
    assert (refused.status, refused.code) == (400, "invalid_image_url")
    assert refused.param == "messages.0.content.1.image_url.url"


@pytest.mark.parametrize("cut", [0, 1, 30, 60])
def test_a_broken_picture_is_named(cut: int, learned):
    whole = base64.b64decode(PICTURE.partition(",")[2])
    refused = refusal(learned, message("Which?", data_url(whole[:cut])))
    assert (refused.status, refused.code) == (400, "invalid_image")
    assert "image" in refused.message and "/" not in refused.message


@pytest.mark.parametrize("size", [(101, 100), (1000, 1)])
def test_a_picture_of_too_many_pixels_is_not_decoded(size: tuple[int, int], learned, monkeypatch):
    url = data_url(Image.new("RGB", size))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_: pytest.fail("decoded"))
    refused = refusal(learned, message("Which?", url))
    assert (refused.status, refused.code) == (413, "image_too_large")


USER, ASSISTANT = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([ASSISTANT], "messages.0.role"),
        ([USER, USER], "messages.1.role"),
        ([USER, ASSISTANT], "messages"),
        ([{"role": "user", "content": " \n"}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([USER, {"role": "assistant", "content": ""}, USER], "messages.1.content"),
        (message("Is it <image>?"), "messages.0.content"),
        (message("Is it </s>?"), "messages"),
        ([USER, ASSISTANT, *message("And this?", PICTURE)], "messages.2.content.1.image_url.url"),
        ([{"role": "user", "content": 2 * message("a", PICTURE)[0]["content"]}], "messages.0.content.3.image_url.url"),
        (message("word " * 200), "messages"),
        (message("w" * 9999), "messages"),
    ],
)
def test_a_conversation_that_was_never_taught_is_refused(messages: list[dict[str, Any]], param: str, learned):
    refused = refusal(learned, messages)
    assert (refused.status, refused.param) == (400, param)


def test_a_prompt_may_be_as_long_as_the_limit(learned):
    length = len(next(iter(prepare(learned, message("Which colour?")).ways.values()))["input_ids"])
    assert prepare(learned, message("Which colour?"), limits=replace(SMALL, prompt_tokens=length))
    refused = refusal(learned, message("Which colour?"), limits=replace(SMALL, prompt_tokens=length - 1))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")


def test_a_conversation_goes_on(learned):
    [first], [both] = (
        [way["input_ids"].tolist() for way in prepare(learned, messages).ways.values()]
        for messages in ([USER], [USER, ASSISTANT, USER])
    )
    assert both[: len(first)] == first and len(both) > 2 * len(first) - 3


def test_pictures_are_squared_as_the_task_does_or_both_ways(learned):
    two = replace(learned, geometries=("pad", "crop"))
    picture = message("Which?", PICTURE)
    ways = {model: tuple(prepare(two, picture, model).ways) for model in offered_models({"run": two})}
    assert ways == {"run": ("pad", "crop"), "run:colours": ("pad",), "run:sides": ("crop",), "run:base": ("pad",)}
    assert len(prepare(two, message("Which?")).ways) == 1


def test_no_file_of_this_machine_is_named(learned, tmp_path: Path):
    picture = tmp_path / "secret.png"
    Image.new("RGB", (20, 20)).save(picture)
    assert refusal(learned, message("Which?", str(picture))).status == 400
    assert refusal(learned, message("Which?", picture.as_uri())).status == 400
