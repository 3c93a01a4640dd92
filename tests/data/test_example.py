"""An example shows the very tokens of training: what is learned is marked, a picture's tokens are counted."""

from pathlib import Path

import pytest

from llava_cmoe.backbones.loading import load_processor
from llava_cmoe.data.coin import read_train
from llava_cmoe.data.encoding import Encoding, SampleRows
from llava_cmoe.data.example import pieces_of, render_pieces
from llava_cmoe.data.tasks import TaskSequence


@pytest.mark.parametrize("task", [0, 1])
def test_pieces_are_the_sample_that_training_learns(root: Path, sequence: TaskSequence, task: int) -> None:
    processor, rows = load_processor("pocket"), read_train(root, sequence.tasks[task])
    sample = SampleRows(rows, Encoding(processor), max_length=500)[0]
    pieces = pieces_of(rows[0], Encoding(processor))
    assert sum(piece.tokens for piece in pieces) == len(sample["input_ids"])
    assert sum(piece.tokens for piece in pieces if piece.learned) == int((sample["labels"] != -100).sum())
    answers = [turn["text"] for turn in rows[0]["turns"] if turn["role"] == "assistant"]
    learned = [piece.text for piece in pieces if piece.learned]
    assert len(learned) == len(answers)
    assert all(answer.lower() in text.lower() for answer, text in zip(answers, learned, strict=True))
    shown = render_pieces(pieces).plain
    image_tokens = int((sample["input_ids"] == processor.image_token_id).sum())
    assert f"<image> x {image_tokens}" in shown and shown.count("<image>") == 1
    assert shown.count("⟦") == shown.count("⟧") == len(answers)
