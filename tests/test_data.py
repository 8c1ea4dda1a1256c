"""Section 4: any dataset becomes uint8 tensors; splits, pool and views."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from conftest import tiny_data
from PIL import Image

import run_exp1b_kaggle as exp

FIRST = {"MNIST": [5, 0, 4, 1, 9, 2], "FashionMNIST": [9, 0, 0, 3, 0, 2]}


def noise(*size):
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def write_idx(folder, first, gz, n=20):
    """The four files of an MNIST look-alike; returns (images, labels) of its training part."""
    folder.mkdir(parents=True)
    images = noise(n, 28, 28)
    labels = np.array([*first, *range(10)] * n, np.uint8)[:n]
    for part in ("train", "t10k"):
        x = struct.pack(">4i", 2051, n, 28, 28) + images.tobytes()
        y = struct.pack(">2i", 2049, n) + labels.tobytes()
        for name, content in (("images-idx3", x), ("labels-idx1", y)):
            path = folder / f"{part}-{name}-ubyte{'.gz' * gz}"
            path.write_bytes(gzip.compress(content) if gz else content)
    return images, labels


@pytest.fixture
def offline(monkeypatch):
    """No network, whatever the machine."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("gz", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_idx_files_are_found_and_read(tmp_path, offline, name, gz):
    images, labels = write_idx(tmp_path / "in/some/where", FIRST[name], gz)
    raw = exp.load_dataset(name, [tmp_path / "in"], tmp_path / "scratch")
    assert raw["train_x"].shape == (20, 32, 32, 3) and raw["train_x"].dtype == torch.uint8
    for channel in range(3):  # grey in the middle, a black border of 2
        assert (raw["train_x"][:, 2:30, 2:30, channel].numpy() == images).all()
    assert raw["train_x"].sum() == 3 * images.astype(int).sum()
    assert raw["train_y"].tolist() == labels.tolist() and len(raw["classes"]) == 10
    assert exp.Data(raw).n_views == (81 if name == "MNIST" else 162)


def test_the_two_mnists_are_told_apart(tmp_path, offline):
    write_idx(tmp_path / "in/a", FIRST["FashionMNIST"], True)
    with pytest.raises(exp.UserError, match="MNIST"):
        exp.load_dataset("MNIST", [tmp_path / "in"], tmp_path / "scratch")
    write_idx(tmp_path / "in/b", FIRST["MNIST"], True)
    raw = exp.load_dataset("MNIST", [tmp_path / "in"], tmp_path / "scratch")
    assert raw["train_y"][:6].tolist() == FIRST["MNIST"]


def test_a_damaged_copy_does_not_hide_a_sound_one(tmp_path, offline):
    write_idx(tmp_path / "in/a", FIRST["MNIST"], True)
    (tmp_path / "in/a/train-images-idx3-ubyte.gz").write_bytes(b"rotten")
    images, _ = write_idx(tmp_path / "in/b", FIRST["MNIST"], True)
    raw = exp.load_dataset("MNIST", [tmp_path / "in"], tmp_path / "scratch")
    assert (raw["train_x"][:, 2:30, 2:30, 0].numpy() == images).all()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """name → (folder, images, labels): a tiny CIFAR in the pickle form, its MD5s made known."""

    def make(name):
        dataset = getattr(torchvision.datasets, name)
        folder = tmp_path / "made" / dataset.base_folder
        folder.mkdir(parents=True)
        fine, key = name == "CIFAR100", "fine_labels" if name == "CIFAR100" else "labels"
        images, labels = noise(20, 3, 32, 32), [i % 10 for i in range(20)]
        batch = {"data": images.reshape(20, -1), key: labels}
        label_names = [f"class {i}" for i in range(100 if fine else 10)]
        contents = {f: batch for f, _ in dataset.train_list[:1] + dataset.test_list}
        contents[dataset.meta["filename"]] = {dataset.meta["key"]: label_names}
        md5 = {}
        for file, content in contents.items():
            (folder / file).write_bytes(pickle.dumps(content))
            md5[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
        for part in ("train_list", "test_list"):
            monkeypatch.setattr(dataset, part, [[f, md5[f]] for f, _ in getattr(dataset, part)[:1]])
        meta = dataset.meta | dict(md5=md5[dataset.meta["filename"]])
        monkeypatch.setattr(dataset, "meta", meta)
        return folder, images, labels

    return make


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("form", ["folder", "tar.gz"])
def test_cifar_is_found_and_read(tmp_path, offline, monkeypatch, cifar, name, form):
    folder, images, labels = cifar(name)
    place = tmp_path / "in/datasets/owner/slug"
    place.mkdir(parents=True)
    if form == "folder":
        folder.rename(place / folder.name)
    else:
        dataset = getattr(torchvision.datasets, name)
        with tarfile.open(place / dataset.filename, "w:gz") as tar:
            tar.add(folder, folder.name)
        md5 = hashlib.md5((place / dataset.filename).read_bytes()).hexdigest()
        monkeypatch.setattr(dataset, "tgz_md5", md5)
    raw = exp.load_dataset(name, [tmp_path / "in"], tmp_path / "scratch")
    assert (raw["train_x"].permute(0, 3, 1, 2).numpy() == images).all()
    assert raw["test_y"].tolist() == labels
    assert len(raw["classes"]) == (100 if name == "CIFAR100" else 10)


def test_cifar_with_a_wrong_checksum_is_not_read(tmp_path, offline, cifar):
    folder, *_ = cifar("CIFAR10")
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": noise(20, 3072), "labels": [0]}))
    with pytest.raises(exp.UserError, match="CIFAR10: no local copy"):
        exp.load_dataset("CIFAR10", [folder.parent], tmp_path / "scratch")


def image_folder(root, size=(32, 32), classes=("cat", "dog"), grey=False, n=3):
    """train/<class>/* and test/<class>/*: class 0 is dark, class 1 is bright."""
    for part in ("train", "test"):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
                pixels = np.full(shape, 50 + 150 * c + i, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (16, 16), (100, 60)])
@pytest.mark.parametrize("grey", [False, True])
def test_image_folders_of_any_size(tmp_path, size, grey):
    folder = image_folder(tmp_path / "pets", size, grey=grey)
    raw = exp.load_dataset(str(folder), (), tmp_path / "scratch")
    assert raw["train_x"].shape == (6, 32, 32, 3) and raw["train_x"].dtype == torch.uint8
    assert raw["train_x"][:, 16, 16, :].tolist() == [
        [50 + 150 * c + i] * 3 for c in (0, 1) for i in range(3)
    ]
    assert raw["train_y"].tolist() == [0, 0, 0, 1, 1, 1] and raw["classes"] == ["cat", "dog"]
    border = 0 if size == (28, 28) else 50
    assert raw["test_x"][0, 0, 0].tolist() == [border] * 3
    assert str(size[0]) in raw["note"] and raw["name"] == "pets"


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    folder = image_folder(tmp_path / "pets")
    prints = [exp.load_dataset(str(folder), (), tmp_path / f"{i}")["fingerprint"] for i in "ab"]
    Image.fromarray(noise(32, 32, 3)).save(folder / "train/cat/0.png")
    changed = exp.load_dataset(str(folder), (), tmp_path / "a")["fingerprint"]
    assert prints[0] == prints[1] != changed


def no_train(root):
    os.rename(image_folder(root) / "train", root / "training")


def other_classes(root):
    os.rename(image_folder(root) / "test/dog", root / "test/horse")


def unreadable(root):
    (image_folder(root) / "train/dog/1.png").write_bytes(b"\x89PNG no image")


def truncated(root):
    path = image_folder(root, (64, 64)) / "train/dog/1.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def one_class(root):
    image_folder(root, classes=["cat"])


def empty_class(root):
    for path in (image_folder(root) / "train/dog").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "train"),
        (no_train, "train"),
        (other_classes, "dog, horse"),
        (unreadable, "1.png"),
        (truncated, "1.png"),
        (one_class, "two are needed"),
        (empty_class, "dog"),
    ],
    ids="missing empty no_train other_classes unreadable truncated one_class empty_class".split(),
)
def test_a_bad_folder_is_one_line_and_leaves_nothing(tmp_path, capsys, spoil, says):
    spoil(tmp_path / "pets")
    out = tmp_path / "out"
    arguments = f"--mode smoke --device cpu --dataset {tmp_path / 'pets'} --output {out}"
    assert exp.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and says in error
    assert not list(out.glob("exp1b_*"))


@pytest.mark.parametrize(
    "name, says",
    [("CIFAR11", "CIFAR10, CIFAR100"), ("CIFAR10", "--data-dir"), ("MNIST", "Internet")],
)
def test_an_unknown_or_absent_dataset_is_one_line(tmp_path, capsys, offline, name, says):
    (tmp_path / "in").mkdir()
    arguments = f"--mode smoke --device cpu --dataset {name} --data-dir {tmp_path / 'in'}"
    assert exp.main([*arguments.split(), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and says in error
    assert not list((tmp_path / "out").glob("exp1b_*"))


def test_search_does_not_enter_folders_of_images(tmp_path):
    image_folder(tmp_path / "pets")
    (tmp_path / "pets/train/cat/wanted").touch()
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/wanted").touch()
    assert list(exp.search([tmp_path], "wanted")) == [tmp_path / "a/b/c/wanted"]
    assert list(exp.search([tmp_path / "absent"], "wanted")) == []


def test_stratified_prefixes_hold_all_classes_in_proportion():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    order = exp.stratified(labels, exp.generator(0, "x"))
    assert sorted(order.tolist()) == list(range(100))
    for n in (10, 20, 50):
        counts = labels[order[:n]].bincount(minlength=3).tolist()
        assert all(abs(c - n * p) <= 1 for c, p in zip(counts, (0.6, 0.3, 0.1)))
    assert order.tolist() != exp.stratified(labels, exp.generator(1, "x")).tolist()


def test_the_split(raw):
    whole, part = exp.Data(raw), exp.Data(raw, subset=100)
    assert (len(whole), len(whole.val_y), len(whole.test_y)) == (1800, 200, 1000)
    assert (len(part), len(part.val_y), len(part.test_y)) == (100, 200, 1000)
    assert torch.equal(whole.val_x, part.val_x)  # --subset caps training images only
    assert whole.val_y.bincount().tolist() == [20] * 10
    assert part.train_y.bincount().tolist() == [10] * 10
    rows = torch.cat([whole.train_x, whole.val_x]).flatten(1)
    assert len(rows.unique(dim=0)) == len(raw["train_x"].flatten(1).unique(dim=0))
    assert not torch.equal(whole.val_x, exp.Data(raw, seed=1).val_x)


def test_pixels_are_normalised_by_the_training_images(data):
    x = data.pixels(data.train_x)
    assert x.shape == (len(data), 3, 16, 16) and x.dtype == torch.float32
    assert x.mean((0, 2, 3)).abs().max() < 1e-4 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    by_hand = (data.train_x[3, 5, 7, 1] / 255 - data.mean[1]) / data.std[1]
    assert abs(x[3, 1, 5, 7].item() - by_hand.item()) < 1e-5


def naive_view(image, shift_y, shift_x, flip, pad):
    """Pad by mirroring, crop, flip: with numpy, one image at a time."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    side = len(image)
    crop = padded[shift_y : shift_y + side, shift_x : shift_x + side]
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("side, n_views", [(16, 50), (32, 162)])
def test_views_are_all_crops_and_flips(side, n_views):
    image = torch.from_numpy(noise(20, side, side, 3))
    y = torch.arange(20) % 2
    raw = dict(train_x=image, train_y=y, test_x=image, test_y=y, classes=["a", "b"], flips=2)
    data = exp.Data(raw)
    assert data.n_views == n_views
    pad, index = side // 8, torch.full((n_views,), 7)
    found = data.views(index, torch.arange(n_views)).numpy()
    expected = {
        naive_view(data.train_x[7].numpy(), dy, dx, flip, pad).tobytes()
        for dy in range(2 * pad + 1)
        for dx in range(2 * pad + 1)
        for flip in (False, True)
    }
    assert found.dtype == np.uint8 and {x.tobytes() for x in found} == expected
    assert any((x == data.train_x[7].numpy()).all() for x in found)


def test_without_flips_half_of_the_views_remain(raw):
    data = tiny_data(raw=raw | dict(flips=1))
    views = data.views(torch.zeros(25, dtype=int), torch.arange(25)).flatten(1)
    mirrored = data.train_x[0].flip(1).flatten()
    assert data.n_views == 25 and not (views == mirrored).all(1).any()


def test_views_follow_their_images(data):
    index, view = torch.tensor([5, 2, 5]), torch.tensor([3, 49, 3])
    together = data.views(index, view)
    for i in range(3):
        assert torch.equal(together[i], data.views(index[i : i + 1], view[i : i + 1])[0])


def test_the_pool_is_a_permutation_of_the_views_of_each_image(data):
    tables = torch.stack([data.pool(t) for t in range(data.n_views)])
    assert (tables.sort(0).values == torch.arange(data.n_views)[:, None]).all()
    assert len(tables[:2].T.unique(dim=0)) > 20  # not one permutation for all images
    assert torch.equal(data.pool(data.n_views + 3), tables[3])


def test_the_pool_depends_on_the_seed_alone(raw, data):
    again, other = tiny_data(raw=raw), tiny_data(raw=raw, seed=1)
    assert torch.equal(again.pool(17), data.pool(17)) and again.pool(17).dtype == torch.int64
    assert not torch.equal(other.pool(17), data.pool(17))


def test_toy_is_always_the_same(raw):
    again = exp.load_dataset("toy")
    assert again["fingerprint"] == raw["fingerprint"] and raw["train_x"].shape == (2000, 16, 16, 3)
    assert raw["train_y"].bincount().tolist() == [200] * 10
