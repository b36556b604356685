"""Predictions of `quamba bench --predict`: what is counted, and what a device makes of it."""

from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

import quamba
from architectures import OWN, config_of
from quamba.bench import cost, device, materialise, predict, source
from quamba.errors import UserError
from quamba.recipe import FLOAT, load_recipe, stock_recipes

# what is counted


@pytest.mark.parametrize("name", sorted(stock_recipes()))
@pytest.mark.parametrize("model_type", OWN)
def test_counted_bytes_are_those_of_the_file_and_of_the_state(model_type, name, stock):
    folder = stock(name, model_type)
    subject = source.from_model(folder)
    counted = cost.count(subject.config, subject.recipe, torch.float32)
    stored = load_file(folder / "model.safetensors")
    assert counted.stored == sum(t.numel() * t.element_size() for t in stored.values())

    model = quamba.load(folder, device="cpu")[0]
    with torch.inference_mode():
        output = model(torch.zeros(3, 4, dtype=torch.int64), use_cache=True)
    assert counted.state * 3 == sum(layer.bytes for layer in output.cache_params.layers)

    bodies: dict[str, int] = {}
    for key, module in model.named_modules():
        if hasattr(module, "names"):  # a linear
            own = [t for k, t in stored.items() if k.startswith(f"{key}.weight")]
            label = f"linear_{module.spec.format} {module.features} -> {module.outputs}"
            bodies[label] = bodies.get(label, 0) + sum(t.numel() * t.element_size() for t in own)
            bodies[label] += sum(t.numel() * t.element_size() for k, t in stored.items() if k == f"{key}.bias")
            bodies[label] += 4 if module.input.static else 0  # its scale
    for label, size in bodies.items():
        assert counted.decode.fixed[label].bytes == size, label
        assert counted.prefill.fixed[label].bytes == size, label


def test_growth_says_what_a_larger_run_counts():
    config, recipe = config_of(OWN[-1], 1), load_recipe("w4a8")
    counted = cost.count(config, recipe, torch.float16)
    again = cost.Counter(materialise.outline(config, recipe, torch.float16))
    with torch.no_grad():
        larger = again.run(5, 7)
    for name, work in counted.prefill.at(5, 7).items():
        for field in fields(work):
            assert getattr(work, field.name) == getattr(larger.prefill[name], field.name), (name, field.name)
    assert counted.decode.at(5, 1) == larger.decode and counted.state == larger.state


def test_linears_count_two_operations_for_every_weight_and_token():
    counted = cost.count(config_of(OWN[-1]), load_recipe("w8a8"), torch.float16).prefill.at(2, 8)
    # 64 -> 2 * 128 + 2 * 16 + 8 in two layers; the head sees the last token alone
    assert counted["linear_w8a8 64 -> 296"].int8 == 2 * 2 * 64 * 296 * 16
    assert counted["linear_w8a8 64 -> 96"].int8 == 2 * 64 * 96 * 2
    assert sum(work.float16 for name, work in counted.items() if name != "ssd_scan") == 0
    # ids are 16; a row of int8 and its scale, read, and the residual stream's fp32, written
    assert counted["embedding"].bytes == 16 * (64 + 4 + 64 * 4)


# what is predicted


@pytest.mark.parametrize("name", device.shipped())
def test_every_number_of_a_device_has_a_source(name):
    found = device.load_device(name)
    given = set(found.model_dump(exclude_none=True)) - {"name", "matches", "sources"}
    assert set(found.sources) == given and found.name == name


def test_prediction_is_bytes_over_bandwidth_where_nothing_else_takes_time():
    counted = cost.count(config_of(OWN[0]), load_recipe("w8a8"), torch.float16)
    slow = device.Device(name="slow", memory_gib=1, bandwidth=2, fp16=1e9, int8=1e9, kernel_gap=0,
                         achievable=device.Achievable(bandwidth=0.5))  # fmt: skip
    total = sum(work.bytes for work in counted.decode.at(4, 1).values())
    found = predict.predict(counted, slow, 4, 16, 11)
    assert found.tpot == pytest.approx(total / 1e9 * 1e3) and found.tpot == found.tpot_floor
    assert found.e2el == pytest.approx(found.ttft + 10 * found.tpot)
    gapped = predict.predict(counted, slow.model_copy(update={"kernel_gap": 100.0}), 4, 16, 11)
    calls = sum(work.calls for work in counted.decode.at(4, 1).values())
    assert gapped.tpot == pytest.approx(found.tpot + calls * 0.1) and gapped.tpot_floor == found.tpot_floor


def test_prediction_is_operations_over_peak_where_arithmetic_is_slow():
    counted = cost.count(config_of(OWN[-1]), load_recipe("w8a8"), torch.float16)
    wide = device.Device(name="wide", memory_gib=1, bandwidth=1e9, fp16=4e-3, int8=1e-3, kernel_gap=0,
                         achievable=device.Achievable(fp16=0.5, int8=0.5))  # fmt: skip
    works = counted.prefill.at(1, 64).values()
    wanted = sum(work.int8 / 0.5e9 + work.float16 / 2e9 for work in works) * 1e3
    assert predict.predict(counted, wide, 1, 64, 2).ttft == pytest.approx(wanted, rel=1e-3)


def test_what_fits_a_device():
    counted = cost.count(config_of(OWN[0]), FLOAT, torch.float16)
    size = counted.memory(8, 32) / device.GIB
    made = {"name": "d", "bandwidth": 1, "fp16": 1, "int8": 1, "reserved_gib": 0.25}
    assert predict.predict(counted, device.Device(memory_gib=size * 1.01 + 0.25, **made), 8, 32, 2).fits
    assert not predict.predict(counted, device.Device(memory_gib=size * 0.99 + 0.25, **made), 8, 32, 2).fits
    assert counted.memory(9, 32) > counted.memory(8, 32) + counted.state


def test_a_device_from_a_file(tmp_path):
    file = tmp_path / "board.yaml"
    file.write_text("{memory_gib: 4, bandwidth: 50, fp16: 5, int8: 10}")
    assert device.load_device(file) == device.Device(name="board", memory_gib=4, bandwidth=50, fp16=5, int8=10)
    for text, part in [("[1]", "mapping"), ("{bandwith: 1}", "keys are"), ("{a: [", "readable YAML")]:
        file.write_text(text)
        with pytest.raises(UserError, match=part):
            device.load_device(file)


def test_devices_are_recognised_by_the_drivers_name():
    assert device.recognise("NVIDIA H100 80GB HBM3").name == "h100"
    assert device.recognise("NVIDIA RTX A5000").name == "a5000"
    assert device.recognise("x86_64, AVX2") is None
