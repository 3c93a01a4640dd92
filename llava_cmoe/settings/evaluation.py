"""How finished tasks are measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llava_cmoe.settings.base import Settings

Split = Literal["test", "validation"]
"""Which questions are asked: those of the evaluation files, or held-out training rows."""


class JudgeSettings(Settings):
    """An LLM that judges answers (scorer `llm_judge`), behind any OpenAI-compatible endpoint."""

    model: str = Field(min_length=1)
    """Its name at the endpoint; name a dated version, as what an endpoint serves under a name changes."""
    url: str = "http://localhost:8000/v1"
    """The endpoint; its key is read from OPENAI_API_KEY in the environment and never written down."""
    seed: int = 0
    """Sent with every question; most servers answer alike for it, none promises to."""
    timeout: float = Field(60.0, gt=0, le=86_400)
    """Seconds to wait for one verdict."""


class EvaluationSettings(Settings):
    """How finished tasks are measured."""

    batch_size: int = Field(32, gt=0)
    """Samples per generation batch and process."""
    routes: tuple[Literal["located", "oracle", "random"], ...] = Field(("located",), min_length=1)
    """Which routes are measured; the first one is the headline."""
    split: Split = "test"
    """Questions that are asked: the evaluation files', or, to choose settings by, a tenth of the training rows, which
    are then not learned. It is drawn once and for all, whatever the run's seed, and every result is marked so."""
    limit: int | None = Field(None, gt=0)
    """Ask only a stratified subset of this many questions per task, and mark every result so; all when absent."""
    subset_seed: int = 0
    """Seed of that subset; not the run's, so that runs of several seeds are asked the same questions."""
    protocol: Literal["strict", "coin"] = "strict"
    """Scoring rules of the headline: what should be measured, or CoIN's released scripts with their accidents. What the
    other one makes of the same answers is stated beside it."""
    judge: JudgeSettings | None = None
    """The LLM that tasks with scorer `llm_judge` ask; none when absent, and such a task is then refused."""
