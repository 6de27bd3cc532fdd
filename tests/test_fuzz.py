"""A small run of tests/fuzz.py, and what it makes of crashes and wrong results."""

import json
import os
import random

import pytest

import fuzz


@pytest.mark.parametrize("kind, count", [("images", 300), ("labels", 300), ("classes", 300), ("checkpoints", 40)])
def test_damaged_files_are_refused_in_one_line_or_read_right(kind, count):
    outcomes = {number: fuzz.run_case(kind, number) for number in range(count)}
    failed = {number: outcome for number, outcome in outcomes.items() if outcome not in (fuzz.RIGHT, fuzz.REFUSED)}
    assert not failed
    assert {fuzz.RIGHT, fuzz.REFUSED} == set(outcomes.values())  # or the damage would reach nothing


def test_a_crash_and_a_wrong_result_are_found_and_the_rest_goes_on(monkeypatch, capsys):
    def images(rng, folder):
        value = rng.random()
        if value == random.Random("images 3").random():
            os.abort()
        fuzz.expect(value != random.Random("images 5").random(), "other pixels")
        return fuzz.RIGHT

    monkeypatch.setitem(fuzz.KINDS, "images", images)  # the child processes are forked, and have it, too
    assert fuzz.main(["--only", "images", "--seed", "0", "--count", "8"]) == 1
    out = capsys.readouterr().out
    assert "FAILED images 3: crashed" in out and "FAILED images 5: other pixels" in out
    assert "python tests/fuzz.py --only images --seed 5 --count 1" in out
    assert json.loads(out.splitlines()[-1]) == {"images": {"right": 6, "failed": 2}}
