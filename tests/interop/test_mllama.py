"""Llama 3.2 Vision as ours and back: the same logits, tokens and gradients as transformers' own class, strictly read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kempnerforge import load_pretrained
from kempnerforge.config import CrossAttentionConfig, JobConfig, ModelConfig
from kempnerforge.config.vision import MllamaTowerConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.convert.verify import agreement, class_logits, load_class, make_probe, our_logits
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.data.text.tokenizer import put_in_front
from kempnerforge.interop import mllama
from kempnerforge.interop.external_tokenizer import tokenizer_of
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.vlm_family import arch_of
from kempnerforge.interop.vlms import fitting
from kempnerforge.model.mllama import MllamaTower
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.vlm.build import build_model
from tests.interop.tiny_vlms import rename, write_tokenizer

VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "intermediate_size": 40,
    "vision_output_dim": 72,
    "image_size": 28,
    "patch_size": 7,
    "max_num_tiles": 2,
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    "intermediate_layers_indices": [0, 2],
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "cross_attention_layers": [1, 4],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>"]


def save(path: Path) -> int:
    """Writes a random model and its tokenizer, whose last token is that of an image; returns the id of that."""
    write_tokenizer(path, prefix=False)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = put_in_front("<bos>", 1)  # as the published tokenizer does
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    image_id = backend.token_to_id("<|image|>")
    config = hf.MllamaConfig(vision_config=VISION, text_config=TEXT | {"vocab_size": image_id}, image_token_index=image_id)
    model = hf.MllamaForConditionalGeneration(config)
    draws = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        mean = 1.0 if "norm" in key else 0.6 if "gate" in key.split(".")[-1] else 0.0
        nn.init.normal_(p, mean=mean, std=0.1, generator=draws)
    model.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    for section in ("text_config", "vision_config"):  # files on the hub say much that has no meaning
        written[section] |= {"do_sample": False, "top_k": 50, "torchscript": False, "_name_or_path": "", "num_beams": 1}
    rope = written["text_config"].pop("rope_parameters")
    written["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (path / "config.json").write_text(json.dumps(written))
    means = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(means))
    return image_id


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mllama")
    save(path)
    return path


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    return load_class(saved, mllama.MLLAMA.architecture)


@pytest.fixture(scope="module")
def ours(saved: Path) -> Assembly:
    external = open_external(saved)
    assembly = assemble(external.job, tokenizer_of(external), data=False)
    assembly.model.load_state_dict(external.read(), strict=True)
    assembly.model.eval()
    return assembly


def batch_of(it: Assembly, *rows: str) -> tuple[Batch, dict[str, Tensor]]:
    """Rows of random words (w) and images (i), padded on the left, for ours and for theirs."""
    rng = torch.Generator().manual_seed(1)
    image_id = it.tokenizer.token_id("<|image|>")
    assert image_id is not None
    prompts = []
    for row in rows:
        words = torch.randint(3, image_id, (len(row),), generator=rng).tolist()
        ids = [image_id if kind == "i" else word for kind, word in zip(row, words, strict=True)]
        prompts.append(Prompt(ids, tuple(k for k, kind in enumerate(row) if kind == "i")))
    counts = [row.count("i") for row in rows]
    pixels = torch.randint(256, (sum(counts), 3, 28, 28), generator=rng, dtype=torch.uint8)
    numbers = [range(sum(counts[:k]), sum(counts[: k + 1])) for k in range(len(rows))]
    batch = prompt_batch(prompts, pixels, numbers, it.data.layout, 0)
    inputs = {"input_ids": batch.input_ids, "attention_mask": (batch.kinds > 0).long()}
    if sum(counts):
        inputs["pixel_values"] = it.model.normalise(pixels)
    return replace(batch, targets=torch.arange(batch.kinds.numel())), inputs


# ---- import ---------------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(ours: Assembly, theirs: Any) -> None:
    """Words in front of the image among them, which read it in that class, empty tiles and all."""
    image_id = ours.tokenizer.token_id("<|image|>")
    probe = make_probe(ours, image_id, ours.tokenizer.base_vocab_size)
    want, got = class_logits(theirs, probe.inputs), our_logits(ours.model, probe.batch)
    assert (probe.inputs["input_ids"] == image_id).nonzero()[:, 1].tolist() == [3, 3] and want.std() > 0.1
    assert got.shape == want.shape and agreement(got, want).difference <= 1e-5
    assert probe.batch.images is not None
    probe.batch.images.zero_()
    assert ((our_logits(ours.model, probe.batch) - got).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("blind", ["feed_forward", "nothing"])
def test_blind_words_as_they_usually_are_is_another_model(blind: str, ours: Assembly, theirs: Any) -> None:
    batch, inputs = batch_of(ours, "wwwiww", "iwwwww")
    want, vlm = class_logits(theirs, inputs), ours.job.vlm
    assert isinstance(vlm, CrossAttentionConfig) and vlm.cross_attention_blind == "attention"
    vlm.cross_attention_blind = blind
    got = our_logits(ours.model, batch)
    vlm.cross_attention_blind = "attention"
    assert (got[0] - want[0]).abs().max() > 1e-2
    assert (got[1] - want[1]).abs().max() <= 1e-5, "with the image in front there is no such word"


def test_several_images_and_none(ours: Assembly, theirs: Any) -> None:
    """Neighbours are one group; a row is what it is alone; without an image the blocks do nothing."""
    rows = ["wiiwwwiwwiw", "wwwwwww", "iwwwwwwwwwwww"]
    together = our_logits(ours.model, batch_of(ours, *rows)[0])
    for number, row in enumerate(rows):
        batch, inputs = batch_of(ours, *rows)
        words, images = batch.input_ids[number, -len(row) :], sum(r.count("i") for r in rows[:number])
        alone = {"input_ids": words[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        if count := row.count("i"):
            alone["pixel_values"] = inputs["pixel_values"][images : images + count]
        want = class_logits(theirs, alone)
        assert (together[number, -len(row) :] - want[0]).abs().max() <= 1e-5, row


def test_greedy_tokens_are_equal(ours: Assembly, theirs: Any) -> None:
    batch, inputs = batch_of(ours, "wwiwww", "wiwwwwwww")
    extra = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = theirs.generate(**mllama.MLLAMA.class_inputs(inputs, theirs.config), **extra)[:, batch.input_ids.shape[1] :]
    asked = type("Prompts", (), {"batch": batch, "end_id": -1})()
    assert ours.model.generate(asked, max_new_tokens=10) == made.tolist()


def test_gradients_are_equal(ours: Assembly, theirs: Any) -> None:
    batch, inputs = batch_of(ours, "wwwiwwww", "iwwwwwww")
    labels = batch.input_ids.flatten() // 2
    every = 2
    nn.functional.cross_entropy(theirs(**mllama.MLLAMA.class_inputs(inputs, theirs.config)).logits.flatten(0, 1), labels).backward()
    ours.model.zero_grad()
    nn.functional.cross_entropy(ours.model(batch).logits, labels).backward()
    want = dict(theirs.named_parameters())
    assert len(want) == sum(1 for _ in ours.model.parameters())
    for name, p in ours.model.named_parameters():
        grad = want[mllama.tensor_name(name, every, mllama.MLLAMA.layouts[1])].grad
        assert p.grad is not None and grad is not None and p.grad.isfinite().all(), name
        assert (p.grad - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max().item()), name
    gates = [p.grad for name, p in ours.model.named_parameters() if name.endswith(("attention_gate", "mlp_gate"))]
    assert len(gates) == 4 and all(gate is not None and gate.any() for gate in gates)


def test_all_layouts_are_one_model(saved: Path, tmp_path: Path) -> None:
    prefixes = {"vision_model.": "model.vision_model.", "multi_modal_projector.": "model.multi_modal_projector."}
    text = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    rename(saved, tmp_path, prefixes | text)
    got, want = open_external(tmp_path).read(), open_external(saved).read()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    "key",
    [
        "language_model.model.layers.1.cross_attn.k_norm.weight",
        "language_model.model.layers.4.cross_attn_mlp_gate",
        "language_model.model.layers.5.self_attn.q_proj.weight",
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.bias",
        "vision_model.class_embedding",
        "vision_model.global_transformer.layers.1.gate_ffn",
    ],
)
def test_a_renamed_key_is_named(key: str, saved: Path, tmp_path: Path) -> None:
    rename(saved, tmp_path, {key: key + "_"})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        open_external(tmp_path)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text_config", {"cross_attention_layers": [1, 3]}, r"cross_attention_layers = \[1, 3\] of 7: ours are before every n-th"),
        ("text_config", {"cross_attention_layers": [1]}, "cross_attention_layers"),
        ("text_config", {"cross_attention_layers": []}, "cross_attention_layers"),
        ("text_config", {"vocab_size": 200}, "vocab_size = 200: the embedding has .* not 8 more"),
        ("text_config", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1], [2, 1], [1, 2]]}, "supported_aspect_ratios = .* must be"),
        ("vision_config", {"intermediate_layers_indices": [0, 3]}, "intermediate_layers_indices"),
    ],
)
def test_what_cannot_be_read_is_refused(section: str, values: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    rename(saved, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    config[section] |= values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        open_external(tmp_path)


def test_the_token_of_an_image_is_the_tokenizers(saved: Path, tmp_path: Path) -> None:
    rename(saved, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text()) | {"image_token_index": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the token of an image is 7, and the tokenizer's '<\|image\|>' is 1\d\d"):
        tokenizer_of(open_external(tmp_path))


@pytest.mark.parametrize(("layers", "blocks"), [(40, [3, 8, 13, 18, 23, 28, 33, 38]), (100, list(range(3, 100, 5)))])
def test_blocks_of_the_models_on_the_hub(layers: int, blocks: list[int]) -> None:
    """11B and 90B: in front of every fourth of 32 and of 80 layers."""
    assert mllama.block_layers(4, layers - len(blocks)) == blocks
    names = [
        mllama.tensor_name(f"transformer.layers.{i}.{part}", 4, mllama.MLLAMA.layouts[0])
        for i, part in ((3, "cross_attention.mlp_gate"), (3, "mlp_norm.weight"))
    ]
    assert [name.split(".")[3] for name in names] == ["3", "4"]


# ---- the stream ------------------------------------------------------------------------------------------------------


def test_the_stream_is_that_of_the_instruct_models(saved: Path, tmp_path: Path) -> None:
    """The token of the image is in it, once, and is the first to see the image; asked directly and from a run."""
    import_model(saved, tmp_path / "run")
    text = (
        "<bos><|start_header_id|>user<|end_header_id|>\n\n<|image|>what is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    want = hf.AutoTokenizer.from_pretrained(saved)(text, add_special_tokens=False)["input_ids"]
    picture = Image.fromarray(np.full((28, 28, 3), 90, np.uint8))
    for path in (saved, tmp_path / "run"):
        model, processor = load_pretrained(path, device="cpu")
        inputs = processor(images=picture, text="what is it?")
        assert inputs.input_ids.tolist() == [want]
        assert inputs.batch.image_starts.tolist() == [want.index(processor.tokenizer.token_id("<|image|>"))]
        assert len(model.generate(inputs, max_new_tokens=2)[0]) <= 2


# ---- export ---------------------------------------------------------------------------------------------------------


def test_there_and_back(saved: Path, theirs: Any, tmp_path: Path) -> None:
    """Bitwise the same tensors, and the same logits as ours."""
    there = import_model(saved, tmp_path / "run")
    back = export_model(tmp_path / "run", tmp_path / "back")
    assert there.difference is not None and back.difference is not None and max(there.difference, back.difference) <= 1e-5
    again, info = hf.MllamaForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(saved / "model.safetensors").keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    found, wanted = (model.config.to_dict() for model in (again, theirs))
    assert found["image_token_index"] == wanted["image_token_index"]
    for section, keys in (("text_config", TEXT), ("vision_config", VISION)):
        for key in keys:
            assert found[section][key] == wanted[section][key], key


def ready(**how: Any) -> JobConfig:
    model = ModelConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=40, tie_embeddings=False, norm_eps=1e-5)
    settings = {"model_type": "mllama_vision_model", **{k: v for k, v in VISION.items() if not isinstance(v, list)}}
    tower = MllamaTowerConfig(settings=settings, intermediate_layers=[0, 2])
    options = mllama.options(model, 17) | {"cross_attention_every_n_layers": 2} | how
    return JobConfig(
        model=model, vision_encoder=tower, adapter=mllama.LinearAdapterConfig(), vlm=VLMConfig.for_arch(arch_of(mllama.KIND), **options)
    )


def test_what_is_no_mllama_says_why() -> None:
    fitting(ready())
    with pytest.raises(ValueError, match="no class of transformers .*vlm.cross_attention_blind = 'nothing', not 'attention'"):
        fitting(ready(cross_attention_blind="nothing"))
    with pytest.raises(ValueError, match="vision_encoder.type = 'vit', not 'mllama'"):
        fitting(JobConfig(vlm=CrossAttentionConfig()))
    with pytest.raises(ValueError, match="qk_norm = True"):
        fitting(replace(ready(), model=replace(ready().model, qk_norm=True)))
    with pytest.raises(ValueError, match="model.head_dim = 16"):
        fitting(replace(ready(), model=replace(ready().model, head_dim=16)))


@pytest.mark.parametrize("unwritten", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_it_has_besides(unwritten: int, tied: bool) -> None:
    """A model of ours with other rows after its head's gets as many as the class has."""
    if tied and unwritten:
        return
    job = replace(ready(unwritten_tokens=unwritten), model=replace(ready().model, tie_embeddings=tied))
    embedding = torch.randn(40, 32)
    head = {} if tied else {"transformer.output_head.weight": torch.randn(40 - unwritten, 32)}
    found = mllama.MLLAMA.tensors(job, None, {"transformer.token_embedding.weight": embedding, **head})
    rows, written = found["language_model.model.embed_tokens.weight"], found["language_model.lm_head.weight"]
    assert len(rows) == len(written) + 8 and torch.equal(rows[:40], embedding)
    assert torch.equal(written, embedding if tied else head["transformer.output_head.weight"])


# ---- its options ---------------------------------------------------------------------------------------------------------


def test_options_that_do_not_go_together() -> None:
    for message, how in {
        "cross_attention_blind = 'x'": {"cross_attention_blind": "x"},
        "cross_attention_media = 'last'": {"cross_attention_media": "last"},
        "unwritten_tokens = -1": {"unwritten_tokens": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            CrossAttentionConfig(**how)
    job = ready(unwritten_tokens=8)
    for message, model in {
        "not with model.tie_embeddings = true": replace(job.model, tie_embeddings=True),
        r"not with model.new_tokens = \['<a>'\]": replace(job.model, new_tokens=["<a>"]),
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(job, model=model).validate()
    with pytest.raises(ValueError, match="cross_attention_seen_tokens = 35: an image has 34 tokens"):
        build_model(ready(cross_attention_seen_tokens=35))
    assert build_model(job).transformer.output_head.weight.shape == (32, 32)  # type: ignore[union-attr]


# ---- the tower ------------------------------------------------------------------------------------------------------


def test_settings_make_the_same_tower_without_its_files(saved: Path) -> None:
    cfg = MllamaTowerConfig(path=str(saved))
    tower = MllamaTower(cfg)
    alone = tower.standing_alone(cfg)
    assert alone.path == "" and alone.settings and alone.intermediate_layers
    twin = MllamaTower(alone)
    twin.load_state_dict(tower.state_dict())
    images = torch.randint(0, 256, (2, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(twin(images), tower(images))


def test_the_tower_alone(saved: Path, ours: Assembly) -> None:
    """From a directory, and on nothing."""
    encoder = MllamaTower(MllamaTowerConfig(path=str(saved)))
    images = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    built = ours.model.vision_encoder
    assert encoder(images).shape == (2, 34, 72) == (2, built.num_tokens, built.dim)
    assert encoder.normalisation[0] == (0.4, 0.5, 0.6) and torch.equal(encoder(images), built(images))
    assert encoder.num_tokens == 2 * encoder.tile_tokens and encoder(images[:0]).shape == (0, 34, 72)
    assert {id(p) for unit in encoder.units for p in unit.parameters()} <= {id(p) for p in encoder.parameters()}
    for message, values in {
        "feature_layer = -2": {"path": "x", "feature_layer": -2},
        "intermediate_layers": {"settings": {"hidden_size": 8}},
        r"intermediate_layers = \[-1\]": {"settings": {"hidden_size": 8}, "intermediate_layers": [-1]},
    }.items():
        with pytest.raises(ValueError, match=message):
            MllamaTowerConfig(**values)
