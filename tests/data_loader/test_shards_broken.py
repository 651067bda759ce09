"""Shards that are damaged, of unusual form or replaced: never a silent loss, never the images of another set."""
from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader.data_loaders import ImageFolderLTDataLoader, ImageNetLTDataLoader, ListFileDataLoader
from data_loader.images import read_rgb, shown
from data_loader.places import file_of, member_of
from data_loader.shards import open_index
from tests.data_loader.test_shards import SMALL, equal, png, tar
from tools.shard import main as shard
from utils.errors import ConfigError


def pixels(seed: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(seed))))


# ---------------------------------------------------------------------- damage

@pytest.fixture
def whole(tmp_path) -> bytes:
    """Three images: headers at 0, 2560 and 5120, as a noisy PNG of 24 x 20 takes three blocks of 512 and a bit."""
    return tar(tmp_path / "whole.tar", {f"{c}/{n}.png": png(n) for n, c in enumerate("abc")}).read_bytes()


def second_header(content: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as packed:
        return packed.getmembers()[1].offset


@pytest.mark.parametrize("how, message", [
    ("a bit of a header", r"t.tar: damaged at byte {at}, after a/0.png; write or copy it again"),
    ("its size", r"t.tar: damaged at byte {at}, after a/0.png"),
    ("a header of zeros", r"t.tar: damaged at byte {data}, after a/0.png"),
    ("a file of zeros", r"t.tar: ends, and another tar begins at byte \d+, after a/0.png"),
    ("another tar behind it", r"t.tar: ends, and another tar begins at byte {length}, after c/2.png: .*tar -A"),
    ("rubbish behind it", r"t.tar: damaged at byte {length}, after c/2.png"),
    ("no end", r"t.tar: has no end mark; it is truncated"),
])
@pytest.mark.parametrize("place", ["", "memory://damaged/"])
def test_a_damaged_shard_is_named_with_the_place(tmp_path, whole, how, message, place):
    """tarfile takes an unreadable header for the end: the images behind it were just not there."""
    at, broken = second_header(whole), bytearray(whole)
    third = at + second_header(whole[at:])
    if how == "a bit of a header":
        broken[at + 3] ^= 1
    elif how == "its size":
        broken[at + 124:at + 136] = b"9" * 12
    elif how == "a header of zeros":
        broken[at:at + 512] = bytes(512)
    elif how == "a file of zeros":
        broken[at:third] = bytes(third - at)
    elif how == "no end":
        broken = broken[:third]
    else:
        broken += whole if how.startswith("another") else b"rubbish"
    if place:
        pytest.importorskip("fsspec").filesystem("memory").pipe("/damaged/t.tar", bytes(broken))
    else:
        (tmp_path / "t.tar").write_bytes(broken)
    with pytest.raises(ConfigError, match=message.format(at=at, data=at + 512, length=len(whole))) as caught:
        open_index(f"{place}t.tar", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_made_again(tmp_path, whole):
    """Cut at any place or with any bit turned, zipfile, zlib and NumPy raise what they like."""
    index = open_index("whole.tar", str(tmp_path))
    file, = tmp_path.glob("*.index.npz")
    good = file.read_bytes()
    for at in range(0, len(good), 131):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1:]):
            file.write_bytes(bad)
            again = open_index("whole.tar", str(tmp_path))
            assert again.paths == index.paths and again.kinds == index.kinds and again.links == 0


# ---------------------------------------------------------------------- replaced shards

def described(loader) -> bytes:
    digest = hashlib.blake2b()
    loader.describe(digest)
    return digest.digest()


@pytest.mark.parametrize("place", ["", "memory://replaced/"])
def test_a_replaced_shard_has_another_index_and_other_features(tmp_path, place):
    """With the same names, places and sizes: only the time of change tells, or what a store has in its place."""
    def write(seed):
        content = tar(tmp_path / "new" / "t.tar", {f"{c}/{n}.bmp": bytes([seed, n]) * 40
                                                   for c in "ab" for n in range(2)}).read_bytes()
        if place:
            pytest.importorskip("fsspec").filesystem("memory").pipe("/replaced/t.tar", content)
        else:
            (tmp_path / "t.tar").write_bytes(content)
            os.utime(tmp_path / "t.tar", ns=(seed, seed))
        loader = ImageFolderLTDataLoader(str(tmp_path), shards=f"{place}t.tar", image_size=72, num_workers=0)
        return described(loader), open_index(f"{place}t.tar", str(tmp_path))
    one, two = write(1), write(2)
    assert one[1].paths == two[1].paths and one[0] != two[0] and not np.array_equal(one[1].stamps, two[1].stamps)


def test_patterns_of_one_name_have_an_index_each(tmp_path):
    store = pytest.importorskip("fsspec").filesystem("memory")
    for bucket in ("one", "two"):
        store.pipe(f"/{bucket}/t.tar", tar(tmp_path / "t.tar", {f"{bucket}/1.png": png(1)}).read_bytes())
    for _ in range(2):
        for bucket in ("one", "two"):
            index = open_index(f"memory://{bucket}/t.tar", str(tmp_path))
            assert index.names == [f"{bucket}/1.png"] and index.shards == [f"memory://{bucket}/t.tar"]
    assert len(list(tmp_path.glob("t.*.index.npz"))) == 2


def test_a_store_whose_driver_isnt_fork_safe(tmp_path):
    """What the parent opened to learn the images' sizes is opened anew by a forked worker."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.asyn import AsyncFileSystem

    class Slow(AsyncFileSystem):
        protocol, cachable = "slow", True

        async def _info(self, path, **more):
            return {"name": path, "size": os.path.getsize(path), "type": "file"}

        async def _cat_file(self, path, start=None, end=None, **more):
            return Path(path).read_bytes()[start:end]

        def _open(self, path, *args, **more):
            return open(path, "rb")
    fsspec.register_implementation("slow", Slow, clobber=True)
    tar(tmp_path / "t.tar", {f"{c}/{n}.png": png(n) for c in "ab" for n in range(2)})
    loader = ImageFolderLTDataLoader(str(tmp_path), shards=f"slow://{tmp_path}/t.tar", image_size="auto", num_workers=0)
    worker = multiprocessing.get_context("fork").Process(target=read_rgb, args=(loader.paths[0],))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


# ---------------------------------------------------------------------- names

@pytest.mark.parametrize("folder, name", [("", "photos.TAR"), ("", "t.tar.0"), ("odd.tar#1", "t.tar"), ("", "plain")])
def test_shards_and_folders_of_any_name(tmp_path, folder, name):
    where = tar(tmp_path / folder / name, {"a/1.png": png(1), "b/1.png": png(2), "a/2#0+1#.png": png(3)})
    index = open_index(name, str(where.parent))
    assert [file_of(path) for path in index.paths] == [str(where)] * 3
    assert np.array_equal(np.asarray(read_rgb(index.paths[2])), pixels(2))
    assert shown(index.paths[0]) == f"{where}: a/1.png" and member_of(str(where / "x.tar#1+2#y")) is None


def test_shards_without_their_key_are_pointed_at(tmp_path):
    tar(tmp_path / "t.tar", {"a/1.png": png(1)})
    for kind in (ImageFolderLTDataLoader, ListFileDataLoader):
        with pytest.raises(ConfigError, match=r"; 1 tar files are there, like t.tar: .* data_loader.args.shards"):
            kind(str(tmp_path), **SMALL)


# ---------------------------------------------------------------------- labels

def test_labels_beside_metadata(tmp_path):
    """A .cls goes before a .json; a .json without a usable label says nothing, nor does one that is no photo's."""
    json_of = {"0": {"label": 5, "caption": "x"}, "1": {"caption": "x"}, "2": {"label": True}, "3": [1], "4": {
        "label": None, "cls": 1}, "5": {"class": "0\ud800"}}
    members = {"dataset.json": b"{\"shards\": 1}", "broken.json": b"{"}
    for key, known in json_of.items():
        members |= {f"{key}.png": png(int(key)), f"{key}.json": json.dumps(known).encode()}
        if key < "4":
            members[f"{key}.cls"] = str(int(key) % 2).encode()
    tar(tmp_path / "t.tar", members)
    index = open_index("t.tar", str(tmp_path))
    assert [index.kinds[k] for k in index.kind] == ["0", "1", "0", "1", "1", "0?"]
    assert open_index("t.tar", str(tmp_path)).kinds == ["0", "0?", "1"]
    tar(tmp_path / "f.tar", {"a/1.png": png(1), "a/1.json": b"{\"camera\": \"x\"}", "b/1.png": png(2)})
    loader = ImageFolderLTDataLoader(str(tmp_path), shards={"train": "f.tar", "test": "f.tar"}, **SMALL)
    assert loader.class_names == ["a", "b"]


def test_a_photo_without_a_label_among_others_that_have_one_is_named(tmp_path):
    """It isn't left out, and the folder in its name isn't a class beside the labels."""
    for number in range(2):
        members = {f"photos/{number}{n}.{kind}": png(10 * number + n) if kind == "png" else str(n % 2).encode()
                   for n in range(4) for kind in ("png", "cls")}
        for n in range(2 * number):
            del members[f"photos/{number}{n}.cls"]
        tar(tmp_path / f"t-{number:03d}.tar", members)
    for spec in ("t-{000..001}.tar", {"train": "t-000.tar", "test": "t-001.tar"}):
        for kind in (ImageFolderLTDataLoader, ListFileDataLoader):
            with pytest.raises(ConfigError, match=r"t-001.tar: photos/10.png has no label beside it .*, but "
                                                  r"other images .* have one; .*; 1 more have none$"):
                kind(str(tmp_path), shards=spec, **SMALL)
    tar(tmp_path / "bare.tar", {f"photos/{n}.png": png(n) for n in range(4)})
    with pytest.raises(ConfigError, match="the shards hold one class, photos; training needs two or more"):
        ImageFolderLTDataLoader(str(tmp_path), shards="bare.tar", **SMALL)


def test_a_label_is_one_photo_s(tmp_path):
    """webdataset's samples hold more than the photo, and their keys may begin anew in each shard."""
    for number in range(2):
        tar(tmp_path / f"t-{number}.tar", {name: content for n in range(3) for name, content in {
            f"{n}.seg.png": png(99), f"{n}.png": png(10 * number + n), f"{n}.cls": str(n % 2).encode()}.items()})
    loader = ImageFolderLTDataLoader(str(tmp_path), shards={"train": "t-{0,1}.tar", "test": "t-0.tar"}, **SMALL)
    assert loader.cls_num_list == [4, 2] and all(member_of(path).name in ("0.png", "1.png", "2.png")
                                                 for path in loader.paths)
    read = {read_rgb(path).tobytes() for path in loader.paths}
    assert read == {pixels(seed).tobytes() for seed in (0, 1, 2, 10, 11, 12)}
    assert any("6 images are left out, as they lie under the key of another" in note for note in loader.notes)
    (tmp_path / "train.txt").write_text("0.png 0\n1.png 1\n")
    shutil.copyfile(tmp_path / "train.txt", tmp_path / "test.txt")
    with pytest.raises(ConfigError, match=r"train.txt: 0.png is in .*t-0.tar and in .*t-1.tar; lists need"):
        ListFileDataLoader(str(tmp_path), shards="t-{0,1}.tar", **SMALL)


def test_a_stranger_among_classes_is_the_one_that_is_named(tmp_path):
    """Classes that match in another case or Unicode form are none."""
    tar(tmp_path / "train.tar", {"Ant/1.png": png(1), "b\u00e9e/1.png": png(2)})
    tar(tmp_path / "test.tar", {"ant/1.png": png(1), "be\u0301e/1.png": png(2)})
    spec = {"train": "train.tar", "test": "test.tar"}
    assert ImageFolderLTDataLoader(str(tmp_path), training=False, shards=spec, **SMALL).targets.tolist() == [0, 1]
    tar(tmp_path / "test.tar", {"ant/1.png": png(1), "be\u0301e/1.png": png(2), "yak/1.png": png(3)})
    with pytest.raises(ConfigError, match=r"yak/1.png is of class yak, which no training image has"):
        ImageFolderLTDataLoader(str(tmp_path), shards=spec, **SMALL)


# ---------------------------------------------------------------------- what the tool writes

def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(sum(name.encode())))
    return root


def trained_with(capsys) -> dict:
    """The arguments that the tool has printed."""
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("train with: ")
    return json.loads(line.partition("data_loader.args.shards=")[2].rstrip("'"))


@pytest.mark.parametrize("classes", [("1", "2", "10"), ("blue 0", "red 1"), ("0", "1", "2")])
@pytest.mark.parametrize("files", [("a.png", "b.png"), ("a.0.png", "a.1.png")])
def test_folders_of_any_name_stay_their_classes(tmp_path, capsys, classes, files):
    """Also numbers, names that end in their own number, and files that share a key and so have no .cls."""
    source = folders(tmp_path / "in", *(f"{split}/{c}/{file}" for split in ("train", "test") for c in classes
                                        for file in files))
    shard([str(source), str(tmp_path / "out")])
    equal(ImageFolderLTDataLoader(str(source), **SMALL),
          ImageFolderLTDataLoader(str(tmp_path / "out"), shards=trained_with(capsys), **SMALL), epochs=(1,))


@pytest.mark.parametrize("kind", ["beside the lists", "above the lists", "backslashes", "outside"])
def test_lists_of_any_form(tmp_path, capsys, kind):
    """The tool names images as the lists do, so that they find them again."""
    source = tmp_path / "in" / "ImageNet_LT"
    base = {"above the lists": source.parent, "outside": tmp_path}.get(kind, source)
    folders(base / "photos", *(f"{c}/{n}.png" for c in "ab" for n in range(3)))
    before = {"above the lists": "", "outside": "../../"}.get(kind, "./")
    lines = [f"{before}photos/{c}/{n}.png {'ab'.index(c)}" for c in "ab" for n in range(3)]
    source.mkdir(exist_ok=True, parents=True)
    for split, part in (("train", lines), ("test", lines[:1] + lines[-1:])):
        text = "\n".join(part).replace("/", "\\") if kind == "backslashes" else "\n".join(part)
        (source / f"ImageNet_LT_{split}.txt").write_text(text)
    root, flags = (source, ["--allow_outside"]) if kind == "outside" else (source.parent, [])
    if kind == "outside":
        with pytest.raises(ConfigError, match=r"leads outside .*--allow_outside"):
            shard([str(root), str(tmp_path / "out")])
    shard([str(root), str(tmp_path / "out"), *flags])
    equal(ImageNetLTDataLoader(str(root), allow_outside=kind == "outside", **SMALL),
          ImageNetLTDataLoader(str(tmp_path / "out"), shards=trained_with(capsys), **SMALL), epochs=(1,))


@pytest.mark.parametrize("line, message", [
    ("photos/.x.png 1", r"train.txt, line 3: photos/.x.png wouldn't be found in a shard"),
    ("photos/x.heic 1", r"train.txt, line 3: photos/x.heic wouldn't be found in a shard"),
    ("./photos/0.png 1", r"line 3: ./photos/0.png and photos/0.png would both be photos/0.png"),
])
def test_a_listed_image_that_shards_cant_name(tmp_path, line, message):
    source = folders(tmp_path / "in", "photos/0.png", "photos/1.png", "photos/.x.png", "photos/x.heic")
    (source / "test.txt").write_text("photos/0.png 0\nphotos/1.png 1\n")
    (source / "train.txt").write_text(f"photos/0.png 0\nphotos/1.png 1\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        shard([str(source), str(tmp_path / "out")])


def test_an_interrupted_set_isnt_taken_for_a_whole_one(tmp_path, monkeypatch, capsys):
    source = folders(tmp_path / "in", *(f"{c}/{n}.png" for c in "ab" for n in range(3)))
    out, replace = tmp_path / "out", os.replace

    def killed(old, new):
        if Path(new).name == "train-00001.tar":
            shutil.copytree(out / ".unfinished", tmp_path / "left")     # as a SIGKILL would leave it
            raise KeyboardInterrupt
        replace(old, new)
    monkeypatch.setattr("utils.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        shard([str(source), str(out), "--size", "2K"])
    assert not any(out.iterdir())
    monkeypatch.undo()
    shutil.copytree(tmp_path / "left", out / ".unfinished")
    shard([str(source), str(out), "--size", "100K"])
    assert ".unfinished: of a run that was interrupted, is removed" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir() if file.suffix != ".npz") == ["classes.txt", "train-00000.tar"]


def test_class_names_that_no_list_can_hold(tmp_path):
    source = folders(tmp_path / "in", "a/1.png", "b\n c/1.png")
    with pytest.raises(ConfigError, match=r"'b\\n c': no name for a line of classes.txt; rename the class"):
        shard([str(source), str(tmp_path / "out")])
    assert not any((tmp_path / "out").iterdir())
