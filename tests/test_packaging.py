"""A wheel of the project works away from the clone, and takes nobody else's top-level names."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"lm_zoo": "lm_zoo", "kernels": "lm_zoo.kernels", "train": "lm_zoo.train", "eval": "lm_zoo.eval"}
FOLDERS["configs"] = "lm_zoo.configs"

pytestmark = pytest.mark.xdist_group("wheel")  # one worker, so that the wheel is built once


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist", cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", str(wheel), "--no-deps", "--no-index",
        "--target", str(target), cwd=target)  # fmt: skip
    return target


def packages_in_the_tree() -> set[str]:
    """Every folder with an __init__.py, under the name that it is imported by."""
    return {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }


def test_pyproject_lists_every_package():
    assert set(SETTINGS["packages"]) == packages_in_the_tree()


def test_wheel_holds_every_module_and_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert expected - names == set()
    assert any(name.startswith("lm_zoo/configs/models/") for name in names), "no model presets in the wheel"


def test_wheel_takes_only_its_own_name(installed):
    tops = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"lm_zoo", "bin"}


def test_installed_wheel_imports_without_the_clone(installed):
    names = sorted(SETTINGS["packages"])
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    files = run(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed)).split()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(installed) for file in files), files


def test_installed_wheel_has_the_command(installed):
    text = run(sys.executable, str(installed / "bin" / "lm-zoo"), "--help", cwd=installed, PYTHONPATH=str(installed))
    for command in ("train", "eval", "generate", "list"):
        assert command in text


def test_transformers_works_in_the_root_of_a_checkout():
    """There it finds the folder `kernels`, and Hugging Face has a package of that name."""
    code = "import transformers.modeling_utils, transformers.utils as u; print(u.is_kernels_available())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["False"], result.stderr
