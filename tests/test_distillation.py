"""Section 6: losses, the temperature's clock, the logit bank, HPM-KD's parts."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import same, student, tiny_data, train
from torch.nn import functional as F

import run_exp1b_kaggle as exp


def naive_loss(z, y, v, T, alpha):
    """(1 - a) CE + a T² KL in float64, with loops; v: the teacher's logits."""
    total = 0.0
    for row, label, teacher in zip(z, y, v):
        p, q = (torch.exp(x / T) / torch.exp(x / T).sum() for x in (teacher, row))
        ce = -torch.log(torch.exp(row[label]) / torch.exp(row).sum())
        total += (1 - alpha) * ce + alpha * T * T * (p * (p / q).log()).sum()
    return total / len(z)


@pytest.mark.parametrize("T, alpha", [(1.0, 0.3), (4.0, 0.5), (8.0, 0.9), (4.0, 1.0), (3.0, 0.0)])
def test_the_loss_and_its_gradient_equal_the_formula(T, alpha):
    torch.manual_seed(0)
    z, v, y = 3 * torch.randn(6, 10), 3 * torch.randn(6, 10), torch.arange(6)
    exact = z.double().requires_grad_()
    naive = naive_loss(exact, y, v.double(), T, alpha)
    z.requires_grad_()
    loss, ce = exp.kd_loss(z, y, (v / T).softmax(1), T, alpha)
    loss.backward()
    naive.backward()
    assert abs(loss.item() - naive.item()) < 1e-5
    assert torch.allclose(z.grad.double(), exact.grad, atol=1e-6)
    assert abs(ce.item() - F.cross_entropy(z, y).item()) < 1e-6


def test_direct_is_cross_entropy():
    z, y = torch.randn(6, 10), torch.arange(6)
    loss, ce = exp.kd_loss(z, y, None, 4.0, 0.0)
    assert loss.item() == ce.item() == F.cross_entropy(z, y).item()


FALLING = [2.3 * 0.7**e for e in range(20)]
PLATEAU = [2.25] * 20


def course(losses, epochs=20, high=8.0, low=4.0):
    """(temperatures of all epochs, strategy)."""
    seen = [exp.temperature(losses[:e], epochs, high, low, 10) for e in range(epochs)]
    return [T for T, _ in seen], seen[-1][1]


def test_under_a_falling_loss_the_temperature_is_the_cosine():
    Ts, strategy = course(FALLING)
    cosine = [6 + 2 * math.cos(math.pi * e / 20) for e in range(20)]
    assert strategy == "cosine" and Ts == pytest.approx(cosine)


def test_on_a_plateau_the_clock_runs_twice_as_fast():
    Ts, strategy = course(PLATEAU)
    assert strategy == "loss-driven" and Ts[0] == 8.0
    clock = [min(1, 0 if e == 0 else (1 + 2 * (e - 1)) / 20) for e in range(20)]
    later = [6 + 2 * math.cos(math.pi * c) for c in clock]
    cosine, _ = course(FALLING)
    assert all(hurried <= calm + 1e-9 for hurried, calm in zip(Ts, cosine))
    assert Ts[12:] == pytest.approx([4.0] * 8) and cosine[12] > 4.5
    assert all(abs(a - b) < 0.7 for a, b in zip(Ts, later))  # but for the epochs of watching


@pytest.mark.parametrize("losses", [FALLING, PLATEAU, PLATEAU[::-1] + FALLING])
@pytest.mark.parametrize("epochs", [2, 5, 20])
def test_the_temperature_never_rises_and_ends_at_its_low(losses, epochs):
    Ts, _ = course(losses, epochs)
    assert Ts[0] == 8.0 and all(a >= b for a, b in zip(Ts, Ts[1:]))
    assert exp.temperature(losses[:epochs], epochs, 8.0, 4.0, 10)[0] == pytest.approx(4.0)


def test_a_constant_temperature_stays():
    assert set(course(PLATEAU, high=4.0, low=4.0)[0]) == {4.0}


def test_a_slow_start_that_recovers_stays_loss_driven():
    """The strategy is chosen once, after max(2, E / 10) epochs."""
    slow = [2.25, 2.249, *(2.249 * 0.7**e for e in range(1, 19))]
    assert course(slow)[1] == "loss-driven" and course(FALLING[:2] + PLATEAU)[1] == "cosine"


class Counted:
    """Gives a network and counts how often it was asked for it and it was run."""

    def __init__(self, model):
        self.model, self.loads, self.batches = model.eval(), 0, []
        model.register_forward_hook(lambda m, x, y: self.batches.append(len(x[0])))

    def __call__(self):
        self.loads += 1
        return self.model


@pytest.fixture
def counted(data):
    return Counted(student(data, 3))


def test_the_bank_equals_a_fresh_forward(data, counted, tmp_path):
    bank = exp.Bank(data, counted, tmp_path / "bank")
    found = bank.logits(4)
    views = data.views(torch.arange(len(data)), data.pool(4))
    fresh = exp.predict(counted.model, data, views)
    assert found.dtype == torch.float16 and found.shape == (len(data), 10)
    assert torch.equal(found, fresh.half())
    assert torch.equal(bank.logits("val"), exp.predict(counted.model, data, data.val_x).half())
    assert not torch.equal(found, bank.logits(5))


@pytest.mark.parametrize("on_disk", [True, False])
def test_each_table_is_computed_once(data, counted, tmp_path, on_disk):
    bank = exp.Bank(data, counted, tmp_path / "bank" if on_disk else None)
    tables = [bank.logits(t) for t in (0, 1, "val", 0, 1, "val")]
    assert counted.batches == [len(data), len(data), len(data.val_y)] and counted.loads == 1
    assert all(torch.equal(a, b) for a, b in zip(tables, tables[3:]))


def test_a_restart_reads_the_same_bits_without_the_teacher(data, counted, tmp_path):
    first = exp.Bank(data, counted, tmp_path / "bank").logits(2)

    def fail():
        raise AssertionError("the bank was there already")

    assert torch.equal(exp.Bank(data, fail, tmp_path / "bank").logits(2), first)


def test_a_rotten_bank_is_computed_again(data, counted, tmp_path):
    """And written again: the first writer wins only if what it wrote is sound."""
    first = exp.Bank(data, counted, tmp_path / "bank").logits(2)
    (file,) = (f for f in (tmp_path / "bank").rglob("*") if f.is_file())
    file.write_bytes(file.read_bytes()[:-70])
    runs = len(counted.batches)

    def impatient(*_):
        assert len(counted.batches) < runs + 2, "computed more than once"

    counted.model.register_forward_hook(impatient)
    assert torch.equal(exp.Bank(data, counted, tmp_path / "bank").logits(2), first)
    assert torch.equal(exp.read(file)["logits"], first)


def test_chunks_are_fixed(raw, counted):
    data = tiny_data(exp.CHUNK + 30, raw=raw)
    exp.Bank(data, counted).logits(0)
    assert counted.batches == [exp.CHUNK, 30]


class FixedBank:
    """A bank of given logits."""

    def __init__(self, data, val, train=None):
        self.data, self.given = data, {"val": val.half()}
        self.train = train

    def logits(self, table):
        return self.given["val"] if table == "val" else self.train


@pytest.fixture
def good_and_noise(data):
    """A teacher that knows the validation labels, and one that guesses with confidence."""
    torch.manual_seed(0)
    good = 6.0 * F.one_hot(data.val_y, 10) + torch.randn(len(data.val_y), 10)
    return [FixedBank(data, good), FixedBank(data, 4 * torch.randn(good.shape))]


def teachers_of(banks, attend=True, seed=0):
    return exp.Teachers(banks, attend, exp.generator(seed, "attention"))


def equalised(banks):
    """The teachers' validation logits [N, M, K], each scaled to the spread of the first."""
    val = torch.stack([b.logits("val").float() for b in banks], 1)
    spread = val.std(2).mean(0)
    return val * (spread[0] / spread)[:, None]


def test_attention_starts_uniform_and_sums_to_one(good_and_noise):
    teachers, v = teachers_of(good_and_noise), equalised(good_and_noise)
    assert torch.equal(teachers.weights(v), torch.full((len(v), 2), 0.5))
    for _ in range(30):
        teachers.learn(v, good_and_noise[0].data.val_y)
    a = teachers.weights(v)
    assert torch.allclose(a.sum(1), torch.ones(len(v))) and a.min() > 0
    assert a[:, 0].std() > 1e-4  # per sample


def test_attention_learns_to_ignore_a_noise_teacher(good_and_noise):
    teachers, v = teachers_of(good_and_noise), equalised(good_and_noise)
    for _ in range(300):
        teachers.learn(v, good_and_noise[0].data.val_y)
    assert teachers.weights(v)[:, 1].mean() < 0.05
    report = teachers.diagnose()
    assert report["weights"][1] < 0.05 and report["val_nll"][3] < report["val_nll"][2]
    assert report["val_acc"][0] > 95 > 30 > report["val_acc"][1]


def test_attention_reaches_its_optimum(data):
    """Where all samples look alike, a ~ exp(-CE / beta) with beta 0.5 nat."""
    y = torch.zeros(len(data.val_y), dtype=torch.long)
    rows = torch.tensor([[2.0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0, 0, 0, 0, 0, 0]])
    banks = [FixedBank(data, row.expand(len(y), 10)) for row in rows]
    teachers = teachers_of(banks)
    v = equalised(banks)[:8]
    for _ in range(1000):
        teachers.learn(v, y[:8])
    ce = F.cross_entropy(rows, y[:2], reduction="none")
    best = (-ce / 0.5).softmax(0)
    assert torch.allclose(teachers.weights(v)[0], best, atol=0.02)


def test_the_target_is_the_weighted_mixture(good_and_noise):
    teachers = teachers_of(good_and_noise)
    logits = torch.stack([b.logits("val") for b in good_and_noise], 1)
    for _ in range(20):
        teachers.learn(equalised(good_and_noise), good_and_noise[0].data.val_y)
    v = equalised(good_and_noise)
    a, p = teachers.weights(v), (v / 3.0).softmax(2)
    mixture = a[:, :1] * p[:, 0] + a[:, 1:] * p[:, 1]
    assert torch.allclose(teachers.target(logits, 3.0), mixture, atol=1e-6)


def test_one_teacher_is_not_rescaled(good_and_noise):
    logits = good_and_noise[1].logits("val")[:, None]
    found = teachers_of(good_and_noise[1:]).target(logits, 2.0)
    assert torch.allclose(found, (logits[:, 0].float() / 2).softmax(1), atol=1e-6)


def test_the_students_loss_gives_attention_no_gradient(good_and_noise):
    teachers, y = teachers_of(good_and_noise), good_and_noise[0].data.val_y
    teachers.learn(equalised(good_and_noise), y)
    teachers.zero_grad()
    target = teachers.target(torch.stack([b.logits("val") for b in good_and_noise], 1), 4.0)
    z = torch.zeros(len(y), 10, requires_grad=True)
    exp.kd_loss(z, y, target, 4.0, 0.9)[0].backward()
    assert not target.requires_grad and z.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in teachers.parameters())


@pytest.mark.parametrize("attend, banks", [(False, 2), (True, 1)])
def test_without_attention_or_choice_the_weights_stay_uniform(good_and_noise, attend, banks):
    result, _ = train(
        good_and_noise[0].data,
        attend="5x run1" * attend,
        banks=[
            FixedBank(b.data, b.logits("val"), torch.zeros(120, 10).half())
            for b in good_and_noise[:banks]
        ],
        alpha=0.5,
    )
    assert result["mixture"]["weights"] == pytest.approx([1 / banks] * banks)


def test_attention_learns_beside_the_student(good_and_noise):
    banks = [
        FixedBank(b.data, b.logits("val"), torch.zeros(120, 10).half()) for b in good_and_noise
    ]
    result, _ = train(banks[0].data, epochs=8, banks=banks, attend="5x run1", alpha=0.5)
    weights = result["mixture"]["weights"]
    assert weights[0] > 0.505 and sum(weights) == pytest.approx(1)


KEY = dict(mode="quick", student_epochs=2, teacher_epochs=3, batch_size=32, lr=0.05, seed=0)
KEY |= dict(patience=0, width=16)


def job_of(method):
    return exp.plan_jobs({f"5x {method}": 1})[f"student_5x_{method}_run1"]


OFF = "HPM-KD-no-config-no-chain-no-attention-no-temperature"


def test_with_all_parts_off_hpmkd_is_traditional_kd(data, counted):
    """Bit for bit, at the same T and alpha; with a chain of one teacher in both."""
    plain, hpm = (exp.setting_of(job_of(m), KEY) for m in ("TraditionalKD", OFF))
    assert hpm.alpha == plain.alpha == 0.5 and hpm.t_high == hpm.t_low == 3.0
    assert job_of(OFF).needs == job_of("TraditionalKD").needs == ("teacher",)
    results = []
    for setting in (replace(plain, t_high=3.0, t_low=3.0), hpm):
        model = student(data)
        record = exp.train(model, data, setting, [exp.Bank(data, counted)])
        results.append((record["history"]["loss"], model.state_dict()))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_each_part_changes_the_setting_that_it_is_about():
    on = exp.setting_of(job_of("HPM-KD"), KEY, 8.0, 0.9)
    assert (on.t_high, on.t_low, on.alpha, bool(on.attend)) == (8.0, 4.0, 0.9, True)
    still = exp.setting_of(job_of("HPM-KD-no-temperature"), KEY, 8.0, 0.9)
    assert (still.t_high, still.t_low) == (6.0, 6.0)
    assert not exp.setting_of(job_of("HPM-KD-no-attention"), KEY).attend
    assert job_of("HPM-KD-no-chain").needs == ("teacher", "probe")
    assert "probe" not in job_of("HPM-KD-no-config").needs


def trial(quality, labels, spread=1.0, status="done"):
    """A candidate whose validation logits know the labels to some degree."""
    g = torch.Generator().manual_seed(int(100 * quality))
    noise = spread * torch.randn(len(labels), 10, generator=g)
    logits = quality * F.one_hot(labels, 10) + noise
    return dict(status=status, tail=[logits, logits])


def test_the_probe_prefers_a_sound_candidate(data):
    y = data.val_y
    trials = [trial(q, y) for q in (0.1, 3.0, 0.0, 0.2)]
    result = exp.choose(trials, exp.CANDIDATES, y)
    assert tuple(result["choice"]) == exp.CANDIDATES[1] and len(result["scores"]) == 4
    assert result["scores"][1][2] < result["scores"][0][2]  # the NLL


def test_the_probe_keeps_the_default_within_noise(data):
    y, default = data.val_y, trial(2.0, data.val_y)
    close = default["tail"][0] + 0.05 * torch.randn(len(y), 10, generator=exp.generator("x"))
    trials = [default] + [dict(status="done", tail=[close, close])] * 3
    assert tuple(exp.choose(trials, exp.CANDIDATES, y)["choice"]) == exp.CANDIDATES[0]
    same_again = exp.choose([default] * 4, exp.CANDIDATES, y)
    assert tuple(same_again["choice"]) == exp.CANDIDATES[0]


def test_the_probe_judges_after_fitting_a_temperature(data):
    """Overconfidence alone is no fault; a worse ranking is."""
    y = data.val_y
    calm = trial(2.0, y)
    loud = dict(status="done", tail=[3.0 * x for x in calm["tail"]])
    nll = [row[2] for row in exp.choose([calm, loud], exp.CANDIDATES[:2], y)["scores"]]
    assert nll[0] == pytest.approx(nll[1], abs=0.01)


def test_the_probe_drops_a_diverged_candidate(data):
    y = data.val_y
    broken = dict(status="diverged", tail=[torch.full((len(y), 10), math.nan)] * 2)
    choices = [
        exp.choose(trials, exp.CANDIDATES[:2], y)["choice"]
        for trials in ([trial(2.0, y), broken], [broken, trial(2.0, y)])
    ]
    assert [tuple(c) for c in choices] == [exp.CANDIDATES[0], exp.CANDIDATES[1]]


def test_attention_settles_at_the_optimum_that_its_entropy_term_implies():
    """a_m ~ exp(-CE_m / beta): without the entropy all the weight would go to the better one."""
    labels = torch.zeros(64, dtype=torch.long)
    good, bad = (torch.tensor(v).expand(64, 4) for v in ([0.5, 0, 0, 0], [0, 0.5, 0, 0]))
    data = SimpleNamespace(val_y=labels)
    banks = [SimpleNamespace(data=data, logits=lambda table, v=v: v) for v in (good, bad)]
    teachers = exp.Teachers(banks, True, exp.generator(0))
    for _ in range(1500):
        teachers.learn(teachers.val, labels)
    ce = torch.tensor([torch.nn.functional.cross_entropy(v, labels) for v in (good, bad)])
    expected = (-ce / 0.5).softmax(0)
    assert teachers.weights(teachers.val)[0].detach() == pytest.approx(expected, abs=0.02)
    assert expected[0] < 0.75


def test_the_probe_leaves_its_default_only_beyond_one_standard_error():
    labels, seen = torch.arange(200) % 2, set()
    sound = torch.nn.functional.one_hot(labels).float()
    for seed in range(60):
        noise = torch.randn(2, 200, 2, generator=exp.generator("noise", seed))
        trials = [dict(status="done", tail=[sound + 0.7 * x] * 2) for x in noise]
        chosen = exp.choose(trials, exp.CANDIDATES[:2], labels)
        gain, error = chosen["scores"][1][3:]
        assert tuple(chosen["choice"]) == exp.CANDIDATES[int(gain > error)]
        seen.add("clear" if gain > error else "noise" if gain > 0 else "worse")
    assert seen == {"clear", "noise", "worse"}
