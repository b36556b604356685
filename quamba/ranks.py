"""The processes of one run (torchrun, accelerate launch): who they are, and the few things that they do together.

Nothing else here knows torch.distributed. A process alone is the only one of its run, and asks for the same things.
What comes out does not depend on how many processes there are: maxima and sums of integers have no order, every other
sum is taken in the order of the shared items, and what is computed once is sent to the others as it is.

torch comes with the first function that needs it, so that a command can ask early whether it is the one to speak.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from quamba.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

WAIT = timedelta(minutes=30)
"""How long a rank waits for the others: the longest that one may write a shard or factor a Hessian alone."""
JOIN = timedelta(minutes=5)
"""How long the first rank to come waits for the last."""
SAY = timedelta(seconds=20)
"""How long a rank that failed waits for another one to say why."""
ALL, FAILED, TOLD = "all", "failed", "told"


def launched() -> bool:
    """Whether a launcher started this process beside others."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def speaks() -> bool:
    """Whether this is the process of its run that prints and draws."""
    return not launched() or int(os.environ["RANK"]) == 0


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``: its number, and the device that it computes on (None: as asked for).

    What sends or receives is called by all ranks, in the same order. Raises UserError when another rank has ended, or
    does not come within 30 minutes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def owner(self, index: int) -> int:
        """The rank that an item falls to."""
        return index % self.size

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that fall to this rank, in their order."""
        return list(items[self.rank :: self.size])

    def rounds(self, count: int) -> int:
        """How many of ``count`` shared items fall to the rank with most of them."""
        return -(-count // self.size)

    def gather(self, own: list[Any], count: int) -> list[Any]:
        """What every rank made of its share, as JSON has it, in the order of the ``count`` items."""
        shares = self._exchange(own)
        return [shares[self.owner(index)][index // self.size] for index in range(count)]

    def tell(self, value: Any) -> Any:
        """What the first rank has for ``value``, as JSON has it."""
        return self._exchange(value)[0]

    def outline(self, tensors: Mapping[str, torch.Tensor] | None) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and type of the tensors that the first rank has, by name; the others may give None."""
        import torch

        own = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in (tensors or {}).items()}
        return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in self.tell(own).items()}

    def largest(self, tensor: torch.Tensor) -> None:
        """Replace every element by the largest among the ranks."""
        if self.size > 1:
            with _together() as dist:
                dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def count(self, tensor: torch.Tensor) -> None:
        """Replace every element by the sum over the ranks; exact where these are integers that the type holds."""
        if self.size > 1:
            with _together() as dist:
                dist.all_reduce(tensor)

    def publish(self, tensor: torch.Tensor, owner: int) -> None:
        """Give every rank what its owner has in a contiguous tensor."""
        if self.size > 1:
            with _together() as dist:
                dist.broadcast(tensor, owner)

    def move(self, tensor: torch.Tensor, source: int, target: int) -> None:
        """Give the target what the source has in a contiguous tensor; the others may hold anything."""
        if source == target or self.rank not in (source, target):
            return
        with _together() as dist:
            dist.send(tensor, target) if self.rank == source else dist.recv(tensor, source)

    def add_in_order(self, total: torch.Tensor, part: torch.Tensor | None) -> None:
        """Add to a total [N, ...] the part of the first rank, then that of the second and so on; None is nothing. Each
        rank does so in its own rows: ``complete`` brings them together."""
        if self.size == 1:
            if part is not None:
                total.add_(part)
            return
        cuts = self._cuts(len(total))
        rows = total[cuts[self.rank] : cuts[self.rank + 1]]
        parts = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        with _together() as dist:
            dist.all_to_all_single(
                parts, total.new_zeros(total.shape) if part is None else part.contiguous(),
                [len(rows)] * self.size, [b - a for a, b in zip(cuts, cuts[1:], strict=False)],
            )  # fmt: skip
        for each in parts.split(len(rows)) if len(rows) else ():
            rows.add_(each)

    def complete(self, total: torch.Tensor) -> None:
        """Give every rank the whole of a total that ``add_in_order`` added up."""
        cuts = self._cuts(len(total))
        for owner in range(self.size):
            self.publish(total[cuts[owner] : cuts[owner + 1]], owner)

    def _cuts(self, rows: int) -> list[int]:
        return [rows * rank // self.size for rank in range(self.size + 1)]

    def _exchange(self, value: Any) -> list[Any]:
        import torch

        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _together() as dist:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(own)]))
            texts = [own.new_zeros(int(max(sizes))) for _ in sizes]
            dist.all_gather(texts, torch.cat([own, own.new_zeros(len(texts[0]) - len(own))]))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among those that a launcher started, with gloo for what lies on a CPU and NCCL on GPUs.

    A rank computes on the GPU of its number on this machine (LOCAL_RANK). SIGTERM, by which a launcher ends the others
    of a failed rank, unwinds like an exception, so that nothing half-written stays. Raises UserError when there are
    fewer GPUs than processes, when torch.distributed is in use already, and when the others do not come.
    """
    if not launched():
        yield Ranks(device=device)
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        raise UserError("torch.distributed is in use already in this process; join the ranks before anything else does")
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"process {local} of this machine has no GPU among {there}; start one process for each")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    before = signal.signal(signal.SIGTERM, _end)
    with _together():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = _store(JOIN), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if store.add("here", 1) == size:
            store.set(ALL, "")
        store.wait([ALL], JOIN)
        if store.get(ALL):
            raise RuntimeError("it failed before it came")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
    yield Ranks(rank, size, device)
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, before)


def fail(say: Callable[[], None], status: int) -> NoReturn:
    """End this rank, and by that the run. The first rank that fails says why; those that fail in turn wait until it
    has. Nothing else is waited for: what others still have to send will not come."""
    try:
        store = _store(SAY)
        if store.add(FAILED, 1) > 1:
            store.wait([TOLD], SAY)
        else:
            say()
            store.set(TOLD, "")
            store.set(ALL, FAILED)  # whoever still waits for this rank need not
    except (RuntimeError, OSError):  # the store went with the rank that kept it, and nobody knows what was said
        say()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _together() -> Iterator[Any]:
    """Turn what a lost connection says into a UserError."""
    import torch
    import torch.distributed as dist

    try:
        yield dist
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] *", "", " ".join(str(error).split()))[:80]  # without the place in gloo's source
        raise UserError(
            f"rank {os.environ['RANK']} has lost another process of this run, or waited {WAIT} for it ({reason}); "
            "look for what that one said, and whether it was killed for memory"
        ) from None


_STORES: list[Any] = []


def _store(timeout: timedelta) -> Any:
    """What the ranks know each other by, reached once."""
    if not _STORES:
        import torch.distributed as dist

        _STORES.append(dist.PrefixStore("quamba", next(iter(dist.rendezvous("env://", timeout=timeout)))[0]))
    return _STORES[0]


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
