"""Streams that a hostile guest may send to a copy, each with what has to be said of it."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

BLOCK_BYTES = 512


@dataclass(frozen=True)
class Hostile:
    """One stream; `says` is in the error that refuses it."""

    name: str
    stream: bytes
    says: str


class Maker:
    """A tar stream entry by entry, each as wrong as asked for."""

    def __init__(self, with_top: bool = True) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.open(  # noqa: SIM115 - it is closed in `end`
            fileobj=self._out, mode="w", format=tarfile.PAX_FORMAT
        )
        if with_top:
            self.add("top", tarfile.DIRTYPE)

    def add(
        self, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **more: object
    ) -> Maker:
        """Add an entry; `more` are attributes of its header."""
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode = kind, len(data), 0o755
        for key, value in more.items():
            setattr(info, key, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def end(self) -> bytes:
        """The stream with its end."""
        self._tar.close()
        return self._out.getvalue()

    def torn(self) -> bytes:
        """The stream without its end."""
        return self._out.getvalue()


def _entry(*words: object, **more: object) -> bytes:
    return Maker().add(*words, **more).end()  # type: ignore[arg-type]


def _symlink_then_write() -> bytes:
    made = Maker().add("top/way", tarfile.SYMTYPE, linkname="../..")
    return made.add("top/way/victim", data=b"owned").end()


def _symlink_top_then_write() -> bytes:
    made = Maker(with_top=False).add("top", tarfile.SYMTYPE, linkname="..")
    return made.add("top/victim", data=b"owned").end()


def _directory_then_link_then_write() -> bytes:
    made = Maker().add("top/d", tarfile.DIRTYPE)
    made.add("top/d", tarfile.SYMTYPE, linkname="/tmp")
    return made.add("top/d/victim", data=b"owned").end()


def _bad_sum() -> bytes:
    stream = bytearray(_entry("top/file", data=b"x"))
    stream[2 * BLOCK_BYTES - 100] ^= 1
    return bytes(stream)


def _pax(keyword: str, value: str) -> bytes:
    return _entry("top/file", data=b"x", pax_headers={keyword: value})


def _long_header() -> bytes:
    return _pax("comment", "x" * 100_000)


def _lying_size() -> bytes:
    # A size that the stream does not have: what follows is taken for data until there is no more.
    return Maker().add("top/file", size=0).torn() + _raw_header("top/lie", b"77777777777\0")


def _raw_header(name: str, size: bytes) -> bytes:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _sparse(realsize: str, text: bytes, **more: str) -> bytes:
    headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "top/holes",
        "GNU.sparse.realsize": realsize, **more,
    }  # fmt: skip
    data = text.ljust(BLOCK_BYTES, b"\0")
    return _entry("top/holes", data=data, pax_headers=headers)


def hostile_streams() -> list[Hostile]:
    """All of them."""
    made = {
        "absolute": (_entry("/etc/victim", data=b"x"), "absolute"),
        "parent": (_entry("top/../../victim", data=b"x"), ".."),
        "bare parent": (_entry("..", tarfile.DIRTYPE), ".."),
        "dot inside": (_entry("top/./victim", data=b"x"), "."),
        "empty part": (_entry("top//victim", data=b"x"), "empty"),
        "beside the top": (_entry("victim", data=b"x"), "not below"),
        "through a link": (_symlink_then_write(), "no directory"),
        "top is a link": (_symlink_top_then_write(), "no directory"),
        "directory becomes link": (_directory_then_link_then_write(), "twice"),
        "no directory": (_entry("top/none/victim", data=b"x"), "not in the stream"),
        "below a file": (Maker().add("top/f").add("top/f/x").end(), "no directory"),
        "twice": (Maker().add("top/f").add("top/f").end(), "twice"),
        "device": (_entry("top/null", tarfile.CHRTYPE, devmajor=1, devminor=3), "device"),
        "block device": (_entry("top/sda", tarfile.BLKTYPE, devmajor=8), "device"),
        "pipe": (_entry("top/pipe", tarfile.FIFOTYPE), "named pipe"),
        "unknown kind": (_entry("top/odd", b"Z"), "not known"),
        "hard link outside": (_entry("top/h", tarfile.LNKTYPE, linkname="/etc/passwd"), "absolute"),
        "hard link up": (_entry("top/h", tarfile.LNKTYPE, linkname="top/../../x"), ".."),
        "hard link to nothing": (_entry("top/h", tarfile.LNKTYPE, linkname="top/no"), "no file"),
        "hard link to a link": (
            Maker().add("top/s", tarfile.SYMTYPE, linkname="/etc/passwd")
            .add("top/h", tarfile.LNKTYPE, linkname="top/s").end(), "no file",
        ),
        "empty link": (_entry("top/s", tarfile.SYMTYPE, linkname=""), "target"),
        "long link": (_entry("top/s", tarfile.SYMTYPE, linkname="x" * 5000), "target"),
        "long part": (_entry("top/" + "x" * 256, data=b"x"), "longer than 255"),
        "long name": (_entry("top" + "/x" * 2100, data=b"x"), "longer than 4095"),
        "deep": (_entry("top/" + "d/" * 300 + "x", data=b"x"), "directories deep"),
        "escape in a name": (_entry("top/\x1b]52;c;eA==\x07/..", data=b"x"), "\\x1b]52"),
        "cut in a header": (_entry("top/f", data=b"x")[:700], "ends before its end"),
        "cut in data": (_entry("top/f", data=b"x" * 5000)[:3000], "ends before its end"),
        "without an end": (Maker().add("top/f").torn(), "ends before its end"),
        "nothing": (b"", "ends before its end"),
        "only an end": (bytes(2 * BLOCK_BYTES), "empty"),
        "garbage": (bytes(range(256)) * 20, "no tar header"),
        "bad sum": (_bad_sum(), "no tar header"),
        "behind the end": (_entry("top/f") + b"more", "behind the end"),
        "lying size": (_lying_size(), "ends before its end"),
        "size beyond all": (_pax("size", str(1 << 60)), "larger than"),
        "size no number": (_pax("size", "-1"), "no number"),
        "owner no number": (_pax("uid", "4294967295"), "owner"),
        "long header": (_long_header(), "larger than"),
        "holes contradict": (_sparse("100", b"2\n50\n10\n0\n10\n"), "contradicts"),
        "holes too long": (_sparse("100", b"99999999\n"), "too long"),
        "holes no numbers": (_sparse("100", b"x\n"), "numbers"),
        "holes beyond": (_sparse("10", b"1\n5\n100\n"), "contradicts"),
        "holes larger than all": (_sparse(str(1 << 60), b"0\n"), "larger than"),
        "other holes": (_pax("GNU.sparse.map", "0,1"), "sparse"),
    }  # fmt: skip
    return [Hostile(name, stream, says) for name, (stream, says) in made.items()]
