"""The program as a wheel, installed in another environment and used from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("fedq-*.whl")
    return path


def test_the_wheel_holds_every_module_and_every_option(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fedq").rglob("*.py")}
    options = {f"fedq/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert modules | options <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fedq"}


def test_the_installed_program_trains_in_another_folder(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment)  # pip also comes from this environment
    site = next((environment / "lib").glob("python*")) / "site-packages"
    # torch and the rest come from this environment: only fedq itself is installed anew
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python, work = environment / "bin" / "python", tmp_path / "work"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    work.mkdir()
    found = run(python, "-c", "import fedq.train; print(fedq.train.CONF)", cwd=work).strip()
    assert Path(found) == site / "fedq" / "conf"

    small = ("dataset=writers", "dataset.clients=4", "dataset.examples_per_client=5", "dataset.test_examples=20")
    brief = ("model=mlp", "run.rounds=2", "run.clients_per_round=2")
    out = run(environment / "bin" / "fedq-train", "encoder=uint8", *small, *brief, cwd=work)
    assert "bytes up" in out
    (folder,) = (path.parent for path in (work / "outputs").rglob("metrics.jsonl"))
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    assert "uint8" in run(environment / "bin" / "fedq-train", "--help", cwd=work)
    run(environment / "bin" / "fedq-compare", folder, cwd=work)
    assert (work / "compare.png").stat().st_size > 10_000
