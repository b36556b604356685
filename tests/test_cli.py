"""The command line: what it prints, what it writes, and how it answers mistakes."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import quamba
from quamba import embedded
from quamba.cli import app, doctor, evaluate, files, quantize
from quamba.errors import UserError

COMMANDS = ["quantize", "eval", "generate", "inspect", "compare", "bench", "build", "doctor", "demo"]
# As the console script does it.
run_app = "from quamba.cli import app; app()"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(embedded.validation_text().read_text(encoding="utf-8")[:400], encoding="utf-8")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: quamba {command}" in " ".join(result.stdout.split())


def test_help_lists_the_commands_and_loads_nothing_heavy():
    loaded = "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    code = f"import sys\ntry:\n {run_app}\nexcept SystemExit: {loaded}"
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
    assert all(command in result.stdout for command in COMMANDS)
    assert result.stdout.splitlines()[-1] == "[]"
    assert run().stdout == run("--help").stdout


def test_python_m_quamba_is_the_command():
    started = subprocess.run([sys.executable, "-m", "quamba", "--version"], capture_output=True, text=True, timeout=60)
    assert (started.returncode, started.stdout) == (0, f"quamba {quamba.__version__}\n")


def test_version():
    assert run("--version").stdout == f"quamba {quamba.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bake"], "No such command 'bake'."),
        (["eval"], "Missing argument 'MODEL'."),
        (["eval", "mamba2-tiny"], "There is nothing to measure"),
        (["eval", "mamba2-tiny", "--perplexity", "missing.txt"], "There is no text file 'missing.txt'."),
        (["eval", "mamba2-tiny", "--perplexity", "TEXT", "--window", "1"], "at least 2 tokens"),
        (["eval", "mamba2-tiny", "--perplexity", "TEXT", "--window", "many"], "Invalid value for '--window'"),
        (["eval", "mamba2-tiny", "--perplexity", "TEXT", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["eval", "mamba2-tiny", "--perplexity", "TEXT", "--max-windows", "0"], "At least 1 window"),
        (["eval", "mamba2-tiny", "--perplexity", "TEXT", "--window", "9999"], "fewer than one window of 9999"),
        (["eval", "mamba2-tiny", "--perplexity", "TEXT", "--json", "no/where.json"], "no directory 'no'"),
        (["eval", "mamba2-tiny", "--tasks", "x", "--tasks-path", "nowhere"], "There is no directory 'nowhere'"),
        (["eval", "mamba2-tiny", "--tasks", "x", "--limit", "0"], "limit of documents is at least 1"),
        (["generate", "mamba2-tiny"], "Missing option '--prompt'."),
        (["generate", "mamba2-tiny", "--prompt", " "], "The prompt is empty"),
        (["generate", "mamba2-tiny", "--prompt", "a\udcff"], "The prompt is not UTF-8 text"),
        (["generate", "mamba2-tiny", "--prompt", "a", "--max-new-tokens", str(10**15)], "There is not enough memory"),
        (["bench", "mamba2-tiny", "--prompt", str(10**15)], "There is not enough memory"),
        (["generate", "mamba2-tiny", "--prompt", "a", "--top-p", "0.9"], "only with a --temperature above 0"),
        (["generate", "mamba2-tiny", "--prompt", "a", "--temperature", "1", "--top-p", "2"], "at most 1, and 2.0"),
        (["generate", "mamba2-tiny", "--prompt", "a", "--device", "tpu"], "Invalid value for '--device'"),
        (["generate", "no/such/model", "--prompt", "a"], "no/such/model"),
        (["quantize", "mamba2-tiny", "--recipe", "w3a3", "--output", "OUT"], "w3a3"),
        (["quantize", "mamba2-tiny", "--recipe", "w8a8", "--output", "OUT", "--samples", "0"], "'--samples'"),
        (
            ["quantize", "mamba2-tiny", "--recipe", "w8a8", "--output", "OUT", "--calibration", "missing.txt"],
            "There is no calibration file 'missing.txt'.",
        ),
        (["bench"], "Give either a MODEL or a --shape."),
        (["bench", "--shape", "mamba9"], "There is no shape 'mamba9'; known are mamba1-130m,"),
        (["bench", "--shape", "mamba2-130m", "--predict", "tpu"], "There is no device 'tpu'; known are a100, a5000,"),
        (["bench", "--shape", "mamba2-130m", "--recipe", "w3a3"], "w3a3"),
        (["bench", "mamba2-tiny", "--batch", "1,0"], "--batch takes positive numbers"),
        (["bench", "mamba2-tiny", "--baseline", "vllm"], "There is no baseline 'vllm'"),
        (["bench", "mamba2-tiny", "--generate", "1"], "Invalid value for '--generate'"),
        (["bench", "mamba2-tiny", "--predict", "a100", "--baseline", "hf"], "knows our operators only"),
        (["bench", "mamba2-tiny", "--json", "no/where.json"], "no directory 'no'"),
        (["demo", "--model", "mamba9"], "No embedded checkpoint is called 'mamba9'"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, sentence, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"TEXT": str(text), "OUT": str(tmp_path / "out")}
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_unknown_task_lists_near_names(monkeypatch):
    known = SimpleNamespace(task_index={"blimp": None, "lambada": None}, all_tasks=["blimp", "lambada"])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: known)
    result = run("eval", "mamba2-tiny", "--tasks", "blmp")
    assert result.exit_code == 2
    assert "There is no task 'blmp'; near names are blimp." in result.stderr


def test_a_process_exits_with_2_and_no_traceback():
    arguments = [sys.executable, "-c", f"import sys; {run_app}", "eval", "mamba2-tiny", "--perplexity", "missing.txt"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == "Error: There is no text file 'missing.txt'.\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("quamba.loading.load", lambda *a, **k: 1 / 0)
    result = run("generate", "mamba2-tiny", "--prompt", "a")
    assert isinstance(result.exception, ZeroDivisionError)


def test_eval_prints_and_writes_the_same_numbers(text, tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    result = run("eval", "mamba2-tiny", "--perplexity", text, "--window", 16, "--max-windows", 2, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert set(found) == {"model", "perplexity"}
    assert found["model"] == "mamba2-tiny"
    assert set(found["perplexity"]) == {"file", "windows", "tokens", "value"}
    assert (found["perplexity"]["windows"], found["perplexity"]["tokens"]) == (2, 30)
    assert f"perplexity {found['perplexity']['value']:.4f}" in result.stdout
    assert [path.name for path in tmp_path.glob("*result*")] == ["result.json"]
    assert result.stderr == ""


@pytest.mark.parametrize(("arguments", "dtype"), [([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16)])
def test_eval_measures_in_fp32_unless_asked_otherwise(arguments, dtype, text, monkeypatch):
    from quamba import evaluate as evaluation

    seen = []
    monkeypatch.setattr(evaluation, "perplexity", lambda model, *rest, **options: seen.append(model.dtype) or 1 / 0)
    result = run("eval", "mamba2-tiny", "--perplexity", text, *arguments)
    assert isinstance(result.exception, ZeroDivisionError), result.output
    assert seen == [dtype]


def test_tasks_are_shown_with_their_errors_and_written(tmp_path, capsys):
    results = {"model": "m", "tasks": {"t": {"acc": 0.5, "acc_stderr": 0.25}}}
    evaluate.show(results)
    assert "0.2500" in capsys.readouterr().out
    files.write_json(tmp_path / "r.json", results)
    assert json.loads((tmp_path / "r.json").read_text()) == results


def test_json_has_no_infinity(tmp_path):
    files.write_json(tmp_path / "r.json", {"model": "m", "perplexity": {"value": math.inf, "windows": 1}})
    assert json.loads((tmp_path / "r.json").read_text())["perplexity"] == {"value": None, "windows": 1}


def test_generate_is_greedy_by_default_and_sampling_is_seeded():
    arguments = ["generate", "mamba2-tiny", "--prompt", "The first", "--max-new-tokens", 4]
    greedy, again = run(*arguments), run(*arguments, "--temperature", 0, "--seed", 5)
    assert greedy.stdout.startswith("The first")
    assert greedy.stdout == again.stdout
    sampled = [run(*arguments, "--temperature", 2.0, "--top-p", 0.99, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_quantize_passes_its_options_and_prints_the_report(monkeypatch, tmp_path):
    seen = {}
    report = SimpleNamespace(
        sizes={"layers": 10**6, "layers_original": 4 * 10**6, "embedding": 10**6, "embedding_original": 2 * 10**6},
        seconds=1.25,
        peak_memory=12 * 10**6,
        largest_layer=3 * 10**6,
        notes=["residual stream not rotated: a layer norm"],
        output=tmp_path / "out",
    )

    def quantize_stub(source, recipe, output, **options):
        seen.update(options, source=source, output=output)
        options["progress"]("calibrate", 1, 2)
        return report

    monkeypatch.setattr("quamba.pipeline.quantize", quantize_stub)
    result = run(
        *("quantize", "mamba2-tiny", "--recipe", "w8a8", "--output", tmp_path / "out", "--samples", 3),
        *("--seqlen", 32, "--seed", 7, "--device", "cpu", "--overwrite", "--calibration", "owner/data"),
    )
    assert result.exit_code == 0, result.output
    assert callable(seen.pop("progress")) and callable(seen.pop("say")) and seen.pop("ranks").size == 1
    assert seen == {
        "source": "mamba2-tiny",
        "tokenizer": None,
        "output": tmp_path / "out",
        "calibration_text": "owner/data",
        "samples": 3,
        "seqlen": 32,
        "seed": 7,
        "device": "cpu",
        "overwrite": True,
        "resume": False,
        "linears_only": False,
    }
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    assert ["layers", "4.00", "1.00", "0.250"] in cells
    assert ["total", "6.00", "2.00", "0.333"] in cells
    assert "lm_head" not in result.stdout
    assert "12.00 MB" in result.stdout and "not rotated" in result.stdout
    assert "1.2 s" in result.stdout


def test_calibration_names_are_told_from_files():
    assert [quantize.means_a_file(name) for name in ("a.txt", "./a", "/a/b", "owner/set")] == [True, True, True, False]


def test_doctor_explains_every_operator():
    from quamba_kernels.registry import OPS

    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert all(f"  {name} on cpu: " in result.stdout for name in OPS)
    assert quamba.__version__ in result.stdout


def test_doctor_says_why_not():
    rows = [
        {"op": "linear", "device": "cpu", "backend": "fast", "usable": False, "reason": "needs [x]", "chosen": False},
        {"op": "linear", "device": "cpu", "backend": "cpu", "usable": True, "reason": None, "chosen": True},
        {"op": "linear", "device": "cpu", "backend": "torch", "usable": True, "reason": None, "chosen": False},
    ]
    assert doctor.operators(rows) == [
        "  linear on cpu: cpu",
        "    not fast: needs [x]",
        "    not torch: usable, but a faster one is chosen",
    ]


def test_a_forced_backend_that_cannot_run_is_the_users_mistake(monkeypatch):
    from quamba_kernels.registry import BackendUnavailable

    def refuse(*arguments, **options):
        raise BackendUnavailable("linear: QUAMBA_BACKEND asks for 'cuda', but there is no GPU")

    monkeypatch.setattr("quamba.loading.load", refuse)
    result = run("generate", "mamba2-tiny", "--prompt", "a")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "there is no GPU" in result.stderr


def test_objects_that_cannot_be_had_are_the_users_mistake(monkeypatch):
    from quamba_kernels.cuda.toolchain import CannotBuild

    def refuse(*arguments, **options):
        raise CannotBuild("QUAMBA_CUDA_LIBRARY=orin is no file")

    monkeypatch.setattr("quamba.loading.load", refuse)
    result = run("generate", "mamba2-tiny", "--prompt", "a")
    assert (result.exit_code, result.stderr) == (2, "Error: QUAMBA_CUDA_LIBRARY=orin is no file.\n")


def test_demo_prints_one_table_of_every_stock_recipe(monkeypatch):
    from quamba import evaluate as evaluation
    from quamba.loading import load
    from quamba.recipe import stock_recipes

    def copy(source, recipe, output, **options):
        model, tokenizer = load(source)
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)

    def perplexity(model, *arguments, **options):
        assert model.dtype == torch.float32
        return {"value": 12.5}

    monkeypatch.setattr("quamba.pipeline.quantize", copy)
    monkeypatch.setattr(evaluation, "perplexity", perplexity)
    result = run("demo", "--windows", 1)
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows[0] == "original"
    assert sorted(rows[1:]) == sorted(name.upper() for name in stock_recipes())
    assert "W4A8 continues:\nThe first step is to" in result.stdout


def test_scripts_blimp_tasks_writes_what_eval_reads(tmp_path):
    from quamba.evaluate import find_tasks

    source = tmp_path / "blimp"
    source.mkdir()
    (source / "island.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n')
    script = Path(__file__).parents[1] / "scripts" / "blimp_tasks.py"
    subprocess.run([sys.executable, script, source, tmp_path / "tasks"], check=True, capture_output=True, timeout=60)
    manager = find_tasks(["blimp_local"], tmp_path / "tasks")
    assert manager.all_tasks == ["blimp_local", "blimp_local_island"]


def test_user_error_is_an_exception_with_a_sentence():
    assert str(UserError("No.")) == "No."
