"""`quamba bench`: how fast a whole model is, and how much memory it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quamba.cli import console
from quamba.cli.files import write_json
from quamba.cli.options import Device
from quamba.errors import UserError

if TYPE_CHECKING:
    import torch

    from quamba.bench.contender import Contender
    from quamba.bench.source import Source
    from quamba.recipe import Recipe

NONE = "none"


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face Hub id, a directory (original or quantised), or an embedded checkpoint such as "
            "mamba2-tiny; or leave it out and give --shape.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A published size with drawn weights, such as mamba2-2.7b: no download."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="R1,R2",
            help="Stock recipes, YAML files, or float; weights are drawn in their formats. By default the model's own, "
            "and w8a8,w4a8,w4a16 for a shape.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N1,N2", help="Sequences that run together.")] = "1",
    prompt: Annotated[str, typer.Option(metavar="N1,N2", help="Lengths of the prompts, in tokens.")] = "512",
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 128,
    baseline: Annotated[
        str,
        typer.Option(
            metavar="B1,B2",
            help="Compare with fp16 (our operators in floats), hf (transformers' own), mamba-ssm, mamba-ssm-fixed-a "
            "(A computed once), or none; timed in turn with the model.",
        ),
    ] = "fp16",
    rounds: Annotated[int, typer.Option(min=1, help="How often each setting is timed.")] = 10,
    eager: Annotated[
        bool, typer.Option("--eager", help="Launch kernels one by one; by default CUDA graphs are replayed.")
    ] = False,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Run nothing: estimate the times on a5000, a100, orin-nano-8g, orin-nano-super, agx-orin-64, "
            "rtx-4090, h100, h200, or a device that a YAML file describes.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="The type of activations and unquantised weights; by default float16, float32 on a CPU."),
    ] = None,
    device: Device = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write everything to this file; by default only printed."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the speed-up over the first baseline by batch, with the roofline."),
    ] = None,
) -> None:
    """Measure latency, throughput, memory and energy of a whole model, beside baselines in the same run.

    Prints two markdown tables: medians of the times to the first token (TTFT), per further token (TPOT) and to the last
    token (TTLT), then memory. On a GPU graphs are replayed, after a proof that they compute what eager calls compute.

    Example: quamba bench --shape mamba2-130m --recipe w4a8 --batch 1,4 --prompt 128 --generate 16
    """
    if (model is None) == (shape is None):
        raise UserError("Give either a MODEL or a --shape.")
    for path in (json_file, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"'{path}' cannot be written: there is no directory '{path.parent}'.")
    batches, prompts = numbers(batch, "--batch"), numbers(prompt, "--prompt")
    console.settle()
    import torch

    from quamba.bench import baselines, source
    from quamba.bench.contender import half
    from quamba.bench.device import load_device
    from quamba.loading import pick_device

    target = None if predict is None else load_device(predict)
    where = torch.device("cpu") if target is not None else pick_device(device)
    others = [] if baseline == NONE else baselines.check(names(baseline), where)
    if target is not None and set(others) - {"fp16"}:
        raise UserError("--predict knows our operators only; compare with --baseline fp16 or none.")
    subject = source.from_shape(shape) if shape is not None else source.from_model(str(model))
    recipes = source.recipes(names(recipe or ""), subject)
    wide = target is None and where.type == "cpu"
    chosen: torch.dtype = getattr(torch, dtype or ("float32" if wide else "float16"))

    settings = {"batches": batches, "prompts": prompts, "generate": generate}
    policies = {r.name: r for r in recipes} | ({"fp16": half(chosen)} if "fp16" in others else {})
    if target is not None:
        rows = predictions(subject, policies, target, settings, chosen)
    else:
        settings |= {"rounds": rounds, "eager": eager}
        rows = measurements(subject, recipes, others, where, chosen, settings)

    from quamba.bench import report
    from quamba.bench.measure import compare

    compare(rows, others)
    ran = None if target is not None else where
    found = report.document(rows, model=subject.name, device=ran, dtype=chosen, settings=settings)
    print(report.tables(found, others))
    if json_file is not None:
        write_json(json_file, found)
    if plot is not None:
        draw(plot, found, subject, policies, target, others, chosen)


def predictions(
    subject: Source, policies: dict[str, Recipe], target: Any, settings: dict[str, Any], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One entry for each recipe, batch and prompt length."""
    from quamba.bench import cost
    from quamba.bench.predict import row

    rows = []
    for name, recipe in policies.items():
        counted = cost.count(subject.config, recipe, dtype)
        rows += [
            row({"recipe": name}, counted, target, batch, prompt, settings["generate"])
            for batch in settings["batches"]
            for prompt in settings["prompts"]
        ]
    return rows


def measurements(
    subject: Source,
    recipes: list[Recipe],
    others: list[str],
    where: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Make every contender, measure them in turn, compare."""
    import torch

    from quamba.bench import baselines, contender, measure
    from quamba.bench.materialise import outline

    outline(subject.config, recipes[0], dtype)  # imports all that making a model imports, before memory is looked at
    contenders: list[Contender] = []
    makers = [lambda r=r: contender.ours(subject, r, dtype, where) for r in recipes]
    makers += [lambda b=b: baselines.BASELINES[b].make(subject, dtype, where) for b in others]
    try:
        for make in makers:
            contenders.append(contender.measured(make, where))
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(contenders) + 1} models of {subject.name} do not fit this device at once; compare fewer"
        ) from None
    plan = measure.Plan(
        settings["batches"], settings["prompts"], settings["generate"], settings["rounds"], not settings["eager"]
    )
    try:
        with console.progress() as progress:
            rows = measure.measure(contenders, plan, where, subject.config.vocab_size, progress)
    except measure.WrongOutput as error:
        console.err.print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None
    return rows


def draw(
    path: Path,
    found: dict[str, Any],
    subject: Source,
    policies: dict[str, Recipe],
    target: Any,
    others: list[str],
    dtype: torch.dtype,
) -> None:
    """The plot, with the rooflines of what was asked for or of the device that ran."""
    from quamba.bench import cost
    from quamba.bench import plot as plotting
    from quamba.bench.device import recognise
    from quamba.models import describe

    if not others:
        raise UserError("--plot shows speed-ups over a baseline; give one with --baseline.")
    name = target.name if target is not None else found["device_name"]
    if describe(subject.config).hosted:
        policies = {}  # and no roofline: what transformers' layers do is not counted
    costs = {recipe: cost.count(subject.config, policy, dtype) for recipe, policy in policies.items()}
    kind = "predicted" if target is not None else "measured"
    plotting.draw(
        path, found["results"], costs, base=others[0], title=f"{subject.name} on {name}, {kind}",
        device=target or recognise(name),
    )  # fmt: skip


def names(text: str) -> list[str]:
    """The parts of "a,b"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str, option: str) -> list[int]:
    """The numbers of "1,16,64". Raises UserError for anything else."""
    parts = names(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} takes positive numbers separated by commas, such as 1,16, and '{text}' was given.")
    return [int(part) for part in parts]
