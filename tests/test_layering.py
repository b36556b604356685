"""Who may know whom, read from the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quamba.models import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "kernels" / "quamba_kernels").rglob("*.py"))
TOOLKIT = sorted((ROOT / "quamba").rglob("*.py"))
FILES = [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in KERNELS + TOOLKIT]
MODELS = ROOT / "quamba" / "models"


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "."} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def strings(path: Path) -> set[str]:
    """Every string in the code that is no docstring or bare text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in bare)
    return {n.value for n in constants if isinstance(n.value, str)}


def test_there_is_something_to_look_at() -> None:
    assert len(KERNELS) > 10 and len(TOOLKIT) > 30


@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in KERNELS])
def test_kernels_know_only_torch_and_triton(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "triton", "filelock", "quamba_kernels", "."}


def test_kernels_import_without_the_toolkit() -> None:
    code = "import sys, quamba_kernels, quamba_kernels.testing; print([m for m in sys.modules if m.split('.')[0] in " \
           "('quamba', 'transformers', 'pydantic')])"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "kernels")}
    )
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in TOOLKIT])
def test_only_modules_and_formats_call_ops(path: Path) -> None:
    allowed = {"modules", "formats", "linear_attention"}
    if path.parent.name not in allowed:
        assert "quamba_kernels.ops" not in imports(path) - {"quamba_kernels.ops.Activation"} or not re.search(
            r"\bops\.[a-z_0-9]+(\.bind)?\(", path.read_text(encoding="utf-8")
        )


@pytest.mark.parametrize("path", FILES)
def test_only_descriptions_name_model_types(path: Path) -> None:
    if path.is_relative_to(MODELS) or path.is_relative_to(ROOT / "quamba" / "cli"):
        return  # a command's help may name an example
    if path == ROOT / "quamba" / "linear_attention" / "configs.py":
        return  # transformers learns these types from there
    assert not strings(path) & set(ARCHITECTURES)
    assert not imports(path) & {f"quamba.models.{name}" for name in ARCHITECTURES}


@pytest.mark.parametrize("path", FILES)
def test_no_branch_on_a_model_type(path: Path) -> None:
    branch = r"\b(if|elif|case|match)\b[^\n]*model_type\s*(==|in\s*[\(\[{])"
    assert not re.search(branch, path.read_text(encoding="utf-8"))


OWNERS = {"quamba/modules/site.py", "quamba/modules/embedding.py", "quamba/modules/conv.py", "quamba/recipe.py"}
"""Files whose own ActivationSpec or StorageSpec has the bits."""


@pytest.mark.parametrize("path", FILES)
def test_bits_are_looked_at_by_their_owner_alone(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() not in OWNERS:
        assert not re.search(r"\bbits\s*(==|!=|<|>|in\b)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES)
def test_files_have_names_and_sizes(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common", "base"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES)
def test_no_bare_except(path: Path) -> None:
    handlers = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


def test_packages_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "tests" / "__init__.py").exists()


def test_every_backend_file_serves_something() -> None:
    from quamba_kernels import OPS, backends

    serving = {b.fn.__module__.rpartition(".")[2] for op in OPS.values() for b in op.backends}
    assert set(backends.NAMES) == serving


def test_every_description_is_found() -> None:
    files = {p.stem for p in MODELS.glob("*.py")} - {"__init__", "linear_attention", "parts", "spec"}
    assert len(ARCHITECTURES) == len(files) and all(arch.tiny for arch in ARCHITECTURES.values())
