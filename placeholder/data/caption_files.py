"""The caption files of a data set: which there are, whose they are, and the text in them (docs/captions.md)."""

import csv
import io
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from placeholder.data.entries import Archive
from placeholder.errors import label, listed

SUFFIXES = (".txt", ".caption", ".json")  # of a file beside its image; the earlier one counts where there are several
TABLES = ("metadata.jsonl", "metadata.csv")  # as Hugging Face's datasets reads them, for the images without such a file
OTHER_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")  # suffixes of tables that are not read under other names
DELIMITERS = ",;\t"
FILE_COLUMNS, TEXT_COLUMNS = ("file_name", "image", "file"), ("text", "caption", "prompt")
MAX_CAPTION_BYTES, MAX_JSON_BYTES = 64 * 1024, 8 * 1024**2  # of a caption alone, and of JSON with other things
MAX_TABLE_BYTES = 64 * 1024**2
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
NO_IMAGE = "a caption without an image of that name"
OTHER_FILE, EMPTY = "its image has a caption of another file", "an empty caption"


@dataclass
class CaptionFiles:
    """What the caption files say: a text by image, and the files that were not used, with the reason."""

    names: list[str]
    texts: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """A line where caption files are not used, or not all of their rows, though nothing stands in their place."""
        expected = (OTHER_FILE, EMPTY) if self.texts else ()
        unused = [name for name in self.names if name in self.skipped and self.skipped[name] not in expected]
        if not unused:
            return []
        reasons = listed([f"{label(name)}: {self.skipped[name]}" for name in unused], 3)
        return [f"Warning: {len(unused)} of {len(self.names)} caption files not used, or not in full: {reasons}"]


def is_caption_file(name: str) -> bool:
    """Whether a file of this name is read as a caption or as a table of them."""
    return name.lower().endswith(SUFFIXES + OTHER_TABLES)


def read_captions(archive: Archive, names: list[str], images: list[str]) -> CaptionFiles:
    """The captions of the images in the files of these names.

    Raises one ValueError for all files that are too large or hold no text, and one for a table that cannot be read.
    """
    found, wrong = CaptionFiles(names), {}
    tables = [name for name in names if name.lower().endswith(OTHER_TABLES)]
    found.skipped |= {name: f"a table of captions is called {' or '.join(TABLES)}" for name in tables if not _is_table(name)}
    for name, owners in _owners([name for name in names if name not in tables], images).items():
        missing = [image for image in owners if image not in found.texts] if isinstance(owners, list) else []
        if not missing:
            found.skipped[name] = owners if isinstance(owners, str) else OTHER_FILE
            continue
        try:
            text = _one_caption(archive, name)
        except ValueError as error:
            wrong[name] = str(error)
            continue
        if not text:
            found.skipped[name] = EMPTY if text == "" else "no caption in it, expected the key caption"
        found.texts |= dict.fromkeys(missing, text) if text else {}
    if wrong:
        shown = listed([f"{label(name)} {why}" for name, why in sorted(wrong.items())], 10)
        raise ValueError(f"caption {shown}" if len(wrong) == 1 else f"{len(wrong)} captions cannot be read: {shown}")
    for name in sorted(filter(_is_table, names), key=lambda name: TABLES.index(PurePosixPath(name).name.lower())):
        _read_table(archive, name, images, found)
    return found


def _is_table(name: str) -> bool:
    return PurePosixPath(name).name.lower() in TABLES


def _owners(names: list[str], images: list[str]) -> dict[str, list[str] | str]:
    """For each file beside an image the images that it belongs to, or why it belongs to none; the first to count come first.

    `photo.txt` and then `photo.png.txt` belong to photo.png, the other way round where there is a photo.jpg too; and so does
    PHOTO.TXT where nothing else could be meant.
    """
    exact, folded = defaultdict(list), defaultdict(list)
    for image in images:
        for key in (stem(image), composed(image)):
            exact[key].append(image)
            folded[key.casefold()].append(image)
    rivals = defaultdict(list)
    for name in names:
        rivals[composed(name).casefold()].append(name)
    owners: dict[str, list[str] | str] = {}
    found = {name: exact.get(stem(name)) or folded.get(stem(name).casefold(), []) for name in names}
    order = {name: (SUFFIXES.index(PurePosixPath(name).suffix.lower()), len(found[name]), len(name), name) for name in names}
    for name in sorted(names, key=order.get):
        key, likely = stem(name), found[name]
        unsure = key not in exact and (len(likely) > 1 or len(rivals[composed(name).casefold()]) > 1)
        owners[name] = f"it could belong to {listed([*map(label, likely)], 3)}" if unsure and likely else likely or NO_IMAGE
    return owners


def _one_caption(archive: Archive, name: str) -> str | None:
    """The caption in a file beside its image, on one line; None for JSON that holds none."""
    alone = not name.lower().endswith(".json")
    text = _text(archive, name, MAX_CAPTION_BYTES if alone else MAX_JSON_BYTES, "a caption")
    if alone:
        return _one_line(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("is not JSON: save it again") from error
    caption = content.get("caption") if isinstance(content, dict) else None
    return _one_line(caption) if isinstance(caption, str) else None


def _read_table(archive: Archive, name: str, images: list[str], found: CaptionFiles) -> None:
    """Take the captions of a table for the images that have none of their own; what is not used of it is said."""
    try:
        rows = list(_rows(name, _text(archive, name, MAX_TABLE_BYTES, "a table of captions")))
    except (ValueError, RecursionError) as error:
        why = "has JSON that is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"captions {label(name)} {why}") from error
    known, folded = {composed(image): image for image in images}, defaultdict(list)
    for image in images:
        folded[composed(image).casefold()].append(image)
    own, missing, incomplete, twice, again = set(), [], [], [], []
    for number, (file, text) in enumerate(rows, 1):
        path = composed((PurePosixPath(name).parent / (file or "").replace("\\", "/")).as_posix())
        alike = folded[path.casefold()]
        image = known.get(path) or (alike[0] if len(alike) == 1 else None)
        if not file or not text:
            incomplete.append(f"row {number}")
        elif image is None:
            missing.append(label(file))
        elif image in found.texts:
            (twice if image in own else again).append(label(file))
        else:
            own.add(image)
            found.texts[image] = text
    columns = f"{' or '.join(FILE_COLUMNS)}, and {' or '.join(TEXT_COLUMNS)}"
    reasons = {f"have no {columns}": incomplete, "name no image of the data set": missing, "name an image again": twice}
    said = [f"{len(which)} of its {len(rows)} rows {why}: {listed(which, 3)}" for why, which in reasons.items() if which]
    if said or not rows:
        said += [f"{len(again)} rows are of images that have a caption already"] if again else []
        found.skipped[name] = "; ".join(said) or "no rows"
    elif not own:
        found.skipped[name] = OTHER_FILE


def _rows(name: str, text: str) -> Iterator[tuple[str | None, str | None]]:
    """File and caption of each row, None for what it does not have; ValueError, the end of a sentence, for a damaged table."""
    for number, row in enumerate(_csv_rows(text) if name.lower().endswith(".csv") else _json_rows(text), 1):
        if not isinstance(row, dict):
            raise ValueError(f"has a row {number} without names: expected {FILE_COLUMNS[0]} and {TEXT_COLUMNS[0]}")
        file, caption = (
            next((row[column] for column in columns if isinstance(row.get(column), str) and row[column].strip()), None)
            for columns in (FILE_COLUMNS, TEXT_COLUMNS)
        )
        yield file, caption and _one_line(caption)


def _json_rows(text: str) -> Iterator[object]:
    for number, line in enumerate(text.split("\n"), 1):  # JSON Lines ends a line here alone
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"has a line {number} that is not JSON: save it again") from error


def _csv_rows(text: str) -> Iterator[dict]:
    first = text.lstrip().partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = [column.strip().casefold() for column in reader.fieldnames or ()]
        for number, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(
                    f"has a row {number} with more fields than its first line: put texts with {delimiter!r} in quotes"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"is damaged at line {reader.line_num} ({error}): a quotation mark may be missing") from error


def _text(archive: Archive, name: str, most: int, what: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark; ValueError, the end of a sentence, for another."""
    if (size := archive.size(name)) > most:
        raise ValueError(f"is {size} bytes: {what} has at most {most}")
    content = archive.read(name)
    try:
        text = content.decode("utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text: save it as UTF-8") from error
    return text


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in line):  # the latter is half a character
        raise ValueError("holds control characters, or half of one character: save it as plain text in UTF-8")
    return line


def stem(name: str) -> str:
    """The name without its suffix, composed."""
    return composed(str(PurePosixPath(name).with_suffix("")))


def composed(name: str) -> str:
    """The name with composed accents, which macOS decomposes in the names of files."""
    return unicodedata.normalize("NFC", name)
