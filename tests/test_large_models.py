"""Models larger than the memory that a process may have: quantised from disk, and loaded with parts left on disk."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quamba import embedded

LAYERS = 44
ALLOWED = 175 * 2**20
"""Bytes that a process may take beyond what its imports took: a run needs about 135 MiB; the checkpoint has 290 MB."""

CHILD = """
import resource, sys
import torch, transformers
torch.set_num_threads(1)
import quamba, quamba.checkpoint, quamba.loading, quamba.pipeline
quamba.checkpoint.SHARD_BYTES = 2**24  # as small beside the model as the real one beside a large model
from transformers.models.mamba2 import modeling_mamba2

allowed, folder, output, recipe, text = sys.argv[1:]
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + int(allowed),) * 2)
quamba.quantize(folder, recipe, output, calibration_text=text, samples=2, seqlen=16, device="cpu")
print("quantised")
quamba.load(folder, device="cpu")
print("loaded")
"""
RECIPE = """
name: rtn8
linears:
  default: {format: w8a8, method: rtn, search: false}
embedding: {bits: 8}
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory):
    """A random Mamba2 checkpoint, one file for each layer, of more bytes than ALLOWED; removed after the tests."""
    folder = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model(
        "mamba2", vocab_size=2048, hidden_size=512, num_hidden_layers=1, state_size=64, head_dim=64, num_heads=16,
        n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    layer = {name: tensor for name, tensor in state.items() if ".layers.0." in name}
    rest = {name: tensor for name, tensor in state.items() if name not in layer and not name.startswith("lm_head")}
    where = {}
    for index in range(LAYERS + 1):
        file = f"model-{index + 1:05d}-of-{LAYERS + 1:05d}.safetensors"
        own = rest if index == LAYERS else {n.replace(".0.", f".{index}.", 1): t for n, t in layer.items()}
        save_file(own, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(own, file)
    config.num_hidden_layers = LAYERS
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    AutoTokenizer.from_pretrained(embedded.checkpoint("mamba2-tiny")).save_pretrained(folder)
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds for mapped memory on Linux alone")
def test_a_checkpoint_larger_than_the_memory_is_quantised_from_disk(large, text, tmp_path):
    """And under the same limit it cannot be loaded."""
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 1.4 * ALLOWED
    (tmp_path / "rtn8.yaml").write_text(RECIPE)
    arguments = map(str, (ALLOWED, large, tmp_path / "quantised", tmp_path / "rtn8.yaml", text))
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["quantised"], done.stderr
    assert done.returncode == 1 and "memory" in done.stderr.splitlines()[-1]
    assert sum(file.stat().st_size for file in (tmp_path / "quantised").glob("*.safetensors")) > size / 5
