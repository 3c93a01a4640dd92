"""What processes of their own do in the tests of runs: learn, or learn until killed at a chosen call.

One of several processes dies where `FATAL` holds its rank and the call, as JSON: `{"rank": "1", "call": 9}`.
"""

import gc
import itertools
import json
import os
import signal
import sys
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch

from llava_cmoe.methods import frozen_features
from llava_cmoe.sequence import learn
from llava_cmoe.settings.recipes import parse_recipe


def learn_from(document: dict[str, Any]) -> None:
    """Learn a recipe given as JSON holds it, on one thread as all tests do: bits depend on how many share a sum."""
    torch.set_num_threads(1)
    learn(parse_recipe(document, source="launched.py"))


def learn_until_killed(document: dict[str, Any], module: str, function: str, call: int) -> None:
    """Learn, and die by SIGKILL where `function` of `module` is about to be called for the `call`-th time, from 1."""
    path, _, name = function.rpartition(".")
    owner: Any = import_module(module)
    owner = attrgetter(path)(owner) if path else owner
    original, calls = getattr(owner, name), itertools.count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)
    learn_from(document)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays; each fit would look through it all
    frozen_features.FEATURE_BATCH = 8  # so that processes share even a few rows
    fatal = json.loads(os.environ.get("FATAL", "{}"))
    for argument in sys.argv[1:]:
        if os.environ["RANK"] == fatal.get("rank"):
            learn_until_killed(
                json.loads(argument), "llava_cmoe.training.stage", "StageTrainer.training_step", fatal["call"]
            )
        learn_from(json.loads(argument))
