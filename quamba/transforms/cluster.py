"""Sort-and-cluster of the value channels (Quamba2, section 4.3), by the noise that a shared scale costs.

A cluster of channels shares the scale of its largest member, so its rounding noise is (members) * (largest)^2. Channels
are sorted inside each head, heads by their magnitude, and both are cut where that sum is least, by dynamic programming:
the magnitude of a head is kept, and clusters are contiguous by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quamba.transforms.permute import Permutation


@dataclass(frozen=True)
class Clusters:
    """The new order and its boundaries.

    permutations: of "value" inside each head, then of "head"; head_end int32 [G, h] and channel_end int32 [G, h, c]:
    where each head cluster ends within its group, each channel cluster within the head.
    """

    permutations: list[Permutation]
    head_end: torch.Tensor
    channel_end: torch.Tensor


def cut(cost: torch.Tensor, parts: int) -> list[int]:
    """Ends of the ``parts`` contiguous pieces of 0..n with the least total cost; cost [n, n + 1] of piece [i, j)."""
    n = cost.shape[0]
    best = cost[0].clone()
    choices = []
    for _ in range(parts - 1):
        total = best[:n, None] + cost
        total[torch.arange(n)[:, None] >= torch.arange(n + 1)[None, :]] = torch.inf
        best, choice = total.min(0)
        choices.append(choice)
    ends = [n]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return ends[::-1]


def _head_cost(profile: torch.Tensor) -> torch.Tensor:
    """cost[i, j] = (j - i) * sum over positions of the largest profile^2 among heads i..j-1; profile [n, P]."""
    n = profile.shape[0]
    cost = torch.full((n, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n):
        top = profile[i:].cummax(0).values.square().sum(1)
        cost[i, i + 1 :] = top * torch.arange(1, n - i + 1)
    return cost


def _channel_cost(top: torch.Tensor) -> torch.Tensor:
    """cost[i, j] = (j - i) * top[j - 1]^2 for an ascending top [P]."""
    n = len(top)
    i, j = torch.arange(n)[:, None], torch.arange(n + 1)[None, :]
    square = torch.cat([top.new_zeros(1), top.square()])[None, :]
    return torch.where(j > i, (j - i) * square, torch.inf)


def sort_and_cluster(magnitude: torch.Tensor, groups: int, heads: int, channels: int) -> Clusters:
    """Order and clusters for the calibrated magnitude [H, P] of x, in ``groups`` state groups.

    heads and channels are the numbers of clusters wanted per group and per head; no more are made than there are
    members.
    """
    total, headdim = magnitude.shape
    per_group = total // groups
    heads, channels = min(heads, per_group), min(channels, headdim)
    profile, value_order = magnitude.double().sort(1)
    head_order, head_end = [], torch.zeros(groups, heads, dtype=torch.int32)
    channel_end = torch.zeros(groups, heads, channels, dtype=torch.int32)
    for g in range(groups):
        members = profile[g * per_group : (g + 1) * per_group]
        order = members.norm(dim=1).argsort()
        ends = cut(_head_cost(members[order]), heads)
        head_order.append(order + g * per_group)
        head_end[g] = torch.tensor(ends)
        for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            top = members[order[start:end]].amax(0)
            channel_end[g, k] = torch.tensor(cut(_channel_cost(top), channels))
    permutations = [Permutation("value", value_order, outer="head"), Permutation("head", torch.cat(head_order))]
    return Clusters(permutations, head_end, channel_end)


def cluster_label(head_end: torch.Tensor, channel_end: torch.Tensor, heads: int, headdim: int) -> torch.Tensor:
    """Flat cluster index of every channel, int64 [H, P], for scales stored as [G, h, c]."""
    groups, head_clusters, channel_clusters = channel_end.shape
    head = torch.arange(heads, device=head_end.device) % (heads // groups)
    group = torch.arange(heads, device=head_end.device) // (heads // groups)
    head_cluster = (head[:, None] >= head_end[group]).sum(1)
    channel = torch.arange(headdim, device=head_end.device)
    channel_cluster = (channel[None, :, None] >= channel_end[group, head_cluster][:, None, :]).sum(2)
    return (group * head_clusters + head_cluster)[:, None] * channel_clusters + channel_cluster
