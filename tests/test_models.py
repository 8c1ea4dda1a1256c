"""Section 5: the teacher, and a student for any ratio."""

import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ROOT
from torch import nn

import run_exp1b_kaggle as exp


def shape_of(build, *arguments) -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return build(*arguments)


def test_the_teacher_has_exactly_the_known_size():
    assert exp.count_parameters(shape_of(exp.build_teacher, 10)) == 23_520_842
    assert exp.count_parameters(shape_of(exp.build_teacher, 100)) == 23_520_842 + 90 * 2049


def torchvision_twin(width: int, num_classes: int) -> nn.Module:
    """torchvision's ResNet-50 with a 3x3 stride-1 stem and no max-pool, its stages `width` wide."""
    twin = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], num_classes=num_classes
    )
    if width != 64:
        twin.inplanes = width
        stages = zip((1, 2, 4, 8), (3, 4, 6, 3), (1, 2, 2, 2))
        for i, (m, depth, stride) in enumerate(stages, 1):
            block = torchvision.models.resnet.Bottleneck
            setattr(twin, f"layer{i}", twin._make_layer(block, width * m, depth, stride))
        twin.bn1, twin.fc = nn.BatchNorm2d(width), nn.Linear(width * 32, num_classes)
    twin.conv1, twin.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
    return twin


@pytest.mark.parametrize("width", [64, 8])
def test_the_teacher_is_torchvisions_resnet50(width):
    torch.manual_seed(0)
    model, twin = exp.build_teacher(10, width).eval(), torchvision_twin(width, 10).eval()
    for name, value in twin.state_dict().items():  # else the residual branches are all zero
        if "running" in name or name.endswith("bn3.weight"):
            value.copy_(torch.rand(value.shape) + 0.5)
    model.load_state_dict(twin.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_residual_branches_start_at_zero():
    torch.manual_seed(0)
    model = exp.build_teacher(10, 8)
    zeros = [n for n, p in model.named_parameters() if p.ndim == 1 and not p.any()]
    assert sum(n.endswith("bn3.weight") for n in zeros) == 16


RATIOS = [1.5, 1.7, 2.0, 2.3, 2.9, 3.5, 4.2, 5.0, 6.1, 7.0, 8.6, 10.0, 12.0, 14.3, 17.0, 20.0]


@pytest.mark.parametrize("num_classes", [10, 37, 100])
@pytest.mark.parametrize("width", [16, 24, 40, 64])
def test_the_ratio_holds_within_one_percent(width, num_classes):
    teacher = exp.count_parameters(shape_of(exp.build_teacher, num_classes, width))
    for ratio in RATIOS:
        student = exp.count_parameters(shape_of(exp.build_student, ratio, teacher, num_classes))
        assert abs(teacher / student / ratio - 1) < 0.01, ratio


@pytest.mark.parametrize("ratio", [2.3, 5.0, 7.0])
def test_students_of_the_experiment_suit_tensor_cores(ratio):
    widths = exp.student_widths(ratio, 23_520_842, 10)
    assert all(w % 8 == 0 for w in widths) and widths == sorted(widths)
    model = exp.build_student(ratio, 23_520_842, 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) == 17  # ResNet-18
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_an_impossible_student_is_a_user_error():
    with pytest.raises(exp.UserError, match="50"):
        exp.build_student(50.0, 9_000, 10)


def test_macs_equal_a_count_by_hand():
    """Every convolution and the last layer: inputs x outputs x kernel x positions."""
    torch.manual_seed(0)
    params, macs = exp.measure(1, 10, 8, 16)
    model, total = exp.build_teacher(10, 8), 0

    def count(layer, inputs, output):
        nonlocal total
        total += layer.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 16, 16))
    assert params == exp.count_parameters(model) == sum(p.numel() for p in model.parameters())
    assert macs == total


def test_a_wider_image_costs_in_proportion():
    (small, macs), (large, more) = exp.measure(5.0, 10, 16, 16), exp.measure(5.0, 10, 16, 32)
    assert small == large and abs(more / macs - 4) < 0.01


def test_the_smallest_students_survive_a_step_on_the_cpu():
    """oneDNN writes out of bounds for some channels_last widths below 8: the process dies."""
    code = """import torch, run_exp1b_kaggle as e
    raw = e.load_dataset("toy")
    data = e.Data(raw, 0, 256, 100)
    teacher = e.count_parameters(e.build_teacher(10, 16))
    for ratio in (15.0, 20.0):
        model = e.build_student(ratio, teacher, 10)
        print(e.train(model, data, e.Setting(3, 64, 0.05))["status"])"""
    command = [sys.executable, "-c", code.replace("\n    ", "\n")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "done\ndone\n"), run.stderr
