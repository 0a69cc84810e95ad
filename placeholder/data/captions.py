"""The captions of a training as text: where each comes from, with the token in its place, and as files."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from placeholder.config import DEFAULT_CAPTION, DEFAULT_PLACEHOLDER, SIGNS, WITHOUT_TOKEN, TrainConfig
from placeholder.data.dataset import Photo
from placeholder.errors import Log, label, quoted

Source = Literal["file", "default", "auto"]
MAX_FILES = 10_000  # an archive may hold five times as many
BRACKETED = rf"{SIGNS}|<[^<>\s]+>"


class Caption(NamedTuple):
    """The caption of one image as it is trained, and whether it comes from a file, default_caption or autocaption.

    `name` and `file` are those of the Photo.
    """

    name: str
    text: str
    source: Source
    file: str = ""


def trained_captions(photos: list[Photo], config: TrainConfig, log: Log, descriptions: Sequence[str] = ()) -> list[Caption]:
    """One caption an image, with the token in its place: from its file, from the next description, or the default one.

    `descriptions` are those of the images in `undescribed`, in their order. Raises ValueError where a caption does not name
    one of several tokens, or no caption names one.
    """
    remaining = iter(descriptions)
    captions = [_caption(photo, config, remaining) for photo in photos]
    if config.tokens:
        placed = [place_token(caption.text, config.tokens, caption.name) for caption in captions]
        log(f"Captions: {sum(in_front for _, in_front in placed)} of {len(placed)} lacked the token and got it in front")
        captions = [caption._replace(text=text) for caption, (text, _) in zip(captions, placed, strict=True)]
        if unnamed := [token for token in config.tokens if not any(token in caption.text for caption in captions)]:
            raise ValueError(f"no caption names {', '.join(unnamed)}: write each token into the captions of its images")
    filled = [caption.text for caption in captions if caption.source == "default"]
    if filled and config.default_caption == DEFAULT_CAPTION:
        log(
            f"Warning: {len(filled)} of {len(captions)} images have no caption and are trained as {quoted(filled[0])}: "
            "if they show something else, set default_caption or autocaption"
        )
    for warning in plain_text_warnings(captions, config):
        log(warning)
    if descriptions:
        for caption in captions:
            log(f"Caption of {caption.name} ({caption.source}): {caption.text}")
    return captions


def _caption(photo: Photo, config: TrainConfig, descriptions: Iterator[str]) -> Caption:
    if photo.caption:
        return Caption(photo.name, photo.caption, "file", photo.file)
    if config.autocaption:
        parts = (config.autocaption_prefix or "", next(descriptions), config.autocaption_suffix or "")
        if text := " ".join(" ".join(parts).split()):
            return Caption(photo.name, text, "auto", photo.file)
    given = config.default_caption
    filled = " ".join((given if config.tokens else WITHOUT_TOKEN.get(given, given)).split())
    return Caption(photo.name, filled, "default", photo.file)


def with_token(text: str, token: str) -> str:
    """The text with the token in the places that `<>`, `[trigger]` and `[name]`, in any case, mark."""
    return re.sub(SIGNS, lambda _sign: token, text, flags=re.IGNORECASE)


def place_token(caption: str, tokens: tuple[str, ...], name: str) -> tuple[str, bool]:
    """The caption with its token, and whether the token had to be put in front.

    With several tokens a caption has to name one itself, because nothing says which is meant; one that does not raises
    ValueError with the image's `name`.
    """
    if len(tokens) == 1:
        caption = with_token(caption, tokens[0])
    if any(token in caption for token in tokens):
        return caption, False
    if len(tokens) > 1:
        raise ValueError(
            f"the caption of {name} names none of {', '.join(tokens)}: with several tokens each caption says which"
        )
    return f"{tokens[0]} {caption}".rstrip(), True


def plain_text_warnings(captions: list[Caption], config: TrainConfig) -> list[str]:
    """A warning for each spelling that only looks like the token: a sign, another case, the word without its brackets."""
    bare = filter(None, (token.strip("<>") for token in config.placeholder_token or (DEFAULT_PLACEHOLDER,)))
    pattern = re.compile("|".join([BRACKETED, *(rf"(?<!\w){re.escape(word)}(?!\w)" for word in bare)]), re.IGNORECASE)
    examples: dict[str, list[Caption]] = {}
    for caption in captions:
        for sign in set(pattern.findall(without_token(caption.text, config.tokens, " "))) - {config.class_word}:
            examples.setdefault(sign, []).append(caption)
    advice = f"write {' or '.join(config.tokens)} where the subject is meant" if config.tokens else "no token is trained"
    return [
        f"Warning: {quoted(sign)} is plain text in {len(found)} of {len(captions)} captions, such as that of {found[0].name}: "
        f"{quoted(found[0].text)}; {advice}"
        for sign, found in sorted(examples.items())
    ]


def without_token(caption: str, tokens: tuple[str, ...], class_word: str) -> str:
    """The caption with each placeholder token replaced by `class_word`, or removed where that is empty."""
    for token in tokens:
        caption = caption.replace(token, class_word)
    return " ".join(caption.split())


def preserved_prompts(captions: list[str], config: TrainConfig, log: Log) -> list[tuple[str, ...]]:
    """For each caption the prompts whose predictions prior preservation keeps as the base model's; none without it.

    They are the caption without the token, and the empty prompt, because guidance uses that one for every image.
    """
    if not config.preserves:
        return [()] * len(captions)
    preserved = [(without_token(caption, config.tokens, config.class_word), "") for caption in captions]
    log(f"Prior preservation: prompts such as '{preserved[0][0]}' keep what the base model generates for them")
    return preserved


def caption_files(captions: list[Caption]) -> dict[str, bytes]:
    """The captions as text files by name, to be put next to the images; at most MAX_FILES.

    `a.jpg` has `a.txt`, or `a.jpg.txt` where there is an `a.png` too. An image's number is the name where its own is not valid
    on every system, or would be another image's as well.
    """
    captions = captions[:MAX_FILES]
    stems = [str(PurePosixPath(caption.file).with_suffix("")) for caption in captions]
    shared = Counter(map(_key, stems))
    names = [f"{one.file if shared[_key(stem)] > 1 else stem}.txt" for one, stem in zip(captions, stems, strict=True)]
    taken, files = Counter(map(_key, names)), {}
    for number, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
        if label(name) != name or taken[_key(name)] > 1:
            name = f"picture-{number:05}.txt"
            while _key(name) in taken:
                name = f"{name.removesuffix('.txt')}-.txt"
        files[name] = f"{caption.text}\n".encode()
    return files


def _key(name: str) -> str:
    """Equal for names that some system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()
