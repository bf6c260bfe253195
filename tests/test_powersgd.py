"""Low-rank means: what power iteration starts from, and directions that are lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postlocal.comm.group import Alone
from postlocal.wire import low_rank as powersgd


def mean_of(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The approximation of one matrix, and where to start next time."""
    output = torch.empty_like(matrix)[None]
    (following,) = powersgd.mean_([matrix[None]], [start.clone()], [output], [], Alone())
    return output[0], following


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_after_a_mean_of_zeros_the_next_ones_are_found_again(rank: int) -> None:
    start = torch.randn(1, 12, rank, generator=torch.Generator().manual_seed(0))
    output, start = mean_of(torch.zeros(16, 12), start)
    assert not output.any()
    matrix = torch.zeros(16, 12)
    matrix[8:, 6:] = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 7))
    for _ in range(3):
        output, start = mean_of(matrix, start)
    torch.testing.assert_close(output, matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_matrix_of_rank_one_is_exact_at_any_rank(rank: int) -> None:
    matrix = torch.outer(torch.randn(40), torch.randn(30))
    start = torch.randn(1, 30, rank)
    for _ in range(4):
        output, start = mean_of(matrix, start)
        torch.testing.assert_close(output, matrix, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(2, 60),
    columns=st.integers(1, 2),
    seed=st.integers(0, 50),
    likeness=st.sampled_from([0.0, 1e-8, 1e-4, 1.0]),
)
def test_columns_become_orthonormal_however_alike_they_are(
    rows: int, columns: int, seed: int, likeness: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3, rows, 1, generator=generator)
    noise = torch.randn(3, rows, columns, generator=generator)
    matrices = first + likeness * noise
    powersgd.orthogonalise_(matrices)
    gram = matrices.transpose(1, 2) @ matrices
    torch.testing.assert_close(gram, torch.eye(columns).expand(3, -1, -1), rtol=0, atol=1e-5)
