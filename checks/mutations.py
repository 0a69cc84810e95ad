"""Archives and configuration files changed at random; the same seed gives the same bytes."""

import gzip
import io
import random
import struct
import tarfile
import zipfile

Entries = list[tuple[str, bytes]]

NAMES = ["../x", "/etc/x", "C:\\x.png", "a\\b.png", "a\0b", "a\nb.png", "\x1b[31m.txt", "e\u0301.png", "\u00e9.png", "x" * 300]
NAMES += [
    "",
    ".",
    "./0.png",
    "0.PNG",
    "__MACOSX/x",
    "\u202e.png",
    "inner.zip",
    "folder/",
    "embeddings/",
    "meta.json",
    "embeddings/a",
]
PAX_KEYS = ["size", "path", "mtime", "GNU.sparse.map", "GNU.sparse.size", "hdrcharset"]
PAX_KEYS += ["GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize"]
NUMBERS = [0, 1, 2, 7, 8, 31, 32, 64, 255, 10_000, 20_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1]
SCALARS = ["null", "~", "true", "-1", "0", "1e400", "9" * 5000, "0x" + "f" * 5000, ".nan", ".inf", "1:1:1:1:1.5", "2020-99-99"]
SCALARS += [
    "2020-01-01",
    "[]",
    "{}",
    "{a: {b: [1]}}",
    "[64, 128]",
    "'64,64'",
    '"\\e[31m\\0"',
    '"\\ud800"',
    "!!int ''",
    "!!bool x",
    "*a",
]
SCALARS += [
    "&a b",
    "[" * 900,
    "{" * 400,
    "x" * 30_000,
    "1" + ":1" * 5000 + ".5",
    "!!python/name:os.x",
    "? a",
    "<zwx>",
    "'<a>,<b>'",
    "|\n  a\n  b",
]
LAUGHS = "a: &a {k: 1}\nb: &b {<<: [*a,*a,*a,*a,*a,*a,*a,*a]}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join(['*' + old] * 8)}]}}\n" for old, new in zip("bcdefgh", "cdefghi", strict=True)
)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with bytes flipped, cut off, put in, left out, repeated or set to zero somewhere."""
    if not content:
        return rng.randbytes(rng.randrange(20))
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 2, 4, 16, 200]))
    piece = content[start:end]
    kind = rng.randrange(7)
    if kind == 0:
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 30])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return content[:start]
    new = {2: rng.randbytes(len(piece)) + piece, 3: b"", 4: piece * 2, 5: bytes(len(piece)), 6: b"\xff" * len(piece)}[kind]
    return content[:start] + new + content[end:]


def changed_entries(entries: Entries, rng: random.Random) -> Entries:
    """The entries with one dropped, repeated, renamed, changed, emptied, or its content swapped with another's."""
    entries = list(entries)
    one, other = rng.randrange(len(entries)), rng.randrange(len(entries))
    name, content = entries[one]
    kind = rng.randrange(7)
    if kind == 0:
        del entries[one]
    elif kind == 1:
        entries.append((rng.choice([name, name.upper(), "./" + name, rng.choice(NAMES)]), content))
    elif kind == 2:
        entries[one] = (rng.choice([rng.choice(NAMES), name.upper(), "folder/" + name, entries[other][0]]), content)
    elif kind == 3:
        entries[one] = (name, changed_bytes(content, rng))
    elif kind == 4:
        entries[one] = (name, rng.choice([b"", bytes(70_000), b"\xff\xfe", b"PK\x03\x04" + bytes(50)]))
    else:
        entries[one], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    return entries


def packed(entries: Entries, rng: random.Random) -> bytes:
    """The entries as a zip, tar or tar.gz, some with changed headers or links."""
    file = io.BytesIO()
    kind = rng.choice(["zip", "zip", "tar", "tar.gz"])
    if kind == "zip":
        compression = rng.choice([zipfile.ZIP_STORED] * 15 + [zipfile.ZIP_DEFLATED] * 15 + [zipfile.ZIP_BZIP2])
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in entries:
                archive.writestr(zipfile.ZipInfo(name or "x"), content, compression)
        return _changed_zip(file.getvalue(), rng) if rng.random() < 0.3 else file.getvalue()
    with tarfile.open(fileobj=file, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        odd = rng.randrange(len(entries)) if entries and rng.random() < 0.3 else -1
        for number, (name, content) in enumerate(entries):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if number == odd:
                entry.type = rng.choice(
                    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.XHDTYPE, b"S", b"Z", b"L"]
                )
                entry.linkname = "/etc/hostname"
                entry.pax_headers = {
                    rng.choice(PAX_KEYS): rng.choice(["1", "0", "-1", "9" * 30, "x", "1,2", "\0"]) for _ in range(2)
                }
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(file.getvalue(), 1) if kind == "tar.gz" else file.getvalue()


def _changed_zip(content: bytes, rng: random.Random) -> bytes:
    """The zip with one or two fields of its headers (APPNOTE.TXT 4.3) overwritten."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2])):
        signature, length = rng.choice([(b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22)])
        places = [place for place in range(len(content) - length) if content.startswith(signature, place)] or [0]
        place, width = rng.choice(places) + rng.randrange(4, length - 3), rng.choice([1, 2, 4])
        changed[place : place + width] = struct.pack("<Q", rng.choice([*NUMBERS, rng.getrandbits(32)]))[:width]
    return bytes(changed)


def mutated_yaml(valid: str, seed: int) -> bytes:
    """A configuration file in which something is different."""
    rng = random.Random(f"yaml {seed}")
    lines = valid.strip().splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        one, kind = rng.randrange(len(lines)), rng.choice([0, 1, 2, 3, 4, 4, 4, 4, 4, 4])
        if kind == 0 and len(lines) > 1:
            del lines[one]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines)), lines[one])
        elif kind == 2:
            lines[one] = rng.choice(["", " ", "\t", "   "]) + lines[one].strip()
        elif kind == 3:
            lines[one] = rng.choice(
                [
                    "  <<: *a",
                    "  ? [a, b]\n  : 1",
                    "  1: 2",
                    "x:",
                    "- a",
                    "---",
                    "  null: 1",
                    "\\",
                    "%YAML 9.9",
                    "  " + "k" * 3000 + ": 1",
                ]
            )
        else:
            lines[one] = f"{lines[one].split(':')[0]}: {rng.choice(SCALARS)}"
    text = LAUGHS if rng.random() < 0.01 else "\n".join(lines)
    content = text.encode(rng.choice(["utf-8"] * 20 + ["utf-16", "latin-1"]), "replace")
    return changed_bytes(content, rng) if rng.random() < 0.2 else content
