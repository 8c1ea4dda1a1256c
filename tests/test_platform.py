"""Section 3: where am I, and which device really works."""

import pytest
import torch

import run_exp1b_kaggle as exp


def tree(root, *folders):
    for folder in folders:
        (root / folder).mkdir(parents=True)
    return root


def test_kaggle(tmp_path):
    root = tree(tmp_path, "kaggle/working", "kaggle/input/datasets/owner/slug")
    here = exp.detect_platform(root, {"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert here.output == root / "kaggle/working" and here.inputs == [root / "kaggle/input"]
    assert here.scratch == root / "kaggle/temp/data"
    assert (here.name, here.hours, here.notebook, here.drive) == ("Kaggle", 11.5, True, False)


def test_colab_without_drive(tmp_path):
    root = tree(tmp_path, "content")
    here = exp.detect_platform(root, {"COLAB_RELEASE_TAG": "x"})
    assert (here.name, here.output, here.drive) == ("Colab", root / "content", False)
    assert here.scratch == root / "content/data" and here.notebook


def test_colab_with_drive(tmp_path):
    root = tree(tmp_path, "content/drive/MyDrive")
    here = exp.detect_platform(root, {"COLAB_GPU": "1"})
    assert here.output == root / "content/drive/MyDrive/HPM-KD_Results" and here.drive
    assert here.scratch == root / "content/data"


@pytest.mark.parametrize("env, notebook", [({}, False), ({"JPY_PARENT_PID": "1"}, True)])
def test_local(tmp_path, monkeypatch, env, notebook):
    monkeypatch.chdir(tmp_path)
    here = exp.detect_platform(tree(tmp_path, "content"), env)
    assert (here.name, here.output, here.scratch) == ("local", tmp_path, None)
    assert here.inputs == [] and here.hours is None and here.notebook is notebook


@pytest.mark.parametrize("workers, names", [(None, ["cpu"]), (3, ["cpu"] * 3)])
def test_the_cpu_serves_any_number_of_workers(workers, names):
    assert exp.usable_devices("cpu", "full", workers) == names


def test_no_gpu_names_the_setting_of_the_notebook(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(exp.UserError, match="Settings.*Accelerator.*GPU T4 x2"):
        exp.usable_devices("auto", "quick")
    with pytest.raises(exp.UserError, match="Accelerator"):
        exp.usable_devices("cuda", "smoke")
    assert exp.usable_devices("auto", "smoke") == ["cpu"]


def fake_gpus(monkeypatch, error=None):
    """Two devices that are present; each operation raises `error`, if there is one."""
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def fake(*size, device="cpu", **more):
        if str(device).startswith("cuda") and error:
            raise error
        return ones(*size, **more)

    for name in ("ones", "zeros", "empty", "rand", "arange"):
        monkeypatch.setattr(torch, name, fake)


def test_a_gpu_without_kernels_names_the_setting(monkeypatch):
    """A P100 is_available(), but its first operation dies."""
    fake_gpus(monkeypatch, RuntimeError("CUDA error: no kernel image is available\nmore"))
    with pytest.raises(exp.UserError, match="no kernel image.*GPU T4 x2") as error:
        exp.usable_devices("auto", "full")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wanted, workers, names",
    [
        ("auto", None, ["cuda:0", "cuda:1"]),
        ("cuda", 1, ["cuda:0"]),
        ("cuda:1", None, ["cuda:1"]),
        ("auto", 3, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cpu", None, ["cpu"]),
    ],
)
def test_a_worker_per_gpu(monkeypatch, wanted, workers, names):
    fake_gpus(monkeypatch)
    assert exp.usable_devices(wanted, "full", workers) == names


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", ""])
def test_an_unknown_device_is_refused(wanted):
    with pytest.raises(exp.UserError, match="--device"):
        exp.usable_devices(wanted, "smoke")
