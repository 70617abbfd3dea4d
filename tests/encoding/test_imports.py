"""The encoding layer works alone: it needs torch and numpy, and no other part of fedq."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import numpy, torch
before = set(sys.modules)
import fedq.encoding
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(loaded | {name for name in sys.modules if name.startswith("fedq.")}))
print(*sorted({"hydra", "omegaconf", "rich", "tensorboard", "matplotlib", "h5py", "mlxtend", "hypothesis"} &
              set(sys.modules)))
"""


def test_needs_torch_and_numpy_only() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], cwd=root, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    loaded, forbidden = run.stdout.splitlines()
    assert forbidden == ""
    others = {name for name in loaded.split() if not name.startswith(("fedq.encoding", "numpy", "torch", "_cython"))}
    assert others == {"fedq", "fedq.errors", "fedq.keys"}
