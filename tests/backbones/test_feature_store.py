"""Features on disk are those of the model, to the bit; what could change them makes another file."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.data.encoding import Encoding, PromptRows
from llava_cmoe.data.rows import TRAIN_FEATURES

READ = torch.tensor([[1.5, -0.1], [3.0, 1e-30]])


class Model:
    """Counts how often features are read from it."""

    def __init__(self) -> None:
        self.asked = 0

    def read(self) -> Tensor:
        self.asked += 1
        return READ


def store(folder: Path, fingerprint: str = "a") -> FeatureStore:
    return FeatureStore(folder, {"backbone": fingerprint})


@pytest.fixture
def prompts(tmp_path: Path) -> PromptRows:
    return PromptRows(rows(tmp_path), Encoding(None))


def test_features_are_read_once_and_come_back_to_the_bit(tmp_path: Path, prompts: PromptRows):
    model = Model()
    first, second = (store(tmp_path / "new").features(prompts, {"layer": 3}, model.read) for _ in range(2))
    assert model.asked == 1
    assert torch.equal(first, READ)
    assert torch.equal(second, READ)


def test_a_file_tells_what_made_it(tmp_path: Path, prompts: PromptRows):
    store(tmp_path / "new").features(prompts, {"layer": 3}, Model().read)
    (file,) = (tmp_path / "new").iterdir()
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["features"])["made_by"]
    assert told == {"base": {"backbone": "a"}, "prompts": prompts.fingerprint(), "layer": 3}


@pytest.mark.parametrize("other", [("b", {"layer": 3}), ("a", {"layer": 4}), ("a", {"layer": 3, "feature": "mean"})])
def test_another_base_or_feature_is_read_again(
    tmp_path: Path, prompts: PromptRows, other: tuple[str, dict[str, object]]
):
    model, folder, (fingerprint, read_as) = Model(), tmp_path / "new", other
    store(folder).features(prompts, {"layer": 3}, model.read)
    store(folder, fingerprint).features(prompts, read_as, model.read)
    assert model.asked == 2
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_file_is_read_again_and_mended(tmp_path: Path, prompts: PromptRows, caplog: pytest.LogCaptureFixture):
    model, folder = Model(), tmp_path / "new"
    store(folder).features(prompts, {}, model.read)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert torch.equal(store(folder).features(prompts, {}, model.read), READ)
    assert model.asked == 2
    assert "damaged" in caplog.text
    assert file.read_bytes() == whole


def test_no_flipped_bit_gives_other_features(tmp_path: Path, prompts: PromptRows):
    model, folder = Model(), tmp_path / "new"
    store(folder).features(prompts, {}, model.read)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 1 if len(whole) < 500 else 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert torch.equal(store(folder).features(prompts, {}, model.read), READ)
    for place in range(len(whole) - READ.nbytes, len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        asked = model.asked
        assert torch.equal(store(folder).features(prompts, {}, model.read), READ) and model.asked == asked + 1


def rows(tmp_path: Path, question: str = "Which?", answer: str = "red", colour: str = "red", name: str = "x.png"):
    Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return Dataset.from_list([{"id": "1", "image": str(tmp_path / name), "turns": turns}], features=TRAIN_FEATURES)


def test_prompts_are_known_by_what_the_model_reads(tmp_path: Path):
    here = PromptRows(rows(tmp_path), Encoding(None)).fingerprint()
    same = (rows(tmp_path, answer="blue"), rows(tmp_path, name="moved.png"))
    assert {PromptRows(found, Encoding(None)).fingerprint() for found in same} == {here}
    others = [
        PromptRows(rows(tmp_path, question="Where?"), Encoding(None)),
        PromptRows(rows(tmp_path), Encoding(None, geometry="crop")),
        PromptRows(rows(tmp_path), Encoding(None, max_pixels=10)),
    ]
    prints = {found.fingerprint() for found in others}
    prints.add(PromptRows(rows(tmp_path, colour="blue"), Encoding(None)).fingerprint())  # the same name, other bytes
    assert len(prints | {here}) == 5
