"""Which layers begin an MLP, and what is compiled for the second GEMM."""

from __future__ import annotations

from fp4tune.autotune import chains
from fp4tune.probes.problem import Problem


def problems(*shapes: tuple[int, int]) -> list[Problem]:
    return [Problem("nvfp4", 64, n, k) for n, k in shapes]


def test_a_models_gate_and_up_begins_its_mlp_and_nothing_else_is_compiled():
    qkv, out, up, down = layers = problems((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    assert chains.firsts(layers) == (up,)
    assert chains.seconds(layers) == ()


def test_a_layer_that_happens_to_fit_behind_another_is_no_mlp():
    up, down, out = layers = problems((14336, 4096), (4096, 7168), (4096, 2048))
    assert chains.firsts(layers) == (up,)


def test_without_an_mlp_the_first_layer_gets_a_second_gemm_of_its_own():
    layers = problems((512, 256), (768, 256))
    assert chains.firsts(layers) == (layers[0],)
    assert chains.seconds(layers) == tuple(problems((256, 256)))


def test_each_format_and_activation_has_a_chain():
    layers = problems((512, 256)) + [
        Problem("mxfp4", 64, 512, 256),
        Problem("nvfp4", 64, 512, 256, "fp4"),
    ]
    assert set(chains.firsts(layers)) == set(layers)


def test_an_odd_layer_begins_none():
    layers = problems((33, 64))
    assert chains.firsts(layers) == chains.seconds(layers) == ()
