"""Two archives in one prediction: both LoRAs at their own scale, both tokens, and no trace of either afterwards."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from placeholder.lora.adapter import ADAPTER, EXTRA_ADAPTER, A, B, load_lora
from placeholder.model.loading import load_transformer
from placeholder.tokens.placeholder_tokens import PlaceholderTokens
from placeholder.weights.applied import INCOMPLETE
from placeholder.weights.archive import LORA_NAME, read_weights
from predict import Predictor
from tests.lora.test_adapter import MODULES, random_lora, velocity
from tests.support.interruption import calls
from tests.support.predictions import NAMED, PLAIN, Images
from tests.support.samples import picture, read_zip, write_zip
from tests.test_request import DEFAULTS

BOTH = replace(PLAIN, prompt="a photo of <zwx> beside <qrs>", lora_scale=0.7, extra_lora_scale=1.6)


@pytest.fixture(scope="module")
def extra(zero_prior, tmp_path_factory) -> Path:
    """An archive of the token <qrs>, with two rows, whose LoRA has other numbers than the first's, on half of its layers."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in zero_prior.tensors(LORA_NAME).items()
        if "blocks.1" in key
    }
    rows = 0.05 * torch.randn(2, 32, generator=generator)
    meta = zero_prior.meta | {"placeholder_token_ids": {"<qrs>": [151665, 151666]}}
    entries = {
        LORA_NAME: save(tensors),
        "embeddings/qrs.safetensors": save({"qwen25_7b": rows}),
        "meta.json": json.dumps(meta).encode(),
    }
    return write_zip(tmp_path_factory.mktemp("extra") / "extra.zip", entries)


@pytest.fixture(scope="module")
def generate(base) -> Images:
    """One generator for all tests here: what one does must not be seen in the next."""
    return Images(base)


@pytest.fixture(scope="module")
def alone(base, zero_prior, extra) -> Callable[[Images], bool]:
    """Whether a generator gives, without weights and with one archive, the images of others that have done nothing before."""
    cases = [(PLAIN, None), (NAMED, zero_prior.archive), (replace(NAMED, prompt="a photo of <qrs>"), extra)]
    expected = [Images(base)(*case) for case in cases]
    return lambda images: all(np.array_equal(images(*case), image) for case, image in zip(cases, expected, strict=True))


def merged(base, *loras: tuple[float, dict[str, torch.Tensor]]):
    """The transformer with scale * B A of each LoRA added to its weights by hand."""
    transformer = load_transformer(base)
    with torch.no_grad():
        for scale, lora in loras:
            for name in (key.removesuffix(A) for key in lora if key.endswith(A)):
                transformer.get_submodule(name).weight += scale * lora[name + B].float() @ lora[name + A].float()
    return transformer


def test_two_loras_add_up_each_at_its_own_scale(base):
    first = random_lora(4, seed=1, modules=MODULES[:12])
    second = random_lora(3, seed=2, modules=MODULES[6:])  # some layers have one, some the other, some both
    transformer = load_transformer(base)
    load_lora(transformer, first)
    load_lora(transformer, second, EXTRA_ADAPTER)
    for scales in ((1.0, 1.0), (0.7, 1.6), (0.0, 1.0), (1.0, 0.0), (0.7, 1.6)):
        transformer.set_adapters([ADAPTER, EXTRA_ADAPTER], weights=list(scales))
        expected = merged(base, (scales[0], first), (scales[1], second))
        torch.testing.assert_close(velocity(transformer), velocity(expected), rtol=1e-4, atol=1e-5)
    assert (velocity(transformer) - velocity(merged(base, (1.6, first), (0.7, second)))).abs().max() > 0.01
    for within in (".base_layer", ".lora_A.default"):  # layers of the LoRA itself
        with pytest.raises(ValueError, match="this base model has no linear layer"):
            load_lora(transformer, random_lora(modules=[MODULES[0] + within]), EXTRA_ADAPTER)
    transformer.unload_lora()
    assert torch.equal(velocity(transformer), velocity(load_transformer(base)))


def test_an_image_with_two_archives_is_that_of_the_hand_computed_sum(generate, base, zero_prior, extra):
    """The sum of both LoRAs in the weights themselves, and both tokens' rows at consecutive ids."""
    found = generate(BOTH, zero_prior.archive, extra)
    first, second = read_weights(zero_prior.archive), read_weights(extra)
    by_hand = Images(base)
    transformer = merged(base, (BOTH.lora_scale, first.lora), (BOTH.extra_lora_scale, second.lora))
    by_hand.generator.pipeline.transformer.load_state_dict(transformer.state_dict())
    by_hand.generator.weights.tokens = PlaceholderTokens(151665, first.embeddings | second.embeddings, 32)
    assert np.abs(found.astype(int) - by_hand(BOTH)).max() <= 1  # sums in another order
    for other in (generate(BOTH, zero_prior.archive), generate(BOTH, extra), generate(BOTH, extra, zero_prior.archive)):
        assert np.abs(found.astype(int) - other).max() > 1


def test_the_extra_archives_tokens_come_after_the_firsts(generate, tokenizer, zero_prior, extra):
    generate(PLAIN)
    generate(BOTH, zero_prior.archive, extra)
    assert generate.log[:4] == [
        "Placeholder token '<zwx>' registered with ID: 151665",
        "Placeholder token '<qrs>' registered with ID: 151666, 151667",
        "Weights applied: 32 LoRA tensors, 1 embeddings",
        "Extra weights applied: 16 LoRA tensors, 1 embeddings",
    ]
    ids = generate.generator.weights.tokens.tokenize(tokenizer, BOTH.prompt)
    assert ids[-5:] == [151665, *tokenizer(" beside ").input_ids, 151666, 151667]
    generate(BOTH, extra, zero_prior.archive)
    assert generate.generator.weights.tokens.ids == {"<qrs>": [151665, 151666], "<zwx>": [151667]}


def test_a_prompt_without_the_token_of_either_archive_is_warned_about(generate, zero_prior, extra):
    for prompt, missed in ((NAMED.prompt, ["<qrs>"]), ("a photo of <qrs>", ["<zwx>"]), (BOTH.prompt, [])):
        generate(replace(BOTH, prompt=prompt), zero_prior.archive, extra)
        assert [line.split()[6].rstrip(",") for line in generate.warnings()] == missed


def test_an_extra_lora_without_tokens_is_applied_alone_and_with_another(generate, zero_prior, extra, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(read_zip(extra)[LORA_NAME])
    both = generate(NAMED, zero_prior.archive, path)
    assert not np.array_equal(both, generate(NAMED, zero_prior.archive))
    assert np.array_equal(both, generate(NAMED, zero_prior.archive, extra))  # its token is not in the prompt
    alone = generate(replace(PLAIN, extra_lora_scale=0.5), None, path)
    assert np.array_equal(alone, generate(replace(PLAIN, lora_scale=0.5), path))


def test_both_scales_change_the_image_and_nothing_lasts(generate, zero_prior, extra, alone):
    once = generate(BOTH, zero_prior.archive, extra)
    for changed in ({"lora_scale": 1.5}, {"extra_lora_scale": 0.3}):
        assert not np.array_equal(generate(replace(BOTH, **changed), zero_prior.archive, extra), once)
        assert not any("applied" in line for line in generate.log)
    without = generate(NAMED, zero_prior.archive)
    assert np.array_equal(generate(replace(NAMED, extra_lora_scale=0.0), zero_prior.archive, extra), without)
    assert alone(generate)
    assert np.array_equal(generate(BOTH, zero_prior.archive, extra), once)


def test_neither_is_read_nor_is_a_prompt_encoded_again(generate, zero_prior, extra, tmp_path):
    copy = tmp_path / "copy.bin"
    copy.write_bytes(extra.read_bytes())
    generate(PLAIN)
    generate.forget()
    with calls("read_weights", "encode_prompts") as done:
        first = generate(BOTH, zero_prior.archive, extra)
        assert done == ["read_weights"] * 2 + ["encode_prompts"] * 2
        assert np.array_equal(generate(BOTH, zero_prior.archive, copy), first) and len(done) == 4
        generate(BOTH, zero_prior.archive)  # the same prompt, in which <qrs> is plain text
        assert done[4:] == ["encode_prompts"] * 2
        assert np.array_equal(generate(BOTH, zero_prior.archive, extra), first) and len(done) == 6


def test_the_extra_archives_token_may_be_called_otherwise(generate, zero_prior, extra, tmp_path):
    """Two subjects that were both trained as <zwx> give the image of the same archives with different names."""
    expected = generate(BOTH, zero_prior.archive, extra)
    same_name = write_zip(tmp_path / "same.zip", with_token(extra, "<zwx>", [151665, 151666]))
    second = replace(BOTH, prompt="a photo of <zwx> beside <second>", extra_placeholder_token=("<second>",))
    assert np.array_equal(generate(second, zero_prior.archive, same_name), expected)
    assert not generate.warnings()
    third = replace(second, prompt="a photo of <zwx> beside <third>", extra_placeholder_token=("<third>",))
    assert np.array_equal(generate(third, zero_prior.archive, same_name), expected)
    assert not np.array_equal(generate(replace(third, prompt=second.prompt), zero_prior.archive, same_name), expected)
    assert len(generate.warnings()) == 1  # <second> is plain text now


@pytest.mark.parametrize(
    ("names", "with_extra", "sentence"),
    [
        (("<a>", "<b>"), True, "extra_placeholder_token gives 2 names, extra_lora_weights have <qrs>: one for each"),
        (("<zwx>",), True, "both use the token '<zwx>'"),
        (("two words",), True, "placeholder_token 'two words' is empty or holds white space"),
        (("<a>",), False, "extra_placeholder_token renames the token of extra_lora_weights, which are not given"),
    ],
)
def test_names_that_cannot_be_given_get_their_sentence(names, with_extra, sentence, generate, zero_prior, extra):
    with pytest.raises(ValueError, match=sentence):
        generate(replace(BOTH, extra_placeholder_token=names), zero_prior.archive, extra if with_extra else None)


def with_token(extra: Path, token: str, ids: list[int]) -> dict[str, bytes]:
    """The entries of the extra archive with its token called otherwise."""
    entries = read_zip(extra)
    meta = json.loads(entries["meta.json"]) | {"placeholder_token_ids": {token: ids}}
    rows = entries.pop("embeddings/qrs.safetensors")
    return entries | {f"embeddings/{token.strip('<>')}.safetensors": rows, "meta.json": json.dumps(meta).encode()}


def test_tokens_that_do_not_go_together_get_their_sentence(generate, zero_prior, extra, tmp_path, alone):
    cases = {
        "replicate_weights and extra_lora_weights both use the token '<zwx>': give extra_placeholder_token": (
            "<zwx>",
            [151665, 151666],
        ),
        "placeholder_token '<zwx>' overlaps with 'zwx': give tokens that do not": ("zwx", [151665, 151666]),
        "the token ids of the archive are .*151667.*, here they are .*151665.*: it was": ("<qrs>", [151666, 151667]),
    }
    for sentence, token in cases.items():
        path = write_zip(tmp_path / "changed.zip", with_token(extra, *token))
        with pytest.raises(ValueError, match=sentence):
            generate(BOTH, zero_prior.archive, path)
    assert alone(generate)


@pytest.mark.parametrize(("layer", "before"), [("blocks.9", "zero_prior"), ("blocks.1", None)])
def test_a_bad_extra_lora_leaves_nothing_of_the_first(layer, before, generate, zero_prior, extra, tmp_path, alone):
    """Its layer does not exist, or it holds NaN: both are found when the first LoRA is on the transformer already."""
    tensors = {key.replace("blocks.1", layer): value for key, value in load(read_zip(extra)[LORA_NAME]).items()}
    if layer == "blocks.1":
        tensors[max(tensors)][0, 0] = float("nan")
    generate(NAMED, zero_prior.archive if before else None)
    bad = write_zip(tmp_path / "changed.zip", read_zip(extra) | {LORA_NAME: save(tensors)})
    with pytest.raises(ValueError, match="does not fit" if layer == "blocks.9" else "NaN or infinite"):
        generate(BOTH, zero_prior.archive, bad)
    assert generate.generator.weights.applied == INCOMPLETE
    assert alone(generate)


def test_the_predictor_passes_both_archives_on(zero_prior, extra):
    asked = []

    class Asked:
        """Notes what it was asked for."""

        def generate(self, *given):
            asked.append(given)
            return picture()

    predictor = Predictor()
    predictor.generator, predictor.default_weights = Asked(), zero_prior.archive
    size = {"width": 64, "height": 64, "steps": 2, "extra_lora_scale": 2.0}
    for weights, given in ((None, None), (None, str(extra)), (str(extra), str(zero_prior.archive))):
        predictor.predict(**DEFAULTS | size | {"replicate_weights": weights, "extra_lora_weights": given})
    first, second = zero_prior.archive, extra
    assert [tuple(paths) for _, *paths in asked] == [(first, None), (first, second), (second, first)]
    assert all(request.extra_lora_scale == 2.0 for request, *_ in asked)
