"""Checkpoints of flash-linear-attention: loaded strictly, with fla's logits, in any rhythm of prefill and decode."""

import json
import shutil
import subprocess
import sys
from importlib import reload
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import quamba
from quamba import embedded
from quamba.errors import UserError
from quamba.evaluate import perplexity
from quamba.generation import generate
from quamba.integrations import auto_config, auto_model
from quamba.linear_attention.configs import CONFIGS
from quamba_kernels import ops
from quamba_kernels.testing import error

GOLDEN = Path(__file__).parent / "golden" / "linear_attention"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
PADDED = 3
"""Tokens of padding before the first row."""
CLOSE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def opened():
    """name -> the golden model in fp32."""
    models = {name: AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval() for name in NAMES}
    for model in models.values():
        model.generation_config.eos_token_id = None  # a random model ends where it likes
        model.generation_config.pad_token_id = 0
    return models


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the mask that the expected logits were made with."""
    ids = EXPECTED[f"{name}.input_ids"].long()
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    return ids, mask


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_every_family_has_a_golden_model() -> None:
    kinds = {json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert kinds == {config.model_type for config in CONFIGS} and len(NAMES) > len(kinds)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_names_and_logits_are_those_of_fla(name: str, opened) -> None:
    model, (ids, mask) = opened[name], inputs(name)
    assert set(model.state_dict()) == set(load_file(GOLDEN / name / "model.safetensors"))
    assert type(model).__name__ in model.config.architectures
    want = EXPECTED[f"{name}.logits"]
    got = model(ids, attention_mask=mask).logits
    assert distance(got[mask.bool()], want[mask.bool()]) < CLOSE < want.std() / 100
    assert distance(model(ids[1:], use_cache=False).logits, want[1:]) < CLOSE
    assert distance(model(ids[:1, PADDED:], use_cache=False).logits, want[:1, PADDED:]) < CLOSE


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_prefill_equals_decode_in_any_pieces(name: str, opened) -> None:
    model, (ids, mask) = opened[name], inputs(name)
    whole, tokens = model(ids, attention_mask=mask, use_cache=False).logits, ids.shape[1]
    for cuts in (range(tokens + 1), (0, 4, 5, 6, tokens), (0, PADDED + 1, tokens)):
        parts, cache = [], None if len(cuts) > 4 else DynamicCache(config=model.config)
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            output = model(
                ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            parts.append(output.logits)
        assert distance(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()]) < CLOSE, cuts
        assert all(layer.get_seq_length() == tokens for layer in cache.layers)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_generate(name: str, opened) -> None:
    model, (ids, mask) = opened[name], inputs(name)
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want, seen = ids, mask
    for _ in range(6):
        token = model(want, attention_mask=seen, use_cache=False).logits[:, -1:].argmax(-1)
        want, seen = torch.cat([want, token], 1), torch.cat([seen, torch.ones_like(token)], 1)
    assert torch.equal(model.generate(ids, **greedy), want)
    beams = {**greedy, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    after = model(ids[[1, 0], -1:], past_key_values=cache).logits
    assert distance(after, model(ids, use_cache=False).logits[[1, 0], -1:]) < CLOSE
    for layer in cache.layers:
        layer.reset()
    assert distance(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits) < CLOSE


@pytest.mark.parametrize("name", [name for name in NAMES if "hybrid" not in name])
@torch.inference_mode()
def test_states_stay_where_they_are_for_a_captured_graph(name: str, opened) -> None:
    model, (ids, _) = opened[name], inputs(name)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    before = [{key: tensor.data_ptr() for key, tensor in layer.tensors.items()} for layer in cache.layers]
    want = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 7)]
    cache.reset()
    model(ids[:, :4], past_key_values=cache)
    got = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4, 7)]
    assert cache.is_compileable and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert before == [{key: tensor.data_ptr() for key, tensor in layer.tensors.items()} for layer in cache.layers]
    assert all(before)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_bf16(name: str, opened) -> None:
    ids, _ = inputs(name)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.bfloat16).eval()
    output = model(ids[:, :-1], use_cache=True)
    last = model(ids[:, -1:], past_key_values=output.past_key_values).logits
    got, want = torch.cat([output.logits, last], 1), opened[name](ids, use_cache=False).logits
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 0.1


def changed(tmp_path: Path, name: str, change) -> Path:
    """A copy of a golden model with other tensors."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_loading_is_strict(tmp_path: Path) -> None:
    lacking = changed(tmp_path / "a", "gla", lambda t: t.pop("model.layers.1.attn.k_proj.weight"))
    with pytest.raises(UserError, match=r"1 missing tensors, the first is model\.layers\.1\.attn\.k_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(lacking)
    extra = changed(tmp_path / "b", "gla", lambda t: t.update({"model.layers.0.attn.z_proj.weight": torch.ones(2)}))
    with pytest.raises(UserError, match="1 unexpected tensors, the first is .*z_proj"):
        AutoModelForCausalLM.from_pretrained(extra)
    other = changed(tmp_path / "c", "gla", lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(UserError, match="1 mismatched tensors, the first is .*model.norm.weight"):
        AutoModelForCausalLM.from_pretrained(other)


def test_published_gated_deltanet_has_one_tensor_more(tmp_path: Path, opened) -> None:
    folder = changed(tmp_path, "gated_deltanet", lambda t: t.update({"model.layers.0.attn.D": torch.ones(2)}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = opened["gated_deltanet"].state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gla", {"attn": {"layers": [9], "num_heads": 2}}, "attn layers"),
        ("gla", {"attn": [{"layers": [1], "num_heads": 2}] * 2}, "attn layers"),
        ("gla", {"attn": {"layers": [1]}}, "num_heads"),
        ("gla", {"attn": {"layers": 1, "num_heads": 2}}, "a list of layers"),
        ("gla", {"attn": 7}, "a list of layers"),
        ("gla", {"attnres_block_size": 2}, "attnres_block_size"),
        ("gla", {"hidden_act": "powlu"}, "hidden_act='powlu'; supported is 'swish'"),
        ("rwkv6", {"hidden_act": "gelu"}, "hidden_act='gelu'; supported is 'sqrelu'"),
        ("rwkv7", {"attn": {"layers": [1], "num_heads": 2}}, "softmax attention"),
        ("lightnet", {"num_heads": None, "expand_ratio": None}, "num_heads nor expand_ratio"),
        ("retnet", {"feature_map": "taylor"}, "feature_map='taylor'"),
        ("delta_net", {"qk_norm": "l3"}, "qk_norm='l3'; supported is 'l2' or 'sum'"),
        ("gla", {"expand_k": 0.3}, "expand_k"),
    ],
)
def test_configs_that_cannot_be_run_are_refused(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "intermediate_size": 8}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**small, **changes}))


@torch.inference_mode()
def test_padding_after_a_token_is_refused_where_it_would_end_in_the_state(opened) -> None:
    model, (ids, mask) = opened["gla"], inputs("gla")
    right = mask.flip(1)
    with pytest.raises(ValueError, match="pad on the left"):
        model(ids, attention_mask=right, use_cache=True)
    got = model(ids, attention_mask=right, use_cache=False).logits
    assert distance(got[right.bool()], model(ids, use_cache=False).logits[right.bool()]) < CLOSE


def test_registering_again_or_over_another_class_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(AutoConfig.for_model("gla").__class__):
        pass

    AutoConfig.register("gla", Other, exist_ok=True)
    assert type(AutoConfig.for_model("gla")) is Other
    reload(auto_config)
    reload(auto_model)
    assert type(AutoConfig.for_model("gla")) in CONFIGS


def test_importing_quamba_before_transformers_is_enough() -> None:
    code = f"""
import quamba
from transformers import PreTrainedModel  # which reads AutoConfig before it is defined itself
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(GOLDEN / "rwkv6-hybrid")!r})
print(type(AutoConfig.for_model("kda")).__name__, type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["KDAConfig", "RWKV6ForCausalLM"], done.stderr


def test_a_checkpoint_loads_generates_and_evaluates(tmp_path: Path, text: Path) -> None:
    config = AutoConfig.for_model(
        "gated_deltanet", hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=16, intermediate_size=32,
        vocab_size=2048, tie_word_embeddings=True, attn={"layers": [1], "num_heads": 2},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(tmp_path)
    model, tokenizer = quamba.load(tmp_path, device="cpu")
    assert model.lm_head.weight is model.model.embeddings.weight
    assert generate(model, tokenizer, "Once upon a time", max_new_tokens=4).startswith("Once upon a time")
    prefill, steps = (perplexity(model, tokenizer, text, window=40, max_windows=4, stepwise=s) for s in (False, True))
    assert prefill["tokens"] == 4 * 39 and abs(prefill["value"] - steps["value"]) < 1e-3 * prefill["value"]


def test_scans_agree_where_their_families_overlap() -> None:
    rng = torch.Generator().manual_seed(0)
    B, T, H, N, P = 2, 12, 3, 8, 5
    q, k = (torch.randn(B, T, H, N, generator=rng) / N**0.5 for _ in range(2))
    v, rate = torch.randn(B, T, H, P, generator=rng), torch.rand(B, T, H, generator=rng) + 0.1
    g, beta = -torch.rand(B, T, H, N, generator=rng), torch.rand(B, T, H, generator=rng)

    def same(one: tuple, other: tuple) -> bool:
        return all(error(x, y) < 2e-6 for x, y in zip(one, other, strict=True))

    nothing = torch.zeros_like(k)
    assert same(ops.gla_scan(q, k, v, g), ops.dplr_scan(q, k, v, g, nothing, nothing))
    dt, A = torch.log(torch.expm1(rate)), -torch.ones(H)  # SSD takes the step before its softplus, and B times it
    ssd = ops.ssd_scan(v, dt, A, k / rate.unsqueeze(-1), q, torch.zeros(H))
    assert same(ops.gla_scan(q, k, v, -rate.unsqueeze(-1)), ssd)
    written = k * beta.unsqueeze(-1)
    delta = ops.delta_scan(q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2), g)
    assert same(delta, ops.dplr_scan(q, written, v, g, -k * g.exp(), written))
    assert not same(delta, ops.dplr_scan(q, written, v, g, -k, written))  # RWKV7 reads before the decay
    steps = [torch.stack([x[:, 0::2], x[:, 1::2]], 2) for x in (k, v, beta)]
    decays = torch.where(torch.arange(T).view(1, T, 1, 1) % 2 == 0, g, 0.0)
    o, last = ops.delta_scan(q, *(x.unsqueeze(2) for x in (k, v, beta)), decays)
    assert same(ops.delta_scan(q[:, 1::2], *steps, g[:, 0::2]), (o[:, 1::2], last))
    bonus = torch.randn(H, N, generator=rng)
    o, last = ops.gla_scan(q, k, v, g, bonus)
    late = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1), torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], 1)
    before, _ = ops.gla_scan(q, *late, torch.cat([g[:, :1], g[:, :-1]], 1))
    # the state before a token, and the token itself through the bonus
    assert same((o,), (before + (q * bonus * k).sum(-1, keepdim=True) * v,))
