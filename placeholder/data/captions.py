"""The prompts of a training: captions with the token in its place, and what is to be kept beside them."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from placeholder.config import TrainConfig
from placeholder.data.dataset import Photo
from placeholder.distributed import Processes
from placeholder.errors import label
from placeholder.model.captioner import MAX_NEW_TOKENS, describe
from placeholder.tokens.placeholder_tokens import PlaceholderTokens, place_token, without_token
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT, prompt_ids

Source = Literal["file", "default", "auto"]
MAX_FILES = 10_000  # the archive may hold twice as many
PROGRESS_LINES = 10
SENTENCES = (
    "Describe the setting, the light and the framing. Name only what can be seen. Answer with one or two plain sentences and begin "
    "with the description itself, without words such as 'The image shows'."
)
INSTRUCTION = f"Write a caption for this image: what it shows and what happens in it. {SENTENCES}"
SUBJECT_INSTRUCTION = (
    "Write a caption for this image. {subject} is called {name}: write {name} wherever you mention it, and say nothing of what "
    "{name} itself looks like. Describe what may be different in another image of {name}: the pose, what {name} does, clothing, "
    f"other things around. {SENTENCES}"
)
DRAFT_WORDS, DRAFT_MENTIONS = " a" * MAX_NEW_TOKENS, 3  # one id a word; about as often a token is named in two sentences


class Caption(NamedTuple):
    """The caption of one picture as it is trained, and whether it comes from a file, default_caption or autocaption.

    `name` and `file` are those of the Photo.
    """

    name: str
    text: str
    source: Source
    file: str = ""


@dataclass(frozen=True)
class Prompts:
    """The captions as ids inside the template, and for each of them the ids of what is to be kept beside it."""

    ids: list[tuple[int, ...]]
    preserved: list[tuple[tuple[int, ...], ...]]

    @property
    def longest(self) -> int:
        """The number of ids of the longest prompt."""
        return max(len(ids) for ids in (*self.ids, *(ids for kept in self.preserved for ids in kept)))


def undescribed(photos: list[Photo], config: TrainConfig) -> list[Photo]:
    """The pictures that autocaption is to describe."""
    return [photo for photo in photos if photo.caption is None] if config.autocaption else []


def draft(config: TrainConfig) -> str:
    """As long a description as there may be, for the memory plan and for what can be checked before there is one."""
    return " ".join(config.tokens[:1] * DRAFT_MENTIONS) + DRAFT_WORDS


def draft_length(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, tokens: PlaceholderTokens) -> int:
    """The number of ids of the longest prompt that autocaption may make."""
    caption = _caption(Photo("", None, ()), config, iter([draft(config)]))
    return len(prompt_ids(tokenizer, tokens, caption.text))


def check_autocaption(config: TrainConfig) -> None:
    """Raise ValueError where nobody could tell which of several tokens the pictures that are to be described show."""
    around = f"{config.autocaption_prefix or ''} {config.autocaption_suffix or ''}"
    if len(config.tokens) > 1 and not any(token in around for token in config.tokens):
        raise ValueError(
            f"autocaption cannot tell which of {', '.join(config.tokens)} a picture shows: name one in autocaption_prefix or "
            "autocaption_suffix, or write a .txt caption beside each picture"
        )


def trained_captions(
    photos: list[Photo], config: TrainConfig, log: Callable[[str], None], descriptions: Sequence[str] = ()
) -> list[Caption]:
    """One caption a picture, with the token in its place: its own, the default one, or with autocaption the next description.

    Raises ValueError where a caption does not name one of several tokens.
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


def caption_files(captions: list[Caption]) -> dict[str, bytes]:
    """The captions as files that can be put beside the pictures, by name; at most MAX_FILES.

    A picture has its number for a name where its own would not do on every system, or belongs to a picture with another suffix.
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


def prompts_of(
    captions: list[Caption],
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokens: PlaceholderTokens,
    log: Callable[[str], None],
) -> Prompts:
    """The ids of the captions, and of what is to be kept beside them."""
    texts = [caption.text for caption in captions]
    ids = [prompt_ids(tokenizer, tokens, text) for text in texts]
    preserved = [
        tuple(prompt_ids(tokenizer, tokens, prompt) for prompt in prompts) for prompts in preserved_prompts(texts, config, log)
    ]
    if config.log_prompt_ids:
        for text in dict.fromkeys(texts):
            log(f"Prompt '{text}' tokenized to: {tokens.tokenize(tokenizer, text)}")
    return Prompts(ids, preserved)


def preserved_prompts(captions: list[str], config: TrainConfig, log: Callable[[str], None]) -> list[tuple[str, ...]]:
    """For each caption the prompts that are to keep what the base model draws for them; none without preservation.

    They are the caption without the token and the empty prompt: with guidance, every picture is drawn with that one too.
    """
    if not config.preserves:
        return [()] * len(captions)
    preserved = [(without_token(caption, config.tokens, config.class_word), EMPTY_PROMPT) for caption in captions]
    log(f"Prior preservation: prompts such as '{preserved[0][0]}' keep what the base model draws for them")
    return preserved


def instruction(config: TrainConfig) -> str:
    """What the model is asked for; with a token: to describe what varies instead of the subject, and to call it by the token.

    Of several tokens that is the first one that autocaption_prefix or autocaption_suffix names.
    """
    around = f"{config.autocaption_prefix or ''} {config.autocaption_suffix or ''}"
    named = config.tokens if len(config.tokens) == 1 else [token for token in config.tokens if token in around]
    if not named:
        return INSTRUCTION
    class_word = " ".join(config.class_word.split())
    subject = f"Its main subject, a {class_word}," if class_word else "Its main subject"
    return SUBJECT_INSTRUCTION.format(subject=subject, name=named[0])


def describe_photos(
    vlm: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    photos: list[Photo],
    config: TrainConfig,
    processes: Processes,
    log: Callable[[str], None],
) -> list[str]:
    """A description of each image, by its largest crop; several processes share the work, and each gets all descriptions."""
    text = instruction(config)
    log(f"Autocaption: {len(photos)} images are described; the instruction: {text}")
    share = processes.shard(list(enumerate(photos)))
    every, found = max(1, -(-len(share) // PROGRESS_LINES)), []
    for done, (number, photo) in enumerate(share, 1):
        pixels = max(photo.crops, key=Tensor.numel)  # uint8 (3, H, W)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy(force=True))
        found.append((number, describe(vlm, tokenizer, image, text)))
        if done % every == 0 or done == len(share):
            log(
                f"Autocaption: {done} of {len(share)} images described"
                + (" by this process" if processes.world_size > 1 else "")
            )
    return [description for _, description in sorted(processes.all_gather(found))]
