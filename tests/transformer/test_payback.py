"""When compiling pays back: a matter of the options and the data set alone."""

from dataclasses import replace

import pytest

from placeholder.config import TrainConfig
from placeholder.transformer.payback import DEVICES, TIMES_COST, Payback, batch_sizes, payback, step_flops

SMALL = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64}
FULL = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128}
TOKEN = {"train_placeholder_token": True, "placeholder_token": ("<zwx>",)}
PLAIN = TrainConfig(caption_dropout=0.0)


def of(config: TrainConfig, shapes=(((16, 16), 32, ()),), empty=5, transformer=SMALL, device="cpu") -> Payback:
    return payback(config, shapes, empty, transformer, device)


def test_the_flops_of_a_step_are_those_that_were_counted():
    # TFLOP from docs/scale-table.md, at rank 32 and 128 text tokens.
    for side, counted in ((512, 35.0), (768, 81.9), (1024, 161.8), (1328, 319.4)):
        assert step_flops(FULL, (side // 16) ** 2 + 128, 32) / 1e12 == pytest.approx(counted, rel=3e-3)


def test_the_rule_turns_at_twice_the_cost():
    found = of(replace(PLAIN, steps=1))
    border = TIMES_COST * found.cost / found.saved
    assert not of(replace(PLAIN, steps=int(border))).pays
    assert of(replace(PLAIN, steps=int(border) + 1)).pays
    assert not replace(found, flops=border * found.flops).pays  # exactly twice is not more than twice


def test_every_sample_and_every_preserved_prompt_counts():
    once = of(PLAIN).flops
    assert once == pytest.approx(1000 * step_flops(SMALL, 288, 32))
    assert of(replace(PLAIN, batch_size=4)).flops == pytest.approx(4 * once)
    two = of(PLAIN, shapes=(((16, 16), 32, ()), ((8, 8), 32, ())))
    assert two.flops == pytest.approx(once / 2 + 500 * step_flops(SMALL, 96, 32))
    kept = of(replace(PLAIN, **TOKEN, prior_preservation_interval=4), shapes=(((16, 16), 32, (32, 32)),))
    assert kept.flops == pytest.approx(1.5 * once)


def test_sizes_are_left_open_where_there_is_more_than_one_shape():
    dropping = replace(PLAIN, caption_dropout=0.1)
    assert of(PLAIN).one_shape and of(dropping, empty=32).one_shape
    assert not of(dropping).one_shape
    assert not of(PLAIN, shapes=(((16, 16), 32, ()), ((8, 8), 32, ()))).one_shape
    assert not of(PLAIN, shapes=(((16, 16), 32, ()), ((16, 16), 30, ()))).one_shape
    assert not of(PLAIN, shapes=(((16, 16), 32, (30,)),)).one_shape
    # As many tokens, but a batch of both is divided.
    assert not of(PLAIN, shapes=(((8, 32), 32, ()), ((32, 8), 32, ()))).one_shape
    batches = replace(PLAIN, batch_size=4)
    assert batch_sizes(batches, True) == [4] and batch_sizes(batches, False) == [1, 2] and batch_sizes(PLAIN, False) == [1]


@pytest.mark.parametrize(
    ("options", "shapes", "expected"),
    [
        ({}, (((16, 16), 32, ()),), 2),
        ({"batch_size": 2}, (((16, 16), 32, ()),), 2),
        ({"batch_size": 2}, (((16, 16), 32, ()), ((16, 16), 30, ())), 4),
        ({**TOKEN, "prior_preservation": 0.0}, (((16, 16), 32, ()),), 2),
        (TOKEN, (((16, 16), 32, (30,)),), 3),
        ({**TOKEN, "caption_dropout": 0.05, "prior_preservation": 0.0, "batch_size": 4}, (((16, 16), 32, ()),), 6),
    ],
)
def test_how_often_is_compiled(options, shapes, expected):
    assert of(replace(PLAIN, **options), shapes=shapes).compilations == expected


def test_at_full_size_on_a_gpu_it_is_off_by_default_and_says_what_was_not_measured():
    shapes = [((side // 16, side // 16), 128, ()) for side in (512, 768, 1024)]
    found = of(TrainConfig(), shapes, transformer=FULL, device="cuda")
    assert found.flops == pytest.approx(93e15, rel=2e-3) and not found.pays
    assert "Compile: off, by rule" in found.line(None) and "not measured on a GPU" in found.line(None)
    assert of(TrainConfig(steps=20000, batch_size=4), shapes, transformer=FULL, device="cuda").pays


def test_what_is_asked_for_wins():
    long = of(replace(PLAIN, steps=20000))
    assert long.pays and "Compile: on, by rule" in long.line(None)
    assert long.line(False) == "Compile: off, as torch_compile says"
    assert of(PLAIN).line(True) == "Compile: on, as torch_compile says"
    assert DEVICES.keys() == {"cpu", "cuda"}
