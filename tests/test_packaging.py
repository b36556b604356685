"""What an installed quamba holds: packages, recipes, sources, embedded files."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from quamba import embedded

ROOT = Path(__file__).resolve().parents[1]

# folder in the repository -> folder in the wheel
SHIPPED = {
    "quamba/bench": "quamba/bench",
    "quamba/embedded": "quamba/embedded",
    "recipes": "quamba/recipes",
    "csrc": "quamba_kernels/csrc",
}


def source_files(folder: str) -> list[str]:
    """Paths of the files under `folder` of the repository, relative to it; none if it does not exist."""
    top = ROOT / folder
    return sorted(
        path.relative_to(top).as_posix()
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that an old build/ folder cannot lend files."""
    tree = tmp_path_factory.mktemp("copy") / "tree"
    for folder in ("quamba", "kernels", "recipes", "csrc"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, symlinks=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Root of a wheel."""
    tmp = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp.glob("*.whl")
    return zipfile.Path(path)


def test_kernels_is_no_package() -> None:
    # transformers takes an importable `kernels` for the package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_only_our_packages(wheel: zipfile.Path) -> None:
    names = wheel.root.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"quamba", "quamba_kernels"}
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.mark.parametrize("folder", SHIPPED)
def test_wheel_holds_data(wheel: zipfile.Path, folder: str) -> None:
    expected = {f"{SHIPPED[folder]}/{name}" for name in source_files(folder)}
    assert expected
    assert expected <= set(wheel.root.namelist())


def test_source_distribution_holds_data_as_files(tree: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    for link in ("quamba/recipes", "kernels/quamba_kernels/csrc"):
        expected = {f"{link}/{name}" for name in source_files(Path(link).name)}
        assert expected and expected <= files


@pytest.mark.parametrize("parent, package", [(".", "quamba"), ("kernels", "quamba_kernels")])
def test_wheel_holds_every_module(wheel: zipfile.Path, parent: str, package: str) -> None:
    modules = {f"{package}/{name}" for name in source_files(f"{parent}/{package}") if name.endswith(".py")}
    assert f"{package}/__init__.py" in modules
    assert modules <= set(wheel.root.namelist())


def test_wheel_names_the_command(wheel: zipfile.Path) -> None:
    (entry,) = (name for name in wheel.root.namelist() if name.endswith("entry_points.txt"))
    assert "quamba = quamba.cli:app" in (wheel / entry).read_text()


@pytest.mark.parametrize("name", embedded.names())
def test_embedded_checkpoint(name: str) -> None:
    folder = embedded.checkpoint(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == name.split("-")[0].replace("mamba1", "mamba")
    assert config["vocab_size"] == 2048
    assert (folder / "model.safetensors").stat().st_size > 3_000_000
    assert (folder / "tokenizer.json").is_file()


def test_every_embedded_checkpoint_is_named() -> None:
    folders = {path.parent.name for path in (ROOT / "quamba" / "embedded").glob("*/config.json")}
    assert set(embedded.names()) == folders


def test_unknown_checkpoint_lists_the_known_ones() -> None:
    with pytest.raises(KeyError) as error:
        embedded.checkpoint("mamba3-tiny")
    assert all(name in str(error.value) for name in ["mamba3-tiny", *embedded.names()])


def test_embedded_texts_share_no_paragraph() -> None:
    calibration = embedded.calibration_text().read_text(encoding="utf-8").splitlines()
    validation = embedded.validation_text().read_text(encoding="utf-8").splitlines()
    assert len(calibration) > 500 and len(validation) > 400
    assert set(calibration).isdisjoint(validation)
    assert all(line.isascii() and line == line.strip() != "" for line in calibration + validation)
