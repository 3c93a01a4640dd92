"""The command that serves a run to programs: options are its limits."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
from typing import Annotated

import typer

from llava_cmoe.cli.console import Console, say, user_errors
from llava_cmoe.cli.numbers import decimal, whole
from llava_cmoe.cli.runs import RunFolder
from llava_cmoe.settings.base import RecipeError

app = typer.Typer()

NEEDED = ("fastapi", "uvicorn", "sse_starlette")
"""Packages of the extra `serve`."""


@app.command()
@user_errors()
def serve(
    run: RunFolder,
    host: Annotated[str, typer.Option(help="Address to listen at; by default only this machine can ask.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, whole("--port", "Port to listen at; 0 for any free one.", least=0, most=65_535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LLAVA_CMOE_API_KEY",
            show_envvar=True,
            help="Key that every request has to send. Other users of the machine see options, not the environment.",
        ),
    ] = None,
    after: Annotated[
        int | None, whole("--after", "The model as it was after its first N stages; as it is now if absent.", least=0)
    ] = None,
    merge: Annotated[int | None, whole("--merge", "With the experts that merge N of the run leaves.", least=1)] = None,
    max_batch: Annotated[int, whole("--max-batch", "Requests answered together, at most.", least=1, most=1024)] = 8,
    max_queue: Annotated[int, whole("--max-queue", "Requests that may wait; more get 429.", least=0, most=10_000)] = 64,
    time_limit: Annotated[
        float, decimal("--time-limit", "Seconds that a request may take, waiting included.", least=1, most=86_400)
    ] = 120,
    max_body: Annotated[int, whole("--max-body", "Bytes of a request, pictures included.", least=1000)] = 20_000_000,
    max_pixels: Annotated[
        int, whole("--max-pixels", "Pixels of the square around a picture.", least=1, most=80_000_000)
    ] = 40_000_000,
    max_prompt_tokens: Annotated[
        int,
        whole("--max-prompt-tokens", "Tokens of a prompt, its picture's included; less where the model knows less.", 1),
    ] = 4096,
    max_answer_tokens: Annotated[
        int, whole("--max-answer-tokens", "Tokens of an answer; also where a request names no number.", least=1)
    ] = 256,
) -> None:
    """Answer programs that speak OpenAI's API: chat completions with pictures, streamed or not.

    Models are RUN (which locates the task of each prompt), RUN:TASK and RUN:base. Ctrl-C finishes what is begun.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"serve: {', '.join(missing)} is missing; pip install 'llava-cmoe[serve]'")
    if api_key is not None and not api_key.strip():
        raise RecipeError("serve: the key is empty; give one, or none")
    from llava_cmoe.chat.opening import open_learned
    from llava_cmoe.serve.gate import LOCAL, Guard
    from llava_cmoe.serve.limits import Limits
    from llava_cmoe.serve.server import Server, listen

    console, is_local, name = Console(), _is_local(host), f"[{host}]" if ":" in host else host
    if not is_local and api_key is None:
        say(console, "warning:", f"anybody who reaches {host} can ask; set LLAVA_CMOE_API_KEY", "bold yellow")
    with listen(host, port) as listening:
        learned = open_learned(run, after, merge)
        limits = Limits(
            batch=max_batch,
            queue=max_queue,
            seconds=time_limit,
            body_bytes=max_body,
            pixels=max_pixels,
            prompt_tokens=max_prompt_tokens,
            answer_tokens=max_answer_tokens,
        )
        names = LOCAL | {name.lower()} if is_local and api_key is None else None
        server = Server(run, learned, listening, Guard(api_key, names), limits)
        logging.getLogger("llava_cmoe.serve").setLevel(logging.INFO)
        for handler in logging.getLogger("llava_cmoe").handlers:  # uvicorn's words take the same way to the terminal
            logging.getLogger("uvicorn").addHandler(handler)
        logging.getLogger("uvicorn").propagate = False
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        words = f"Serving models: {', '.join(server.models)}\nat http://{name}:{listening.getsockname()[1]}/v1"
        server.run(lambda: console.print(f"{words}; Ctrl-C ends it", highlight=False, soft_wrap=True))
    console.print("What was begun is answered; goodbye", highlight=False)


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
