"""The names in a zip archive: UTF-8, or a code page that has to be found out, in which 0x5C may be half a character."""

import re
import zipfile
import zlib
from collections.abc import Sequence

from charset_normalizer import from_bytes

UTF8_FLAG = 0x800  # APPNOTE.TXT 4.4.4, bit 11
# Windows Explorer and older tools write names in the code page of their system, without saying which.
CODE_PAGES = ["cp932", "big5", "gbk", "cp949", "cp866", "cp437"]


def zip_names(infos: Sequence[zipfile.ZipInfo]) -> list[str]:
    """The names of the entries in their order, with `/` between folders also where PowerShell wrote a backslash."""
    raw = [_raw(info) for info in infos]
    legacy = [name for name in raw if isinstance(name, bytes)]
    decoded = _decoded(legacy) if legacy else {}
    return [decoded[name] if isinstance(name, bytes) else name.replace("\\", "/") for name in raw]


def _raw(info: zipfile.ZipInfo) -> str | bytes:
    """The name, or its bytes where nothing says how to read them; zipfile has read those as cp437."""
    if info.flag_bits & UTF8_FLAG:
        return info.orig_filename
    content = info.orig_filename.encode("cp437")
    content = _unicode_path(info.extra, content) or content
    if content.isascii():
        return content.decode("ascii")
    try:
        return content.decode("utf-8")  # macOS writes UTF-8 without the flag
    except UnicodeDecodeError:
        # A backslash behind a byte of 0x80 or more may be half a character of cp932, big5 or gbk: it is part of the name.
        return re.sub(rb"(?<![\x80-\xff])\\", b"/", content)


def _unicode_path(extra: bytes, name: bytes) -> bytes | None:
    """The name in UTF-8 that Info-ZIP's and WinRAR's extra field holds beside one in a code page (APPNOTE.TXT 4.6.9)."""
    while len(extra) >= 4:
        kind, size = (int.from_bytes(extra[i : i + 2], "little") for i in (0, 2))
        field = extra[4 : 4 + size]
        if kind == 0x7075 and field[:1] == b"\x01" and field[1:5] == zlib.crc32(name).to_bytes(4, "little"):
            return field[5:]
        extra = extra[4 + size :]
    return None


def _decoded(names: list[bytes]) -> dict[bytes, str]:
    """The names in the code page that makes most of all of them, in cp437, the zip format's own, where none fits."""
    best = from_bytes(b"\n".join(dict.fromkeys(names)), cp_isolation=CODE_PAGES, threshold=0.5).best()
    for encoding in (best.encoding if best else "cp437", "cp437"):
        try:
            found = {name: name.decode(encoding) for name in names}
            if best:  # what is half a character has been read as such
                found = {name: text.replace("\\", "/") for name, text in found.items()}
        except UnicodeDecodeError:
            continue
        if len({*found.values()}) == len(found):
            break
    return found
