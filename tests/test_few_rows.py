"""Products of few rows with a matrix, in either order."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from medhead.kernels import few_rows


@pytest.mark.parametrize("helps", [True, False])
def test_linear_is_linear(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    """Any number of rows, leading dimensions, types, views and a bias; always contiguous, gradients included."""
    turned = []
    monkeypatch.setattr(few_rows, "turning_helps", lambda: helps)
    monkeypatch.setattr(few_rows, "turned", lambda *args: turned.append(args[0].shape) or TURNED(*args))
    for shape, dtype, bias in product(((1, 7), (5, 7), (2, 3, 7), (65, 7)), (torch.float32, torch.float64), (0, 1)):
        x = torch.randn(*shape, dtype=dtype)
        weight = torch.randn(11, 14, dtype=dtype)[:, ::2].requires_grad_()
        offset = torch.randn(11, dtype=dtype) if bias else None
        found, expected = few_rows.linear(x, weight, offset), F.linear(x, weight, offset)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()
        torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), weight)[0] for y in (found, expected)))
    assert set(turned) == ({(5, 7), (2, 3, 7)} if helps else set())


TURNED = few_rows.turned


def test_which_is_faster_is_measured() -> None:
    """The measurement runs, and its answer is kept."""
    few_rows.turning_helps.cache_clear()
    assert few_rows.turning_helps() in (True, False)
    assert few_rows.turning_helps.cache_info().misses == 1
