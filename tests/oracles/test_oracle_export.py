"""Exported folders as transformers itself reads them: logits, generation, the byte tokenizer.

Needs the ``oracles`` extra; ``make oracles`` sets up an environment with it.
"""

import jax
import numpy as np
import pytest

REASON = "the 'oracles' extra (torch, transformers) is not installed; `make oracles` runs these tests"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from scaling.config import validate_cell  # noqa: E402
from scaling.export import export_model  # noqa: E402
from scaling.models.lm import build  # noqa: E402

pytestmark = pytest.mark.oracle

MODEL = {"d_model": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 112, "vocab": 97}
MUP = {"parametrization": "mup", "base_d_model": 24, "base_head_dim": 6}
CASES = {
    "Llama, tied": ("Llama", {"qk_norm": False}),
    "Llama, untied": ("Llama", {"qk_norm": False, "tied": False}),
    "Llama, multi-head, other theta and eps": (
        "Llama",
        {"qk_norm": False, "kv_heads": 4, "rope_theta": 300.0, "norm_eps": 1e-3},
    ),
    "Mistral, window": ("Mistral", {"qk_norm": False, "local_window": 7}),
    "Mistral, window, untied": ("Mistral", {"qk_norm": False, "local_window": 7, "tied": False}),
    "Qwen3, tied": ("Qwen3", {}),
    "Qwen3, one key-value head, untied, other theta and eps": (
        "Qwen3",
        {"kv_heads": 1, "tied": False, "rope_theta": 300.0, "norm_eps": 1e-3},
    ),
    "Qwen3, window": ("Qwen3", {"local_window": 7}),
    "Llama, muP, untied": ("Llama", {"qk_norm": False, "tied": False, **MUP}),
    "Qwen3, CompleteP": ("Qwen3", {**MUP, "parametrization": "completep", "base_layers": 2}),
    "Qwen3, one stream": ("Qwen3", {"cross_document": True}),
}
TOKENS = np.random.default_rng(0).integers(0, MODEL["vocab"], (2, 33))


def trained(source="tokens", **model):
    """(cell, params): with noise, so that no scale is one and attention is far from uniform."""
    cell = validate_cell(
        {
            "model": {**MODEL, **model},
            "data": {"source": source, "path": "elsewhere", "seq": 64},
            "optim": {"lr": 1e-2},
            "schedule": {"warmup_steps": 3},
            "train": {"batch": 4, "steps": 8},
        }
    )
    rng = np.random.default_rng(1)
    apply, params = build(cell["model"], seed=0)
    noisy = lambda x: np.asarray(1.5 * x + 0.1 * rng.standard_normal(x.shape), np.float32)  # noqa: E731
    return cell, apply, jax.tree.map(noisy, params)


def load(folder, **options):
    """from_pretrained, every tensor in its place: none missing, none left over, none drawn anew."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case, attention, tmp_path):
    kind, changes = CASES[case]
    cell, apply, params = trained(**changes)
    model = load(export_model(params, cell, tmp_path / "hf"), attn_implementation=attention)
    assert type(model).__name__ == f"{kind}ForCausalLM" and model.dtype == torch.float32
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    assert theirs.std() > 0.5
    # both in float32, in different orders: three layers of sums of about 100 terms
    np.testing.assert_allclose(np.asarray(jax.jit(apply)(params, TOKENS)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["Mistral, window", "Qwen3, window"])
def test_window_matters_at_these_sizes(case, tmp_path):
    cell, _, params = trained(**CASES[case][1])
    folder = export_model(params, cell, tmp_path / "hf")
    model = load(folder, attn_implementation="eager")
    wide = export_model(params, {**cell, "model": {**cell["model"], "local_window": None}}, tmp_path / "wide")
    with torch.no_grad():
        difference = (model(torch.tensor(TOKENS)).logits - load(wide)(torch.tensor(TOKENS)).logits).abs()
    assert difference[:, :7].max() < 1e-4 and difference[:, 7:].max() > 0.01


def test_shards_and_bfloat16(tmp_path):
    cell, _, params = trained(tied=False)
    whole = load(export_model(params, cell, tmp_path / "a"))
    parts = load(export_model(params, cell, tmp_path / "b", shard_bytes=50_000))
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    short = load(export_model(params, cell, tmp_path / "c", dtype="bfloat16"), dtype="auto")
    assert short.dtype == torch.bfloat16
    for (name, a), b, c in zip(whole.named_parameters(), parts.parameters(), short.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.to(torch.bfloat16), c), name


def test_generation_goes_on_past_any_token(tmp_path):
    """Greedy tokens with transformers' cache are ours; no token ends the text, as Llama's 2 does."""
    cell, apply, params = trained(qk_norm=False)
    model = load(export_model(params, cell, tmp_path / "hf"))
    assert model.generation_config.eos_token_id is None
    start = TOKENS[:1, :4]
    mask = torch.ones(1, 4, dtype=torch.int64)
    out = model.generate(torch.tensor(start), attention_mask=mask, max_new_tokens=24, do_sample=False).numpy()
    assert out.shape == (1, 28)
    logits = np.asarray(jax.jit(apply)(params, out))[0]
    np.testing.assert_array_equal(out[0, 4:], logits[3:-1].argmax(-1))


def test_byte_tokenizer(tmp_path):
    cell, _, params = trained(source="text", vocab=256)
    folder = export_model(params, cell, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("def f(x):\n\treturn x  # 1\r\n", "  Größe, 漢字, 🙂", "\x00\x7f\xa0\xad end", "'s don't"):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text
