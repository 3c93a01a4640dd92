"""Score the answers of any model to a CoIN task, without the model.

    python eval/score.py --task VizWiz --annotations DIR --answers merge.jsonl --protocol coin --output out.json

DIR holds the task's official test.json or val.json, and what else the official script reads: TextVQA_0.5.1_val.json,
testdev_balanced_questions.json, problems.json and pid_splits.json. What the protocols mean is told in `scorers/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_cmoe.evaluation.official.files import ROWS, ScoringError
from llava_cmoe.evaluation.official.score_file import ProtocolName, score_file, write_score


def main(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(ROWS)}, in any case.")],
    annotations: Annotated[Path, typer.Option(help="Folder with the task's official files.", metavar="DIR")],
    answers: Annotated[Path, typer.Option(help="Answers in LLaVA's format, such as merge.jsonl.", metavar="FILE")],
    output: Annotated[Path, typer.Option(help="JSON file to write.", metavar="FILE")],
    protocol: Annotated[
        ProtocolName, typer.Option(help="What should be measured, or what CoIN's scripts do.")
    ] = "strict",
) -> None:
    """Write the accuracy and every question's score, and print the accuracy as CoIN's scripts do."""
    try:
        score = score_file(task, annotations, answers, protocol)
        write_score(output, score)
    except (ScoringError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    typer.echo(f"Samples: {score.num_samples}\nAccuracy: {score.accuracy:.2f}%")


if __name__ == "__main__":
    typer.run(main)
