"""Chat templates of others: what they write is what transformers makes of them, and whatever they do ends soon."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from kempnerforge.config import DataConfig
from kempnerforge.data.text import rendering
from kempnerforge.data.text.chat import DATE, ChatTemplate
from kempnerforge.data.text.rendering import LONGEST, TemplateError, TemplateLimitError, render
from kempnerforge.util.errors import InputError
from tests.data.text.chat_templates import FAMILIES, LATER
from tests.data.text.test_template import bytes_level
from tests.interop.tiny_vlms import write_tokenizer
from tests.params import quick
from tests.training.tiny import CONFIG, call, make_job

TALK = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nred é \ud83d"}]
FEATURES = {
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tojson": "{{ messages | tojson }}|{{ {'a': '<é>'} | tojson(indent=2) }}|{{ [1] | tojson(separators=(',', ':')) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['a'], 2) }}",
    "date": "{{ date_string }}{{ strftime_now('%Y') | length }}",
    "macro": "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(messages[0].content) }}{{ bos_token }}",
    "tools": "{{ tools is none }}{{ documents is none }}{{ missing is defined }}",
    "white space": "  {% if true %}\n a\n  {% endif %}\n b",
    "undefined": "{{ missing }}{{ messages[0].missing }}",
}
FAILING = {
    "raises": ("{{ raise_exception('no system here') }}", "no system here"),
    "no template": ("{% for %}", "Expected"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "hidden name": "{{ namespace(_x=1) }}",
    "append": "{{ messages.append(1) }}",
    "range": ("{{ range(10**9) }}", "Range too big"),
    "division": "{{ 1 // 0 }}",
    "endless macro": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
}
NEST = "{{% for {} in range(99999) %}}"
DOUBLED = "{% set ns = namespace(x=@) %}{% for i in range(@@) %}{% set ns.x = # %}{% endfor %}"


def doubled(start: str, step: str, end: str, times: int = 60) -> str:
    return DOUBLED.replace("@@", str(times)).replace("@", start).replace("#", step) + end


ENDLESS = {
    "loops": "".join(map(NEST.format, "abcdef")) + "x" + "{% endfor %}" * 6,
    "silent loops": "".join(map(NEST.format, "abcdef")) + "{% endfor %}" * 6,
    "power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "a long text": "{{ 'x' * 10 ** 11 }}",
    "a long text, folded": "{{ ('x' * 10 ** 10) | length }}",
    "doubled by plus": doubled("'ab'", "ns.x + ns.x", "{{ ns.x | length }}"),
    "doubled by tilde": doubled("'ab'", "ns.x ~ ns.x", "{{ ns.x | length }}"),
    "doubled by join": doubled("'ab'", "[ns.x, ns.x] | join", "{{ ns.x | length }}"),
    "doubled list": doubled("[1]", "ns.x + ns.x", "{{ ns.x | length }}"),
    "shared lists, written": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "shared lists, compared": doubled("[1]", "[ns.x, ns.x]", "").replace("ns", "mm") + doubled("[1]", "[ns.x, ns.x]", "{{ ns.x == mm.x }}"),
    "shared lists, as json": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson | length }}"),
    "center": "{{ ('x' | center(10 ** 11)) | length }}",
    "format": "{{ ('%99999999999d' % 1) | length }}",
    "format method": "{{ '{:99999999999}'.format(1) | length }}",
    "lipsum": "{{ lipsum(n=10 ** 8) | length }}",
    "wordwrap": "{{ ('x ' * 10 ** 7) | wordwrap(3) | length }}",
    "many characters": "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", FEATURES)
def test_it_is_what_transformers_writes(name: str) -> None:
    for generate in (True, False):
        want = render_jinja_template(
            [TALK], chat_template=FEATURES[name], add_generation_prompt=generate, date_string=DATE, bos_token="<s>"
        )
        assert render(FEATURES[name], TALK, generate, date_string=DATE, bos_token="<s>") == want[0][0]


@pytest.mark.parametrize("name", [*FAMILIES, *LATER])
def test_families(name: str) -> None:
    family = (FAMILIES | LATER)[name]
    names = {"bos_token": family.bos or "<s>", "eos_token": family.eos, "date_string": DATE}
    for generate, talk in ((True, TALK[:1]), (False, TALK), (True, [*TALK, *TALK[:1]])):
        want = render_jinja_template([talk], chat_template=family.template, add_generation_prompt=generate, **names)
        assert render(family.template, talk, generate, **names) == want[0][0]


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_is_told(name: str) -> None:
    source, says = FAILING[name] if isinstance(FAILING[name], tuple) else (FAILING[name], "")
    with pytest.raises(TemplateError, match=says):
        render(str(source), TALK, True)


@pytest.mark.parametrize("name", quick(ENDLESS, *list(ENDLESS)[::4]))
def test_whatever_a_template_does_ends_soon(name: str) -> None:
    began = time.monotonic()
    with pytest.raises((TemplateLimitError, TemplateError)):
        render(ENDLESS[name], TALK, True)
    assert time.monotonic() - began < 15, "it may take 2 s of processor time, and this machine has little of it"
    assert render("{{ messages[0].content }}", TALK, True) == "what?", "the next one is rendered"


def test_limits_are_named() -> None:
    with pytest.raises(TemplateLimitError, match=r"takes more than 2 s of computing"):
        render(ENDLESS["loops"], TALK, True)
    with pytest.raises(TemplateLimitError, match=r"writes 99,899,001 characters; at most 16,777,216"):
        render(ENDLESS["many characters"], TALK, True)
    with pytest.raises(TemplateLimitError, match=r"takes more than 1,024 MiB of memory"):
        render(ENDLESS["a long text"], TALK, True)
    with pytest.raises(TemplateLimitError, match=f"has {LONGEST + 1:,} characters"):
        render("x" * (LONGEST + 1), TALK, True)


def test_a_chat_template_of_somebody_is_refused_at_once() -> None:
    """It is not tried in other ways, each of which would take as long."""
    tokenizer = bytes_level(FAMILIES["smollm2"]).changed(chat_template=ENDLESS["silent loops"])
    began = time.process_time() + sum(children())
    with pytest.raises(InputError, match="chat template .* cannot be used: takes more than 2 s of computing"):
        ChatTemplate(DataConfig(template="chat"), tokenizer)
    assert time.process_time() + sum(children()) - began < 4


def children() -> tuple[float, float]:
    import os

    found = os.times()
    return found.children_user, found.children_system


def test_the_command_says_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "words", prefix=False)
    (tmp_path / "words" / "chat_template.jinja").write_text(ENDLESS["loops"])
    keys = f'template = "chat"\ntokenizer = "{tmp_path}/words"\n'
    config = CONFIG.replace("tokenizer_vocab_size = 300\n", keys)
    ended = call("check", make_job(tmp_path, config=config))
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert "takes more than 2 s of computing" in ended.err


# ---- the process ----------------------------------------------------------------------------------------------------


def _render_in_child(queue: Any) -> None:
    queue.put((render("{{ 1 + 1 }}", [], True), rendering._process is not None and rendering._process.of))


def test_a_fork_has_a_process_of_its_own() -> None:
    render("x", [], True)
    mine = rendering._process
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_render_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == ("2", child.pid)
    child.join()
    assert rendering._process is mine and render("{{ 3 }}", [], True) == "3"


def test_it_ends_with_its_parent() -> None:
    code = (
        "import os, signal; from kempnerforge.data.text import rendering; rendering.render('x', [], True);"
        "print(rendering._process._started.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    until = time.monotonic() + 20
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "it goes on without its parent"
        time.sleep(0.05)


def test_it_needs_little() -> None:
    """It starts soon, as it imports neither this package nor transformers."""
    code = f"import sys, runpy; runpy.run_path({str(rendering.PROGRAM)!r}); print(json.dumps(sorted(sys.modules)))".replace(
        "sys,", "sys, json,"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "kempnerforge"} & set(json.loads(done.stdout))
