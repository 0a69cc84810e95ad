"""Data sets of a few small images and captions, changed at random, also within the headers of the images."""

import random
import struct
import zlib
from functools import cache

from PIL import Image, ImageCms

from checks.mutations import NUMBERS, Entries, changed_bytes, changed_entries, packed
from tests.support.samples import encoded, picture

GOOD_CAPTIONS = [b"<>", b"[trigger]", b"", b"\xef\xbb\xbfa", b"plain"]
OTHER_CAPTIONS = {  # of the image with this number
    ".caption": b"a caption",
    ".json": b'{"caption": "a <zwx>"}',
    ".png.txt": "caf\u00e9".encode("utf-16"),
}
TABLES = {
    "metadata.jsonl": b'{"file_name": "0.png", "text": "a"}\n{"image": "1.png", "prompt": "b"}\n',
    "metadata.csv": b'file_name,text\n0.png,"a, b"\n1.png,c\n',
}
LEGACY_NAMES = [b"\x8d\x5c.png", b"\x94\x5c\\1.png", "\u0444\u043e\u0442\u043e.png".encode("cp866"), b"\xff\x5c..png"]
BAD_CAPTIONS = [b"\xff", b"a\0b", b"x" * 70_000]


@cache
def _images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a description"
    plain = picture(72, 64)
    kinds: dict[str, bytes] = {
        "rgb.png": encoded(plain),
        "rgb.jpg": encoded(plain, "JPEG", exif=exif),
        "rgb.webp": encoded(plain, "WEBP"),
    }
    for mode in ("RGBA", "LA", "L", "1", "P", "I;16"):
        kinds[f"{mode[0]}{len(mode)}.png"] = encoded(
            plain.convert("L").convert(mode) if mode == "I;16" else plain.convert(mode), exif=exif
        )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("BMP", "TIFF", "GIF", "AVIF", "HEIF"):
        kinds[f"other.{kind.lower()}"] = encoded(plain, kind)
    kinds |= {"profile.png": encoded(plain, icc_profile=profile), "profile.jpg": encoded(plain, "JPEG", icc_profile=profile)}
    kinds["cmyk.jpg"] = encoded(plain.convert("CMYK"), "JPEG")
    kinds["progressive.jpg"] = encoded(plain, "JPEG", progressive=True)
    moving = {"save_all": True, "append_images": [picture(72, 64, seed=1)]}
    kinds |= {"moving.png": encoded(plain, **moving), "moving.webp": encoded(plain, "WEBP", **moving, exif=exif)}
    return kinds


def mutated_dataset(seed: int) -> bytes:
    """A data set of a few small images and captions in which something is different."""
    rng = random.Random(f"dataset {seed}")
    entries: Entries = [("0.png", _images()["rgb.png"]), ("0.txt", "a photo of <zwx>, caf\u00e9".encode())]
    for number in range(1, rng.choice([2, 3, 4])):
        kind = rng.choice(sorted(_images()))
        content = _images()[kind]
        entries.append((f"{number}.{kind.split('.')[1]}", _changed_image(content, rng, rng.choice([0, 0, 1, 1, 2, 3]))))
        entries.append(
            (
                f"{number}.txt",
                rng.choice(GOOD_CAPTIONS if rng.random() < 0.93 else BAD_CAPTIONS),
            )
        )
        if rng.random() < 0.2:
            ending = rng.choice(sorted(OTHER_CAPTIONS))
            text = OTHER_CAPTIONS[ending]
            entries.append((f"{number}{ending}", changed_bytes(text, rng) if rng.random() < 0.4 else text))
    if rng.random() < 0.2:
        table = rng.choice(sorted(TABLES))
        entries.append((table, changed_bytes(TABLES[table], rng) if rng.random() < 0.5 else TABLES[table]))
    if rng.random() < 0.1:
        inner = packed(entries, rng)
        entries = [("inner.zip", inner)]
    content = packed(changed_entries(entries, rng) if rng.random() < 0.3 else entries, rng)
    if rng.random() < 0.15:  # in both headers of the entry, without the flag for UTF-8
        name = rng.choice(LEGACY_NAMES)
        content = content.replace(b"0.png", name[:5].ljust(5, b"x"))
    return changed_bytes(content, rng) if rng.random() < 0.2 else content


def _changed_image(content: bytes, rng: random.Random, times: int) -> bytes:
    for _ in range(times):
        content = _changed_once(content, rng)
    return content


def _changed_once(content: bytes, rng: random.Random) -> bytes:
    """The image with bytes changed, or with a field of its headers overwritten and the checksum put right."""
    if content.startswith(b"\x89PNG") and rng.random() < 0.7:
        chunks, place = [], 8
        while place + 12 <= len(content):
            (length,) = struct.unpack(">I", content[place : place + 4])
            chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
            place += 12 + length
        if not chunks:
            return content
        number = rng.choice([0, rng.randrange(len(chunks))])
        kind, data = chunks[number]
        if number == 0:  # IHDR: width, height, depth, color type, compression, filter, interlace
            field = rng.choice([0, 4, 8, 9, 10, 11, 12])
            value = struct.pack(">I", rng.choice(NUMBERS)) if field < 8 else bytes([rng.choice([0, 1, 2, 3, 4, 6, 8, 16])])
            data = data[:field] + value + data[field + len(value) :]
        else:
            data = changed_bytes(data, rng)
        chunks[number] = (kind, data)
        if rng.random() < 0.2:
            chunks.insert(
                rng.randrange(len(chunks)) + 1,
                (
                    rng.choice([b"tEXt", b"zTXt", b"iCCP", b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"iTXt"]),
                    rng.randbytes(rng.choice([0, 1, 8, 26])),
                ),
            )
        return content[:8] + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
        )
    for signature in (b"ICC_PROFILE", b"ftyp", b"\xff\xc0", b"\xff\xc2", b"VP8X", b"Exif", b"ANMF"):
        if signature in content and rng.random() < 0.5:
            place = content.index(signature) + len(signature) + rng.randrange(16)
            return content[:place] + rng.choice([b"\0", b"\xff", b"\xff\xff", rng.randbytes(2)]) + content[place + 1 :]
    return changed_bytes(content, rng)
