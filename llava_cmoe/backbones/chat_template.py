"""Looks at a backbone's chat template before anything is learned: a short conversation has to come through it whole.

What a conversation becomes is decided in `data/conversation.py`; a row that only some templates refuse is found there.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from llava_cmoe.backbones.trial import ends
from llava_cmoe.data.conversation import ChatTemplateError, Processor, encode_sample, split, tokenizer_of
from llava_cmoe.data.rows import MARKER, Turn
from llava_cmoe.settings.base import in_one_line

QUESTION, ANSWER = "What is shown here?", "a cat"
SIDE = 64
"""Of the grey square that is shown, in pixels."""
UNLIMITED = 10**9
SECONDS, MEMORY = 10, 2 * 2**30
"""That a question, an answer and the grey square may take; of sound files they take milliseconds."""
HOLDERS = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")
"""Files that may hold a chat template, in the order in which they are looked at."""


def check_chat_template(processor: Processor) -> None:
    """Raise a ChatTemplateError unless question, picture and answer come through the template, and it ends."""
    if not ends(lambda: _check(processor), SECONDS, MEMORY):
        limits = f"{SECONDS} seconds and {MEMORY / 2**30:.0f} GB"
        raise ChatTemplateError(processor, f"does not make tokens of a question and a small picture within {limits}")
    _check(processor)


def _check(processor: Processor) -> None:
    _check_text(processor, QUESTION)
    if tokenizer_of(processor) is processor:
        return
    with_picture = _check_text(processor, f"{MARKER}\n{QUESTION}")
    if with_picture == split(processor, _asked(QUESTION))[0].text:
        raise ChatTemplateError(processor, "writes nothing for a picture, which the model would never see")
    try:
        grey = Image.new("RGB", (SIDE, SIDE), (127, 127, 127))
        encode_sample(processor, [*_asked(f"{MARKER}\n{QUESTION}"), _answered()], grey, UNLIMITED)
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, OSError) as error:
        reason = f"the processor finds no place for a picture in it ({in_one_line(error)})"
        raise ChatTemplateError(processor, reason) from error


def file_of_template(folder: Path) -> Path:
    """The file of a backbone's folder that its chat template is most likely read from; the folder if none has one."""
    for path in (folder / name for name in HOLDERS):
        if path.is_file() and (path.suffix == ".jinja" or "chat_template" in _keys(path)):
            return path
    return folder


def _asked(question: str) -> list[Turn]:
    return [{"role": "user", "text": question}]


def _answered() -> Turn:
    return {"role": "assistant", "text": ANSWER}


def _check_text(processor: Processor, question: str) -> str:
    """What is rendered up to the answer."""
    prompt, _ = split(processor, [*_asked(question), _answered()])
    if QUESTION not in prompt.text:
        raise ChatTemplateError(processor, f"drops or changes the question: {QUESTION!r} is not in what it renders")
    return prompt.text


def _keys(path: Path) -> frozenset[str]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(document) if isinstance(document, dict) else frozenset()
