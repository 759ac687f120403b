"""The wheel: one import package, with everything in it that the program needs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPED = ("exporters", "runtimes", "benchmarks")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built in a folder of its own, and quickly: its content is the question."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    command += [f"-Cbuild-dir={ROOT / 'build' / 'tests' / 'wheel'}"]
    command += ["-Ccmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("losa_deploy-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def python(code: str, installed: Path) -> str:
    """Run code that sees the unpacked wheel instead of the checkout (whose import hook -S leaves out)."""
    site = next(p for p in sys.path if p.endswith("site-packages"))
    start = f"import sys; sys.path[:0] = [{str(installed)!r}]; sys.path.append({site!r})\n"
    done = subprocess.run(
        [sys.executable, "-S", "-c", start + code],
        capture_output=True,
        text=True,
        check=False,
        cwd=installed,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_package_and_its_metadata(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"losa_deploy"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_source_file_and_data_file_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "losa_deploy").rglob("*.py")}
    for folder in MAPPED:
        expected |= {f"losa_deploy/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / folder).rglob("*.py")}
    for pattern in ("recipes/*.yaml", "data/*.txt", "py.typed", "_native.pyi"):
        found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "losa_deploy").glob(pattern)}
        assert found, pattern
        expected |= found
    assert not expected - names
    assert any(name.startswith("losa_deploy/_native.") and name.endswith((".so", ".pyd")) for name in names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_the_installed_wheel_works(installed: Path) -> None:
    code = (
        "import losa_deploy, numpy\n"
        "from losa_deploy import plugins\n"
        "from losa_deploy._native import mask_count\n"
        "from losa_deploy.verify.questions import evaluation_text, verification_prompts\n"
        "from losa_deploy.recipe import load_recipe, preset_names\n"
        "assert all(load_recipe(preset=name).preset == name for name in preset_names())\n"
        "assert evaluation_text('builtin') and verification_prompts()\n"
        "assert mask_count(numpy.array([255], numpy.uint8)) == 8\n"
        "assert plugins.load_exporter('onnx').name == 'onnx'\n"
        "assert [plugins.load_runtime(name).name for name in plugins.runtimes()]\n"
        "print(losa_deploy.__file__)"
    )
    assert Path(python(code, installed).strip()).parent == installed / "losa_deploy"


def test_the_bare_folder_names_stay_free(installed: Path) -> None:
    code = "import importlib.util\n" + "".join(
        f"assert importlib.util.find_spec({name!r}) is None\n" for name in MAPPED
    )
    python(code, installed)
