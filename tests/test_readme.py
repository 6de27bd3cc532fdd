"""The commands and examples of README.md and docs/ run, on small data, with small sizes where they have large ones."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import ROOT, run_script
from launch import exit_status
from model import CheckpointError, FastSCNN

TEXT = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
PROGRAMS = ["train.py", "eval.py"] + [f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py"))]
# What is not run here, and where it is.
ELSEWHERE = {
    "bash run.sh": "CI's own job; minutes",
    "python tests/kills.py --kills 50": "tests/test_reliability.py runs less of it",
    "python tests/kills.py --kills 20 --processes 2": "the same",
}
SMALL = {
    "train.py": "--epochs 1 --batch-size 4 --crop-size 64 96 --workers 0 --val-every 1 --device cpu --amp off",
    "eval.py": "--device cpu --workers 0",
    "tools/report.py": "--device cpu --workers 0",
    "tools/predict.py": "--device cpu",
    "tools/benchmark.py": "--device cpu --size 64 96 --repeats 1",
}


def module_of(program):
    """train.py or tools/check.py as a module."""
    return importlib.import_module(program.removesuffix(".py").replace("/", "."))


def commands():
    """The commands of the indented blocks, without their comments, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", TEXT)
    lines = [line[4:] for line in text.splitlines() if re.match(r" {4}(python|torchrun|bash) ", line)]
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
    shutil.copy(home / "runs/checkpoints/best_model.pth", home / "W")
    model = FastSCNN(19, variant="mmseg")
    torch.save({"model": model.state_dict(), "model_args": model.args}, home / "M")
    with av.open(str(home / "VIDEO.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=5, width=96, height=64, pix_fmt="yuv420p")
        for _ in range(3):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8))))
        video.mux(stream.encode())
    monkeypatch.chdir(home)
    return home


def small(command):
    """The program of a command, its arguments and its number of processes, small enough for a test."""
    words = shlex.split(command)
    if words[0] == "bash":
        name = {"train": "train.py", "eval": "eval.py", "bench": "tools/benchmark.py"}.get(
            words[2], f"tools/{words[2]}.py"
        )
        words = ["python", name, *words[3:]]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    program, args = words[at], words[at + 1 :]
    args += SMALL.get(program, "").split()
    if program == "tools/streets.py":
        args += ["--train", "2", "--val", "2", "--size", "64", "128"]
    if "--against" in args:
        args[args.index("--against") + 1 :] = ["eager", *SMALL[program].split()]
    return program, args, 2 if words[0] == "torchrun" else 1


def test_every_command_runs(project):
    found = commands()
    assert len(found) > 20
    for command in found:
        if command in ELSEWHERE:
            continue
        program, args, processes = small(command)
        if program == "train.py" and "--resume" not in args:  # a new run after that of an earlier command
            out = args[args.index("--out") + 1] if "--out" in args else "runs"
            for path in (project / out / "checkpoints").glob("[0-9]*.pth"):
                path.unlink()
        if program == "tools/streets.py":
            shutil.rmtree(project / "datasets/streets")
        if processes > 1:
            done = run_script(program, *args, processes=processes, cwd=project)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            continue
        main = module_of(program).main
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = exit_status(lambda: main(args), (data.DataError, CheckpointError))  # noqa: B023
        assert status == 0, f"{command}\n{errors.getvalue()}"


def test_flags_in_the_text_are_flags():
    known = {"--help", "--kills", "--processes"}  # the last two of tests/kills.py
    for program in PROGRAMS:
        parser = module_of(program).get_args_parser()
        known |= {flag for action in parser._actions for flag in action.option_strings}
    known |= {f"--{name}" for name in "standalone nproc_per_node nnodes rdzv_backend rdzv_endpoint rdzv_id".split()}
    known |= {"--max-restarts", "--logdir", "--shm-size"}  # of torchrun, TensorBoard and Docker
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - known


def test_tools_start_from_any_folder_and_as_modules(tmp_path):
    for command, folder in (([str(ROOT / "tools/check.py")], tmp_path), (["-m", "tools.check"], ROOT)):
        done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
    for program in PROGRAMS[2:]:
        text = (ROOT / program).read_text()
        assert "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in text or "from data" not in text, (
            program
        )


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_examples_run(project, code):
    """As a script in a folder with copies of what it imports, as somebody would paste it."""
    shutil.copy(project / "PHOTOS/0.jpg", project / "street.png")
    shutil.copy(ROOT / "weights/camvid.pth", project / "best_model.pth")
    (project / "example.py").write_text(code)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(project / "example.py"))


def test_files_in_the_text_are_there():
    for names in re.findall(r"\]\(((?:assets|docs)/[^)#]+)\)|`((?:tests|weights|ops_ext|tools|docs)/[\w./]+)`", TEXT):
        assert (ROOT / (names[0] or names[1])).exists(), names


def test_run_sh_says_what_it_can_do_and_runs_a_command(project):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*words):
        command = ["bash", str(ROOT / "run.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project)

    said = run("help")
    assert said.returncode == 0 and all(word in said.stdout for word in ("test", "train", "eval", "predict", "bench"))
    assert run("nonsense").returncode == 2
    flags = f"--weights weights/camvid.pth --out {project}/photos --device cpu".split()
    done = run("predict", str(project / "PHOTOS"), *flags)
    assert done.returncode == 0, done.stderr
    assert len(list((project / "photos").iterdir())) == 2
