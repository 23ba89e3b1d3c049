"""A trained model in use: one front end for checkpoints, exports and models of others; it is asked, evaluated
and converted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kempnerforge.checkpoint import CheckpointError, load_weights, reading
from kempnerforge.config import load_config
from kempnerforge.config.build import build_record
from kempnerforge.config.plugins import plugin_changes, plugins_of, trusting
from kempnerforge.config.template import WITH_SYSTEM
from kempnerforge.data.sample import ImageSource
from kempnerforge.data.text.asking import Asking
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.distributed.world import compute_dtype
from kempnerforge.eval.exam import Ranks
from kempnerforge.eval.generate import Sampling, tokens_of
from kempnerforge.eval.predictions import write_predictions
from kempnerforge.eval.questions import HeldOut
from kempnerforge.inference.answer import Answer
from kempnerforge.inference.external import load_external
from kempnerforge.inference.processor import AS_IT_IS, Processor, processing
from kempnerforge.model.hf_files import CONFIG, INDEX, WEIGHTS, read_tensors, tensor_files
from kempnerforge.model.lora import merge_adapters
from kempnerforge.training.run_state import RunState
from kempnerforge.training.same_run import changed_data
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.training.tokenizer import saved_tokenizer
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import place_of
from kempnerforge.util.reading import check_files, read_object
from kempnerforge.vlm.base import VLM

LOG = logging.getLogger("kempnerforge")

JOB_FILE, TOKENIZER, ASKED_FILE = "config.toml", "tokenizer", "asked.json"
"""Beside the weights in an export of ours."""
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        values: by name.
        by_answer: (right, total) by true answer, as the tokenizer writes it.
        held_out: what was asked; None: only plain text was read.
        remarks: what has to be known beside the values.
    """

    values: dict[str, object]
    by_answer: Mapping[str, tuple[float, int]]
    held_out: HeldOut | None
    remarks: list[str]


@dataclass(eq=False)
class TrainedModel:
    """A model in evaluation mode, LoRA adapters folded into its weights.

    ::

        trained = TrainedModel.load("runs/quickstart")
        print(trained.ask("what shape is in the image?", [Path("a.png")]).finish())

    Attributes:
        path: the checkpoint, export or directory that it is from.
        assembly: model, tokenizer and stages, without data.
        state: of the checkpoint; step 0 of what is not from one.
        follows: arguments of its processor.
    """

    path: Path
    assembly: Assembly
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    state: RunState = field(default_factory=lambda: RunState(0))
    follows: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def restore(cls, path: Path, overrides: Sequence[str] = ()) -> TrainedModel:
        """A checkpoint, or the newest one of a run directory, in the dtype that it was trained in. Its
        processor writes prompts as training did; only a language model that was imported and not asked
        otherwise since takes the text as it is.

        Args:
            overrides: of the config that the checkpoint holds.

        Raises:
            CheckpointError: there is none, or it is damaged.
            ValueError: the overrides do not fit.
        """
        found = reading(place_of(path), lambda checkpoint: _restored(checkpoint, overrides))
        moved = [override for override in overrides if override.startswith("--plugins=")]
        as_written = not overrides or load_config(found.path / JOB_FILE, moved).data == found.assembly.job.data
        follows = processing(found.state.imported)
        return replace(found, follows=follows if as_written and follows["follows"] == AS_IT_IS else {})

    @classmethod
    def open(cls, path: Path, overrides: Sequence[str] = ()) -> TrainedModel:
        """What ``restore`` reads, an export, or a directory of transformers: for commands that ask.

        Args:
            overrides: of the config of a checkpoint or of our own export.

        Raises:
            CheckpointError, ValueError: as ``restore`` and ``load``; or a directory of transformers is given
                overrides.
        """
        path = place_of(path)
        if not _is_foreign(path) and not _is_export(path):
            return cls.restore(path, overrides)
        if overrides and _is_foreign(path):
            raise InputError(f"{overrides[0]}: {path} is a model of transformers, which has no config of ours to change")
        check_files(path)
        found = _external(path, verify=True) if _is_foreign(path) else _exported(path, overrides)
        found.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found.model.to(found.device).eval()
        return found

    @classmethod
    def load(
        cls, path: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        plugins: Sequence[str | Path] = (), trust_plugins: bool = False, verify: bool = True,
    ) -> TrainedModel:  # fmt: skip
        """A model from wherever it is; see ``load_pretrained``."""
        path = place_of(path)
        given = ["--train.mixed_precision=fp32", *([f"--plugins={json.dumps([str(plugin) for plugin in plugins])}"] if plugins else [])]
        with trusting(trust_plugins):
            found = _loaded(path, given, verify)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        found.device = torch.device(device)
        found.model.to(found.device, dtype).eval()
        return found

    @property
    def model(self) -> VLM:
        return self.assembly.model

    @cached_property
    def processor(self) -> Processor:
        """What makes the model's inputs."""
        return Processor(self.assembly, **self.follows)

    @property
    def has_images(self) -> bool:
        return self.model.has_images

    @property
    def has_turns(self) -> bool:
        """Whether the model's template is one of conversations, so that a question may well have earlier ones
        before it.
        """
        return self.processor.encoder.texts[0].cfg.template in WITH_SYSTEM

    def groups(self, prompt: str, images: Sequence[Path]) -> list[tuple[Path, ...]]:
        """``images`` as they are asked about: as many together as ``prompt`` has placeholders; if it has
        none, as many as each question of the training had, or one by one.

        Raises:
            InputError: they cannot be shared out.
        """
        encoder, literal = self.processor.encoder, self.processor.follows  # the text is the whole prompt
        together = prompt.count(self.processor.placeholder) if literal else encoder.count_placeholders(prompt)
        usual = encoder.asking.together
        step = together or (usual if usual and not len(images) % usual else 1)
        if len(images) % step or (together and not images and self.has_images):
            name = encoder.cfg.image_placeholder
            raise InputError(f"{len(images)} images, and a prompt with {together} of {name!r}: give a multiple of {together} images")
        return [tuple(images[k : k + step]) for k in range(0, len(images), step)] or [()]

    def ask(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """The model's answer to ``prompt`` about ``images``, which are where its placeholders are, or in
        front.

        Args:
            images: none, or one of ``groups``; files or encoded.
            max_new_tokens: None: ``MAX_NEW_TOKENS``, or as many as there is room for.
            sampling: greedy by default.
            history: (prompt, answer) of the turns before. The images are the whole conversation's.

        Raises:
            InputError: an image cannot be read, the model takes none, or no turns, the prompt has another
                number of placeholders, or there is no room for prompt and answer.
        """
        if images and not self.has_images:
            name = images[0] if isinstance(images[0], Path) else "image"
            raise InputError(f"{name}: this model was trained on text alone and takes no image")
        asked = self.processor.prompt(prompt, images, history)
        start, most = asked.length(self.processor.layout.image_tokens), self.assembly.job.model.max_seq_len
        room = most - start
        if room < 1:
            raise InputError(f"no room for an answer: the prompt's {start} positions, model.max_seq_len = {most}")
        wanted = max_new_tokens if max_new_tokens is not None else min(MAX_NEW_TOKENS, room)
        if not 1 <= wanted <= room:
            raise InputError(
                f"--max-new-tokens = {wanted}: must be at least 1, and with the prompt's {start} positions"
                f" at most model.max_seq_len = {most}"
            )
        batch = self.processor.batch([asked], [images]).to(self.device)
        tokenizer, stops = self.processor.tokenizer, self.processor.encoder.texts[0].stops
        tokens = tokens_of(self.model, batch, max_new_tokens=wanted, eos_id=stops, sampling=sampling)
        return Answer(tokens, stops, tokenizer.decode, tokenizer.byte_ids)

    def evaluate(self, limit: int = 0, predictions: Path | None = None) -> Evaluated:
        """Scores the model on the held-out split of its config.

        Args:
            limit: questions at most; 0 asks all.
            predictions: a file that gets every question and its answers, see ``write_predictions``.

        Raises:
            InputError: there is nothing held out, too much of it cannot be read, or no question is asked.
        """
        assembly, job, last = self.assembly, self.assembly.job, self.assembly.stages[-1]
        assembly.data.read_held_out()
        if changed := changed_data(assembly.data.codecs, self.state):
            raise InputError(
                f"data.codec: the {changed[0]} is no longer the one that {self.path} was trained with, so its codes are other pictures; "
                "put it back"
            )
        if assembly.data.held_out is None and assembly.data.plain_text is None:
            raise InputError(f"data.eval_path = '': {self.path} has no held-out data, and eval.text_path = '' names no plain text")
        assembly.data.require_held_out()
        held_out = assembly.data.examined
        if predictions is not None and not (held_out and held_out.questions and (job.eval.exact_match or job.eval.tasks)):
            raise InputError(f"--predictions {predictions}: no question is asked; eval.exact_match = {str(job.eval.exact_match).lower()}")
        found = assembly.evaluate(Ranks(), self.device, rows=job.train.step_rows, limit=limit)
        if predictions is not None and held_out is not None:
            write_predictions(predictions, found, held_out.skipped)
        values = {key.removeprefix("eval/"): value for key, value in found.values.items()}
        return Evaluated(
            {"checkpoint": str(self.path), "step": self.state.step, **values},
            found.by_answer,
            held_out,
            [*(held_out.remarks() if held_out else ()), *found.remarks(last.optimizer.lr)],
        )


def load_pretrained(
    path: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, plugins: Sequence[str | Path] = (),
    trust_plugins: bool = False, verify: bool = True,
) -> tuple[VLM, Processor]:  # fmt: skip
    """A model to use, and what makes its inputs.

    ::

        model, processor = kempnerforge.load_pretrained("runs/quickstart")
        inputs = processor(images=Image.open("a.png"), text="what shape is in the image?")
        print(processor.decode(model.generate(inputs, max_new_tokens=16)[0]))

    Args:
        path: a checkpoint or run directory; what ``kempnerforge import`` or ``export`` has made; or a
            directory of transformers (of a language model, PaliGemma, LLaVA, Idefics3, SmolVLM, Llama 3.2
            Vision) or of nanoVLM.
        device: where to; None: a GPU if there is one.
        plugins: modules or files in place of the plugins that the run names, which may have moved; relative
            to the working directory.
        trust_plugins: run the plugins that the run or export names. They are code; see docs/security.md.
        dtype: of the weights, and what it computes in; None: fp32.
        verify: compare a model from elsewhere with its class in transformers, as ``kempnerforge import``
            does; it takes the memory of both in fp32. False: a warning says that it is not compared. Runs and
            our own exports need no comparison.

    Raises:
        ValueError: nothing is there that can be loaded, or it is another model here than there.
    """
    found = TrainedModel.load(path, device=device, dtype=dtype, plugins=plugins, trust_plugins=trust_plugins, verify=verify)
    return found.model, found.processor


# ---- where a model may be ------------------------------------------------------------------------


def _is_foreign(path: Path) -> bool:
    """Whether this is a directory of transformers, an export among them, or of nanoVLM."""
    return (path / CONFIG).is_file()


def _is_export(path: Path) -> bool:
    """Whether ``kempnerforge export --format kempnerforge`` has written this."""
    return (path / JOB_FILE).is_file() and any((path / name).is_file() for name in (WEIGHTS, INDEX))


def _loaded(path: Path, given: Sequence[str], verify: bool) -> TrainedModel:
    check_files(path)
    if _is_foreign(path):
        return _external(path, verify)
    if _is_export(path):
        return _exported(path, given)
    try:
        found = reading(path, lambda checkpoint: _restored(checkpoint, given))
    except CheckpointError as error:
        raise InputError(f"{error}; models are loaded from checkpoints, run directories, exports and directories with a {CONFIG}") from None
    return replace(found, follows=processing(found.state.imported))


def _restored(path: Path, overrides: Sequence[str]) -> TrainedModel:
    """A checkpoint directory."""
    job = load_config(path / JOB_FILE, overrides)
    encoder = job.vision_encoder
    assembly = assemble(replace(job, vision_encoder=encoder.without_weights()), saved_tokenizer(path), data=False, blank=True)
    assembly.job = replace(assembly.job, vision_encoder=encoder)
    manifest = load_weights(path, assembly.model)
    state = RunState.of(manifest, str(path))
    assembly.data.asking = state.asked
    for span in state.history[-1:]:
        for line in plugin_changes(span.plugins, plugins_of(job.plugins), path):
            LOG.warning("%s: this is not what it was trained with: %s", path, line)
    merge_adapters(assembly.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assembly.model.to(device, compute_dtype(job.train.mixed_precision, device)).eval()
    return TrainedModel(path, assembly, device, state)


def _external(path: Path, verify: bool) -> TrainedModel:
    """A directory of transformers or nanoVLM."""
    found = load_external(path, verify=verify)
    if found.agreement is not None:
        LOG.info("%s: %s", path, found.compared)
    else:
        LOG.warning("%s: the model here was not compared with the one there: %s", path, found.compared)
    for remark in found.remarks:
        LOG.warning("%s: %s", path, remark)
    return TrainedModel(path, found.assembly, follows=processing(found.origin))


def _exported(path: Path, overrides: Sequence[str]) -> TrainedModel:
    """What ``kempnerforge export --format kempnerforge`` has written."""
    tokenizer = Tokenizer.from_pretrained((path / TOKENIZER).resolve())
    assembly = assemble(load_config(path / JOB_FILE, overrides), tokenizer, data=False, blank=True)
    files = tensor_files(path)
    tensors = dict(read_tensors(files, files))
    parameters = dict(assembly.model.named_parameters())
    if parameters.keys() != tensors.keys():
        different = sorted(parameters.keys() ^ tensors.keys())
        raise InputError(f"{path}: the names of its weights are not the names that {path / JOB_FILE} makes: {', '.join(different[:4])}")
    assembly.model.load_state_dict(tensors, strict=False)
    if (path / ASKED_FILE).is_file():
        assembly.data.asking = build_record(Asking, "asked", read_object(path / ASKED_FILE), str(path / ASKED_FILE))
    return TrainedModel(path, assembly)
