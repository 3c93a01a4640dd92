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
        probe_seconds: wall-clock cost of probing.
        probe_parameters: trainable parameters while probing (temporary, never stored).
    """

    new_experts: Mapping[str, int]
    init_from: Mapping[str, int] = field(default_factory=dict)
    frequencies: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    probe_seconds: float = 0.0
    probe_parameters: int = 0


@dataclass(frozen=True)
class Learned:
    """What one task taught: everything the registry writes into the task's directory.

    Attributes:
        tensors: file stem (`experts`, `routers`, `locator`, ...) to named tensors; each group is one safetensors file.
        facts: JSON-ready facts about the stage (growth, losses, parameter counts).
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, object]


@dataclass(frozen=True)
class Mixture:
    """Several tasks whose routers serve a sample together.

    Attributes:
        tasks_BK: task indices mixed for each sample, the closest first; -1 throughout where the base model answers.
        weights_BK: weight of each of those tasks; they sum to 1, or to 0 where the base model answers.
    """

    tasks_BK: Tensor
    weights_BK: Tensor


@dataclass(frozen=True)
class Located:
    """A locator's verdict for a batch of prompts.

    Attributes:
        task_B: closest task's index per sample, -1 where no known task fits (the base model answers).
        score_BN: score per sample and known task, z-normalised unless the settings ask for raw errors; lower is closer.
        mixture: tasks that soft selection mixes; None where the closest task answers alone.
    """

    task_B: Tensor
    score_BN: Tensor
    mixture: Mixture | None = None

    @property
    def choice(self) -> Tensor | Mixture:
        """Whose routers answer, as a method's `routed` takes it."""
        return self.task_B if self.mixture is None else self.mixture


@dataclass(frozen=True)
class StageReport:
    """How one training stage went: optimizer steps, samples seen, mean loss of the first and last tenth, seconds."""

    steps: int
    samples: int
    first_loss: float
    last_loss: float
    seconds: float
