"""The shape of the code base: which way imports run, and how big things may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# Left of an arrow may be imported by right, never the reverse.
LAYERS = ["ops", "nn", "models", "parallel", "ckpt", "train", "cli"]
ALLOWED = {
    "core": {"core"},
    "data": {"core", "data"},
    "optim": {"core", "ops", "optim"},
    "monitor": {"core", "monitor"},
    # Loading a model for use also needs its tokenizer.
    "ckpt": {"core", "ops", "nn", "models", "parallel", "ckpt", "data"},
    "plan": {"core", "ops", "nn", "models", "parallel", "optim", "plan"},
    "train": {"core", "ops", "nn", "models", "parallel", "ckpt", "data", "optim", "train"},
}
for position, layer in enumerate(LAYERS[:4]):
    ALLOWED[layer] = {"core", *LAYERS[: position + 1]}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "trinity").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
TOOLS_AND_TESTS = sorted((ROOT / "tools").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))


def _imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    imported = _imports(ast.parse(path.read_text()))
    if parts[0] == "kernels":
        assert not {name for name in imported if name.split(".")[0] == "trinity"}
        return
    package = parts[1].removesuffix(".py")
    if package not in ALLOWED:  # the package's own __init__, __main__ and cli may see everything
        return
    seen = {name.split(".")[1] for name in imported if name.startswith("trinity.")}
    assert seen <= ALLOWED[package], f"{path.name} imports {sorted(seen - ALLOWED[package])}"


@pytest.mark.parametrize("path", SOURCES + TOOLS_AND_TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


def test_cuda_is_asked_for_in_one_place_only() -> None:
    offenders = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if "cuda.is_available" in path.read_text() and path.name != "runtime.py"
    ]
    assert offenders == []


# The tokenizers library raises a bare Exception for every damaged file.
BROAD_EXCEPT_ALLOWED = {"trinity/data/tokenizer.py"}


def test_no_broad_except() -> None:
    for path in SOURCES:
        if str(path.relative_to(ROOT)) in BROAD_EXCEPT_ALLOWED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, path


def test_folder_of_kernels_does_not_take_the_name_of_a_package() -> None:
    """Hugging Face publishes `kernels`; ours must not shadow it (no __init__.py at the top)."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_functions_and_classes_have_docstrings() -> None:
    missing = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            is_public = isinstance(
                node, ast.FunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if is_public and ast.get_docstring(node) is None and not _is_nested(path, node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert missing == []


def _is_nested(path: Path, wanted: ast.FunctionDef | ast.ClassDef) -> bool:
    """Functions inside functions, and methods of private or autograd classes, are not public."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.ClassDef)
            and (node.name.startswith("_") or any("Function" in ast.unparse(b) for b in node.bases))
        ):
            for inner in ast.walk(node):
                if inner is not node and getattr(inner, "lineno", -1) == wanted.lineno:
                    return True
    return False
