"""What is in one shard: where its images are, and what the .cls and .json members beside them say."""
from __future__ import annotations

import json
import posixpath
import tarfile
from dataclasses import dataclass, field
from typing import BinaryIO

from data_loader.images import EXTENSIONS, is_system
from data_loader.places import key_of, name_in_shard, remote
from utils.errors import ConfigError

JSON_KEYS = ("label", "cls", "class")
AGAIN = "write or copy it again"
BLOCK = 1 << 20
#: In place of a label's number: an image that has none; one under the key of a labelled photo that isn't the photo
#: (`1.seg.png` beside `1.jpg`); several under one label, of which none is the photo more than another.
UNLABELLED, BESIDE, UNCLEAR = -1, -2, -3


@dataclass
class Contents:
    """images: (name, first byte, bytes). labels: of each image its text, or one of UNLABELLED, BESIDE and UNCLEAR.
    links: how many images are links to other members, which have no bytes of their own."""

    images: list[tuple[str, int, int]] = field(default_factory=list)
    labels: list[str | int] = field(default_factory=list)
    links: int = 0


def is_member(name: str) -> bool:
    """Whether a name in a shard is taken for an image's: by its ending, and unless a system has left it there."""
    return _ending(name) in EXTENSIONS


def _ending(name: str) -> str:
    """In lower case with its dot; "" of hidden files and what systems leave."""
    return "" if any(is_system(part) for part in name.split("/")) else posixpath.splitext(name)[1].lower()


def read_tar(shard: str, length: int) -> Contents:
    """Read the headers, and the labels, of a shard of `length` bytes.

    Raises ConfigError naming the shard: it can't be read, is compressed, truncated, or damaged anywhere but within an
    image's own bytes.
    """
    found, texts = Contents(), {".cls": {}, ".json": {}}
    try:
        with _stream(shard) as handle:
            if handle.read(2) == b"\x1f\x8b":
                raise ConfigError(f"{shard}: is compressed, so images can't be read by position; unpack it with gunzip")
            handle.seek(0)
            _read(handle, shard, length, found, texts)
    except ConfigError:
        raise
    except Exception as error:
        if "://" not in shard and not isinstance(error, OSError):
            raise
        # Stores' drivers have exceptions of their own.
        raise ConfigError(f"{shard}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    # A .json may be anything that is known of a photo, so the .cls goes before it.
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
        tar = tarfile.open(fileobj=handle, mode="r:")  # noqa: SIM115 it owns nothing
        for member in tar:
            tar.members = []  # else it keeps them all
            last = name = name_in_shard(member.name)
            ending = _ending(name)
            if member.isfile() and member.offset_data + member.size > length:
                raise ConfigError(f"{shard}: ends within {name}; it is truncated, {AGAIN}")
            if ending in EXTENSIONS:
                if member.issparse():
                    raise ConfigError(f"{shard}: {name} is stored without its zeros; write it without tar's --sparse")
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
    """tarfile takes a header that it can't read, and the end of the file too, for the tar's end: images behind it would
    just be missing. A tar ends with zeros.

    Two tars joined by `cat` are refused as well, since one whose middle was overwritten by zeros looks the same.
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
    """The text of a .cls; of a .json what it has as label, if that is a text or a whole number. "" where there is none.
    """
    try:
        text = content.decode("utf-8-sig")
        known = json.loads(text) if ending == ".json" else {"label": text}
    except (ValueError, RecursionError):
        return ""
    values = [known[key] for key in JSON_KEYS if key in known] if isinstance(known, dict) else []
    texts = (str(value).strip() for value in values if isinstance(value, str | int) and not isinstance(value, bool))
    # JSON can spell halves of characters, which no file can hold.
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
            # webdataset calls `1.jpg` jpg and `1.seg.png` seg.png: what has no name but its format's is the photo.
            plain = [at for at in own if "." not in names[at][len(key) + 1:]]
            for at in own:
                if len(plain) != 1 or at != plain[0]:
                    labels[at] = BESIDE if len(plain) == 1 else UNCLEAR
    return labels
