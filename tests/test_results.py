"""Section 10: one tidy table, statistics, CSV, figures, report."""

import json
import math
import shutil

import pandas as pd
import pytest
from conftest import run_in
from PIL import Image

import run_exp1b_kaggle as exp

RUN_COLUMNS = """job kind compression ratio measured_ratio method run seed params macs val_acc
test_acc last_test_acc best_epoch epochs time teacher""".split()
CELL_COLUMNS = """compression ratio measured_ratio method teacher teacher_acc student_acc_mean
student_acc_std retention delta_vs_direct delta_ci95_low delta_ci95_high params macs time_mean
time_std n_runs""".split()
FIGURES = ["accuracy_vs_compression", "hpmkd_vs_direct", "retention_analysis", "learning_curves"]


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)])
def test_intervals_are_students(n, t):
    values = [10.0 + i % 2 for i in range(n)]
    mean, low, high = exp.interval(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert mean == pytest.approx(sum(values) / n) == pytest.approx((low + high) / 2)
    assert (high - low) / 2 == pytest.approx(t * spread, rel=5e-3)


def test_one_value_has_no_interval():
    assert exp.interval([7.0])[0] == 7.0 and all(map(math.isnan, exp.interval([7.0])[1:]))
    assert all(map(math.isnan, exp.interval([])))
    assert exp.interval([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)


def table_of(gains: dict, direct=70.0, teacher=90.0) -> pd.DataFrame:
    """{ratio: gains of HPM-KD over Direct in each run} as a tidy table."""
    rows = [dict(kind="teacher", ratio=1.0, method="", run=0, teacher="", val_acc=teacher)]
    for ratio, values in gains.items():
        for k, gain in enumerate(values, 1):
            for method, acc, of in (("Direct", direct, ""), ("HPM-KD", direct + gain, "T")):
                row = dict(kind="student", ratio=ratio, method=method, run=k, teacher=of)
                last = -2 * gain if of else 0.0  # at the last epoch the sign is the other one
                acc = acc + k  # runs differ, pairs do not
                rows.append(row | dict(val_acc=acc, test_acc=acc, last_test_acc=acc + last))
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "gains, word, mean",
    [
        ({5.0: [1.0, 1.2, 0.8]}, "supported at 5x", 1.0),
        ({5.0: [-1.0, -1.2, -0.8]}, "not supported at 5x", -1.0),
        ({5.0: [1.0, -1.2, 0.8]}, "inconclusive at 5x", 0.2),
        ({5.0: [1.0, 1.2], 7.0: [3.0, 3.2]}, "supported at 5x, 7x", 2.1),
        ({2.3: [-9.0, -9.1, -9.2], 5.0: [1.0, 1.2, 0.8]}, "supported at 5x", 1.0),
        ({5.0: [1.0]}, "no verdict", 1.0),
    ],
)
def test_the_verdict(gains, word, mean):
    sentence, value = exp.verdict(table_of(gains))
    assert sentence.startswith(word) and value == pytest.approx(mean)


def test_inconclusive_comes_with_its_half_width():
    sentence, _ = exp.verdict(table_of({5.0: [1.0, -1.2, 0.8]}))
    mean, low, high = exp.interval([1.0, -1.2, 0.8])
    assert f"{(high - low) / 2:.2f}" in sentence and f"{low:+.2f}" in sentence


def test_without_headroom_the_verdict_is_void():
    assert exp.headroom(table_of({5.0: [1.0, 1.0]}), 5.0) == pytest.approx(18.5)
    table = table_of({5.0: [1.0, 1.1, 1.2]}, teacher=72.0)
    assert exp.headroom(table, 5.0) == 0.0
    sentence, _ = exp.verdict(table)
    assert sentence.startswith("void") and "does not exceed its student at 5x" in sentence


def test_without_large_ratios_there_is_no_verdict():
    sentence, mean = exp.verdict(table_of({2.3: [1.0, 1.1]}))
    assert sentence.startswith("no verdict") and math.isnan(mean)


def test_one_run_gives_a_mean_but_no_verdict():
    sentence, mean = exp.verdict(table_of({5.0: [1.0]}))
    assert sentence.startswith("no verdict at 5x") and mean == pytest.approx(1.0)


def test_the_sign_at_the_last_epoch_is_another_verdict():
    table = table_of({5.0: [1.0, 1.2, 0.8]})
    assert exp.verdict(table, "last_test_acc")[1] == pytest.approx(-1.0)


def test_a_run_missing_at_one_ratio_is_no_pair():
    table = table_of({5.0: [1.0, 1.2, 5.0], 7.0: [1.0, 1.2]})
    assert exp.verdict(table)[1] == pytest.approx(1.1)


def test_diverged_runs_are_dropped_as_pairs():
    table = table_of({5.0: [1.0, 1.2, 0.8, 9.0]})
    table.loc[(table.run == 4) & (table.method == "Direct"), "test_acc"] = math.nan
    pairs = exp.differences(table, "HPM-KD", "Direct", 5.0)
    assert pairs.run.tolist() == [1, 2, 3] and pairs["diff"].tolist() == pytest.approx(
        [1, 1.2, 0.8]
    )
    assert exp.verdict(table)[1] == pytest.approx(1.0)


def test_pairs_are_formed_within_one_teacher():
    """Direct students, which have none, pair with all."""
    table = table_of({5.0: [1.0, 1.2, 0.8]})
    plain = table[table.method == "HPM-KD"].assign(method="TraditionalKD")
    plain.loc[plain.run == 2, "teacher"] = "another"
    table = pd.concat([table, plain])
    assert exp.differences(table, "HPM-KD", "TraditionalKD", 5.0).run.tolist() == [1, 3]
    assert exp.differences(table, "TraditionalKD", "Direct", 5.0).run.tolist() == [1, 2, 3]
    assert exp.differences(table, "HPM-KD", "Direct", 7.0).empty


def test_the_csv_files_have_exactly_the_documented_columns(finished):
    runs, cells = (pd.read_csv(finished.path / f) for f in ("results_runs.csv", "results.csv"))
    assert [*runs.columns] == RUN_COLUMNS and [*cells.columns] == CELL_COLUMNS
    kinds = runs.kind.value_counts().to_dict()
    assert kinds == dict(student=6, bank=2, teacher=1, assistant=1, probe=1)
    students = runs[runs.kind == "student"]
    assert set(students.compression) == {"5x"} and set(students.run) == {1, 2}
    assert (
        students.measured_ratio.between(4.95, 5.05).all()
        and students.test_acc.between(1, 100).all()
    )
    direct = students[students.method == "Direct"]
    assert (
        direct.teacher.isna().all() and students[students.method != "Direct"].teacher.nunique() == 1
    )
    assert set(cells.method) == set(exp.METHODS) and set(cells.n_runs) == {2}


def test_the_summary_follows_from_the_runs(finished):
    runs, cells = (pd.read_csv(finished.path / f) for f in ("results_runs.csv", "results.csv"))
    students, cells = runs[runs.kind == "student"], cells.set_index("method")
    teacher = runs[runs.kind == "teacher"].test_acc.item()
    acc = {m: students[students.method == m].set_index("run").test_acc for m in exp.METHODS}
    for m in exp.METHODS:
        row = cells.loc[m]
        assert row.student_acc_mean == pytest.approx(acc[m].mean())
        assert row.student_acc_std == pytest.approx(acc[m].std())
        assert row.teacher_acc == teacher and row.compression == "5x"
        assert row.retention == pytest.approx(100 * acc[m].mean() / teacher)
        if m != "Direct":
            found = row[["delta_vs_direct", "delta_ci95_low", "delta_ci95_high"]].tolist()
            assert found == pytest.approx(exp.interval((acc[m] - acc["Direct"]).tolist()))


def test_costs_are_shared_by_those_who_cause_them(finished):
    runs = pd.read_csv(finished.path / "results_runs.csv").set_index("job").time
    cells = pd.read_csv(finished.path / "results.csv").set_index("method").time_mean

    def own(method):
        return sum(runs[f"student_5x_{method}_run{k}"] for k in (1, 2)) / 2

    bank = runs["bank_teacher"] / 4  # two students of either method
    hpm = (runs["assistant_5x_1"] + runs["bank_assistant_5x_1"] + runs["probe"]) / 2
    assert cells["Direct"] == pytest.approx(own("Direct"))
    assert cells["TraditionalKD"] == pytest.approx(own("TraditionalKD") + bank)
    assert cells["HPM-KD"] == pytest.approx(own("HPM-KD") + bank + hpm)


def test_the_json_holds_every_metric_of_every_epoch(finished):
    content = json.loads((finished.path / "results.json").read_text())
    assert content["configuration"]["width"] == 12 and len(content["sessions"]) == 1
    model = content["models"]["student_5x_HPM-KD_run1"]
    assert len(model["history"]["val_acc"]) == 2 and len(model["history"]["T"]) == 2
    assert len(content["models"]) == 9 and content["sessions"][0]["torch"]


def test_the_report_begins_with_the_verdict(finished):
    lines = [x for x in (finished.path / "experiment_report.md").read_text().splitlines() if x]
    verdict = json.loads((finished.path / "results.json").read_text())["verdict"]
    assert lines[0].startswith("# ") and verdict in lines[1]
    text = " ".join(" ".join(lines).split())
    assert all(f"figures/{name}.png" in text for name in FIGURES)
    assert "tuned at 5x" in text and "this one teacher" in text and "learned mixture" in text


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_300_dpi(finished, name):
    image = Image.open(finished.path / f"figures/{name}.png")
    assert [round(x) for x in image.info["dpi"]] == [300, 300]
    assert image.width > 800 and len(image.convert("L").getcolors()) > 20


def test_partial_and_diverged_results_are_written_as_such(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / finished.path.name)
    run = run_in(tmp_path)
    state = run.read_state()
    del (
        state["jobs"]["student_5x_TraditionalKD_run1"],
        state["jobs"]["student_5x_TraditionalKD_run2"],
    )
    lost = state["jobs"]["student_5x_HPM-KD_run2"]
    lost |= dict(status="diverged", val_acc=None, test_acc=None, last_test_acc=None)
    sentence = exp.write_results(run, state, exp.plan_jobs(state["cells"]), "2 models missing")
    cells = pd.read_csv(run.path / "results.csv").set_index("method")
    assert set(cells.index) == {"Direct", "HPM-KD"} and cells.loc["HPM-KD", "n_runs"] == 1
    runs = pd.read_csv(run.path / "results_runs.csv").set_index("job")
    assert math.isnan(runs.loc["student_5x_HPM-KD_run2", "test_acc"])
    report = (run.path / "experiment_report.md").read_text()
    assert "2 models missing" in report and sentence in report
    assert not json.loads((run.path / "results.json").read_text())["completed"]
