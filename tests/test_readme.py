"""The README's commands and examples run, in its order, on small data, with small sizes where it has large ones."""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import train
from conftest import ROOT, run_script
from model import FastSCNN

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {"train.py": train.main, "eval.py": evaluation.main, "data.py": data.main}
# What is not run here, and where it is.
ELSEWHERE = {
    "bash run.sh": "CI's own job; minutes",
    "bash run.sh test": "this suite",
    "python3 -m venv cpu && . cpu/bin/activate": "needs a network",
    "python tests/kills.py --kills 50 --seed 1": "tests/test_reliability.py runs what it runs",
    "python tests/kills.py --kills 20 --processes 2 --seed 2": "the same",
    "python tests/fuzz.py --count 20000 --only images labels classes": "tests/test_fuzz.py runs less of it",
    "python tests/fuzz.py --count 3000 --only checkpoints commands kernels": "the same",
}
SMALL_TRAINING = ("--epochs 1 --batch-size 4 --crop-size 64 96 --workers 0 --val-every 1 --device cpu --amp off").split()


def commands():
    """The commands of the README's indented blocks, without their comments, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", TEXT)
    lines = [line[4:] for line in text.splitlines() if re.match(r" {4}(python|torchrun|bash|\. |cp|mkdir|git) ?", line)]
    return [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]


@pytest.fixture
def project(tmp_path, drawn, folder_dataset, monkeypatch):
    """A folder with the project's files and small data under the names that the README uses."""
    home = tmp_path / "project"
    home.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "runs", "datasets"):
            (home / path.name).symlink_to(path)
    shutil.copytree(drawn, home / "datasets/cityscapes")
    shutil.copytree(drawn, home / "datasets/streets")
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(drawn / kind / "val", home / "datasets/cityscapes" / kind / "test")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(4):
            for folder, array in (
                (split, rng.integers(0, 256, (72, 96, 3), np.uint8)),
                (f"{split}annot", rng.integers(0, 12, (72, 96), np.uint8)),
            ):
                path = home / "datasets/camvid" / folder / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    shutil.copytree(folder_dataset, home / "mine")
    (home / "PHOTOS").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(home / f"PHOTOS/{i}.jpg")
    for name, classes in (("runs", data.CITYSCAPES), ("runs/camvid", data.CAMVID)):
        model = FastSCNN(len(classes.names))
        (home / name / "checkpoints").mkdir(parents=True)
        content = {"model": model.state_dict(), "model_args": model.args, "classes": classes.to_dict(), "epoch": 1}
        torch.save(content, home / name / "checkpoints/best_model.pth")
        shutil.copy(home / name / "checkpoints/best_model.pth", home / "W")
    shutil.copy(home / "runs/checkpoints/best_model.pth", home / "W")
    monkeypatch.chdir(home)
    return home


def small(words):
    """The program, its arguments and the number of processes of a command, small enough for a test."""
    words, processes = list(words), 1
    if words[0] == "bash":
        words = {"train": ["train.py"], "eval": ["eval.py"], "bench": ["eval.py", "--benchmark"]}[words[2]] + words[3:]
    elif words[0] == "torchrun":
        processes = 2
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    else:
        words = words[1:]
    program, args = words[0], words[1:]
    if program == "train.py":
        args += SMALL_TRAINING + (["--benchmark", "2"] if "--benchmark" in args else [])
    elif program == "eval.py":
        args += ["--device", "cpu", "--workers", "0"]
        if "--benchmark" in args:
            args += ["--size", "64", "96", "--repeats", "1", "--warmup", "0"]
            if "--against" in args:
                args += ["--against", "eager"]
        args = ["model.pt2" if word == "model.onnx" else word for word in args]
    return program, args, processes


def test_every_command_runs(project):
    found = commands()
    assert len(found) > 25
    for command in found:
        if command in ELSEWHERE or command.startswith((". ", "git ")):
            continue
        words = shlex.split(command)
        if words[0] in ("cp", "mkdir"):
            subprocess.run(words, check=True)
            continue
        program, args, processes = small(words)
        if "VIDEO.mp4" in args:
            if not shutil.which("ffmpeg"):
                continue
            subprocess.run(
                [*"ffmpeg -v error -y -f lavfi -i testsrc=size=96x64:rate=5:duration=1".split(), "VIDEO.mp4"], check=True
            )
        if processes > 1:
            done = run_script(program, *args, processes=processes, cwd=project)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = evaluation.exit_status(program, lambda: PROGRAMS[program](args))  # noqa: B023
        assert status == 0, f"{command}\n{errors.getvalue()}"


def test_commands_in_the_text_have_flags_that_there_are():
    for command in re.findall(r"`((?:python |torchrun )?(?:train|eval)\.py [^`]*)`", TEXT):
        words = shlex.split(command)
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
        parser = (train if words[0] == "train.py" else evaluation).get_args_parser()
        known = {flag for action in parser._actions for flag in action.option_strings}
        unknown = [word for word in words if word.startswith("--") and word not in known]
        assert not unknown, command


def test_flags_in_the_text_are_flags():
    known = set()
    for parser in (train.get_args_parser(), evaluation.get_args_parser()):
        known |= {flag for action in parser._actions for flag in action.option_strings}
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max-restarts", "--index-url"}
    others |= {"--help", "--sheet", "--splits", "--rows", "--kills", "--processes", "--count", "--only", "--seed"}
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - known - others
    assert not unknown


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_examples_run(project, code):
    """As a script in a folder with copies of what it imports, as somebody would paste it."""
    shutil.copy(project / "PHOTOS/0.jpg", project / "street.png")
    shutil.copy(ROOT / "weights/camvid.pth", project / "best_model.pth")
    (project / "example.py").write_text(code)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(project / "example.py"))


def test_files_in_the_text_are_there():
    for name in re.findall(r"\]\((assets/[^)]+)\)|`((?:tests|weights|ops_ext)/[\w./]+)`", TEXT):
        assert (ROOT / (name[0] or name[1])).exists(), name


@pytest.mark.parametrize("flag", ["help", "-h", "--help"])
def test_run_sh_says_what_it_can_do(flag, tmp_path):
    done = subprocess.run(["bash", ROOT / "run.sh", flag], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "relative to the folder" in done.stdout
    assert all(f"bash run.sh {command}" in done.stdout for command in ("test", "train", "eval", "bench", "help"))
    assert "#" not in done.stdout and "set -" not in done.stdout


def test_run_sh_runs_a_command(project):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    flags = "--weights weights/camvid.pth --predict PHOTOS --out runs/photos --device cpu".split()
    done = subprocess.run(
        ["bash", "run.sh", "eval", *flags], capture_output=True, text=True, timeout=300, env=environment, cwd=project
    )
    assert done.returncode == 0, done.stderr
    assert len(list((project / "runs/photos").iterdir())) == 2
