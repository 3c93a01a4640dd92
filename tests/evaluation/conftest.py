"""What the tests of evaluations ask."""

from pathlib import Path

import pytest
from cells import SEQUENCE, make_rows

from llava_cmoe.evaluation.eval_spec import EvalSpec
from llava_cmoe.settings.evaluation import EvaluationSettings


@pytest.fixture
def eval_spec(tmp_path: Path) -> EvalSpec:
    rows = {name: make_rows(name) for name in SEQUENCE.names}
    settings = EvaluationSettings(routes=("located", "oracle"), batch_size=3)
    return EvalSpec(SEQUENCE, rows, tmp_path / "answers", settings, seed=0)
