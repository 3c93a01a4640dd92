"""Prompts' features on disk, read from the frozen model once for all runs that would read the same again.

    FOLDER/3f1c8a....safetensors    feature_SD of one stage's prompts; its header tells what made them

The name is the sha256 of all that could change a bit of them, so nothing is ever out of date: another base, question,
picture, layer, batch, machine or version is another file. Only this package's own code is known by its version alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from llava_cmoe.files import write_atomically

logger = logging.getLogger(__name__)

NAME = "feature_SD"


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features; any may be deleted at any time.

    Attributes:
        folder: which need not exist yet; runs at work may share it.
        base: what the model is and what it computes on, as JSON.
        writer: whether this process writes what it had to read from the model.
    """

    folder: Path
    base: Mapping[str, object]
    writer: bool

    def features(self, made_by: Mapping[str, object], read: Callable[[], Tensor]) -> Tensor:
        """The features (S, D) that `read` gives, from disk where they are known; on the CPU then.

        Args:
            made_by: what besides the base could change a bit of them: prompts, layer and so on, as JSON.
            read: reads them from the model.
        """
        facts = json.dumps({"base": self.base, **made_by}, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.safetensors"
        if path.is_file():
            try:
                return load_file(path)[NAME]
            except SafetensorError as error:
                logger.warning("%s: damaged (%s), its features are read from the model again", path, error)
        feature_SD = read()
        if self.writer:
            write_atomically(path, save({NAME: feature_SD.cpu().contiguous()}, metadata={"made_by": facts}))
        return feature_SD
