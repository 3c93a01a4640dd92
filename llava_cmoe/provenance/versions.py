"""Versions of Python and of the packages that had a hand in the numbers; who writes them down is left to others."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("llava-cmoe", "torch", "transformers", "tokenizers", "pillow", "torchvision"),
    *("peft", "accelerate", "deepspeed", "datasets", "bitsandbytes"),
)


def versions() -> dict[str, str]:
    """Package to version; a package that is only copied, not installed, says so."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def installed(recorded: Mapping[str, str]) -> bool:
    """Whether every package that a record names is here in that version; older records name fewer."""
    here = versions()
    return all(here.get(package) == wanted for package, wanted in recorded.items())
