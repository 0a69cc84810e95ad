"""The captions of a training as text: where each comes from, with the token in its place, and as files."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.buckets import to_image
from placeholder.data.dataset import Photo
from placeholder.distributed import Processes
from placeholder.errors import Log, label
from placeholder.model.captioner import MAX_NEW_TOKENS, describe

Source = Literal["file", "default", "auto"]
MAX_FILES = 10_000  # the archive may hold twice as many
DRAFT_WORDS, DRAFT_MENTIONS = " a" * MAX_NEW_TOKENS, 3  # one id a word; about as often a token is named in two sentences
PROGRESS_LINES = 10
# Instructions for the captioning model; docs/captions.md quotes them.
SENTENCES = (
    "Describe the setting, the light and the framing. Name only what can be seen. Answer with one or two plain sentences and "
    "begin with the description itself, without words such as 'The image shows'."
)
INSTRUCTION = f"Write a caption for this image: what it shows and what happens in it. {SENTENCES}"
SUBJECT_INSTRUCTION = (
    "Write a caption for this image. {subject} is called {name}: write {name} wherever you mention it, and say nothing of "
    "what {name} itself looks like. Describe what may be different in another image of {name}: the pose, what {name} does, "
    f"clothing, other things around. {SENTENCES}"
)


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
    one of several tokens.
    """
    remaining = iter(descriptions)
    captions = [_caption(photo, config, remaining) for photo in photos]
    if config.tokens:
        placed = [place_token(caption.text, config.tokens, caption.name) for caption in captions]
        log(f"Captions: {sum(in_front for _, in_front in placed)} of {len(placed)} lacked the token and got it in front")
        captions = [caption._replace(text=text) for caption, (text, _) in zip(captions, placed, strict=True)]
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
    return Caption(photo.name, config.default_caption, "default", photo.file)


def place_token(caption: str, tokens: tuple[str, ...], name: str) -> tuple[str, bool]:
    """The caption with its token, and whether the token had to be put in front.

    `<>` and `[trigger]` become the token. With several tokens a caption has to name one itself, because nothing says which
    is meant; one that does not raises ValueError with the image's `name`.
    """
    if len(tokens) == 1:
        caption = caption.replace("<>", tokens[0]).replace("[trigger]", tokens[0])
    if any(token in caption for token in tokens):
        return caption, False
    if len(tokens) > 1:
        raise ValueError(
            f"the caption of {name} names none of {', '.join(tokens)}: with several tokens each caption says which"
        )
    return f"{tokens[0]} {caption}".rstrip(), True


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

    An image's number is the name where its own is not valid on every system, or belongs to an image with another suffix.
    """
    names: list[str | None] = []
    taken: set[str] = set()
    for caption in captions[:MAX_FILES]:
        name = caption.file[: caption.file.rindex(".")] + ".txt"
        key = unicodedata.normalize("NFC", name).casefold()
        names.append(name if label(caption.file) == caption.file and key not in taken else None)
        taken.add(key)
    files: dict[str, bytes] = {}
    for number, (name, caption) in enumerate(zip(names, captions, strict=False), 1):
        if name is None:
            name = f"picture-{number:05}.txt"
            while name in taken:
                name = f"{name.removesuffix('.txt')}-.txt"
            taken.add(name)
        files[name] = f"{caption.text}\n".encode()
    return files


def undescribed(photos: list[Photo], config: TrainConfig) -> list[Photo]:
    """The images that autocaption is to describe."""
    return [photo for photo in photos if photo.caption is None] if config.autocaption else []


def draft(config: TrainConfig) -> str:
    """The longest description there may be, for the memory plan and for checks before the descriptions are made."""
    return " ".join(config.tokens[:1] * DRAFT_MENTIONS) + DRAFT_WORDS


def check_autocaption(config: TrainConfig) -> None:
    """Raise ValueError where nothing says which of several tokens an image without a caption shows."""
    if len(config.tokens) > 1 and not _named_around(config):
        raise ValueError(
            f"autocaption cannot tell which of {', '.join(config.tokens)} an image shows: name one in autocaption_prefix or "
            "autocaption_suffix, or write a .txt caption next to each image"
        )


def _named_around(config: TrainConfig) -> list[str]:
    """The tokens that autocaption_prefix or autocaption_suffix names."""
    around = f"{config.autocaption_prefix or ''} {config.autocaption_suffix or ''}"
    return [token for token in config.tokens if token in around]


def instruction(config: TrainConfig) -> str:
    """The instruction to the captioning model: with a token, describe what varies, and call the subject by the token.

    Of several tokens that is the first one that autocaption_prefix or autocaption_suffix names.
    """
    named = config.tokens if len(config.tokens) == 1 else _named_around(config)
    if not named:
        return INSTRUCTION
    class_word = " ".join(config.class_word.split())
    subject = f"Its main subject, a {class_word}," if class_word else "Its main subject"
    return SUBJECT_INSTRUCTION.format(subject=subject, name=named[0])


def describe_photos(
    vlm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    photos: list[Photo],
    config: TrainConfig,
    processes: Processes,
    log: Log,
    describe: Callable[..., str] = describe,
) -> list[str]:
    """A description of each image, made from its largest crop; several processes share the work, and all get all of it."""
    text = instruction(config)
    log(f"Autocaption: {len(photos)} images are described; the instruction: {text}")
    share = processes.shard(list(enumerate(photos)))
    every, found = max(1, -(-len(share) // PROGRESS_LINES)), []
    by = " by this process" if processes.world_size > 1 else ""
    for done, (number, photo) in enumerate(share, 1):
        image = to_image(max(photo.crops, key=Tensor.numel))
        found.append((number, describe(vlm, tokenizer, image, text)))
        if done % every == 0 or done == len(share):
            log(f"Autocaption: {done} of {len(share)} images described{by}")
    return [description for _, description in sorted(processes.all_gather(found))]
