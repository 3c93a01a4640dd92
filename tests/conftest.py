"""What tests share: a tiny backbone, tiny data, and runs that learned it, each made once.

What the shipped pocket backbone can do is tested with the pocket backbone; here only shapes and properties matter.
Everything is tested on the CPU, also where there is a GPU; `test_gpu.py` starts processes that see it.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["GPU_OF_TESTS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gc
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings
from tiny_model import make_backbone, make_llava, make_processor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

torch.set_num_threads(1)
gc.freeze()  # what is imported stays; each fit collects garbage twice, and would look through it all

TESTS = Path(__file__).parent

QUICK = {"settings", "provenance", "locators", "experts", "evaluation", "registry", "report"}
"""Rooms whose tests `make quick` runs, beside those of the architecture; the others learn whole runs, start processes
or read all that ships."""
SLOW = {"test_store", "test_runner", "test_results_page", "test_page"}
"""Files of these rooms that do so, too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow; the file that takes longest begins first, as all wait for it."""
    items.sort(key=lambda item: item.path.stem != "test_engines")
    for item in items:
        quick = item.path.stem == "test_architecture" or bool(QUICK & set(item.path.relative_to(TESTS).parts))
        if not quick or item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


# The same examples every time, and no clock: a busy machine must not fail a property.
settings.register_profile("project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def tiny_processor() -> LlavaProcessor:
    """Processor of `tiny_llava`: 24-pixel images as four tokens, about 380 text tokens, a Vicuna-like template."""
    return make_processor()


@pytest.fixture
def tiny_llava(tiny_processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Random two-layer LLaVA (float32, eval mode); the same weights for every test, a fresh copy for each."""
    return make_llava(tiny_processor)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_processor: LlavaProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `tiny_llava` and its processor, as a recipe's `backbone.path` wants it."""
    return make_backbone(tmp_path_factory.mktemp("backbone"), tiny_processor)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root of the tiny sequence."""
    root = tmp_path_factory.mktemp("data")
    tiny.write_data(root)
    return root


@pytest.fixture(scope="session")
def lesson_of(
    tiny_data: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tiny.Lesson]:
    """What is seen while a method learns the tiny sequence; each method and its overrides once per session."""

    @cache
    def attend(method: str, *overrides: str) -> tiny.Lesson:
        run = tmp_path_factory.mktemp(method) / "run"
        return tiny.attend(tiny.recipe(run, tiny_data, tiny_backbone, method, *overrides))

    return attend


@pytest.fixture(scope="session")
def sees_gpu() -> dict[str, str]:
    """Environment of a process that is to use the GPU; skips where there is none."""
    seeing = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ["GPU_OF_TESTS"]}
    asking = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if torch.version.cuda is None or subprocess.run(asking, env=seeing).returncode:
        pytest.skip("there is no GPU")
    return seeing
