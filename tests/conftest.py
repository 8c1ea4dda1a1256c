"""What the test modules share: a tiny toy dataset and the program as a real subprocess."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import run_exp1b_kaggle as exp  # noqa: E402

torch.set_num_threads(1)
TINY = "--mode smoke --device cpu --width 12 --subset 100 --teacher-epochs 1 --student-epochs 2"
TINY = [*TINY.split(), "--checkpoint-interval", "1"]
CELLS = "--runs 2 --compression 5x".split()


def start(*arguments, **env) -> subprocess.Popen:
    """The program with these arguments, as a user's shell would start it."""
    command = [sys.executable, str(ROOT / "run_exp1b_kaggle.py"), *map(str, arguments)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=os.environ | env, **streams)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, all output) of a process that ends by itself."""
    try:
        output = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    return process.returncode, output


def wait_for(found, process: subprocess.Popen):
    """The first true value of found(), while the process is alive."""
    end = time.monotonic() + 200
    while not (value := found()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
    return value


def run_in(folder) -> exp.RunDir:
    """The only run directory below a folder."""
    (path,) = Path(folder).glob("exp1b_*")
    return exp.RunDir(path)


def tiny_data(subset=120, limit=100, seed=0, raw=None) -> exp.Data:
    """A small part of the toy set."""
    return exp.Data(raw or exp.load_dataset("toy"), seed, subset, limit)


def student(data, seed=0, ratio=20.0) -> torch.nn.Module:
    """A small student whose initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return exp.build_student(ratio, 2_000_000, len(data.raw["classes"]))


def train(data, init=0, banks=(), **more):
    """(record, model) of a short training of `student`."""
    options = {k: more.pop(k) for k in ("precision", "snapshots", "control") if k in more}
    model = student(data, init)
    setting = exp.Setting(**dict(epochs=2, batch_size=32, lr=0.05) | more)
    return exp.train(model, data, setting, banks, **options), model


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def raw():
    return exp.load_dataset("toy")


@pytest.fixture(scope="session")
def data(raw):
    return tiny_data(raw=raw)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> exp.RunDir:
    """A complete smoke run of one ratio; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = finish(start(*TINY, *CELLS, "--output", folder))
    assert code == 0, output
    return run_in(folder)


@pytest.fixture
def logged():
    """The messages that the program logs during the test."""
    lines, log = [], logging.getLogger("exp1b")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)
