"""A bounded part of tests/fuzz.py, and what its longer runs found."""

import os
import subprocess
import sys

import pytest

import eval as evaluation
import fuzz
from conftest import ROOT


@pytest.mark.parametrize(
    "kind, count", [("images", 400), ("labels", 400), ("checkpoints", 60), ("classes", 400), ("commands", 150)]
)
def test_broken_input_is_refused_or_read_right(tmp_path, kind, count):
    outcomes = {seed: fuzz.run_case(kind, seed, tmp_path) for seed in range(count)}
    failed = {seed: outcome for seed, outcome in outcomes.items() if outcome not in (fuzz.RIGHT, fuzz.REFUSED)}
    assert not failed, [fuzz.described(kind, seed, outcome) for seed, outcome in failed.items()]
    assert {fuzz.RIGHT, fuzz.REFUSED} == set(outcomes.values())  # or the mutations would reach nothing


def test_kernels_keep_inside_memory_whatever_their_arguments(capsys):
    try:
        fuzz.sanitizer_environment()
        fuzz.sanitized_library()
    except RuntimeError as error:  # no compiler, or one without sanitizers
        pytest.skip(str(error))
    outcomes, failures = fuzz.run_kind("kernels", 0, 30)
    assert not failures and outcomes.total() == 30


def test_a_crash_and_a_wrong_result_are_found_and_the_rest_goes_on(tmp_path, capsys):
    # A stand-in for the script, whose kind crashes at 3 and is wrong at 5.
    script = tmp_path / "fuzz.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport fuzz, random\n"
        "def case(rng, folder):\n"
        "    number = fuzz.current\n    fuzz.current += 1\n"
        "    if number == 3: os.abort()\n"
        "    fuzz.expect(number != 5, 'other pixels')\n"
        "    return fuzz.RIGHT\n"
        "fuzz.KINDS['images'], fuzz.__file__ = case, __file__\n"
        "fuzz.current = int(sys.argv[sys.argv.index('--seed') + 1])\n"
        "sys.exit(fuzz.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, script, "--only", "images", "--seed", "0", "--count", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED images 3: ended with status -6" in done.stdout and "FAILED images 5: other pixels" in done.stdout
    assert "python tests/fuzz.py --only images --seed 5 --count 1" in done.stdout
    assert '"tried": 8, "right": 6, "refused": 0, "failed": 2' in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--scales", "nan"), "--scales are nan, expected factors above 0, at most 16"),
        (("--scales", "1", "inf"), "--scales are 1.0 inf, expected"),
        (("--scales", "1e9"), "--scales are 1000000000.0, expected"),
        (("--scales", "0"), "--scales are 0.0, expected"),
        (("--window", "64", "99999999999999999999"), "--window is 64 99999999999999999999, expected at most 65536 pixels each"),
        (("--size", "1000000", "64"), "--size is 1000000 64, expected at most 65536 pixels each"),
        (("--workers", "1000000"), "--workers is 1000000, expected at most 1024"),
        (("--batch-size", "99999999999999999999"), "--batch-size is 99999999999999999999, expected at most 1000000"),
        (("--repeats", "2000000"), "--repeats is 2000000, expected at most 1000000"),
        (("--warmup", "-1"), "--warmup is -1, expected at least 0"),
        (("--sheet-rows", "100000"), "--sheet-rows is 100000, expected at most 10000"),
        (("--export", os.fsdecode(b"\xff.pt2")), "is a name that is no UTF-8; give another"),
    ],
)
def test_absurd_values_are_refused_before_anything_is_read(flags, message, capsys):
    status = evaluation.exit_status("eval.py", lambda: evaluation.main(["--weights", os.devnull, *flags]))
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
