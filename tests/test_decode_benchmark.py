"""What of the decode benchmark needs no GPU: its problems, the chain of bound ops, its gate and table."""

import json
from pathlib import Path

import pytest
import torch

from quamba_kernels import OPS, Setting


@pytest.fixture(scope="module")
def bench(kernel_benchmark):
    return kernel_benchmark("decode")


def problems(bench, state: str):
    rng = torch.Generator().manual_seed(0)
    models = bench.Model("one", 64, 0, 1, 16), bench.Model("two", 4, 32, 2, 32)
    return [given for model in models for given in bench.problems(model, 3, state, rng, "cpu")]


@pytest.mark.parametrize("state", ["fp16", "int8"])
def test_the_chain_of_bound_ops_passes_the_gate(bench, state: str) -> None:
    made = problems(bench, state)
    assert [given.op for given in made] == ["conv_decode", "selective_decode", "ssd_decode"]
    for given in made:
        run = bench.chained(given.op, Setting("cpu", torch.float16, given.shape))
        bench.gate(run, given)
        assert OPS["ssd_update"].reference is bench.bodies.ssd_update.reference  # the torch bodies are back in place


def test_the_gate_sees_a_wrong_output_and_a_state_left_alone(bench) -> None:
    given = problems(bench, "fp16")[-1]
    body = OPS[given.op].reference

    def wrong(*args, **kwargs):
        data, scale = body(*args, **kwargs)
        return data + 2, scale

    def forgetful(projected, window, state, *args, **kwargs):
        return body(projected, window, state.clone(), *args, **kwargs)

    for run in (wrong, forgetful):
        with pytest.raises(ValueError):
            bench.gate(run, given)


def test_bytes_are_those_of_the_states_and_more(bench) -> None:
    for state, size in (("fp16", 2), ("int8", 1)):
        given = problems(bench, state)[-1]
        cells = given.args[2].numel() * size
        assert 2 * cells < given.moved < 4 * cells


def test_the_files_hold_what_was_measured(bench, tmp_path: Path) -> None:
    row = {"model": "one", "op": "ssd_decode", "state": "int8", "batch": 1, "implementation": "cuda"}
    good = {**row, "status": "ok", "us": 2.0, "us_p10": 1.5, "us_p90": 2.5, "gb_s": 1500.0, "copy_share": 0.5}
    rows = [good, {**row, "status": "failed", "reason": "it broke"}]
    bench.write(tmp_path / "a.json", {"seed": 1}, rows, bench.table(rows))
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0] == good
    text = (tmp_path / "a.md").read_text()
    assert "| one | ssd_decode | int8 | 1 | cuda | 2.00 | 1.50..2.50 | 1500 | 50 |" in text and "it broke" in text
