"""GGUF files as llama.cpp's converter writes them, in our backbone, against the model of transformers that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from kempnerforge import load_pretrained
from kempnerforge.convert.commands import import_model
from kempnerforge.interop.external_tokenizer import read_tokenizer
from kempnerforge.interop.open_external import open_external
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.transformer import Context, Transformer
from tests.interop.families import THEIRS

gguf: Any = pytest.importorskip("gguf")
HEADS, GROUPS = 4, 2
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TEXTS = ["what is 2024 and 17?", "the cat sat on the mat, the Cat", "naïve café 123"]


def words() -> tokenizers.Tokenizer:
    """Byte-level BPE in which digits are alone."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def rows_in_turn(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, backend: tokenizers.Tokenizer, quantised: str = "", **changes: Any) -> None:
    """``changes``: "architecture", "pre", "drop", a tensor that is left out, or "silent": the number of layers is not said."""
    out, cfg = gguf.GGUFWriter(path, changes.get("architecture", "llama")), model.config
    if not changes.get("silent"):
        out.add_block_count(cfg.num_hidden_layers)
    out.add_context_length(64)
    out.add_embedding_length(cfg.hidden_size)
    out.add_feed_forward_length(cfg.intermediate_size)
    out.add_head_count(cfg.num_attention_heads)
    out.add_head_count_kv(cfg.num_key_value_heads)
    out.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    out.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    vocab = backend.get_vocab(with_added_tokens=True)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(changes.get("pre", "smollm"))
    out.add_token_list(sorted(vocab, key=lambda token: vocab[token]))
    out.add_token_types([3 if k < 3 else 1 for k in range(len(vocab))])
    out.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(2)
    if (adds := changes.get("add_bos", False)) is not None:
        out.add_add_bos_token(adds)
    for name, value in model.state_dict().items():
        data = value.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            data = rows_in_turn(data, HEADS if ".q_proj." in name else GROUPS)
        ours = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if name not in ours:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            ours[name] = f"blk.{layer}.{NAMES[part]}.weight"
        if ours[name] == changes.get("drop"):
            continue
        if ours[name] == quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(ours[name], gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            out.add_tensor(ours[name], np.ascontiguousarray(data))
    for key, value in changes.get("more", {}).items():
        add = {bool: out.add_bool, str: out.add_string, float: out.add_float32, int: out.add_uint32}[type(value)]
        add(key, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the size of the vocabulary, and of widths that Q8_0 can have."""
    torch.manual_seed(0)
    size = len(words().get_vocab())
    config = hf.LlamaConfig(**THEIRS | {"vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1})
    return hf.LlamaForCausalLM(config).eval()


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    external = open_external(path)
    ours = Transformer(external.job.model).eval()
    ours.load_state_dict({name.removeprefix("transformer."): value for name, value in external.read().items()})
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return ours.unembed(ours.run(ours.embed(ids), Context(rope_tables(positions, ours.cfg))))


def test_logits(model: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
    write(tmp_path / "plain.gguf", model, words())
    assert (logits(tmp_path / "plain.gguf", ids) - want).abs().max() <= 1e-5
    write(tmp_path / "quantised.gguf", model, words(), quantised="blk.0.attn_q.weight")
    assert 1e-5 < (logits(tmp_path / "quantised.gguf", ids) - want).abs().max() < 0.1 * want.abs().max()


def test_tokenizer(model: Any, tmp_path: Path) -> None:
    backend = words()
    write(tmp_path / "m.gguf", model, backend)
    ours = read_tokenizer(tmp_path / "m.gguf", None)
    assert (ours.bos_id, ours.start_id, ours.eos_id, ours.pad_id) == (1, None, 2, 2)
    for text in [*TEXTS, "  two spaces 00199\n"]:
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text


def test_import(model: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model, words())
    done = import_model(tmp_path / "m.gguf", tmp_path / "out")
    assert done.difference is None and "nothing to compare with" in "\n".join(done.lines)
    _, processor = load_pretrained(tmp_path / "out", device="cpu")
    assert processor(text="the cat").input_ids.shape[1] > 1
    with pytest.raises(ValueError, match="a prompt without an image needs at least one token"):  # this tokenizer has no BOS
        processor(text=["the cat", ""])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "blk.1.ffn_up.weight"}, r"lacks 1: blk\.1\.ffn_up\.weight"),
        ({"architecture": "gemma"}, "general.architecture = 'gemma': only 'llama'"),
        ({"silent": True}, r"m\.gguf: does not say llama\.block_count"),
        ({"pre": "qwen2"}, "'gpt2' with the rule 'qwen2'"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict[str, Any], message: str, model: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model, words(), **changes)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match=r"broken.gguf: "):
        open_external(tmp_path / "broken.gguf")


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "llama.rope.scaling.original_context_length": 32}, 2.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0),
        ({"llama.rope.scaling.attn_factor": 1.0, "llama.attention.causal": True, "llama.attention.sliding_window": 0}, 1.0),
    ],
)
def test_positions_are_scaled_as_llama_cpp_scales_them(more: dict[str, Any], factor: float, model: Any, tmp_path: Path) -> None:
    """A factor without a type, or under its old key, is a linear one."""
    write(tmp_path / "m.gguf", model, words(), more=more)
    ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}
    scaled = hf.LlamaForCausalLM(hf.LlamaConfig(**model.config.to_dict() | {"rope_parameters": rope})).eval()
    scaled.load_state_dict(state)
    with torch.no_grad():
        assert (logits(tmp_path / "m.gguf", ids) - scaled(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.attn_factor", 1.2),
        ("llama.attention.causal", False),
        ("llama.attention.sliding_window", 8),
        ("llama.expert_count", 4),
        ("llama.attention.clamp_kqv", 2.0),
        ("llama.something.new", 3),
    ],
)
def test_a_key_that_is_not_read_is_refused_by_name(key: str, value: Any, model: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model, words(), more={key: value})
    with pytest.raises(ValueError, match=key.replace(".", r"\.") + " = "):
        open_external(tmp_path / "m.gguf")


@pytest.mark.parametrize(("adds", "starts"), [(None, False), (False, False), (True, True)])
def test_bos_is_put_in_front_where_the_file_says_so(adds: bool | None, starts: bool, model: Any, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model, words(), add_bos=adds, more={"tokenizer.ggml.eot_token_id": 0})
    import_model(tmp_path / "m.gguf", tmp_path / "out")
    _, processor = load_pretrained(tmp_path / "out", device="cpu")
    asked = processor(text="the cat")
    assert (asked.input_ids[0, 0].item() == 1) is starts
    assert asked.input_ids[0].tolist() == processor.encoder.encode_question("the cat", []).ids  # what ``generate`` and ``chat`` ask
    assert asked.end_id == {0, 2}
