"""The pages of docs/extend: the example of each is a plugin that trains and resumes, with nothing in the package changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w

from kempnerforge.config import ConfigError, load_config
from kempnerforge.config.files import read_toml
from tests.dist import ROOT
from tests.training.tiny import assert_same_tensors, call, make_job, metrics, tensors

PAGES = ROOT / "docs" / "extend"


pytestmark = pytest.mark.usefixtures("plugins_are_forgotten")


def merged(below: dict[str, object], above: dict[str, object]) -> dict[str, object]:
    both = {key: (below[key], above[key]) for key in below.keys() & above.keys()}
    return below | above | {k: merged(a, b) for k, (a, b) in both.items() if isinstance(a, dict) and isinstance(b, dict)}


def example(kind: str, folder: Path) -> Path:
    """The plugin of the page of ``kind`` and a job that uses it, in ``folder``."""
    python, toml = (
        re.findall(rf"^```{fence}\n(.*?)^```$", (PAGES / f"{kind}.md").read_text(), re.M | re.S) for fence in ("python", "toml")
    )
    job = make_job(folder)
    (folder / "plugin.py").write_text(python[0])
    (folder / "page.toml").write_text(toml[0].replace("token_f1.py", "plugin.py"))
    below, page = read_toml(job), read_toml(folder / "page.toml")
    if section := REPLACED.get(kind):
        below[section] = {"tokenizer_vocab_size": 300} if section == "data" else {}
    job.write_text(tomli_w.dumps(merged(below, page)))
    return job


def altered(kind: str, before: str, after: str, folder: Path) -> Path:
    """As ``example``, with ``after`` in place of ``before`` in the plugin."""
    job, plugin = example(kind, folder), folder / "plugin.py"
    text = plugin.read_text()
    assert before in text
    plugin.write_text(text.replace(before, after))
    return job


REPLACED = {"vision_encoder": "vision_encoder", "source": "data"}
"""Kinds whose page brings a whole section: it has the keys of the page, and what every form of the section has."""


@pytest.mark.parametrize("kind", ["schedule", "optimizer", "tracker", "hook", "arch", "vision_encoder", "adapter", "source", "template"])
def test_the_example_trains_and_resumes(kind: str, tmp_path: Path) -> None:
    job = example(kind, tmp_path)
    whole = ("train", job, "--train.max_steps=4", "--eval.at_end=false")
    assert (ended := call(*whole, f"--run.dir={tmp_path}/whole")).code == 0, ended
    cut = (*whole, "--stages=[{name='all', steps=4}]")
    assert call(*cut, "--train.max_steps=2").code == 0
    assert (ended := call(*cut)).code == 0, ended
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [1, 2, 3, 4] and "all 3/4" in ended.err, ended
    assert_same_tensors(tensors(tmp_path / "whole"), tensors(tmp_path / "run"))


def test_a_schedule_of_a_plugin_has_its_keys_and_its_rates(tmp_path: Path) -> None:
    path = example("schedule", tmp_path)
    job = load_config(path, ["--train.max_steps=3"])
    assert [job.scheduler.factor(t, 3) for t in range(3)] == pytest.approx([1.0, 0.1 + 0.9 / 8, 0.1])
    with pytest.raises(ConfigError, match=r"scheduler\] powr = 1: unknown key; did you mean 'power'"):
        load_config(path, ["--scheduler.powr=1"])
    with pytest.raises(ConfigError, match=r"power.*unknown key; a key of name = 'power'; here name = 'cosine'"):
        load_config(path, ["--scheduler.name=cosine"])
    stages = "--stages=[{name='a', steps=2}, {name='b', steps=2, scheduler={name='wsd'}}]"
    first, second = load_config(path, [stages]).resolved_stages()
    assert (first.scheduler.name, second.scheduler.name) == ("power", "wsd")
    assert second.scheduler.warmup_steps == 1, "keys that both have stay"
    with pytest.raises(ConfigError, match="name = 'powr'.*registered: constant, cosine, linear, power, wsd.*did you mean 'power'"):
        load_config(path, ["--scheduler.name=powr"])


@pytest.mark.parametrize(
    ("result", "given"),
    [
        ("float('nan')", "nan (float)"),
        ("-5", "-5 (int)"),
        ("5.0", "5.0 (float)"),
        ("None", "None"),
        ("'half'", "'half' (str)"),
        ("1j", "1j (complex)"),
    ],
)
def test_a_decay_that_is_no_factor_is_refused_when_the_config_is_read(result: str, given: str, tmp_path: Path) -> None:
    path = altered("schedule", "(1 - progress) ** self.power", f"1.0 if progress < 0.5 else {result}", tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--train.max_steps=5"])
    assert f"[scheduler] name = 'power': Power.decay(0.5) at step 2 of 5, counted from 0: gives {given}; must be" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--stages=[{name='a', steps=1}, {name='b', steps=9}]"])
    assert "[[stages]] #2 scheduler.name = 'power': Power.decay(0.5) at step 4 of 9" in str(caught.value)


def test_a_factor_that_is_none_is_refused(tmp_path: Path) -> None:
    curve = (
        "def factor(self, step: int, steps: int, warmup_steps: int | None = None) -> float:\n        return 2.0 - step\n\n    def decay("
    )
    path = altered("schedule", "def decay(", curve, tmp_path)
    ended = call("train", path)
    assert ended.code == 2 and "name = 'power': Power.factor(0, 6): gives 2.0 (float); must be a number from 0 to 1" in ended.err, ended
    plugin = tmp_path / "plugin.py"
    text = plugin.read_text().replace("def factor(", "def not_factor(")
    plugin.write_text(text.replace("    def decay(", "    def decay_start(self, *_):\n        return None\n\n    def decay("))
    ended = call("train", path)
    assert ended.code == 2 and "Power.decay_start(6, 1): gives None; must be a finite number" in ended.err, ended


def test_a_step_that_was_not_tried_ends_the_run_with_the_same_words(tmp_path: Path) -> None:
    result = "float('nan') if 0.0142 < progress < 0.0143 else 1.0"  # step 3 of 211, and the tried ones are 2, 4, 6, ...
    path = altered("schedule", "(1 - progress) ** self.power", result, tmp_path)
    ended = call("train", path, "--stages=[{name='all', steps=211}]", "--eval.at_end=false")
    assert ended.code == 2 and "Power.decay(0.0142857) at step 3 of 211, counted from 0: gives nan (float)" in ended.err, ended
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [1, 2, 3]


def test_an_optimizer_of_a_plugin_has_its_keys_and_its_state(tmp_path: Path) -> None:
    path = example("optimizer", tmp_path)
    assert call("train", path, "--train.max_steps=2", "--eval.at_end=false").code == 0
    stored = tensors(tmp_path / "run")
    moments = {name for name in stored if name.startswith("optim.")}
    assert moments and all(name.endswith("|momentum_buffer") for name in moments), sorted(moments)[:4]
    assert [row["train/lr"] for row in metrics(tmp_path / "run") if "train/lr" in row] == pytest.approx([0.1, 0.01])
    for wrong, message in (
        ("--optimizer.momentum=-1", "[optimizer] momentum = -1.0: must be >= 0"),
        ("--optimizer.betas=[0.9, 0.9]", "a key of name = 'adamw', 'lion', 'muon', 'schedule_free_adamw'; here name = 'sgd'"),
        ("--optimizer.name=sdg", "registered: adamw, lion, muon, schedule_free_adamw, sgd (did you mean 'sgd'?)"),
        (
            "--optimizer.groups=[{module='adapter', muon_lr=1.0}]",
            "name = 'sgd' has no such key; a group may set lr, weight_decay, warmup_steps",
        ),
        (
            "--optimizer.groups=[{module='adapter', nesterov=true}]",
            "nesterov = true: unknown key; allowed are module, lr, muon_lr",
        ),
        (
            "--optimizer.groups=[{module='adapter', momentum=0.5}]",
            "[optimizer] momentum? Allowed here are module, lr, muon_lr",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [wrong])
        assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--optimizer.momentum=-1", "--stages=[{name='a', steps=2, optimizer={momentum=0.1, moment='reset'}}]"])
    assert len(caught.value.problems) == 2, "a key of the plugin is no unknown key, also where its section is wrong"
    ended = call("check", path)
    assert ended.code == 0 and "0.2" in ended.out, ended


def test_a_config_without_a_rule_is_named(tmp_path: Path) -> None:
    path = example("optimizer", tmp_path)
    plugin = tmp_path / "plugin.py"
    plugin.write_text(plugin.read_text().replace('register_optimizer("sgd")', 'register_optimizer("another")'))
    expected = "[optimizer] name = 'sgd': SGDConfig configures no optimizer; put @registry.register_optimizer('sgd') before the class"
    for command in ("train", "check"):
        ended = call(command, path)
        assert ended.code == 2 and expected in ended.err and "registered: adamw, another" in ended.err, ended


@pytest.mark.parametrize(
    ("kind", "before", "after", "message"),
    [
        (
            "hook",
            'register_hook("weight_norm")',
            'register_hook("other")',
            "[hooks][0].type = 'weight_norm': WeightNormConfig configures no hook; put",
        ),
        ("hook", "class WeightNorm(Hook):", "class WeightNorm:", "WeightNorm must be a subclass of kempnerforge.training.trainer.Hook"),
        (
            "hook",
            "    def __init__(self, cfg: WeightNormConfig, run_dir: Path) -> None:\n        self.cfg = cfg\n",
            "",
            "[hooks][0].type = 'weight_norm': WeightNorm is made as WeightNorm(cfg, run_dir), and its __init__ takes others: too many",
        ),
        (
            "tracker",
            "class Csv(Tracker):\n",
            "class Csv(Tracker):\n    def __init__(self): ...\n\n",
            "Csv is made as Csv(cfg), and its __init__",
        ),
        (
            "optimizer",
            "state_copies = 1",
            "def __init__(self, cfg): ...",
            "SGDRule is made as SGDRule(), and its __init__ takes others: missing",
        ),
        (
            "tracker",
            'register_tracker("csv")',
            'register_tracker("tsv")',
            "[metrics] trackers[1].type = 'csv': CsvConfig configures no tracker; put",
        ),
        ("tracker", "def log(", "def logs(", "Csv must have the method log"),
        ("arch", "class MyArch(JointDecoder):", "class MyArch:", "MyArch must be a subclass of kempnerforge.vlm.base.VLM"),
        ("arch", "class MyConfig(VLMConfig):", "class MyConfig:", "MyConfig must be a subclass of kempnerforge.config.vlm.VLMConfig"),
        ("arch", "@dataclass\n", "", "MyConfig must be a @dataclass, or its key 'arch' is none"),
        ("vision_encoder", "def forward(", "def forwards(", "Patches must have the method forward"),
        ("vision_encoder", "def units(", "def unit(", "Patches must have the method units"),
        ("adapter", "def forward(", "def forwards(", "EveryNth must have the method forward"),
        ("source", "(Source)", "", "Squares must be a subclass of kempnerforge.data.source.Source"),
        ("template", "(Template)", "", "Brackets must be a subclass of kempnerforge.data.text.template.Template"),
        ("optimizer", "def make(", "def makes(", "SGDRule must have the method make"),
        ("task", "def points(", "def point(", "TokenF1 must have the method points"),
        ("task", "import QuestionTask", "import Task as QuestionTask", "TokenF1 must have the method measure"),
        ("task", "@dataclass\n", "", "TokenF1 must be a @dataclass, or its key 'beta' is none"),
    ],
)
def test_what_is_missing_or_wrong_in_a_plugin_is_reported_when_the_config_is_read(
    kind: str, before: str, after: str, message: str, tmp_path: Path
) -> None:
    path = altered(kind, before, after, tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "before", "after", "message"),
    [
        ("adapter", "features[:, :: self.every]", "features", "EveryNth.forward: gives the shape (4, 4, 32); by its num_tokens and width"),
        (
            "adapter",
            "self.proj(features[:, :: self.every])",
            "features[:, :: self.every, :8]",
            "EveryNth.forward: gives the shape (4, 2, 8); by its num_tokens and width it must be (N, 2, 32)",
        ),
        (
            "vision_encoder",
            "features.flatten(2).transpose(1, 2)",
            "features.flatten(2).transpose(1, 2)[:, 1:]",
            "Patches.forward: gives the shape (4, 3, 32); by its num_tokens and width it must be (N, 4, 32)",
        ),
    ],
)
def test_another_number_of_tokens_than_was_said_is_refused(kind: str, before: str, after: str, message: str, tmp_path: Path) -> None:
    path = altered(kind, before, after, tmp_path)
    for command in ("check", "train"):
        ended = call(command, path)
        assert ended.code == 2 and message in ended.err, ended


SAMPLE = 'return Sample(f"squares/{self.split}/{index}", (buffer.getvalue(),), (Text("what colour?", name),))'
PIECES = "return found"


@pytest.mark.parametrize(
    ("kind", "before", "after", "message"),
    [
        ("source", SAMPLE, "pass", "Squares.__getitem__(0): gives None; must be a Sample"),
        ("source", SAMPLE, "return buffer.getvalue()", "(bytes); must be a Sample"),
        (
            "source",
            '("what colour?", name)',
            '("what colour?", index)',
            "gives texts[0].answer = 0 (int); must be a string, or a tuple of token ids",
        ),
        ("source", '("what colour?", name)', "(None, name)", "Squares.__getitem__(0): gives texts[0].prompt = None; must be a string"),
        (
            "source",
            '("what colour?", name)',
            '("what colour?", name, [("and?", "no")])',
            "texts[0].more = [('and?', 'no')] (list); must be",
        ),
        ("source", '(Text("what colour?", name),)', 'Text("what colour?", name)', "(Text); must be a tuple of Text"),
        (
            "source",
            "(buffer.getvalue(),)",
            '(Image.new("RGB", (8, 8)),)',
            "(Image); must be a Path, or the bytes of a file (PNG, JPEG, ...)",
        ),
        ("source", "(buffer.getvalue(),)", "buffer.getvalue()", "(bytes); must be a tuple of images"),
        ("source", "return self.cfg.count", "return self.cfg.count / 2", "Squares.__len__(): gives 6.0 (float); must be a whole number"),
        ("template", PIECES, "pass", "Brackets.pieces(..., ...): gives None; must be a list of Piece"),
        ("template", "Piece(answer, True,", "Piece(answer, False,", "for the answer of each turn, and the last of them is trained"),
        ("template", 'Piece(answer, True, "answer"), EOS_PIECE', 'Piece("", True, "answer")', "and the last of them is trained"),
        (
            "template",
            "    def pieces(",
            "    @classmethod\n    def answer_template(cls, cfg):\n        return 'the answer'\n\n    def pieces(",
            "Brackets.answer_template(...): gives 'the answer' (str); must be a string with \"{answer}\" once",
        ),
        ("template", 'True, "answer")', "True)", "for the answer of each turn, and the last of them is trained"),
        ("template", 'Piece("[", False)', '("[", False)', "Brackets.pieces(..., ...): gives [0] = ('[', False) (tuple); must be a Piece"),
        ("template", "Piece(answer, True", "Piece(text, True", "(Text); must be a string"),
        ("template", '"prompt")', '"question")', "gives [1].field = 'question' (str); must be one of 'system', 'prompt', 'answer', ''"),
    ],
)
def test_a_sample_or_a_text_that_is_none_is_an_error_with_the_class(
    kind: str, before: str, after: str, message: str, tmp_path: Path
) -> None:
    ended = call("train", altered(kind, before, after, tmp_path), "--train.max_steps=1")
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err, ended


def test_what_a_worker_is_given_is_an_error_with_the_class_too(tmp_path: Path) -> None:
    path = altered(
        "source", SAMPLE, f"import multiprocessing\n        if not multiprocessing.parent_process():\n            {SAMPLE}", tmp_path
    )
    ended = call("train", path, "--train.max_steps=1", "--data.num_workers=1", "--eval.at_end=false")
    assert ended.code == 2 and "Squares.__getitem__(" in ended.err and "): gives None; must be a Sample" in ended.err, ended
    assert "Traceback" not in ended.err, ended


MAX_POINTS = "return max(self.score(answer.text.lower().split(), given.lower().split()) for given in answer.question.given)"
RECORD = 'trainer.record({f"weights/{self.cfg.module}": squared**0.5})'
SGD = "return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum)"
ARCH = '    """Overrides ``block`` (makes layer i) and ``place`` (what enters the stream, what else a block reads)."""'


@pytest.mark.parametrize(
    ("kind", "before", "after", "message"),
    [
        ("task", MAX_POINTS, "pass", "TokenF1.points(...): gives None; must be a finite number, int or float"),
        ("task", MAX_POINTS, "return answer.text or '-'", "(str); must be a finite number"),
        ("task", MAX_POINTS, "return float('nan')", "TokenF1.points(...): gives nan (float); must be a finite number"),
        (
            "task",
            "def points(",
            "def all_points(self, answers):\n        return [1.0]\n\n    def points(",
            "TokenF1.all_points(...): gives [1.0] (list);",
        ),
        (
            "task",
            "def points(",
            "def value(self, score):\n        pass\n\n    def points(",
            "TokenF1.value(...): gives None; must be a number",
        ),
        (
            "task",
            "def points(",
            "def further(self, score):\n        return {'_x': 'a'}\n\n    def points(",
            "further(...): gives ['_x'] = 'a' (str); must",
        ),
        (
            "task",
            "def points(",
            "def question(self, question):\n        return question.prompt\n\n    def points(",
            "(str); must be a Question, or None",
        ),
        (
            "task",
            "def points(",
            "def measure(self, exam):\n        return {'eval/x': 1.0}\n\n    def points(",
            "(dict); must be Found, or None",
        ),
        ("task", "def points(", "def rows(self, facts):\n        return ['F1']\n\n    def points(", "(list); must be a list of ReportRow"),
        ("hook", RECORD, "trainer.record({'weights': str(squared)})", "WeightNorm: trainer.record at step 1: gives ['weights'] = '"),
        ("hook", RECORD, "trainer.record({'weights': shards[0].sum()})", "(Tensor); must be a number, int or float, by a name"),
        ("hook", RECORD, "trainer.record([squared])", "(list); must be a mapping of names to numbers"),
        ("optimizer", SGD, "torch.optim.SGD(groups, lr=cfg.lr)", "SGDRule.make(..., ...): gives None; must be a torch.optim.Optimizer"),
        (
            "optimizer",
            SGD,
            "return torch.optim.SGD([p for group in groups for p in group['params']], lr=cfg.lr)",
            "SGDRule.make(..., ...): gives <class 'torch.optim.sgd.SGD'> (type); must be an optimizer of all ",
        ),
        ("optimizer", SGD, "return torch.optim.SGD(groups[1:], lr=cfg.lr)", "must be an optimizer of all "),
        ("optimizer", 'return {"momentum": cfg.momentum}', "pass", "SGDRule.values(..., ...): gives None; must be a dict"),
        ("optimizer", "cfg.momentum}", "float('inf')}", "SGDRule.values(..., ...): gives ['momentum'] = inf (float); must be finite"),
        ("arch", ARCH, "    def block(self, cfg, layer):\n        pass", "MyArch.block(..., 0): gives None; must be a Block"),
        (
            "arch",
            ARCH,
            "    def place(self, *given):\n        return super().place(*given)[0]",
            "must be a tuple: the stream and a Context",
        ),
        ("arch", ARCH, "    def place(self, *given):\n        return super().place(*given)[0][0], None", "gives stream = ("),
        (
            "arch",
            ARCH,
            "    def place(self, *given):\n        return super().place(*given)[0], None",
            "MyArch.place(..., ..., ..., None): gives context = None",
        ),
        ("arch", ARCH, "    def forward(self, *given):\n        return super().forward(*given).loss", "(Tensor); must be an Output"),
        (
            "vision_encoder",
            "return (self.size // self.patch) ** 2",
            "return (self.size / self.patch) ** 2",
            "PatchesConfig.num_tokens(): gives 4.0 (float);",
        ),
        ("vision_encoder", "return [self.proj]", "return self.proj", "Patches.units: gives Conv2d("),
        (
            "vision_encoder",
            "return features.flatten(2).transpose(1, 2)",
            "features.flatten(2)",
            "Patches.forward(...): gives None; must be a Tensor (N, F, D)",
        ),
        (
            "adapter",
            "return self.proj(features[:, :: self.every])",
            "pass",
            "EveryNth.forward(...): gives None; must be a Tensor (N, T, Do)",
        ),
    ],
)
def test_what_a_method_may_not_return_is_an_error_with_the_class(kind: str, before: str, after: str, message: str, tmp_path: Path) -> None:
    ended = call("train", altered(kind, before, after, tmp_path), "--train.max_steps=1")
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err, ended


def test_a_tracker_of_a_plugin_gets_every_number(tmp_path: Path) -> None:
    path = example("tracker", tmp_path)
    for steps in (2, 4):
        assert call("train", path, f"--train.max_steps={steps}", "--scheduler.name=constant").code == 0
    lines = [line.split(",") for line in (tmp_path / "run" / "numbers.csv").read_text().splitlines()]
    rows = metrics(tmp_path / "run", timing=True)
    expected = [(row["step"], key, value) for row in rows for key, value in row.items() if key != "step"]
    assert [(int(step), key, float(value)) for step, key, value in lines if "unreadable" not in key] == [
        each for each in expected if "unreadable" not in each[1]
    ]
    assert list((tmp_path / "run" / "events").iterdir()), "tensorboard, too"


def test_trackers_by_name_and_by_table(tmp_path: Path) -> None:
    path = example("tracker", tmp_path)
    types = lambda *words: [each.type for each in load_config(path, words).metrics.all_trackers()]
    assert types() == ["tensorboard", "csv"]
    assert types("--metrics.trackers=['csv']") == ["tensorboard", "csv"]
    assert types("--metrics.trackers=['csv']", "--metrics.tensorboard=false") == ["csv"]
    assert types("--metrics.trackers=[]") == ["tensorboard"]
    for wrong, message in (
        (
            "--metrics.trackers=['cvs']",
            "type = 'cvs': Unknown metrics.trackers.type; registered: csv, mlflow, tensorboard, trackio, wandb (did you mean 'csv'?)",
        ),
        ("--metrics.trackers=[{file='a'}]", "type = ''"),
        ("--metrics.trackers=[{type='csv', fil='a'}]", "unknown key; did you mean 'file'?"),
        ("--metrics.trackers=[3]", "must be a table"),
        ("--metrics.tensorboard=false", "'tensorboard' is there, with tensorboard = false"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [wrong])
        assert message in str(caught.value)


def test_a_hook_of_a_plugin_gets_every_call(tmp_path: Path) -> None:
    path = example("hook", tmp_path)
    train = ("train", path, "--scheduler.name=constant", "--eval.at_end=false", "--train.max_steps=2")
    assert call(*train).code == 0
    norms = {row["step"]: row["weights/transformer"] for row in metrics(tmp_path / "run") if "weights/transformer" in row}
    weights = [v for name, v in tensors(tmp_path / "run").items() if name.startswith("model.transformer.")]
    assert sorted(norms) == [1, 2]
    assert norms[2] == pytest.approx(sum(float(w.square().sum()) for w in weights) ** 0.5)
    changed = (*train, "--train.max_steps=3", "--hooks.0.interval=3")
    ended = call(*changed)
    assert ended.code == 2 and "hooks[0].interval: 1 -> 3" in ended.err, ended
    assert call(*changed, "--allow-change=hooks").code == 0
    assert [row["step"] for row in metrics(tmp_path / "run") if "weights/transformer" in row] == [1, 2, 3]
    wrong = call(*train, "--fresh", "--hooks.0.module=nothing")
    assert wrong.code == 2 and "hooks.module = 'nothing': matches no parameter" in wrong.err, wrong


def test_hooks_are_read_strictly(tmp_path: Path) -> None:
    path = example("hook", tmp_path)
    for wrong, message in (
        (
            "--hooks.0.type=weight_nrom",
            "type = 'weight_nrom': Unknown hooks.type; registered: study, weight_norm (did you mean 'weight_norm'?)",
        ),
        ("--hooks=[{interval=1}]", "type = '': Unknown hooks.type"),
        ("--hooks.0.interval=0", "interval = 0: must be >= 1"),
        ("--hooks.0.intervall=1", "unknown key; did you mean 'interval'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [wrong])
        assert message in str(caught.value)
    assert load_config(path).hooks == load_config(path, ["--hooks=[{type='weight_norm', module='transformer', interval=1}]"]).hooks
