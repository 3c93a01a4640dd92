"""Likeness of experts: the cosine of what they add, from a run's stored tensors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import Lesson
from torch.nn.functional import cosine_similarity

from llava_cmoe.analyses.expert_similarity import cosines, measure_similarity
from llava_cmoe.registry.schema import RegistryError


def test_the_cosine_is_that_of_the_matrices_that_experts_add_over_all_linears():
    generator = torch.Generator().manual_seed(0)
    widths = {"mlp/up": (6, 10), "mlp/down": (10, 6)}
    matrices = {
        **{f"{name}.A": torch.randn(4, 3, d_in, generator=generator) for name, (d_in, _) in widths.items()},
        **{f"{name}.B": torch.randn(4, d_out, 3, generator=generator) for name, (_, d_out) in widths.items()},
    }
    for name in widths:  # the last expert computes what the first does, written with other matrices
        turned, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
        matrices[f"{name}.A"][3] = turned @ matrices[f"{name}.A"][0]
        matrices[f"{name}.B"][3] = matrices[f"{name}.B"][0] @ turned.T
    added_ED = torch.cat([(matrices[f"{name}.B"] @ matrices[f"{name}.A"]).flatten(1) for name in widths], dim=1)
    found_EE = cosines(matrices)
    torch.testing.assert_close(found_EE, cosine_similarity(added_ED.unsqueeze(0), added_ED.unsqueeze(1), dim=2))
    assert found_EE[0, 3] == pytest.approx(1.0, abs=1e-5) and abs(found_EE[0, 1]) < 0.5


def test_a_run_tells_how_alike_each_tasks_experts_are(lesson_of: Callable[[str], Lesson]):
    run = lesson_of("cmoe").recipe.run
    first, second = measure_similarity(run).tasks.values()
    assert first.to_origin is None and first.to_pool is None  # there was no pool
    [folder, *_] = sorted((run / "tasks").iterdir())
    stored = load_file(folder / "experts.safetensors")
    sites = {name.partition("/")[0] for name in stored}
    means = []
    for site in sites:
        cosine_EE = cosines({name: tensor for name, tensor in stored.items() if name.startswith(f"{site}/")})
        means.append(float(cosine_EE[0, 1]))
    assert first.among_new == pytest.approx(sum(means) / len(means), abs=1e-6)
    assert second.to_origin is not None and second.to_pool is not None and second.to_origin > second.to_pool


def test_a_run_without_a_pool_is_refused(lesson_of: Callable[[str], Lesson], tmp_path: Path):
    with pytest.raises(RegistryError, match="sequential_lora has no pool"):
        measure_similarity(lesson_of("sequential_lora").recipe.run)
    with pytest.raises(RegistryError, match=r"results\.json: no such file"):
        measure_similarity(tmp_path)
