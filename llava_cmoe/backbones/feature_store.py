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

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llava_cmoe.data.encoding import PromptRows
from llava_cmoe.provenance.files import write_atomically

logger = logging.getLogger(__name__)

NAME, TOLD = "feature_SD", "features"


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features; any may be deleted at any time.

    Attributes:
        folder: which need not exist yet; runs at work may share it.
        base: what the model is and what it computes on, as JSON.
    """

    folder: Path
    base: Mapping[str, object]

    def features(self, prompts: PromptRows, read_as: Mapping[str, object], read: Callable[[], Tensor]) -> Tensor:
        """The features (S, D) that `read` gives, from disk where they are known, and then on the CPU.

        Args:
            prompts: whose features they are.
            read_as: what besides base and prompts could change a bit of them: layer, batch and so on, as JSON.
            read: reads them from the model; all processes of a launch call it, or none.
        """
        main, facts = PartialState().is_main_process, ""
        if main:
            facts = json.dumps({"base": self.base, "prompts": prompts.fingerprint(), **read_as}, sort_keys=True)
        (facts,) = broadcast_object_list([facts])
        path = self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.safetensors"
        kept_SD = _kept(path)
        # Processes share the reading: all take part in it, also one that finds the file where another does not.
        if all(gather_object([kept_SD is not None])) and kept_SD is not None:
            return kept_SD
        feature_SD = read()
        if main:
            told = json.dumps({"made_by": json.loads(facts), "sha256": _hash(feature_SD)}, sort_keys=True)
            # One entry: of several, safetensors writes whichever first, so that the same features had other bytes.
            write_atomically(path, save({NAME: feature_SD.cpu().contiguous()}, metadata={TOLD: told}))
        return feature_SD


def _kept(path: Path) -> Tensor | None:
    why: object = "its bytes are not those that were written"
    try:
        with safe_open(path, "pt") as file:
            feature_SD: Tensor = file.get_tensor(NAME)
            told = json.loads((file.metadata() or {}).get(TOLD, "{}"))
            if isinstance(told, dict) and told.get("sha256") == _hash(feature_SD):
                return feature_SD
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError) as error:
        why = error
    logger.warning("%s: damaged (%s), its features are read from the model again", path, why)
    return None


def _hash(feature_SD: Tensor) -> str:
    """Of the features' kind, shape and bytes."""
    plain_SD = feature_SD.detach().cpu().contiguous()
    kind = f"{plain_SD.dtype} {tuple(plain_SD.shape)} ".encode()
    return hashlib.sha256(kind + plain_SD.view(torch.uint8).numpy().tobytes()).hexdigest()
