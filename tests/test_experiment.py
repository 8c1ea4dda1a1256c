"""Section 9: the plan, and real sessions that are killed, resumed and run side by side."""

import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
from conftest import CELLS, TINY, finish, run_in, same, start, wait_for

import run_exp1b_kaggle as exp

KEY = dict(mode="quick", student_epochs=20, teacher_epochs=50, batch_size=128, lr=0.1, seed=0)
KEY |= dict(patience=0, width=64)


def plan(*cells, runs=2):
    return exp.plan_jobs(dict.fromkeys(cells, runs))


def test_the_plan_names_every_job_and_what_it_needs():
    jobs = plan("5x Direct", "5x TraditionalKD", "5x HPM-KD")
    assert set(jobs) == {"teacher", "probe", "assistant_5x_1"} | {
        f"student_5x_{m}_run{k}" for m in exp.METHODS for k in (1, 2)
    }
    assert jobs["student_5x_Direct_run1"].needs == ()
    assert jobs["student_5x_TraditionalKD_run2"].needs == ("teacher",)
    hpm = jobs["student_5x_HPM-KD_run2"]
    assert set(hpm.needs) == {"teacher", "assistant_5x_1", "probe"} and hpm.run == 2
    assert jobs["assistant_5x_1"].needs == jobs["probe"].needs == ("teacher",)
    names = [*jobs]
    assert all(names.index(n) < names.index(j.name) for j in jobs.values() for n in j.needs)


def test_direct_students_need_no_teacher():
    assert [*plan("2.3x Direct", runs=1)] == ["student_2.3x_Direct_run1"]


def test_the_probe_and_the_assistants_are_shared():
    cells = [f"7x HPM-KD{off}" for off in ("", "-no-attention", "-no-config", "-no-chain")]
    jobs = plan(*cells, "5x HPM-KD")
    kinds = [j.kind for j in jobs.values()]
    assert (kinds.count("teacher"), kinds.count("probe")) == (1, 1)
    assert [n for n in jobs if "assistant" in n] == ["assistant_7x_1", "assistant_5x_1"]
    assert jobs["probe"].ratio == 5.0 and plan("7x HPM-KD")["probe"].ratio == 5.0
    assert "assistant_7x_1" not in jobs["student_7x_HPM-KD-no-chain_run1"].needs
    assert "probe" not in jobs["student_7x_HPM-KD-no-config_run1"].needs


@pytest.mark.parametrize("ratio", [1.5, 2.3, 3.0, 5.0, 7.0, 9.0, 9.1, 20.0, 27.0, 50.0])
def test_the_chain_is_geometric_and_its_steps_are_small(ratio):
    sizes = [1.0, *exp.chain(ratio), ratio]
    steps = [b / a for a, b in zip(sizes, sizes[1:])]
    assert len(sizes) >= 3 and max(steps) <= 3 + 1e-6
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert len(sizes) == 3 or steps[0] ** (len(steps) / (len(steps) - 1)) > 3 - 1e-6


def test_each_assistant_learns_from_the_stage_before():
    jobs = plan("20x HPM-KD", runs=1)
    assert jobs["assistant_20x_1"].needs == ("teacher",)
    assert jobs["assistant_20x_2"].needs == ("assistant_20x_1",)
    assert jobs["assistant_20x_1"].ratio < jobs["assistant_20x_2"].ratio < 20


def test_settings_are_those_of_the_design():
    jobs = plan("5x Direct", "5x TraditionalKD", "5x HPM-KD", runs=1)
    of = {name: exp.setting_of(job, KEY, 8.0, 0.9) for name, job in jobs.items()}
    teacher, direct = of["teacher"], of["student_5x_Direct_run1"]
    assert (teacher.epochs, teacher.fresh, teacher.alpha) == (50, True, 0.0)
    assert (direct.epochs, direct.fresh, direct.alpha) == (20, False, 0.0)
    plain, hpm = of["student_5x_TraditionalKD_run1"], of["student_5x_HPM-KD_run1"]
    assert (plain.alpha, plain.t_high, plain.t_low, plain.attend) == (0.5, 4.0, 4.0, "")
    assert (hpm.alpha, hpm.t_high, hpm.t_low) == (0.9, 8.0, 4.0) and hpm.attend
    assistant = of["assistant_5x_1"]
    assert (assistant.alpha, assistant.t_high, assistant.t_low) == (0.9, 4.0, 4.0)
    assert of["probe"].epochs == 5 and (of["probe"].alpha, of["probe"].t_high) == (0.9, 8.0)


def test_runs_are_paired():
    """The method and its parts change neither the batches nor the seed; the run does."""
    cells = ["Direct", "TraditionalKD", "HPM-KD", "HPM-KD-no-chain", "HPM-KD-no-attention"]
    jobs = plan(*(f"{r} {m}" for r in ("5x", "7x") for m in cells))
    streams = {(j.run, exp.setting_of(j, KEY).order) for j in jobs.values() if j.run}
    assert len(streams) == 2 and len({run for run, _ in streams}) == 2
    assert {exp.setting_of(j, KEY).seed for j in jobs.values()} == {0}


def frame(run: exp.RunDir, drop=("time",)) -> pd.DataFrame:
    """results_runs.csv without times, by job."""
    table = pd.read_csv(run.path / "results_runs.csv")
    return table.drop(columns=[*drop]).set_index("job").sort_index()


def weights(run: exp.RunDir) -> dict:
    """{file name: state dict} of every finished model."""
    files = [f for f in run.folder.glob("*.pt") if f.name.startswith(("t", "a", "student"))]
    return {f.name: exp.read(f)["weights"] for f in files}


def assert_equal_runs(a: exp.RunDir, b: exp.RunDir):
    pd.testing.assert_frame_equal(frame(a), frame(b))
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    states = a.read_state()["jobs"], b.read_state()["jobs"]
    for name in states[0]:
        history = [{k: v for k, v in s[name]["history"].items() if k != "seconds"} for s in states]
        assert history[0] == history[1], name
    assert states[0]["probe"]["choice"] == states[1]["probe"]["choice"]


def children(pid: int) -> list[int]:
    """The worker processes of a session."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        except OSError:
            pass
    return found


def kill_when(process, folder, part: str):
    """SIGKILL as soon as a file of a job lies among the checkpoints; the worker dies, too."""
    wait_for(lambda: list(Path(folder).glob(f"exp1b_*/checkpoints/*{part}*")), process)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)  # returns when nobody holds the output any more
    assert workers


def test_killed_twice_and_resumed_it_equals_the_run_never_killed(finished, tmp_path):
    """SIGKILL in the probe and in an HPM-KD student; the teacher is trained once."""
    kill_when(start(*TINY, *CELLS, "--output", tmp_path), tmp_path, "probe")
    teacher = next(tmp_path.glob("exp1b_*/checkpoints/teacher_resnet50_toy.pt"))
    before = teacher.stat()
    resume = ["--resume", "--output", tmp_path, "--device", "cpu", "--checkpoint-interval", "1"]
    kill_when(start(*resume), tmp_path, "student_5x_HPM-KD")
    code, output = finish(start(*resume, PYTHONHASHSEED="5"))
    assert code == 0, output
    after = teacher.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert len(run_in(tmp_path).read_state()["sessions"]) == 3
    assert_equal_runs(run_in(tmp_path), finished)


def test_two_workers_give_the_results_of_one(finished, tmp_path):
    code, output = finish(start(*TINY, *CELLS, "--workers", 2, "--output", tmp_path))
    assert code == 0, output
    assert_equal_runs(run_in(tmp_path), finished)


def copy_of(finished, folder) -> exp.RunDir:
    shutil.copytree(finished.path, folder / finished.path.name)
    return run_in(folder)


def test_another_ratio_is_added_to_the_same_report(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    before = frame(run)
    part = "--compression 2.3x --methods TraditionalKD --runs 1 --device cpu".split()
    code, output = finish(start("--resume", *part, "--output", tmp_path))
    assert code == 0, output
    cells = pd.read_csv(run_in(tmp_path).path / "results.csv")
    assert sorted(zip(cells.compression, cells.method)) == sorted(
        [("2.3x", "TraditionalKD"), *(("5x", m) for m in exp.METHODS)]
    )
    after = frame(run)
    pd.testing.assert_frame_equal(after.loc[before.index], before, check_dtype=False)
    assert set(after.index) - set(before.index) == {"student_2.3x_TraditionalKD_run1"}
    assert (
        after.loc["student_2.3x_TraditionalKD_run1", "teacher"]
        == (after.loc["student_5x_TraditionalKD_run1", "teacher"])
    )
    assert "2.3x" in (run.path / "experiment_report.md").read_text()


def test_nothing_left_trains_nothing(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path)
    before = {f.name: f.stat().st_mtime_ns for f in run.folder.glob("*.pt")}
    asked = "--resume --compression 5x --methods Direct --device cpu --output".split()
    assert exp.main([*asked, str(tmp_path)]) == 0
    assert exp.main(["--resume", str(run.path)]) == 0
    assert {f.name: f.stat().st_mtime_ns for f in run.folder.glob("*.pt")} == before
    assert "verdict" in capsys.readouterr().out
    pd.testing.assert_frame_equal(frame(run), frame(finished))
    assert len(run.read_state()["sessions"]) == 1


LONG = "--mode smoke --device cpu --width 12 --subset 100 --compression 5x --methods Direct"
LONG = [*LONG.split(), "--checkpoint-interval", "1", "--runs", "1", "--teacher-epochs", "1"]


def training(folder):
    """Whether a student has finished an epoch."""
    return list(folder.glob("exp1b_*/checkpoints/*student_5x_Direct_run1*"))


def test_a_signal_stops_cleanly(tmp_path):
    """Side by side, as each takes its time."""
    cases = {signal.SIGINT: 130, signal.SIGTERM: 143}
    endless = [*LONG, "--student-epochs", "2000", "--output"]
    sessions = {n: start(*endless, tmp_path / n.name) for n in cases}
    for number, process in sessions.items():
        wait_for(lambda: training(tmp_path / number.name), process)  # noqa: B023
        workers = children(process.pid)
        process.send_signal(number)
        code, output = finish(process)
        run = run_in(tmp_path / number.name)
        assert code == cases[number] and "Traceback" not in output, output
        assert f"--resume {run.path}" in output and run.read_state()["jobs"] == {}
        assert "artial" in (run.path / "experiment_report.md").read_text()
        assert workers and not any(Path(f"/proc/{w}").exists() for w in workers)


def test_a_dead_worker_is_replaced(finished, tmp_path):
    """Its job goes on, and ends as if nothing had happened."""
    process = start(*LONG, "--student-epochs", "2", "--output", tmp_path)
    first = wait_for(lambda: training(tmp_path) and children(process.pid), process)
    os.kill(first[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    name = "student_5x_Direct_run1"
    assert same(weights(run_in(tmp_path))[f"{name}.pt"], weights(finished)[f"{name}.pt"])
    pd.testing.assert_series_equal(
        frame(run_in(tmp_path)).loc[name], frame(finished).loc[name], check_dtype=False
    )


def test_the_time_budget_stops_with_code_0(tmp_path, capsys):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {n: signal.getsignal(n) for n in numbers}
    hours = ["--max-hours", "1e-9", "--student-epochs", "2"]
    assert exp.main([*LONG, *hours, "--output", str(tmp_path)]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    run = run_in(tmp_path)
    assert f"--resume {run.path}" in capsys.readouterr().out and run.read_state()["jobs"] == {}


def test_students_of_a_run_start_from_the_same_weights(finished):
    """The first epoch is one batch: its CE is that of the initial weights in every method."""
    jobs = finished.read_state()["jobs"]
    for k in (1, 2):
        first = {jobs[f"student_5x_{m}_run{k}"]["history"]["ce"][0] for m in exp.METHODS}
        last = {jobs[f"student_5x_{m}_run{k}"]["history"]["ce"][1] for m in exp.METHODS}
        assert len(first) == 1 and len(last) == 3
    assert first != {jobs["student_5x_Direct_run1"]["history"]["ce"][0]}


def test_a_finished_run_leaves_no_bank_and_no_student_snapshot(finished):
    assert not [f for f in finished.path.parent.rglob("*") if "bank" in f.name.lower()]
    assert not [*finished.folder.glob("*snapshot*student*")]
