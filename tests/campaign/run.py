"""Disturb runs, damage files, mutate inputs, and count what happens: `python tests/campaign/run.py PART`.

A seed decides every case and the minutes how many there are; figures go into one JSON file, from which `page` writes
docs/reliability.md. Leaves with status 1 if a promise was broken.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).parents[1])
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import typer  # noqa: E402
from campaign.tally import Budget, Tally, write_part  # noqa: E402

PARTS = ("kills", "corruption", "inputs", "security", "mistakes")
ROOT = Path(__file__).parents[2]


def main(
    part: Annotated[str, typer.Argument(help=f"{', '.join(PARTS)}, all of them in turn, or page.")],
    seed: Annotated[int, typer.Option(help="Decides every case.")] = 0,
    minutes: Annotated[float, typer.Option(help="That each part may take.")] = 8,
    figures: Annotated[Path, typer.Option(help="JSON file of all counts.")] = ROOT / "eval/results/reliability.json",
) -> None:
    """Run a part of the campaign, or all."""
    if part == "page":
        from campaign.page import write_page

        write_page(figures, ROOT / "docs/reliability.md")
        return
    if part not in (*PARTS, "all"):
        raise typer.BadParameter(f"{part}: is none of {', '.join(PARTS)}, all, page")
    broken = 0
    for name in PARTS if part == "all" else (part,):
        broken += run_part(name, seed, minutes, figures)
    raise typer.Exit(bool(broken))


def run_part(name: str, seed: int, minutes: float, figures: Path) -> int:
    """Run one part in a folder of its own; returns how many promises were broken."""
    tally, began = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign_") as folder:
        import_module(f"campaign.{name}").run(Path(folder), random.Random(f"{name}/{seed}"), Budget(minutes), tally)
    write_part(figures, name, seed, {"seconds": round(time.monotonic() - began), **tally.as_json()})
    for kind, outcomes in sorted(tally.counts.items()):
        typer.echo(f"{kind}: {', '.join(f'{number} {outcome}' for outcome, number in sorted(outcomes.items()))}")
    typer.echo(f"{name}: {len(tally.broken)} promises broken; in {figures}")
    return len(tally.broken)


if __name__ == "__main__":
    typer.run(main)
