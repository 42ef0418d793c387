"""The selection against a stable sort; whole-numbered vectors make every product exact, and ties plenty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blto.evaluation import neighbours
from blto.evaluation.neighbours import nearest


def whole(n: int, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(-9, 10, (n, dim), generator=torch.Generator().manual_seed(seed)).float()


def check(keys: Tensor, queries: Tensor, k: int) -> None:
    products, found = queries @ keys.T, list(nearest(keys, queries, k))
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = products.sort(dim=1, descending=True, stable=True).indices[:, :k]  # stable: of equals the lower index
    assert indices.dtype == torch.int64
    assert torch.equal(indices.sort(dim=1).values, order.sort(dim=1).values)
    assert torch.equal(values, products.gather(1, indices))


@pytest.mark.parametrize("k", [1, 2, 15, 200, 1500, 3001])
def test_the_k_largest_and_of_equals_the_first(k: int) -> None:
    check(whole(3001), whole(37, seed=1), k)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_order_of_the_bank_does_not_matter(order: str) -> None:
    queries = whole(1, seed=1)
    keys = whole(5000)
    ranks = (keys @ queries[0]).argsort(descending=order == "falling")
    check(keys[:1].expand(5000, -1) if order == "equal" else keys[ranks], queries.expand(3, -1), 50)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 2050])
def test_any_number_of_keys(n: int) -> None:
    check(whole(n), whole(5, seed=1), min(n, 20))


def test_queries_come_back_in_blocks_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", 8)
    monkeypatch.setattr(neighbours, "KEYS", 96)
    keys, queries = whole(700), whole(21, seed=1)
    assert [len(values) for values, _ in nearest(keys, queries, 30)] == [8, 8, 5]
    check(keys, queries, 30)


def test_threads_share_the_queries() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(whole(1500), whole(65, seed=1), 40)
    finally:
        torch.set_num_threads(threads)
