"""Section 7: atomic, checksummed, safe to read from strangers."""

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, same, student

import run_exp1b_kaggle as exp

STATE = dict(key=dict(lr=0.1, seed=0), jobs={"a": dict(x=[1, 2.5, None, True, "é", -7])}, n=1 << 40)
TENSORS = dict(weights={"w": torch.arange(12.0).reshape(3, 4)}, arch=dict(widths=[8, 16]), n=3)
LEAST = dict(key={}, task={}, cells={}, jobs={})  # what makes plain data a state


@pytest.fixture
def run(tmp_path):
    run = exp.RunDir(tmp_path / "exp1b_smoke_20260101_000000")
    run.folder.mkdir(parents=True)
    return run


def test_a_plain_file_comes_back_and_pickle_can_read_it(tmp_path):
    exp.put(tmp_path / "s", exp.pack(STATE, plain=True))
    assert exp.read(tmp_path / "s", plain=True) == STATE
    assert pickle.loads((tmp_path / "s").read_bytes()) == STATE


def test_tensors_come_back_and_torch_can_read_them(tmp_path):
    exp.put(tmp_path / "t.pt", exp.pack(TENSORS))
    for found in (exp.read(tmp_path / "t.pt"), torch.load(tmp_path / "t.pt", weights_only=True)):
        assert torch.equal(found["weights"]["w"], TENSORS["weights"]["w"])
        assert found["arch"] == TENSORS["arch"] and found["n"] == 3


@pytest.mark.parametrize("plain", [True, False], ids=["state", "tensors"])
def test_every_truncation_is_refused(tmp_path, plain):
    content = exp.pack(STATE if plain else TENSORS, plain=plain)
    for n in {*range(0, len(content), max(1, len(content) // 60)), len(content) - 1}:
        (tmp_path / "f").write_bytes(content[:n])
        with pytest.raises(ValueError):
            exp.read(tmp_path / "f", plain=plain)
    (tmp_path / "f").write_bytes(content + b"\0")
    with pytest.raises(ValueError):
        exp.read(tmp_path / "f", plain=plain)


@pytest.mark.parametrize("plain", [True, False], ids=["state", "tensors"])
def test_every_single_bit_flip_is_refused(tmp_path, plain):
    content = bytearray(exp.pack(STATE if plain else TENSORS, plain=plain))
    places = range(len(content)) if plain else [*range(0, len(content), 29), len(content) - 1]
    for i in places:
        content[i] ^= 1 << (i % 8)
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(ValueError):
            exp.read(tmp_path / "f", plain=plain)
        content[i] ^= 1 << (i % 8)


def test_a_sound_file_with_another_seal_is_refused(tmp_path):
    exp.put(tmp_path / "f", exp.pack(TENSORS))
    with pytest.raises(ValueError):
        exp.read(tmp_path / "f", seal="0" * 64)


class Evil:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def sealed(content: bytes) -> bytes:
    """A hostile file with the right checksum."""
    return content + hashlib.sha256(content).hexdigest().encode()


def hostile_pickles(command):
    big = struct.pack("<I", 0x7FFFFFFF)
    yield "reduce", pickle.dumps(Evil(command), 2)
    yield "reduce in protocol 4", pickle.dumps({"jobs": [Evil(command)]}, 4)
    yield "reduce in protocol 0", pickle.dumps(Evil(command), 0)
    yield "global", b"\x80\x02cos\nsystem\n."
    yield "instance", b"(S'%s'\nios\nsystem\n." % command.encode()
    yield "object", b"(cos\nsystem\nS'%s'\no." % command.encode()
    yield "huge memo index", b"\x80\x02]r" + big + b"."
    yield "huge LONG_BINGET", b"\x80\x02]q\0j" + big + b"."
    yield "memo bomb", b"\x80\x02]q\x00" + b"(h\x00h\x00l0h\x00h\x00\x86q\x00" * 60 + b"."
    yield "huge integer", b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b"."
    yield "huge claimed string", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x."
    yield "persistent id", b"\x80\x02X\x01\0\0\0xQ."
    yield "extension", b"\x80\x02\x82\x01."
    yield "no stop", b"\x80\x04N"
    yield "empty stack", b"\x80\x04."
    yield "nothing", b""


@pytest.mark.parametrize("name", [name for name, _ in hostile_pickles("")])
def test_hostile_states_are_refused_without_running_anything(run, name):
    witness = run.path / "ran"
    content = dict(hostile_pickles(f"touch {witness}"))[name]
    run.states[0].write_bytes(sealed(content))
    with pytest.raises(ValueError):
        exp.read(run.states[0], plain=True)
    with pytest.raises(exp.UserError):
        run.read_state()
    assert not witness.exists() and run.states[0].exists()


def hostile_zip(data_pkl: bytes) -> bytes:
    """torch's zip with another pickle in it."""
    source, target = io.BytesIO(), io.BytesIO()
    torch.save(TENSORS, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            bad = item.filename.endswith("data.pkl")
            new.writestr(item.filename, data_pkl if bad else old.read(item))
    return target.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [name for name, _ in hostile_pickles("")])
def test_hostile_models_are_refused_without_running_anything(tmp_path, name):
    witness = tmp_path / "ran"
    content = dict(hostile_pickles(f"touch {witness}"))[name]
    for body in (hostile_zip(content), content):
        (tmp_path / "m.pt").write_bytes(sealed(body))
        if name not in ("huge memo index", "huge integer"):  # these are harmless to torch
            with pytest.raises(ValueError):
                exp.read(tmp_path / "m.pt")
        with pytest.raises(exp.UserError):
            exp.load_model(tmp_path / "m.pt")
    assert not witness.exists()


def test_a_global_in_a_model_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(dict(weights={}, arch=pickle.Pickler), buffer)
    (tmp_path / "m.pt").write_bytes(sealed(buffer.getvalue()))
    with pytest.raises(ValueError):
        exp.read(tmp_path / "m.pt")


def test_put_leaves_the_old_file_if_writing_fails(tmp_path, monkeypatch):
    exp.put(tmp_path / "f", b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        exp.put(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and len(os.listdir(tmp_path)) == 1


def test_the_state_keeps_its_previous_generation(run):
    run.write_state(LEAST | dict(n=1))
    run.write_state(LEAST | dict(n=2))
    assert run.read_state()["n"] == 2 and not run.bad
    run.states[0].write_bytes(run.states[0].read_bytes()[:-5])
    assert run.read_state()["n"] == 1 and [f for f, _ in run.bad] == [run.states[0]]
    run.states[0].unlink()
    assert run.read_state()["n"] == 1


def test_plain_data_that_is_no_state_is_refused(run):
    for value in ([], dict(n=1), "state"):
        exp.put(run.states[0], exp.pack(value, plain=True))
        with pytest.raises(exp.UserError, match="no readable state"):
            run.read_state()


def test_two_bad_generations_are_an_error_and_untouched(run):
    run.write_state(LEAST | dict(n=1))
    run.write_state(LEAST | dict(n=2))
    for file in run.states:
        file.write_bytes(b"rotten" + file.read_bytes())
    before = {f: f.read_bytes() for f in run.folder.iterdir()}
    with pytest.raises(exp.UserError, match="no readable state"):
        run.read_state()
    assert exp.main(["--resume", str(run.path), "--device", "cpu"]) == 2
    assert {f: f.read_bytes() for f in run.folder.iterdir()} == before


def test_a_second_process_is_refused_with_the_pid_of_the_first(run):
    code = "import sys, run_exp1b_kaggle as e\ntry: e.RunDir(sys.argv[1]).lock()\n"
    code += "except e.UserError as error: print(error)\nelse: print('locked')"
    command = [sys.executable, "-c", code, str(run.path)]

    run.lock()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert f"PID {os.getpid()}" in second and os.uname().nodename in second
    run.handle.close()
    exp.RunDir(run.path).lock()  # free again


def test_a_finished_model_is_ready_for_inference(finished):
    path = finished.folder / "student_5x_HPM-KD_run1.pt"
    model, state = exp.load_model(path), finished.read_state()
    data = exp.Data(exp.load_dataset("toy"), 0, 100, 1000)
    logits = model(data.test_x.permute(0, 3, 1, 2) / 255)
    accuracy = 100 * (logits.argmax(1) == data.test_y).double().mean().item()
    record = state["jobs"]["student_5x_HPM-KD_run1"]
    assert accuracy == pytest.approx(record["test_acc"], abs=0.2) and not model.training
    assert model.classes == data.raw["classes"]
    assert exp.count_parameters(model) == record["params"]


@pytest.mark.parametrize("content", [b"", b"no model", exp.pack(TENSORS)])
def test_a_foreign_file_is_no_model(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(exp.UserError, match="m.pt"):
        exp.load_model(tmp_path / "m.pt")
    with pytest.raises(exp.UserError, match="absent.pt"):
        exp.load_model(tmp_path / "absent.pt")


def test_verify_forgets_missing_and_rotten_models(run):
    jobs, done = ["teacher", "a", "b"], {}
    for name in jobs:
        content = exp.pack(TENSORS | dict(name=name))
        exp.put(run.file(name, "toy"), content)
        done[name] = dict(sha256=content[-64:].decode())
    state = dict(task=dict(name="toy"), jobs=done)
    run.file("a", "toy").write_bytes(b"rotten")
    run.file("b", "toy").unlink()
    run.verify(state)
    assert [*state["jobs"]] == ["teacher"]
    assert sorted(f.name for f in run.folder.iterdir()) == [
        "a.pt.corrupt",
        "teacher_resnet50_toy.pt",
    ]


def test_the_newest_sound_snapshot_counts(run, data, logged):
    """Two files take turns; a torn newer one is set aside, a foreign one is not taken."""
    snapshots = exp.Snapshots(run, "job", "me", 1)
    assert snapshots.load() is None
    for epoch in (1, 2, 3):
        snapshots.offer(epoch, epoch == 3, lambda: dict(model=student(data, 1).state_dict()))
    snapshots.pending.result()
    saved = exp.Snapshots(run, "job", "me").load()
    assert saved["epoch"] == 3 and same(saved["model"], student(data, 1).state_dict())
    assert exp.Snapshots(run, "job", "someone else").load() is None
    (newest,) = (f for f in run.folder.iterdir() if exp.read(f)["epoch"] == 3)
    newest.write_bytes(newest.read_bytes()[:-9])
    assert exp.Snapshots(run, "job", "me").load()["epoch"] == 2
    assert newest.with_name(newest.name + ".corrupt").exists() and newest.name in " ".join(logged)


def test_the_interval_of_snapshots_is_exact(run):
    snapshots, written = exp.Snapshots(run, "job", "me", 2), []

    def content():
        written.append(epoch)
        return {}

    for epoch in range(1, 8):
        snapshots.offer(epoch, epoch == 7, content)
    assert written == [2, 4, 6, 7]
