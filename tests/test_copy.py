"""model.py, data.py and ops_ext each work when copied alone into another project; run.sh knows its commands."""

import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from ops_ext import compiler

USES = {
    "model.py": (  # the lines of its docstring, with a file of 5 classes
        "import torch, model; from model import *; network = FastSCNN(5)\n"
        "torch.save({'model': network.state_dict(), 'model_args': network.args}, 'best_model.pth')\n"
        "exec('\\n'.join(line.strip() for line in model.__doc__.splitlines() if line.startswith('    ')))\n"
        "assert labels.shape == (1, 360, 480); print(model.args['num_classes'])"
    ),
    "data.py": "import torch, data; print(data.normalise(torch.zeros(1, 4, 4, 3, dtype=torch.uint8)).shape[1] + 2)",
    "ops_ext": "import torch, ops_ext; print(int(ops_ext.upsample_argmax(torch.zeros(1, 5, 4, 4), (8, 8)).sum()) + 5)",
}


@pytest.mark.parametrize("name", USES)
def test_works_alone(tmp_path, name):
    if name == "ops_ext":
        try:
            compiler.load("cpu")  # of which the copy's first use would else say that it compiles
        except compiler.BuildError as error:
            pytest.skip(f"without kernels there is a warning: {error}")
    (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "-c", USES[name]], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")
