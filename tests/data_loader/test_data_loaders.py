"""The public loaders: splits, imbalance, validation, order, ranks, resuming."""
from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from base.base_data_loader import BaseDataLoader
from data_loader import data_loaders, datasets
from data_loader.data_loaders import (
    CIFAR100DataLoader,
    DigitsLTDataLoader,
    ImbalanceCIFAR10DataLoader,
    ImbalanceCIFAR100DataLoader,
    ListFileDataLoader,
    build_loader,
)
from data_loader.transforms import test_transform
from utils.errors import ConfigError


def write_cifar(folder: Path, kind: datasets.CifarKind, per_class: int, tests: int = 2, **changes: object) -> Path:
    """A tiny CIFAR in the official layout; `changes` replace entries of the training file."""
    where, rng = folder / kind.folder, np.random.default_rng(0)
    where.mkdir(parents=True)
    for names, count in ((kind.train, per_class), (kind.test, tests)):
        labels = np.repeat(np.arange(kind.classes), count)
        pixels = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        pixels[:, 0] = labels
        for name, part in zip(names, np.array_split(rng.permutation(len(labels)), len(names)), strict=True):
            batch = {"data": pixels[part], kind.label_key: labels[part].tolist()}
            (where / name).write_bytes(pickle.dumps(batch | (changes if names == kind.train else {}), protocol=2))
    (where / kind.meta).write_bytes(pickle.dumps({kind.names_key: [f"n{i}" for i in range(kind.classes)]}, protocol=2))
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_cifar(tmp_path_factory.mktemp("cifar"), datasets.CIFAR100, 40)
    return str(write_cifar(folder, datasets.CIFAR10, 40))


def indices_of(loader: object) -> list[int]:
    return [int(i) for i in loader.epoch_order(loader.epoch)]


# -- digits ----------------------------------------------------------------------------------------------------------
def test_digits_are_the_stated_split() -> None:
    loader = DigitsLTDataLoader(batch_size=64, validation="holdout")
    assert loader.cls_num_list == [120, 77, 50, 32, 21, 13, 8, 5, 3, 2]
    test = DigitsLTDataLoader(batch_size=64, training=False)
    assert np.bincount(test.targets).tolist() == [50] * 10 and test.cls_num_list == loader.cls_num_list
    parts = [loader, test, loader.split_validation()]
    seen = [part.raw_image(i).tobytes() for part in parts for i in range(part.n_samples)]
    from sklearn.datasets import load_digits
    everything = load_digits().images
    repeats = len(everything) - len(np.unique(everything, axis=0))
    assert len(seen) - len(set(seen)) <= repeats     # no image is in two parts
    assert parts[2].n_samples > 200
    images, labels = next(iter(loader))
    assert images.shape == (64, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64


@pytest.mark.parametrize("found", [True, False])
def test_digits_are_scikit_learns(found, monkeypatch) -> None:
    """Read from its file, or by its function where another version has the file elsewhere."""
    from sklearn.datasets import load_digits
    if not found:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    images, labels = datasets.digit_scans()
    expected = load_digits()
    assert np.array_equal(images, expected.images) and images.dtype == expected.images.dtype
    assert np.array_equal(labels, expected.target) and labels.dtype == np.int64


def test_digits_split_seed_picks_other_images() -> None:
    first, same, other = (DigitsLTDataLoader(split_seed=s, seed=n) for s, n in ((0, 0), (0, 5), (1, 0)))
    assert np.array_equal(first.raw_image(0), same.raw_image(0))
    assert any(not np.array_equal(first.raw_image(i), other.raw_image(i)) for i in range(20))
    assert first.cls_num_list == other.cls_num_list


def test_digits_are_never_mirrored() -> None:
    loader = DigitsLTDataLoader()
    assert not loader._epoch_draws(1, loader.epoch_order(1)).flip.any()


@pytest.mark.parametrize(("validation", "samples"), [("test", 500), ("none", None), (None, None)])
def test_validation_choices(validation: str | None, samples: int | None) -> None:
    loader = DigitsLTDataLoader(validation=validation)
    found = loader.split_validation()
    assert (found and found.n_samples) == samples
    assert (loader.validation_note is not None) == (validation == "test")
    if found:
        assert found.cls_num_list == loader.cls_num_list and indices_of(found) == list(range(500))


def test_train_eval_is_in_order_and_plain() -> None:
    loader = DigitsLTDataLoader(batch_size=100)
    plain = loader.train_eval_loader()
    images = torch.cat([x for x, _ in plain])
    labels = torch.cat([y for _, y in plain])
    assert np.array_equal(labels.numpy(), loader.targets) and len(images) == loader.n_samples
    again = torch.cat([x for x, _ in plain])
    assert torch.equal(images, again)
    levels = (images[5] * torch.tensor(loader.std).view(3, 1, 1) + torch.tensor(loader.mean).view(3, 1, 1)) * 255
    assert np.array_equal(levels.round().byte().permute(1, 2, 0).numpy(), loader.raw_image(5))


# -- CIFAR -----------------------------------------------------------------------------------------------------------
def test_cifar_long_tail_is_the_published_choice(cifar: str) -> None:
    from data_loader.imbalance import img_num_per_cls, long_tail_indices
    loader = ImbalanceCIFAR100DataLoader(cifar, 32, imb_factor=0.1)
    assert loader.cls_num_list == img_num_per_cls(40, 100, "exp", 0.1)
    full = datasets.read_cifar(cifar, datasets.CIFAR100, download=False).train
    chosen = long_tail_indices(full.targets, loader.cls_num_list)
    assert np.array_equal(loader.targets, full.targets[chosen])
    assert np.array_equal(loader.raw_image(7), full.pixels[chosen[7]])
    assert loader.class_names[3] == "n3" and loader.num_classes == 100
    assert loader.mean == (0.4914, 0.4822, 0.4465)


def test_cifar_pixels_keep_their_places(tmp_path: Path) -> None:
    write_cifar(tmp_path, datasets.CIFAR10, 4)
    loader = ImbalanceCIFAR10DataLoader(str(tmp_path), imb_type=None)
    assert loader.cls_num_list == [4] * 10
    raw = loader.raw_image(3)      # the first of the 3,072 bytes is the top left pixel's red
    assert raw.shape == (32, 32, 3) and raw[0, 0, 0] == loader.targets[3]


@pytest.mark.parametrize(("args", "counts"), [
    ({"imb_type": "step", "imb_factor": 0.1}, [40] * 50 + [4] * 50), ({"imb_type": None}, [40] * 100),
    ({"imb_type": "none"}, [40] * 100), ({"imb_factor": None}, [40] * 100)])
def test_cifar_imbalance_types(cifar: str, args: dict, counts: list[int]) -> None:
    assert ImbalanceCIFAR100DataLoader(cifar, **args).cls_num_list == counts


def test_cifar_holdout_is_balanced_and_outside_the_subset(cifar: str) -> None:
    loader = ImbalanceCIFAR100DataLoader(cifar, 64, validation="holdout", imb_factor=0.03)
    assert loader.cls_num_list[0] == 40 and loader.cls_num_list[-1] == 1
    held = loader.split_validation()
    counts = np.bincount(held.targets, minlength=100)
    assert counts[0] == 0 and 1 <= counts[1] <= 50 and (counts[1:] == counts[1]).all()
    assert "1 of 100 classes have none left" in loader.validation_note
    training = {loader.raw_image(i).tobytes() for i in range(loader.n_samples)}
    assert not training & {held.raw_image(i).tobytes() for i in range(held.n_samples)}


def test_cifar_holdout_without_spare_images_is_a_share(cifar: str) -> None:
    loader = CIFAR100DataLoader(cifar, validation="holdout", val_share=0.2)
    assert loader.cls_num_list == [32] * 100
    assert np.bincount(loader.split_validation().targets).tolist() == [8] * 100
    assert loader.mean[0] == 0.50707


@pytest.mark.parametrize("size, workers", [(28, 0), (48, 0), (48, 1), (96, 0), (96, 1)])
def test_cifar_of_another_size_is_as_from_files(cifar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int,
                                                workers: int) -> None:
    """A network wants larger or smaller images than the arrays hold: they are treated as files of these pixels are."""
    for split in ("train", "test"):
        part = ImbalanceCIFAR10DataLoader(cifar, training=split == "train", imb_factor=None)
        for i in range(part.n_samples):
            Image.fromarray(part.raw_image(i)).save(tmp_path / f"{split}{i}.png")
        lines = [f"{split}{i}.png {label}" for i, label in enumerate(part.targets)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    monkeypatch.setattr(ListFileDataLoader, "statistics", ImbalanceCIFAR10DataLoader.statistics)
    args = {"image_size": size, "batch_size": 50, "num_workers": workers, "validation": "none", "jitter": 0.0,
            "imb_factor": None}
    arrays, files = ImbalanceCIFAR10DataLoader(cifar, **args), ListFileDataLoader(str(tmp_path), **args)
    for ours, theirs in ((arrays, files), (arrays.train_eval_loader(), files.train_eval_loader())):
        (images, labels), (wanted, known) = next(iter(ours)), next(iter(theirs))
        assert torch.equal(labels, known) and torch.equal(images, wanted) and images.shape == (50, 3, size, size)
    assert arrays.raw_image(3).shape[2] == 3


@pytest.mark.parametrize("size", [24, 48, 72])
def test_digits_are_tested_as_they_are_predicted(size: int) -> None:
    """What tools.predict and an export see of an image is what the test figures are of, at any size."""
    loader = DigitsLTDataLoader(batch_size=3, training=False, image_size=size, num_workers=0)
    pixels = loader.read(training=False).test.pixels[:3]
    wanted = torch.stack([test_transform(loader.preprocess)(Image.fromarray(one)) for one in pixels])
    assert torch.allclose(next(iter(loader))[0], wanted, atol=1e-6)


def test_cifar_folder_itself_may_be_data_dir(cifar: str) -> None:
    assert CIFAR100DataLoader(str(Path(cifar) / "cifar-100-python")).n_samples == 4000


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/long-tailed-bomb"),))


@pytest.mark.parametrize(("change", "said"), [
    ({"data": np.zeros((500, 3072), np.float32)}, "uint8"), ({"data": np.zeros((500, 10), np.uint8)}, "3,072"),
    ({"fine_labels": [0] * 3}, "whole numbers"), ({"fine_labels": ["a"] * 500}, "whole numbers"),
    ({"fine_labels": [100] * 500}, "0 to 99"), ({"fine_labels": [0] * 500}, "no image of class 1"),
    ({"data": "text"}, "uint8"), ({"more": Bomb()}, "plain arrays")])
def test_cifar_files_are_checked_by_content(tmp_path: Path, change: dict, said: str) -> None:
    write_cifar(tmp_path, datasets.CIFAR100, 5, **change)
    with pytest.raises(ConfigError, match=said) as caught:
        ImbalanceCIFAR100DataLoader(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and not Path("/tmp/long-tailed-bomb").exists()


def test_cifar_truncated_or_incomplete(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, datasets.CIFAR100, 5) / "cifar-100-python"
    (folder / "train").write_bytes((folder / "train").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="train"):
        ImbalanceCIFAR100DataLoader(str(tmp_path))
    (folder / "train").unlink()
    with pytest.raises(ConfigError, match="incomplete"):
        ImbalanceCIFAR100DataLoader(str(tmp_path))


def test_cifar_absent_and_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")
    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)
    with pytest.raises(ConfigError, match=r"data_dir.*cifar-100-python.*no route to host.*unpack"):
        ImbalanceCIFAR100DataLoader(str(tmp_path / "new" / "data"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="holds no cifar-10-batches-py"):
        ImbalanceCIFAR10DataLoader(str(tmp_path), download=False)


def test_cifar_is_fetched_only_if_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_cifar(tmp_path / "source", datasets.CIFAR100, 2)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        packed.add(source / "cifar-100-python", "cifar-100-python")
    calls: list[str] = []

    def serve(url: str, **_: object) -> io.BytesIO:
        calls.append(url)
        return io.BytesIO(archive.getvalue())
    monkeypatch.setattr(datasets.urllib.request, "urlopen", serve)
    for _ in range(2):
        assert CIFAR100DataLoader(str(tmp_path / "data")).n_samples == 200
    assert calls == [datasets.CIFAR100.url]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-100-python"]


def test_other_ranks_wait_for_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_cifar(tmp_path / "source", datasets.CIFAR100, 2)
    monkeypatch.setattr(datasets, "local_rank", lambda: 1)
    monkeypatch.setattr(datasets.time, "sleep", lambda _: (source / "cifar-100-python").rename(
        tmp_path / "cifar-100-python"))
    assert CIFAR100DataLoader(str(tmp_path)).n_samples == 200


# -- order, ranks, resuming ------------------------------------------------------------------------------------------
def test_epochs_differ_and_repeat_exactly() -> None:
    loader = DigitsLTDataLoader(batch_size=50, seed=3)
    first = [x for x, _ in loader]
    second = [x for x, _ in loader]        # iterating again is the next epoch
    assert not torch.equal(first[0], second[0])
    loader.set_epoch(1)
    for wanted, (images, _) in zip(first, loader, strict=True):
        assert torch.equal(wanted, images)
    loader.set_epoch(2, start_batch=4)
    for wanted, (images, _) in zip(second[4:], loader, strict=True):
        assert torch.equal(wanted, images)
    assert not torch.equal(first[0], next(iter(DigitsLTDataLoader(batch_size=50, seed=4)))[0])


def test_every_image_comes_once_an_epoch() -> None:
    loader = DigitsLTDataLoader(batch_size=50)
    labels = torch.cat([y for _, y in loader])
    assert sorted(labels.tolist()) == sorted(loader.targets.tolist())
    assert indices_of(loader) != list(range(331))
    assert indices_of(DigitsLTDataLoader(shuffle=False)) == list(range(331))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 12), world=st.integers(1, 5), training=st.booleans())
def test_ranks_share_every_batch_without_overlap(n: int, batch: int, world: int, training: bool) -> None:
    loaders = [BaseDataLoader(np.zeros(n), batch, shuffle=True, training=training, rank=r, world_size=world)
               for r in range(world)]
    seen: list[int] = []
    for b in range(len(loaders[0])):
        shares = [loader.share(b) for loader in loaders]
        start, stop = loaders[0].span(b)
        assert all(total == stop - start for _, total in shares) and sum(own for own, _ in shares) == stop - start
        for loader, (own, _) in zip(loaders, shares, strict=True):
            positions = loader.positions(b)
            assert len(positions) == max(own, 1)      # a rank without an image repeats one
            seen += positions[:own].tolist()
    dropped = int(training and n % batch == 1 and n > batch)
    assert sorted(seen) == list(range(n - dropped))


def test_rank_batches_are_slices_of_the_global_batch() -> None:
    whole = next(iter(DigitsLTDataLoader(batch_size=21, seed=1)))
    parts = [next(iter(DigitsLTDataLoader(batch_size=21, seed=1, rank=r, world_size=2))) for r in range(2)]
    for r in range(2):
        assert torch.equal(parts[r][0], whole[0][r::2]) and torch.equal(parts[r][1], whole[1][r::2])


def test_last_single_image_is_dropped_in_training_only() -> None:
    assert len(DigitsLTDataLoader(batch_size=330)) == 1      # 331 images
    assert len(DigitsLTDataLoader(batch_size=499, training=False)) == 2
    assert len(DigitsLTDataLoader(batch_size=1)) == 331


# -- samplers --------------------------------------------------------------------------------------------------------
def test_balanced_and_epoch_size() -> None:
    loader = DigitsLTDataLoader(batch_size=100, balanced=True)
    labels = torch.cat([y for _, y in loader])
    assert len(labels) == 331 and torch.bincount(labels, minlength=10).min() > 10
    assert DigitsLTDataLoader(batch_size=100, balanced=True, retain_epoch_size=False).epoch_size == 1200
    with pytest.raises(ConfigError, match="balanced"):
        DigitsLTDataLoader(balanced=True, sampler={"type": "SquareRoot"})


def test_an_epoch_s_size_beside_a_sampler() -> None:
    balanced = {"type": "ClassBalanced"}
    assert DigitsLTDataLoader(sampler=balanced).epoch_size == 331
    assert DigitsLTDataLoader(sampler=balanced, retain_epoch_size=False).epoch_size == 1200
    for own, size in (({"retain_epoch_size": True}, 331), ({"epoch_length": 50}, 50)):      # its own go first
        assert DigitsLTDataLoader(sampler={**balanced, "args": own}, retain_epoch_size=False).epoch_size == size
    assert DigitsLTDataLoader(retain_epoch_size=False).epoch_size == 331        # as RIDE's configs may have it
    for name in ("ClassAware", "SquareRoot", "InstanceBalanced"):
        with pytest.raises(ConfigError, match=rf"args.retain_epoch_size: {name} .* ClassBalanced .*epoch_length$"):
            DigitsLTDataLoader(sampler={"type": name}, retain_epoch_size=False)


@pytest.mark.parametrize("name", ["InstanceBalanced", "ClassBalanced", "SquareRoot", "ClassAware",
                                  "ProgressivelyBalanced"])
def test_samplers_by_name(name: str) -> None:
    spec = {"type": "DigitsLTDataLoader", "args": {"batch_size": 64, "sampler": {"type": name, "args": {}}}}
    loader = build_loader(spec, seed=2, epochs=5)
    assert sum(len(y) for _, y in loader) == 331
    loader.set_epoch(3)
    assert indices_of(loader) == loader.index_sampler.epoch_indices(3).tolist()


def test_progressive_sampler_takes_its_own_epochs_first() -> None:
    own = DigitsLTDataLoader(sampler={"type": "ProgressivelyBalanced", "args": {"epochs": 9}}, epochs=5)
    assert own.index_sampler.epochs == 9
    with pytest.raises(ConfigError, match="epochs"):
        DigitsLTDataLoader(sampler={"type": "ProgressivelyBalanced"})


# -- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "args", "said"), [
    ("DigitsLTDataLoader", {"batch_size": 0}, "batch_size"), ("DigitsLTDataLoader", {"imb_factor": 0}, "imb_factor"),
    ("DigitsLTDataLoader", {"imb_type": "expo"}, "exp"), ("DigitsLTDataLoader", {"val_share": 1}, "val_share"),
    ("DigitsLTDataLoader", {"image_size": 0}, "image_size"), ("DigitsLTDataLoader", {"validation": "tets"}, "test"),
    ("DigitsLTDataLoader", {"sampler": {"type": "SquareRot"}}, "SquareRoot"),
    ("DigitsLTDataLoader", {"sampler": {"type": "ClassAware", "args": {"num_sample": 4}}}, "num_samples_cls"),
    ("DigitsLTDataLoader", {"num_workers": -1}, "num_workers"), ("DigitsLTDataLoader", {"cache": "yes"}, "cache"),
    ("DigitsLTDataLoader", {"batchsize": 3}, "batch_size"), ("DigitsLTDataloader", {}, "DigitsLTDataLoader"),
    ("ImbalanceCIFAR100DataLoader", {}, "data_dir"),
    ("ImageNetLTDataLoader", {"data_dir": "/nowhere/at/all"}, "/nowhere"),
    ("DigitsLTDataLoader", {"split_seed": -1}, "split_seed"), ("DigitsLTDataLoader", {"prefetch": 0}, "prefetch")])
def test_mistakes_name_the_key(name: str, args: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_loader({"type": name, "args": args})


def test_every_public_loader_says_how_to_read() -> None:
    own = [value for name, value in vars(data_loaders).items()
           if isinstance(value, type) and issubclass(value, BaseDataLoader) and not name.startswith("_")]
    assert len(own) == 11 and all(value.__doc__ for value in own)
