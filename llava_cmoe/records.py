"""Small frozen values that rooms pass to each other; no behaviour beyond what derives from their own fields.

Shape letters used in tensor names everywhere: B batch, T tokens, D hidden, E experts, K chosen tasks (in a plan) or
top-k, R rank, L sites, N tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Growth:
    """What one task adds: the decision of probe-guided knowledge extension (or of a method that always grows).

    Attributes:
        new_experts: site name to the number of experts added there (only sites that grow).
        init_from: site name to the index of the expert that the new ones copy (of the first probe, where each copies
            one); absent means fresh LoRA init.
        frequencies: site name to activation frequency per expert while probing, the probe last; without sites that no
            counted token reached, empty when not probed.
        thresholds: site name to the threshold tau_l (Eq. 2) that the probe's frequency was compared with.
        nearest: learned task, from 0, that the new one begins as; None where it begins as the frozen model.
        need: what the nearest task's experts leave of the frozen model's loss on the probing rows; None: not measured.
        probe_seconds: wall-clock cost of probing.
        probe_parameters: trainable parameters while probing (temporary, never stored).
    """

    new_experts: Mapping[str, int]
    init_from: Mapping[str, int] = field(default_factory=dict)
    frequencies: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    nearest: int | None = None
    need: float | None = None
    probe_seconds: float = 0.0
    probe_parameters: int = 0


@dataclass(frozen=True)
class Learned:
    """What one task taught: everything the registry writes into the task's directory.

    Attributes:
        tensors: file stem (`experts`, `routers`, `locator`, ...) to named tensors; each group is one safetensors file.
        facts: JSON-ready facts about the stage (growth, losses, parameter counts); no times.
        seconds: wall-clock seconds per part of the stage.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, object]
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Located:
    """Whose routers answer each sample of a batch, and by which scores.

    Attributes:
        tasks_BK: task indices mixed for each sample, the closest first; -1 throughout where no known task fits and the
            base model answers.
        weights_BK: weight of each of those tasks; they sum to 1, or to 0 where the base model answers.
        score_BN: score per sample and known task, lower is closer; None where the tasks were given.
    """

    tasks_BK: Tensor
    weights_BK: Tensor
    score_BN: Tensor | None = None

    @classmethod
    def at(cls, task_B: Tensor, score_BN: Tensor | None = None) -> Located:
        """One task per sample, -1 for the base model."""
        tasks_BK = task_B.long().unsqueeze(1)
        return cls(tasks_BK, (tasks_BK >= 0).float(), score_BN)

    @property
    def task_B(self) -> Tensor:
        """The closest task of each sample, -1 where the base model answers."""
        return self.tasks_BK[:, 0]


@dataclass(frozen=True)
class StageReport:
    """How one training stage went: optimizer steps, samples seen, mean loss of the first and last tenth, seconds."""

    steps: int
    samples: int
    first_loss: float
    last_loss: float
    seconds: float
