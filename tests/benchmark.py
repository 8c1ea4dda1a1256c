#!/usr/bin/env python3
"""What a training step costs: Direct, and three ways to distil. Run by hand, on any device:

    python tests/benchmark.py                            # the measurement, teacher width 64
    python tests/benchmark.py --batch-size 32            # the same, for a CPU
    python tests/benchmark.py --steps 3 --width 16       # only to see that it works

Per ratio it times, in one process and interleaved, so that a slow minute of the machine hits all
four alike:

    Direct         cross-entropy only
    KD, bank       TraditionalKD as run_exp1b_kaggle.py trains it, the teacher's logits from a bank
    HPM-KD, bank   two banks (teacher and one assistant) and learned attention
    KD, teacher    what public KD code does: the teacher network runs in every step

Printed are the median and the interquartile range of the step time, and of its quotient by the
Direct step of the same round. Wanted: KD, bank <= 1.05 and HPM-KD, bank <= 1.15 x Direct.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_exp1b_kaggle as exp  # noqa: E402

KINDS = "Direct", "KD, bank", "HPM-KD, bank", "KD, teacher"
WANTED = {"KD, bank": 1.05, "HPM-KD, bank": 1.15}
IMAGES, CLASSES = 10_000, 10


def make_data(device: str) -> exp.Data:
    """Noise in the shape of CIFAR-10 (a step takes the same time whatever the pixels show)."""
    g = torch.Generator().manual_seed(0)
    raw = dict(classes=[str(i) for i in range(CLASSES)], flips=2)
    for part, n in (("train", IMAGES), ("test", 100)):
        x = torch.randint(256, (n, exp.SIDE, exp.SIDE, 3), generator=g, dtype=torch.uint8)
        raw |= {f"{part}_x": x, f"{part}_y": torch.arange(n) % CLASSES}
    return exp.Data(raw, device=device)


def make_bank(data: exp.Data, seed: int) -> exp.Bank:
    """A bank filled with random logits: only their shape and type matter for the time, and a
    ResNet-50 over all images would take longer than the measurement."""
    g, bank = torch.Generator().manual_seed(seed), exp.Bank(data, load=lambda: None)
    for table, n in ((0, len(data)), ("val", len(data.val_y))):
        bank.memory[table] = (3 * torch.randn(n, CLASSES, generator=g)).half()
    return bank


class Stepper:
    """The inner loop of exp.train, one step per call, for one of KINDS."""

    def __init__(self, kind: str, ratio: float, teacher, data: exp.Data, args, precision: str):
        self.kind, self.data, self.batch, self.precision = kind, data, args.batch_size, precision
        device = data.device
        self.model = exp.build_student(ratio, exp.count_parameters(teacher), CLASSES)
        self.model.to(device, memory_format=exp.CHANNELS_LAST).train()
        self.teacher = teacher if kind == "KD, teacher" else None
        sgd = dict(momentum=exp.MOMENTUM, nesterov=True, weight_decay=exp.WEIGHT_DECAY, fused=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.001, **sgd)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        banks = [make_bank(data, i) for i in range({"KD, bank": 1, "HPM-KD, bank": 2}.get(kind, 0))]
        self.teachers = exp.Teachers(banks, len(banks) > 1, exp.generator(0)) if banks else None
        self.T, self.alpha = exp.KD if kind != "Direct" else (exp.KD[0], 0.0)
        # Once per epoch, as in exp.train: the order, the views, the bank's table, the labels.
        order, view = torch.randperm(len(data), generator=exp.generator(1)), data.pool(0)
        at = order.to(device)
        self.v = torch.stack([b.logits(0) for b in banks], 1)[at] if banks else None
        self.x, self.y, self.steps = data.views(order, view[order]), data.train_y[at], 0
        self.batches = max(1, len(data) // self.batch)
        shape = self.batches, self.batch
        judged = torch.randint(len(data.val_y), shape, generator=exp.generator(2))
        self.judged, self.sums = judged.to(device), torch.zeros(3, device=device)

    def step(self) -> None:
        i, self.steps = self.steps % self.batches, self.steps + 1
        part, data, teachers = slice(i * self.batch, (i + 1) * self.batch), self.data, self.teachers
        y = self.y[part]
        with exp.autocast(data.device, self.precision):
            logits = self.model(data.pixels(self.x[part]))
        if self.teacher:
            with torch.no_grad(), exp.autocast(data.device, self.precision):
                seen = self.teacher(data.pixels(self.x[part]))
            target = F.softmax(seen.float() / self.T, 1)
        else:
            target = teachers.target(self.v[part], self.T) if teachers else None
        loss, ce = exp.kd_loss(logits.float(), y, target, self.T, self.alpha)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.optimizer.param_groups[0]["lr"] = exp.learning_rate(i, self.batches, 0.001)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if teachers and teachers.attend:
            teachers.learn(teachers.val[self.judged[i]], data.val_y[self.judged[i]])
        hits = (logits.argmax(1) == y).float().mean()
        self.sums += torch.stack([loss.detach(), ce.detach(), 100 * hits])


def timed(stepper: Stepper, block: int) -> float:
    """Milliseconds per step over a block of steps, everything on the device finished."""

    def finish():
        if stepper.data.device.type == "cuda":
            torch.cuda.synchronize()

    finish()
    begun = time.perf_counter()
    for _ in range(block):
        stepper.step()
    finish()
    return 1000 * (time.perf_counter() - begun) / block


def spread(values, digits: int) -> str:
    """The median, and in brackets the first and the third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f} to {high:.{digits}f}]"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--width", type=int, default=64, help="of the teacher (default 64)")
    parser.add_argument("--steps", type=int, default=30, help="rounds per ratio (default 30)")
    parser.add_argument("--batch-size", type=int, default=128, help="images (default 128)")
    parser.add_argument("--device", default=device, help=f"cpu, cuda or cuda:K (default {device})")
    parser.add_argument("--ratios", nargs="+", default=exp.RATIOS, help="default 2.3x 5x 7x")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps: at least 2, or there are no quartiles")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    data, gpu = make_data(args.device), args.device != "cpu"
    # exp.train never waits for the GPU within an epoch, so neither does a block of steps.
    block, precision, name = 1, "fp32", platform.processor() or platform.machine()
    if gpu:
        major = torch.cuda.get_device_capability(args.device)[0]
        block, name = 10, torch.cuda.get_device_name(args.device)
        precision = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True
    elif (info := Path("/proc/cpuinfo")).exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = names[0].partition(": ")[2] if names else name
    teacher = exp.build_teacher(CLASSES, args.width).to(args.device)
    teacher.to(memory_format=exp.CHANNELS_LAST).eval()
    print(f"device {name}; {os.cpu_count()} cores, {torch.get_num_threads()} threads; {precision}")
    print(f"torch {torch.__version__}; Python {platform.python_version()}")
    print(f"teacher width {args.width}, batch {args.batch_size}, {args.steps} rounds", end="")
    print(f" of one block ({block} steps) of each kind; medians [quartiles]\n", flush=True)
    print(f"{'ratio':6} {'step':14} {'ms per step':>28} {'x Direct':>22}  wanted")
    for ratio in args.ratios:
        ratio = exp.parse_cell(ratio, "Direct")[0]
        steppers = {k: Stepper(k, ratio, teacher, data, args, precision) for k in KINDS}
        times = {k: [] for k in KINDS}
        for stepper in steppers.values():
            timed(stepper, 2 * block)
        for i in range(args.steps):
            # Rotates so that in four rounds each kind follows each other once: after the teacher
            # network, which fills the caches, every step is slower.
            for kind in (KINDS[(place + i) % 4] for place in (0, 1, 3, 2)):
                times[kind].append(timed(steppers[kind], block))
        for kind in KINDS:
            quotient = [a / b for a, b in zip(times[kind], times["Direct"])]
            wanted = f"<= {WANTED[kind]}" if kind in WANTED else ""
            line = f"{spread(times[kind], 1):>28} {spread(quotient, 3):>22}  {wanted}"
            print(f"{f'{ratio:g}x':6} {kind:14} {line}".rstrip(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
