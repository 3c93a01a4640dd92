"""The process: it ends when told, finishes what is begun, and survives what clients do to it."""

import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from commands import type_in
from serving import PATH, SMALL, Held, message, mixture, serving, until

from llava_cmoe.serve.gate import Guard
from llava_cmoe.serve.server import Server, listen
from llava_cmoe.settings.base import RecipeError

CLIENTS, REQUESTS = 32, 5


BODY: dict[str, Any] = {"model": "run:base", "messages": message("Which?"), "max_tokens": 256}


def stop_while_it_streams(address: str, stop: Callable[[], object]) -> openai.OpenAI:
    """Begin a long answer, let the server be stopped, and read the answer to its end."""
    client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
    chunks = client.chat.completions.create(**BODY, stream=True)
    first = next(iter(chunks))
    stop()
    rest = list(chunks)
    assert first.choices[0].delta.role == "assistant"
    assert rest[-1].choices[0].finish_reason in ("stop", "length") and rest[-1].llava_cmoe
    return client


def test_a_process_logs_what_obeys_nothing_and_ends_at_sigterm_with_its_answers(lesson):
    command = [sys.executable, "-m", "llava_cmoe.cli", "serve", str(lesson.recipe.run), "--port", "0"]
    environment = {**os.environ, "LLAVA_CMOE_API_KEY": "secret", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("at http")), "")
        assert line, process.wait()
        address = line.split()[1].removesuffix(";")
        root, key = address.removesuffix("/v1"), {"authorization": "Bearer secret"}
        httpx2.get(f"{root}/%1b[2J[bold]", headers=key)
        httpx2.get(f"{root}/health", headers={"authorization": b"Bearer \x9b[2J"})
        with closing(socket.create_connection(("127.0.0.1", httpx2.URL(address).port))) as raw:
            raw.sendall(b"\x1b[2J\r\n\r\n")
            assert b"400" in raw.recv(4096)
        client = stop_while_it_streams(address, process.terminate)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and said.rstrip().endswith("goodbye") and "Traceback" not in said
    assert "\x1b" not in said and "\x9b" not in said and "[2J[bold]': 404" in said and "'/health': 401" in said
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_ctrl_c_ends_the_command_with_status_0(lesson):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def watch() -> None:
        until(lambda: reachable(port))
        stop_while_it_streams(f"http://127.0.0.1:{port}/v1", lambda: os.kill(os.getpid(), signal.SIGINT))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        result = type_in("serve", lesson.recipe.run, "--port", port, "--api-key", "secret")
        watching.result()
    assert result.exit_code == 0 and "run:sides, run:base" in result.output and "goodbye" in result.output


def reachable(port: int) -> bool:
    with closing(socket.socket()) as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


def test_the_second_call_to_stop_refuses_what_was_taken(learned, lesson):
    bodies = [{**BODY, "max_tokens": 12, "stream": stream} for stream in (True, False, False)]
    with serving(learned, replace(SMALL, batch=1, seconds=600), held=True) as running:
        engine = running.engine
        assert isinstance(engine, Held)
        engine.opened.clear()
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(running.post, body) for body in bodies]
            until(lambda: running.health()["waiting"] == 2)
            running.server.stop()
            running.server.stop()
            assert [one.result().status_code for one in asked] == [503] * 3
            assert asked[0].result().json()["error"]["code"] == "closing"
        assert [len(batch) for batch in engine.batches] == [1]


def test_answers_leave_room_for_prompts(learned, lesson):
    with (
        listen("127.0.0.1", 0) as listening,
        pytest.raises(RecipeError, match="512 positions; set --max-answer-tokens"),
    ):
        Server({"run": learned}, listening, Guard(), replace(SMALL, answer_tokens=512))


def malformed(port: int, draw: random.Random) -> None:
    """One of many ways to be no good client."""
    body = draw.randbytes(draw.randrange(300))
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    sent = draw.choice(
        [
            body,
            head.encode() + b"-1\r\n\r\n",
            f"{head}{len(body)}\r\n\r\n".encode() + body,
            f"{head}9999\r\n\r\n".encode() + body,
            f"{head}99999999999\r\n\r\n".encode() + body,
            b"GET " + b"a" * draw.randrange(100_000) + b" HTTP/1.1\r\n\r\n",
        ]
    )
    with closing(socket.create_connection(("127.0.0.1", port), timeout=60)) as raw:
        try:
            raw.sendall(sent)
            if draw.random() < 0.5:
                raw.shutdown(socket.SHUT_WR)
                raw.recv(4096)
        except OSError:
            return


def test_under_load_every_answer_is_that_asked_alone_and_nothing_crashes(learned, lesson):
    bodies, wrong = mixture(lesson), list[tuple[object, ...]]()
    with serving(learned, replace(SMALL, batch=8, queue=16)) as running, running.client() as client:
        alone = [running.post(body).json()["choices"] for body in bodies]

        def ask(place: int, kind: str) -> str:
            wanted = alone[place][0]
            try:
                if kind == "whole":
                    got = client.chat.completions.create(**bodies[place]).choices[0]
                    pair = (got.message.content, got.finish_reason)
                else:
                    stream = client.chat.completions.create(**bodies[place], stream=True)
                    chunks = [chunk.choices[0] for chunk in stream]
                    pair = ("".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason)
            except openai.RateLimitError as full:
                assert full.response.headers["retry-after"]
                return "full"
            if pair != (wanted["message"]["content"], wanted["finish_reason"]):
                wrong.append((bodies[place]["model"], pair, wanted))
            return kind

        def act(number: int) -> list[str]:
            draw, done = random.Random(number), list[str]()
            for _ in range(REQUESTS):
                kind = draw.choice(["whole", "streamed", "streamed", "malformed"])
                if kind == "malformed":
                    malformed(running.port, draw)
                done.append(kind if kind == "malformed" else ask(draw.randrange(len(bodies)), kind))
            return done

        with ThreadPoolExecutor(CLIENTS) as pool:
            counted = Counter(kind for done in pool.map(act, range(CLIENTS)) for kind in done)
        assert wrong == [] and counted.total() == CLIENTS * REQUESTS
        assert counted["whole"] and counted["streamed"] and counted["malformed"]
        assert [running.post(body).json()["choices"] for body in bodies] == alone
        until(lambda: running.health() == {"status": "ok", "answering": 0, "waiting": 0, "free": 24})
