"""Attacks by kind: what is done, which commands meet it, and a function that prepares it in a copy of everything."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MARKER = "was_here"
Attack = Callable[[Path], Path | None]
"""Prepares files in a folder with run, data, backbone and outside; may return where the run lies then."""
Case = tuple[str, tuple[str, ...], Attack]

LOADING = ("eval", "chat", "train")
READING = ("report", "rescore", "compare", "export")
NAMES = (
    *("../../outside/x", "/tmp/campaign_x", "..", "a/../../outside", "\x1b[2Jx", "[/b]", "[red]x", "x\rerror: y"),
    *("\u202ex", "<script>canary()</script>", "a" * 400, "nul\0x", "\ud800"),
)
LINKS = {
    **dict.fromkeys(("results.json", "run.json", ".lock"), "outside/secret.json"),
    **dict.fromkeys(("answers", "tasks/02_sides", "logs"), "outside"),
}
WORDS = ("\x1b]0;x\x07", "[/b]", "<script>canary()</script>", "<img src=x onerror=canary>", "\u202ex\u0085y")
FOLDERS = ("[/b]", "\x1b[2J", "b [red]")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(place: Path) -> bytes:
    """A checkpoint as torch saves one, which runs code where it is unpickled."""
    import torch

    stream = io.BytesIO()
    torch.save({"module": {"w": torch.ones(2)}, "more": Evil(place / MARKER)}, stream)
    return stream.getvalue()


def checkpoint(name: str, place: Path) -> None:
    """A half-learned last stage with a checkpoint of a stranger, marked complete as ours are."""
    from llava_cmoe.training.checkpoints import mark_complete

    shutil.rmtree(place / "run/tasks/03_counts")
    for label in ("probing", "training"):
        folder = place / f"run/trainer/03_counts/{label}/checkpoint-1"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(pickled(place))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
        origin = {"processes": 1, "zero_stage": None, "config_hash": config_hash(place)}
        mark_complete(folder, origin)


def config_hash(place: Path) -> str:
    """As a run computes it: a stranger can, too."""
    from llava_cmoe.data.task_data import TaskData
    from llava_cmoe.provenance.fingerprints import fingerprint_files
    from llava_cmoe.registry.schema import recipe_facts
    from llava_cmoe.registry.store import Registry

    recipe = Registry(place / "run").recipe()
    from hashlib import sha256

    from llava_cmoe.backbones.loading import FILE_PATTERNS

    backbone = Path(recipe.backbone.path)
    found = fingerprint_files([path for one in FILE_PATTERNS for path in backbone.glob(one)], root=backbone)
    return sha256(json.dumps([recipe_facts(recipe), TaskData.of(recipe).fingerprint, found]).encode()).hexdigest()


def in_results(key: str, value: Any, place: Path) -> None:
    """Another value in results.json, bound anew by the manifest."""
    document = json.loads((place / "run/results.json").read_text())
    *outer, last = key.split(".")
    inner = document
    for step in outer:
        inner = inner[step]
    inner[last] = [value, *inner[last][1:]] if isinstance(inner[last], list) else value
    (place / "run/results.json").write_text(json.dumps(document))
    rebind(place)


def rebind(place: Path) -> None:
    """Let the manifest name what is there now, sealed as its writer does."""
    import hashlib

    from llava_cmoe.provenance.fingerprints import fingerprint_file
    from llava_cmoe.provenance.invocations import Manifest

    run = place / "run"
    named = {str(path.relative_to(run)): fingerprint_file(path) for path in sorted(run.glob("answers/*/*.jsonl"))}
    document = json.loads((run / "manifest.json").read_text())
    document |= {"results_sha256": fingerprint_file(run / "results.json"), "answers": named, "sha256": None}
    made = Manifest.model_validate(document)
    digest = hashlib.sha256(made.model_dump_json(exclude={"sha256"}).encode()).hexdigest()
    (run / "manifest.json").write_text(json.dumps(document | {"sha256": digest}))


def in_recipe(key: str, value: Any, place: Path) -> None:
    """Another value in run.json's recipe, sealed anew."""
    from llava_cmoe.registry.schema import RunRecord

    document = json.loads((place / "run/run.json").read_text())
    *outer, last = key.split(".")
    inner = document["recipe"]
    for step in outer:
        inner = inner.setdefault(step, {})
    inner[last] = value.replace("PLACE", str(place)) if isinstance(value, str) else value
    document["sha256"] = ""
    sealed = RunRecord.model_validate(document).sealed()
    (place / "run/run.json").write_text(sealed.to_json())


def in_record(name: str, place: Path) -> None:
    """One more file in the record of the last stage, with the record's own hash."""
    from llava_cmoe.registry.schema import TaskRecord

    path = place / "run/tasks/03_counts/record.json"
    document = json.loads(path.read_text())
    document["files"][name] = {"sha256": "0", "bytes": 1}
    path.chmod(0o644)
    made = TaskRecord.model_construct(**document)
    path.write_text(json.dumps(document | {"sha256": made.digest()}))


def in_answers(text: str, place: Path) -> None:
    """Other words of the model in every answer, bound anew."""
    for path in (place / "run/answers").rglob("*.jsonl"):
        lines = [json.loads(line) | {"text": text, "prompt": text} for line in path.read_bytes().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rebind(place)


def link(name: str, target: str, place: Path) -> None:
    """A link in the run's folder."""
    path = place / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(place / target)


def named_run(name: str, place: Path) -> Path:
    """A run's folder of that name."""
    (place / name).parent.mkdir(exist_ok=True)
    return (place / "run").rename(place / name)


def in_sequence(key: str, value: Any, place: Path) -> None:
    """Another value in the sequence's first task."""
    path = place / "data/sequence.yaml"
    document = json.loads(path.read_text())
    document["tasks"][0][key] = value
    path.write_text(json.dumps(document))


def in_row(key: str, value: Any, place: Path) -> None:
    """Another value in the first row that is learned."""
    path = place / "data/Instructions_Original/colours/train.json"
    rows = json.loads(path.read_text())
    rows[0][key] = value
    path.write_text(json.dumps(rows))


def remote_code(file: str, place: Path) -> None:
    """A backbone that brings code of its own, in modules and in a pickle."""
    backbone = place / "backbone"
    code = f"import os\nos.mkdir({str(place / MARKER)!r})\nclass X: pass\n"
    (backbone / "evil.py").write_text(code)
    document = json.loads((backbone / file).read_text())
    kinds = ("Config", "Model", "Tokenizer", "Processor", "ImageProcessor", "ModelForCausalLM")
    document["auto_map"] = {f"Auto{kind}": "evil.X" for kind in kinds}
    (backbone / file).write_text(json.dumps(document))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("data.pkl", pickled(place))
    (backbone / "pytorch_model.bin").write_bytes(pickled(place))


def strange_merge(place: Path) -> None:
    """A merge whose answers lie elsewhere, sealed anew."""
    from llava_cmoe.merging.store import MergeRecord

    path = place / "run/merges/01/merge.json"
    document = json.loads(path.read_text())
    answers = {f"../../../outside/{'secret.json'}": "0" * 64}
    made = MergeRecord.model_construct(**document | {"answers": answers, "sha256": ""})
    path.write_text(json.dumps(document | {"answers": answers, "sha256": made._digest()}))


def nothing(place: Path) -> None:
    """The files as they are: what is told of keys."""


RECORDED: dict[str, Any] = {
    "backbone.path": "stranger/model",
    "data.sequence": "PLACE/outside/secret.json",
    "data.feature_store": "PLACE/outside",
    "training.report_to": ["wandb"],
    "data.workers": 16,
    "evaluation.judge": {"model": "m", "url": "http://127.0.0.1:9/v1"},
}
FILES = {"a name that climbs": "../../../outside/secret.json", "no tensors": "record.json"}

ATTACKS: dict[str, list[Case]] = {
    "pickles in checkpoints": [
        (name, ("train",), partial(checkpoint, name))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin",
                     "global_step1/mp_rank_00_model_states.pt")
    ],
    "names in results": [
        (f"{key} {name[:20]!r}", READING, partial(in_results, key, name)) for key in ("run", "tasks") for name in NAMES
    ],
    "words of results": [(f"{name[:20]!r}", READING, partial(in_results, "method", name)) for name in NAMES],
    "words of answers": [(text[:20], READING, partial(in_answers, text)) for text in WORDS],
    "a run's folder": [(repr(name), (*LOADING, *READING), partial(named_run, name)) for name in FOLDERS],
    "a recorded recipe": [
        (key, ("eval", "chat", "rescore"), partial(in_recipe, key, value)) for key, value in RECORDED.items()
    ],
    "files of a record": [(what, ("eval", "chat"), partial(in_record, name)) for what, name in FILES.items()],
    "links": [(f"{one} to {to}", (*LOADING, *READING), partial(link, one, to)) for one, to in LINKS.items()],
    "a merge": [("answers elsewhere", ("chat --merge",), strange_merge)],
    "a sequence": [
        (f"{key} {value[:20]!r}", ("check",), partial(in_sequence, key, value))
        for key in ("name", "train", "images", "annotations", "instruction", "scorer")
        for value in ("../outside/secret.json", "/etc/passwd", "\x1b[2J", "[/b]")
    ],
    "rows": [
        (f"{key} {value[:20]!r}", ("check",), partial(in_row, key, value))
        for key in ("id", "image", "note\x1b[2J")
        for value in ("../../outside/secret.json", "/etc/passwd", "x\x1b[2J", "[/b]", "http://127.0.0.1:9/a.png")
    ],
    "code beside a backbone": [
        (file, ("check",), partial(remote_code, file))
        for file in ("config.json", "tokenizer_config.json", "processor_config.json")
    ],
    "keys": [("in the environment", (*LOADING, *READING, "check"), nothing)],
}  # fmt: skip
