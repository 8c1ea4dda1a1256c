"""Section 8: one function trains every model, from scratch or from a snapshot."""

import math

import pytest
import torch
from conftest import same, student, tiny_data, train

import run_exp1b_kaggle as exp


def test_a_student_learns_the_toy(raw):
    result, _ = train(tiny_data(800, raw=raw), epochs=6, batch_size=32, lr=0.1)
    losses = result["history"]["loss"]
    assert result["status"] == "done" and result["test_acc"] > 80
    assert losses[-1] < 0.5 * losses[0] and result["val_acc"] > 80


def test_the_record_is_about_the_best_epoch(data):
    result, model = train(data, epochs=4)
    history, at = result["history"], result["best_epoch"]
    assert {len(values) for values in history.values()} == {4} and result["epochs"] == 4
    assert history["val_acc"][at - 1] == max(history["val_acc"]) == result["val_acc"]
    assert result["val_nll"] == history["val_nll"][at - 1]
    assert same(result["best"], model.state_dict())
    logits = exp.predict(model, data, data.test_x)
    accuracy = 100 * (logits.argmax(1) == data.test_y).double().mean().item()
    assert result["test_acc"] == pytest.approx(accuracy)
    assert len(result["tail"]) == 2 and result["tail"][1].shape == (len(data.val_y), 10)


@pytest.mark.parametrize("val_acc, best", [([1.0, 3.0, 2.0], 2), ([3.0, 1.0, 3.0], 3), ([5.0], 1)])
def test_of_equal_epochs_the_later_counts(val_acc, best):
    assert exp.best_epoch(dict(val_acc=val_acc)) == best


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [exp.learning_rate(i, 200, 0.1) for i in range(200)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03]) and max(rates) == pytest.approx(0.1)
    assert rates.index(max(rates)) in (9, 10) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[105] == pytest.approx(0.05, abs=1e-3) and 0 < rates[-1] < 1e-4


class Interrupted(Exception):
    pass


def stop_after(epochs):
    """A control that raises at the second batch after so many epochs."""
    calls = []

    def control(metrics):
        calls.append(metrics)
        if sum(map(bool, calls)) == epochs and calls[-2:] == [None, None]:
            raise Interrupted

    return control


def banks_of(data):
    return [exp.Bank(data, lambda seed=seed: student(data, seed)) for seed in (3, 4)]


@pytest.mark.parametrize("kind", ["Direct", "HPM-KD", "fresh views", "fp16"])
def test_a_resumed_training_equals_one_never_stopped(tmp_path, data, kind):
    run = exp.RunDir(tmp_path)
    run.folder.mkdir()
    options = dict(epochs=4, precision="fp16" if kind == "fp16" else "fp32")
    if kind == "HPM-KD":
        options |= dict(banks=banks_of(data), alpha=0.9, t_high=8.0, t_low=4.0, attend="5x run1")
    options["fresh"] = kind == "fresh views"
    whole, _ = train(data, **options)
    for epochs in (1, 2):
        with pytest.raises(Interrupted):
            snapshots = exp.Snapshots(run, "job", "me", 1)
            train(data, control=stop_after(epochs), snapshots=snapshots, **options)
        snapshots.pending.result()
    assert exp.Snapshots(run, "job", "me").load()["epoch"] == 3
    visited = []
    snapshots = exp.Snapshots(run, "job", "me", 1)
    resumed, _ = train(data, 99, control=visited.append, snapshots=snapshots, **options)
    assert sum(map(bool, visited)) == 1  # only the fourth epoch was left
    assert same(resumed["best"], whole["best"])
    assert all(torch.equal(a, b) for a, b in zip(resumed["tail"], whole["tail"]))
    for name in set(whole["history"]) - {"seconds"}:
        assert resumed["history"][name] == whole["history"][name], name
    assert resumed["mixture"] == whole["mixture"]
    assert resumed["test_acc"] == whole["test_acc"]
    assert resumed["last_test_acc"] == whole["last_test_acc"]


def test_a_finished_training_is_not_repeated(tmp_path, data):
    run = exp.RunDir(tmp_path)
    run.folder.mkdir()
    whole, _ = train(data, snapshots=exp.Snapshots(run, "job", "me", 1))
    batches = []
    again, _ = train(data, 99, snapshots=exp.Snapshots(run, "job", "me"), control=batches.append)
    assert batches == [] and same(again["best"], whole["best"])
    assert again["history"] == whole["history"] and again["test_acc"] == whole["test_acc"]


def test_a_loss_that_is_not_finite_stops_the_model(data):
    result, _ = train(data, epochs=6, lr=1e20)
    assert result["status"] == "diverged" and result["epochs"] < 6
    assert [result[k] for k in ("val_acc", "val_nll", "test_acc", "last_test_acc")] == [None] * 4
    assert not math.isfinite(result["history"]["loss"][-1] + result["history"]["val_nll"][-1])


def test_fp16_trains_on_the_cpu(data):
    result, model = train(data, epochs=3, precision="fp16")
    plain, _ = train(data, epochs=3)
    assert result["status"] == "done" and not same(result["best"], plain["best"])
    assert all(p.dtype == torch.float32 and p.abs().max() < 100 for p in model.parameters())
    assert result["history"]["loss"][0] == pytest.approx(plain["history"]["loss"][0], rel=0.05)


def test_an_overflow_at_the_first_fp16_step_does_no_harm(data, monkeypatch):
    """The scaler skips such a step; the momentum must not stay undefined."""
    scaler = torch.amp.GradScaler
    huge = dict(init_scale=2.0**60)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k | huge))
    result, model = train(data, epochs=1, precision="fp16")
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in model.parameters())
    assert result["status"] == "done"


@pytest.mark.parametrize("patience, epochs", [(0, 6), (1, None)])
def test_patience_stops_after_epochs_without_gain(data, patience, epochs):
    result, _ = train(data, epochs=6, patience=patience, lr=1e-9)
    assert result["epochs"] == (epochs or min(6, result["best_epoch"] + patience))


def test_patience_is_exact(data, monkeypatch):
    """Validation logits that never change tie (the later counts), that worsen do not."""
    level = iter([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    predict = exp.predict

    def worse(model, data, x, *more):
        logits = predict(model, data, x, *more)
        if x is data.val_x:
            right = torch.nn.functional.one_hot(data.val_y, 10).float()
            worst = int(next(level)) * 10
            right[:worst] = right[:worst].roll(1, 1)
            return right
        return logits

    monkeypatch.setattr(exp, "predict", worse)
    result, _ = train(data, epochs=7, patience=2)
    assert (result["epochs"], result["best_epoch"]) == (4, 2)
    assert result["history"]["val_acc"] == [100.0, 100.0, 90.0, 80.0]


def test_the_last_partial_batch_is_dropped(raw):
    batches = []
    train(tiny_data(100, raw=raw), epochs=1, batch_size=64, control=batches.append)
    assert batches.count(None) == 1
    batches.clear()
    train(tiny_data(60, raw=raw), epochs=1, batch_size=64, control=batches.append)
    assert batches.count(None) == 1


def batches_of(data, **options):
    """The images of every batch of a training, in order."""
    seen = []

    class Watched(exp.Data):
        def pixels(self, x):
            seen.append(x.clone())
            return super().pixels(x)

    train(Watched(data.raw, 0, len(data), 100), **options)
    return [x for x in seen if len(x) == options.get("batch_size", 32)]


def test_every_method_sees_the_same_batches(data):
    """Whatever the loss and the parts; another run, or fresh views, sees others."""
    plain = batches_of(data)
    kd = dict(banks=banks_of(data), alpha=0.9, t_high=8.0, t_low=4.0, attend="5x run1")
    assert len(plain) == 2 * 3
    for other in (batches_of(data, **kd), batches_of(data, **(kd | dict(attend="", alpha=0.5)))):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert not torch.equal(plain[0], batches_of(data, order="run2")[0])
    assert not torch.equal(plain[0], batches_of(data, seed=1)[0])
    assert not torch.equal(plain[0], batches_of(data, fresh=True)[0])


def test_runs_walk_the_same_pool(data):
    """Each image of each batch is its view in one of the tables 0 … epochs - 1."""
    tables = [data.views(torch.arange(len(data)), data.pool(t)).flatten(1) for t in range(2)]
    known = {row.numpy().tobytes() for table in tables for row in table}
    for order in ("run1", "run2"):
        for batch in batches_of(data, order=order):
            assert all(row.numpy().tobytes() in known for row in batch.flatten(1))


def test_the_bank_is_read_in_the_order_of_the_batches(data):
    """Teacher logits that name their image: with alpha 1 the loss is known for each batch."""

    class Known:
        def __init__(self):
            self.data = data

        def logits(self, table):
            labels = data.val_y if table == "val" else data.train_y
            return 40.0 * torch.nn.functional.one_hot(labels, 10).half()

    options = dict(epochs=1, lr=1e-9, t_high=1.0, t_low=1.0)
    hard, _ = train(data, **options)
    soft, _ = train(data, alpha=1.0, banks=[Known()], **options)
    assert soft["history"]["loss"][0] == pytest.approx(hard["history"]["loss"][0], rel=1e-3)
