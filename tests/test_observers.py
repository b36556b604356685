"""Statistics of activations and the scales made of them."""

import math

import pytest
import torch

from quamba.modules.site import Site
from quamba.observers import BINS_PER_OCTAVE, DETAILED, OBSERVERS, QMAX, Histogram
from quamba.recipe import ActivationSpec

WIDTH = 2 ** (1 / BINS_PER_OCTAVE)
GRANULARITIES = ("tensor", "channel", "state_group", "cluster")


def seen(x: torch.Tensor, pieces: int = 3) -> Histogram:
    histogram = Histogram(x.shape[-1], detailed=True)
    for piece in x.chunk(pieces):
        histogram.update(piece)
    return histogram


def bound(name: str, x: torch.Tensor, quantile: float = 0.99) -> torch.Tensor:
    histogram = seen(x)
    return OBSERVERS[name](histogram.peak, histogram.counts, quantile)


def test_absmax_is_the_largest_magnitude() -> None:
    x = torch.tensor([[1.0, -7.5, 0.0], [-3.0, 2.0, 0.0]])
    assert bound("absmax", x).tolist() == [3.0, 7.5, 0.0]


def test_percentile_of_known_data() -> None:
    x = torch.arange(1, 10001).float().unsqueeze(1) / 100
    for quantile, value in ((0.9, 90), (0.99, 99), (0.999, 99.9), (0.6, 60)):
        got = float(bound("percentile", x, quantile))
        assert value <= got * (1 + 1e-6) and got <= value * WIDTH * (1 + 1e-3)
    assert float(bound("percentile", x, 1.0)) == 100


@pytest.mark.parametrize("top", [1e-5, 1.0, 3e3, 1e5, 1e7])
def test_percentile_one_is_the_maximum_at_any_magnitude(top: float) -> None:
    x = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)) * top
    assert math.isclose(float(bound("percentile", x, 1.0)), float(x.max()), rel_tol=0.05)


def squared_error(x: torch.Tensor, limit: float) -> float:
    codes = torch.round(x / (limit / QMAX)).clamp(-QMAX, QMAX)
    return float((codes * limit / QMAX - x).square().mean())


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("kind", ["normal", "outlier", "uniform"])
def test_mse_is_near_the_best_clip(kind: str, size: float) -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(20000, 1, generator=rng) if kind == "uniform" else torch.randn(20000, 1, generator=rng)
    if kind == "outlier":
        x[0] = 20
    x *= size
    chosen, peak = squared_error(x, float(bound("mse", x))), float(x.abs().max())
    best = min(squared_error(x, peak * i / 200) for i in range(20, 201))
    assert chosen <= best * 1.1  # the bins are 4% wide
    assert chosen <= squared_error(x, peak) * 1.001


@pytest.mark.parametrize("name", OBSERVERS)
def test_bounds_never_exceed_the_maximum_and_follow_the_scale(name: str) -> None:
    x = torch.randn(3000, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-3, 1, 10, 100, 0])
    low, double = bound(name, x), bound(name, 2 * x)
    assert (low <= x.abs().amax(0)).all() and (low[:4] > x.abs().amax(0)[:4] * 0.2).all() and low[4] == 0
    assert torch.allclose(double, 2 * low, rtol=1e-4)  # a doubling moves every value by 16 bins


@pytest.mark.parametrize("name", OBSERVERS)
def test_order_and_batches_do_not_matter(name: str) -> None:
    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(3))
    whole, shuffled = seen(x, 1), seen(x.flip(0), 7)
    got = [OBSERVERS[name](h.peak, h.counts, 0.99) for h in (whole, shuffled)]
    assert torch.equal(*got)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_raise(bad: float) -> None:
    x = torch.zeros(4, 3)
    x[2, 1] = bad
    for detailed in (False, True):
        with pytest.raises(FloatingPointError, match="NaN or Inf"):
            Histogram(3, detailed).update(x)


def site(granularity: str, observer: str = "absmax") -> Site:
    spec = ActivationSpec(granularity=granularity, observer=observer, quantile=0.99)
    made = Site(spec, 16, groups=2, clusters=(4, 4, 2, 2), dtype=torch.float32)
    if granularity == "cluster":
        made.head_end.copy_(torch.tensor([[1, 2], [1, 2]]))
        made.channel_end.copy_(torch.tensor([[[2, 4], [1, 4]], [[3, 4], [2, 4]]]))
    return made


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_site_settles_on_the_statistics_of_each_group(granularity: str, observer: str) -> None:
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 17)
    made = site(granularity, observer)
    made.observe()
    assert made(x).scale is None  # lets floats through while collecting
    made.settle()
    label, groups = made.label()
    assert groups == {"tensor": 1, "channel": 16, "state_group": 2, "cluster": 8}[granularity]
    for group in range(groups):
        members = seen(x[:, label == group].reshape(-1, 1))
        want = OBSERVERS[observer](members.peak, members.counts, 0.99) / QMAX
        assert torch.allclose(made.scale.flatten()[group], want)
    codes = made(x)
    assert codes.data.dtype == torch.int8 and (codes.data.abs() <= QMAX).all()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_permuting_channels_permutes_the_statistics(observer: str) -> None:
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(5)) * torch.arange(1, 13)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    before, after = seen(x), seen(x[:, order])
    assert torch.equal(after.peak, before.peak[order]) and torch.equal(after.counts, before.counts[order])
    label = torch.arange(12) // 4
    grouped = before.grouped(label, 3), after.grouped(label[order], 3)
    assert all(torch.equal(a, b) for a, b in zip(*grouped, strict=True))


def test_only_detailed_observers_need_counts() -> None:
    peak = torch.ones(2)
    for name in set(OBSERVERS) - DETAILED:
        assert torch.equal(OBSERVERS[name](peak, None, 0.9), peak)
