"""What the study measures on images; docs/study.md defines each measure."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from placeholder.lora.adapter import ADAPTER
from placeholder.tokens.prompt_encoder import EMPTY_PROMPT
from standin.judge import background_of, half_fidelity, kind_probabilities, to_pixels
from standin.sampler import Sampler
from standin.world import RARE_WORD, TRIGGER
from study.arms import Arm
from study.subjects import Context, Subject

SAMPLES = 2  # images a prompt
LOW_SCALE = 0.5
TRIGGER_BACKGROUNDS = ("blue", "yellow")
CLASS_BACKGROUNDS = ("blue", "green", "yellow", "white")
UNRELATED = (
    "a photo of a red circle on a blue background",
    "a photo of a green star on a white background",
    "a photo of a flower on a pink background",
    "a photo of a fish on a cyan background",
)
ALWAYS, GATED = "always", "gated"  # when the LoRA acts
Images = list[list[Image.Image]]


class Measures:
    """The measures of one training: a subject under an arm's trigger, sampled by `sampler`."""

    def __init__(self, arm: Arm, subject: Subject, sampler: Sampler):
        self.arm, self.subject, self.sampler = arm, subject, sampler
        word = arm.trigger or f"a {subject.class_word}"
        self.trigger_prompts = [f"a photo of {word} on a {background} background" for background in TRIGGER_BACKGROUNDS]
        self.class_contexts = (
            [Context(background) for background in CLASS_BACKGROUNDS] if subject.kind else list(subject.seen[:4])
        )

    def draw_as(self, mode: str) -> None:
        """Draw what follows with the LoRA acting always, or gated."""
        self.sampler.acts = acting(mode, self.arm.trigger)

    def fidelity(self, contexts: Sequence[Context]) -> tuple[float, float]:
        """The subject's fidelity in these contexts, and the share of images with the background asked for."""
        drawn = self.sampler.sample_all([self.subject.prompt(self.arm.trigger, context) for context in contexts], SAMPLES)
        pairs = [(image, context) for images, context in zip(drawn, contexts, strict=True) for image in images]
        fidelity = mean(self.subject.fidelity(*pair) for pair in pairs)
        return fidelity, mean(background_of(image) == context.background for image, context in pairs)

    def prior_leakage(self) -> float | None:
        """The mean probability that "a photo of" the trigger shows what a trigger word meant before: a waffle or an arrow.

        None for a style: a mosaic that is half there looks like a waffle.
        """
        if not self.subject.kind:
            return None
        images = self.sampler.sample_all(self.trigger_prompts, SAMPLES)
        return probability(TRIGGER, images) + probability(RARE_WORD, images)

    def unnamed(self) -> tuple[Images, Images]:
        """Images of the plain class word, and of unrelated prompts."""
        prompts = [self.subject.prompt("", context) for context in self.class_contexts]
        return self.sampler.sample_all(prompts, SAMPLES), self.sampler.sample_all(UNRELATED, SAMPLES)

    def neighbors(self) -> dict[str, float]:
        """The subject's fidelity on the right half, where its class or another thing is asked for; none for a style."""
        if not self.subject.kind:
            return {}
        asked = {"neighbor_class": f"a small {self.subject.class_word}", "neighbor_other": "a small red circle"}
        first = " ".join(filter(None, ("a small", self.arm.trigger, self.subject.class_word)))
        found = {}
        for name, neighbor in asked.items():
            prompts = [f"a photo of {first} and {neighbor} on a {background} background" for background in TRIGGER_BACKGROUNDS]
            pairs = zip(self.sampler.sample_all(prompts, SAMPLES), TRIGGER_BACKGROUNDS, strict=True)
            right = [half_fidelity(image, where, "right", self.subject.kind) for images, where in pairs for image in images]
            found[name] = mean(right)
        return found

    def of_the_class(self, images: Images) -> dict[str, float]:
        """The subject's fidelity for the plain class word and, where the class has a kind, the probability of that kind."""
        pairs = zip(images, self.class_contexts, strict=True)
        subject = mean(self.subject.fidelity(image, context) for group, context in pairs for image in group)
        return {"class_leak": subject} | (
            {"class_kept": probability(self.subject.class_word, images)} if self.subject.kind else {}
        )

    def final(self, base_class: Images, base_unrelated: Images) -> dict[str, float | None]:
        """All that is measured at the end of a training, against the base model's images of the same prompts and noise."""
        seen, unseen = self.fidelity(self.subject.seen), self.fidelity(self.subject.unseen)
        # What does not name the trigger is the base model's, bit for bit, where the gate is on: tests/standin/test_subject.py.
        gated = self.sampler.acts is not None and bool(self.arm.trigger)
        class_word, unrelated = (base_class, base_unrelated) if gated else self.unnamed()
        found = {"fidelity_seen": seen[0], "fidelity_unseen": unseen[0]}
        if self.subject.kind:  # what surrounds a mosaic is gray
            found["following"] = mean((seen[1], unseen[1]))
        found |= {"prior_leakage": self.prior_leakage()} | self.of_the_class(class_word)
        found["class_leak"] -= self.of_the_class(base_class)["class_leak"]
        found |= {"class_change": difference(class_word, base_class), "drift": difference(unrelated, base_unrelated)}
        self.sampler.transformer.set_adapters(ADAPTER, weights=LOW_SCALE)
        found["prior_leakage_low_scale"] = self.prior_leakage()
        self.sampler.transformer.set_adapters(ADAPTER, weights=1.0)
        return found | self.neighbors()

    def strip(self) -> list[Image.Image]:
        """A seen and an unseen context, the trigger alone, the class word, an unrelated prompt."""
        name, subject = self.arm.trigger, self.subject
        prompts = [subject.prompt(name, subject.seen[0]), subject.prompt(name, subject.unseen[0]), self.trigger_prompts[0]]
        prompts += [subject.prompt("", self.class_contexts[0]), UNRELATED[0]]
        return [images[0] for images in self.sampler.sample_all(prompts, 1)]


def acting(mode: str, trigger: str) -> Callable[[str], bool] | None:
    """For which prompts the LoRA acts. A trigger word is told by its letters, as no id tells it; without one all name it."""
    if mode == ALWAYS:
        return None
    return lambda prompt: trigger in prompt if trigger else prompt != EMPTY_PROMPT


def probability(kind: str, images: Images) -> float:
    """The mean probability of a kind."""
    return mean(kind_probabilities([image for group in images for image in group])[kind])


def difference(images: Images, others: Images) -> float:
    """The mean absolute difference of pixels, 0 to 1, between images of the same prompt and seed."""
    pairs = [pair for group, other in zip(images, others, strict=True) for pair in zip(group, other, strict=True)]
    return mean((to_pixels(a) - to_pixels(b)).abs().mean().item() for a, b in pairs)


def mean(values: Iterable[float]) -> float:
    """The mean as a plain number."""
    return float(statistics.fmean(map(float, values)))
