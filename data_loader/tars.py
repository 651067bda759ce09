"""Reading one shard's headers: the positions of its images, and their labels from .cls and .json members."""
from __future__ import annotations

import json
import posixpath
import re
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO

from data_loader.images import EXTENSIONS, is_system
from data_loader.places import key_of, name_in_shard, remote
from utils.errors import ConfigError

JSON_KEYS = ("label", "cls", "class")
AGAIN = "write or copy it again"
BLOCK = 1 << 20
#: How compressed files begin, each with its format and the command that decompresses it.
COMPRESSED = (
    (re.compile(rb"\x1f\x8b"), "gzip", "gunzip"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2", "bunzip2"),   # a tar may begin with a file called BZh1
    (re.compile(rb"\xfd7zXZ\0"), "xz", "unxz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd", "unzstd"),
)
#: In place of a label: the image has none; it shares the key of a labelled photo but isn't that photo (`1.seg.png`
#: beside `1.jpg`); several images share one label, and it isn't clear which of them is the photo.
UNLABELLED, BESIDE, UNCLEAR = -1, -2, -3


@dataclass
class Contents:
    """The images in one shard.

    images: (name, offset of the first byte, number of bytes) each. labels: for each image the label's text, or one of
    UNLABELLED, BESIDE and UNCLEAR. links: how many images are links to other members, without bytes of their own.
    """

    images: list[tuple[str, int, int]] = field(default_factory=list)
    labels: list[str | int] = field(default_factory=list)
    links: int = 0


def is_member(name: str) -> bool:
    """Whether a member of this name counts as an image: it has an image's extension and isn't a system file."""
    return _ending(name) in EXTENSIONS


def _ending(name: str) -> str:
    """The extension in lower case with its dot; "" for hidden and system files."""
    return "" if any(is_system(part) for part in name.split("/")) else posixpath.splitext(name)[1].lower()


def read_tar(shard: str, length: int) -> Contents:
    """Read the headers and labels of a shard (path or URL) of `length` bytes.

    Raises ConfigError, naming the shard, if it can't be read, is compressed, truncated, or damaged anywhere except
    within an image's own bytes, or if an image has two labels.
    """
    found, texts = Contents(), {".cls": {}, ".json": {}}
    try:
        with _stream(shard) as handle:
            start = handle.read(16)
            for begins, form, undo in COMPRESSED:
                if begins.match(start):
                    raise ConfigError(f"{shard}: is compressed ({form}), so images can't be read by position: "
                                      f"{undo} it, or unpack it (tar -xf) and pack the folder with tools.shard")
            handle.seek(0)
            _read(handle, shard, length, found, texts)
    except ConfigError:
        raise
    except Exception as error:
        if "://" not in shard and not isinstance(error, OSError):
            raise
        # Object stores' drivers have their own exception classes.
        raise ConfigError(f"{shard}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    # A .json may hold any information about a photo, so a .cls takes precedence.
    found.labels = _labels([name for name, _, _ in found.images], texts[".json"] | texts[".cls"])
    return found


def _stream(shard: str) -> BinaryIO:
    if "://" not in shard:
        return open(shard, "rb")
    system, path = remote(shard)
    return system.open(path, "rb")


def _read(handle: BinaryIO, shard: str, length: int, found: Contents, texts: dict[str, dict[str, str]]) -> None:
    tar, last = None, None
    try:
        tar = tarfile.open(fileobj=handle, mode="r:")  # noqa: SIM115 the caller closes `handle`
        for member in tar:
            tar.members = []  # otherwise it would keep them all
            last = name = name_in_shard(member.name)
            ending = _ending(name)
            if member.issparse():   # its size is that with the zeros
                if ending in EXTENSIONS:
                    raise ConfigError(f"{shard}: {name} is stored without its zeros; write the shard without tar's "
                                      "--sparse, or unpack it (tar -xf) and pack the folder with tools.shard")
            elif member.isfile() and member.offset_data + member.size > length:
                raise ConfigError(f"{shard}: ends within {name}; it is truncated, {AGAIN}")
            if ending in EXTENSIONS:
                found.links += member.islnk() or member.issym()
                if member.isfile():
                    found.images.append((name, member.offset_data, member.size))
            elif ending in texts and member.isfile():
                text = _label(tar.extractfile(member).read(), ending)
                if not text and ending == ".cls":
                    raise ConfigError(f"{shard}: {name}: holds no label; a .cls is a class's number or name")
                if text and texts[ending].setdefault(key_of(name), text) != text:
                    raise ConfigError(f"{shard}: {name} gives {key_of(name)} another label than before")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if tar is None or last is None:
            raise ConfigError(f"{shard}: damaged or not a tar file ({error}); {AGAIN}") from None
        raise ConfigError(f"{shard}: damaged at byte {tar.offset}, after {last} ({error}); {AGAIN}") from None
    _check_end(handle, shard, tar.offset, length, last)


def _check_end(handle: BinaryIO, shard: str, end: int, length: int, last: str | None) -> None:
    """Raises ConfigError unless there are only zeros, at least one, from byte `end` on, as at the end of a whole tar.

    tarfile silently treats an unreadable header, or the end of the file, as the end of the tar, so that images after it
    would be missing. Two tars joined by `cat` are refused too: a tar partly overwritten with zeros looks the same.
    """
    if end >= length:
        raise ConfigError(f"{shard}: has no end mark; it is truncated, {AGAIN}")
    handle.seek(end)
    at = end
    while block := handle.read(BLOCK):
        rest = block.lstrip(b"\0")
        at += len(block) - len(rest)
        if rest:
            where = f"at byte {at}, after {last}" if last else f"at byte {at}"
            if at - end >= tarfile.BLOCKSIZE and at % tarfile.BLOCKSIZE == 0 and _is_header(rest):
                raise ConfigError(f"{shard}: ends, and another tar begins {where}: two were joined (join them with tar "
                                  f"-A, or give both), or zeros were written over it ({AGAIN})")
            raise ConfigError(f"{shard}: damaged {where}; {AGAIN}")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block[:tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _label(content: bytes, ending: str) -> str:
    """The text of a .cls, or the value of a .json's first key in JSON_KEYS that is a string or integer; "" if none."""
    try:
        text = content.decode("utf-8-sig")
        known = json.loads(text) if ending == ".json" else {"label": text}
    except (ValueError, RecursionError):
        return ""
    values = [known[key] for key in JSON_KEYS if key in known] if isinstance(known, dict) else []
    texts = (str(value).strip() for value in values if isinstance(value, str | int) and not isinstance(value, bool))
    # JSON can contain lone surrogates, which can't be encoded.
    return next((text.encode("utf-8", "replace").decode() for text in texts if text), "")


def _labels(names: list[str], texts: dict[str, str]) -> list[str | int]:
    keys = [key_of(name) for name in names]
    labels: list[str | int] = [texts.get(key, UNLABELLED) for key in keys]
    of_key: dict[str, list[int]] = {}
    for at, label in enumerate(labels):
        if label != UNLABELLED:
            of_key.setdefault(keys[at], []).append(at)
    for key, own in of_key.items():
        if len(own) > 1:
            # webdataset's names within a sample: `1.jpg` is jpg, `1.seg.png` is seg.png. The photo is the plain one.
            plain = [at for at in own if "." not in names[at][len(key) + 1:]]
            for at in own:
                if len(plain) != 1 or at != plain[0]:
                    labels[at] = BESIDE if len(plain) == 1 else UNCLEAR
    return labels
