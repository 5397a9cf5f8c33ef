"""Imports go one way, and the files and symbols that the documentation names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "senticlip"
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
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
"""A module may import modules of its own level and of the levels before it (docs/architecture.md)."""

FILE_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "load", "memmap"}


def component(module: str) -> str:
    """The first part of a module's name below senticlip."""
    return module.split(".")[0]


def level(module: str) -> int:
    return next(i for i, components in enumerate(LEVELS) if component(module) in components)


def imports(module: str, tree: ast.AST | None = None) -> set[str]:
    """All modules that a file imports, also inside functions: ours as ``data.video``, others with a colon."""
    modules = set()
    for node in ast.walk(tree or ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.removeprefix("senticlip.").split(".")
            if not name.startswith("senticlip."):
                modules.add(f":{name}")
            elif parts[0] in {component(each) for each in FILES} | {"data", "encoders", "models"}:
                modules.add(".".join(parts))
    return modules


def test_every_module_has_a_level():
    components = {component(module) for module in FILES} - {"__init__"}
    assert components == set().union(*LEVELS)
    assert sum(map(len, LEVELS)) == len(components)


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"__init__"}))
def test_imports_run_one_way(module):
    internal = {name for name in imports(module) if not name.startswith(":")}
    forbidden = {name for name in internal if level(name) > level(module)}
    if component(module) in ("data", "encoders", "losses"):  # on the same level, but none may import the others
        forbidden |= {
            name for name in internal if level(name) == level(module) and component(name) != component(module)
        }
    assert not forbidden, f"{module} must not import {sorted(forbidden)}"


def test_data_knows_no_model_and_models_read_no_data():
    for module in FILES:
        components = {component(name) for name in imports(module)}
        if component(module) == "data":
            assert components.isdisjoint({"models", "encoders", "predictor", ":transformers", ":timm"}), module
        if component(module) == "models":
            assert "data" not in components, module


@pytest.mark.parametrize("module", sorted(m for m in FILES if component(m) == "models" and m != "models.base"))
def test_models_open_no_files(module):
    """Only ``models/base.py`` does, for its own checkpoint."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    callees = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in callees}
    assert names.isdisjoint(FILE_CALLS)


@pytest.mark.parametrize("module", ["structures", "config", "cli"])
def test_command_line_starts_without_torch(module):
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    top_level = [node for node in tree.body if not isinstance(node, (ast.If, ast.FunctionDef))]
    heavy = {":torch", ":transformers", ":timm", ":numpy"}
    assert not heavy & {component(name) for name in imports(module, ast.Module(top_level, []))}
    if module != "cli":  # the functions of the verbs may import them
        guards = [node for node in tree.body if isinstance(node, ast.If)]
        assert all(isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" for node in guards)
        functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert not heavy & {component(name) for name in imports(module, ast.Module(functions, []))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_linked_files_exist(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def defines(path: Path, name: str) -> bool:
    """Whether a file defines ``name``, ``Class`` or ``Class.method``."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        matches = [node for node in body if part == getattr(node, "name", None)]
        if not matches:
            return False
        body = getattr(matches[0], "body", [])
    return True


def test_symbols_and_tests_in_equations_exist():
    text = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    code = re.findall(r"`((?!tests/)[\w/]+\.py):?([\w.]*)`", text)
    tests = re.findall(r"`(tests/[\w/]+\.py)::([\w.]+)`", text)
    assert len(code) > 40
    assert len(tests) > 40
    for folder, names in ((PACKAGE, code), (ROOT, tests)):
        for file, name in names:
            assert (folder / file).is_file(), file
            assert not name or defines(folder / file, name), f"{file}: {name}"


def test_architecture_page_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = {name for name in re.findall(r"`([\w/]+\.py)`", text) if (PACKAGE / name).is_file()}
    existing = {path.relative_to(PACKAGE).as_posix() for path in FILES.values()}
    assert existing - listed == {"__init__.py", "data/__init__.py", "encoders/__init__.py"}
