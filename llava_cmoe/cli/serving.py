"""The commands that serve a run: to programs, and to people on a page. Options are a server's limits."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_cmoe.cli.console import Console, say, user_errors
from llava_cmoe.cli.numbers import decimal, whole
from llava_cmoe.cli.runs import RunFolder
from llava_cmoe.settings.base import RecipeError

if TYPE_CHECKING:
    from llava_cmoe.chat.opening import Snapshot
    from llava_cmoe.serve.limits import Limits

app = typer.Typer()

NEEDED = ("fastapi", "uvicorn", "sse_starlette")
"""Packages of the extra `serve`."""

Host = Annotated[str, typer.Option(help="Address to listen at; by default only this machine can ask.")]
Port = Annotated[int, whole("--port", "Port to listen at; 0 for any free one.", least=0, most=65_535)]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="LLAVA_CMOE_API_KEY",
        show_envvar=True,
        help="Key that every request has to send. Other users of the machine see options, not the environment.",
    ),
]


@app.command()
@user_errors()
def serve(
    run: RunFolder,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
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

    Example: llava-cmoe serve runs/pocket_cmoe
    """
    _check_needs("serve", api_key)
    from llava_cmoe.chat.opening import Snapshot
    from llava_cmoe.serve.limits import Limits

    limits = Limits(
        batch=max_batch,
        queue=max_queue,
        seconds=time_limit,
        body_bytes=max_body,
        pixels=max_pixels,
        prompt_tokens=max_prompt_tokens,
        answer_tokens=max_answer_tokens,
    )
    _serve({run.resolve().name: Snapshot(run, after, merge)}, host, port, api_key, limits)


@app.command()
@user_errors()
def web(
    run: RunFolder,
    compare: Annotated[
        Path | None,
        typer.Option(help="Run of the same tasks to ask beside it, such as sequential LoRA's.", metavar="RUN2"),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
) -> None:
    """Serve a page on which a run is asked about pictures: who answers, why, and what is forgotten.

    The same question is answered by the model after its first task, after its last one, and by RUN2. All share one
    backbone. The page is served beside the API of `serve`, with its limits. Ctrl-C finishes what is begun.

    Example: llava-cmoe web runs/pocket_cmoe --compare runs/pocket_sequential_lora
    """
    _check_needs("web", api_key)
    from llava_cmoe.chat.opening import Snapshot
    from llava_cmoe.registry.store import Registry
    from llava_cmoe.serve.limits import Limits

    name = run.resolve().name
    snapshots = {name: Snapshot(run)}
    if len(Registry(run).records()) > 1:
        snapshots[f"{name}@1"] = Snapshot(run, after=1)
    if compare is not None:
        other = compare.resolve().name
        if other in snapshots:
            raise RecipeError(f"--compare {compare}: two models would be called {other}; give one folder another name")
        snapshots[other] = Snapshot(compare)
    _serve(snapshots, host, port, api_key, Limits(), with_page=True)


def _check_needs(command: str, api_key: str | None) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"{command}: {', '.join(missing)} is missing; pip install 'llava-cmoe[serve]'")
    if api_key is not None and not api_key.strip():
        raise RecipeError(f"{command}: the key is empty; give one, or none")


def _serve(
    snapshots: Mapping[str, Snapshot],
    host: str,
    port: int,
    api_key: str | None,
    limits: Limits,
    with_page: bool = False,
) -> None:
    """Load what is asked, by the names that it has for clients, and answer until told to stop."""
    from llava_cmoe.chat.opening import open_together
    from llava_cmoe.serve.gate import LOCAL, Guard
    from llava_cmoe.serve.server import Server, listen

    console, is_local, name = Console(), _is_local(host), f"[{host}]" if ":" in host else host
    if not is_local and api_key is None:
        say(console, "warning:", f"anybody who reaches {host} can ask; set LLAVA_CMOE_API_KEY", "bold yellow")
    with listen(host, port) as listening:
        runs = dict(zip(snapshots, open_together(list(snapshots.values())), strict=True))
        names = LOCAL | {name.lower()} if is_local and api_key is None else None
        server = Server(runs, listening, Guard(api_key, names), limits, with_page)
        logging.getLogger("llava_cmoe.serve").setLevel(logging.INFO)
        for handler in logging.getLogger("llava_cmoe").handlers:  # uvicorn's words take the same way to the terminal
            logging.getLogger("uvicorn").addHandler(handler)
        logging.getLogger("uvicorn").propagate = False
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        address = f"http://{name}:{listening.getsockname()[1]}"
        words = f"Serving models: {', '.join(server.models)}\nat {address}/v1"
        page = f"The page: {address}/\n" if with_page else ""
        server.run(lambda: console.print(f"{page}{words}; Ctrl-C ends it", highlight=False, soft_wrap=True))
    console.print("What was begun is answered; goodbye", highlight=False)


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
