"""`quamba inspect` and `quamba compare` on the command line, and the plot."""

import json
import struct
import sys

import pytest
from typer.testing import CliRunner

import quamba
from quamba.cli import app
from quamba.errors import UserError
from quamba.inspection import activations, plot

LITTLE = {"samples": 3, "seqlen": 24, "device": "cpu"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def cells(line):
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_inspect_prints_what_it_writes(tiny_checkpoint, stock, text, tmp_path):
    folder, output = stock("w4a8", "mamba2"), tmp_path / "found.json"
    picture = tmp_path / "found.png"
    result = run("inspect", folder, "--original", tiny_checkpoint("mamba2")[0], "--calibration", text, "--samples", 2,
                 "--seqlen", 16, "--json", output, "--plot", picture, "--layer", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert set(found) == {"model", "original", "model_type", "recipe", "tokens", "rows", "totals", "sizes", "rotations"}
    lines = [cells(line) for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == len(found["rows"]) + 1
    for line, each in zip(lines, found["rows"], strict=False):
        layer = "-" if each["layer"] is None else str(each["layer"])
        assert line[:3] == [layer, each["role"], each["stored_as"] or "-"]
        assert line[4] == f"{each['bytes'] / 1e6:.2f}"
        seen = each["input"]
        assert line[7] == ("-" if seen is None else f"{seen['peak']:.4g}")
    assert lines[-1][3] == f"{found['totals']['bits']:.2f}"
    assert lines[-1][5] == f"{100 * found['totals']['weight_error']:.2f}%"
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (1500, 490)
    assert result.stderr == ""


def test_help_defines_the_outlier_ratio():
    said = " ".join(run("inspect", "--help").stdout.split())
    assert f"exceeds {activations.OUTLIER:g} times that of the median channel" in said
    assert "maximum over the root mean square of all values" in said


@pytest.mark.parametrize("original", [True, False, None])
def test_every_kind_of_model_can_be_drawn(original, tiny_checkpoint, stock, text):
    folder = tiny_checkpoint("mamba")[0]
    found = quamba.inspect(*((folder,) if original is None else (stock("w8a8", "mamba"), folder if original else None)),
                           text=text, **LITTLE)  # fmt: skip
    image = plot.draw(found)
    assert image.startswith(b"\x89PNG")
    assert found.quantised == (original is not None)


def test_the_plot_shows_the_worst_layer_unless_told(tiny_checkpoint, text):
    found = quamba.inspect(tiny_checkpoint("mamba")[0], text=text, **LITTLE)
    chosen = plot.pick(found, None)
    ratios = {r.layer: r.before.outlier_ratio for r in found.rotations if r.role == "out_proj"}
    assert chosen[0].layer == max(ratios, key=ratios.get) and [r.role for r in chosen] == ["out_proj", "residual"]
    assert [plot.pick(found, layer)[0].layer for layer in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match="layer 7 is none of the 2 layers 0 to 1"):
        plot.draw(found, 7)
    with pytest.raises(UserError, match="none were measured"):
        plot.draw(quamba.inspect(tiny_checkpoint("mamba")[0], samples=0))


@pytest.fixture
def places(tiny_checkpoint, stock, text, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in tiny_checkpoint("mamba2")[0].iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    (tmp_path / "blank.txt").write_text(" \n")
    return {
        "M1": tiny_checkpoint("mamba")[0], "M2": tiny_checkpoint("mamba2")[0], "Q2": stock("w8a8", "mamba2"),
        "DEEP": tiny_checkpoint("mamba2", (("num_hidden_layers", 3),))[0], "FOREIGN": foreign, "TEXT": text,
        "BLANK": tmp_path / "blank.txt", "DIR": tmp_path,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "nowhere"], "neither a directory, a Hub id, nor an embedded checkpoint"),
        (["inspect", "M2", "--original", "M2"], "can only be given beside a quantised model"),
        (["inspect", "Q2", "--original", "Q2"], "give as original the checkpoint that the model was made of"),
        (["inspect", "Q2", "--original", "M1", "--samples", "0"], "a mamba2 of 2 layers"),
        (["inspect", "Q2", "--original", "DEEP", "--samples", "0"], "is a mamba2 of 3 layers"),
        (["inspect", "FOREIGN"], "quantised by 'gptq'"),
        (["inspect", "M2", "--calibration", "missing.txt"], "no calibration file 'missing.txt'"),
        (["inspect", "M2", "--calibration", "TEXT", "--seqlen", "9999"], "give more text or less --seqlen"),
        (["inspect", "M2", "--samples", "-1"], "Invalid value for '--samples'"),
        (["inspect", "M2", "--json", "no/where.json"], "no directory 'no'"),
        (["inspect", "M2", "--plot", "DIR"], "it is a directory"),
        (["inspect", "M2", "--layer", "1"], "together with --plot"),
        (["inspect", "M2", "--plot", "x.png", "--samples", "0"], "--samples of at least 1"),
        (["compare", "M2"], "Missing argument 'B'"),
        (["compare", "M2", "nowhere"], "neither a directory, a Hub id, nor an embedded checkpoint"),
        (["compare", "M2", "DEEP"], "only models of one shape"),
        (["compare", "M2", "Q2", "--text", "missing.txt"], "There is no text file 'missing.txt'"),
        (["compare", "M2", "Q2", "--text", "BLANK"], "holds no text"),
        (["compare", "M2", "Q2", "--text", "TEXT", "--tokens", "99999"], "fewer than the 99999 asked for"),
        (["compare", "M2", "Q2", "--prompt", " "], "The prompt is empty"),
        (["compare", "M2", "Q2", "--tokens", "1"], "Invalid value for '--tokens'"),
        (["compare", "M2", "Q2", "--json", "DIR"], "it is a directory"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(arguments, sentence, places):
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_plot_without_matplotlib_says_what_to_install(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", tiny_checkpoint("mamba2")[0], "--plot", tmp_path / "x.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: plots need matplotlib; install it with: pip install quamba[plot].\n"


def test_compare_prints_what_it_writes(tiny_checkpoint, stock, text, tmp_path):
    output = tmp_path / "found.json"
    result = run("compare", tiny_checkpoint("mamba2")[0], stock("w4a8", "mamba2"), "--text", text, "--tokens", 40,
                 "--max-new-tokens", 12, "--json", output)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    lines = [cells(line) for line in result.stdout.splitlines() if line.startswith("│")]
    assert lines == [[str(i), f"{100 * e:.3f}%"] for i, e in enumerate(found["layer_errors"])]
    said = " ".join(result.stdout.split())
    assert f"mean {found['kl_mean']:.3g}, 99th percentile {found['kl_p99']:.3g} nats" in said
    where = found["divergence"]
    assert f"differs at new token {where['position'] + 1} of 12: A says {where['a']!r}, B {where['b']!r}" in said
