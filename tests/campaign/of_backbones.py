"""Backbone folders: weights, configuration, tokenizer, processor and chat template, each damaged or of a stranger."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from campaign.mutations import damaged, mutated
from campaign.of_rows import fresh
from campaign.workers import Met, Verdict, meet
from campaign.world import World

LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 10**12 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% for a in range(99999) if a > 99999 %}{% endfor %}" * 20,
    "{% if messages[0]['content'] is string %}{% else %}{{ raise_exception('no') }}{% endif %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ lipsum.__globals__['os'].system('touch /tmp/campaign_was_here') }}",
    "{{ 'x' | center(10**11) }}",
)
"""Chat templates that do not end, eat memory, or reach for what is not theirs."""


class Backbones:
    """A backbone folder that is damaged in one place, and asked for one answer."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.whole = folder / "backbone", world.backbone

    def files(self, rng: random.Random) -> Verdict:
        """One change of one file."""
        shutil.copytree(self.whole, fresh(self.folder), dirs_exist_ok=True)
        path = rng.choice(sorted(path for path in self.folder.iterdir() if path.is_file()))
        if path.suffix == ".json" and rng.random() < 0.7:
            document, how = mutated(json.loads(path.read_text()), rng)
            content = json.dumps(document).encode()
        elif rng.random() < 0.1:
            path.unlink()
            content, how = None, "gone"
        else:
            content, how = damaged(path.read_bytes(), rng)
        if content is not None:
            path.write_bytes(content)
        met = meet(self._answer)
        kind = f"backbone ({'weights' if path.suffix == '.safetensors' else 'files beside them'})"
        if fault := met.faults(self.folder):
            outcome = "traceback" if met.outcome == "traceback" else "not in one line"
            return kind, outcome, f"{path.name}, {how}: {fault}"
        return kind, "refused" if met.outcome == "refused" else "answers, and has another fingerprint", self._named(met)

    def templates(self, rng: random.Random) -> Verdict:
        """A chat template that loops or reaches out, before, in or behind a sound one."""
        shutil.copytree(self.whole, fresh(self.folder), dirs_exist_ok=True)
        path = self.folder / "chat_template.jinja"
        sound, odd = path.read_text(), rng.choice(LOOPS)
        path.write_text(
            rng.choice((odd, odd + sound, sound + odd, sound.replace("{{ eos_token", odd + "{{ eos_token")))
        )
        met = meet(self._answer)
        if fault := met.faults(self.folder):
            outcome = "traceback" if met.outcome == "traceback" else "not in one line"
            return "chat templates", outcome, f"{odd[:60]}: {fault}"
        return "chat templates", "refused" if met.outcome == "refused" else "ends, and answers", None

    def _named(self, met: Met) -> str | None:
        """An accepted change is another backbone: whoever learned on the whole one is refused by its fingerprint."""
        from llava_cmoe.backbones.loading import FILE_PATTERNS
        from llava_cmoe.provenance.fingerprints import fingerprint_files

        if met.outcome == "refused":
            return None
        whole = fingerprint_files([path for one in FILE_PATTERNS for path in self.whole.glob(one)], root=self.whole)
        return "has the fingerprint of the whole one" if met.value == whole else None

    def _answer(self) -> str:
        """Load the backbone and encode a question; returns its fingerprint."""
        from PIL import Image

        from llava_cmoe.backbones.loading import load_backbone
        from llava_cmoe.data.conversation import encode_prompt
        from llava_cmoe.settings.backbone import BackboneSettings

        backbone = load_backbone(BackboneSettings(path=str(self.folder)))
        encode_prompt(backbone.processor, [{"role": "user", "text": "<image>\n?"}], Image.new("RGB", (30, 30)))
        return backbone.fingerprint
