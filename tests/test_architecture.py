"""The house keeps its shape: rooms import one way, the top level is fixed, nothing unsafe is loaded."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_cmoe"
TOP_LEVEL = {
    *(".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"),
    *("data_configs", "docs", "eval", "llava_cmoe", "tests", "train", "zero_configs"),
}
ORDER = (
    *("settings", "provenance", "records", "locators", "data", "pocket", "backbones", "experts", "methods", "training"),
    *(
        "registry",
        "evaluation",
        "planning",
        "report",
        "runs",
        "sequence",
        "merging",
        "analyses",
        "chat",
        "serve",
        "export",
        "api",
        "studies",
    ),
    "cli",
)
"""Rooms and single files of the package; each imports only from those before it."""

PROJECTOR_READER = PACKAGE / "backbones" / "conversion.py"
"""The only file that reads a pickle, and only what `weights_only` lets through."""

LONGEST, LONGEST_SEQUENCE, MEDIAN = 350, 150, 110
"""Lines of a file of the library, of `sequence.py`, and of the file in the middle."""

OF_CMOE = {
    *("merging/search.py", "analyses/probe_report.py", "analyses/refit_locator.py"),
    *("analyses/speed_variants.py", "analyses/answering_speed.py"),
}
"""The tools that are CMoE's own: they merge its pool, probe, refit its locator, and time it."""

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for folder in ("train", "eval") for path in (ROOT / folder).glob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package's own modules, wherever it stands in a file."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the package in full"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "llava_cmoe"
                else [str(node.module)]
            )
        for name in names:
            if name.startswith("llava_cmoe."):
                yield node.lineno, name.split(".")[1]


def unsafe(tree: ast.Module) -> Iterator[str]:
    """What could run a stranger's code, or swallow an error."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords) if not any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in keywords
            ):
                yield f"line {node.lineno}: torch.load of whatever is in the file"
            case ast.Import(names=names) if any(
                name.name.split(".")[0] in ("pickle", "dill", "joblib") for name in names
            ):
                yield f"line {node.lineno}: imports a pickle"
            case ast.ImportFrom(module=("pickle" | "dill" | "joblib")):
                yield f"line {node.lineno}: imports a pickle"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield f"line {node.lineno}: torch.load"
            case ast.ImportFrom(module="torch", names=names) if any(name.name == "load" for name in names):
                yield f"line {node.lineno}: torch.load"
            case ast.keyword(arg="trust_remote_code", value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                yield f"line {node.value.lineno}: trust_remote_code"
            case ast.ExceptHandler(type=(None | ast.Name(id=("Exception" | "BaseException")))):
                yield f"line {node.lineno}: a broad except"


def test_the_top_level_holds_what_the_design_says_and_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {line.split("/")[0] for line in listed} <= TOP_LEVEL


def test_every_room_has_its_place_in_the_order():
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(ORDER)


@named(MODULES)
def test_imports_point_to_earlier_rooms_only(path: Path):
    room = room_of(path)
    allowed = {"api"} if room == "__init__" else {*ORDER[: ORDER.index(room)], room}
    assert [found for found in imported_rooms(tree_of(path)) if found[1] not in allowed] == []


def methods_asked_for(tree: ast.Module) -> Iterator[str]:
    """Where code asks which method it serves: by a method's module or settings, by its name, by its private parts."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if re.fullmatch(
                r"llava_cmoe\.methods\.(?!base$|catalogue$)\w+|llava_cmoe\.settings\.methods\.\w+", module
            ):
                yield f"line {node.lineno}: imports {module}"
            case ast.Compare(left=left, comparators=others) if any(
                ast.unparse(side).endswith("method.name") for side in (left, *others)
            ):
                yield f"line {node.lineno}: compares a method's name"
            case ast.Attribute(value=ast.Attribute(attr="method"), attr=attr) if attr.startswith("_"):
                yield f"line {node.lineno}: a method's private {attr}"
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[asked, *_]) if ast.unparse(asked).endswith(
                "method"
            ):
                yield f"line {node.lineno}: asks a method what it has"


@named([path for path in (*MODULES, *SCRIPTS) if not {"methods"} & set(path.relative_to(ROOT).parts)])
def test_nobody_asks_which_method_it_serves(path: Path):
    name = path.relative_to(ROOT).as_posix().removeprefix("llava_cmoe/")
    assert name in OF_CMOE or list(methods_asked_for(tree_of(path))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from llava_cmoe.methods.cmoe import Cmoe",
        "from llava_cmoe.settings.methods.cmoe import CmoeSettings",
        "recipe.method.name == 'cmoe'",
        "run.method._learning",
        "getattr(run.method, 'host', None)",
    ],
)
def test_the_check_sees_who_asks(line: str):
    assert list(methods_asked_for(ast.parse(line)))


def test_files_fit_in_the_head():
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: num for name, num in lines.items() if num > LONGEST} == {}
    assert lines["sequence.py"] <= LONGEST_SEQUENCE
    assert median(lines.values()) < MEDIAN


def test_no_file_is_imported_by_what_it_imports():
    order = list(
        TopologicalSorter({path: imported_files(path) for path in MODULES}).static_order()
    )  # raises at a circle
    assert set(order) == set(MODULES)


def imported_files(path: Path) -> set[Path]:
    """The package's files that a file imports, wherever the import stands in it."""
    found: set[Path] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llava_cmoe"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                place = PACKAGE.parent.joinpath(*name.split("."))
                found |= {one for one in (place.with_suffix(".py"),) if one.exists()}
    return found - {path}


@named([*MODULES, *SCRIPTS])
def test_every_file_says_its_job(path: Path):
    assert ast.get_docstring(tree_of(path))


@named([*MODULES, *SCRIPTS])
def test_nothing_unsafe_is_loaded_and_no_error_is_swallowed(path: Path):
    found = [line.partition(": ")[2] for line in unsafe(tree_of(path))]
    assert found == (["imports a pickle", "torch.load"] if path == PROJECTOR_READER else [])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=given)",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception:\n    pass",
    ],
)
def test_the_check_sees_what_is_unsafe(line: str):
    assert list(unsafe(ast.parse(line)))


def test_the_check_sees_an_import_inside_a_function():
    tree = ast.parse("def f():\n    from llava_cmoe.methods.base import Method\n    from llava_cmoe import cli")
    assert list(imported_rooms(tree)) == [(2, "methods"), (3, "cli")]


def test_scripts_are_no_packages_and_hide_no_installed_module():
    assert not [path for path in (ROOT / "train", ROOT / "eval") if (path / "__init__.py").exists()]
    hidden = sys.stdlib_module_names | packages_distributions().keys()
    assert [path.name for path in SCRIPTS if path.stem in hidden] == []


def test_every_test_file_lies_beside_what_it_tests():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders <= rooms and not list((ROOT / "tests").rglob("__init__.py"))


def test_whatever_the_package_takes_from_the_checkout_is_packed_into_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    packed = wheel["force-include"]
    assert all(
        target == f"llava_cmoe/_shipped/{source}" and (ROOT / source).is_dir() for source, target in packed.items()
    )
    taken = {
        node.args[0].value
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "shipped"
        if isinstance(node.args[0], ast.Constant)
    }
    assert taken and all(any(Path(path).is_relative_to(source) for source in packed) for path in taken)
