"""What a training is given before its first step, where other tests do not look: the prompts that preservation keeps."""

from placeholder.config import TrainConfig
from placeholder.tokens.prompt_encoder import prompt_ids
from placeholder.training.context import Context
from placeholder.training.setup import prepare
from tests.conftest import SHORT


def test_preservation_keeps_each_caption_without_its_token_beside_its_image_and_encodes_it_once(dataset, base, tokenizer):
    config = TrainConfig(**SHORT, train_placeholder_token=True, placeholder_token=("<zwx>",), prior_preservation=1.0)
    training = prepare(dataset, Context(config, base, lambda line: None))
    prompts = ("a photo of", "in a garden", "A photo of a person named")
    kept = [tuple(prompt_ids(tokenizer, training.tokens, text) for text in (prompt, " ")) for prompt in prompts]
    assert [example.preserved for example in training.state.sampler.examples] == kept
    assert not any(training.prompt_embeds([ids]).requires_grad for pair in kept for ids in pair)
