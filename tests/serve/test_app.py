"""What clients see: OpenAI's own client and curl against a server on a tiny run."""

import json
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import tiny
from PIL import Image
from serving import PATH, SMALL, Held, Running, asked, data_url, message, mixture, serving, until

from llava_cmoe.chat.opening import open_learned
from llava_cmoe.cli.serving import serve
from llava_cmoe.sequence import learn
from llava_cmoe.serve.engine import Answered, Engine
from llava_cmoe.serve.limits import Limits
from llava_cmoe.serve.replies import verdict
from llava_cmoe.serve.server import SPARE_CONNECTIONS

CURL = shutil.which("curl")
QUESTION = {"model": "run", "messages": message("Which colour is it?")}
SLOW = {**QUESTION, "model": "run:base", "max_tokens": 12}


def whole(client: openai.OpenAI, body: dict[str, Any]) -> str:
    """An answer in one piece."""
    return client.chat.completions.create(**body).choices[0].message.content or ""


def streamed(client: openai.OpenAI, body: dict[str, Any]) -> str:
    """An answer put together from a stream."""
    chunks = client.chat.completions.create(**body, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_whole_answer_has_what_openai_has_and_the_verdict(running: Running, lesson):
    answer = running.client().chat.completions.create(**mixture(lesson)[0])
    assert answer.object == "chat.completion" and answer.model == "run" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    counted = answer.usage
    assert counted.total_tokens == counted.prompt_tokens + counted.completion_tokens
    assert counted.prompt_tokens == len(lesson.questions["colours"].prompts[0]["input_ids"])
    assert 1 <= counted.completion_tokens <= 12
    verdict = answer.llava_cmoe
    assert verdict["located"] and set(verdict["scores"]) == {"colours", "sides"}
    assert list(verdict["scores"].values()) == sorted(verdict["scores"].values())
    assert verdict["task"] in (None, next(iter(verdict["scores"])))


@pytest.mark.parametrize(("model", "task"), [("run:sides", "sides"), ("run:colours", "colours"), ("run:base", None)])
def test_a_named_task_answers_unlocated(model: str, task: str | None, running: Running, lesson):
    answer = running.client().chat.completions.create(**{**mixture(lesson)[0], "model": model})
    assert answer.llava_cmoe == {"task": task, "located": False, "scores": None} and answer.model == model


def test_a_stream_is_the_same_answer(running: Running, lesson):
    for body in mixture(lesson)[:3]:
        assert streamed(running.client(), body) == whole(running.client(), body) != ""


@pytest.mark.parametrize("with_usage", [True, False])
def test_the_lines_of_a_stream(with_usage: bool, running: Running, lesson):
    body = {**mixture(lesson)[0], "stream": True, "stream_options": {"include_usage": with_usage}}
    whole = running.post({**body, "stream": False, "stream_options": None}).json()
    answer = running.post(body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    last = chunks[-2] if with_usage else chunks[-1]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]] == [
        *[None] * (len(chunks) - 1 - with_usage),
        whole["choices"][0]["finish_reason"],
    ]
    assert last["llava_cmoe"] == chunks[-1]["llava_cmoe"] == whole["llava_cmoe"]
    if with_usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        assert {chunk["usage"] for chunk in chunks[:-1]} == {None}
    else:
        assert not any("usage" in chunk for chunk in chunks)


def test_models_and_health(running: Running):
    client = running.client()
    names = ["run", "run:colours", "run:sides", "run:base"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("run:base").id == "run:base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("run:other")
    assert running.health() == {"status": "ok", "answering": 0, "waiting": 0, "free": 12}


def test_requests_that_wait_together_are_one_batch_and_several_streams_run_at_once(learned, lesson):
    with serving(learned, replace(SMALL, batch=8), held=True) as running:
        engine, client, bodies = running.engine, running.client(), mixture(lesson)
        assert isinstance(engine, Held)
        alone = [whole(client, body) for body in bodies]
        engine.began.clear()
        engine.opened.clear()
        with ThreadPoolExecutor(1 + len(bodies)) as pool:
            first = pool.submit(whole, client, bodies[0])
            assert engine.began.wait(60)
            ways = (streamed, streamed, whole, whole, streamed, streamed)
            mixed = [pool.submit(way, client, body) for way, body in zip(ways, bodies, strict=True)]
            until(lambda: running.health()["waiting"] == 6)
            engine.opened.set()
            assert first.result() == alone[0] and [one.result() for one in mixed] == alone
        assert [len(batch) for batch in engine.batches] == [1] * 7 + [6]
        assert {ask.prompt.task for ask in engine.batches[7]} == {None, 0, 1, -1}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"\x00\xff" * 500, 400, None),
        ({}, 400, "model"),
        ({**QUESTION, "n": 2}, 400, "n"),
        ({**QUESTION, "temperature": 1}, 400, "temperature"),
        ({**QUESTION, "max_tokens": 13}, 400, "max_tokens"),
        ({**QUESTION, "model": "gpt"}, 404, "model"),
        ({**QUESTION, "stream": True, "stop": ["\n"]}, 400, "stop"),
        (
            {"model": "run", "messages": message("a", "https://example.org/a.png")},
            400,
            "messages.0.content.1.image_url.url",
        ),
        ({"model": "run", "messages": message("a", data_url(b"GIF89a"))}, 400, "messages.0.content.1.image_url.url"),
        (
            {"model": "run", "messages": message("a", data_url(Image.new("RGB", (101, 9))))},
            *(413, "messages.0.content.1.image_url.url"),
        ),
        ({"model": "run", "messages": message("a " * 300)}, 400, "messages"),
        (b'{"model": "' + b"a" * 200_000 + b'"}', 413, None),
    ],
)
def test_what_cannot_be_answered_has_its_code_and_openais_error(body: Any, status: int, param: str | None, running):
    answer = running.post(body)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert running.health()["status"] == "ok"


def test_openais_client_raises_its_own_errors(running: Running):
    client = running.client()
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(**QUESTION, temperature=1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(**QUESTION, response_format={"type": "json_object"}, stream=True)
    with pytest.raises(openai.NotFoundError, match="run:sides"):
        client.chat.completions.create(**{**QUESTION, "model": "gpt-4o"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", PATH, 405), ("POST", "/health", 405), ("GET", "/docs", 404), ("GET", "/", 404)],
)
def test_other_routes_have_an_error_too(method: str, path: str, status: int, running: Running):
    answer = httpx2.request(method, running.address + path)
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


HOSTS = {"evil.example": 403, "127.0.0.1.evil.example:80": 403, "": 403, "LOCALHOST:1": 200, "[::1]": 200}


def test_a_web_page_reaches_nothing(running: Running):
    """It may send a form to any address, or give its own name this machine's address."""
    assert running.post(json.dumps(QUESTION).encode(), **{"content-type": "text/plain"}).status_code == 415
    for host, status in HOSTS.items():
        assert httpx2.get(f"{running.address}/health", headers={"host": host}).status_code == status


def test_one_key_guards_every_route(learned, lesson):
    with serving(learned, key="s\u00e9cret") as running:
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", PATH), ("GET", "/other")):
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s\u00e9cret".encode()}):
                answer = httpx2.request(method, running.address + path, headers=given)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"authorization": "Bearer s\u00e9cret".encode(), "host": "anywhere.example"}
        assert httpx2.get(f"{running.address}/health", headers=right).status_code == 200
    with serving(learned, key="secret") as running:
        assert running.client().chat.completions.create(**QUESTION).choices
        with pytest.raises(openai.AuthenticationError):
            running.client().with_options(api_key="other").models.list()


def test_a_full_queue_answers_429_and_is_open_again_afterwards(held: Running):
    engine = held.engine
    assert isinstance(engine, Held)
    engine.opened.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(held.post, QUESTION) for _ in range(2)]
        until(lambda: (held.health()["answering"], held.health()["waiting"]) == (1, 1))
        full = held.post(QUESTION)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error" and full.json()["error"]["code"] == "queue_full"
        engine.opened.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
    assert held.post(QUESTION).status_code == 200


def test_more_connections_than_can_be_served_get_503(held: Running):
    with ExitStack() as stack:
        for _ in range(SPARE_CONNECTIONS + 2):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", held.port))))
        assert httpx2.get(f"{held.address}/health").status_code == 503
    until(lambda: httpx2.get(f"{held.address}/health").status_code == 200)


def test_a_score_without_an_end_is_null():
    answer = Answered("A", "stop", 1, 1, None, True, {"colours": 1.5, "sides": float("inf")})
    assert verdict(answer) == {"task": None, "located": True, "scores": {"colours": 1.5, "sides": None}}


def test_a_run_that_locates_nothing_is_one_model(tiny_data, tiny_backbone, tmp_path):
    words = ("data.train_rows=4", "data.eval_rows=2", "evaluation.routes=[oracle]")
    learn(tiny.recipe(tmp_path / "run", tiny_data, tiny_backbone, "sequential_lora", *words))
    with serving(open_learned(tmp_path / "run")) as running:
        assert [model.id for model in running.client().models.list()] == ["run"]
        assert running.post({**QUESTION, "model": "run:sides"}).status_code == 404
        assert running.post(QUESTION).json()["llava_cmoe"] == {"task": None, "located": False, "scores": None}


def hang_up(running: Running, body: bytes, length: int | None = None, read: bool = False) -> None:
    """Send a request, maybe only a part of it; read the beginning of the answer if wanted, and go."""
    with closing(socket.create_connection(("127.0.0.1", running.port))) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
        if read:
            assert b"200 OK" in connection.recv(4096)
        else:
            time.sleep(0.2)


def test_who_hangs_up_frees_a_place(held: Running):
    engine, body = held.engine, json.dumps(SLOW).encode()
    assert isinstance(engine, Held)
    hang_up(held, body[:20], length=1000)  # a body that is cut off
    engine.opened.clear()
    for _ in range(3):  # while the model works on it, then while it waits, more often than there are places
        hang_up(held, body)
    engine.opened.set()
    until(lambda: held.health()["free"] == 2)
    assert all(ask.left for batch in engine.batches for ask in batch)
    hang_up(held, json.dumps({**SLOW, "stream": True}).encode(), read=True)
    until(lambda: held.health()["free"] == 2)
    assert engine.batches[-1][0].left and held.post(QUESTION).status_code == 200


def test_what_takes_too_long_is_ended(learned, lesson):
    with serving(learned, replace(SMALL, seconds=0.5), held=True) as running:
        engine = running.engine
        assert isinstance(engine, Held)
        engine.opened.clear()
        late = running.post(QUESTION)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        with closing(socket.create_connection(("127.0.0.1", running.port), timeout=60)) as slow:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            assert b" 408 " in slow.recv(4096)


def test_a_failing_model_fails_its_requests_alone(running: Running, monkeypatch, caplog):
    def fail(self: Engine, asks: object) -> None:
        raise RuntimeError("out of \x1b[2J memory\nat once")

    right = running.post(QUESTION).json()["choices"]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_answer_together", fail)
        for streamed in (True, False):
            failed = running.post({**QUESTION, "stream": streamed})
            assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
            assert "memory" not in failed.text
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2 and "\n" not in said[0] and "RuntimeError" in said[0]
    assert running.post(QUESTION).json()["choices"] == right


def test_a_failing_reader_fails_its_request_alone(running: Running, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr("llava_cmoe.serve.prompts.question", lambda *_: 1 / 0)
        failed = running.post(QUESTION)
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "server_failed"
    assert "a request failed: ZeroDivisionError: division by zero" in caplog.messages
    assert running.post(QUESTION).status_code == 200


@pytest.mark.skipif(CURL is None, reason="needs curl")
def test_curl_gets_the_same_answer(running: Running, lesson, tmp_path):
    body = {**mixture(lesson)[0], "stream": True}
    file = tmp_path / "body.json"
    file.write_text(json.dumps(body))
    command = [str(CURL), "-sSN", running.address + PATH, "-H", "Content-Type: application/json", "-d", f"@{file}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.endswith("data: [DONE]\n\n")
    pieces = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    whole = running.post({**body, "stream": False}).json()["choices"][0]["message"]["content"]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == whole
    file.write_bytes(b" " * 300_000)
    command += ["-o", "/dev/null", "-w", "%{http_code}"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "413"


def test_rows_of_the_evaluation_can_be_asked(running: Running, lesson):
    for index in range(3):
        body = {"model": "run:colours", "messages": asked(lesson, "colours", index), "max_tokens": 3}
        assert running.post(body).status_code == 200


@pytest.mark.skipif(CURL is None, reason="needs curl")
def test_the_examples_of_the_page_work(running: Running, lesson, tmp_path, monkeypatch, capsys):
    page = Path(__file__).parents[2] / "docs/serving.md"
    written = page.read_text(encoding="utf-8").replace("http://127.0.0.1:8000", running.address)
    written = written.replace('"pocket_cmoe"', '"run"')
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", written, re.MULTILINE | re.DOTALL)
    by_openai, by_curl = (block for language, block in fences if not language)
    Image.new("RGB", (20, 24), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(by_openai, str(page), "exec"), {})
    assert capsys.readouterr().out.split()[-1] in ("colours", "sides", "None")
    said = subprocess.run(["sh", "-c", by_curl], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.endswith("data: [DONE]\n\n")


def test_the_page_has_the_defaults_of_the_command():
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `--([a-z-]+)` \| [^|]+ \| ([\d,]+) \|$", page, re.MULTILINE))
    stated = {name.replace("-", "_"): float(value.replace(",", "")) for name, value in table.items()}
    own = {name: one.default for name, one in signature(serve).parameters.items() if name in stated}
    assert stated == own and len(own) == 7
    assert list(own.values()) == [getattr(Limits(), field.name) for field in fields(Limits)]
