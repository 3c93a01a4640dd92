"""A run folder ends at its edge: nothing in it is a link to what lies outside, which a stranger's run would choose."""

from __future__ import annotations

import os
from pathlib import Path

from llava_cmoe.registry.schema import RegistryError


def check_inside(run: Path) -> None:
    """Stop at a link in a run folder that leaves it; the folder itself may be reached by one, or be missing.

    Raises:
        RegistryError: names the link and where it leads.
    """
    edge = run.resolve()
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(edge):
                raise RegistryError(
                    f"{path}: is a link to {path.readlink()}, which lies outside the run folder; whoever reads or "
                    "writes there would not see it, so put a copy in the link's place or delete it"
                )
