"""Section 2: flags, names of cells, seeds."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import run_exp1b_kaggle as exp

DOCUMENTED = """mode dataset compression methods runs teacher-epochs student-epochs width batch-size
lr seed subset patience checkpoint-interval resume output data-dir max-hours device workers
precision deterministic status report""".split()


@pytest.mark.parametrize(
    "cell, parsed",
    [
        (("5x", "Direct"), (5.0, "Direct")),
        (("2.3", "TraditionalKD"), (2.3, "TraditionalKD")),
        (("7×", "HPM-KD"), (7.0, "HPM-KD")),
        (("5x", "HPM-KD-no-chain"), (5.0, "HPM-KD-no-chain")),
        (("5x", "HPM-KD-no-temperature-no-config"), (5.0, "HPM-KD-no-config-no-temperature")),
    ],
)
def test_a_cell_has_one_canonical_form(cell, parsed):
    assert exp.parse_cell(*cell) == parsed


@pytest.mark.parametrize(
    "cell, blamed",
    [
        (("x", "Direct"), "--compression x"),
        (("1x", "Direct"), "--compression 1x"),
        (("5.x", "Direct"), "--compression 5.x"),
        (("-5x", "Direct"), "--compression -5x"),
        (("900x", "Direct"), "--compression 900x"),
        (("5x", "direct"), "--methods direct"),
        (("5x", "Direct-no-chain"), "--methods Direct-no-chain"),
        (("5x", "HPM-KD-no-magic"), "--methods HPM-KD-no-magic"),
    ],
)
def test_an_impossible_cell_is_named(cell, blamed):
    with pytest.raises(exp.UserError, match=blamed):
        exp.parse_cell(*cell)


def test_every_documented_flag_exists():
    flags = {f.name.replace("_", "-") for f in fields(exp.Flags)}
    assert flags >= set(DOCUMENTED)


def test_flags_take_the_types_of_their_fields():
    text = "--mode smoke --compression 5x 7x --runs 4 --lr 0.2 --deterministic --max-hours 0.5"
    flags = exp.parse(text.split())
    assert (flags.mode, flags.runs, flags.lr, flags.max_hours) == ("smoke", 4, 0.2, 0.5)
    assert flags.compression == ["5x", "7x"] and flags.deterministic is True
    assert flags.device == flags.precision == "auto" and flags.resume is flags.width is None
    assert exp.parse(["--resume"]).resume == "" and exp.parse(["--resume", "d"]).resume == "d"


@pytest.mark.parametrize(
    "text, blamed",
    [
        ("--nonsense", "--nonsense"),
        ("--runs 0", "--runs 0"),
        ("--runs two", "--runs"),
        ("--teacher-epochs -1", "--teacher-epochs"),
        ("--lr nan", "--lr nan"),
        ("--lr 0", "--lr 0"),
        ("--max-hours inf", "--max-hours inf"),
        ("--mode tiny", "--mode"),
        ("--run 3", "--run"),
        ("--compression", "--compression"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(text, blamed):
    with pytest.raises(exp.UserError) as error:
        exp.parse(text.split())
    assert blamed in str(error.value) and "\n" not in str(error.value)


def test_modes_and_tables_are_those_of_the_design():
    assert exp.MODES["smoke"]["dataset"] == "toy" and exp.MODES["full"]["dataset"] == "CIFAR10"
    epochs = [(m["teacher_epochs"], m["student_epochs"], m["runs"]) for m in exp.MODES.values()]
    assert epochs[1:] == [(50, 20, 3), (100, 50, 5)]
    assert exp.CANDIDATES == ((4.0, 0.5), (4.0, 0.9), (8.0, 0.9), (3.0, 0.9))
    assert exp.KD == (4.0, 0.5) and exp.RATIOS == ("2.3x", "5x", "7x")
    assert exp.METHODS == ("Direct", "TraditionalKD", "HPM-KD")
    assert exp.PARTS == ("config", "chain", "attention", "temperature")


def draw(*purpose) -> list[int]:
    return torch.randint(1 << 40, (4,), generator=exp.generator(*purpose)).tolist()


def test_a_stream_is_known_by_its_purpose_alone():
    assert draw(0, "init", 5.0, 1) == draw(0, "init", 5.0, 1)
    purposes = [(0, "order", 1, 2), (0, "order", 2, 1), (1, "order", 1, 2), (0, "views", 1, 2)]
    purposes += [(0, "order", 12), (0, "order", "1, 2")]
    assert len({tuple(draw(*p)) for p in purposes}) == len(purposes)


def test_a_stream_moves_no_other_and_no_global_state():
    before, state = draw(0, "a"), torch.get_rng_state()
    draw(0, "b")
    assert draw(0, "a") == before and torch.equal(torch.get_rng_state(), state)


def test_seeds_are_the_same_in_every_process(tmp_path):
    """Also under another PYTHONHASHSEED; and importing the program does nothing."""
    code = "import logging, sys, torch, run_exp1b_kaggle as e\n"
    code += "print(torch.randint(1 << 40, (4,), generator=e.generator(0, 'init', 5.0)).tolist())\n"
    code += "print(logging.getLogger('exp1b').handlers, 'matplotlib' in sys.modules)"
    env = os.environ | dict(PYTHONHASHSEED="77", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout == f"{draw(0, 'init', 5.0)}\n[] False\n" and not run.stderr, run.stderr
    assert not [*tmp_path.iterdir()]
