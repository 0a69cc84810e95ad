"""What images that were to show two subjects show: each alone, both in one image, the class words, old meanings."""

from collections.abc import Callable, Sequence

from PIL import Image

from standin.judge import background_of, half_fidelity, kind_probabilities, subject_fidelity
from standin.subject import SEEN_BACKGROUNDS, UNSEEN_BACKGROUNDS
from standin.world import RARE_WORD, TRIGGER, render
from study.measures import mean
from study.two_subjects import CLASS_WORDS, KINDS, ORDERS, ImageSpec, alone, both, side_by_side

Generate = Callable[[ImageSpec], list[Image.Image]]
NAMES = ("first", "second")
CONTEXTS = {"seen": SEEN_BACKGROUNDS, "unseen": UNSEEN_BACKGROUNDS}
CLASS_BACKGROUNDS = ("blue", "green", "yellow", "white")
FEW_BACKGROUNDS = ("blue", "yellow")
DRAWN = 0.4  # the fidelity from which a small subject counts as there
RENDERED_SEED = 5000  # far from the data set's and the judge's


def rendered(spec: ImageSpec, count: int) -> list[Image.Image]:
    """The image as the world renders it: the best that any model could do."""
    return [render(spec.scene(RENDERED_SEED + number)) for number in range(count)]


def measures(generate: Generate, named: tuple[str, str]) -> dict:
    """All measures of one model that calls the subjects `named`; docs/study.md defines each."""
    return {
        "alone": {
            name: {context: alone_measures(generate, named[index], index, context) for context in CONTEXTS}
            for index, name in enumerate(NAMES)
        },
        "both": {context: both_measures(generate, named, context) for context in CONTEXTS},
        "one_named": {name: one_named_measures(generate, named, index) for index, name in enumerate(NAMES)},
        "class_word": {name: class_measures(generate, index) for index, name in enumerate(NAMES)},
    }


def alone_measures(generate: Generate, noun: str, index: int, context: str) -> dict[str, float]:
    """One subject asked for: its own fidelity, the other subject's, and the share with the background asked for."""
    own, other, following = [], [], []
    for background in CONTEXTS[context]:
        for image in generate(alone(noun, KINDS[index], background)):
            own.append(subject_fidelity(image, background, kind=KINDS[index]))
            other.append(subject_fidelity(image, background, kind=KINDS[1 - index]))
            following.append(background_of(image) == background)
    return {"own": mean(own), "other": mean(other), "following": mean(following)}


def both_measures(generate: Generate, named: tuple[str, str], context: str) -> dict[str, float]:
    """Both asked for, in either order: each subject's fidelity on its half, the worse of the two, the wrong one's there.

    `both_drawn` is the share of images in which each subject has at least DRAWN on its half, and more than the other there.
    """
    found: dict[str, list[float]] = {"first": [], "second": [], "worse": [], "other": [], "both_drawn": []}
    for order in ORDERS:
        for background in CONTEXTS[context]:
            for image in generate(both(named, order, background)):
                own, other = halves(image, background, order)
                for index, fidelity in zip(order, own, strict=True):
                    found[NAMES[index]].append(fidelity)
                found["worse"].append(min(own))
                found["other"] += other
                found["both_drawn"].append(
                    all(right >= DRAWN and right > wrong for right, wrong in zip(own, other, strict=True))
                )
    return {name: mean(values) for name, values in found.items()}


def halves(image: Image.Image, background: str, order: Sequence[int]) -> tuple[list[float], list[float]]:
    """For the left and the right half, the fidelity of the subject that belongs there, and of the other one."""
    places = [(place, index) for place, index in zip(("left", "right"), order, strict=True)]
    own = [half_fidelity(image, background, place, KINDS[index]) for place, index in places]
    other = [half_fidelity(image, background, place, KINDS[1 - index]) for place, index in places]
    return own, other


def one_named_measures(generate: Generate, named: tuple[str, str], index: int) -> dict[str, float]:
    """One subject next to the other's plain class word: its fidelity on its half, the other subject's on the other half."""
    own, leak = [], []
    for background in FEW_BACKGROUNDS:
        kinds = (KINDS[index], CLASS_WORDS[1 - index])
        for image in generate(side_by_side((named[index], CLASS_WORDS[1 - index]), kinds, background)):
            own.append(half_fidelity(image, background, "left", KINDS[index]))
            leak.append(half_fidelity(image, background, "right", KINDS[1 - index]))
    return {"own": mean(own), "leak": mean(leak)}


def class_measures(generate: Generate, index: int) -> dict[str, float]:
    """The plain class word: the subject's fidelity, and the classifier's probability of the class."""
    leak, images = [], []
    for background in CLASS_BACKGROUNDS:
        drawn = generate(alone(CLASS_WORDS[index], CLASS_WORDS[index], background))
        leak += [subject_fidelity(image, background, kind=KINDS[index]) for image in drawn]
        images += drawn
    return {"leak": mean(leak), "kept": mean(kind_probabilities(images)[CLASS_WORDS[index]])}


def old_meaning(generate: Generate, words: tuple[str, str]) -> dict[str, float]:
    """For each word without a class word, the mean probability of a waffle or an arrow: what trigger words meant before."""
    found = {}
    for name, kind, word in zip(NAMES, KINDS, words, strict=True):
        specs = [
            ImageSpec(f"a photo of {word} on a {background} background", (kind,), background) for background in FEW_BACKGROUNDS
        ]
        images = [image for spec in specs for image in generate(spec)]
        probabilities = kind_probabilities(images)
        found[name] = mean(probabilities[TRIGGER]) + mean(probabilities[RARE_WORD])
    return found
