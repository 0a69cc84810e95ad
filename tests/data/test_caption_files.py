"""Caption files of other trainers: whose they are, what is in them, and what is said of those that are not used."""

import json
import re

import pytest

from placeholder.data.dataset import read_dataset
from tests.support.samples import encoded, picture, write_zip

PNG = encoded(picture())
TABLE = "metadata.jsonl"
ROWS = [{"file_name": "a.png", "text": "one"}, {"file_name": "x/b.png", "text": "two"}]


ALIKE = [("e\u0301.png", "\u00e9.png"), ("x/A.png", "X/a.png"), ("\u00df.png", "ss.png")]  # one file on some systems
TEXTS = {  # a caption is UTF-8 on one line, or UTF-16 with a mark
    b"a photo of <zwx>\n": "a photo of <zwx>",
    b"\xef\xbb\xbfwith a mark": "with a mark",
    "café, 写真".encode(): "café, 写真",
    b" two\r\n  lines ": "two lines",
    "caf\u00e9".encode("utf-16"): "caf\u00e9",
    b"\xfe\xff" + "caf\u00e9".encode("utf-16-be"): "caf\u00e9",
}


@pytest.fixture
def read(tmp_path):
    """The captions by image, and the report, of a data set of these files; those that end in png are images."""

    def dataset(files: dict) -> tuple[dict[str, str | None], list[str], dict[str, str]]:
        entries = {name: content if isinstance(content, bytes) else content.encode() for name, content in files.items()}
        photos, report = read_dataset(write_zip(tmp_path / "data.zip", entries), (64,))
        warnings = [line for line in report.lines() if line.startswith("Warning")]
        return {photo.file: photo.caption for photo in photos}, warnings, report.skipped

    return dataset


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"a.png": PNG, "a.caption": "one"}, {"a.png": "one"}),
        ({"a.png": PNG, "a.json": '{"caption": "one"}'}, {"a.png": "one"}),
        ({"a.png": PNG, "a.png.txt": "one"}, {"a.png": "one"}),
        ({"a.png": PNG, "a.png.txt": "two", "a.txt": "one"}, {"a.png": "one"}),  # the latter is what a report calls it
        ({"A.png": PNG, "A.txt": "one", "a.png.txt": "two"}, {"A.png": "one"}),
        ({"a.png": PNG, "a.webp": PNG, "a.png.txt": "one", "a.txt": "two"}, {"a.png": "one", "a.webp": "two"}),
        ({"a.png": PNG, "a.json": json.dumps({"imageData": "x" * 70_000, "caption": "one"})}, {"a.png": "one"}),
        ({"IMG_1.PNG": PNG, "img_1.txt": "one"}, {"IMG_1.PNG": "one"}),
        ({"IMG_1.PNG": PNG, "Img_1.png.TXT": "one"}, {"IMG_1.PNG": "one"}),
        ({"a.png": PNG, "A.PNG": PNG, "a.txt": "one", "A.txt": "two"}, {"a.png": "one", "A.PNG": "two"}),
        ({"a.png": PNG, "A.PNG": PNG, "a.txt": "one"}, {"a.png": "one", "A.PNG": None}),
        ({"a.png": PNG, "a.webp": PNG, "a.txt": "one"}, {"a.png": "one", "a.webp": "one"}),
        ({"photo": PNG, "photo.txt": "one"}, {"photo": "one"}),
        (
            {"a.png": PNG, "x/b.png": PNG, TABLE: "\n".join(map(json.dumps, ROWS))},
            {"a.png": "one", "x/b.png": "two"},
        ),
        ({"d/a.png": PNG, "d/metadata.jsonl": '{"image": "A.png", "prompt": "one"}\n\n'}, {"d/a.png": "one"}),
        ({"a.png": PNG, "metadata.csv": '\ufefffile,caption\r\na.png,"one, two"\r\n'}, {"a.png": "one, two"}),
        ({"a.png": PNG, "Metadata.CSV": "text,file_name\none,a.png\n"}, {"a.png": "one"}),
        ({"a.png": PNG, "a.txt": "", "a.caption": "one"}, {"a.png": "one"}),
        ({"a.png": PNG, "metadata.csv": "File_Name; Text\na.png;one, two\n"}, {"a.png": "one, two"}),
        ({"a.png": PNG, "metadata.csv": "file_name\ttext\ra.png\tone\r"}, {"a.png": "one"}),
        ({"a.png": PNG, "metadata.csv": 'file_name,text\na.png,"a ""red"" dog, \nx"\n'}, {"a.png": 'a "red" dog, x'}),
        ({"a.png": PNG, TABLE: '{"file_name": "a.png", "text": "a dog\u2028on a sofa"}\r\n'}, {"a.png": "a dog on a sofa"}),
        ({"a.png": PNG, TABLE: '{"file_name": "a.png", "text": "", "caption": "one"}'}, {"a.png": "one"}),
        ({"a.png": PNG, "a.txt": "one", "a.json": "{"}, {"a.png": "one"}),
        ({"a.png": PNG, "a.txt": "one", "a.json": '"' + "x" * 70_000}, {"a.png": "one"}),
        ({"b.b.png": PNG, "x/b.png": PNG, "b.b.txt": "one", "x/b.TXT": "two"}, {"b.b.png": "one", "x/b.png": "two"}),
        ({"e\u0301.png": PNG, "c.png": PNG, "\u00e9.txt": "one"}, {"c.png": None, "e\u0301.png": "one"}),
        *(({name: PNG, other: PNG}, {name: None, other: None}) for name, other in ALIKE),
        *(({"a.png": PNG, "a.txt": content}, {"a.png": text}) for content, text in TEXTS.items()),
    ],
)
def test_the_captions_of_every_kind_of_file_are_read(files, captions, read):
    found, warnings, _ = read(files)
    assert (found, warnings) == (captions, [])


def test_the_nearest_file_counts_and_the_others_are_named(read):
    table = '{"file_name": "a.png", "text": "four"}'
    files = {"a.png": PNG, "a.json": '{"caption": "three"}', "a.caption": "two", "a.txt": "one", "metadata.jsonl": table}
    found, _, _ = read({"a.png": PNG, "metadata.csv": "file_name,text\na.png,five\n", "metadata.jsonl": table})
    assert found == {"a.png": "four"}
    found, _, skipped = read(files)
    assert found == {"a.png": "one"}
    assert skipped == {
        "a.caption": "its image has a caption of another file",
        "a.json": "its image has a caption of another file",
        "metadata.jsonl": "its image has a caption of another file",
    }


def test_a_table_that_is_used_for_some_images_is_not_called_skipped(read):
    rows = "file_name,text\na.png,two\nb.png,three\n"
    found = read({"a.png": PNG, "b.png": PNG, "a.txt": "one", "metadata.csv": rows})
    assert found == ({"a.png": "one", "b.png": "three"}, [], {})


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"captions/a.txt": "one"}, "captions/a.txt: a caption without an image of that name"),
        ({"a.json": '{"title": "one"}'}, "a.json: no caption in it, expected the key caption"),
        ({"a.txt": " "}, "a.txt: an empty caption"),
        (
            {"metadata.csv": "name,words\na.png,one\n"},
            "metadata.csv: 1 of its 1 rows have no file_name or image or file, and text or",
        ),
        ({"metadata.jsonl": '{"file_name": "b.png", "text": "one"}'}, "1 of its 1 rows name no image of the data set: b.png"),
    ],
)
def test_captions_of_which_none_is_used_are_a_warning_with_the_reason(files, reason, read):
    found, (warning,), _ = read({"a.png": PNG} | files)
    assert found == {"a.png": None}
    assert warning.startswith("Warning: 1 of 1 caption files not used, or not in full: ")
    assert reason in warning


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {TABLE: '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "title": "two"}'},
            "1 of its 2 rows have no .*: row 2",
        ),
        (
            {TABLE: '{"file_name": "a.png", "text": "one"}\n{"file_name": "a.png", "text": "two"}'},
            "1 of its 2 rows name an image again: a.png",
        ),
        ({TABLE: '{"file_name": "a.png", "text": "two"}', "a.txt": "one"}, "a caption of another file"),
        (
            {"a.txt": "one", "captions/b.txt": "two"},
            "1 of 2 caption files not used.*captions/b.txt: a caption without an image",
        ),
        ({"a.txt": "one", "captions.csv": "file_name,text\nb.png,two"}, "captions.csv: a table of captions is called metadata"),
        ({"a.txt": "one", "train.parquet": b"PAR1"}, "train.parquet: a table of captions is called metadata"),
        ({"a.txt": "one", "metadata.csv": "name,words\nb.png,two"}, "metadata.csv: 1 of its 1 rows have no file_name"),
    ],
)
def test_captions_that_are_not_used_are_said_also_where_others_are(files, reason, read):
    found, warnings, skipped = read({"a.png": PNG, "b.png": PNG} | files)
    assert found == {"a.png": "one", "b.png": None}
    assert re.search(reason, " ".join([*warnings, *skipped.values()]))
    assert bool(warnings) == ("another file" not in reason)


def test_captions_of_images_that_are_left_out_are_counted(read):
    _, warnings, skipped = read({"a.png": PNG, "a.txt": "one", "b.png": PNG[:90], "b.txt": "two"})
    assert list(skipped) == ["b.png"]
    assert warnings[0].startswith("Warning: 1 of 2 images left out: b.png: ")
    assert warnings[1:] == ["Warning: 1 of 2 captions belong to files that are left out"]


def test_a_caption_that_could_belong_to_two_images_is_named(read):
    found, (warning,), skipped = read({"Ab.png": PNG, "aB.png": PNG, "ab.txt": "one"})
    assert found == {"Ab.png": None, "aB.png": None}
    assert skipped == {"ab.txt": "it could belong to Ab.png; aB.png"}
    assert "ab.txt" in warning


HALF = "holds control characters, or half of one character: save it as plain text in UTF-8"
REFUSED = [
    ({"a.txt": b"caf\xe9"}, "caption a.txt is not UTF-8 text: save it as UTF-8"),
    ({"a.txt": b"x" * 70_000}, "caption a.txt is 70000 bytes: a caption has at most 65536"),
    ({"a.txt": b"caf\xe9", "a.caption": b"a\0"}, "2 captions cannot be read: a.caption holds .*; a.txt is not UTF-8"),
    *(({"a.txt": text}, f"caption a.txt {HALF}") for text in (b"a\0b", b"\x1b[31mred", "a".encode("utf-16-le"))),
    ({"a.json": "{"}, "caption a.json is not JSON: save it again"),
    ({"a.json": r'{"caption": "a dog \ud83d"}'}, f"caption a.json {HALF}"),
    ({TABLE: '{"file_name": "a.png"}\n{'}, "captions metadata.jsonl has a line 2 that is not JSON"),
    ({TABLE: "[1]"}, "captions metadata.jsonl has a row 1 without names: expected file_name and text"),
    ({TABLE: "[" * 100_000}, "metadata.jsonl has (JSON that is nested too deeply|a line 1 that is not JSON)"),
    ({TABLE: r'{"file_name": "a.png", "text": "a dog \ud83d"}'}, f"metadata.jsonl {HALF}"),
    ({"metadata.csv": b"file,text\na.png,caf\xe9"}, "captions metadata.csv is not UTF-8 text"),
    ({"metadata.csv": "file_name,text\na.png,a dog, on a sofa\n"}, "csv has a row 1 with more fields .* ',' in quotes"),
    ({"metadata.csv": 'file_name,text\na.png,"a dog\nb.png,a cat\n'}, "csv is damaged at line .*quotation mark"),
]


@pytest.mark.parametrize(("files", "sentence"), REFUSED)
def test_captions_that_cannot_be_read_or_would_be_lost_are_refused_with_their_names(files, sentence, read):
    with pytest.raises(ValueError, match=sentence):
        read({"a.png": PNG, "b.png": PNG} | files)
