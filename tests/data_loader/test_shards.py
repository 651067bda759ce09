"""Images in tar files: the same splits, pixels and figures as from files, whatever wrote the shards."""
from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader, ListFileDataLoader
from data_loader.images import read_rgb
from data_loader.places import member_of, member_path, open_image
from data_loader.shard_names import expand
from data_loader.shards import open_index
from tools.shard import byte_count
from tools.shard import main as shard
from utils.errors import ConfigError

SMALL = dict(batch_size=4, image_size=16, num_workers=0)


def png(seed: int, size=(24, 20)) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: dict[str, bytes], **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as packed:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            packed.addfile(about, io.BytesIO(content))
    return path


def link(name: str) -> tarfile.TarInfo:
    about = tarfile.TarInfo(name)
    about.type, about.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return about


@pytest.fixture
def folder(tmp_path) -> Path:
    """train/ and test/ of three classes, some of them in folders of folders."""
    for split, counts in (("train", (9, 6, 5)), ("test", (3, 2, 2))):
        for label, count in enumerate(counts):
            for i in range(count):
                path = tmp_path / "in" / split / f"class {label}" / ("deep" if i == 2 else "") / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(100 * label + i + 7 * (split == "test")))
    return tmp_path / "in"


def packed(source: Path, size: str = "6K") -> tuple[Path, dict]:
    target = source.parent / "out"
    shard([str(source), str(target), "--size", size])
    counts = {split: len(list(target.glob(f"{split}-*.tar"))) for split in ("train", "val", "test")}
    return target, {split: f"{split}-{{00000..{count - 1:05d}}}.tar" for split, count in counts.items() if count}


def equal(one, two, epochs=(1, 2)):
    assert one.cls_num_list == two.cls_num_list and one.class_names == two.class_names
    for epoch in epochs:
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        batches = list(zip(one, two, strict=True))
        assert batches
        for (x, y), (u, v) in batches:
            assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("more", [{}, {"cache": False}, {"image_size": 72, "num_workers": 2},
                                  {"sampler": {"type": "ClassBalanced"}}, {"validation": "holdout", "val_share": 0.3}])
def test_a_folder_in_shards_gives_the_same_batches(folder, more):
    target, spec = packed(folder)
    assert len(list(target.glob("train-*.tar"))) > 2
    args = {**SMALL, **more}
    files = ImageFolderLTDataLoader(str(folder), **args)
    shards = ImageFolderLTDataLoader(str(target), shards=spec, **args)
    equal(files, shards)
    held = files.split_validation(), shards.split_validation()
    if held[0] is not None:
        equal(*held, epochs=(1,))
    assert np.array_equal(files.raw_image(3), shards.raw_image(3))
    sample = shards.split_memory["sample"]
    assert len(sample) > 2 and all((target / name).stat().st_size == size for name, size in sample.items())
    equal(ImageFolderLTDataLoader(str(folder), training=False, **SMALL),
          ImageFolderLTDataLoader(str(target), training=False, shards=spec, **SMALL), epochs=(1,))


def test_a_folder_without_splits_is_parted_alike(folder):
    """By the images' names, which are the same in shards."""
    target, spec = packed(folder / "train")
    assert set(spec) == {"train"}
    for shards in (spec, spec["train"]):
        equal(ImageFolderLTDataLoader(str(folder / "train"), **SMALL),
              ImageFolderLTDataLoader(str(target), shards=shards, **SMALL))


def test_lists_in_shards(folder):
    source = folder.parent / "lists"
    for split in ("train", "test"):
        lines = []
        for path in sorted((folder / split).rglob("*.png")):
            label = path.relative_to(folder / split).parts[0][-1]
            name = f"{split}/{label}.{path.stem}.png"       # one key for many: no label beside them
            (source / split).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, source / name)
            lines.append(f"{name} {label}")
        (source / f"{split}.txt").write_text("\n".join(lines[::-1]))
    target, spec = packed(source)
    assert (target / "train.txt").read_text() == (source / "train.txt").read_text()
    equal(ListFileDataLoader(str(source), **SMALL), ListFileDataLoader(str(target), shards=spec, **SMALL))
    (target / "train.txt").write_text("train/0.2.png 0\nnot there.png 1\n")
    with pytest.raises(ConfigError, match=r"train.txt, line 2: not there.png is in none of the \d+ shards"):
        ListFileDataLoader(str(target), shards=spec, **SMALL)


def test_shards_as_webdataset_writes_them(tmp_path):
    """Keys with .cls or .json beside the image, in any order; classes.txt names the numbers."""
    members = {}
    for i in range(12):
        label = i % 3
        beside = {f"{i:06d}.cls": str(label).encode()} if i % 2 else {
            f"{i:06d}.json": json.dumps({"label": label, "caption": "x"}).encode()}
        members |= {**beside, f"{i:06d}.png": png(i)} if i % 4 else {f"{i:06d}.png": png(i), **beside}
    for split, part in (("train", dict(list(members.items())[:18])), ("test", dict(list(members.items())[18:]))):
        tar(tmp_path / f"{split}-0.tar", part)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncrab\n")
    spec = {"train": "train-0.tar", "test": "test-0.tar"}
    for kind in (ListFileDataLoader, ImageFolderLTDataLoader):
        loader = kind(str(tmp_path), shards=spec, **SMALL)
        assert loader.cls_num_list == [3, 3, 3] and loader.class_names == ["ant", "bee", "crab"]
        number = [int(Path(member_of(path).name).stem) for path in loader.paths]
        assert [n % 3 for n in number] == loader.targets.tolist()
        assert np.array_equal(loader.raw_image(0), np.asarray(Image.open(io.BytesIO(png(number[0])))))


def test_labels_that_begin_with_a_byte_order_mark(tmp_path):
    members = {}
    for n in range(6):
        label = json.dumps({"label": n % 2}).encode() if n > 3 else str(n % 2).encode()
        members |= {f"{n}.png": png(n), f"{n}.{'json' if n > 3 else 'cls'}": b"\xef\xbb\xbf" * (n > 1) + label}
    tar(tmp_path / "t.tar", members)
    loader = ImageFolderLTDataLoader(str(tmp_path), shards={"train": "t.tar", "test": "t.tar"}, **SMALL)
    assert loader.cls_num_list == [3, 3] and loader.class_names is None
    tar(tmp_path / "mark.tar", {"1.png": png(1), "1.cls": b"\xef\xbb\xbf"})
    with pytest.raises(ConfigError, match=r"mark.tar: 1.cls: holds no label"):
        ImageFolderLTDataLoader(str(tmp_path), shards="mark.tar", **SMALL)


def test_few_shards_images_for_testing_alone(tmp_path):
    facts = {"num_classes": 5, "class_names": None, "cls_num_list": [9, 8, 7, 6, 5], "split": {"sample": {"x.tar": 1}}}
    args = dict(SMALL, training=False, facts=facts, shards={"test": "t.tar"})
    tar(tmp_path / "t.tar", {"1.png": png(1), "1.cls": b"3", "2.png": png(2), "2.cls": b"4"})
    loader = ImageFolderLTDataLoader(str(tmp_path), **args)
    assert loader.targets.tolist() == [3, 4] and loader.num_classes == 5
    tar(tmp_path / "t.tar", {"1.png": png(1), "1.cls": b"3", "2.png": png(2), "2.cls": b"17"})
    with pytest.raises(ConfigError, match=r"args.shards: label 17 is out of range; labels are 0 to 4$"):
        ImageFolderLTDataLoader(str(tmp_path), **args)


def test_a_class_of_shards_that_is_named_as_a_split_is_said(tmp_path):
    tar(tmp_path / "t.tar", {f"{c}/{n}.png": png(10 * n + len(c)) for c in ("a", "bee", "test") for n in range(3)})
    loader = ImageFolderLTDataLoader(str(tmp_path), shards="t.tar", **SMALL)
    assert loader.class_names == ["a", "bee", "test"]
    assert sum("shards: test is taken for a class, though it is named as a split" in line for line in loader.notes) == 1


def test_tars_of_others(tmp_path):
    """GNU and PAX headers with long and odd names, folders and links and what systems leave among them."""
    odd = {"train/a/" + "long " * 40 + "ü.png": png(1), "train/b/x.png": png(2), "./train/b/y.PNG": png(3),
           "train/a/.DS_Store": b"?", "__MACOSX/train/a/x.png": b"?", "test/a/1.png": png(4), "test/b/1.png": png(5),
           "train/a/2.png": png(6), "train/README": b"photos"}
    for how in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar(tmp_path / str(how) / "all.tar", odd, format=how)
        with tarfile.open(path, "a") as packed:
            packed.addfile(link("train/a/link.png"))
        loader = ImageFolderLTDataLoader(str(path.parent), shards="all.tar", **SMALL)
        assert loader.class_names == ["a", "b"] and loader.cls_num_list == [2, 2]
        assert any("1 image in the shards is a link and left out" in note for note in loader.notes)
        assert np.array_equal(np.asarray(read_rgb(loader.paths[1])), np.asarray(Image.open(io.BytesIO(png(1)))))


@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 4))
def test_ranges(first, count, width):
    text = f"{first:0{width}d}"
    last = f"{first + count - 1:0{width}d}"
    names = expand(f"a/{{{text}..{last}}}-{{x,y}}.tar")
    assert len(names) == 2 * count and names[0] == f"a/{text}-x.tar" and names[-1] == f"a/{last}-y.tar"
    assert [name for name in names if name.endswith("x.tar")] == [
        f"a/{number:0{width}d}-x.tar" for number in range(first, first + count)]


def test_an_index_is_made_once_and_again_where_a_shard_changed(tmp_path, monkeypatch):
    tar(tmp_path / "t-0.tar", {"a/1.png": png(1)})
    tar(tmp_path / "t-1.tar", {"b/1.png": png(2)})
    index = open_index("t-{0..1}.tar", str(tmp_path))
    file, = tmp_path.glob("t-0..1.*.index.npz")
    assert index.names == ["a/1.png", "b/1.png"]
    monkeypatch.setattr("data_loader.shards.make_index", lambda *args: pytest.fail("made again"))
    again = open_index("t-{0..1}.tar", str(tmp_path))
    assert again.paths == index.paths
    monkeypatch.undo()
    tar(tmp_path / "t-1.tar", {"b/2.png": png(3), "c/1.png": png(4)})
    assert open_index("t-{0..1}.tar", str(tmp_path)).names == ["a/1.png", "b/2.png", "c/1.png"]
    file.write_bytes(b"no index")
    assert len(open_index("t-{0..1}.tar", str(tmp_path))) == 3


def test_copied_shards_keep_their_index(tmp_path, monkeypatch):
    """`cp` gives them other times; a shard rewritten in the same length, with other labels or photos, is no copy."""
    members = {f"{i:03d}.{kind}": png(i) if kind == "png" else str(i % 2).encode()
               for i in range(20) for kind in ("cls", "png")}
    tar(tmp_path / "here" / "t-0.tar", members)
    tar(tmp_path / "here" / "t-1.tar", {"notes.txt": b"no image"})
    names = open_index("t-{0..1}.tar", str(tmp_path / "here")).names
    for place in ("copied", "changed"):
        (tmp_path / place).mkdir()
        for file in (tmp_path / "here").iterdir():
            shutil.copyfile(file, tmp_path / place / file.name)
            os.utime(tmp_path / place / file.name, ns=(1, 1))
    with monkeypatch.context() as patch:
        patch.setattr("data_loader.shards.make_index", lambda *args: pytest.fail("made again"))
        copied = open_index("t-{0..1}.tar", str(tmp_path / "copied"))
    assert copied.names == names and [copied.kinds[k] for k in copied.kind] == ["0", "1"] * 10
    assert open_image(copied.paths[3]).read() == png(3)
    tar(tmp_path / "changed" / "t-0.tar", members | {"019.cls": b"2"})
    changed = open_index("t-{0..1}.tar", str(tmp_path / "changed"))
    assert [changed.kinds[k] for k in changed.kind] == ["0", "1"] * 9 + ["0", "2"]


def test_an_index_that_cant_be_written_is_done_without(tmp_path, monkeypatch):
    tar(tmp_path / "t.tar", {"a/1.png": png(1)})

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("data_loader.shards.Index.save", full)
    first = open_index("t.tar", str(tmp_path))
    assert len(first) == 1
    monkeypatch.setattr("data_loader.shards.read_tar", lambda *args: pytest.fail("read again"))
    assert open_index("t.tar", str(tmp_path)) is first      # the test loader of the same run


@pytest.mark.parametrize("spec, message", [
    ("gone-{0..3}.tar", r"gone-0.tar: no such shard \(data_loader.args.shards\); 3 more of 4 are missing"),
    ("t-{0..4}.tar", r"t-2.tar: no such shard .*; 2 more of 5 are missing"),
    ("t-{4..0}.tar", r"\{4..0\} counts down"),
    ({"training": "t-0.tar"}, "with the keys train, val and test"),
    ({"val": "t-0.tar"}, "no train and no test shards"),
    ("cut.tar", r"cut.tar: ends within a/2.png; it is truncated"),
    ("short.tar", r"short.tar: has no end mark"),
    ("text.tar", r"text.tar: damaged or not a tar file"),
    ("zipped.gz", r"zipped.gz: is compressed \(gzip\), .*: gunzip it, or unpack it \(tar -xf\) .* tools.shard"),
    ("zipped.bz2", r"zipped.bz2: is compressed \(bzip2\), .*: bunzip2 it"),
    ("zipped.xz", r"zipped.xz: is compressed \(xz\), .*: unxz it"),
    ("zipped.zst", r"zipped.zst: is compressed \(zstd\), .*: unzstd it"),
    ("twice-{0,1}.tar", r"twice-1.tar: a/1.png is there twice, also in .*twice-0.tar"),
    ("flat.tar", r"flat.tar: 1.png has no label"),
    ("empty.tar", r"empty.tar: the 1 shards hold no image"),
    ("nolabel.tar", r"nolabel.tar: 1.png has no label: .* \(a text or a number as label, cls, class\)"),
    ("noclass.tar", r"noclass.tar: 1.cls: holds no label; a .cls is"),
    ("t-{0,1,0}.tar", r"data_loader.args.shards: t-\{0,1,0\}.tar: names t-0.tar twice"),
    ("updated.tar", r"updated.tar: a/1.png is there twice$"),
    ("unlabelled.tar", r"unlabelled.tar: 1.png has the label -1; labels are 0, 1, 2"),
    ("unclear.tar", r"unclear.tar: 1.a.png shares its label with other images, .* 1.FORMAT"),
    ("links.tar", r"links.tar: the 1 shards hold no image; 1 are links, .*--hard-dereference"),
    ("folder.tar", r"folder.tar: can't be read \(Is a directory\)"),
    ("t-0.tar/x.tar", r"x.tar: no such shard"),
    ("t" * 300, r"t: can't be opened: File name too long"),
    ({"train": "t-{0..1}.tar", "test": "other.tar"}, r"other.tar: z/1.png is of class z, which no training image has"),
])
def test_what_is_wrong_is_named(tmp_path, spec, message):
    tar(tmp_path / "t-0.tar", {"a/1.png": png(1)})
    tar(tmp_path / "t-1.tar", {"b/1.png": png(2)})
    tar(tmp_path / "other.tar", {"z/1.png": png(2)})
    whole = tar(tmp_path / "whole.tar", {"a/1.png": png(1), "a/2.png": png(2)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    (tmp_path / "short.tar").write_bytes(whole[:2048])
    (tmp_path / "text.tar").write_bytes(b"hello" * 1000)
    for form in ("gz", "bz2", "xz"):
        with tarfile.open(tmp_path / f"zipped.{form}", f"w:{form}") as packed:
            packed.add(tmp_path / "text.tar", "a/1.png")
    (tmp_path / "zipped.zst").write_bytes(bytes.fromhex("28b52ffd2004210000") + b"tar!")
    for name in ("twice-0.tar", "twice-1.tar"):
        tar(tmp_path / name, {"a/1.png": png(1)})
    tar(tmp_path / "flat.tar", {"1.png": png(1)})
    tar(tmp_path / "empty.tar", {"README": b"x"})
    tar(tmp_path / "nolabel.tar", {"1.json": b'{"label": null}', "1.png": png(1)})
    tar(tmp_path / "noclass.tar", {"1.cls": b" ", "1.png": png(1)})
    tar(tmp_path / "unlabelled.tar", {"1.cls": b"-1", "1.png": png(1)})
    tar(tmp_path / "unclear.tar", {"1.cls": b"1", "1.a.png": png(1), "1.b.png": png(1)})
    (tmp_path / "folder.tar").mkdir()
    with tarfile.open(tar(tmp_path / "updated.tar", {"a/1.png": png(1)}), "a") as packed:
        packed.add(tmp_path / "text.tar", "a/1.png")
    with tarfile.open(tmp_path / "links.tar", "w") as packed:
        packed.addfile(link("a/1.png"))
    with pytest.raises(ConfigError, match=message) as caught:
        ImageFolderLTDataLoader(str(tmp_path), shards=spec, **SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["gnu", "pax", "oldgnu"])
def test_images_that_tar_stored_without_their_zeros_are_named(tmp_path, form):
    """Other files may have this form. With its zeros, a file may be longer than the tar, which isn't truncated."""
    for name in ("a/1.png", "b/1.bin"):
        (tmp_path / name).parent.mkdir()
        with open(tmp_path / name, "wb") as handle:
            handle.truncate(1 << 20)
            handle.seek(0, os.SEEK_END)
            handle.write(b"end")

    def pack(name: str, *members: str) -> None:
        done = subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", name, *members], cwd=tmp_path)
        if done.returncode or (tmp_path / name).stat().st_size > 1 << 20:
            pytest.skip("no tar with --sparse")
    pack("t.tar", "a", "b")
    with pytest.raises(ConfigError, match=r"t.tar: a/1.png is stored without its zeros; write the shard without tar's "
                                          r"--sparse, or unpack it \(tar -xf\) .* tools.shard"):
        open_index("t.tar", str(tmp_path))
    (tmp_path / "a" / "1.png").write_bytes(png(1))
    pack("t.tar", "a", "b")
    assert open_index("t.tar", str(tmp_path)).names == ["a/1.png"]


def test_an_image_or_a_shard_that_breaks_later_is_named(tmp_path):
    shard_file = tar(tmp_path / "t.tar", {"a/1.png": png(1), "b/1.png": b"no image"})
    index = open_index("t.tar", str(tmp_path))
    with pytest.raises(ConfigError, match=r"t.tar: b/1.png: can't be read as an image"):
        read_rgb(index.paths[1])
    os.truncate(shard_file, 600)
    with pytest.raises(ConfigError, match=r"t.tar: a/1.png: can't be read .*ends too early"):
        read_rgb(index.paths[0])
    with pytest.raises(ConfigError, match=r"gone.tar: x.png: no such image"):
        read_rgb(member_path(str(tmp_path / "gone.tar"), 0, 1, "x.png"))


def test_loaders_of_other_data_take_none():
    with pytest.raises(ConfigError, match=r"data_loader.args.shards: DigitsLTDataLoader reads none"):
        DigitsLTDataLoader(shards="t.tar")


def test_shards_in_an_object_store(tmp_path):
    """fsspec's memory stands for a store; the index lies in data_dir."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name, members in (("train-0", {"a/1.png": png(1), "b/1.png": png(2)}), ("test-0", {"a/1.png": png(3)})):
        store.pipe(f"/photos/{name}.tar", tar(tmp_path / f"{name}.tar", members).read_bytes())
    spec = {split: f"memory://photos/{split}-{{0..0}}.tar" for split in ("train", "test")}
    loader = ImageFolderLTDataLoader(str(tmp_path), shards=spec, **SMALL)
    assert np.array_equal(loader.raw_image(1), np.asarray(Image.open(io.BytesIO(png(2)))))
    assert list(tmp_path.glob("train-0..0.*.index.npz"))
    with pytest.raises(ConfigError, match=r"memory://photos/train-1.tar: no such shard"):
        ImageFolderLTDataLoader(str(tmp_path), shards="memory://photos/train-{0..1}.tar", **SMALL)
    with open_image(loader.paths[0]) as handle:
        assert handle.read() == png(1)


def test_without_fsspec_the_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ConfigError, match="pip install fsspec"):
        ImageFolderLTDataLoader(str(tmp_path), shards="s3://bucket/t-{0..1}.tar", **SMALL)


def train_on(data: Path, saved: Path, *more: str) -> Path:
    """A short training on photos; the run's folder."""
    import train as train_script
    train_script.main([
        "-c", "configs/image_folder_ride.json", "--data_dir", str(data), "-d", "cpu", "--epochs", "1",
        "--save_dir", str(saved), "--run_id", data.name, "--num_experts", "1", "--bs", "8",
        "--set", "arch.type=ResNet32Model", "--set", "data_loader.args.image_size=12",
        "--set", "data_loader.args.num_workers=0", "--set", "trainer.figures=false",
        "--set", "trainer.tensorboard=false", "--set", "trainer.amp=off", *more])
    return saved / "models" / "image_folder_ride" / data.name


def test_a_run_on_shards_has_the_figures_of_one_on_files(folder, tmp_path):
    target, spec = packed(folder)
    figures = []
    for place, more in ((folder, ()), (target, ("--set", f"data_loader.args.shards={json.dumps(spec)}"))):
        models = train_on(place, tmp_path / "saved", *more)
        figures.append(json.loads((models / "test_metrics.json").read_text()))
    for key in ("accuracy", "loss", "per_class_acc", "n_samples"):
        assert figures[0][key] == figures[1][key], key


def test_the_tool_refuses_what_it_cant_do(folder, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        shard([str(tmp_path / "gone"), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="lies in"):
        shard([str(folder), str(folder / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classes.txt").write_text("of another set\n")
    with pytest.raises(ConfigError, match=r"out: isn't empty \(classes.txt is there\); empty it or choose"):
        shard([str(folder), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--size"):
        byte_count("many")
    assert byte_count("1.5M") == 1_500_000 and byte_count("20") == 20


def test_the_tool_writes_the_index_of_shards_that_others_made(tmp_path, capsys, monkeypatch):
    tar(tmp_path / "train-0.tar", {"a/1.png": png(1), "b/1.png": png(2)})
    tar(tmp_path / "test-0.tar", {"a/2.png": png(3)})
    shard([str(tmp_path), "--index", "train-0.tar", "test-0.tar"])
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("making the index")]
    files = {path.name.split(".")[0]: path for path in tmp_path.glob("*.index.npz")}
    assert said == [f"{files['train-0']}: 2 images in 1 shards", f"{files['test-0']}: 1 images in 1 shards"]
    monkeypatch.setattr("data_loader.shards.make_index", lambda *args: pytest.fail("made again"))
    assert len(open_index("train-0.tar", str(tmp_path))) == 2
    monkeypatch.undo()
    files["train-0"].unlink()
    monkeypatch.setattr("data_loader.shards.Index.save", lambda *args: (_ for _ in ()).throw(OSError(30, "read-only")))
    with pytest.raises(ConfigError, match=r"train-0\..*index.npz: the index can't be written there"):
        shard([str(tmp_path), "--index", "train-0.tar"])


def test_the_tool_takes_either_a_place_for_shards_or_patterns(tmp_path):
    for flags, message in (([], "OUT: is missing"), (["out", "--index", "t.tar"], "OUT: out isn't used with --index")):
        with pytest.raises(ConfigError, match=message):
            shard([str(tmp_path), *flags])
    with pytest.raises(ConfigError, match="gone: no such folder; give one of shards"):
        shard([str(tmp_path / "gone"), "--index", "t.tar"])
    with pytest.raises(ConfigError, match=r"t.tar: no such shard"):
        shard([str(tmp_path), "--index", "t.tar"])


def test_a_dry_run_writes_nothing_beside_shards(folder, tmp_path):
    target, spec = packed(folder)
    for file in target.glob("*.index.npz"):
        file.unlink()
    before = sorted(os.listdir(target))
    for _ in range(2):
        train_on(target, tmp_path / "saved", "--set", f"data_loader.args.shards={json.dumps(spec)}", "--dry_run")
    assert sorted(os.listdir(target)) == before and not (tmp_path / "saved").exists()
    assert len(open_index(spec["train"], str(target))) == 20 and len(list(target.glob("*.index.npz"))) == 1
