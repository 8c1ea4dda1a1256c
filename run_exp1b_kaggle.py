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

log, CHANNELS_LAST = logging.getLogger("exp1b"), torch.channels_last  # memory format of networks


class UserError(Exception): ...  # the user can mend it: one line on standard error, exit code 2


class Stopped(Exception): ...  # a stop was asked for: the unfinished epoch is dropped


# ---- 2. recipe: every number in one place; whoever changes one raises VERSION ----
VERSION, SIDE, VALIDATION, TOLERANCE = 1, 32, 0.1, 0.01  # -; pixels; share; of the ratio
MOMENTUM, WEIGHT_DECAY, LR_PER_128, WARMUP = 0.9, 5e-4, 0.1, 0.05  # SGD; share of the steps
MIN_WIDTH = 8  # below, oneDNN's 1x1 stride-2 convolution can crash (torch 2.15, CPU)
CHUNK, CHAIN_STEP = 1000, 3.0  # images per forward of a bank; largest ratio between neighbours
KD, ASSISTANT, PROBE_RATIO = (4.0, 0.5), (4.0, 0.9), 5.0  # (T, alpha) twice; probed at 5x
CANDIDATES = ((4.0, 0.5), (4.0, 0.9), (8.0, 0.9), (3.0, 0.9))  # (T_max, alpha); first: default
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
class Flags:  # the command line; None: the mode's value, or on --resume the run's own
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
        raise UserError(f"--methods {method}: use {'|'.join(METHODS)}, HPM-KD-no-{'/'.join(PARTS)}")
    return float(match[1]), base + "".join(f"-no-{p}" for p in PARTS if p in off)


def sha(data) -> str:
    """SHA-256 in hex of bytes, or of the repr of anything else."""
    plain = isinstance(data, (bytes, memoryview))
    return hashlib.sha256(data if plain else repr(data).encode()).hexdigest()


def generator(*purpose) -> torch.Generator:
    """A generator on the CPU seeded by SHA-256 of (seed, purpose, …): no stream is shared."""
    return torch.Generator().manual_seed(int(sha(purpose)[:15], 16))


# ---- 3. platform ----
def detect_platform(root: Path = Path("/"), env=os.environ) -> SimpleNamespace:
    """name, output, scratch, inputs (paths), hours, drive, notebook: Kaggle, Colab or local."""
    kaggle, colab, drive = root / "kaggle", root / "content", root / "content/drive/MyDrive"
    row = "local", Path.cwd(), None, [], None, False
    if (kaggle / "working").is_dir():
        row = "Kaggle", kaggle / "working", kaggle / "temp/data", [kaggle / "input"], 11.5, False
    elif drive.is_dir() and any(name.startswith("COLAB_") for name in env):
        row = "Colab", drive / "HPM-KD_Results", colab / "data", [drive], None, True
    elif colab.is_dir() and any(name.startswith("COLAB_") for name in env):
        row = "Colab", colab, colab / "data", [], None, False
    row += (any(name.startswith(("KAGGLE_", "COLAB_", "JPY_PARENT_PID")) for name in env),)
    names = "name output scratch inputs hours drive notebook".split()
    return SimpleNamespace(**dict(zip(names, row)))


def usable_devices(wanted: str, mode: str, workers: int | None = None) -> list[str]:
    """A torch device per worker, each of which has really executed an operation, or UserError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UserError(f"--device {wanted}: choose auto, cpu, cuda or cuda:K")
    found = torch.cuda.is_available() * torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and mode == "smoke" and not found):
        return ["cpu"] * (workers or 1)
    names = [wanted] if ":" in wanted else [f"cuda:{i}" for i in range(found or 1)]
    try:
        for name in names:
            torch.ones(8, device=name).sum().item()
    except (RuntimeError, AssertionError) as error:
        remedy = "Kaggle: Settings > Accelerator > GPU T4 x2; Colab: Runtime > Change runtime type"
        why = f"{name} fails with torch {torch.__version__}: {error!r:.150}"
        raise UserError(f"no usable GPU: {why}. {remedy}; or --device cpu") from None
    return list(itertools.islice(itertools.cycle(names), workers or len(names)))


# ---- 4. data: any dataset → uint8 tensors on the device; views as index arithmetic ----
def search(places, *patterns: str, depth: int = 6):
    """Yield the paths below `places` whose names match; never enters folders of images."""
    for place in map(Path, places):
        for folder, dirs, files in os.walk(place):
            here = [Path(folder, name) for name in sorted(dirs + files)]
            yield from (path for path in here if any(map(path.match, patterns)))
            images = len(files) > 1000 or {"train", "test"} <= set(dirs)
            deep = images or len(Path(folder).relative_to(place).parts) >= depth
            dirs[:] = sorted(name for name in dirs if not deep and name[0] != ".")


def to_side(x: Tensor) -> Tensor:
    """uint8 [N, H, W(, 3)] → [N, 32, 32, 3]: grey becomes three channels, the border is black."""
    x = x if x.ndim == 4 else x[..., None].expand(*x.shape, 3)
    h, w = SIDE - x.shape[1], SIDE - x.shape[2]
    return F.pad(x, (0, 0, w // 2, w - w // 2, h // 2, h - h // 2)).contiguous()


def read_known(name: str, places, scratch: Path) -> dict | None:
    """A torchvision dataset from a sound local copy, else None: CIFAR as folder or .tar.gz (which
    torchvision checks by MD5), (Fashion-)MNIST as idx files, gzipped or not."""
    kind = getattr(torchvision.datasets, name)
    # The two MNISTs share their file names: only the first labels tell which one it is.
    first = {"MNIST": [5, 0, 4, 1, 9, 2], "FashionMNIST": [9, 0, 0, 3, 0, 2]}.get(name)
    idx = [f"{a}-{b}-ubyte*" for a in ("train", "t10k") for b in ("images?idx3", "labels?idx1")]
    for found in search(places, *(idx[:1] if first else (kind.base_folder, kind.filename))):
        try:
            if first:
                files = (min(filter(Path.is_file, found.parent.glob(p))).read_bytes() for p in idx)
                plain = (gzip.decompress(f) if f[:2] == b"\x1f\x8b" else f for f in files)
                x, y, tx, ty = (torch.tensor(bytearray(f)[8:], dtype=torch.uint8) for f in plain)
                x, tx, parts = x[8:].view(-1, 28, 28), tx[8:].view(-1, 28, 28), [kind]
            else:
                if found.is_file() and torchvision.datasets.utils.check_md5(found, kind.tgz_md5):
                    shutil.unpack_archive(found, scratch, filter="data")
                    found = scratch / kind.base_folder
                parts = [kind(found.parent, train=part) for part in (True, False)]
                x, y, tx, ty = (torch.as_tensor(t) for p in parts for t in (p.data, p.targets))
            if (len(x), len(tx)) != (len(y), len(ty)) or first not in (None, y[:6].tolist()):
                raise ValueError("torn, or another dataset of the same file names")
            raw = dict(train_x=to_side(x), train_y=y.long(), test_x=to_side(tx), test_y=ty.long())
            return raw | dict(classes=parts[0].classes, note=f"{found}, images {[*x.shape[1:]]}")
        except Exception as error:  # whatever a damaged file provokes
            log.warning("%s is no usable copy of %s (%r)", found, name, error)


def read_folder(folder: Path) -> dict:
    """Images in train/<class>/* and test/<class>/*, of any size, decoded in parallel."""
    sizes = set()

    def load(sample):
        try:
            image = torchvision.datasets.folder.pil_loader(sample[0])
        except Exception as error:  # whatever a damaged file provokes
            raise UserError(f"unreadable image {sample[0]} ({error}): mend or remove it") from None
        sizes.add(image.size)
        fits = SIDE * 3 // 4 <= min(image.size) <= max(image.size) <= SIDE
        image = image if fits else image.resize((SIDE, SIDE))
        pixels = torchvision.transforms.functional.pil_to_tensor(image)
        return to_side(pixels.permute(1, 2, 0)[None])

    try:
        train, test = (torchvision.datasets.ImageFolder(folder / p) for p in ("train", "test"))
        if (odd := sorted(set(train.classes) ^ set(test.classes))) or len(train.classes) < 2:
            raise OSError(f"not in both: {', '.join(odd)}" if odd else "one class; two are needed")
    except OSError as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"{folder}: expected train/<class>/* and test/<class>/* ({why})") from None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        x, tx = (torch.cat([*pool.map(load, part.samples)]) for part in (train, test))
    y, ty = torch.tensor(train.targets), torch.tensor(test.targets)
    note = f"{folder}, image sizes {sorted(sizes)[:3]}"
    return dict(train_x=x, train_y=y, test_x=tx, test_y=ty, classes=train.classes, note=note)


def make_toy() -> dict:
    """Ten classes of noisy, shifted 16x16 patterns; a small network learns them to over 90 %."""
    g, y = generator("toy"), torch.arange(3000) % 10
    patterns = F.interpolate(torch.rand(10, 3, 5, 5, generator=g), (16, 16), mode="bicubic")
    shifts = torch.randint(-2, 3, (3000, 2), generator=g).tolist()
    x = torch.stack([patterns[c].roll(s, (1, 2)) for c, s in zip(y, shifts)]).clamp(0, 1)
    x = ((x + torch.rand(x.shape, generator=g)) * 127).byte().permute(0, 2, 3, 1).contiguous()
    raw = dict(train_x=x[:2000], train_y=y[:2000], test_x=x[2000:], test_y=y[2000:])
    return raw | dict(classes=[f"pattern {i}" for i in range(10)], note="made by the script, 16x16")


def load_dataset(name: str, places=(), scratch: Path = Path("data")) -> dict:
    """One of DATASETS, or a folder with train/<class>/* and test/<class>/*; else UserError. Keys:
    train_x, test_x uint8 [N, H, W, 3], train_y, test_y int64 [N], classes, name, fingerprint, ….
    `places` are searched for a copy; `scratch` takes what is downloaded or decoded."""
    if name in DATASETS:
        raw = make_toy() if name == "toy" else read_known(name, [scratch, *places], scratch)
        try:
            if raw is None:
                getattr(torchvision.datasets, name)(scratch, download=True)
                raw = dict(read_known(name, [scratch], scratch))
        except Exception as error:  # whatever a network provokes
            why = f"{name}: no local copy, and no download ({error!r:.90})"
            remedy = "Kaggle: Settings > Internet > On, or attach it; else pass --data-dir DIR"
            raise UserError(f"{why}. {remedy}") from None
    elif not Path(name).is_dir():
        raise UserError(f"--dataset {name}: no such folder, and not one of {', '.join(DATASETS)}")
    else:
        files = [(str(p), p.stat().st_size, p.stat().st_mtime) for p in Path(name).glob("t*/**/*")]
        decoded = scratch / f"decoded_{sha(sorted(files))[:16]}.pt"
        try:
            raw = read(decoded)
        except (OSError, ValueError):
            raw = read_folder(Path(name))
            scratch.mkdir(parents=True, exist_ok=True)
            put(decoded, pack(raw))
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
    """A dataset split, on its device: {train,val,test}_x uint8 [N, H, W, 3], _y int64 [N]. One of
    n_views: an image shifted by up to an eighth of its side, the border mirrored, and maybe
    flipped. A table of the pool has a view per training image; all students walk the same."""

    def __init__(self, raw: dict, seed: int = 0, subset: int = 0, limit: int = 0, device="cpu"):
        self.raw, self.seed, self.device = raw, seed, torch.device(device)
        train, test = (stratified(raw[f"{p}_y"], generator(seed, p)) for p in ("train", "test"))
        val, train = train.tensor_split([max(1, round(VALIDATION * len(train)))])
        parts = [("train", train[: subset or None]), ("val", val[: limit or None])]
        for (part, index), x in itertools.product([*parts, ("test", test[: limit or None])], "xy"):
            source = raw[f"{part.replace('val', 'train')}_{x}"]
            setattr(self, f"{part}_{x}", source[index].to(device))
        flat, self.pad = self.train_x.cpu().numpy().reshape(-1, 3), self.train_x.shape[1] // 8
        self.mean, self.std = ((f(0, dtype=float) / 255).tolist() for f in (flat.mean, flat.std))
        self.shift, self.scale = (255 * torch.tensor(v).to(device) for v in (self.mean, self.std))
        self.n_views = (2 * self.pad + 1) ** 2 * raw["flips"]
        noise = torch.rand(len(self), self.n_views, generator=generator(seed, "pool"))
        self.tables = noise.argsort(1).short().T.contiguous()

    def __len__(self) -> int:
        return len(self.train_y)

    def pool(self, table: int) -> Tensor:
        """The view of every training image in a table: int64 [N]."""
        return self.tables[table % self.n_views].long()

    def views(self, index: Tensor, view: Tensor) -> Tensor:
        """These views of these training images, in one gather: uint8 [B, H, W, 3]."""
        index, view = index.to(self.device)[:, None, None], view.to(self.device)[:, None]
        last, span = self.train_x.shape[1] - 1, 2 * self.pad + 1
        steps = torch.arange(last + 1, device=self.device)
        rows = view % span**2 // span - self.pad + steps
        cols = view % span - self.pad + torch.where(view < span**2, steps, steps.flip(0))
        rows, cols = (last - (last - i.abs()).abs() for i in (rows, cols))
        return self.train_x[index, rows[:, :, None], cols[:, None]]

    def pixels(self, x: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → normalised float32 [B, 3, H, W], channels_last in memory."""
        return ((x - self.shift) / self.scale).permute(0, 3, 1, 2)


# ---- 5. models ----
def build_network(block: str, depths, widths, num_classes: int) -> nn.Module:
    """torchvision's ResNet, stages of any width, 3x3 stride-1 stem, no max-pool: logits [B, K]."""
    kind, c = dict(Bottleneck=Bottleneck, BasicBlock=BasicBlock)[block], widths[0]
    model = torchvision.models.ResNet(kind, [1] * 4)  # of which only the frame is kept
    model.conv1, model.bn1 = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
    model.inplanes, model.maxpool = c, nn.Identity()
    for i, (width, depth) in enumerate(zip(widths, depths), 1):
        setattr(model, f"layer{i}", model._make_layer(kind, width, depth, stride=min(i, 2)))
    model.fc = nn.Linear(model.inplanes, num_classes)
    for name, p in model.named_parameters():
        if name.endswith("bn3.weight"):  # zero_init_residual, of bottlenecks
            nn.init.zeros_(p)
        elif p.ndim == 4:
            nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu")
    model.arch = dict(block=block, depths=depths, widths=widths, num_classes=num_classes)
    return model


def build_teacher(num_classes: int, width: int = 64) -> nn.Module:
    """ResNet-50 for small images, its stages width x (1, 2, 4, 8) wide."""
    return build_network("Bottleneck", [3, 4, 6, 3], [width * m for m in (1, 2, 4, 8)], num_classes)


@functools.cache
def student_widths(ratio: float, teacher_params: int, num_classes: int) -> list[int]:
    """Widths near 1:2:4:8 of a ResNet-18 with teacher_params / ratio parameters within 1 %:
    multiples of 8 (tensor cores) where 1 % allows, else of 4, 2 or 1. UserError if none fit."""

    def params(a, b, c, d):  # in closed form: the search tries thousands
        squares, pairs = 36 * a * a + 27 * (b * b + c * c + d * d), 10 * (a * b + b * c + c * d)
        return squares + pairs + 37 * a + 10 * (b + c + d) + (d + 1) * num_classes

    goal, shape = teacher_params / ratio, (64, 128, 256, 512)
    ideal = [w * math.sqrt(goal / params(*shape)) for w in shape]
    for step in (8, 4, 2, 1):
        near = [{max(MIN_WIDTH, (round(w / step) + d) * step) for d in range(-3, 4)} for w in ideal]
        rising = (w for w in itertools.product(*near) if w[0] < w[1] < w[2] < w[3])
        if fits := [w for w in rising if abs(goal / params(*w) - 1) < TOLERANCE]:
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
        model = model if ratio == 1 else build_student(ratio, count_parameters(model), num_classes)
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
    """(T of the next epoch, strategy), from the mean hard-label CE (nat) of each epoch so far. T =
    low + (high - low)(1 + cos(pi c)) / 2: the clock c advances by 1 / epochs, and if loss-driven up
    to twice as fast where the loss stalls (HPM-KD's part 4)."""
    watch, clock, strategy = max(2, math.ceil(epochs / 10)), 0.0, "cosine"
    for e, (before, loss) in enumerate(zip(ce[:1] + ce, ce), 1):
        if e == watch and ce[e // 2 - 1] - loss < PLATEAU * max(math.log(num_classes) - loss, 1e-9):
            strategy = "loss-driven"
        stall = 1 - min(1.0, max(0.0, (before - loss) / max(BRISK * before, 1e-9)))
        clock += (1 + KAPPA * stall * (strategy == "loss-driven")) / epochs
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
    """Logits of a frozen model for every table, each computed once. `load()` is called only if the
    model is needed; processes and sessions share `folder`, where a table's first writer wins."""

    def __init__(self, data: Data, load, folder: Path | None = None, precision: str = "fp32"):
        self.data, self.load, self.folder = data, functools.cache(load), folder
        self.memory, self.precision, self.seconds = {}, precision, 0.0

    def logits(self, table: int | str) -> Tensor:
        """float16 [N, K] of the training images' views in `table`, or of the "val" images."""
        path, data, begun = self.folder and self.folder / f"{table}.pt", self.data, time.time()
        try:
            return (read(path)["logits"] if path else self.memory[table]).to(data.device)
        except (OSError, ValueError, KeyError) as error:
            rotten = isinstance(error, ValueError)  # then it must not win
        x = data.val_x if table == "val" else data.views(torch.arange(len(data)), data.pool(table))
        model = self.load().to(data.device, memory_format=CHANNELS_LAST)
        self.memory[table] = predict(model, data, x, self.precision).half().cpu()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, pack(dict(logits=self.memory.pop(table))), first_wins=not rotten)
        self.seconds += time.time() - begun
        return self.logits(table)


class Teachers(nn.Module):
    """What a student distils from: M banks, their logits v equalised in spread, their weights a
    (attention, HPM-KD's part 3) = softmax over m of w2 ReLU(W1 [v_m; mean_j v_j; e_m]), uniform at
    the start; trained on validation labels, since teachers have memorised the others."""

    def __init__(self, banks: list[Bank], attend: bool, g: torch.Generator):
        super().__init__()
        val = torch.stack([bank.logits("val").float() for bank in banks], 1)  # [N, M, K]
        spread, (_, m, k) = val.std(2).mean(0), val.shape
        self.gain, self.attend = (spread[0] / spread)[:, None], attend and m > 1
        self.val, self.val_y = val * self.gain, banks[0].data.val_y
        self.inner, self.outer = nn.Linear(2 * k + m, HIDDEN), nn.Linear(HIDDEN, 1, bias=False)
        for p in self.inner.parameters():
            p.data = (2 * torch.rand(p.shape, generator=g) - 1) / math.sqrt(2 * k + m)
        nn.init.zeros_(self.outer.weight)
        self.adam = torch.optim.Adam(self.to(val.device).parameters(), ATTENTION_LR)

    def weights(self, v: Tensor) -> Tensor:
        """a [B, M] for equalised logits v [B, M, K]."""
        which = torch.eye(v.shape[1], device=v.device).expand(len(v), -1, -1)
        seen = torch.cat([v, v.mean(1, keepdim=True).expand_as(v), which], 2)
        return self.outer(F.relu(self.inner(seen))).squeeze(2).softmax(1)

    def learn(self, v: Tensor, labels: Tensor) -> None:
        """A step on mean[sum_m a_m CE_m - beta H(a)] in nat: optimum a_m ~ exp(-CE_m / beta)."""
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
    """The probe's choice of (T_max, alpha) (HPM-KD's part 1): lowest temperature-fitted validation
    NLL (nat), mean of two epochs; candidate 0 is left only for over one paired standard error."""
    ce = functools.partial(F.cross_entropy, target=labels, reduction="none")
    scales, worst = [2 ** (k / 10) for k in range(-60, 21)], torch.full((len(labels),), 1e6)
    fits = [[min((ce(v * s) for s in scales), key=Tensor.mean) for v in t["tail"]] for t in trials]
    nll = [sum(f) / 2 if t["status"] == "done" else worst for f, t in zip(fits, trials)]
    gains = [(nll[0] - x).mean().item() for x in nll]
    errors = [((nll[0] - x).std() / len(labels) ** 0.5).item() for x in nll]
    best = max(range(len(trials)), key=gains.__getitem__)
    scores = [[*c, x.mean().item(), g, e] for c, x, g, e in zip(candidates, nll, gains, errors)]
    return dict(choice=list(candidates[best * (gains[best] > errors[best])]), scores=scores)


# ---- 7. store: atomic, checksummed, safe to read from strangers ----
PLAIN = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS""".split()


def plain_only(data: bytes) -> bytes:
    """A pickle of None, bool, int < 2^60, float, str, list, dict, without memo; or ValueError."""
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name not in PLAIN or (opcode.name == "LONG1" and abs(value) >> 60):
            raise ValueError(f"{opcode.name} is more than plain data")
    return data


def pack(value, plain: bool = False) -> bytes:
    """torch's zip, or if `plain` a pickle as `plain_only` has it; then the SHA-256 in hex."""
    pickler = pickle.Pickler(buffer := io.BytesIO(), 4)
    pickler.fast = True
    pickler.dump(value) if plain else torch.save(value, buffer)
    data = plain_only(buffer.getvalue()) if plain else buffer.getvalue()
    return data + sha(data).encode()


def put(path: Path, data: bytes, first_wins: bool = False, before: Path | None = None) -> None:
    """Write all or nothing, onto the disk; a file there stays if `first_wins`, or is `before`."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        with open(part) as file:
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        if not (first_wins and path.exists()):
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, plain: bool = False, seal: str | None = None, then: str = ""):
    """The inverse of `pack`, in linear time, without resolving a global. ValueError for a torn,
    altered or hostile file; or if `then` says what follows, it becomes *.corrupt, and this None."""
    try:
        data, found = (whole := Path(path).read_bytes())[:-64], whole[-64:].decode("latin1")
        if found != sha(data) or found != (seal or found):
            raise ValueError("wrong checksum")
        if plain:
            return pickle.loads(plain_only(data))
        return torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle provokes
        if not then:
            raise error if isinstance(error, OSError) else ValueError(f"{error!s:.80}") from None
        log.warning("%s is unusable (%.80s): %s", path.name, error, then)
        if path.exists():
            os.replace(path, f"{path}.corrupt")


def load_model(path) -> nn.Module:
    """The network of a .pt of this program, ready for inference: float images [B, 3, H, W] in 0…1
    → logits [B, K]; `.classes` names the K labels. UserError for a damaged or foreign file."""
    try:
        saved = read(path)
        with torch.device("meta"):  # a stranger's widths allocate nothing
            network = build_network(**saved["arch"])
        network.load_state_dict(saved["weights"], assign=True)
        scale = torchvision.transforms.Normalize(saved["mean"], saved["std"])
        model = nn.Sequential(scale, network).eval()
        model.classes = saved["classes"]
        return model
    except Exception as error:  # whatever a foreign file provokes
        raise UserError(f"{path} is no sound model of this program ({str(error)[:99]})") from None


class RunDir:  # the files of one run directory; nothing else opens a checkpoint
    def __init__(self, path):
        self.path, self.folder, self.bad = Path(path), Path(path) / "checkpoints", []
        self.states = [self.folder / f"experiment_state{x}.pkl" for x in ("", ".prev")]

    def file(self, job: str, dataset: str) -> Path:
        """Where a finished model is, or will be; names from a strange state lead nowhere else."""
        name = f"teacher_resnet50_{dataset}" if job == "teacher" else job
        return self.folder / (re.sub(r"[^\w.-]", "_", name) + ".pt")

    def read_state(self) -> dict:
        """The newest readable generation; `bad` lists the others. UserError if there is none."""
        self.bad = []
        for file in filter(Path.exists, self.states):
            try:
                if {"key", "task", "cells", "jobs"} <= dict(state := read(file, plain=True)).keys():
                    return state
                raise ValueError("not a state")
            except (OSError, ValueError, TypeError) as error:
                self.bad.append((file, error))
        why = "; ".join(f"{file.name}: {error}" for file, error in self.bad) or "none there"
        raise UserError(f"{self.path} has no readable state ({why}); nothing was touched")

    def write_state(self, state: dict) -> None:
        """Write the state; the generation before it stays as .prev."""
        state["updated"] = time.time()
        put(self.states[0], pack(state, plain=True), before=self.states[1])

    def lock(self) -> None:
        """Become the only writer, or UserError with the holder's PID and host."""
        self.handle = open(file := self.path / ".lock", "a")
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by {file.read_text()}: stop that") from None
        file.write_text(f"PID {os.getpid()} on host {os.uname().nodename}")

    def verify(self, state: dict) -> None:
        """Set rotten files aside, and forget the jobs whose models are missing or rotten."""
        for file, _ in self.bad:
            read(file, plain=True, then="the other generation of the state counts")
        for job, seal in [(job, record["sha256"]) for job, record in state["jobs"].items()]:
            file, then = self.file(job, state["task"]["name"]), f"{job} is restored or made anew"
            if seal and not read(file, seal=seal, then=then):
                del state["jobs"][job]


class Snapshots:  # two generations of a job in training, by a thread; the newest valid one counts
    def __init__(self, run: RunDir, job: str, identity: str = "", interval=None, seconds=20.0):
        self.job, self.identity, self.interval, self.seconds = job, identity, interval, seconds
        self.files = [run.folder / f"snapshot_{job}_{x}.pt" for x in "ab"]  # newest first
        self.thread, self.due = ThreadPoolExecutor(1), time.monotonic() + seconds
        self.pending = self.thread.submit(bool)  # the write under way: nothing as yet

    def load(self) -> dict | None:
        """The newest valid snapshot of exactly this job."""
        then = f"{self.job} goes on from its other snapshot, or anew"
        found = (read(file, then=then) for file in self.files if file.exists())
        return next((x for x in found if x and x.get("identity") == self.identity), None)

    def offer(self, epoch: int, last: bool, content) -> None:
        """Save content() if it is due: every `interval` epochs or `seconds`, and at the end."""
        if last or (epoch % self.interval == 0 if self.interval else time.monotonic() >= self.due):
            data = pack(content() | dict(identity=self.identity, epoch=epoch))
            self.pending.result()  # raises the error of the write before
            self.pending = self.thread.submit(put, self.files[0], data, before=self.files[1])
            self.due = time.monotonic() + self.seconds


# ---- 8. training: one function trains every model, from scratch or from a snapshot ----
@dataclass(frozen=True)
class Setting:  # how one model is trained; T goes from t_high to t_low, and alpha = 0 is Direct
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
    return max((acc, epoch) for epoch, acc in enumerate(history["val_acc"], 1))[1]


def train(model, data, s: Setting, banks=(), precision="fp32", snapshots=None, control=None):
    """Train any model, from scratch or from its snapshot; with banks, distil from them. Record:
    status ("done", or "diverged": loss not finite), val_acc, val_nll, test_acc at best_epoch, and
    last_test_acc (%, nat); time (s), history (a list per metric), best (weights), tail (validation
    logits of two epochs). `control` may raise; called with None per batch, metrics per epoch."""
    device, n, b, steps = data.device, len(data), s.batch_size, max(1, len(data) // s.batch_size)
    model.to(device, memory_format=CHANNELS_LAST)
    sgd = torch.optim.SGD(model.parameters(), s.lr, MOMENTUM, 0, WEIGHT_DECAY, True, fused=True)
    for p in model.parameters():  # else an overflow at the first fp16 step leaves them undefined
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts, control = dict(model=model, sgd=sgd, scaler=scaler), control or (lambda metrics: None)
    if banks:
        teachers = Teachers(banks, bool(s.attend), generator(s.seed, "attention", s.attend))
        parts |= dict(attention=teachers, adam=teachers.adam)
    kept = dict(history=dict(ce=[], val_acc=[]), best={}, tail=[], time=0.0)
    if saved := snapshots and snapshots.load():
        kept = {name: saved[name] for name in kept}
        for name in filter(saved.get, parts):  # the scaler's is empty after another precision
            parts[name].load_state_dict(saved[name])
    history, ce, group, status = kept["history"], kept["history"]["ce"], sgd.param_groups[0], "done"
    tables = torch.randperm(s.epochs, generator=generator(s.seed, "tables", s.order)).tolist()
    for epoch in range(len(ce), s.epochs):
        if s.patience and epoch and epoch - best_epoch(history) >= s.patience:
            break
        g, h, k = (generator(s.seed, x, epoch) for x in (s.order, f"views {s.order}", s.attend))
        order, table = torch.randperm(n, generator=g)[: steps * b].to(device), tables[epoch]
        view = torch.randint(data.n_views, (n,), generator=h) if s.fresh else data.pool(table)
        v = torch.stack([bank.logits(table) for bank in banks], 1)[order] if banks else None
        judged = torch.randint(len(data.val_y), (steps, b), generator=k).to(device)
        T, strategy = temperature(ce, s.epochs, s.t_high, s.t_low, len(data.raw["classes"]))
        begun, sums = time.perf_counter(), torch.zeros(3, device=device)
        x, y = data.views(order, view.to(device)[order]), data.train_y[order]
        model.train()
        for i in range(steps):
            control(None)
            part = slice(i * b, (i + 1) * b)
            with autocast(device, precision):
                logits = model(data.pixels(x[part])).float()
            target = teachers.target(v[part], T) if banks else None
            loss, hard = kd_loss(logits, y[part], target, T, s.alpha)
            sgd.zero_grad()
            scaler.scale(loss).backward()
            group["lr"] = learning_rate(epoch * steps + i, s.epochs * steps, s.lr)
            scaler.step(sgd)
            scaler.update()
            if banks and teachers.attend:
                teachers.learn(teachers.val[judged[i]], data.val_y[judged[i]])
            hits = 100 * (logits.argmax(1) == y[part]).float().mean()
            sums += torch.stack([loss, hard, hits]).detach()
        val = predict(model, data, data.val_x, precision)
        row = dict(zip(("loss", "ce", "train_acc"), (sums / steps).tolist()), lr=group["lr"], T=T)
        row |= dict(val_acc=top1(val, data.val_y), val_nll=F.cross_entropy(val, data.val_y).item())
        kept["time"] += time.perf_counter() - begun
        for name, value in (row := row | dict(strategy=strategy, seconds=kept["time"])).items():
            history.setdefault(name, []).append(value)
        kept["tail"] = [*kept["tail"], val.cpu()][-2:]
        if not math.isfinite(row["loss"] + row["val_nll"]):
            status = "diverged"
            break
        if best_epoch(history) == epoch + 1:
            kept["best"] = {name: t.clone() for name, t in model.state_dict().items()}
        if snapshots:
            content = functools.partial(dict, kept, **{k: p.state_dict() for k, p in parts.items()})
            snapshots.offer(epoch + 1, epoch + 1 == s.epochs, content)
        control(row)
    if snapshots:
        snapshots.pending.result()
    record = kept | dict(status=status, best_epoch=best_epoch(history), epochs=len(ce))
    record |= dict(mixture=teachers.diagnose() if banks else {})
    if status == "diverged":
        return record | dict.fromkeys(("val_acc", "val_nll", "test_acc", "last_test_acc"))
    for name, weights in dict(last_test_acc=model.state_dict(), test_acc=kept["best"]).items():
        model.load_state_dict(weights)
        record[name] = top1(predict(model, data, data.test_x, precision), data.test_y)
    return record | {m: history[m][record["best_epoch"] - 1] for m in ("val_acc", "val_nll")}


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
        needs, student = ("teacher",) * (method != "Direct"), Job("", "student", ratio, method)
        probe, sizes = ("probe",) * student.has("config"), chain(ratio) * student.has("chain")
        jobs |= {name: Job(name, name) for name in needs}
        jobs |= {name: Job(name, name, PROBE_RATIO, needs=needs) for name in probe}
        for i, size in enumerate(sizes, 1):
            needs += (f"assistant_{ratio:g}x_{i}",)
            jobs[needs[-1]] = Job(needs[-1], "assistant", size, needs=needs[-2:-1])
        for run in range(1, runs + 1):
            name = f"student_{ratio:g}x_{method}_run{run}"
            jobs[name] = replace(student, name=name, run=run, needs=needs + probe)
    return jobs


def setting_of(job: Job, key: dict, t_max: float = 4.0, alpha: float = 0.5) -> Setting:
    """How a job is trained; (t_max, alpha) is the probe's choice or one of its candidates."""
    fixed = dict(teacher=(KD[0], 0.0), Direct=(KD[0], 0.0), TraditionalKD=KD, assistant=ASSISTANT)
    t_max, alpha = fixed.get(job.method or job.kind, (t_max, alpha))
    falls = job.kind == "probe" or job.has("temperature")
    high, low = (1, 0.5) if falls else (0.75, 0.75) if job.method.startswith("HPM-KD") else (1, 1)
    brief = 2 if key["mode"] == "smoke" else max(5, key["student_epochs"] // 5)
    epochs = dict(teacher=key["teacher_epochs"], probe=brief).get(job.kind, key["student_epochs"])
    more = {k: key[k] for k in ("batch_size", "lr", "seed", "patience")}
    more |= dict(order=f"run{job.run}" if job.run else job.name, fresh=job.kind == "teacher")
    more |= dict(attend=f"{job.ratio:g}x run{job.run}" * job.has("attention"), alpha=alpha)
    return Setting(epochs, t_high=high * t_max, t_low=low * t_max, **more)


# The dataset on a device, loaded once per process.
data_on = functools.lru_cache(1)(lambda dev, where, how: Data(load_dataset(*where), *how, dev))


def run_job(spec: dict) -> dict:
    """Train one job in this process and write its files; returns its record for the state."""
    job, key, needs, device, precision = map(spec.get, "job key needs device precision".split())
    data = data_on(device, spec["data"], tuple(key[k] for k in ("seed", "subset", "limit")))
    run, plan, k = RunDir(spec["run"]), sorted(key.items()), len(data.raw["classes"])
    params, macs = measure(job.ratio, k, key["width"], data.train_x.shape[1])
    file, banks, trials = functools.partial(run.file, dataset=data.raw["name"]), {}, []
    teachers = {name: record["weights"] for name, record in needs.items() if name != "probe"}
    choices = [needs["probe"]["choice"]] if "probe" in needs else CANDIDATES
    choices = choices[: 1 if job.kind != "probe" else 2 if key["mode"] == "smoke" else None]

    def control(metrics):
        spec["board"][spec["worker"]] += macs * (metrics is not None)
        if spec["board"][0]:
            raise Stopped

    for name, weights in teachers.items():
        cache = spec["data"][2] / f"banks_{sha(plan)[:16]}" / sha((weights, precision, device[:4]))
        banks[name] = Bank(data, lambda n=name: load_model(file(n))[1], cache, precision)
    for i, choice in enumerate(choices, 1):
        purpose = (job.ratio, job.run) if job.run else (job.name,)
        torch.manual_seed(generator(key["seed"], "init", *purpose).initial_seed())
        model = build_teacher(k, key["width"])
        model = build_student(job.ratio, count_parameters(model), k) if job.ratio != 1 else model
        how = setting_of(job, key, *choice), [*banks.values()], precision
        name, identity = job.name + f"_{i}" * (i > 1), sha((plan, job, choice, teachers))
        snapshots = Snapshots(run, name, identity, *spec["snapshots"])
        trials.append(train(model, data, *how, snapshots, control))
    record = vars(job) | trials[0] | dict(needs=[*needs], choice=list(choice), finished=time.time())
    record |= dict(params=params, macs=macs, device=device, precision=precision, sha256="")
    record |= dict(weights="", threads=torch.get_num_threads(), torch=str(torch.__version__))
    record |= dict(banks={name: bank.seconds for name, bank in banks.items()})
    if job.kind == "probe":
        record |= dict(dict.fromkeys(trials[0]), status="done", history={}, mixture={})
        record |= {k: sum(trial[k] for trial in trials) for k in ("time", "epochs")}
        record |= choose(trials, choices, data.val_y.cpu())
    elif record["status"] == "done":
        weights = {k: v.cpu().contiguous() for k, v in record["best"].items()}
        about = dict(arch=model.arch, classes=data.raw["classes"], mean=data.mean, std=data.std)
        put(file(job.name), sealed := pack(about | dict(weights=weights)))
        weights = sha({k: sha(v.numpy().tobytes()) for k, v in weights.items()})
        record |= dict(sha256=sealed[-64:].decode(), weights=weights)
    return {k: v for k, v in record.items() if k not in ("best", "tail")}


def set_up_log(file: Path | None = None) -> None:
    """Log lines to standard output, and to the run's log file."""
    to = [logging.StreamHandler(sys.stdout), *([logging.FileHandler(file)] if file else [])]
    logging.basicConfig(handlers=to, force=True, format="%(asctime)s %(message)s", datefmt="%X")
    logging.raiseExceptions = False
    log.setLevel(logging.INFO)


def start_worker(log_file: Path, threads: int, deterministic: bool) -> None:
    """Set up a worker process: it heeds only its parent, and dies with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ended = mp.parent_process().join  # returns None when the parent has ended
    threading.Thread(target=lambda: os._exit(ended() or 1), daemon=True).start()
    set_up_log(log_file)
    torch.set_num_threads(threads)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS refuses to be exact
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)


def run_jobs(run, state, jobs, devices, spec, halt, bar=False, deterministic=False) -> list[str]:
    """Train the unfinished jobs until halt(), longest first; a line for each that failed."""
    from tqdm import tqdm

    done, banks, key, task = (state[k] for k in ("jobs", "banks", "key", "task"))
    busy, pools, failed, tried, news = {}, [None for _ in devices], [], [], []
    size, spawn = (task["classes"], key["width"], task["side"]), mp.get_context("spawn")
    setup = spawn, start_worker, (run.path / "experiment.log", state["threads"], deterministic)
    board = torch.zeros(1 + len(devices), dtype=torch.int64).share_memory_()  # stop flag, MACs done
    costs = {n: measure(j.ratio, *size)[1] * setting_of(j, key).epochs for n, j in jobs.items()}
    costs |= {n: len(CANDIDATES) * costs[n] for n in jobs if n == "probe"}
    waiting = {n: jobs[n] for n in sorted(jobs, key=costs.get, reverse=True) if n not in done}
    total, left = (sum(map(costs.get, names)) for names in (jobs, waiting))
    lines = SimpleNamespace(write=lambda text: text.strip() and log.info(text.strip()))
    style = {} if bar else dict(file=lines, mininterval=60, delay=1)  # tqdm writes the log lines
    style["bar_format"] = "{desc}, {percentage:.0f} %, ETA {remaining}" + " |{bar:20}|" * bar
    fates = "{choice}", "validation {val_acc:.2f} %, test {test_acc:.2f} %"
    meter = tqdm(total=total, initial=total - left, smoothing=0, miniters=0, leave=False, **style)
    try:
        while True:
            board[0] = stop = bool(halt())
            sound = {name for name, record in done.items() if record["status"] == "done"}
            ready = [n for n, j in waiting.items() if sound.issuperset(j.needs) and not stop]
            for i, name in zip({*range(len(pools))} - {i for i, _ in busy.values()}, ready):
                job, needs = waiting.pop(name), {n: done[n] for n in jobs[name].needs}
                more = dict(job=job, needs=needs, device=devices[i], worker=1 + i, board=board)
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a new process inherits it
                pools[i] = pools[i] or ProcessPoolExecutor(1, *setup)
                try:
                    busy[pools[i].submit(run_job, spec | more)] = i, job
                except BrokenExecutor:  # it died while idle
                    pools[i], waiting[name] = None, job
                signal.signal(signal.SIGINT, handler)
            ended, names = [n for n in jobs if n in done], [job.name for _, job in busy.values()]
            meter.desc = f"{len(ended)} of {len(jobs)} models, now {' '.join(names) or 'idle'}"
            meter.update(sum(map(costs.get, ended)) + board[1:].sum().item() - meter.n)
            while news:
                meter.clear()
                log.info("%s; %s", news.pop(0), meter)
            if not busy and not ready:
                break
            for future in wait(busy, 0.2, "FIRST_COMPLETED").done:
                (i, job), error = busy.pop(future), future.exception()
                board[1 + i] = 0
                if error:  # its own, or the death of its process: a fresh one tries once more
                    again, cause = stop or job.name not in tried, f"{job.name}: {error!r}"[:300]
                    (news if again else failed).append(cause + ", to be resumed" * again)
                    waiting = {job.name: job} | waiting if again else waiting
                    pools[i], tried = pools[i] if stop else None, [*tried, job.name]
                    continue
                done[job.name] = record = future.result()
                record["teacher"] = done["teacher"]["weights"] if job.needs else ""
                banks |= {n: banks.get(n, 0.0) + x for n, x in record["banks"].items()}
                run.write_state(state)
                for file in run.folder.glob(f"snapshot_{job.name}_*"):
                    if job.kind in ("student", "probe"):  # the others keep theirs as a second copy
                        file.unlink()
                failed += [f"{job.name}: loss not finite"] * (record["status"] == "diverged")
                text = f"{{name}}: {fates[record['test_acc'] is not None]}, {{time:.0f}} s"
                news.append(text.format(**record))
    finally:
        board[0] = True
        meter.close()
        for pool in filter(None, pools):
            pool.shutdown()
    failed += [f"{n}: needs a model that failed" for n in waiting if not stop]
    for line in failed:
        log.error("failed: %s", line)
    return failed


# ---- 10. results: one tidy table, statistics, CSV, figures, report ----
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # n = 2 to 11
COLOURS = "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #999999".split()  # Okabe, Ito
STYLE = {"font.size": 7, "axes.grid": True, "grid.alpha": 0.4, "pdf.fonttype": 42}
RUN_COLUMNS = """job kind compression ratio measured_ratio method run seed params macs val_acc
test_acc last_test_acc best_epoch epochs time teacher""".split()
CELL_COLUMNS = """compression ratio measured_ratio method teacher teacher_acc student_acc_mean
student_acc_std retention delta_vs_direct delta_ci95_low delta_ci95_high params macs time_mean
time_std n_runs""".split()
METHOD = """A ResNet-50 teaches slim ResNet-18s: loss (1 - alpha) CE + alpha T^2 KL; TraditionalKD
(arXiv 1503.02531): T 4, alpha 0.5; HPM-KD: arXiv 2512.09886. SGD, Nesterov 0.9, weight decay 5e-4,
5 % warm-up, cosine to zero; best epoch by validation; the test set is read once per model. Run k of
all methods has the same first weights, batches, views. Intervals: Student-t, 95 %, over runs, with
this one teacher and its assistants. Void: headroom (teacher - Direct, validation) is not positive.
If the learned mixture does not beat the teacher, chain and attention cannot help; without chain,
attention has one teacher. time_mean: own seconds + share of assistants, probe, bank forwards."""


def interval(values) -> tuple[float, float, float]:
    """Mean and Student-t 95 % interval of a sample; NaN where it is too small."""
    values = [float(v) for v in values]
    n, mean = len(values), sum(values) / len(values) if values else math.nan
    t = T975[n - 2] if n <= 11 else 1.96 + 2.4 / (n - 1.9)
    half = t * math.dist(values, [mean] * n) / math.sqrt(n * (n - 1)) if n > 1 else math.nan
    return mean, mean - half, mean + half


def tidy(state: dict, jobs: dict[str, Job]):
    """results_runs.csv: a data frame with one row per trained model and per bank."""
    import pandas as pd

    done, task, key = state["jobs"], state["task"], state["key"]
    teacher, _ = measure(1, task["classes"], key["width"], task["side"])
    rows = [done[n] | dict(job=n, teacher=done[n]["teacher"][:12]) for n in jobs if n in done]
    rows += [dict(job=f"bank_{n}", kind="bank", time=x) for n, x in state["banks"].items()]
    table = pd.DataFrame(rows, columns=RUN_COLUMNS).assign(seed=key["seed"])
    table["measured_ratio"] = teacher / table.params
    table["compression"] = [f"{r:g}x" if r == r else None for r in table.ratio]
    types = dict.fromkeys("ratio val_acc test_acc last_test_acc time".split(), float)
    return table.astype(types | dict.fromkeys("run params macs best_epoch epochs".split(), "Int64"))


def differences(table, a: str | None, b: str, ratio: float | None, column: str = "test_acc"):
    """Rows of method a with `diff` = a - b in points, b of the same ratio, run and teacher (Direct
    has none). ratio None: all; a None: all students, whether they have a partner or not."""
    runs = table[(table.kind == "student") & table[column].notna()]
    base = runs[runs.method == b][["ratio", "run", "teacher", column]]
    runs = runs[((runs.method == a) | (a is None)) & ((runs.ratio == ratio) | (ratio is None))]
    runs = runs.merge(base, "left" if a is None else "inner", ["ratio", "run"], suffixes=("", "_b"))
    runs = runs[(runs.teacher == runs.teacher_b) | (b == "Direct")]
    return runs.assign(diff=runs[column] - runs[f"{column}_b"])


def summarise(state: dict, jobs: dict[str, Job], table):
    """results.csv: one row per (ratio, method), and per teacher where there are several."""
    top = state["jobs"].get("teacher", dict(weights="", test_acc=math.nan))
    spent = table[table.kind != "teacher"].groupby(table.job.str.removeprefix("bank_")).time.sum()
    runs = differences(table, None, "Direct", None)
    users = {n: sum(n in jobs[s].needs for s in runs.job) for n in jobs}
    runs["time"] += [sum(spent.get(x, 0.0) / users[x] for x in jobs[s].needs) for s in runs.job]
    runs["top"] = runs.teacher.map(dict.fromkeys(("", top["weights"][:12]), top["test_acc"]))
    runs["kept"] = 100 * runs.test_acc / runs.top
    runs["gain"] = runs["diff"].where(runs.teacher > "")  # Direct has none
    ends = [lambda v, i=i: interval(v.dropna())[i] for i in range(3)]
    how = dict(top="first", test_acc=["mean", "std"], kept="mean", gain=ends, params="first")
    how |= dict(macs="first", time=["mean", "std"], run="size")  # in the order of CELL_COLUMNS
    cells = runs.groupby(CELL_COLUMNS[:5], sort=False).agg(how)
    return cells.set_axis(CELL_COLUMNS[5:], axis=1).reset_index()


def headroom(table, ratio: float) -> float:
    """Teacher - Direct in points of validation accuracy: where it is not positive, KD is void."""
    direct = table[(table.ratio == ratio) & (table.method == "Direct")].val_acc.mean()
    return table[table.kind == "teacher"].val_acc.mean() - direct


def verdict(table, column: str = "test_acc") -> tuple[str, float]:
    """(sentence, mean) of D_k = mean over the ratios >= 5 of HPM-KD - Direct in run k, points."""
    ratios = sorted({r for r in table[table.method == "HPM-KD"].ratio if r >= 5})
    pairs = differences(table[table.ratio >= 5], "HPM-KD", "Direct", None, column)
    runs = pairs.groupby(["teacher", "run"])["diff"].agg(["mean", "size"])
    whole = runs[runs["size"] == len(ratios)]["mean"].groupby("teacher").agg(list)
    values = max(whole, key=len, default=[])  # of one teacher only
    (mean, low, high), at = interval(values), ", ".join(f"{r:g}x" for r in ratios) or "5x or more"
    if void := ", ".join(f"{r:g}x" for r in ratios if headroom(table, r) <= 0):
        return f"void: the teacher does not exceed its student at {void}", mean
    if len(values) < 2:
        return f"no verdict at {at}: two complete pairs of HPM-KD and Direct are needed", mean
    word = "supported" if low > 0 else "not supported" if high < 0 else "inconclusive"
    text = f"HPM-KD - Direct = {mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    return f"{word} at {at}: {text} (half-width {mean - low:.2f}, n = {len(values)} runs)", mean


def draw_figures(folder: Path, state: dict, table, cells) -> None:
    """Every figure as PNG (300 DPI) and PDF, as wide as a column of text (3.3 inch)."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot no backend can go wrong

    matplotlib.rcParams.update(STYLE)
    folder.mkdir(exist_ok=True)
    runs = differences(table, None, "Direct", None).merge(cells)
    ratios, methods = sorted(set(runs.ratio)), [*dict.fromkeys([*METHODS, *runs.method])]
    ink, mark = (dict(zip(methods, itertools.cycle(x))) for x in (COLOURS, "os^Dv<>"))
    best, top = table[table.kind == "teacher"][["val_acc", "test_acc"]].mean()
    at, side = runs.ratio.map(ratios.index), (runs.method.map(methods.index) + 0.5) / len(methods)
    runs["kept"], runs["beside"] = 100 * runs.test_acc / top, at + 0.7 * (side - 0.5)
    e = state["key"]["student_epochs"]
    runs["epoch"] = [[k + 0.9 * ((i + 0.5) / e - 0.5) for i in range(e + 1)] for k in at]
    past = [state["jobs"][n]["history"]["val_acc"] for n in runs.job]
    runs["past"] = [(p + [None] * e)[: e + 1] for p in past]  # None ends the line at this ratio
    curves = runs.explode(["past", "epoch"]).astype(dict(past=float, epoch=float))
    size, each = "teacher / student parameters", f"{e} epochs at each ratio"
    ticks = dict(xticks=range(len(ratios)), xticklabels=[f"{r:g}x" for r in ratios])
    for name, frame, x, y, xlabel, line, ylabel in (
        ("accuracy_vs_compression", runs, "beside", "test_acc", size, top, "test accuracy (%)"),
        ("hpmkd_vs_direct", runs, "beside", "diff", size, 0, "gain over Direct (points)"),
        ("retention_analysis", runs, "beside", "kept", size, 100, "% of the teacher's accuracy"),
        ("learning_curves", curves, "epoch", "past", each, best, "validation accuracy (%)"),
        ("cost", runs, "time_mean", "test_acc", "seconds per student", top, "test accuracy (%)"),
    ):
        if frame[y].isna().all():
            continue
        bars, columns = y != "past", 1 if len(max(methods, key=len)) > 22 else 2
        figure = Figure((3.3, 2.3 + 0.16 * len(methods) / columns), layout="constrained")
        ax, dots = figure.subplots(), dict(color=frame.method.map(ink), s=6 if bars else 2)
        ax.axhline(line, color="grey", lw=1, ls="--", label=None if y == "diff" else "teacher")
        ax.scatter(frame[x], frame[y], alpha=0.5, lw=0, zorder=3 if bars else 1, **dots)
        ax.set(xlabel=xlabel, ylabel=ylabel, ymargin=0.2, **ticks if x != "time_mean" else {})
        ax.set_ylim(ax.get_ylim())  # the intervals of two runs would flatten everything
        for m, part in frame.groupby("method", sort=False):
            spots, style = part.groupby(x)[y], dict(color=ink[m], label=m, lw=1, ms=4, capsize=2)
            half = spots.agg(lambda v: v.mean() - interval(v)[1]) if bars else None
            ax.errorbar(spots.mean().index, spots.mean(), half, marker=mark[m] * bars, **style)
        title = "dots: runs" + ", bars: 95 % intervals, cut at the frame" * bars
        figure.legend(loc="outside upper center", ncols=columns, title=title)
        for kind in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{kind}", dpi=300)


def write_results(run: RunDir, state: dict, jobs: dict[str, Job], partial: str) -> str:
    """Write tables, figures and the report of what is finished; returns the verdict."""
    import pandas as pd

    table, key, task, folder = tidy(state, jobs), state["key"], state["task"], run.path / "figures"
    done = {n: state["jobs"][n] for n in jobs if n in state["jobs"]}
    cells = summarise(state, jobs, table)
    (sentence, mean), last, mixes = verdict(table), verdict(table, "last_test_acc")[1], []
    content = dict(configuration=key, task=task, completed=not partial, verdict=sentence)
    content = json.dumps(content | dict(models=done, sessions=state["sessions"]), indent=1)
    put(run.path / "results.json", re.sub(r" -?(NaN|Infinity)\b", " null", content).encode())
    for name, frame in (("results_runs", table), ("results", cells)):
        put(run.path / f"{name}.csv", frame.to_csv(index=False, float_format="%.10g").encode())
    draw_figures(folder, state, table, cells)
    lost = [n for n in done if done[n]["status"] == "diverged"]
    say = [f"# When does distillation help? Experiment 1B on {task['name']}"]
    say += [f"**Verdict: {sentence}.**", f"**Partial results: {partial}.**" * bool(partial)]
    say += [f"{len(lost)} diverged, and are in no mean or pair: {', '.join(lost)}." * bool(lost)]
    caution = f"Caution: {mean:+.2f} points at the best epoch, but {last:+.2f} at the last one."
    say += [caution * (mean * last < 0)]
    say += [f"![{p.stem}](figures/{p.name})" for p in sorted(folder.glob("*.png"))]
    pairs = [
        (f"{r:g}x", f"{m} - {b}", *interval(d), len(d), h, "void" if h <= 0 else "")
        for r, m in dict.fromkeys(zip(cells.ratio, cells.method))
        for b in METHODS[: [*METHODS, m].index(m)]
        for d, h in [(differences(table, m, b, r)["diff"], headroom(table, r))]
    ]
    for n, mix in [(n, x["mixture"]) for n, x in done.items() if jobs[n].run == 1]:
        if len(a := mix.get("weights", ())) > 1:
            sources = *jobs[n].needs[: len(a)], "uniform mixture", "learned mixture"
            mixes += zip([n] * 99, sources, mix["val_acc"], mix["val_nll"], [*a, None, None])
    probe = done.get("probe", dict(scores=[], choice=None))
    scores = [(*(f"{x:.4g}" for x in v), v[:2] == probe["choice"]) for v in probe["scores"]]
    others, costs = table[table.kind != "student"], cells.filter(regex="^(?!ratio|delta)")
    taught = table[table.kind == "teacher"].time.sum() * (cells.teacher > "")
    costs = costs.assign(time_with_teacher=cells.time_mean + taught)
    for title, rows, columns in (
        ("Accuracy (%) and cost (s)", costs, None),
        ("Paired differences (points)", pairs, "ratio pair mean low high runs headroom gate"),
        ("Other models, banks", others, "job measured_ratio params macs val_acc test_acc time"),
        ("Probe (tuned at 5x, NLL in nat)", scores, "T_max alpha NLL gain standard_error chosen"),
        ("What HPM-KD distilled from", mixes, "student source val_acc val_nll mean_weight"),
        ("Provenance", [(k, str(v)) for k, v in (key | task).items()], "what value"),
        ("Sessions", state["sessions"], None),
    ):
        frame = pd.DataFrame(rows, columns=columns and columns.split())
        text = frame.to_csv(None, sep="|", na_rep="–", float_format="%.2f", index=False).rstrip()
        text = text.replace("\n", f"\n{'|'.join(['---'] * frame.shape[1])}\n", 1)
        say += [f"## {title}", re.sub("(?m)^.+", r"|\g<0>|", text)] if len(frame) else []
    report = "\n\n".join([*filter(None, say), "## Method", METHOD, ""])
    put(run.path / "experiment_report.md", report.encode())
    return sentence


# ---- 11. command line ----
def check(holds, message: str) -> None:
    """What the user has to mend ends the program, with one line."""
    if not holds:
        raise UserError(message)


def parse(argv=None) -> Flags:
    """The flags, each checked by itself; UserError in one line for what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error, switch = functools.partial(check, False), dict(action="store_true")
    types = dict(dataset=lambda d: d if d in DATASETS else os.path.abspath(d), int=int, float=float)
    for title, members in itertools.groupby(fields(Flags), lambda f: f.metadata["group"]):
        group = parser.add_argument_group(title)
        for f in members:
            kind = dict(type=types.get(f.name) or types.get(f.type)) if f.type != "bool" else switch
            more = {k: v for k, v in f.metadata.items() if k not in ("group", "low")} | kind
            group.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **more)
    flags = Flags(**vars(parser.parse_args(argv)))
    for f in fields(Flags):
        value, low, name = getattr(flags, f.name), f.metadata["low"], f.name.replace("_", "-")
        check(None in (value, low) or low <= value <= 1e9, f"--{name} {value}: from {low} to 1e9")
    return flags


def find_runs(places) -> list[tuple[RunDir, dict]]:
    """Every run directory below `places` with a readable state, the newest first."""
    found = []
    for folder in {p.parents[1].resolve(): p for p in search(places, "experiment_state*.pkl")}:
        try:
            found.append((RunDir(folder), RunDir(folder).read_state()))
        except UserError as error:
            log.warning(error)
    return sorted(found, key=lambda x: -x[1]["updated"])


def session(flags: Flags) -> int:
    """One session on one run directory, new or resumed; returns the exit code."""
    here, end, signals, failed, run = detect_platform(), time.time(), [], [], None
    set_up_log()
    asked = Path(flags.resume or flags.output or here.output).absolute()
    held = any(map(Path.exists, RunDir(asked).states))  # then it is the run directory
    found = find_runs(places := [asked] if held else [asked, *here.inputs])
    if flags.status:
        for run, s in found:
            jobs, done, name = plan_jobs(s["cells"]), s["jobs"], s["task"]["name"][:16]
            best = max([r["test_acc"] or 0 for r in done.values() if r["kind"] == "student"] + [0])
            size = sum(f.stat().st_size for f in run.path.rglob("*") if f.is_file()) >> 20
            count = f"{len(jobs.keys() & done)} of {len(jobs)} models, best {best:.2f} %, {size} MB"
            print(f"{s['key']['mode']} {name}: {count}, {time.ctime(s['updated'])}")
            print(f"  --resume {run.path}")
        return 0
    key = dict(mode="quick") | MODES[flags.mode or "quick"] | dict(seed=0, patience=0, lr=0)
    cells = dict.fromkeys((f"{r} {m}" for r in RATIOS for m in METHODS), key.pop("runs"))
    given = {k: v for k, v in vars(flags).items() if k in key and v is not None}
    key |= dict(recipe=VERSION) | given
    key["lr"] = key["lr"] or LR_PER_128 * key["batch_size"] / 128
    state = dict(key=key, cells={}, jobs={}, banks={}, sessions=[])
    if flags.resume is not None or flags.report:
        check(found, f"nothing to resume: no run directory in {', '.join(map(str, places))}")
        run, state = min(found, key=lambda x: len(given.items() - x[1]["key"].items()))
        odd = [f"{k} {state['key'][k]}" for k, v in given.items() if state["key"][k] != v]
        check(not odd, f"no run fits; the nearest, {run.path}, has {', '.join(odd)}")
    check(run or not held, f"{asked} holds a run: add --resume, or name another --output")
    ratios = RATIOS if "all" in (flags.compression or ()) else flags.compression
    cells, own = {}, state["cells"] or cells
    for (ratio, method), runs in zip(map(str.split, own), own.values()):
        for pair in itertools.product(ratios or [ratio], flags.methods or [method]):
            cells["{:g}x {}".format(*parse_cell(*pair))] = flags.runs or runs
    if run:
        check(os.access(run.path, os.W_OK), f"{run.path} is read-only: copy it to {here.output}")
        run.lock()
        state = run.read_state()
        run.verify(state)
    key, scratch = state["key"], here.scratch or (run.path.parent if run else asked) / "data"
    state["cells"] |= {c: max(n, state["cells"].get(c, 0)) for c, n in cells.items()}
    jobs, everything = plan_jobs(cells), plan_jobs(state["cells"])
    left = jobs.keys() - state["jobs"]
    if left and not flags.report:
        check(key["recipe"] == VERSION, f"recipe {key['recipe']}, script {VERSION}: only --report")
        devices = usable_devices(flags.device, key["mode"], flags.workers)
        major = 0 if devices[0] == "cpu" else torch.cuda.get_device_capability(devices[0])[0]
        auto = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"  # what has tensor cores
        precision = auto if flags.precision == "auto" else flags.precision
        check(precision in ("fp32", "bf16", "fp16"), f"--precision {precision}: fp32, bf16 or fp16")
        check(os.path.isdir(flags.data_dir or "."), f"--data-dir {flags.data_dir}: no such folder")
        source = key["dataset"], tuple(filter(None, (flags.data_dir, *here.inputs))), scratch
        new = [p for p in (scratch, *scratch.parents) if not p.exists()]
        try:
            raw = load_dataset(*source)
            same = key.setdefault("fingerprint", raw["fingerprint"]) == raw["fingerprint"]
            check(same, f"{raw['note']}: not the images that the run began with; see --data-dir")
            data = Data(raw, key["seed"], key["subset"], key["limit"])
            task = dict(name=raw["name"], classes=len(raw["classes"]), side=data.train_x.shape[1])
            for job in jobs.values():  # no ratio may turn out impossible later
                measure(job.ratio, task["classes"], key["width"], task["side"])
        except (UserError, OSError):
            for folder in (p for p in new if p == scratch or not any(p.glob("*"))):
                shutil.rmtree(folder, ignore_errors=True)  # unless others have begun there
            raise
        task |= dict(train=len(data), val=len(data.val_y), test=len(data.test_y))
        state["task"] = task | dict(source=raw["note"])
        if not run:
            for twin, s in found:
                if s["key"] == key and plan_jobs(s["cells"] | cells).keys() - s["jobs"]:
                    log.warning(f"NOTE: the same experiment is unfinished: --resume {twin.path}")
            name = f"exp1b_{key['mode']}_%Y%m%d_%H%M%S"
            while (run := RunDir(asked / time.strftime(name))).path.exists():
                time.sleep(0.1)
            run.folder.mkdir(parents=True)
            run.lock()
            state["threads"] = max(1, torch.get_num_threads() // len(devices))
        set_up_log(run.path / "experiment.log")  # a later error is no bad input: see main
        about = dict(host=os.uname().nodename, platform=here.name, devices=", ".join(devices))
        about |= dict(precision=precision, threads=state["threads"], torch=str(torch.__version__))
        about |= dict(script=sha(Path(__file__).read_bytes())[:12])
        if odd := {k for s in state["sessions"] for k, _ in about.items() - s.items()}:
            log.warning(f"not as in the sessions before: {', '.join(sorted(odd))}")
        state["sessions"].append(dict(started=time.strftime("%Y-%m-%d %H:%M:%S")) | about)
        run.write_state(state)
        log.info(f"{len(left)} models to train on {', '.join(devices)} in {precision}: {run.path}")
        log.info("%(source)s: %(train)d training, %(val)d validation, %(test)d test", state["task"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.append(number))
        if here.name != "local":  # the time limit is the container's
            ticks = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
            end += ticks / os.sysconf("SC_CLK_TCK") - time.clock_gettime(time.CLOCK_BOOTTIME)
        end += 3600 * next(h for h in (flags.max_hours, here.hours, math.inf) if h is not None)
        pace = flags.checkpoint_interval, 900.0 if here.drive else 20.0
        spec = dict(key=key, run=run.path, data=source, precision=precision, snapshots=pace)
        bar, halt = sys.stdout.isatty() and not here.notebook, lambda: signals or time.time() > end
        failed = run_jobs(run, state, jobs, devices, spec, halt, bar, flags.deterministic)
    undone = len(everything.keys() - state["jobs"])
    partial = f"{undone} of {len(everything)} models are not trained" if undone else ""
    log.info(f"verdict: {write_results(run, state, everything, partial)}")
    log.info(f"report: {run.path}/experiment_report.md")
    if undone:
        log.info(f"to continue: python {__file__} --resume {run.path}")
    else:
        shutil.rmtree(scratch / f"banks_{sha(sorted(key.items()))[:16]}", ignore_errors=True)
    return 128 + signals[0] if signals else 1 if failed else 0


def main(argv=None) -> int:
    """The command line: 0 done or out of budget, 1 training failed, 2 bad input, 128 + signal."""
    try:
        return session(parse(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) or len(log.handlers) < 2 else 1


if __name__ == "__main__":
    sys.exit(main())
