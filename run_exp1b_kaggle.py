#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "tqdm", "matplotlib", "pandas"]
# ///
"""Experiment 1B: when does knowledge distillation (KD) help, as the student gets smaller?

Trains one ResNet-50 teacher, then students 2.3x, 5x and 7x smaller by three methods (Direct,
TraditionalKD, HPM-KD), several runs each, and leaves a CSV, figures and a Markdown report.

    python run_exp1b_kaggle.py --mode smoke               # minutes on a CPU, no download
    python run_exp1b_kaggle.py --mode full                # the experiment, on a GPU
    python run_exp1b_kaggle.py --resume                   # continue after any disconnect
    python run_exp1b_kaggle.py --resume --compression 7x  # only this part now, same directory
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing as mp
import os
import pickle
import pickletools
import re
import shutil
import signal
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

log = logging.getLogger("exp1b")
CHANNELS_LAST = torch.channels_last  # the memory format of every network


class UserError(Exception):
    """Something the user can mend: one line on standard error, exit code 2."""


class Stopped(Exception):
    """A stop was asked for; the unfinished epoch is dropped."""


# ---- 2. recipe: every number in one place; whoever changes one raises VERSION ----
VERSION, SIDE, VALIDATION, TOLERANCE = 1, 32, 0.1, 0.01  # -; pixels; share; of the ratio
MOMENTUM, WEIGHT_DECAY, LR_PER_128, WARMUP = 0.9, 5e-4, 0.1, 0.05  # SGD; share of the steps
MIN_WIDTH = 8  # below, oneDNN's 1x1 stride-2 convolution crashes (torch 2.15, channels_last)
CHUNK = 1000  # images per forward without gradients; fixed, so that banks are exact
KD, ASSISTANT, PROBE_RATIO = (4.0, 0.5), (4.0, 0.9), 5.0  # (T, alpha) twice; probed at 5x
CANDIDATES = ((4.0, 0.5), (4.0, 0.9), (8.0, 0.9), (3.0, 0.9))  # (T_max, alpha); first: default
CHAIN_STEP = 3.0  # largest ratio between neighbours of the chain
HIDDEN, ATTENTION_LR, BETA = 32, 1e-3, 0.5  # attention: units, Adam's lr, entropy weight (nat)
KAPPA, BRISK, PLATEAU = 1.0, 0.03, 0.25  # clock: hurry; unhurried fall per epoch; early fall
METHODS, RATIOS = ("Direct", "TraditionalKD", "HPM-KD"), ("2.3x", "5x", "7x")
PARTS = ("config", "chain", "attention", "temperature")  # of HPM-KD, each with a switch
DATASETS = ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST", "toy")
COLUMNS = "dataset teacher_epochs student_epochs runs width batch_size subset limit".split()
ROWS = ("toy", 8, 4, 2, 16, 64, 800, 1000), ("CIFAR10", 50, 20, 3, 64, 128, 0, 0)
ROWS += (("CIFAR10", 100, 50, 5, 64, 128, 0, 0),)
MODES = {m: dict(zip(COLUMNS, row)) for m, row in zip(("smoke", "quick", "full"), ROWS)}


def flag(group: str, help: str, default=None, low=None, **argparse_options):
    """A field of `Flags`; `low` is the smallest value allowed."""
    return field(default=default, metadata=dict(group=group, help=help, low=low) | argparse_options)


@dataclass(frozen=True)
class Flags:
    """The command line. None: the mode's value, or on --resume the run's own."""

    mode: str = flag("experiment", "smoke, quick (default) or full", choices=tuple(MODES))
    dataset: str = flag("experiment", f"{', '.join(DATASETS)}, or a folder with train/ and test/")
    teacher_epochs: int = flag("experiment", "epochs of the teacher", low=1)
    student_epochs: int = flag("experiment", "epochs of students and assistants", low=1)
    width: int = flag("experiment", "width of the teacher's first stage", low=4)
    batch_size: int = flag("experiment", "images per step", low=2)
    lr: float = flag("experiment", "peak learning rate (default 0.1 x batch / 128)", low=1e-9)
    seed: int = flag("experiment", "seed of everything (default 0)", low=0)
    subset: int = flag("experiment", "cap of training images (0: all)", low=0)
    patience: int = flag("experiment", "stop a model after N epochs without gain", low=0)
    compression: list = flag("selection", "all, or ratios such as 2.3x 5x 7x", nargs="+")
    methods: list = flag("selection", f"{', '.join(METHODS)}, HPM-KD-no-PART…", nargs="+")
    runs: int = flag("selection", "runs of each ratio and method", low=1)
    resume: str = flag("checkpoints", "continue the newest run, or DIR", nargs="?", const="")
    checkpoint_interval: int = flag("checkpoints", "snapshot every N epochs (default 20 s)", low=1)
    output: str = flag("places", "where run directories are made, or one of them")
    data_dir: str = flag("places", "where to look for the dataset first")
    device: str = flag("machine", "auto, cpu, cuda or cuda:K", "auto")
    workers: int = flag("machine", "processes (default one per device)", low=1)
    precision: str = flag("machine", "auto, fp32, bf16 or fp16", "auto")
    deterministic: bool = flag("machine", "same bits every time on a GPU; slower", False)
    max_hours: float = flag("machine", "time budget of the session (11.5 on Kaggle)", low=0)
    status: bool = flag("reports", "list the runs found; train nothing", False)
    report: bool = flag("reports", "write tables, figures and report again; train nothing", False)


def parse_cell(ratio: str, method: str) -> tuple[float, str]:
    """("5", "HPM-KD-no-chain") → (5.0, canonical name). UserError for what cannot be trained."""
    match, (base, *off) = re.fullmatch(r"(\d+(?:\.\d+)?)[x×]?", ratio), method.split("-no-")
    if not match or not 1.2 <= float(match[1]) <= 50:
        raise UserError(f"--compression {ratio}: write all, or ratios such as 5x (1.2x to 50x)")
    if base not in METHODS or not set(off) <= set(PARTS) or (off and base != "HPM-KD"):
        known = f"{', '.join(METHODS)} or HPM-KD-no-{{{','.join(PARTS)}}}"
        raise UserError(f"--methods {method}: choose {known}")
    return float(match[1]), base + "".join(f"-no-{p}" for p in PARTS if p in off)


def sha(data) -> str:
    """SHA-256 in hex of bytes, or of the repr of anything else."""
    data = data if isinstance(data, (bytes, memoryview)) else repr(data).encode()
    return hashlib.sha256(data).hexdigest()


def generator(*purpose) -> torch.Generator:
    """A generator on the CPU seeded by SHA-256 of (seed, purpose, …): no stream is shared."""
    return torch.Generator().manual_seed(int(sha(purpose)[:15], 16))


# ---- 3. platform ----
def detect_platform(root: Path = Path("/"), env=os.environ) -> SimpleNamespace:
    """name, output, scratch, inputs (paths), notebook, drive, hours: Kaggle, Colab or local."""
    here = SimpleNamespace(name="local", output=Path.cwd(), scratch=None, inputs=[], hours=None)
    here.notebook = any(name.startswith(("KAGGLE_", "COLAB_", "JPY_PARENT_PID")) for name in env)
    here.drive = False
    if (root / "kaggle/working").is_dir():
        here.name, here.output, here.hours = "Kaggle", root / "kaggle/working", 11.5
        here.scratch, here.inputs = root / "kaggle/temp/data", [root / "kaggle/input"]
    elif (root / "content").is_dir() and any(name.startswith("COLAB_") for name in env):
        here.name, here.output, here.scratch = "Colab", root / "content", root / "content/data"
        if (drive := root / "content/drive/MyDrive").is_dir():
            here.output, here.inputs, here.drive = drive / "HPM-KD_Results", [drive], True
    return here


def usable_devices(wanted: str, mode: str, workers: int | None = None) -> list[str]:
    """A torch device per worker, each of which has really executed an operation, or UserError."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    remedy = "Kaggle: Settings > Accelerator > GPU T4 x2; Colab: Runtime > Change runtime type"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UserError(f"--device {wanted}: choose auto, cpu, cuda or cuda:K")
    if wanted == "cpu" or (wanted == "auto" and mode == "smoke" and not found):
        return ["cpu"] * (workers or 1)
    if not found:
        raise UserError(f"no GPU found, and --mode {mode} needs one. {remedy}; or --device cpu")
    names = [wanted] if ":" in wanted else [f"cuda:{i}" for i in range(found)]
    for name in names:
        try:
            torch.ones(8, device=name).sum().item()
        except (RuntimeError, AssertionError) as error:
            why = f"{name} fails with torch {torch.__version__}: {str(error).splitlines()[0]}"
            raise UserError(f"{why}. {remedy}") from None
    return list(itertools.islice(itertools.cycle(names), workers or len(names)))


# ---- 4. data: any dataset → uint8 tensors on the device; views as index arithmetic ----
def search(places, *patterns: str, depth: int = 6):
    """Yield the paths below `places` whose names match; never enters folders of images."""
    for place in map(Path, places):
        for folder, dirs, files in os.walk(place):
            here = [Path(folder, name) for name in sorted(dirs + files)]
            yield from (path for path in here if any(map(path.match, patterns)))
            deep = len(Path(folder).parts) - len(place.parts) >= depth
            images = len(files) > 1000 or {"train", "test"} <= set(dirs)
            dirs[:] = [] if deep or images else sorted(d for d in dirs if not d.startswith("."))


def to_side(x: Tensor) -> Tensor:
    """uint8 [N, H, W(, 3)] → [N, 32, 32, 3]: grey becomes three channels, the border is black."""
    x = x if x.ndim == 4 else x[..., None].expand(*x.shape, 3)
    h, w = SIDE - x.shape[1], SIDE - x.shape[2]
    return F.pad(x, (0, 0, w // 2, w - w // 2, h // 2, h - h // 2)).contiguous()


def read_known(name: str, places, scratch: Path) -> dict | None:
    """A torchvision dataset from a sound local copy: CIFAR as folder or .tar.gz (torchvision
    checks the MD5), (Fashion-)MNIST as idx files, gzipped or not; else None."""
    dataset = getattr(torchvision.datasets, name)
    # The two MNISTs share their file names: only the first labels tell which one it is.
    first = {"MNIST": [5, 0, 4, 1, 9, 2], "FashionMNIST": [9, 0, 0, 3, 0, 2]}.get(name)
    idx = [f"{a}-{b}-ubyte*" for a in ("train", "t10k") for b in ("images?idx3", "labels?idx1")]
    for found in search(places, *(idx[:1] if first else [dataset.base_folder, dataset.filename])):
        root = found.parent
        try:
            if first and found.is_file():
                root = scratch / sha(str(found))[:16]
                (raw := root / name / "raw").mkdir(parents=True, exist_ok=True)
                for pattern in idx:
                    source = next(found.parent.glob(pattern))
                    with (gzip.open if source.suffix == ".gz" else open)(source, "rb") as file:
                        (raw / pattern.replace("?", "-")[:-1]).write_bytes(file.read())
            elif found.is_file() and torchvision.datasets.utils.check_md5(found, dataset.tgz_md5):
                shutil.unpack_archive(found, root := scratch, filter="data")
            train, test = (dataset(root, train=part) for part in (True, False))
        except Exception as error:  # whatever a damaged file provokes
            log.warning("%s is no usable copy of %s (%s)", found, name, error)
            continue
        x, y, tx, ty = map(torch.as_tensor, (train.data, train.targets, test.data, test.targets))
        if not first or y[:6].tolist() == first:
            raw = dict(train_x=to_side(x), train_y=y, test_x=to_side(tx), test_y=ty)
            return raw | dict(classes=train.classes, note=f"{found}, images {[*x.shape[1:]]}")
    return None


def read_folder(folder: Path) -> dict:
    """Images in train/<class>/* and test/<class>/*, of any size, decoded in parallel."""
    sizes = set()

    def load(path):
        try:
            image = torchvision.datasets.folder.pil_loader(path)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"unreadable image {path} ({error}): mend or remove it") from None
        sizes.add(image.size)
        fits = SIDE * 3 // 4 <= min(image.size) and max(image.size) <= SIDE
        image = image if fits else image.resize((SIDE, SIDE))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return to_side(pixels.reshape(1, image.height, image.width, 3))

    try:
        parts = {p: torchvision.datasets.ImageFolder(folder / p) for p in ("train", "test")}
    except FileNotFoundError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{folder}: expected train/<class>/* and test/<class>/* ({why})") from None
    if odd := set(parts["train"].classes) ^ set(parts["test"].classes):
        raise UserError(f"{folder}: classes not in both train/ and test/: {', '.join(sorted(odd))}")
    raw = {f"{p}_y": torch.tensor(d.targets) for p, d in parts.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for p, d in parts.items():
            raw[f"{p}_x"] = torch.cat([*pool.map(load, [path for path, _ in d.samples])])
    note = f"{folder}, image sizes {sorted(sizes)[:3]}"
    return raw | dict(classes=parts["train"].classes, note=note)


def make_toy() -> dict:
    """Ten classes of noisy, shifted 16x16 patterns; a small network learns them to over 90 %."""
    g = generator("toy")
    patterns = F.interpolate(torch.rand(10, 3, 5, 5, generator=g), (16, 16), mode="bicubic")
    raw = dict(classes=[f"pattern {i}" for i in range(10)], note="made by the script, 16x16")
    for part, n in (("train", 2000), ("test", 1000)):
        y, shifts = torch.arange(n) % 10, torch.randint(-2, 3, (n, 2), generator=g).tolist()
        x = torch.stack([patterns[c].roll(s, (1, 2)) for c, s in zip(y, shifts)])
        x = (x.clamp(0, 1) + torch.rand(x.shape, generator=g)) * 127
        raw |= {f"{part}_x": x.byte().permute(0, 2, 3, 1).contiguous(), f"{part}_y": y}
    return raw


def load_dataset(name: str, places=(), scratch: Path = Path("data")) -> dict:
    """Any dataset: train_x, test_x uint8 [N, H, W, 3], train_y, test_y int64 [N], classes, ….

    `name`: one of DATASETS, or a folder with train/<class>/* and test/<class>/*. `places` are
    searched for a copy; `scratch` takes what is downloaded or decoded. Raises UserError."""
    if name in DATASETS:
        raw = make_toy() if name == "toy" else read_known(name, [*places, scratch], scratch)
        if raw is None:
            try:
                getattr(torchvision.datasets, name)(scratch, download=True)
            except (OSError, RuntimeError) as error:
                remedy = "Kaggle: Settings > Internet > On, or attach it; else pass --data-dir DIR"
                why = f"{name}: no local copy, and no download ({str(error)[:60]}). {remedy}"
                raise UserError(why) from None
            raw = read_known(name, [scratch], scratch)
    elif Path(name).is_dir():
        files = [(str(p), p.stat().st_size, p.stat().st_mtime) for p in Path(name).glob("t*/*/*")]
        decoded = scratch / f"decoded_{sha(sorted(files))[:16]}.pt"
        try:
            raw = read(decoded)
        except (OSError, ValueError):
            raw = read_folder(Path(name))
            scratch.mkdir(parents=True, exist_ok=True)
            put(decoded, pack(raw))
    else:
        raise UserError(f"--dataset {name}: no such folder, and not one of {', '.join(DATASETS)}")
    if len(raw["classes"]) < 2:
        raise UserError(f"--dataset {name}: only the class {raw['classes'][0]}; two are needed")
    prints = [sha(memoryview(raw[p].numpy()).cast("B")) for p in sorted(raw) if p[-2:] in "_x_y"]
    flips = 1 if name == "MNIST" else 2  # a mirrored digit is no digit
    return raw | dict(name=Path(name).name, fingerprint=sha(prints), flips=flips)


def stratified(labels: Tensor, g: torch.Generator) -> Tensor:
    """A random order of 0…N-1 of which every prefix holds the classes in proportion."""
    order = torch.randperm(len(labels), generator=g)
    y = labels[order]
    place = F.one_hot(y).cumsum(0)[torch.arange(len(y)), y] / y.bincount()[y]
    return order[place.argsort(stable=True)]


class Data:
    """A dataset, split and on its device: {train,val,test}_x uint8 [N, H, W, 3], _y int64 [N].

    A view is one augmented form of an image: a shift by up to an eighth of the side (the border
    is mirrored) and a flip, numbered 0…n_views-1. The pool gives every training image one view
    per table; all students of an experiment walk the same pool."""

    def __init__(self, raw: dict, seed: int = 0, subset: int = 0, limit: int = 0, device="cpu"):
        self.raw, self.seed, self.device = raw, seed, torch.device(device)
        order = stratified(raw["train_y"], generator(seed, "split"))
        test = stratified(raw["test_y"], generator(seed, "test"))[: limit or None].sort().values
        val, train = order.tensor_split([round(VALIDATION * len(order))])
        self.train_x, self.val_x, self.test_x, self.train_y, self.val_y, self.test_y = (
            raw[f"{source}_{x}"][index].to(device)
            for x in "xy"
            for source, index in (
                ("train", train[: subset or None]),
                ("train", val[: limit or None]),
                ("test", test),
            )
        )
        flat = self.train_x.cpu().numpy().reshape(-1, 3)
        self.mean, self.std = ((f(0, dtype=float) / 255).tolist() for f in (flat.mean, flat.std))
        self.shift, self.scale = (255 * torch.tensor(v).to(device) for v in (self.mean, self.std))
        self.pad = self.train_x.shape[1] // 8
        self.n_views = (2 * self.pad + 1) ** 2 * raw["flips"]

    def __len__(self) -> int:
        return len(self.train_y)

    @functools.cached_property
    def _permuted(self) -> Tensor:
        noise = torch.rand(len(self), self.n_views, generator=generator(self.seed, "pool"))
        return noise.argsort(1).short().T.contiguous()

    def pool(self, table: int) -> Tensor:
        """The view of every training image in a table: int64 [N]."""
        return self._permuted[table % self.n_views].long()

    def views(self, index: Tensor, view: Tensor) -> Tensor:
        """These views of these training images, in one gather: uint8 [B, H, W, 3]."""
        index, view = index.to(self.device), view.to(self.device)
        side, span = self.train_x.shape[1], 2 * self.pad + 1
        steps, shift = torch.arange(side, device=self.device), view % span**2
        across = torch.where((view >= span**2)[:, None], steps.flip(0), steps)
        rows = (shift // span - self.pad)[:, None] + steps
        cols = (shift % span - self.pad)[:, None] + across
        rows, cols = (side - 1 - (side - 1 - i.abs()).abs() for i in (rows, cols))
        return self.train_x[index[:, None, None], rows[:, :, None], cols[:, None, :]]

    def pixels(self, x: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → normalised float32 [B, 3, H, W], channels_last in memory."""
        return ((x - self.shift) / self.scale).permute(0, 3, 1, 2)


# ---- 5. models ----
def build_network(block: str, depths, widths, num_classes: int) -> nn.Module:
    """Residual network with a 3x3 stride-1 stem and no max-pool: [B, 3, H, W] → logits [B, K].

    Of torchvision's blocks ("Bottleneck" or "BasicBlock"), and with its parameter names."""
    kind, c, network = dict(Bottleneck=Bottleneck, BasicBlock=BasicBlock)[block], widths[0], []
    stem = [nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True)]
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        network.append(nn.Sequential())
        for stride in [1 + (stage > 0)] + [1] * (depth - 1):
            out, shortcut = width * kind.expansion, None
            if stride > 1 or c != out:
                shortcut = nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            network[-1].append(kind(c, width, stride, shortcut and nn.Sequential(*shortcut)))
            c = out
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, num_classes)]
    names = "conv1 bn1 relu layer1 layer2 layer3 layer4 avgpool flatten fc".split()
    model = nn.Sequential(OrderedDict(zip(names, stem + network + head)))
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(part, Bottleneck):
            nn.init.zeros_(part.bn3.weight)  # zero_init_residual
    model.arch = dict(block=block, depths=depths, widths=widths, num_classes=num_classes)
    return model


def build_teacher(num_classes: int, width: int = 64) -> nn.Module:
    """ResNet-50 for small images, its stages width x (1, 2, 4, 8) wide."""
    return build_network("Bottleneck", [3, 4, 6, 3], [width * m for m in (1, 2, 4, 8)], num_classes)


@functools.cache
def student_widths(ratio: float, teacher_params: int, num_classes: int) -> list[int]:
    """Widths near 1:2:4:8 of a ResNet-18 with teacher_params / ratio parameters within 1 %:
    multiples of 8 (tensor cores) where 1 % allows, else of 4, 2 or 1. UserError if none fit."""

    def params(widths):  # in closed form: the search tries thousands
        total, before = 29 * widths[0] + (widths[3] + 1) * num_classes, widths[0]
        for w in widths:
            total += 9 * before * w + 27 * w * w + 8 * w + (before * w + 2 * w) * (before != w)
            before = w
        return total

    goal = teacher_params / ratio
    ideal = [m * math.sqrt(goal / params((64, 128, 256, 512))) for m in (64, 128, 256, 512)]
    for step in (8, 4, 2, 1):
        near = [{max(MIN_WIDTH, (round(w / step) + d) * step) for d in range(-3, 4)} for w in ideal]
        rising = (w for w in itertools.product(*near) if w[0] < w[1] < w[2] < w[3])
        if fits := [w for w in rising if abs(goal / params(w) - 1) < TOLERANCE]:
            return list(min(fits, key=lambda w: math.dist(map(math.log, w), map(math.log, ideal))))
    raise UserError(f"--compression {ratio:g}x: no ResNet-18 is that small; use a wider teacher")


def build_student(ratio: float, teacher_params: int, num_classes: int) -> nn.Module:
    """Slim ResNet-18 with teacher_params / ratio parameters (within 1 %, else UserError)."""
    widths = student_widths(ratio, teacher_params, num_classes)
    return build_network("BasicBlock", [2, 2, 2, 2], widths, num_classes)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())


@functools.cache
def measure(ratio: float, num_classes: int, width: int, side: int = SIDE) -> tuple[int, int]:
    """(parameters, multiply-accumulates of one image's forward) of a student; ratio 1: teacher."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_teacher(num_classes, width)
        if ratio != 1:
            model = build_student(ratio, count_parameters(model), num_classes)
        model.eval()(torch.zeros(1, 3, side, side))
    return count_parameters(model), counter.get_total_flops() // 2


# ---- 6. distillation: losses, logit bank, HPM-KD's parts (arXiv 2512.09886) ----
def kd_loss(logits: Tensor, labels: Tensor, target: Tensor | None, T: float, alpha: float):
    """(1 - alpha) CE(z, y) + alpha T^2 KL(target || softmax(z / T)), and CE: batch means in nat.

    Hinton et al. 2015, arXiv 1503.02531. logits z [B, K]; target: probabilities at T or None."""
    ce = F.cross_entropy(logits, labels)
    if target is None:
        return ce, ce
    kl = F.kl_div(F.log_softmax(logits / T, 1), target, reduction="batchmean")
    return (1 - alpha) * ce + alpha * T * T * kl, ce


def temperature(ce: list[float], epochs: int, high: float, low: float, num_classes: int):
    """(T of the next epoch, strategy), from the mean hard-label CE (nat) of each epoch so far.

    T = low + (high - low)(1 + cos(pi c)) / 2; the clock c advances by 1 / epochs, and under the
    loss-driven strategy up to twice as fast where the loss stalls (HPM-KD's part 4)."""
    watch, clock, strategy = max(2, math.ceil(epochs / 10)), 0.0, "cosine"
    for e, loss in enumerate(ce, 1):
        if e == watch:
            early = (ce[e // 2 - 1] - loss) / max(math.log(num_classes) - loss, 1e-9)
            strategy = "loss-driven" if early < PLATEAU else "cosine"
        progress = (ce[max(e - 2, 0)] - loss) / (BRISK * ce[max(e - 2, 0)])
        stalls = e > 1 and strategy == "loss-driven"
        clock += (1 + KAPPA * stalls * (1 - min(1.0, max(0.0, progress)))) / epochs
    return low + (high - low) * (1 + math.cos(math.pi * min(1.0, clock))) / 2, strategy


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of one of the precisions "fp32", "bf16", "fp16"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@torch.no_grad()
def predict(model: nn.Module, data: Data, x: Tensor, precision: str = "fp32") -> Tensor:
    """Logits float32 [N, K] of uint8 images [N, H, W, 3], in index order and fixed chunks."""
    model.eval()
    with autocast(data.device, precision):
        return torch.cat([model(data.pixels(part)).float() for part in x.split(CHUNK)])


class Bank:
    """Logits of one frozen model for every table of the pool, float16, each computed once.

    `load()` gives the model and is called only if something must be computed; `folder` is a cache
    that processes and sessions share, in which the first writer of a table wins."""

    def __init__(self, data: Data, load, folder: Path | None = None, precision: str = "fp32"):
        self.data, self.load, self.folder, self.precision = data, load, folder, precision
        self.memory, self.model, self.seconds = {}, None, 0.0

    def logits(self, table: int | str) -> Tensor:
        """float16 [N, K] of the training images' views in `table`, or of the "val" images."""
        path, data, begun = self.folder and self.folder / f"{table}.pt", self.data, time.time()
        try:
            return (read(path)["logits"] if path else self.memory[table]).to(data.device)
        except (OSError, ValueError, KeyError):
            self.model = self.model or self.load().to(data.device, memory_format=CHANNELS_LAST)
            view = None if table == "val" else data.pool(table)
            x = data.val_x if view is None else data.views(torch.arange(len(data)), view)
            self.memory[table] = predict(self.model, data, x, self.precision).half().cpu()
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                put(path, pack(dict(logits=self.memory.pop(table))), first_wins=True)
            self.seconds += time.time() - begun
            return self.logits(table)


class Teachers(nn.Module):
    """What a student distils from: M banks, their logits v equalised in spread, their weights.

    Attention (HPM-KD's part 3): a = softmax over m of w2 ReLU(W1 [v_m; mean_j v_j; e_m]), uniform
    at the start; trained on validation labels, since teachers have memorised the others."""

    def __init__(self, banks: list[Bank], attend: bool, g: torch.Generator):
        super().__init__()
        self.banks, self.val_y = banks, banks[0].data.val_y
        val = torch.stack([bank.logits("val").float() for bank in banks], 1)  # [N, M, K]
        spread, (_, m, k) = val.std(2).mean(0), val.shape
        self.gain, self.attend = (spread[0] / spread)[:, None], attend and m > 1
        self.val = val * self.gain
        self.inner, self.outer = nn.Linear(2 * k + m, HIDDEN), nn.Linear(HIDDEN, 1, bias=False)
        for p in self.inner.parameters():
            p.data = (2 * torch.rand(p.shape, generator=g) - 1) / math.sqrt(2 * k + m)
        nn.init.zeros_(self.outer.weight)
        self.adam = torch.optim.Adam(self.to(val.device).parameters(), ATTENTION_LR)

    def weights(self, v: Tensor) -> Tensor:
        """a [B, M] for equalised logits v [B, M, K]."""
        if not self.attend:
            return torch.full_like(v[..., 0], 1 / v.shape[1])
        which = torch.eye(v.shape[1], device=v.device).expand(len(v), -1, -1)
        seen = torch.cat([v, v.mean(1, keepdim=True).expand_as(v), which], 2)
        return self.outer(F.relu(self.inner(seen))).squeeze(2).softmax(1)

    def learn(self, v: Tensor, labels: Tensor) -> None:
        """A step of Adam on mean[sum_m a_m CE(softmax v_m, y) - beta H(a)] in nat, whose optimum
        is a_m ~ exp(-CE_m / beta)."""
        a, y = self.weights(v), labels[:, None].expand(v.shape[:2])
        ce = F.cross_entropy(v.transpose(1, 2), y, reduction="none")
        self.adam.zero_grad()
        (a * (ce + BETA * a.clamp_min(1e-12).log())).sum(1).mean().backward()
        self.adam.step()

    @torch.no_grad()
    def target(self, logits: Tensor, T: float) -> Tensor:
        """sum_m a_m softmax(v_m / T) [B, K] of raw logits [B, M, K], without gradient."""
        v = logits.float() * self.gain
        return (self.weights(v)[..., None] * (v / T).softmax(2)).sum(1)

    @torch.no_grad()
    def diagnose(self) -> dict:
        """Validation accuracy (%) and NLL (nat): each teacher, uniform mixture, learned mixture."""
        p, a = self.val.softmax(2), self.weights(self.val)
        rows = [*p.unbind(1), p.mean(1), (a[..., None] * p).sum(1)]
        nll = [F.nll_loss(row.clamp_min(1e-12).log(), self.val_y).item() for row in rows]
        acc = [top1(row, self.val_y) for row in rows]
        return dict(val_acc=acc, val_nll=nll, weights=a.mean(0).tolist())


def top1(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of logits [N, K]."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def choose(trials: list[dict], candidates, labels: Tensor) -> dict:
    """The probe's choice of (T_max, alpha) (HPM-KD's part 1): the lowest temperature-fitted
    validation NLL (nat), mean of the last two epochs; the default, candidate 0, is left only for
    a gain of more than one paired standard error."""

    def fitted(v):
        scaled = (
            F.cross_entropy(v * 2 ** (i / 20), labels, reduction="none") for i in range(-40, 41)
        )
        return min(scaled, key=lambda nll: nll.mean().item())

    worst = torch.full((len(labels),), 1e6)  # of a trial that diverged
    nll = [sum(map(fitted, t["tail"])) / 2 if t["status"] == "done" else worst for t in trials]
    gains = [(nll[0] - x).mean().item() for x in nll]
    errors = [((nll[0] - x).std() / len(labels) ** 0.5).item() for x in nll]
    best = max(range(len(trials)), key=gains.__getitem__)
    scores = [[*c, x.mean().item(), g, e] for c, x, g, e in zip(candidates, nll, gains, errors)]
    return dict(choice=list(candidates[best * (gains[best] > errors[best])]), scores=scores)


# ---- 7. store: atomic, checksummed, safe to read from strangers ----
PLAIN = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS""".split()


def pack(value, plain: bool = False) -> bytes:
    """torch's zip, or if `plain` a pickle without memo; behind it its SHA-256 in hex, which
    torch.load and pickle.load ignore."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 4)
    pickler.fast = True
    pickler.dump(value) if plain else torch.save(value, buffer)
    return buffer.getvalue() + sha(buffer.getbuffer()).encode()


def put(path: Path, data: bytes, first_wins: bool = False) -> None:
    """Write all of the file or nothing, onto the disk; `first_wins`: an existing file stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not (first_wins and path.exists()):
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, plain: bool = False, seal: str | None = None):
    """The inverse of `pack`. ValueError for a torn, altered or hostile file, in time linear in its
    size: nothing but plain data and tensors is ever built, and no global resolved."""
    data = Path(path).read_bytes()
    data, found = data[:-64], data[-64:].decode("latin1")
    if found != sha(data) or found != (seal or found):
        raise ValueError("wrong checksum")
    try:
        for opcode, value, _ in pickletools.genops(data) if plain else ():
            if opcode.name not in PLAIN or (opcode.name == "LONG1" and abs(value) >> 60):
                raise ValueError(f"{opcode.name} is more than plain data")
        return (
            pickle.loads(data) if plain else torch.load(io.BytesIO(data), "cpu", weights_only=True)
        )
    except Exception as error:  # whatever a hostile pickle provokes
        raise ValueError(str(error).partition("\n")[0][:100]) from None


def load_model(path) -> nn.Module:
    """The network of a .pt of this program, ready for inference: float images [B, 3, H, W] in 0…1
    → logits [B, K]; `.classes` names the K labels. UserError for a damaged or foreign file."""
    try:
        saved = read(path)
        with torch.device("meta"):
            network = build_network(**saved["arch"])
        network.load_state_dict(saved["weights"], assign=True)
        scale = torchvision.transforms.Normalize(saved["mean"], saved["std"])
    except Exception as error:  # whatever a foreign file provokes
        raise UserError(f"{path} is no sound model of this program ({str(error)[:99]})") from None
    model = nn.Sequential(scale, network).eval()
    model.classes = saved["classes"]
    return model


class RunDir:
    """The files of one run directory; nothing else opens a checkpoint."""

    def __init__(self, path):
        self.path, self.folder, self.bad = Path(path), Path(path) / "checkpoints", []
        self.states = [self.folder / f"experiment_state{x}.pkl" for x in ("", ".prev")]

    def file(self, job: str, dataset: str) -> Path:
        """Where a finished model is, or will be."""
        name = re.sub(r"[^\w-]", "_", dataset)
        return self.folder / (f"teacher_resnet50_{name}.pt" if job == "teacher" else f"{job}.pt")

    def read_state(self) -> dict:
        """The newest readable generation; `bad` lists the others. UserError if there is none."""
        self.bad = []
        for file in filter(Path.exists, self.states):
            try:
                return read(file, plain=True)
            except (OSError, ValueError) as error:
                self.bad.append((file, error))
        why = "; ".join(f"{file.name}: {error}" for file, error in self.bad) or "none there"
        raise UserError(f"{self.path} has no readable state ({why}); nothing was touched")

    def write_state(self, state: dict) -> None:
        """Write the state; the generation before it stays as .prev."""
        state["updated"] = time.time()
        if self.states[0].exists():
            put(self.states[1], self.states[0].read_bytes())
        put(self.states[0], pack(state, plain=True))

    def lock(self) -> None:
        """Become the only writer, or UserError with the holder's PID and host."""
        self.handle = open(self.path / ".lock", "a+")
        self.handle.seek(0)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = self.handle.read()
            raise UserError(f"{self.path} is in use by {who}: wait for it, or stop it") from None
        self.handle.truncate(0)
        self.handle.write(f"PID {os.getpid()} on host {os.uname().nodename}")
        self.handle.flush()

    def verify(self, state: dict) -> None:
        """Set rotten files aside, and forget the jobs whose models are missing or rotten: they
        are restored from their snapshots, or trained again."""
        for file, error in self.bad:
            set_aside(file, error, "the other generation of the state counts")
        for job in [job for job, record in state["jobs"].items() if record["sha256"]]:
            file = self.file(job, state["task"]["name"])
            try:
                read(file, seal=state["jobs"][job]["sha256"])
            except (OSError, ValueError) as error:
                set_aside(file, error, f"{job} is restored from its snapshot, or trained again")
                del state["jobs"][job]


def set_aside(file: Path, why, then: str) -> None:
    """Rename a rotten file to *.corrupt and say what happens instead."""
    log.warning("%s is unusable (%s): %s", file.name, why, then)
    if file.exists():
        os.replace(file, f"{file}.corrupt")


class Snapshots:
    """Two alternating files of one job in training, written by a thread; the newest valid counts."""

    def __init__(self, run: RunDir, job: str, identity: str = "", interval=None, seconds=20.0):
        self.job, self.identity, self.interval, self.seconds = job, identity, interval, seconds
        self.files = [run.folder / f"snapshot_{job}_{x}.pt" for x in "ab"]
        self.written, self.thread, self.pending = time.monotonic(), ThreadPoolExecutor(1), None

    def load(self) -> dict | None:
        """The newest valid snapshot of exactly this job."""
        found = []
        for file in filter(Path.exists, self.files):
            try:
                found.append((read(file), file))
            except ValueError as error:
                set_aside(file, error, f"{self.job} goes on from its other snapshot, or anew")
        found = [x for x in found if x[0]["identity"] == self.identity]
        saved, newest = max(found, key=lambda x: x[0]["epoch"], default=(None, None))
        self.files.sort(key=lambda file: file == newest)  # the other one is written next
        return saved

    def offer(self, epoch: int, last: bool, content) -> None:
        """Save content() if it is due: every `interval` epochs or `seconds`, and at the end."""
        elapsed = time.monotonic() - self.written
        if last or (epoch % self.interval == 0 if self.interval else elapsed >= self.seconds):
            data = pack(content() | dict(identity=self.identity, epoch=epoch))
            if self.pending:
                self.pending.result()  # the error of the write before is raised here
            self.pending, self.written = (
                self.thread.submit(put, self.files[0], data),
                time.monotonic(),
            )
            self.files.reverse()
        if last:
            self.pending.result()


# ---- 8. training: one function trains every model, from scratch or from a snapshot ----
@dataclass(frozen=True)
class Setting:
    """How one model is trained; T goes from t_high to t_low, and alpha = 0 is Direct."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    seed: int = 0
    order: str = "run1"  # names the stream of batches: one for all methods and ratios of a run
    attend: str = ""  # names the attention's stream; empty: uniform weights
    alpha: float = 0.0
    t_high: float = 4.0
    t_low: float = 4.0
    patience: int = 0
    fresh: bool = False  # views drawn anew every epoch, instead of the pool's


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then cosine to zero."""
    warm = max(1, round(WARMUP * steps))
    late = (step - warm) / max(1, steps - warm)
    return peak * ((step + 1) / warm if step < warm else (1 + math.cos(math.pi * late)) / 2)


def best_epoch(history: dict) -> int:
    """The epoch, from 1, of the highest validation accuracy; of equals the later."""
    return max(range(1, len(history["val_acc"]) + 1), key=lambda e: (history["val_acc"][e - 1], e))


def train(model, data, s: Setting, banks=(), precision="fp32", snapshots=None, control=None):
    """Train any model, from scratch or from its snapshot; with banks, distil from them.

    The record has status ("done", or "diverged" if the loss became non-finite), val_acc, val_nll,
    test_acc at the best validation epoch (of equals the later), last_test_acc (percent), time (s),
    history (a list per metric), best (weights), tail (the last two epochs' validation logits).
    `control(None)` is called at every batch, control(metrics) after every epoch; it may raise."""
    device, n, history, best, tail, seconds = data.device, len(data), {}, None, [], 0.0
    model.to(device, memory_format=CHANNELS_LAST)
    sgd = dict(momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer = torch.optim.SGD(model.parameters(), s.lr, **sgd)
    for p in model.parameters():  # else an overflow at the first fp16 step leaves them undefined
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts, teachers = dict(model=model, optimizer=optimizer, scaler=scaler), None
    if banks:
        teachers = Teachers(banks, bool(s.attend), generator(s.seed, "attention", s.attend))
        parts |= dict(attention=teachers, adam=teachers.adam)
    if saved := snapshots and snapshots.load():
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        history, seconds, tail = saved["history"], saved["seconds"], saved["tail"]
        best = {k: v.to(device) for k, v in saved["best"].items()}

    def content():
        plain = dict(best=best, history=history, seconds=seconds, tail=tail)
        return {name: part.state_dict() for name, part in parts.items()} | plain

    steps, b, ce = max(1, n // s.batch_size), s.batch_size, history.get("ce", [])
    tables = torch.randperm(s.epochs, generator=generator(s.seed, "tables", s.order)).tolist()
    for epoch in range(len(ce), s.epochs):
        if s.patience and epoch and epoch - best_epoch(history) >= s.patience:
            break
        g, h, k = (generator(s.seed, x, epoch) for x in (s.order, f"views {s.order}", s.attend))
        order, table = torch.randperm(n, generator=g)[: steps * b], tables[epoch]
        view = torch.randint(data.n_views, (n,), generator=h) if s.fresh else data.pool(table)
        v = torch.stack([b.logits(table) for b in banks], 1)[order.to(device)] if banks else None
        judged = torch.randint(len(data.val_y), (steps, b), generator=k).to(device)
        T, strategy = temperature(ce, s.epochs, s.t_high, s.t_low, len(data.raw["classes"]))
        begun, sums = time.perf_counter(), torch.zeros(3, device=device)
        x, y = data.views(order, view[order]), data.train_y[order.to(device)]
        model.train()
        for i in range(steps):
            if control:
                control(None)
            part = slice(i * b, (i + 1) * b)
            with autocast(device, precision):
                logits = model(data.pixels(x[part]))
            target = teachers.target(v[part], T) if teachers else None
            loss, hard = kd_loss(logits.float(), y[part], target, T, s.alpha)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            optimizer.param_groups[0]["lr"] = learning_rate(
                epoch * steps + i, s.epochs * steps, s.lr
            )
            scaler.step(optimizer)
            scaler.update()
            if teachers and teachers.attend:
                teachers.learn(teachers.val[judged[i]], data.val_y[judged[i]])
            hits = (logits.argmax(1) == y[part]).float().mean()
            sums += torch.stack([loss.detach(), hard.detach(), 100 * hits])
        val = predict(model, data, data.val_x, precision)
        row = dict(
            zip(("loss", "ce", "train_acc"), (sums / steps).tolist()), T=T, strategy=strategy
        )
        row |= dict(val_acc=top1(val, data.val_y), val_nll=F.cross_entropy(val, data.val_y).item())
        seconds += time.perf_counter() - begun
        row |= dict(lr=optimizer.param_groups[0]["lr"], seconds=seconds)
        history = {k: [*history.get(k, []), x] for k, x in row.items()}
        ce, tail = history["ce"], [*tail, val.cpu()][-2:]
        if not math.isfinite(row["loss"] + row["val_nll"]):
            break
        if best_epoch(history) == epoch + 1:
            best = {name: t.clone() for name, t in model.state_dict().items()}
        if snapshots:
            snapshots.offer(epoch + 1, epoch + 1 == s.epochs, content)
        if control:
            control(row)
    record = dict(best_epoch=best_epoch(history), epochs=len(ce), time=seconds, history=history)
    record |= dict(mixture=teachers.diagnose() if teachers else {}, best=best, tail=tail)
    if not math.isfinite(history["loss"][-1] + history["val_nll"][-1]):
        nothing = dict.fromkeys(("val_acc", "val_nll", "test_acc", "last_test_acc"))
        return record | nothing | dict(status="diverged")
    last = top1(predict(model, data, data.test_x, precision), data.test_y)
    model.load_state_dict(best)
    record |= {name: history[name][record["best_epoch"] - 1] for name in ("val_acc", "val_nll")}
    test = top1(predict(model, data, data.test_x, precision), data.test_y)
    return record | dict(status="done", test_acc=test, last_test_acc=last)


# ---- 9. experiment: the plan (jobs and what they need), the workers ----
@dataclass(frozen=True)
class Job:
    """The training of one model: a pure function of the plan and of the jobs that it needs."""

    name: str
    kind: str
    ratio: float = 1.0
    method: str = ""
    run: int = 0
    needs: tuple[str, ...] = ()

    def has(self, part: str) -> bool:
        """Whether this part of HPM-KD is on."""
        return self.method.startswith("HPM-KD") and f"-no-{part}" not in self.method


def chain(ratio: float) -> list[float]:
    """Ratios of the assistants: geometric, each step at most 3x by label, at least one."""
    steps = max(2, math.ceil(math.log(ratio) / math.log(CHAIN_STEP) - 1e-9))
    return [ratio ** (i / steps) for i in range(1, steps)]


def plan_jobs(cells: dict[str, int]) -> dict[str, Job]:
    """The jobs of {"5x HPM-KD": runs, …} by name, each behind those that it needs."""
    jobs = {}
    for cell, runs in cells.items():
        ratio, method = parse_cell(*cell.split(" "))
        job, sizes = Job("", "student", ratio, method), chain(ratio)
        stages = tuple(f"assistant_{ratio:g}x_{i}" for i in range(1, len(sizes) + 1))
        needs = ("teacher",) * (method != "Direct") + stages * job.has("chain")
        if needs:
            jobs["teacher"] = Job("teacher", "teacher")
        if job.has("config"):
            jobs["probe"] = Job("probe", "probe", PROBE_RATIO, needs=("teacher",))
        for before, name, size in zip(needs, needs[1:], sizes):
            jobs[name] = Job(name, "assistant", size, needs=(before,))
        needs += ("probe",) * job.has("config")
        for k in range(1, runs + 1):
            name = f"student_{ratio:g}x_{method}_run{k}"
            jobs[name] = replace(job, name=name, run=k, needs=needs)
    return jobs


def candidates_of(key: dict) -> tuple:
    """The (T_max, alpha) that the probe compares."""
    return CANDIDATES[: 2 if key["mode"] == "smoke" else None]


def setting_of(job: Job, key: dict, t_max: float = 4.0, alpha: float = 0.5) -> Setting:
    """How a job is trained; (t_max, alpha) is the probe's choice or one of its candidates."""
    common = {k: key[k] for k in ("batch_size", "lr", "seed", "patience")}
    s, probing = Setting(key["student_epochs"], order=job.name, **common), job.kind == "probe"
    if job.kind == "teacher":
        return replace(s, epochs=key["teacher_epochs"], fresh=True)
    if job.kind == "assistant" or job.method == "TraditionalKD":
        t_max, alpha = ASSISTANT if job.kind == "assistant" else KD
    hpm = probing or job.has("temperature")
    high, low = (t_max, t_max / 2) if hpm else (t_max, t_max)
    if job.kind == "student":
        if job.method.startswith("HPM-KD") and not hpm:
            high = low = 0.75 * t_max
        attend = f"{job.ratio:g}x run{job.run}" * job.has("attention")
        s = replace(s, order=f"run{job.run}", attend=attend)
    elif probing:
        s = replace(s, epochs=2 if key["mode"] == "smoke" else max(5, s.epochs // 5))
    return replace(s, alpha=alpha * (job.method != "Direct"), t_high=high, t_low=low)


@functools.lru_cache(1)
def cached_data(name, places, scratch, device, seed, subset, limit) -> Data:
    """The dataset on the device, once per process."""
    return Data(load_dataset(name, places, scratch), seed, subset, limit, device)


BOARD = []  # in a worker: [[stop flag, epochs done]], memory shared with the parent


def run_job(spec: dict) -> dict:
    """Train one job in this process and write its files; returns its record for the state."""
    job, key, precision, device = (spec[k] for k in ("job", "key", "precision", "device"))
    data = cached_data(*spec["data"], device, *(key[k] for k in ("seed", "subset", "limit")))
    run, classes, banks = RunDir(spec["run"]), len(data.raw["classes"]), []
    identity = sha((sorted(key.items()), job, spec["choice"], spec["teachers"]))

    def control(metrics):
        for board in BOARD:
            board[1] += metrics is not None
            if board[0]:
                raise Stopped

    def frozen(name, seal):
        saved = read(run.file(name, data.raw["name"]), seal=seal)
        network = build_network(**saved["arch"])
        network.load_state_dict(saved["weights"])
        return network

    for name, seal, weights in spec["teachers"]:
        bank = (
            spec["data"][2] / "banks" / sha((weights, sorted(key.items()), precision, device[:4]))
        )
        banks.append(Bank(data, functools.partial(frozen, name, seal), bank, precision))

    def trained(name, choice):
        purpose = (job.ratio, job.run) if job.kind == "student" else (job.name,)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(key["seed"], "init", *purpose).initial_seed())
            model = build_teacher(classes, key["width"])
            if job.kind != "teacher":
                model = build_student(job.ratio, count_parameters(model), classes)
        snapshots = Snapshots(run, name, f"{identity} {choice}", *spec["snapshots"])
        setting = setting_of(job, key, *choice)
        return model, train(model, data, setting, banks, precision, snapshots, control)

    params, macs = measure(job.ratio, classes, key["width"], data.train_x.shape[1])
    record = dict(params=params, macs=macs, kind=job.kind, ratio=job.ratio, method=job.method)
    record |= dict(run=job.run, sha256="", weights="", device=device, precision=precision)
    record |= dict(threads=torch.get_num_threads(), torch=str(torch.__version__))
    if job.kind == "probe":
        trials = [trained(f"probe{i}", c)[1] for i, c in enumerate(candidates_of(key), 1)]
        record |= dict.fromkeys(trials[0]) | choose(trials, candidates_of(key), data.val_y.cpu())
        record |= dict(status="done", history={}, mixture={})
        record |= {k: sum(t[k] for t in trials) for k in ("time", "epochs")}
    else:
        model, result = trained(job.name, spec["choice"])
        record |= result | dict(choice=spec["choice"])
        if record["status"] == "done":
            weights = {k: v.cpu().contiguous() for k, v in result["best"].items()}
            about = dict(arch=model.arch, classes=data.raw["classes"], mean=data.mean, std=data.std)
            sealed = pack(about | dict(weights=weights))
            put(run.file(job.name, data.raw["name"]), sealed)
            weights = sha({k: sha(v.numpy().tobytes()) for k, v in weights.items()})
            record |= dict(sha256=sealed[-64:].decode(), weights=weights)
    record["banks"] = {t[0]: b.seconds for t, b in zip(spec["teachers"], banks)}
    return {k: v for k, v in record.items() if k not in ("best", "tail")}


def set_up_log(file: Path | None = None) -> None:
    """Log lines to standard output, and to the run's log file."""
    log.handlers = [logging.StreamHandler(sys.stdout)]
    log.handlers += [logging.FileHandler(file)] if file else []
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.propagate = logging.raiseExceptions = False
    log.setLevel(logging.INFO)


def start_worker(board, log_file: Path, threads: int, deterministic: bool) -> None:
    """Set up a worker process: it heeds only its parent, and dies with it."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)

    def watch():
        mp.connection.wait([mp.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    BOARD.append(board)
    set_up_log(log_file)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.use_deterministic_algorithms(deterministic)


class Worker:
    """One process on one device, started with its first job and again after it has died."""

    def __init__(self, device: str, *setup):
        self.device, self.setup, self.pool, self.job = device, setup, None, None

    def ask(self, job: Job, spec: dict) -> None:
        """Give it a job: `future` is its record, `board` is shared with the process."""
        if self.pool is None:
            context = mp.get_context("spawn")
            self.board = context.RawArray("l", 2)
            self.pool = ProcessPoolExecutor(1, context, start_worker, (self.board, *self.setup))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a new process inherits
        self.job, self.board[1] = job, 0
        self.future = self.pool.submit(run_job, spec | dict(job=job, device=self.device))
        signal.signal(signal.SIGINT, before)


class Progress:
    """Done, left and ETA, weighted by multiply-accumulates: a bar, or a line a minute."""

    def __init__(self, jobs: dict[str, Job], state: dict, workers: list[Worker], bar: bool):
        from tqdm import tqdm

        self.done, self.workers, key, task = state["jobs"], workers, state["key"], state["task"]
        self.epochs = {n: setting_of(j, key).epochs for n, j in jobs.items()}
        self.epochs |= {n: self.epochs[n] * len(candidates_of(key)) for n in jobs if n == "probe"}
        size = task["classes"], key["width"], task["side"]
        self.costs = {n: measure(j.ratio, *size)[1] * self.epochs[n] for n, j in jobs.items()}
        self.begun = self.said = time.monotonic()
        self.bar = tqdm(
            total=100, disable=not bar, leave=False, bar_format="{l_bar}{bar}|{postfix}"
        )
        self.first = self.share()

    def share(self) -> float:
        part = {w.job.name: w.board[1] / self.epochs[w.job.name] for w in self.workers if w.job}
        part |= dict.fromkeys(self.done, 1.0)
        return sum(c * part.get(n, 0.0) for n, c in self.costs.items()) / sum(self.costs.values())

    def __str__(self) -> str:
        gained, spent = self.share() - self.first, time.monotonic() - self.begun
        left = spent * (1 - self.share()) / gained if gained > 0 else 0
        eta = f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}" if gained > 0 else "?"
        count = f"{sum(n in self.done for n in self.costs)} of {len(self.costs)} models"
        return f"{count}, {100 * self.share():.0f} %, ETA {eta}"

    def tell(self) -> None:
        """Renew the bar; where there is none, log a line once a minute."""
        text = f"{self}, now {', '.join(w.job.name for w in self.workers if w.job)}"
        self.bar.n = round(100 * self.share(), 1)
        self.bar.set_postfix_str(text)
        if self.bar.disable and time.monotonic() - self.said >= 60:
            self.said = time.monotonic()
            log.info(text)


def run_jobs(run, state, jobs, devices, spec, halt, bar=False, deterministic=False) -> list[str]:
    """Train the jobs that are not finished, longest first, one per device at a time; the state is
    written after each. `halt()`: all must stop. Returns a line for every job that failed."""
    done, failed, tries = state["jobs"], [], []
    waiting = {name: job for name, job in jobs.items() if name not in done}
    setup = run.path / "experiment.log", state["threads"], deterministic
    workers = [Worker(device, *setup) for device in devices]
    progress = Progress(jobs, state, workers, bar)

    def able(job):
        return all(n in done and done[n]["status"] == "done" for n in job.needs)

    while True:
        stop = bool(halt())
        for w in workers:
            ready = [job.name for job in waiting.values() if able(job)]
            if ready and not w.job and not stop:
                job = waiting.pop(max(ready, key=progress.costs.get))
                ids = [
                    (n, done[n]["sha256"], done[n]["weights"]) for n in job.needs if n != "probe"
                ]
                choice = done["probe"]["choice"] if "probe" in job.needs else CANDIDATES[0]
                w.ask(job, spec | dict(choice=list(choice), teachers=ids))
        if not (busy := [w for w in workers if w.job]):
            break
        wait([w.future for w in busy], timeout=0.2, return_when="FIRST_COMPLETED")
        progress.tell()
        for w in busy:
            w.board[0] = stop
            if not w.future.done():
                continue
            job, w.job = w.job, None
            try:
                record = w.future.result()
            except Stopped:
                continue
            except BrokenExecutor:
                w.pool = None
                if not stop and job.name not in tries:
                    log.warning("the process of %s died: it goes on from its snapshot", job.name)
                    waiting[job.name] = job
                elif not stop:
                    failed.append(f"{job.name}: its process died twice")
                tries.append(job.name)
                continue
            except Exception as error:
                failed.append(f"{job.name}: {type(error).__name__}: {str(error)[:300]}")
                continue
            teacher = done["teacher"]["weights"] if job.needs else ""
            done[job.name] = record | dict(teacher=teacher, finished=time.time())
            for name, seconds in record["banks"].items():
                state["banks"][name] = state["banks"].get(name, 0.0) + seconds
            run.write_state(state)
            for file in run.folder.glob(f"snapshot_{job.name}[0-9_]*"):
                if job.kind in ("student", "probe"):  # the others keep theirs as a second copy
                    file.unlink()
            if record["status"] == "diverged":
                failed.append(f"{job.name}: stopped, loss not finite in epoch {record['epochs']}")
            acc = "validation {val_acc:.2f} %, test {test_acc:.2f} %" if record["test_acc"] else ""
            acc = acc or "{status} {choice}"
            text = f"%s: {acc}, {{time:.0f}} s; %s".format(**record)
            log.info(text.replace("%,", "%%,"), job.name, progress)
    progress.bar.close()
    for w in workers:
        if w.pool:
            w.pool.shutdown()
    failed += [] if stop else [f"{n}: needs a model that failed" for n in waiting]
    for line in failed:
        log.error("failed: %s", line)
    return failed


# ---- 10. results: one tidy table, statistics, CSV, figures, report ----
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COLOURS = "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #999999".split()
RUN_COLUMNS = """job kind compression ratio measured_ratio method run seed params macs val_acc
test_acc last_test_acc best_epoch epochs time teacher""".split()
CELL_COLUMNS = """compression ratio measured_ratio method teacher teacher_acc student_acc_mean
student_acc_std retention delta_vs_direct delta_ci95_low delta_ci95_high params macs time_mean
time_std n_runs""".split()


def interval(values) -> tuple[float, float, float]:
    """Mean and Student-t 95 % interval of a sample; NaN where it is too small."""
    values, nan = list(values), math.nan
    n, mean = len(values), sum(values) / len(values) if len(values) else nan
    if n < 2:
        return mean, nan, nan
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = error * (T975[n - 2] if n <= 11 else 1.96 + 2.5 / (n - 1))
    return mean, mean - half, mean + half


def tidy(state: dict, jobs: dict[str, Job]):
    """results_runs.csv: a data frame with one row per trained model and per bank."""
    import pandas as pd

    task, done = state["task"], state["jobs"]
    teacher = measure(1, task["classes"], state["key"]["width"], task["side"])[0]
    rows = [done[n] | dict(job=n, teacher=done[n]["teacher"][:12]) for n in jobs if n in done]
    rows += [dict(job=f"bank_{n}", kind="bank", time=x) for n, x in state["banks"].items()]
    table = pd.DataFrame(rows, columns=RUN_COLUMNS)
    table = table.assign(measured_ratio=teacher / table.params, seed=state["key"]["seed"])
    table["compression"] = [f"{r:g}x" if r == r else None for r in table.ratio]
    return table.astype(dict.fromkeys(("val_acc", "test_acc", "last_test_acc"), float))


def differences(table, a: str, b: str, ratio: float, column: str = "test_acc"):
    """Rows (teacher, run, diff = a - b in points), of one run and one teacher (Direct has none)."""
    students = table[(table.kind == "student") & (table.ratio == ratio)].dropna(subset=[column])
    pairs = students[students.method == a].merge(students[students.method == b], on="run")
    pairs = pairs[(pairs.teacher_x == pairs.teacher_y) | (pairs.method_y == "Direct")]
    pairs = pairs.assign(teacher=pairs.teacher_x, diff=pairs[f"{column}_x"] - pairs[f"{column}_y"])
    return pairs[["teacher", "run", "diff"]]


def summarise(state: dict, jobs: dict[str, Job], table):
    """results.csv: one row per (ratio, method), and per teacher where there are several.

    time_mean: own seconds plus the share of assistants, probe and bank forwards."""
    import pandas as pd

    done, rows, banks = state["jobs"], [], state["banks"]
    teacher = done.get("teacher", dict(weights="", test_acc=None))
    needs = {n: j.needs for n, j in jobs.items() if j.kind == "student" and n in done}
    users = {n: sum(n in x for x in needs.values()) for n in jobs}
    spent = {n: done[n]["time"] * (n != "teacher") + banks.get(n, 0.0) for n in jobs if n in done}
    shared = {n: sum(spent[x] / users[x] for x in needs[n]) for n in needs}
    good = table[table.kind == "student"].dropna(subset=["test_acc"])
    for (ratio, method, of), cell in good.groupby(["ratio", "method", "teacher"], sort=False):
        gain = differences(table, method, "Direct", ratio).query("teacher == @of")["diff"]
        known = teacher["test_acc"] if of in ("", teacher["weights"][:12]) else None
        seconds, acc, one = cell.time + cell.job.map(shared), cell.test_acc, cell.iloc[0]
        row = [one.compression, ratio, one.measured_ratio, method, of, known, acc.mean(), acc.std()]
        row += [100 * acc.mean() / (known or math.nan), *interval(gain if of else [])]
        rows.append([*row, one.params, one.macs, seconds.mean(), seconds.std(), len(cell)])
    return pd.DataFrame(rows, columns=CELL_COLUMNS)


def headroom(table, ratio: float) -> float:
    """Teacher - Direct in points of validation accuracy: where it is not positive, KD is void."""
    direct = table[(table.ratio == ratio) & (table.method == "Direct")].val_acc.mean()
    return table[table.kind == "teacher"].val_acc.mean() - direct


def verdict(table, column: str = "test_acc") -> tuple[str, float]:
    """(sentence, mean) of D_k = mean over the ratios >= 5 of HPM-KD - Direct in run k, points."""
    import pandas as pd

    ratios = sorted(r for r in table[table.method == "HPM-KD"].ratio.unique() if r >= 5)
    pairs = [differences(table, "HPM-KD", "Direct", r, column) for r in ratios]
    at = f"at {', '.join(f'{r:g}x' for r in ratios) or '5x or more'}"
    runs = pd.concat(pairs).groupby(["teacher", "run"])["diff"] if ratios else None
    runs = (
        runs.agg(["mean", "size"]).query("size == @n", local_dict=dict(n=len(ratios)))
        if ratios
        else []
    )
    if not len(runs):
        return f"no verdict {at}: HPM-KD and Direct have no complete pair of runs", math.nan
    values = max((x["mean"] for _, x in runs.groupby(level=0)), key=len)
    (mean, low, high), n = interval(values), len(values)
    if void := [f"{r:g}x" for r in ratios if headroom(table, r) <= 0]:
        return f"void: the teacher does not exceed its student at {', '.join(void)}", mean
    if n < 2:
        return f"no verdict {at}: one run ({mean:+.2f} points) gives no interval", mean
    word = "supported" if low > 0 else "not supported" if high < 0 else "inconclusive"
    text = f"HPM-KD - Direct = {mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    return f"{word} {at}: {text} (half-width {(high - low) / 2:.2f}, n = {n} runs)", mean


def draw_figures(folder: Path, state: dict, table, cells) -> None:
    """PNG (300 DPI) and PDF of every figure, readable at a column's width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "legend.fontsize": 7, "axes.grid": True})
    folder.mkdir(exist_ok=True)
    ratios, methods = sorted(cells.ratio.unique()), [*dict.fromkeys([*METHODS, *cells.method])]
    ink = dict(zip(methods, itertools.cycle(COLOURS)))
    mark = dict(zip(methods, itertools.cycle("os^Dv<>")))
    methods = [m for m in methods if m in set(cells.method)]
    top = state["jobs"].get("teacher", {}).get("test_acc") or math.nan

    def accuracy(m, r):
        return table[(table.method == m) & (table.ratio == r)].test_acc.dropna()

    kept, gains = (
        (lambda m, r: 100 / top * accuracy(m, r)),
        (lambda m, r: differences(table, m, "Direct", r)["diff"]),
    )
    for name, ylabel, value, line, text in (
        ("accuracy_vs_compression", "test accuracy (%)", accuracy, top, "teacher"),
        ("hpmkd_vs_direct", "gain over Direct (points)", gains, 0, "Direct"),
        ("retention_analysis", "retained accuracy (% of teacher)", kept, 100, "teacher"),
    ):
        figure, ax = plt.subplots(figsize=(3.3, 2.6))
        ax.axhline(line, color="#777777", ls="--", lw=1, label=text)
        shown = [m for m in methods if m != text]
        for i, m in enumerate(shown):
            dots = [
                (k + 0.12 * (i - (len(shown) - 1) / 2), v)
                for k, r in enumerate(ratios)
                for v in value(m, r)
            ]
            x, places = [d[0] for d in dots], sorted({d[0] for d in dots})
            ax.plot(x, [d[1] for d in dots], ".", color=ink[m], ms=3, alpha=0.5)
            middle = [interval(v for p, v in dots if p == place) for place in places]
            half = [0 if math.isnan(low) else mean - low for mean, low, _ in middle]
            style = dict(color=ink[m], marker=mark[m], ms=4, lw=1, capsize=2, label=m)
            ax.errorbar(places, [row[0] for row in middle], half, **style)
        ax.set_xticks(range(len(ratios)), [f"{r:g}x" for r in ratios])
        ax.set(xlabel="compression (teacher / student parameters)", ylabel=ylabel)
        save_figure(figure, folder / name)
    figure, axes = plt.subplots(1, len(ratios), sharey=True, figsize=(6.8, 2.6), squeeze=False)
    for (r, ax), m in itertools.product(zip(ratios, axes[0]), methods):
        jobs = table[(table.method == m) & (table.ratio == r) & table.test_acc.notna()].job
        curves = zip(*(state["jobs"][j]["history"]["val_acc"] for j in jobs))
        mean = [sum(x) / len(x) for x in curves]
        ax.plot(range(1, len(mean) + 1), mean, color=ink[m], lw=1, label=m)
        ax.set(title=f"{r:g}x", xlabel="epoch", ylabel="validation accuracy (%)")
    save_figure(figure, folder / "learning_curves")
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(6.8, 2.6))
    for m, cell in cells.groupby("method"):
        for ax, x, label in (
            (axes[0], cell.time_mean, "training seconds per student, shares included"),
            (axes[1], cell.params / 1e6, "parameters (millions)"),
        ):
            ax.plot(x, cell.student_acc_mean, color=ink[m], marker=mark[m], ms=4, lw=1, label=m)
            ax.set(xlabel=label, ylabel="test accuracy (%)")
    save_figure(figure, folder / "cost")


def save_figure(figure, path: Path) -> None:
    for ax in figure.axes[1:]:
        ax.set_ylabel("")
    figure.axes[-1].legend()
    for kind in ("png", "pdf"):
        figure.savefig(f"{path}.{kind}", dpi=300, bbox_inches="tight")
    figure.clear()


def markdown(rows, columns) -> str:
    """Rows as a Markdown table; floats with two digits, missing values as a dash."""
    rows = [
        ["–" if x is None or x != x else f"{x:,.2f}" if isinstance(x, float) else x for x in r]
        for r in rows
    ]
    return "\n".join(
        f"| {' | '.join(map(str, r))} |" for r in [columns, ["---"] * len(columns), *rows]
    )


METHOD = """Teacher: ResNet-50 (3x3 stride-1 stem, no max-pool, first stage {width} wide),
{teacher_epochs} epochs, fresh views every epoch. Students: slim ResNet-18, {student_epochs} epochs,
loss (1 - alpha) CE + alpha T^2 KL (arXiv 1503.02531). TraditionalKD: T 4, alpha 0.5. HPM-KD (arXiv
2512.09886): probed T_max and alpha, assistants, attention trained on validation labels, temperature
schedule. SGD, Nesterov 0.9, weight decay 5e-4, batch {batch_size}, peak lr {lr:g}, 5 % warm-up, cosine
to zero, seed {seed}. {name}: {train} training, {val} validation, {test} test images. The best epoch is
chosen on validation (of equals the later); the test set is read once per model. Run k of all methods
starts from the same weights and sees the same batches and views. Everything is conditional on one
teacher and one set of assistants."""


def write_results(run: RunDir, state: dict, jobs: dict[str, Job], partial: str) -> str:
    """Write tables, figures and the report of what is finished; returns the verdict."""
    table, key, task, done = tidy(state, jobs), state["key"], state["task"], state["jobs"]
    cells = summarise(state, jobs, table)
    (sentence, mean), last = verdict(table), verdict(table, "last_test_acc")[1]
    content = dict(configuration=key, task=task, completed=not partial, verdict=sentence)
    content |= dict(models={n: done[n] for n in jobs if n in done}, sessions=state["sessions"])
    put(run.path / "results.json", json.dumps(content, indent=1).encode())
    put(run.path / "results_runs.csv", table.to_csv(index=False).encode())
    put(run.path / "results.csv", cells.to_csv(index=False).encode())
    say = [f"# When does distillation help? Experiment 1B on {task['name']}"]
    say += [f"**Verdict: {sentence}.**", f"**Partial results: {partial}.**" if partial else ""]
    if mean * last < 0:
        say += [f"Caution: {mean:+.2f} points at the best epoch, but {last:+.2f} at the last one."]
    columns = [*CELL_COLUMNS[:9], *CELL_COLUMNS[14:]]
    say += ["## Accuracy (%) and cost (s)", markdown(cells[columns].values, columns)]
    rows = []
    for r, m in itertools.product(sorted(cells.ratio.unique()), dict.fromkeys(cells.method)):
        gate = "void: the teacher does not exceed its student" if headroom(table, r) <= 0 else ""
        for base in METHODS[: 3 if "-no-" in m else 2 if m == "HPM-KD" else 1]:
            gain = differences(table, m, base, r)["diff"]
            rows += (
                [[f"{r:g}x", f"{m} - {base}", *interval(gain), len(gain), headroom(table, r), gate]]
                if m != base
                else []
            )
    columns = [
        "compression",
        "difference (points)",
        "mean",
        "low",
        "high",
        "runs",
        "headroom",
        "gate",
    ]
    say += [
        "## Paired differences, parts of HPM-KD switched off",
        "Student-t 95 % intervals over runs; "
        "headroom: teacher - Direct in points of validation accuracy.",
        markdown(rows, columns),
    ]
    if len(cells):
        draw_figures(run.path / "figures", state, table, cells)
        say += [
            f"![{p.stem}](figures/{p.name})" for p in sorted((run.path / "figures").glob("*.png"))
        ]
    columns = ["job", "measured_ratio", "params", "macs", "val_acc", "test_acc", "epochs", "time"]
    say += [
        "## Teacher, assistants, probe, banks",
        markdown(table[table.kind != "student"][columns].values, columns),
    ]
    if "probe" in done:
        rows = [[f"{x:.4g}" for x in score] for score in done["probe"]["scores"]]
        say += [
            f"Probe, tuned at 5x on validation NLL (nat): T_max, alpha = {done['probe']['choice']}."
        ]
        say += [markdown(rows, ["T_max", "alpha", "NLL", "gain over default", "standard error"])]
    rows = []
    for name in (
        n
        for n, j in jobs.items()
        if n in done and j.run == 1 and len(done[n]["mixture"].get("weights", ())) > 1
    ):
        mix, sources = done[name]["mixture"], [x for x in jobs[name].needs if x != "probe"]
        sources += ["uniform mixture", "learned mixture"]
        rows += zip(
            [name] * 9, sources, mix["val_acc"], mix["val_nll"], [*mix["weights"], None, None]
        )
    if rows:
        columns = ["student", "source", "validation accuracy (%)", "NLL (nat)", "mean weight"]
        say += [
            "## What HPM-KD distilled from",
            "If the learned mixture does not beat the teacher, chain and attention cannot help.",
            markdown(rows, columns),
        ]
    say += ["## Method", METHOD.format(**key | task), "## Provenance"]
    say += [markdown((key | task).items(), ["what", "value"])]
    say += [markdown([s.values() for s in state["sessions"]], [*state["sessions"][-1]])]
    put(run.path / "experiment_report.md", ("\n\n".join(filter(None, say)) + "\n").encode())
    return sentence


# ---- 11. command line ----
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists all flags)")


def parse(argv=None) -> Flags:
    """The flags, each checked by itself; UserError in one line for what is wrong."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    groups, types = {}, {"int": int, "float": float}
    for f in fields(Flags):
        more = {k: v for k, v in f.metadata.items() if k not in ("group", "low")}
        if f.type == "bool":
            more["action"] = "store_true"
        else:
            more |= dict(type=types.get(f.type, str), metavar="X" if f.type == "float" else "N")
        if f.metadata["group"] not in groups:
            groups[f.metadata["group"]] = parser.add_argument_group(f.metadata["group"])
        option = "--" + f.name.replace("_", "-")
        groups[f.metadata["group"]].add_argument(option, default=f.default, **more)
    flags = Flags(**vars(parser.parse_args(argv)))
    for f in fields(Flags):
        value, low = getattr(flags, f.name), f.metadata["low"]
        if value is not None and low is not None and not low <= value < math.inf:
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be at least {low:g}")
    if flags.dataset and flags.dataset not in DATASETS:
        flags = replace(flags, dataset=str(Path(flags.dataset).resolve()))
    return flags


def find_runs(places) -> list[tuple[RunDir, dict]]:
    """Every run directory below `places` whose state can be read, newest first."""
    found = {}
    for path in search(places, "experiment_state.pkl", "experiment_state.prev.pkl"):
        run = RunDir(path.parent.parent)
        try:
            found[run.path.resolve()] = run, run.read_state()
        except UserError as error:
            log.warning("%s", error)
    return sorted(found.values(), key=lambda x: -x[1]["updated"])


def locate(given: dict, places) -> tuple[RunDir, dict]:
    """The newest run directory that fits the experiment flags given, or UserError."""
    if not (found := find_runs(places)):
        raise UserError(f"nothing to resume: no run directory in {', '.join(map(str, places))}")
    odd = [[f"{k} {s['key'][k]}" for k, v in given.items() if s["key"][k] != v] for _, s in found]
    if all(odd):
        i = min(range(len(odd)), key=lambda i: len(odd[i]))
        raise UserError(f"no run fits; the nearest, {found[i][0].path}, has {', '.join(odd[i])}")
    return found[odd.index([])]


def show_status(places) -> None:
    """Two lines per run directory: what it is, how much is done, the command that continues it."""
    for run, state in find_runs(places):
        jobs, done = plan_jobs(state["cells"]), state["jobs"]
        size = sum(f.stat().st_size for f in run.path.rglob("*") if f.is_file()) / 1e6
        best = max((r["test_acc"] or 0 for r in done.values() if r["kind"] == "student"), default=0)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(state["updated"]))
        count = f"{sum(n in done for n in jobs)} of {len(jobs)} models, best {best:.2f} %"
        print(f"{run.path.name}: {state['task']['name'][:16]}, {count}, {size:.0f} MB, {when}")
        print(f"  --resume {run.path}")


def session(flags: Flags) -> int:
    """One session on one run directory, new or resumed; returns the exit code."""
    here, begun, signals, failed = detect_platform(), time.time(), [], []
    set_up_log()
    asked, holds = (
        Path(flags.resume or flags.output or here.output),
        lambda p: any(f.exists() for f in RunDir(p).states),
    )
    output = asked.parent if holds(asked) else asked
    places, scratch = (
        [asked, *([] if holds(asked) else here.inputs)],
        here.scratch or output / "data",
    )
    if flags.status:
        show_status(places)
        return 0
    given = {
        f.name: getattr(flags, f.name) for f in fields(Flags) if f.metadata["group"] == "experiment"
    }
    given, run, state = {k: v for k, v in given.items() if v is not None}, None, None
    if flags.resume is not None or flags.report:
        run, state = locate(given, places)
        run.lock()
        state = run.read_state()
        run.verify(state)
        key = state["key"]
    elif holds(asked):
        raise UserError(f"{asked} holds a run: add --resume, or name another --output")
    else:
        key = MODES[flags.mode or "quick"] | dict(mode="quick", seed=0, patience=0) | given
        key = dict(lr=LR_PER_128 * key["batch_size"] / 128, recipe=VERSION) | key
    ratios = flags.compression if flags.compression and "all" not in flags.compression else RATIOS
    cells = [parse_cell(r, m) for r in ratios for m in flags.methods or METHODS]
    cells = {f"{r:g}x {m}": flags.runs or key["runs"] for r, m in cells}
    if state and not (flags.compression or flags.methods or flags.runs):
        cells = state["cells"]
    jobs = plan_jobs(cells)
    if train_now := not flags.report and not (state and all(n in state["jobs"] for n in jobs)):
        if key["recipe"] != VERSION:
            raise UserError(
                f"{run.path}: recipe {key['recipe']}, this script has {VERSION}: only --report"
            )
        devices = usable_devices(flags.device, key["mode"], flags.workers)
        major = 0 if devices[0] == "cpu" else torch.cuda.get_device_capability(devices[0])[0]
        precision = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"  # tensor cores
        precision = precision if flags.precision == "auto" else flags.precision
        inputs = tuple(Path(p) for p in (flags.data_dir, *here.inputs) if p)
        raw = load_dataset(key["dataset"], inputs, scratch)
        if state and raw["fingerprint"] != key["fingerprint"]:
            raise UserError(f"{key['dataset']} is not the data of {run.path}: pass its --data-dir")
        split = Data(raw, key["seed"], key["subset"], key["limit"])
        task = dict(name=raw["name"], classes=len(raw["classes"]), side=split.train_x.shape[1])
        task |= dict(
            train=len(split), val=len(split.val_y), test=len(split.test_y), source=raw["note"]
        )
        key["fingerprint"] = raw["fingerprint"]
        for job in jobs.values():  # no ratio may be found impossible later
            measure(job.ratio, task["classes"], key["width"], task["side"])
    if state is None:
        for other, s in find_runs([output]):
            if s["key"] == key and any(n not in s["jobs"] for n in plan_jobs(s["cells"])):
                log.warning(
                    "NOTE: the same experiment is unfinished in %s: --resume continues it",
                    other.path,
                )
        run = RunDir(output / time.strftime(f"exp1b_{key['mode']}_%Y%m%d_%H%M%S"))
        run.folder.mkdir(parents=True)
        run.lock()
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(
            1, os.cpu_count() // len(devices)
        )
        state = dict(
            key=key, task=task, cells=cells, jobs={}, banks={}, sessions=[], threads=threads
        )
        run.write_state(state)
    set_up_log(run.path / "experiment.log")
    state["cells"] |= {c: max(n, state["cells"].get(c, 0)) for c, n in cells.items()}
    everything = plan_jobs(state["cells"])
    if train_now:
        about = dict(
            started=time.strftime("%Y-%m-%d %H:%M:%S"), host=os.uname().nodename, platform=here.name
        )
        about |= dict(
            devices=", ".join(devices),
            precision=precision,
            threads=state["threads"],
            torch=str(torch.__version__),
        )
        state["sessions"].append(about | dict(script=sha(Path(__file__).read_bytes())[:12]))
        for name in ("devices", "precision", "threads", "torch", "script"):
            if len(values := {s[name] for s in state["sessions"]}) > 1:
                log.warning(
                    "%s differs between the sessions: %s", name, ", ".join(map(str, values))
                )
        run.write_state(state)
        log.info(
            "%s: %s in %s, %d threads each",
            here.name,
            ", ".join(devices),
            precision,
            state["threads"],
        )
        log.info(
            "data: %(source)s: %(train)d training, %(val)d validation, %(test)d test images", task
        )
        log.info(
            "%d of %d models to train, into %s",
            sum(n not in state["jobs"] for n in jobs),
            len(jobs),
            run.path,
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.append(number))
        spec = dict(
            key=key, run=run.path, data=(key["dataset"], inputs, scratch), precision=precision
        )
        spec["snapshots"] = flags.checkpoint_interval, 900.0 if here.drive else 20.0
        hours = (
            math.inf
            if flags.max_hours is None and here.hours is None
            else flags.max_hours or here.hours
        )

        def halt():
            return signals or time.time() > begun + 3600 * hours

        bar = sys.stdout.isatty() and not here.notebook
        failed = run_jobs(run, state, jobs, devices, spec, halt, bar, flags.deterministic)
    undone = sum(n not in state["jobs"] for n in everything)
    partial = f"{undone} of {len(everything)} models are not trained" if undone else ""
    log.info("verdict: %s", write_results(run, state, everything, partial))
    log.info("report: %s", run.path / "experiment_report.md")
    if undone:
        log.info("to continue: python %s --resume %s", Path(__file__).name, run.path)
    else:
        shutil.rmtree(scratch / "banks", ignore_errors=True)
    return 128 + signals[0] if signals else 1 if failed else 0


def main(argv=None) -> int:
    """The command line: 0 done or out of budget, 1 training failed, 2 bad input, 128 + signal."""
    try:
        return session(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. What is finished is safe: --resume goes on.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
