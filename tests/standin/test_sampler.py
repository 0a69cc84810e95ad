"""Images of many prompts in batches: each prompt gets its own back, from the same noise."""

from types import SimpleNamespace

from placeholder.model.loading import load_transformer
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from standin import sampler
from standin.sampler import SEED, Sampler


def test_every_prompt_of_a_batch_gets_its_own_images_in_order(base, tokenizer, text_encoder, monkeypatch):
    monkeypatch.setattr(sampler, "BATCH", 4)
    tokens = PlaceholderTokens(len(tokenizer), {}, text_encoder.embed_tokens.embedding_dim)
    drawing, batches = Sampler(base, load_transformer(base), text_encoder, tokenizer, tokens), []

    def pipeline(prompt_embeds, generator, **_):
        """For each image what it would be of: the embeddings and the seed."""
        batches.append(len(prompt_embeds))
        return SimpleNamespace(images=[(*pair,) for pair in zip(prompt_embeds, generator, strict=True)])

    drawing.pipeline = pipeline
    prompts = ["a cat", "a red fish in a pond", "a dog", "the cat", "the dog"]
    for prompt, images in zip(prompts, drawing.sample_all(prompts, 2), strict=True):
        assert [generator.initial_seed() for _, generator in images] == [SEED, SEED + 1]
        assert all(embeds.equal(drawing._encode(prompt)[0]) for embeds, _ in images)
    assert sorted(batches) == [2, 4, 4]
