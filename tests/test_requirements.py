"""What `make` installs can be installed: requirements and constraints agree for every Python that is promised."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
EXTRAS = ("lm", "data", "dev", "docs")  # of the Makefile


def test_every_extra_that_make_installs_is_resolved_for_every_python_that_is_promised():
    assert sorted(PROJECT["optional-dependencies"]) == sorted(EXTRAS)
    assert PYTHONS == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_oldest_versions_that_are_promised_are_those_that_are_tested():
    promised = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lm"]]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tested = [line.replace("==", ">=") for line in lines if not line.startswith("#")]
    assert "torch>=2.9.1" in tested
    assert set(tested) <= set(promised)
    assert set(PROJECT["dependencies"]) <= set(tested)


def test_what_make_test_fast_leaves_out_is_there():
    tests = Path(__file__).parent
    long = re.search(r"LONG = \((.*?)\)", (tests / "conftest.py").read_text(), re.DOTALL)[1]
    names = re.findall(r'"([^"]+)"', long)
    assert "lm/test_train.py" in names
    assert [name for name in names if not (tests / name).exists()] == []


@pytest.mark.parametrize(
    ("settings", "installed"),
    [
        ([], ['--editable ".[lm,data,dev]"']),
        (["TORCH_INDEX=https://example.org/cpu"],
         ["--no-deps --index-url https://example.org/cpu torch", '--editable ".[lm,data,dev]"']),
    ],
    ids=["default", "another index"],
)  # fmt: skip
def test_make_installs_under_the_constraints(settings, installed):
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", ".venv/.installed", *settings]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if "pip install" in line]
    assert [line.partition(" --constraint constraints.txt ")[2] for line in lines] == installed


def pip(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    environment = os.environ | {"PYTHONPATH": str(packages), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def a_new_pip(tmp_path_factory):
    """A pip of its own: those before 23.3 download what they resolve, gigabytes, even when told to install nothing."""
    folder = tmp_path_factory.mktemp("pip")
    done = pip(folder, "install", "--quiet", "--target", str(folder), "pip>=24")
    if done.returncode:
        pytest.skip(f"no package registry, so nothing can be resolved: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_requirements_can_be_resolved_under_the_constraints(python, a_new_pip, tmp_path):
    """Of wheels alone, and nothing is downloaded but what describes them."""
    resolve = [
        "install", "--quiet", "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--only-binary=:all:",
        "--target", str(tmp_path / "nothing"), "--python-version", python, "--implementation", "cp",
        *(f"--platform=manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)),
        "--platform", "manylinux2014_x86_64", "--platform", "linux_x86_64",
        "--constraint", str(ROOT / "constraints.txt"), "--find-links", str(tmp_path),
    ]  # fmt: skip
    report = tmp_path / "torch.json"
    done = pip(a_new_pip, *resolve, "--no-deps", "--report", str(report), "torch")
    assert done.returncode == 0, done.stderr
    (torch,) = read(report)
    stand_in_for_what_a_gpu_needs(torch["metadata"]["requires_dist"], tmp_path)
    requirements = [
        *PROJECT["dependencies"],
        *(name for extra in EXTRAS for name in PROJECT["optional-dependencies"][extra]),
    ]
    (tmp_path / "requirements.txt").write_text("\n".join(requirements))
    report = tmp_path / "all.json"
    done = pip(a_new_pip, *resolve, "--report", str(report), "--requirement", str(tmp_path / "requirements.txt"))
    assert done.returncode == 0, done.stderr
    found = {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in read(report)}
    assert found["torch"].partition("+")[0] == "2.13.0"
    assert {"numba", "triton", "transformers", "datasets", "peft", "mkdocs-material"} <= found.keys()


def read(report: Path):
    return json.loads(report.read_text())["install"]


def stand_in_for_what_a_gpu_needs(requirements: list[str], folder: Path) -> None:
    """Empty wheels of NVIDIA's libraries, which torch names by their exact versions and nobody else asks for.

    They are gigabytes, and not every mirror has them.
    """
    for requirement in requirements:
        match = re.match(r"((?:nvidia|cuda)[\w-]*)(?:\[[^]]*\])?[^;=>]*(?:==|>=)([\d.]+)", requirement)
        if match is None:
            continue
        name, version = match[1].replace("-", "_"), f"{match[2]}+empty"  # preferred to the same version without "+"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
