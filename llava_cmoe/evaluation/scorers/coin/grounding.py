"""Grounding as released: brackets go, then the first and the last character, and what is left is four numbers or wrong.

So "[0.1, 0.2, 0.5, 0.9]" is read as ".1, 0.2, 0.5, 0." and "[0, 0, 1, 1]" not at all; a blank, comma or stop at the end
takes the cut for the last number, a blank before the bracket takes the first, and a leading minus is lost. Whatever
`float` takes is a number ("nan", "0.3_7"). Boxes are scaled to pixels before the overlap, which must exceed one half:
at exactly one half, rounding decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_cmoe.evaluation.scorers.base import Reference, Score


def is_right(text: Any, truth: str, size: Sequence[float]) -> bool:
    """Whether the box in a text overlaps the true one by more than half; whatever is not a text holds no box.

    Args:
        text: the prediction.
        truth: the true box as CoIN writes it, "[x1, y1, x2, y2]" on the padded square.
        size: width and height of the picture in pixels.

    Raises:
        ValueError, TypeError, OverflowError: the truth is no box, or the size no size.
    """
    true_box = [float(number) for number in _unbracketed(truth).split(",")]
    box = _read(text)
    if box is None:
        return False
    side = max(size)
    return _iou([number * side for number in box], [number * side for number in true_box]) > 0.5


def score(prediction: str, reference: Reference) -> Score:
    """1 if a run's answer is right, else 0; a row that does not tell its picture's size is taken as it is."""
    return Score(float(is_right(prediction, reference.answer, reference.size or (1,))))


def _unbracketed(text: str) -> str:
    return text.replace("[", "").replace("]", "")


def _read(text: Any) -> list[float] | None:
    if not isinstance(text, str):
        return None
    try:
        box = [float(number) for number in _unbracketed(text)[1:-1].split(",")]
    except ValueError:
        return None
    return box if len(box) == 4 else None


def _iou(box: Sequence[float], true_box: Sequence[float]) -> float:
    """Overlap with plain areas, in the released order of operands: with nan, `max` and `min` depend on it."""
    x1, y1, x2, y2 = box
    true_x1, true_y1, true_x2, true_y2 = true_box
    width = max(0, min(x2, true_x2) - max(x1, true_x1))
    height = max(0, min(y2, true_y2) - max(y1, true_y1))
    common = width * height
    union = (x2 - x1) * (y2 - y1) + (true_x2 - true_x1) * (true_y2 - true_y1) - common
    return common / union if union > 0 else 0
