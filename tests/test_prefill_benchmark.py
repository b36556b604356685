"""What of the benchmark of a prompt's kernels needs no GPU: its problems, gate, table and command line."""

import json

import pytest
import torch

from quamba_kernels import OPS

TOKENS = 200


@pytest.fixture(scope="module")
def prefill(kernel_benchmark):
    return kernel_benchmark("prefill")


@pytest.fixture
def problems(prefill):
    tiny = prefill.Model("tiny", D=32, I=48, conv=64, at=48, proj=160, norm_groups=2, N=8, R=6)
    heads = tiny._replace(conv=80, N=0, heads=(4, 12, 2, 8))
    rng = torch.Generator().manual_seed(0)
    return [given for model in (tiny, heads) for given in prefill.problems(model, TOKENS, rng, "cpu")]


def test_problems_are_what_the_ops_take_and_the_gate_tells_right_from_wrong(prefill, problems) -> None:
    assert {p.op for p in problems} == {
        "rms_norm", "quantize", "causal_conv1d", "selective_scan", "ssd_scan", "ssd_prefill", "gate_output"
    }  # fmt: skip
    for given in problems:
        right = OPS[given.op].reference
        prefill.gate(right, given, TOKENS)

        def wrong(*args, right=right, **kwargs):
            result = right(*args, **kwargs)
            prefill.flat(result)[0][:, 7] += 2
            return result

        with pytest.raises(ValueError, match="tensor 0"):
            prefill.gate(wrong, given, TOKENS)


def test_bytes_are_those_of_inputs_and_outputs(prefill, problems) -> None:
    norm, conv = problems[0], problems[2]
    assert prefill.bytes_moved(OPS["rms_norm"].reference, norm) == TOKENS * 32 * (4 + 1) + 4
    weights = 64 * 4 + 64 * 2 + 3 * 64 * 4
    assert prefill.bytes_moved(OPS["causal_conv1d"].reference, conv) == TOKENS * 64 * (2 + 1) + weights + 3 * 64


def test_copies_keep_the_strides_of_a_projection(prefill, problems) -> None:
    x = problems[2].args[0]
    same = prefill.copied(x)
    assert same.stride() == x.stride() and torch.equal(same, x) and same.data_ptr() != x.data_ptr()


def test_results_are_written_as_json_and_as_a_table(prefill, tmp_path) -> None:
    place = {"model": "tiny", "op": "rms_norm", "variant": "static", "tokens": 1, "implementation": "cuda"}
    good = {"status": "ok", "us": 2.0, "us_p10": 1.9, "us_p90": 2.1, "gb_s": 1500.0, "copy_share": 0.5}
    rows = [{**place, **good}, {**place, "status": "failed", "reason": "ValueError: wrong"}]
    prefill.write(tmp_path / "out.json", {"device": "none"}, rows, prefill.table(rows))
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert "| 2.00 | 1.90..2.10 | 1500 | 50 | - |" in lines[2] and "ValueError: wrong" in lines[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs without a GPU alone")
def test_it_says_that_it_needs_a_gpu(prefill, capsys) -> None:
    assert prefill.main(prefill.parser().parse_args([])) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
