"""How a backend is chosen, forced, refused and explained."""

import pytest
import torch

from quamba_kernels import OPS, BackendUnavailable, Op, Setting, doctor, ops
from quamba_kernels.registry import ENVIRONMENT, intercept

CPU = Setting("cpu", torch.float32, {"K": 256, "O": 64, "S": 128})
REFUSING = [(name, b) for name, op in OPS.items() for b in op.candidates if b.why_not(CPU) is not None]


@pytest.fixture
def double() -> Op:
    def twice(x, scale, *, bias=None):
        return x * scale

    return Op(twice)


@pytest.mark.parametrize("name", OPS)
def test_the_first_usable_backend_is_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    reasons = OPS[name].explain(CPU)
    assert list(reasons)[-1] == "torch" and reasons["torch"] is None
    assert OPS[name].bind(CPU).name == next(b for b, reason in reasons.items() if reason is None)
    assert all(reason is None or (len(reason) > 20 and " " in reason) for reason in reasons.values())


@pytest.mark.parametrize("name", OPS)
def test_every_op_can_be_forced_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "torch")
    assert OPS[name].bind(CPU).fn is OPS[name].reference
    monkeypatch.setenv(ENVIRONMENT, f"{name}=torch")
    assert OPS[name].bind(CPU).fn is OPS[name].reference


def test_forcing_one_op_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {name: op.bind(CPU).name for name, op in OPS.items()}
    monkeypatch.setenv(ENVIRONMENT, " ssd_scan=torch, selective_scan=torch ")
    assert {name: op.bind(CPU).name for name, op in OPS.items()} == {
        **free, "ssd_scan": "torch", "selective_scan": "torch"
    }  # fmt: skip


@pytest.mark.parametrize("forced", ["linear_w8a8=nowhere", "nowhere"])
def test_a_forced_backend_that_does_not_exist(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, forced)
    with pytest.raises(BackendUnavailable, match="nowhere.*linear_w8a8 has no such backend.*Usable here: .*torch"):
        OPS["linear_w8a8"].bind(CPU)


def test_a_forced_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "linear_w4a16=cpu")
    with pytest.raises(BackendUnavailable, match="groups of 32, 64, 128 or 256, got 24"):
        OPS["linear_w4a16"].bind(Setting("cpu", torch.float32, {"K": 240, "O": 64, "S": 24}))
    for name, backend in REFUSING:
        monkeypatch.setenv(ENVIRONMENT, f"{name}={backend.name}")
        with pytest.raises(BackendUnavailable) as refused:
            OPS[name].bind(CPU)
        assert str(backend.why_not(CPU)) in str(refused.value)


def test_an_op_that_does_not_exist_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "linear_w8a9=cpu")
    with pytest.raises(BackendUnavailable, match=r"unknown ops \['linear_w8a9'\]; known are .*linear_w8a8"):
        OPS["rms_norm"].bind(CPU)


@pytest.mark.parametrize("text", ["linear_w8a8=cpu,torch", "linear_w8a8=cpu,"])
def test_a_malformed_variable_is_not_a_crash(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(BackendUnavailable, match="op=backend"):
        OPS["linear_w8a8"].bind(CPU)


def test_a_wrong_signature_is_refused(double: Op) -> None:
    with pytest.raises(TypeError, match="twice/wrong: parameters .* differ"):
        double.backend("wrong")(lambda x, scales, *, bias=None: x)
    assert double.backends == []


def test_a_name_is_taken_once(double: Op) -> None:
    double.backend("mine")(lambda x, scale, *, bias=None: x)
    for name in ("mine", "torch"):
        with pytest.raises(ValueError, match="registered twice"):
            double.backend(name)(lambda x, scale, *, bias=None: x)


def test_a_lower_rank_is_tried_first(double: Op) -> None:
    for name, rank in (("late", 70), ("early", 10), ("middle", 50)):
        double.backend(name, rank=rank)(lambda x, scale, *, bias=None: x)
    assert [b.name for b in double.candidates] == ["early", "middle", "late", "torch"]


def test_a_backend_of_another_device_is_passed_over() -> None:
    for name, op in OPS.items():
        reasons = op.explain(Setting("xpu", torch.float16, dict(CPU.shape)))
        assert reasons["torch"] is None
        for backend, reason in reasons.items():
            if backend in ("cpu", "vnni", "triton", "cuda"):
                assert reason is not None and "xpu" in reason, f"{name}/{backend}"


def test_doctor_names_one_choice_and_every_reason() -> None:
    rows = doctor()
    devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    assert {(r["op"], r["device"]) for r in rows} == {(name, device) for name in OPS for device in devices}
    for name in OPS:
        for device in devices:
            mine = [r for r in rows if r["op"] == name and r["device"] == device]
            assert [r["backend"] for r in mine] == [b.name for b in OPS[name].candidates]
            assert sum(r["chosen"] for r in mine) == 1
            assert all(r["usable"] == (r["reason"] is None) for r in mine)
            assert next(r for r in mine if r["usable"])["chosen"]


def test_intercepted_calls_go_to_the_handler_until_the_end():
    seen = []
    bound = ops.quantize.bind(Setting("cpu"))

    def handler(backend, args, kwargs):
        seen.append((backend.name, len(args), kwargs))
        return "counted"

    with pytest.raises(KeyError), intercept(handler):
        assert bound(torch.ones(2), scale=None) == "counted"
        raise KeyError
    assert seen == [(bound.name, 1, {"scale": None})]
    assert bound(torch.ones(1, 2)).data.tolist() == [[127, 127]]
