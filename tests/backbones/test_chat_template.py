"""A chat template that loses anything, or fails, is refused before the weights are read, in one line that names it."""

import json
import shutil
import time
from pathlib import Path

import families
import pytest
import tiny
from commands import refused

from llava_cmoe.backbones.loading import BackboneError, load_processor
from llava_cmoe.backbones.trial import ends

PART = "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
TURNS = "{% for m in messages %}{{ m['role'] }}: " + PART + "{{ eos_token }}{% endfor %}"
SOUND = TURNS + "{{ 'assistant: ' if add_generation_prompt }}"
FAILING = {
    "no end of a loop": "{% for m in messages %}{{ m['role'] }}",
    "a tag that is none": "{% frobnicate %}",
    "an open expression": "{{ messages",
    "an undefined function": "{{ frobnicate(messages) }}",
    "an undefined filter": "{{ messages | frobnicate }}",
    "an attribute of nothing": "{{ nothing.at.all }}",
    "it raises": "{{ raise_exception('only for\nadults') }}",
    "a division": "{{ 1 / 0 }}",
    "another type": "{{ 'a' + 1 }}",
    "no such index": "{{ messages[99].role.x }}",
    "a forbidden attribute": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "no end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a huge range": "{% for i in range(10 ** 12) %}{{ i }}{% endfor %}",
}
LOSING = {
    "nothing": " ",
    "a constant": "USER: hello ASSISTANT:",
    "no question": SOUND.replace(PART, "{{ 'x' if m['role'] == 'user' else m['content'][0]['text'] }}"),
    "other letters": SOUND.replace("p['text']", "p['text'] | upper"),
    "no answer": "{% for m in messages if m['role'] == 'user' %}user: " + PART + "{% endfor %}",
    "no generation prompt": TURNS,
    "no picture": SOUND.replace("'<image>' if p['type'] == 'image' else p['text']", "p['text']"),
    "two places for a picture": SOUND.replace("'<image>'", "'<image><image>'"),
    "the last turn alone": SOUND.replace("in messages", "in messages[-1:]"),
}


@pytest.fixture
def folder(tiny_processor, tiny_backbone: Path, tmp_path: Path) -> Path:
    """A backbone whose weights cannot be read."""
    made = Path(shutil.copytree(tiny_backbone, tmp_path / "backbone"))
    (made / "model.safetensors").write_bytes(b"not read")
    return made


@pytest.mark.parametrize("template", (FAILING | LOSING).values(), ids=(FAILING | LOSING).keys())
def test_what_fails_or_loses_something_is_refused_in_one_line(folder: Path, template: str):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BackboneError, match="chat_template.jinja: its chat template cannot be used") as raised:
        load_processor(str(folder))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING.keys())
def test_a_model_of_text_alone_is_looked_at_too(tmp_path: Path, template: str):
    path = families.make("llama").save(tmp_path / "text")
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(BackboneError, match="its chat template cannot be used"):
        load_processor(str(path))


@pytest.mark.parametrize("template", [3, ["a"], {"other": "a"}, True, 1.5], ids=repr)
def test_what_is_no_template_is_refused(folder: Path, template: object):
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(BackboneError, match=str(folder)) as raised:
        load_processor(str(folder))
    assert "\n" not in str(raised.value)


def test_a_sound_one_is_taken(folder: Path):
    (folder / "chat_template.jinja").write_text(SOUND)
    load_processor(str(folder))


def test_training_and_the_check_of_data_end_in_one_line(folder: Path, tiny_data: Path, tmp_path: Path):
    (folder / "chat_template.jinja").write_text(FAILING["it raises"])
    tiny.recipe(tmp_path / "run", tiny_data, folder)
    for words in (
        ["train", tmp_path / "recipe.yaml"],
        ["data", "check", tiny_data / "sequence.yaml", "--root", tiny_data, "--backbone", folder],
    ):
        told = refused(*words)
        assert told.count("\n") == 1 and "only for adults" in told and not (tmp_path / "run").exists()


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a long text": "{{ 'a' * 10**12 }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("before", [True, False])
def test_a_template_that_does_not_end_is_refused(
    folder: Path, kind: str, before: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("llava_cmoe.backbones.chat_template.SECONDS", 1)
    sound = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(ENDLESS[kind] + sound if before else sound + ENDLESS[kind])
    with pytest.raises(BackboneError, match="its chat template cannot be used") as raised:
        load_processor(str(folder))
    assert len(str(raised.value).splitlines()) == 1


def test_a_trial_says_whether_a_call_ends_and_leaves_no_trace():
    seen = list[int]()

    def failing() -> None:
        seen.append(1)
        raise ValueError

    assert ends(failing, 60, 2**30) and not seen
    assert not ends(lambda: time.sleep(60), 1, 2**30)
    assert not ends(lambda: bytearray(2**30), 60, 2**28)
