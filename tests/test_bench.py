"""`quamba bench`: what it counts, what it refuses, what it proves, what it writes."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from architectures import OWN, PLAIN, config_of
from quamba.bench import baselines, contender, cost, device, energy, latency, materialise, measure, source
from quamba.bench.baselines import mamba_ssm
from quamba.bench.latency import Times
from quamba.bench.request import Request, TransformersRequest
from quamba.cli import app
from quamba.decoding import Captured, Decoder
from quamba.errors import UserError
from quamba.models import ARCHITECTURES, describe
from quamba.recipe import FLOAT, load_recipe, stock_recipes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
RECIPES = ["float", *sorted(stock_recipes())]


def recipe_of(name):
    return FLOAT if name == "float" else load_recipe(name)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


@pytest.fixture
def tiny_shape(monkeypatch):
    """A published size called "tiny"."""
    entry = {"model_type": OWN[-1], "source": "none", "config": ARCHITECTURES[OWN[-1]].tiny[0]}
    monkeypatch.setattr(source, "shapes", lambda: {"tiny": entry})


# what is measured


@pytest.mark.parametrize("name", source.shapes())
def test_published_sizes_have_the_parameters_of_their_names(name):
    spec = describe(source.from_shape(name).config)
    count = spec.vocab * spec.d_model * (1 if source.shapes()[name]["config"]["tie_word_embeddings"] else 2)
    for block in spec.blocks:
        for sub in block.sublayers:
            axes = sub.mixer.axes
            for param in sub.mixer.params:
                count += math.prod(sum(math.prod(axes[a].size for a in s) for s in dim) for dim in param.layout)
    said = float(name.split("-")[-1][:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert count == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("model_type", "which"),
    [(name, i) for name in [*OWN, *PLAIN, "gla", "rwkv7"] for i in range(len(ARCHITECTURES[name].tiny))],
)
def test_drawn_weights_give_sane_logits(model_type, which, name):
    model = materialise.build(config_of(model_type, which), recipe_of(name), torch.float32, CPU)
    ids = torch.randint(0, 96, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder = Decoder(model)
        decoder.prefill(ids)
        logits = [decoder.step(ids[:, i]) for i in range(3)][-1]
    assert torch.isfinite(logits).all() and 0.3 < logits.std() < 3
    for key, tensor in model.state_dict().items():
        constant = key.endswith((".scale", "multiplier", "_end"))  # the groups of a tiny model are whole rows
        assert tensor.dim() < 2 or constant or tensor.unique().numel() > 2, key


def test_drawn_codes_fill_their_grid():
    model = materialise.build(config_of(OWN[-1]), load_recipe("w8a8"), torch.float32, CPU)
    codes = model.get_submodule(describe(model.config).blocks[0].path).get_submodule("mixer.in_proj").weight_packed
    assert (codes.abs().amax(1) == 127).all() and codes.unique().numel() > 100


def test_a_quantised_checkpoint_brings_its_recipe(stock):
    subject = source.from_model(stock("w4a8", OWN[0]))
    assert source.recipes([], subject) == [subject.recipe] and subject.recipe.name == "w4a8"
    assert getattr(subject.config, "quantization_config", None) is None
    with pytest.raises(UserError, match="leave --recipe out"):
        source.recipes(["w8a8"], subject)


# what is timed


def test_percentiles_are_numpys_under_vllms_names():
    random = np.random.default_rng(0)
    requests = [Times(float(random.random()), tuple(map(float, random.random(5)))) for _ in range(7)]
    found = latency.summary(requests)
    each = {
        "ttft": np.array([r.first for r in requests]),
        "tpot": np.array([np.mean(r.further) for r in requests]),
        "itl": np.array([t for r in requests for t in r.further]),
        "e2el": np.array([r.first + sum(r.further) for r in requests]),
    }
    for name, values in each.items():
        wanted = {
            "mean": values.mean(), "median": np.percentile(values, 50), "std": values.std(),
            "p90": np.percentile(values, 90), "p99": np.percentile(values, 99),
        }  # fmt: skip
        for statistic, value in wanted.items():
            assert found.pop(f"{statistic}_{name}_ms") == pytest.approx(value)
    assert not found


def test_throughput_counts_the_whole_batch():
    found = latency.throughput([Times(100.0, (50.0, 50.0))] * 2, batch=4, prompt=10, generate=3)
    assert found == {
        "request_throughput": pytest.approx(8 / 0.4), "output_throughput": pytest.approx(24 / 0.4),
        "total_token_throughput": pytest.approx(104 / 0.4), "prefill_throughput": pytest.approx(80 / 0.2),
        "decode_throughput": pytest.approx(16 / 0.2),
    }  # fmt: skip


class Fake(Request):
    """Logits [1, 3] that a list gives, run after run: eager, eager, captured, ..."""

    def __init__(self, *runs):
        self.runs, self.now = list(runs), -1
        self.captured = (Captured(lambda: None, capture=False),)

    def prefill(self):
        self.now = min(self.now + 1, len(self.runs) - 1)
        self.at = 0
        return torch.tensor([self.runs[self.now][0]])

    def step(self):
        self.at += 1
        return torch.tensor([self.runs[self.now][self.at]])

    warm, state_bytes = True, 0


RIGHT = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]
NEAR = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.5]]
OTHER = [[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]]


def test_gate_says_how_exact_it_was():
    assert measure.gate(Fake(RIGHT, RIGHT, RIGHT), 1, True) == "bitwise"
    assert measure.gate(Fake(RIGHT, NEAR, NEAR), 1, True) == "tokens"
    assert measure.gate(Fake(RIGHT, RIGHT), 1, False) == "eager"


@pytest.mark.parametrize(
    ("runs", "capture", "sentence"),
    [
        ((RIGHT, RIGHT, OTHER), True, "captured run at step 1 differ"),
        ((RIGHT, RIGHT, NEAR), True, "captured run at step 1 differ .* 0.5"),
        ((RIGHT, NEAR, OTHER), True, "captured run at step 1 differ"),
        ((RIGHT, OTHER), False, "second eager run at step 1 differ"),
        (([[math.nan] * 3, RIGHT[1]],), False, "at the prefill are not finite"),
    ],
)
def test_gate_stops_what_computes_something_else(runs, capture, sentence):
    with pytest.raises(measure.WrongOutput, match=sentence):
        measure.gate(Fake(*runs), 1, capture)


@pytest.mark.parametrize("model_type", OWN)
def test_captured_requests_pass_the_gate(model_type, graphs, monkeypatch):
    monkeypatch.setenv("QUAMBA_BACKEND", "torch")
    model = materialise.build(config_of(model_type), load_recipe("w4a8"), torch.float32, CPU)
    ids = torch.randint(0, 96, (2, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        request = TransformersRequest(model, ids, 5)
        assert measure.gate(request, 4, True) == "bitwise" and len(graphs) == 2
        first = request.text.tokens.clone()
        measure.run(request, 4)
        assert torch.equal(first, request.text.tokens) and request.state_bytes > 0
        model.get_submodule(describe(model.config).blocks[0].path).get_submodule("mixer").A_log.add_(1)
        graphs[-1].calls[-20:] = []  # a graph that lost its end
        with pytest.raises(measure.WrongOutput):
            measure.gate(request, 4, True)


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_model_whose_cache_grows_is_timed_eagerly_and_not_predicted(model_type, graphs):
    config = config_of(model_type)
    model = materialise.build(config, load_recipe("w8a8"), torch.float32, CPU)
    ids = torch.randint(0, 96, (2, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        request = TransformersRequest(model, ids, 5)
        assert measure.gate(request, 4, True) == "eager" and not graphs
        assert request.state_bytes > 0
    with pytest.raises(UserError, match="recurrent layers alone"):
        cost.count(config, load_recipe("w8a8"), torch.float16)


def test_out_of_memory_is_an_entry():
    class Full(contender.Contender):
        recipe = "full"

        def request(self, ids, generate):
            raise torch.OutOfMemoryError("no")

    (row,) = measure.measure([Full()], measure.Plan([1], [2], 2, rounds=1), CPU, 9)
    assert row["error"] == "out of memory" and "mean_ttft_ms" not in row


# what is compared


def test_mamba_ssm_is_refused_in_a_sentence():
    if importlib.util.find_spec("mamba_ssm") is None:
        with pytest.raises(UserError, match="needs the package mamba_ssm"):
            baselines.check(["mamba-ssm"], CPU)
    with pytest.raises(UserError, match="known are fp16, hf, mamba-ssm, mamba-ssm-fixed-a"):
        baselines.check(["vllm"], CPU)


def test_a_fixed_costs_no_kernel():
    mixer = torch.nn.Module()
    mixer.A_log = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    mamba_ssm.fix_A(torch.nn.Sequential(mixer))
    A = -torch.exp(mixer.A_log.float())
    torch.testing.assert_close(A, -torch.tensor([0.0, 1.0]).exp())
    assert A is -torch.exp(mixer.A_log.float())


def test_mamba_ssm_is_driven_through_its_interface(monkeypatch):
    module = ModuleType("mamba_ssm.utils.generation")
    module.InferenceParams = lambda **given: SimpleNamespace(seqlen_offset=0, **given)
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.utils", ModuleType("mamba_ssm.utils"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.utils.generation", module)

    class Model:
        """Counts what it has seen in its state, and says the next number."""

        def allocate_inference_cache(self, batch, length, dtype):
            return {0: (torch.zeros(batch, 1, dtype=dtype), torch.zeros(batch, 2, dtype=dtype))}

        def __call__(self, ids, inference_params, num_last_tokens):
            state = inference_params.key_value_memory_dict[0][0]
            fresh = inference_params.seqlen_offset == 0
            state.copy_(ids.sum(1, keepdim=True) + (0 if fresh else state))
            return SimpleNamespace(logits=torch.nn.functional.one_hot(state.long() % 7, 7)[:, -1:].float())

    request = mamba_ssm.MambaSsmRequest(Model(), torch.tensor([[1, 2], [3, 1]]), 4, torch.float32)
    for _ in range(2):
        got = [logits.argmax(-1).tolist() for logits in measure.run(request, 2)]
        assert got == [[3, 4], [6, 1], [5, 2]]
    assert request.state_bytes == 12


def test_energy_is_read_from_nvml(monkeypatch):
    nvml = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"GPU-7": 2500}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7"))
    assert energy.EnergyMeter(torch.device("cuda")).joules() == 2.5
    assert energy.EnergyMeter(CPU).joules() is None

    def unsupported(handle):
        raise nvml.NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    assert energy.EnergyMeter(torch.device("cuda")).joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.EnergyMeter(torch.device("cuda")).joules() is None


def test_energy_is_that_of_requests_that_fill_a_second(monkeypatch):
    """A request of 60 ms takes 6 J, which a counter shows that advances every 100 ms."""
    now = [0.0]

    class Asleep:
        def prefill(self):
            now[0] += 0.04

        def step(self):
            now[0] += 0.02

    counter = SimpleNamespace(joules=lambda: 100.0 * (int(now[0] * 10 + 1e-6) / 10))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    clock = latency.Clock(CPU)
    assert measure.joules(Asleep(), 2, clock, counter) == pytest.approx(6, rel=0.1)
    assert now[0] == pytest.approx(1.02)
    assert measure.joules(Asleep(), 2, clock, energy.EnergyMeter(CPU)) is None


# what is printed and written


def test_a_run_prints_writes_and_draws(tiny_shape, tmp_path):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run(
        *("--shape", "tiny", "--recipe", "w4a8,float", "--batch", "1,2", "--prompt", 4, "--generate", 3, "--rounds", 2),
        *("--baseline", "fp16,hf", "--device", "cpu", "--json", file, "--plot", picture),
    )
    assert result.exit_code == 0, result.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = json.loads(file.read_text())
    assert {"quamba", "date", "torch", "device", "device_name", "model_id", "dtype", "threads"} <= set(found)
    rows = found["results"]
    assert [(r["recipe"], r["batch"]) for r in rows] == [
        (name, batch) for batch in (1, 2) for name in ("w4a8", "float", "fp16", "hf")
    ]
    names = {f"{s}_{m}_ms" for s in ("mean", "median", "std", "p90", "p99") for m in latency.METRICS}
    for row in rows:
        assert row["kind"] == "measured" and row["gate"] == "eager" and row["requests"] == 2
        assert names <= set(row) and all(math.isfinite(row[name]) for name in names)
        assert row["mean_e2el_ms"] == pytest.approx(row["mean_ttft_ms"] + 2 * row["mean_tpot_ms"])
        assert {"weight_bytes", "resident_bytes", "peak_bytes", "state_bytes_per_sequence"} <= set(row)
        other = next(r for r in rows if r["recipe"] == "hf" and r["batch"] == row["batch"])
        assert row["speedup"]["hf"]["tpot"] == pytest.approx(other["median_tpot_ms"] / row["median_tpot_ms"])
    assert rows[0]["weight_bytes"] < rows[1]["weight_bytes"] / 4
    lines = result.stdout.splitlines()
    assert lines[0] == "| model | recipe | size | device | batch | test | ms | p90 ms | t/s | vs fp16 | vs hf |"
    assert sum(line.startswith("| tiny |") for line in lines) == 3 * len(rows)
    assert any("pp4+tg3 (TTLT)" in line for line in lines)


def test_a_prediction_runs_nothing_and_says_so(tiny_shape, tmp_path, monkeypatch):
    monkeypatch.setattr(materialise, "build", lambda *a, **k: 1 / 0)
    file, picture = tmp_path / "p.json", tmp_path / "p.png"
    result = run("--shape", "tiny", "--recipe", "w8a8", "--batch", "1,8", "--prompt", 16, "--predict", "orin-nano-8g",
                 "--json", file, "--plot", picture)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Predictions, nothing was run:") and picture.stat().st_size > 1000
    found = json.loads(file.read_text())
    assert "device_name" not in found and len(found["results"]) == 4
    for row in found["results"]:
        assert (row["kind"], row["device"], row["fits"]) == ("prediction", "orin-nano-8g", True)
        assert not [key for key in row if key.endswith("_ms") and not key.startswith("predicted_")]
    ours, base = found["results"][0], found["results"][2]
    assert ours["speedup"]["fp16"]["tpot"] == pytest.approx(base["predicted_tpot_ms"] / ours["predicted_tpot_ms"])
    assert base["predicted_tpot_floor_ms"] > ours["predicted_tpot_floor_ms"]


def test_a_checkpoint_is_measured_itself(stock, tmp_path):
    file = tmp_path / "bench.json"
    result = run(stock("w8a8", OWN[0]), "--prompt", 3, "--generate", 2, "--rounds", 1, "--baseline", "none",
                 "--device", "cpu", "--json", file)  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = json.loads(file.read_text())["results"]
    assert row["recipe"] == "w8a8" and row["median_itl_ms"] == row["median_tpot_ms"]
    stored = load_file(stock("w8a8", OWN[0]) / "model.safetensors")
    assert row["weight_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())


def test_wrong_output_is_no_time(tiny_shape, monkeypatch):
    def wrong(*arguments):
        raise measure.WrongOutput("The logits differ.")

    monkeypatch.setattr(measure, "gate", wrong)
    result = run("--shape", "tiny", "--recipe", "float", "--prompt", 2, "--generate", 2, "--device", "cpu")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: The logits differ.\n")


def test_the_validation_script_reads_published_figures_and_our_own(tmp_path, capsys, monkeypatch, tiny_shape):
    spec = importlib.util.spec_from_file_location("predictor", ROOT / "benchmarks" / "predictor.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for path in (ROOT / "benchmarks" / "published").glob("*.yaml"):
        _, rows, recipes = script.read(path)
        assert rows and all(row["recipe"] in {"fp16", *recipes} for row in rows)
        assert all(row["device"] in device.shipped() for row in rows)
    row = {"recipe": "w4a8", "batch": 1, "prompt": 4, "median_tpot_ms": 2.0, "median_ttft_ms": 3.0}
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"device_name": "NVIDIA H100", "model_id": "tiny", "results": [row]}))
    published = tmp_path / "figures.yaml"
    published.write_text("{source: a paper, recipes: {}, rows: [{device: a100, shape: tiny, recipe: fp16, batch: 1, "
                         "prompt: 4, fits: false}, {device: a100, shape: tiny, recipe: fp16, batch: 1, prompt: 4, "
                         "tpot_ms: 1.0}]}")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["predictor.py", str(file), str(published)])
    script.main()
    out = capsys.readouterr().out
    assert "bench.json, NVIDIA H100: predicted / found" in out and "| h100 | tiny | w4a8 | 1 | TPOT | 2.00 |" in out
    assert "| a100 | tiny | fp16 | 1 | memory | does not fit | fits," in out
