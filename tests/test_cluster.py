"""Sort-and-cluster: valid orders, boundaries that mean what the scales say, and the least noise."""

import itertools

import pytest
import torch

from quamba.transforms import Clusters, sort_and_cluster
from quamba.transforms.cluster import _channel_cost, cluster_label, cut

SHAPES = [(8, 16, 1, 4, 4), (8, 16, 2, 4, 4), (12, 8, 3, 4, 4), (6, 5, 2, 4, 8), (4, 4, 4, 2, 2), (24, 32, 1, 1, 1)]
"""H, P, G, then clusters of heads per group and of channels per head."""


def magnitudes(heads: int, headdim: int, groups: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(heads * headdim)
    noise = torch.rand(heads, headdim, generator=rng)
    spread = noise * torch.exp(2 * torch.randn(heads, 1, generator=rng))
    outlier = noise.clone()
    outlier[heads // 2, headdim // 2] = 1e4
    few = (noise * 3).floor()
    return {
        "spread": spread, "outlier": outlier, "few values": few, "constant": torch.ones_like(noise),
        "zero": torch.zeros_like(noise), "tiny": noise * 1e-30,
        "equal heads": noise[:1].expand_as(noise).clone(), "one dead head": noise.index_fill(0, torch.tensor(0), 0.0),
    }  # fmt: skip


CASES = [
    pytest.param(magnitude, *shape[2:], id=f"{name}-{shape}")
    for shape in SHAPES for name, magnitude in magnitudes(*shape[:3]).items()
]  # fmt: skip


def permuted(magnitude: torch.Tensor, made: Clusters) -> torch.Tensor:
    value, head = made.permutations
    assert (value.axis, value.outer, head.axis, head.outer) == ("value", "head", "head", None)
    return magnitude.gather(1, value.order)[head.order]


def noise(magnitude: torch.Tensor, label: torch.Tensor) -> float:
    """The sum over clusters of members * largest^2."""
    flat, flat_label = magnitude.double().flatten(), label.flatten()
    top = torch.zeros(int(label.max()) + 1, dtype=torch.float64).scatter_reduce(0, flat_label, flat, "amax")
    return float(top[flat_label].square().sum())


@pytest.mark.parametrize("magnitude, groups, heads, channels", CASES)
def test_orders_are_permutations_inside_the_groups(magnitude, groups: int, heads: int, channels: int) -> None:
    total, headdim = magnitude.shape
    value, head = sort_and_cluster(magnitude, groups, heads, channels).permutations
    assert torch.equal(value.order.sort(1).values, torch.arange(headdim).expand(total, -1))
    assert torch.equal(head.order.sort().values, torch.arange(total))
    assert torch.equal(head.order // (total // groups), torch.arange(total) // (total // groups))


@pytest.mark.parametrize("magnitude, groups, heads, channels", CASES)
def test_boundaries_fill_the_axis(magnitude, groups: int, heads: int, channels: int) -> None:
    total, headdim = magnitude.shape
    made = sort_and_cluster(magnitude, groups, heads, channels)
    heads, channels = min(heads, total // groups), min(channels, headdim)
    assert made.head_end.shape == (groups, heads) and made.channel_end.shape == (groups, heads, channels)
    for ends, size in ((made.head_end, total // groups), (made.channel_end, headdim)):
        assert ends.dtype == torch.int32 and (ends[..., -1] == size).all()
        assert (ends.diff(dim=-1) > 0).all() and (ends[..., 0] > 0).all()  # no cluster is empty


@pytest.mark.parametrize("magnitude, groups, heads, channels", CASES)
def test_labels_follow_the_boundaries(magnitude, groups: int, heads: int, channels: int) -> None:
    total, headdim = magnitude.shape
    made = sort_and_cluster(magnitude, groups, heads, channels)
    label = cluster_label(made.head_end, made.channel_end, total, headdim)
    _, h, c = made.channel_end.shape
    for head, channel in itertools.product(range(total), range(headdim)):
        group, inside = divmod(head, total // groups)
        k = next(i for i in range(h) if inside < made.head_end[group, i])
        j = next(i for i in range(c) if channel < made.channel_end[group, k, i])
        assert label[head, channel] == (group * h + k) * c + j


@pytest.mark.parametrize("magnitude, groups, heads, channels", CASES)
def test_clusters_cost_no_more_than_cruder_scales(magnitude, groups: int, heads: int, channels: int) -> None:
    total, headdim = magnitude.shape
    made = sort_and_cluster(magnitude, groups, heads, channels)
    cost = noise(permuted(magnitude, made), cluster_label(made.head_end, made.channel_end, total, headdim))
    per_group = (torch.arange(total) // (total // groups))[:, None].expand(total, headdim)
    assert cost <= noise(magnitude, per_group) * (1 + 1e-12)
    parts = made.channel_end.shape[-1]
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):  # the same heads, their sorted channels cut elsewhere
        inner = torch.randperm(headdim - 1, generator=rng)[: parts - 1].sort().values + 1
        ends = torch.cat([inner, torch.tensor([headdim])])
        other = cluster_label(made.head_end, ends.int().expand_as(made.channel_end), total, headdim)
        assert cost <= noise(permuted(magnitude, made), other) * (1 + 1e-12)
    even = sort_and_cluster(torch.ones_like(magnitude), groups, heads, channels)
    label = cluster_label(even.head_end, even.channel_end, total, headdim)
    assert cost <= noise(magnitude, label) * (1 + 1e-12)  # the same clusters of the unsorted channels


def test_a_spread_of_magnitudes_gains_much() -> None:
    magnitude = magnitudes(8, 16, 1)["spread"]
    made = sort_and_cluster(magnitude, 1, 4, 4)
    label = cluster_label(made.head_end, made.channel_end, 8, 16)
    assert noise(permuted(magnitude, made), label) < 0.5 * noise(magnitude, torch.zeros_like(label))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_cuts_are_the_best_there_are(parts: int) -> None:
    top = torch.rand(9, generator=torch.Generator().manual_seed(parts)).double().sort().values
    cost = _channel_cost(top)

    def total(ends: tuple[int, ...]) -> float:
        return float(sum(cost[i, j] for i, j in zip((0, *ends), (*ends, 9), strict=True)))

    best = min(total(ends) for ends in itertools.combinations(range(1, 9), parts - 1))
    assert total(tuple(cut(cost, parts)[:-1])) == pytest.approx(best, rel=1e-12)
