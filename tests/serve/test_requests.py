"""Every field is honoured or refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cmoe.serve.limits import Refused
from llava_cmoe.serve.requests import NEUTRAL, ChatRequest, read_request

ASKED: dict[str, Any] = {"model": "run", "messages": [{"role": "user", "content": "Which?"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


def read(**fields: Any) -> ChatRequest:
    return read_request(json.dumps(ASKED | fields).encode())


def refusal(**fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        read(**fields)
    return caught.value


CHANGING: dict[str, Any] = {
    **{"n": 2, "temperature": 0.7, "top_p": 0.9, "frequency_penalty": 1, "presence_penalty": -1, "logprobs": True},
    **{"top_logprobs": 3, "logit_bias": {"5": 1}, "stop": "\n", "tools": [{"type": "function"}], "tool_choice": "auto"},
    **{"functions": [{}], "function_call": "auto", "response_format": {"type": "json_object"}, "store": True},
    **{"modalities": ["text", "audio"], "audio": {}, "prediction": {}, "reasoning_effort": "low", "verbosity": "low"},
    **{"web_search_options": {}, "metadata": {}, "user": "me", "safety_identifier": "me", "prompt_cache_key": "me"},
    **{"service_tier": "priority", "parallel_tool_calls": 1},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_that_is_not_honoured_is_refused_by_name_unless_it_changes_nothing(name: str):
    refused = refusal(**{name: CHANGING[name]})
    assert (refused.status, refused.param) == (400, name) and name in refused.message
    for value in (None, *NEUTRAL[name]):
        assert read(**{name: value}).model == "run"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"\x1b[2J" * 9999: 1}, None),
        ({"n": True}, "n"),
        ({"temperature": False}, "temperature"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, "messages.0.name"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stream": 1}, "stream"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str | None):
    refused = refusal(**fields)
    assert refused.status == 400 and len(refused.message) < 300
    assert param is None or refused.param == param


def test_the_longest_answer_is_given_under_either_name():
    assert read().answer_tokens(7) == 7
    assert read(max_tokens=3).answer_tokens(7) == read(max_completion_tokens=3).answer_tokens(7) == 3
    for fields, param in (
        ({"max_tokens": 8}, "max_tokens"),
        ({"max_completion_tokens": 8}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ):
        with pytest.raises(Refused) as caught:
            read(**fields).answer_tokens(7)
        assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 99_999,
        b'{"model": "a", "model": "b"}',
        b'{"n": NaN}',
        b'{"a": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes):
    with pytest.raises(Refused) as caught:
        read_request(body)
    assert caught.value.status == 400


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from([*NEUTRAL, *ChatRequest.model_fields, "other"]), JSON, max_size=4))
def test_whatever_is_sent_is_read_or_refused(fields: dict[str, Any]):
    try:
        read(**fields)
    except Refused as refused:
        json.dumps(refused.body)
        assert refused.status == 400
