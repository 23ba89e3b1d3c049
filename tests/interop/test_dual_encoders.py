"""CLIP and SigLIP as ours and back: embeddings, logits, loss and gradients of transformers' own classes, strictly read."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor, nn

from kempnerforge.config.adapter import LinearAdapterConfig
from kempnerforge.convert.commands import class_of, export_model, import_model
from kempnerforge.convert.verify import load_class
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.pack import join
from kempnerforge.data.sample import Sample, Text
from kempnerforge.inference.external import load_external
from kempnerforge.interop.dual_encoders import DualEncoderFamily
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.vlms import VLM_FAMILIES, fitting
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.dual_encoder import DualEncoder
from tests.interop.tiny_vlms import TOWER, rename, write_tokenizer
from tests.training.tiny import call, losses, make_job, metrics
from tests.vlm.tiny import picture

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTH = 12
CAPTIONS = ("a cat", "what is in the picture?", "the cat", "answer", "where is it")
KINDS = ("clip", "clip of a new tokenizer", "siglip")
"""Files of OpenAI say that the end of a text has id 2, whatever it is."""


def write_words(path: Path, kind: str) -> int:
    """A tokenizer of CLIP's form, whose end of a text has the highest id, or of SigLIP's, without a beginning; its size."""
    write_tokenizer(path, prefix=False)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    start = ""
    if kind != "siglip":
        backend.add_special_tokens(["<start>", "<end>"])
        names, start = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}, "<start> "
    special = [(name, backend.token_to_id(name)) for name in {*names.values()} - {"<pad>"}]
    backend.post_processor = processors.TemplateProcessing(single=f"{start}$A {names['eos_token']}", special_tokens=special)
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(path)
    return backend.get_vocab_size()


def save(kind: str, path: Path) -> None:
    """Writes a random model and its tokenizer."""
    size = write_words(path, kind)
    text = SIZES | {"vocab_size": size, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1}
    if kind == "siglip":
        text |= {"eos_token_id": 2}
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text | {"projection_size": 24}, vision_config=TOWER))
    else:
        text |= {"eos_token_id": 2 if kind == "clip" else size - 1}
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=16))
    draws = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.2, generator=draws)
    with torch.no_grad():
        model.logit_scale.fill_(1.2)
    model.save_pretrained(path)
    images = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 28, "width": 28}, "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor", **images}))


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dual")
    save(request.param, path)
    return path


@pytest.fixture(scope="module")
def ours(saved: Path) -> Assembly:
    return load_external(saved, verify=False).assembly


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    return load_class(saved, open_external(saved).architecture)


def family_of(model: Any) -> DualEncoderFamily:
    family = VLM_FAMILIES[model.config.model_type]
    assert isinstance(family, DualEncoderFamily)
    return family


def batches(it: Assembly, path: Path) -> tuple[Batch, dict[str, Tensor]]:
    """Pictures and captions as training reads them, several in a row, and as the class and its tokenizer do."""
    encoder, words = it.data.encoder(it.stages[0]), hf.AutoTokenizer.from_pretrained(path)
    rows = [encoder.encode(Sample(str(k), (picture(k, 28, 28),), (Text("unread", text),)), seed=0) for k, text in enumerate(CAPTIONS)]
    batch = collate([join(rows[:2]), join(rows[2:])], it.tokenizer.pad_id, None)
    assert batch.images is not None
    how = "max_length" if it.job.data.template == "padded_caption" else "longest"
    inputs = words([*CAPTIONS], padding=how, max_length=LENGTH, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).unique().numel() > 2, "texts of several lengths"
    return batch, {"input_ids": inputs["input_ids"], "pixel_values": it.model.normalise(batch.images)}


def arch(it: Assembly) -> DualEncoder:
    assert isinstance(it.model, DualEncoder)
    return it.model


def logits_per_image(model: DualEncoder, embeddings: Tensor) -> Tensor:
    scores = embeddings[:, 0] @ embeddings[:, 1].T * model.logit_scale.exp()
    return scores if model.logit_bias is None else scores + model.logit_bias


# ---- import -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_and_logits_are_those_of_transformers(saved: Path, ours: Assembly, theirs: Any) -> None:
    batch, inputs = batches(ours, saved)
    got, want = ours.model(batch).embeddings, theirs(**inputs)
    both = torch.stack([want.image_embeds, want.text_embeds], dim=1)
    torch.testing.assert_close(got, both, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_per_image(arch(ours), got), want.logits_per_image, rtol=0, atol=1e-5)
    assert both.std(0).mean() > 0.01, "they differ from pair to pair"


def test_loss_and_gradients_are_those_of_transformers(saved: Path, ours: Assembly, theirs: Any) -> None:
    batch, inputs = batches(ours, saved)
    want = theirs(**inputs, return_loss=True).loss
    want.backward()
    ours.model.train()
    output = ours.model(batch)
    loss = output.mean(batch.num_targets, batch.num_pairs)
    loss.backward()
    ours.model.eval()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    family, grads = family_of(theirs), {name: p.grad for name, p in theirs.named_parameters()}
    assert len(grads) == sum(1 for _ in ours.model.parameters()) > 60
    for name, p in ours.model.named_parameters():
        grad = grads[family.tensor_name(name, ours.job, "", family.layouts[0])]
        assert p.grad is not None and grad is not None, name
        torch.testing.assert_close(p.grad.view_as(grad), grad, rtol=1e-3, atol=1e-6, msg=name)
    ours.model.zero_grad()
    theirs.zero_grad()


def test_files_of_the_hub_say_more_and_less(tmp_path: Path) -> None:
    """What is older or without meaning is passed over, and what is left out is the class's default."""
    save("clip", tmp_path / "new")
    rename(tmp_path / "new", tmp_path / "old", {})
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config |= {"text_config_dict": None, "vision_config_dict": None, "logit_scale_init_value": 2.6592, "_commit_hash": None}
    for section, known in (("text_config", hf.CLIPTextConfig()), ("vision_config", hf.CLIPVisionConfig())):
        named = config[section] | {"add_cross_attention": False, "num_beams": 1, "prefix": None, "torchscript": False, "dropout": 0.0}
        config[section] = {key: value for key, value in named.items() if getattr(known, key, None) != value}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    ids = {f"{part}_model.embeddings.position_ids": torch.arange(12)[None] for part in ("text", "vision")}
    save_file(tensors | ids, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    old, new = open_external(tmp_path / "old"), open_external(tmp_path / "new")
    assert old.job == new.job and "hidden_act" not in config["text_config"]
    got, want = old.read(), new.read()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("key", ["text_model.encoder.layers.1.mlp.fc2.bias", "logit_scale", "vision_model.post_layernorm.weight"])
def test_a_renamed_key_is_named(key: str, saved: Path, tmp_path: Path) -> None:
    rename(saved, tmp_path, {key: key + "_"})
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        open_external(tmp_path)


@pytest.mark.parametrize(
    ("kind", "section", "values", "message"),
    [
        ("clip", "text_config", {"hidden_act": "relu"}, 'text_config.hidden_act = "relu": the backbone has quick_gelu, gelu'),
        ("clip", "text_config", {"layer_norm_eps": None}, "layer_norm_eps = null: must be a number"),
        ("clip", "", {"projection_dim": None}, "projection_dim = null: must be a number"),
        ("clip", "text_config", {"eos_token_id": 9}, "eos_token_id = 9, at which the class pools a text, and the tokenizer's EOS is 172"),
        ("siglip", "text_config", {"projection_size": 32}, "projection_size = 32: must be vision_config.hidden_size = 24"),
        ("siglip", "vision_config", {"vision_use_head": False}, "vision_use_head = false: without its pooling head"),
    ],
)
def test_what_cannot_be_read_is_refused(kind: str, section: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[section] if section else config).update(values)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_external(tmp_path)


# ---- export -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_out_and_in_again_is_the_same_model(saved: Path, theirs: Any, tmp_path: Path) -> None:
    """Bitwise the same weights, and from texts and pictures the same logits, with processors loaded from both."""
    import_model(saved, tmp_path / "run")
    lines = export_model(tmp_path / "run", tmp_path / "out").lines
    assert any("writes captions as in training" in line for line in lines) and any("pixels are those of training" in line for line in lines)
    again: Any = type(theirs).from_pretrained(tmp_path / "out")
    got, want = again.state_dict(), theirs.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert again.config.text_config.eos_token_id == (2 if family_of(theirs).kind == "siglip" else 172)
    pictures, scores = [Image.open(io.BytesIO(picture(k, 40, 28))) for k in range(2)], []
    for model, path in ((theirs, saved), (again, tmp_path / "out")):
        how = {"padding": "max_length", "max_length": None if model is again else LENGTH, "return_tensors": "pt"}
        words, pixels = hf.AutoTokenizer.from_pretrained(path)([*CAPTIONS], **how), hf.AutoImageProcessor.from_pretrained(path)
        inputs = {"input_ids": words["input_ids"], "pixel_values": pixels(images=pictures, return_tensors="pt")["pixel_values"]}
        scores.append(model(**inputs).logits_per_image)
    assert torch.equal(scores[0], scores[1]) and scores[0].shape == (2, len(CAPTIONS))


def test_trained_on_and_out(saved: Path, theirs: Any, tmp_path: Path) -> None:
    """Two steps in a run that begins from the import; retrieval is measured; the class has the trained weights."""
    import_model(saved, tmp_path / "start", verify=False)
    make_job(tmp_path / "data")
    data = [f"--data.{key}={tmp_path}/data/{name}.jsonl" for key, name in (("path", "train"), ("eval_path", "test"))]
    keys = ["--train.max_steps=2", "--train.batch_size=4", '--eval.tasks=["retrieval"]', "--data.truncate=true", "--metrics.interval=1"]
    ended = call("train", tmp_path / "start" / "config.toml", *data, *keys, f"--run.dir={tmp_path}/run", "--vlm.freeze=[]")
    assert ended.code == 0, ended.err
    assert len(set(losses(tmp_path / "run"))) == 2 and 0 <= metrics(tmp_path / "run")[-1]["eval/retrieval"] <= 1
    export_model(tmp_path / "run", tmp_path / "out")
    again: Any = type(theirs).from_pretrained(tmp_path / "out")
    kept = {name for name, p in again.named_parameters() if torch.equal(p, theirs.get_parameter(name))}
    assert not kept - {name for name in kept if name.endswith("k_proj.bias")}, "keys' biases change no softmax"


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("model", {"positions": "rope"}, "clip: model.positions = 'rope', not 'learned'"),
        ("model", {"qk_norm": True, "logit_softcap": 3.0}, "model.qk_norm = True, not False; model.logit_softcap = 3.0, not 0.0"),
        ("model", {"n_kv_heads": 2}, "model.n_kv_heads = 2, not 4"),
        ("model", {"activation": "swiglu"}, "model.activation = 'swiglu', not 'quick_gelu' or 'gelu_exact' or 'gelu'"),
        ("vlm", {"pooling": "mean", "caption_weight": 0.5}, "vlm.pooling = 'mean', not 'last'; vlm.caption_weight = 0.5, not 0.0"),
        ("vision_encoder", {"pooled": False}, "vision_encoder.pooled = false, not true"),
        ("vision_encoder", {"image_size": 56}, "vision_encoder.image_size = 56"),
        ("", {"adapter": LinearAdapterConfig()}, "adapter.type = 'linear', not 'none'"),
    ],
)
def test_what_is_neither_class_is_refused(section: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Why not the one, and why not the other."""
    save("clip", tmp_path)
    job = open_external(tmp_path).job
    assert fitting(job).family.kind == "clip"
    job = replace(job, **({section: replace(getattr(job, section), **keys)} if section else keys))
    with pytest.raises(InputError, match=f"no class of transformers is this model .*{message}.*siglip: vlm.loss = 'clip', not 'siglip'"):
        fitting(job)


def test_the_end_of_a_text_is_no_token_2_in_a_clip(tmp_path: Path) -> None:
    save("clip", tmp_path)
    write_words(tmp_path, "siglip")
    assembly = load_external(tmp_path, verify=False).assembly
    with pytest.raises(InputError, match="EOS has id 2: a CLIPModel takes the highest id"):
        class_of(assembly)
