"""An LLM as judge: off unless named, asked over the real client, and never taken at a word it did not say."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from judging import value

from llava_cmoe.evaluation.scorers import Reference, get_scorer, llm_judge
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.evaluation import EvaluationSettings, JudgeSettings
from llava_cmoe.settings.recipes import parse_recipe, parse_settings

RECIPE: dict[str, Any] = {"run": "x", "method": {"name": "zero_shot"}}
REFERENCE = Reference(answer="a dog", question="<image>\nWhat is it?", id="7")


class Endpoint(BaseHTTPRequestHandler):
    """Says yes where given and correct answer share their last word, no elsewhere; keeps what it was asked."""

    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request | {"path": self.path, "key": self.headers["Authorization"]})
        correct, given = (line.split()[-1] for line in request["messages"][-1]["content"].split("\n")[1:])
        text = "Perhaps" if given == "mumble" else "Yes." if given == correct else "no"
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[EvaluationSettings, list[dict[str, Any]]]]:
    pytest.importorskip("openai")
    asked: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Endpoint,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = JudgeSettings(model="judge-1", url=f"http://127.0.0.1:{server.server_port}/v1", seed=5)
    yield EvaluationSettings(judge=judge), asked
    server.shutdown()
    server.server_close()


def test_no_judge_is_asked_unless_a_recipe_names_one() -> None:
    with pytest.raises(RecipeError, match=r"no judge is named; set evaluation\.judge\.model"):
        get_scorer("llm_judge", EvaluationSettings())


def test_a_missing_client_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_judge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install openai"):
        get_scorer("llm_judge", EvaluationSettings(judge=JudgeSettings(model="judge-1")))


def test_the_judges_word_is_the_score_and_an_empty_answer_is_wrong_without_it(endpoint) -> None:
    settings, asked = endpoint
    judged = get_scorer("llm_judge", settings)(["it is a dog", "a cat", " ", "a cat"], [REFERENCE] * 4)
    assert judged.values == (1.0, 0.0, 0.0, 0.0)
    assert len(asked) == 2  # the same answer is not judged twice
    assert (asked[0]["path"], asked[0]["model"], asked[0]["seed"], asked[0]["temperature"]) == (
        "/v1/chat/completions", "judge-1", 5, 0,
    )  # fmt: skip
    assert asked[0]["messages"][-1]["content"] == (
        "Question: What is it?\nCorrect answer: a dog\nGiven answer: it is a dog"
    )


def test_all_that_annotators_said_is_correct_and_the_key_comes_from_the_environment(endpoint, monkeypatch) -> None:
    settings, asked = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    reference = Reference(answers=("a puppy", "a dog", "a puppy"), question="What?")
    assert get_scorer("llm_judge", settings)(["the dog"], [reference]).accuracy == 1.0
    assert "Correct answer: a puppy / a dog\n" in asked[0]["messages"][-1]["content"]
    assert asked[0]["key"] == "Bearer secret" and "secret" not in settings.model_dump_json()


SOURCES: dict[str, Callable[[dict[str, Any]], EvaluationSettings]] = {
    "the run's recipe": lambda found: (
        parse_recipe(RECIPE | {"evaluation": found}, "run.json", recorded=True).evaluation
    ),
    "the results": lambda found: parse_settings(EvaluationSettings, found, "results.json", recorded=True),
    "a copy of either": lambda found: (
        parse_recipe(RECIPE | {"evaluation": found}, "run.json", recorded=True)
        .model_copy(update={"seed": 3})
        .evaluation.model_copy(update={"limit": 5})
    ),
    "a recipe that is given": lambda found: parse_recipe(RECIPE | {"evaluation": found}, "recipe.yaml").evaluation,
    "code": EvaluationSettings.model_validate,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("secret", llm_judge.SECRETS)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_key_goes_where_the_user_says_and_never_where_only_a_run_does(
    endpoint, monkeypatch, source: str, secret: str, allowed: bool
) -> None:
    settings, asked = endpoint
    found = SOURCES[source](json.loads(settings.model_dump_json()))
    for name in (*llm_judge.SECRETS, "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert get_scorer("llm_judge", found)(["a cat"], [REFERENCE]).accuracy == 0.0  # without a key nothing can leak
    asked.clear()
    llm_judge._asker.cache_clear()
    monkeypatch.setenv(secret, "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{settings.judge.url}/" if allowed else "https://api.openai.com/v1")
    if allowed or source in ("a recipe that is given", "code"):
        get_scorer("llm_judge", found)(["a cat"], [REFERENCE])
        assert len(asked) == 1
        return
    with pytest.raises(RecipeError, match=f"names the judge at {settings.judge.url}, and {secret} is set; set OPENAI_"):
        get_scorer("llm_judge", found)
    assert not asked


def test_a_reply_that_is_neither_word_is_an_error_with_the_row(endpoint) -> None:
    settings, _ = endpoint
    with pytest.raises(ValueError, match=r"row '7': judge-1 replied 'Perhaps' where yes or no is asked"):
        get_scorer("llm_judge", settings)(["mumble"], [REFERENCE])


def test_an_endpoint_that_does_not_answer_is_an_error_with_its_address(endpoint, monkeypatch) -> None:
    settings, _ = endpoint
    gone = settings.judge.model_copy(update={"url": "http://127.0.0.1:9/v1", "timeout": 2.0})
    with pytest.raises(ValueError, match=r"row '7': judge judge-1 at http://127\.0\.0\.1:9/v1: .*evaluation\.judge"):
        get_scorer("llm_judge", EvaluationSettings(judge=gone))(["a dog"], [REFERENCE])


def test_it_is_judged_in_protocol_strict_alone() -> None:
    with pytest.raises(RecipeError, match="'llm_judge' in protocol coin"):
        value("llm_judge", "a dog", REFERENCE, "coin")
