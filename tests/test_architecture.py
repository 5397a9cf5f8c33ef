"""The imports run one way, and what the documents name is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "senticlip"
FILES = {".".join(path.relative_to(HOUSE).with_suffix("").parts): path for path in HOUSE.rglob("*.py")}
DOCUMENTS = [*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]

LEVELS = [
    {"structures", "config", "configfile", "runtime", "progress", "metrics", "files", "pages"},
    {"data", "encoders", "losses"},
    {"models"},
    {"sources", "checkpoint", "card", "tables"},
    {"predictor", "precision", "compiled", "export", "quantize"},
    {
        "trainee",
        "fit",
        "train",
        "evaluate",
        "features",
        "answers",
        "manifest",
        "cluster",
        "crashes",
        "speech",
        "dialogue",
        "analyze",
    }
    | {"bulk", "cut", "cam", "occlusion", "explain", "explain_set", "middleware", "serve"},
    {"layout", "results", "reproduce", "pretrain", "demo"},
    {"arguments", "cli", "__main__"},
]
"""Who may import whom: one's own level, and those before it (docs/architecture.md)."""

OPENS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "load", "memmap"}


def room(module: str) -> str:
    """The first part of a module's name below senticlip."""
    return module.split(".")[0]


def level(module: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if room(module) in rooms)


def imports(module: str, tree: ast.AST | None = None) -> set[str]:
    """All modules that a file imports, also inside functions: ours as ``data.video``, others with a colon."""
    found = set()
    for node in ast.walk(tree or ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            inside = name.removeprefix("senticlip.").split(".")
            if not name.startswith("senticlip."):
                found.add(f":{name}")
            elif inside[0] in {room(each) for each in FILES} | {"data", "encoders", "models"}:
                found.add(".".join(inside))
    return found


def test_every_file_has_its_level():
    rooms = {room(module) for module in FILES} - {"__init__"}
    assert rooms == set().union(*LEVELS)
    assert sum(map(len, LEVELS)) == len(rooms)


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"__init__"}))
def test_imports_run_one_way(module):
    inside = {name for name in imports(module) if not name.startswith(":")}
    upwards = {name for name in inside if level(name) > level(module)}
    if room(module) in ("data", "encoders", "losses"):  # beside each other, but none knows the others
        upwards |= {name for name in inside if level(name) == level(module) and room(name) != room(module)}
    assert not upwards, f"{module} must not import {sorted(upwards)}"


def test_data_knows_no_model_and_models_read_no_data():
    for module in FILES:
        rooms = {room(name) for name in imports(module)}
        if room(module) == "data":
            assert rooms.isdisjoint({"models", "encoders", "predictor", ":transformers", ":timm"}), module
        if room(module) == "models":
            assert "data" not in rooms, module


@pytest.mark.parametrize("module", sorted(m for m in FILES if room(m) == "models" and m != "models.base"))
def test_models_read_no_file(module):
    """Only the base does, its own checkpoint."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}
    assert names.isdisjoint(OPENS)


@pytest.mark.parametrize("module", ["structures", "config", "cli"])
def test_what_the_command_line_starts_with_has_no_torch(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    loaded = [node for node in tree.body if not isinstance(node, (ast.If, ast.FunctionDef))]
    heavy = {":torch", ":transformers", ":timm", ":numpy"}
    assert not heavy & {room(name) for name in imports(module, ast.Module(loaded, []))}
    if module != "cli":  # its verbs may: they are at work by then
        guards = [node for node in tree.body if isinstance(node, ast.If)]
        assert all(isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" for node in guards)
        functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert not heavy & {room(name) for name in imports(module, ast.Module(functions, []))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_linked_exists(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def defined(path: Path, name: str) -> bool:
    """Whether a file defines ``name``, ``Class`` or ``Class.method``."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        here = [node for node in body if part == getattr(node, "name", None)]
        if not here:
            return False
        body = getattr(here[0], "body", [])
    return True


def test_every_symbol_and_test_of_the_equations_exists():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    code = re.findall(r"`((?!tests/)[\w/]+\.py):?([\w.]*)`", text)
    tests = re.findall(r"`(tests/[\w/]+\.py)::([\w.]+)`", text)
    assert len(code) > 40
    assert len(tests) > 40
    for folder, names in ((HOUSE, code), (ROOT, tests)):
        for file, name in names:
            assert (folder / file).is_file(), file
            assert not name or defined(folder / file, name), f"{file}: {name}"


def test_the_architecture_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w/]+\.py)`", text) if (HOUSE / name).is_file()}
    there = {path.relative_to(HOUSE).as_posix() for path in FILES.values()}
    assert there - named == {"__init__.py", "data/__init__.py", "encoders/__init__.py"}
