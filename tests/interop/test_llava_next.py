"""LLaVA-NeXT of transformers as a joint_decoder, and back: the same logits and tokens of images of several shapes, the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from kempnerforge import load_pretrained
from kempnerforge.config import ModelConfig
from kempnerforge.config.images import NEWLINE, ImagesConfig
from kempnerforge.config.stages import StageConfig
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.convert.peer import TransformersLoop
from kempnerforge.convert.verify import load_class
from kempnerforge.data.batching.collate import collate
from kempnerforge.interop.external_tokenizer import tokenizer_of as tokenizer_of_model
from kempnerforge.interop.open_external import open_external
from kempnerforge.interop.vlms import fitting
from kempnerforge.model.image_processor import pil_processor
from kempnerforge.training.setup import assemble
from kempnerforge.training.tokenizer import fit_vocabulary
from kempnerforge.util.errors import InputError
from tests.interop.test_processors import asked, pictures, rows, run_of, tokenizer_of
from tests.interop.test_vlms import HUB, MEMORY
from tests.interop.tiny_vlms import IMAGE, SQUARES, TEXT, TOWER, VOCAB, rename, write_tokenizer
from tests.training.tiny import call

SHAPES = [(28, 28), (56, 28), (41, 30), (17, 90), (90, 17), (33, 64), (97, 49), (5, 7), (200, 120)]
"""Width and height: of one and several rows of tiles, with and without padding, up and down."""
FITTED = [(28, 56), (56, 28), (84, 28), (168, 56)]
"""Images that fill the tiles: no padding is left out."""
PROMPT = "USER: <image>\nwhat is in the picture? ASSISTANT:"
IMAGES = ImagesConfig(fit="tiles", tiling="anyres", pinpoints=[(1, 2), (2, 1), (2, 2), (1, 3)], markers=False, rows=True, padding="black")


def make(path: Path, text: Any = None, pinpoints: list[list[int]] = SQUARES, **keys: Any) -> Any:
    """A tiny random model of 2 x 2 tokens a view, saved as it is on the hub."""
    tower: dict[str, Any] = TOWER | {"patch_size": 14}
    vision = hf.CLIPVisionConfig(**tower)
    config = hf.LlavaNextConfig(
        vision_config=vision, text_config=text or hf.LlamaConfig(**TEXT), image_token_index=IMAGE, image_grid_pinpoints=pinpoints, **keys
    )
    model = hf.LlavaNextForConditionalGeneration(config).eval()
    draws = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.1, generator=draws)
    model.tie_weights()
    model.save_pretrained(path)
    write_tokenizer(path, prefix=True)
    images = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "image_grid_pinpoints": pinpoints}
    images |= {"image_processor_type": "LlavaNextImageProcessor", "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    settings = {"processor_class": "LlavaNextProcessor", "patch_size": 14, "num_additional_image_tokens": 1}
    (path / "processor_config.json").write_text(json.dumps(settings | {"vision_feature_select_strategy": "default"}))
    return model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("next") / "theirs"
    make(path)
    return path


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def same_answers(theirs: Path, path: Path, groups: list[list[Image.Image]]) -> None:
    """Ids, pixels, logits and greedy tokens: of the class at ``theirs`` through its own processor, and of ours at ``path``."""
    reader, model = pil_processor(theirs), load_class(theirs, "LlavaNextForConditionalGeneration")
    ours, processor = load_pretrained(path, device="cpu", verify=False)
    for shown in groups:
        text = PROMPT if len(shown) == 1 else "a <image> and <image>\nanswer en"
        want, got = reader(images=shown, text=text, return_tensors="pt"), processor(images=[shown], text=[text])
        assert got["input_ids"].tolist() == want["input_ids"].tolist()
        assert got["image_sizes"].tolist() == want["image_sizes"].tolist()
        pixels = want["pixel_values"].flatten(0, 1)
        assert (pixels[pixels.flatten(1).any(1)] - got["pixel_values"]).abs().max() <= 1e-5
        count = got["input_ids"].shape[1]
        batch = replace(got.batch, targets=torch.arange(count))
        with torch.no_grad():
            logits = model(**got, use_cache=False).logits[0]
            found = ours(batch).logits
        assert found.shape == logits.shape and logits.std() > 0.1
        assert (found - logits).abs().max() <= 1e-5
        made = model.generate(**want, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, count:].tolist()
        assert ours.generate(replace(got, end_id=VOCAB + 9), max_new_tokens=8)[0] == made


def test_logits_and_greedy_tokens_are_those_of_transformers(theirs: Path) -> None:
    same_answers(theirs, theirs, [[noise(size)] for size in (*SHAPES, *FITTED)] + [[noise((41, 30)), noise((17, 90))]])


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "tied", "full vocabulary"])
def test_other_text_models(kind: str, tmp_path: Path) -> None:
    plain = {key: value for key, value in TEXT.items() if key != "head_dim"}
    text: Any = {"mistral": hf.MistralConfig(**TEXT), "qwen2": hf.Qwen2Config(**plain), "tied": hf.LlamaConfig(**TEXT)}.get(kind)
    if kind == "full vocabulary":  # no row of the embedding without a token
        write_tokenizer(tmp_path / "words", prefix=True)
        sizes: dict[str, Any] = TEXT | {"vocab_size": len(hf.AutoTokenizer.from_pretrained(tmp_path / "words"))}
        text = hf.LlamaConfig(**sizes)
    make(tmp_path / "theirs", text, tie_word_embeddings=kind == "tied", vision_feature_layer=-1 if kind == "mistral" else -2)
    external = open_external(tmp_path / "theirs")
    assert external.job.model.tie_embeddings == (kind == "tied")
    same_answers(tmp_path / "theirs", tmp_path / "theirs", [[noise((41, 30))], [noise((17, 90))]])


@pytest.mark.parametrize("names", [HUB, MEMORY | {"image_newline": "model.image_newline"}], ids=["hub", "memory"])
def test_all_layouts_are_one_model(names: dict[str, str], theirs: Path, tmp_path: Path) -> None:
    rename(theirs, tmp_path, names)
    got, want = open_external(tmp_path).read(), open_external(theirs).read()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    newline = load_file(theirs / "model.safetensors")["image_newline"]
    assert torch.equal(want["transformer.new_tokens.embedding.weight"], newline[None])


def test_import_and_export_leave_every_weight_as_it_is(theirs: Path, tmp_path: Path) -> None:
    imported = import_model(theirs, tmp_path / "run")
    assert imported.difference is not None and imported.difference <= 1e-5
    assert not any("does otherwise" in line for line in imported.lines), imported.lines
    exported = export_model(tmp_path / "run", tmp_path / "out")
    assert any("processor: LlavaNextProcessor (written here)" in line for line in exported.lines), exported.lines
    before = load_class(theirs, "LlavaNextForConditionalGeneration").state_dict()
    after = load_class(tmp_path / "out", "LlavaNextForConditionalGeneration").state_dict()
    assert after.keys() == {name for name in before if "encoder.layers.2" not in name}  # beyond the layer that is read
    assert all(torch.equal(after[name], before[name]) for name in after if "post_layernorm" not in name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == SQUARES and config["text_config"]["vocab_size"] == VOCAB
    assert NEWLINE not in hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    same_answers(theirs, tmp_path / "out", [[noise((41, 30))], [noise((17, 90))]])  # read here again


def test_generate_asks_what_is_on_the_hub(theirs: Path, tmp_path: Path) -> None:
    shown = [tmp_path / f"{number}.png" for number in range(2)]
    for path, size in zip(shown, SHAPES[2:], strict=False):
        noise(size).save(path)
    ended = call("generate", theirs, *shown, "--prompt", PROMPT, "--json", "--max-new-tokens=5")
    assert ended.code == 0, ended.err
    model, reader = load_class(theirs, "LlavaNextForConditionalGeneration"), pil_processor(theirs)
    for path, answer in zip(shown, json.loads(ended.out)["answers"], strict=True):
        inputs = reader(images=Image.open(path), text=PROMPT, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer["answer"] == reader.decode(made, skip_special_tokens=True)
    ended = call("generate", theirs, shown[0], "--prompt", "what?")
    assert ended.code == 2 and "0 of '<image>' in the text and 1 images" in ended.err, ended.err


def test_newline_has_no_logit_and_follows_the_vocabulary(theirs: Path, tmp_path: Path) -> None:
    import_model(theirs, tmp_path / "run", verify=False)
    model, processor = load_pretrained(tmp_path / "run", device="cpu", verify=False)
    assert model.job.model.new_tokens == [NEWLINE] and model.job.model.unwritten_new_tokens == 1
    assert processor.tokenizer.token_id(NEWLINE) == VOCAB and processor.decode([VOCAB - 1, VOCAB - 2]) == ""
    assert model.job.data.images == IMAGES
    assert not any("new_tokens.output_head" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("new", "tied"), [([], False), (["<image>"], True)], ids=["alone, untied", "after another, tied"])
def test_a_model_that_was_trained_here_is_written(new: list[str], tied: bool, tmp_path: Path) -> None:
    cfg = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=192, tie_embeddings=tied, new_tokens=new)
    run = run_of(tmp_path / "run", "llava", "trained", rows(images=IMAGES), model=cfg)
    done = export_model(run, tmp_path / "out")
    assert done.difference is not None and done.difference <= 1e-5
    assert any("processor: LlavaNextProcessor (written here)" in line for line in done.lines), done.lines
    theirs, copy = pil_processor(tmp_path / "out"), load_class(tmp_path / "out", "LlavaNextForConditionalGeneration")
    ours, processor = load_pretrained(run, device="cpu")
    for picture in pictures()[:3]:
        inputs = asked(theirs, [picture], "what is it?")
        got = processor(images=picture, text="what is it?")
        made = copy.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        assert made[:6] == (ours.generate(got, max_new_tokens=6)[0] + [got.end_id])[: len(made)]


def test_padding_of_the_mean_colour_has_no_processor(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "llava", "trained", rows(images=replace(IMAGES, padding="mean")))
    assert any("no files of a processor are written" in line for line in export_model(run, tmp_path / "out", verify=False).lines)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full', not 'default'"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer = \[-2, -3\]: must be one layer"),
        ({"image_grid_pinpoints": [[28, 56], [28, 28]]}, r"image_grid_pinpoints has \[28, 28\]: .* as a whole and as a tile"),
        ({"image_grid_pinpoints": [[28, 60]]}, r"config.json: image_grid_pinpoints = \[\[28, 60\]\]: .* multiples of 28"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu', not 'gelu'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "of a llava_next it can be 'clip_vision_model'"),
    ],
)
def test_what_cannot_be_read_is_refused(values: dict[str, Any], message: str, theirs: Path, tmp_path: Path) -> None:
    rename(theirs, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=message):
        open_external(tmp_path)


def test_a_missing_newline_is_named(theirs: Path, tmp_path: Path) -> None:
    rename(theirs, tmp_path, {})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != "image_newline"}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lacks 1: image_newline"):
        open_external(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (replace(IMAGES, global_view=False), "data.images: in its class all images are a whole view and tiles in rows"),
        (replace(IMAGES, pinpoints=[(1, 1), (1, 2)]), r"data.images.pinpoints = .*: its class shows an image of \[1, 1\] as a tile, too"),
        (ImagesConfig(fit="tiles", tiling="overlap", overlap=0.0, markers=False, rows=True), "data.images: in its class all images are"),
    ],
)
def test_what_the_class_does_not_show_is_not_written(images: ImagesConfig, message: str, theirs: Path) -> None:
    job = open_external(theirs).job
    assert fitting(job).family.kind == "llava_next"
    with pytest.raises(InputError, match=message):
        fitting(replace(job, data=replace(job.data, images=images)))
    stages = [StageConfig("a", 2, data={"images": {"fit": "crop"}}), StageConfig("b", 2)]
    with pytest.raises(InputError, match="data.images: in its class all images are"):
        fitting(replace(job, stages=stages))


def test_new_tokens_that_are_not_written_come_last(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unwritten_new_tokens = 2: must be at most the number of names in new_tokens = \['<a>'\]"):
        ModelConfig(new_tokens=["<a>"], unwritten_new_tokens=2)
    cfg = ModelConfig(new_tokens=["<a>"], unwritten_new_tokens=1)
    with pytest.raises(InputError, match=r"model.new_tokens = \['<a>'\]: the data needs \['<image_newline>'\] as well"):
        fit_vocabulary(cfg, tokenizer_of("trained", tmp_path), [NEWLINE])
    run = run_of(
        tmp_path / "run",
        "",
        "trained",
        rows(),
        model=ModelConfig(dim=32, n_layers=1, n_heads=2, new_tokens=["<a>"], unwritten_new_tokens=1),
    )
    with pytest.raises(InputError, match=r"model.unwritten_new_tokens = 1: its head has a row for each token"):
        export_model(run, tmp_path / "out")


def test_an_imported_model_trains_on(theirs: Path, tmp_path: Path) -> None:
    """Its rows are made by our data code, and the newline vector gets a gradient."""
    import_model(theirs, tmp_path / "run", verify=False)
    model, processor = load_pretrained(tmp_path / "run", device="cpu", verify=False)
    batch = collate([processor.answered([noise((41, 30))], "what?", "a cat")], 0, None)
    assert int((batch.input_ids == VOCAB).sum()) == 2
    model(batch).loss.backward()
    grad = dict(model.named_parameters())["transformer.new_tokens.embedding.weight"].grad
    assert grad is not None and grad.abs().max() > 0


def test_the_plain_loop_refuses_it(theirs: Path) -> None:
    external = open_external(theirs)
    assert external.job.vlm is not None
    job = replace(external.job, vlm=replace(external.job.vlm, freeze=[]))
    assembly = assemble(job, tokenizer_of_model(external), data=False)
    with pytest.raises(InputError, match=r"--against transformers: data.images.rows: its class needs the sizes of images"):
        TransformersLoop(assembly, assembly.stages[0], torch.device("cpu"), torch.float32)
