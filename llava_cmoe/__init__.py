"""Continual instruction tuning of vision-language LLMs with LoRA experts (LLaVA-CMoE).

`load`, `learn` and `evaluate` are the public functions, described in `api.py`. They are imported when they are asked
for, as torch and transformers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_cmoe.api import evaluate, learn, load

__all__ = ["evaluate", "learn", "load"]


def __getattr__(name: str) -> Any:
    """A public function by its name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("llava_cmoe.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
