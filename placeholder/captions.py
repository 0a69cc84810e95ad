"""The prompts of a training: captions with the token in its place, and what is to be kept beside them."""

from collections.abc import Callable

from placeholder.config import TrainConfig
from placeholder.dataset import Photo
from placeholder.models import EMPTY_PROMPT
from placeholder.placeholder_token import place_token, without_token


def trained_captions(photos: list[Photo], config: TrainConfig, log: Callable[[str], None]) -> list[str]:
    """One caption a picture: its own or the default one, with the token in its place."""
    captions = [photo.caption or config.default_caption for photo in photos]
    if not config.tokens:
        return captions
    placed = [place_token(caption, config.tokens, photo.name) for caption, photo in zip(captions, photos, strict=True)]
    log(f"Captions: {sum(in_front for _, in_front in placed)} of {len(placed)} lacked the token and got it in front")
    return [caption for caption, _ in placed]


def preserved_prompts(captions: list[str], config: TrainConfig, log: Callable[[str], None]) -> list[tuple[str, ...]]:
    """For each caption the prompts that are to keep what the base model draws for them; none without preservation.

    They are the caption without the token and the empty prompt: with guidance, every picture is drawn with that one too.
    """
    if not config.preserves:
        return [()] * len(captions)
    preserved = [(without_token(caption, config.tokens, config.class_word), EMPTY_PROMPT) for caption in captions]
    log(f"Prior preservation: prompts such as '{preserved[0][0]}' keep what the base model draws for them")
    return preserved
