"""Whatever a file of weights holds instead of weights, it is one line that names the file."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from llava_cmoe.backbones.conversion import _load_projector, _safetensors
from llava_cmoe.backbones.feature_store import _kept
from llava_cmoe.backbones.loading import BackboneError, load_backbone, load_processor
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.registry.schema import FileRecord, RegistryError
from llava_cmoe.registry.tensor_files import read_tensors
from llava_cmoe.settings.backbone import BackboneSettings

WHOLE = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)})


def with_header(header: object, body: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: object = "F32", shape: object = (6,), offsets: object = (0, 24)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGED = {
    "nothing": b"",
    "one byte": b"x",
    "text": b"these are no weights\n" * 9,
    "markup": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a pickle": b"\x80\x02}q\x00.",
    "an archive": b"PK\x03\x04" + b"\0" * 60,
    "cut": WHOLE[:-5],
    "cut in the header": WHOLE[:20],
    "more behind": WHOLE + b"x",
    "header of all": struct.pack("<Q", 2**64 - 1) + WHOLE[8:],
    "header of half": struct.pack("<Q", 2**63) + WHOLE[8:],
    "header of much": struct.pack("<Q", 10**8 + 1) + WHOLE[8:],
    "header too long": struct.pack("<Q", len(WHOLE)) + WHOLE[8:],
    "header too short": struct.pack("<Q", 3) + WHOLE[8:],
    "no header": struct.pack("<Q", 0),
    "no JSON": with_header(b"not json at all"),
    "no text": with_header(b"\xff\xfe\xfd"),
    "a list": with_header([1, 2]),
    "deep": with_header(b"[" * 50_000),
    "no dtype": with_header(entry(dtype="F33")),
    "a number as dtype": with_header(entry(dtype=3)),
    "negative shape": with_header(entry(shape=(-6,))),
    "huge shape": with_header(entry(shape=(2**63, 2**63))),
    "another shape": with_header(entry(shape=(7,))),
    "offsets beyond": with_header(entry(offsets=(0, 2400))),
    "offsets backwards": with_header(entry(offsets=(24, 0))),
    "offsets negative": with_header(entry(offsets=(-1, 23))),
    "a hole": with_header(entry(shape=(4,), offsets=(8, 24))),
    "overlapping": with_header({**entry(), "b": entry()["a"]}),
    "a tensor of text": with_header({"a": "b"}),
}
ANY = (
    st.sampled_from(sorted(DAMAGED)).map(DAMAGED.__getitem__)
    | st.binary(max_size=40)
    | st.builds(
        lambda at, byte: WHOLE[:at] + bytes([byte ^ WHOLE[at]]) + WHOLE[at + 1 :],
        st.integers(0, 60),
        st.integers(1, 255),
    )
)


def one_line(error: BaseException, path: Path) -> None:
    assert str(path) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 500 + len(str(path))


@pytest.fixture(scope="module")
def folder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_backbone, tmp_path_factory.mktemp("damaged") / "backbone"))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_backbone_is_refused(folder: Path, kind: str):
    (folder / "model.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(BackboneError) as raised:
        load_backbone(BackboneSettings(path=str(folder)))
    one_line(raised.value, folder)


def read_parts(path: Path) -> None:
    _safetensors(path.parent)


def read_learned(path: Path) -> None:
    """As of a run whose every hash is right."""
    read_tensors(path.parent, {path.name: FileRecord(sha256=fingerprint_file(path), bytes=path.stat().st_size)})


@pytest.mark.parametrize("read", [read_parts, read_learned, _load_projector])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=ANY)
def test_other_readers_refuse_it_too(tmp_path: Path, read: Callable[[Path], object], content: bytes):
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    try:
        read(path)
    except (BackboneError, RegistryError) as error:
        one_line(error, path)


@pytest.mark.parametrize("kind", DAMAGED)
def test_kept_features_that_are_damaged_are_read_anew(tmp_path: Path, kind: str):
    (tmp_path / "some.safetensors").write_bytes(DAMAGED[kind])
    assert _kept(tmp_path / "some.safetensors") is None


@pytest.mark.parametrize("read", [read_parts, _load_projector])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path, read: Callable[[Path], object]):
    (tmp_path / "some.safetensors").mkdir()
    with pytest.raises(BackboneError) as raised:
        read(tmp_path / "some.safetensors")
    one_line(raised.value, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"text", b"[]", b"null", b"3", b'"a"', b"{", b"\xff\xfe", b"[" * 50_000, b'{"a": ' * 50_000]
)
def test_a_broken_file_beside_the_weights_is_refused_or_not_needed(
    tiny_backbone: Path, tmp_path: Path, name: str, content: bytes
):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "backbone"))
    (folder / name).write_bytes(content)
    try:
        load_processor(str(folder))
    except BackboneError as error:
        one_line(error, folder)


def edited(**changes: object) -> Callable[[Path], None]:
    """Change config.json: `text_config__hidden_size=-1`."""

    def edit(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            *outer, last = key.split("__")
            inner = document
            for name in outer:
                inner = inner[name]
            inner[last] = value
        (folder / "config.json").write_text(json.dumps(document))

    return edit


def sharded(index: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(index)

    return edit


UNFIT = [
    *(edited(text_config__hidden_size=value) for value in (64, -4, "a", 1.5, None, [1])),
    *(edited(text_config__vocab_size=value) for value in (3, -1, 10**15)),
    *(edited(text_config__num_attention_heads=value) for value in (7, 0)),
    *(edited(vision_config=value) for value in ([1], "a", 3)),
    edited(text_config__hidden_act="nope"),
    *map(sharded, (b"", b"[]", b"null", b"{}", b"\xff", b'{"weight_map": {}}', b'{"weight_map": 3, "metadata": 3}')),
    sharded(b'{"weight_map": {"a": "gone.safetensors"}, "metadata": {}}'),
    sharded(b"[" * 50_000),
]


@pytest.mark.parametrize("edit", UNFIT, ids=range(len(UNFIT)))
def test_what_does_not_belong_together_is_refused(tiny_backbone: Path, tmp_path: Path, edit: Callable[[Path], None]):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "backbone"))
    edit(folder)
    with pytest.raises(BackboneError) as raised:
        load_backbone(BackboneSettings(path=str(folder)))
    one_line(raised.value, folder)
