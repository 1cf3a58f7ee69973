"""The peers' layouts, as re-implemented for the benchmarks: their sizes, and bytes and back."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from benchmarks.storage.peer_layouts import (
    PolynomialTopK,
    budget,
    byte_lists,
    from_bfloat16,
    pack_draws,
    recommended,
    to_bfloat16,
    unpack_draws,
)


def test_draws_take_three_bytes_for_each_distinct_id_and_come_back_as_frequencies() -> None:
    drawn_PN = np.array([[7, 7, 131_071, 0], [5, 5, 5, 5]])
    packed, distinct_P = pack_draws(drawn_PN)
    assert distinct_P.tolist() == [3, 1]
    assert len(packed) == 3 * 4
    ids_PK, weights_PK = unpack_draws(packed, distinct_P, num_draws=4)
    assert ids_PK.tolist() == [[0, 7, 131_071], [5, 0, 0]]
    assert weights_PK.tolist() == [[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]


def test_many_draws_keep_their_total() -> None:
    probs_PV = torch.rand(20, 3_000, generator=torch.Generator().manual_seed(0)) ** 8
    drawn_PN = torch.multinomial(probs_PV, 50, replacement=True).numpy()
    packed, distinct_P = pack_draws(drawn_PN)
    ids_PK, weights_PK = unpack_draws(packed, distinct_P, num_draws=50)
    np.testing.assert_allclose(weights_PK.sum(axis=1), 1.0, rtol=1e-6)
    for row, (ids_K, weights_K) in enumerate(zip(ids_PK, weights_PK, strict=True)):
        for token_id, weight in zip(ids_K, weights_K, strict=True):
            if weight > 0:
                assert weight == pytest.approx((drawn_PN[row] == token_id).sum() / 50)


@pytest.mark.parametrize("drawn", [np.array([[131_072]]), np.zeros((1, 128), np.int64)])
def test_what_does_not_fit_its_bits_is_refused(drawn: npt.NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="17 bits"):
        pack_draws(drawn)


def test_polynomial_layouts_take_the_published_bytes() -> None:
    assert recommended(49_152).bytes_per_position == 312
    assert budget(49_152).bytes_per_position == 114
    assert recommended(151_936).id_bits == 18


@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
def test_polynomial_layout_keeps_ids_and_first_values_and_fits_a_curve_of_its_terms(
    vocab_size: int,
) -> None:
    layout = PolynomialTopK(vocab_size, k=32, exact_k=4, terms=(0, 1, 0.5))
    rng = np.random.default_rng(1)
    ids_PK = np.stack([rng.permutation(vocab_size)[:32] for _ in range(9)])
    x = np.arange(1, 29) / 28
    curve_PK = -3.0 - 2.0 * x - rng.random((9, 1)) * np.sqrt(x)
    exact_PK = -rng.random((9, 4))
    packed_PS = layout.pack(ids_PK, np.concatenate([exact_PK, curve_PK], axis=1))
    assert packed_PS.dtype == np.uint8
    assert packed_PS.shape == (9, layout.bytes_per_position)
    found_ids_PK, logprobs_PK = layout.unpack(packed_PS)
    np.testing.assert_array_equal(found_ids_PK, ids_PK)
    np.testing.assert_allclose(logprobs_PK[:, :4], exact_PK, rtol=2**-8)
    np.testing.assert_allclose(logprobs_PK[:, 4:], curve_PK, atol=1e-5)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(2)) * 30
    values[:2] = torch.tensor([1.00390625, 1.01171875])  # ties
    expected = values.to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values.numpy())), expected)


def test_positions_of_bytes_are_nested_lists() -> None:
    first, second = np.arange(6, dtype=np.uint8).reshape(3, 2), np.zeros((1, 2), np.uint8)
    table = byte_lists([first, second])
    assert table.schema.field(0).type == pa.list_(pa.list_(pa.uint8()))
    assert table.column(0).to_pylist() == [first.tolist(), second.tolist()]
