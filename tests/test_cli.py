"""Section 11: the command line."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_in

import run_exp1b_kaggle as exp


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, alone in its folder."""
    shutil.copytree(finished.path, tmp_path / "out" / finished.path.name)
    return run_in(tmp_path / "out")


def contents(run) -> dict:
    return {f: f.read_bytes() for f in run.path.rglob("*") if f.is_file() and f.suffix != ".log"}


@pytest.mark.parametrize(
    "text, says",
    [
        ("--mode huge", "huge"),
        ("--nonsense", "--nonsense"),
        ("--compression 5y", "--compression 5y"),
        ("--methods KD", "--methods KD"),
        ("--width 1", "--width"),
        ("--device tpu", "--device tpu"),
        ("--width 8 --compression 50x", "50x"),
    ],
)
def test_bad_input_is_one_line_code_2_and_nothing_written(tmp_path, capsys, text, says):
    arguments = ["--mode", "smoke", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert exp.main(arguments + text.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and says in error
    assert not list((tmp_path / "out").glob("exp1b_*"))


def test_the_program_returns_the_code_of_main(tmp_path):
    command = [sys.executable, ROOT / "run_exp1b_kaggle.py", "--resume", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: nothing to resume")
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stdout


def test_help_lists_all_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        exp.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{f.replace('_', '-')}" in text for f in exp.Flags.__dataclass_fields__)


def test_nothing_to_resume_says_where_it_looked(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert exp.main(["--resume", "--output", str(tmp_path / "empty")]) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert [*(tmp_path / "empty").iterdir()] == []


@pytest.mark.parametrize(
    "text, difference",
    [("--seed 5", "seed"), ("--width 16", "width 12"), ("--subset 200 --mode smoke", "subset 100")],
)
def test_a_filter_that_fits_nothing_names_the_nearest_run(copy, capsys, text, difference):
    before = contents(copy)
    assert exp.main(["--resume", *text.split(), "--output", str(copy.path.parent)]) == 2
    error = capsys.readouterr().err
    assert copy.path.name in error and difference in error and error.count("\n") == 1
    assert contents(copy) == before


@pytest.mark.parametrize("text", ["--seed 0", "--width 12 --mode smoke", "--dataset toy"])
def test_a_filter_that_fits_is_no_obstacle(copy, capsys, text):
    assert exp.main(["--resume", *text.split(), "--output", str(copy.path.parent)]) == 0
    assert "verdict" in capsys.readouterr().out


def test_the_run_directory_itself_can_be_named(copy, capsys):
    assert exp.main(["--resume", str(copy.path)]) == 0
    assert exp.main(["--resume", "--output", str(copy.path)]) == 0
    assert exp.main(["--mode", "smoke", "--device", "cpu", "--output", str(copy.path)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_status_lists_every_run(copy, tmp_path, capsys):
    other = shutil.copytree(copy.path, tmp_path / "out" / "exp1b_smoke_20200101_000000")
    run = exp.RunDir(other)
    state = run.read_state()
    del state["jobs"]["student_5x_Direct_run1"]
    run.write_state(state)
    before = contents(copy)
    assert exp.main(["--status", "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "9 of 9" in text and "8 of 9" in text and contents(copy) == before
    assert text.index(other.name) < text.index(copy.path.name)  # by the last change
    assert f"--resume {copy.path}" in text


def test_the_newest_run_by_its_state_is_resumed(copy, tmp_path, capsys):
    older = shutil.copytree(copy.path, tmp_path / "out" / "exp1b_smoke_20990101_000000")
    state = copy.read_state()
    copy.write_state(state)  # the newest by its state, neither by name nor by the file's time
    for file in older.rglob("*.pkl"):
        file.touch()
    assert exp.main(["--resume", "--output", str(tmp_path / "out")]) == 0
    assert copy.path.name in capsys.readouterr().out


def test_report_writes_everything_again_and_trains_nothing(copy, capsys):
    weights = {f: f.stat().st_mtime_ns for f in copy.folder.glob("*.pt")}
    for name in ("results.csv", "results_runs.csv", "results.json", "experiment_report.md"):
        (copy.path / name).rename(copy.path / f"{name}.before")
    shutil.rmtree(copy.path / "figures")
    assert exp.main(["--report", "--output", str(copy.path.parent)]) == 0
    for name in ("results.csv", "results_runs.csv"):
        assert (copy.path / name).read_text() == (copy.path / f"{name}.before").read_text()
    assert len([*(copy.path / "figures").glob("*.png")]) >= 4
    assert {f: f.stat().st_mtime_ns for f in copy.folder.glob("*.pt")} == weights


def test_a_locked_run_is_refused(copy, capsys):
    copy.lock()
    assert exp.main(["--report", "--output", str(copy.path.parent)]) == 2
    assert "PID" in capsys.readouterr().err
    copy.handle.close()


def test_a_rotten_state_is_set_aside_and_the_generation_before_it_counts(copy, capsys):
    copy.write_state(copy.read_state())
    copy.states[0].write_bytes(b"rotten")
    assert exp.main(["--resume", str(copy.path)]) == 0
    assert copy.folder.joinpath("experiment_state.pkl.corrupt").read_bytes() == b"rotten"
    assert "experiment_state.pkl" in capsys.readouterr().out


def test_another_recipe_may_report_but_not_train(copy, capsys):
    state = copy.read_state()
    state["key"]["recipe"] = exp.VERSION + 1
    del state["jobs"]["student_5x_Direct_run1"]
    copy.write_state(state)
    assert exp.main(["--resume", str(copy.path), "--device", "cpu"]) == 2
    assert "--report" in capsys.readouterr().err
    assert exp.main(["--report", "--output", str(copy.path)]) == 0
