"""``data.template`` as a chat template of transformers (Jinja): conversations are written as a model was
trained to read them.

A message is a string or a list of parts, ``{type: text, text: ...}`` and ``{type: image, ...}``. Where images
go follows ``data.encode``: those that come before everything that is said are before the row, before BOS,
unless the source or the template puts them elsewhere.
"""

from __future__ import annotations

import json
from typing import Any

from kempnerforge.config.data import DataConfig
from kempnerforge.config.template import WITH_SYSTEM
from kempnerforge.data.sample import Text
from kempnerforge.data.text import rendering
from kempnerforge.data.text.asking import Asking
from kempnerforge.data.text.chat import DATE, ChatTemplate
from kempnerforge.data.text.template import Piece, build_template
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.interop.vlm_family import FRAME, FRAMED, PALIGEMMA

PROMPT, ANSWER, SYSTEM = "\ue000prompt\ue001", "\ue000answer\ue001", "\ue000system\ue001"

READ = """
{%- set ns = namespace(turns=[], images=0, front='', body='', bare=false) -%}
{%- for message in messages -%}
{%- set said = namespace(text='', lead=0) -%}
{%- if message['content'] is string -%}
{%- set said.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- if said.text -%}{%- set said.text = said.text + image -%}{%- else -%}{%- set said.lead = said.lead + 1 -%}{%- endif -%}
{%- elif part['type'] == 'text' -%}
{%- set said.text = said.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if loop.first and system and message['role'] != 'system' -%}
{%- set ns.turns = ns.turns + [{'role': 'system', 'text': system, 'lead': 0}] -%}
{%- endif -%}
{%- set ns.turns = ns.turns + [{'role': message['role'], 'text': said.text, 'lead': said.lead}] -%}
{%- endfor -%}
{%- if numbered and ns.images > 1 -%}{{- raise_exception('several images are numbered in training, and not here') -}}{%- endif -%}
{%- set asked = ns.turns | selectattr('role', 'equalto', 'user') | first -%}
{%- if place == 'front' and asked is defined and asked['lead'] == ns.images -%}{%- set ns.front = image * ns.images -%}{%- endif -%}
"""
"""Messages as turns: how many images lead each of them, and its text, with a placeholder for each of the
others."""

SAID = """
{%- if turn['lead'] and place != 'template' and not ns.front -%}
{%- set block = image + (between + image) * (turn['lead'] - 1) -%}
{%- if place == 'tail' -%}
{%- set said = turn['text'] + ('' if turn['text'].endswith(gap) else gap) + block -%}
{%- else -%}
{%- set said = block + ('' if turn['text'].startswith(gap) else gap) + turn['text'] -%}
{%- endif -%}
{%- else -%}
{%- set said = turn['text'] -%}
{%- endif -%}
"""

WRITE = """
{%- if single and ns.turns | selectattr('role', 'equalto', 'user') | list | length > 1 -%}
{{- raise_exception('this model was trained on single questions') -}}
{%- endif -%}
{%- for turn in ns.turns -%}
SAID
{%- if turn['role'] == 'system' -%}
{%- if system_begin is none or not loop.first -%}{{- raise_exception('no place for a system prompt here') -}}{%- endif -%}
{%- set ns.body = ns.body + system_begin + said + system_end -%}
{%- elif turn['role'] == 'user' -%}
{%- set ns.body = ns.body + user_begin + (said if asks else image * said.count(image)) + user_end -%}
{%- else -%}
{%- if ns.body == '' -%}{%- set ns.bare = true -%}{%- endif -%}
{%- set ns.body = ns.body + answer_begin + said + answer_end -%}
{%- endif -%}
{%- endfor -%}
{%- for _ in range(ns.images) -%}
{%- if ns.body.startswith(image) -%}
{%- set ns.front = ns.front + image -%}
{%- set ns.body = ns.body[image | length:] -%}
{%- endif -%}
{%- endfor -%}
{%- if ns.images and (ns.front + ns.body).count(image) != ns.images -%}
{{- raise_exception('this model was trained with as many images as its template has places for') -}}
{%- endif -%}
""".replace("SAID", SAID.strip())

WHOLE = "{{- ns.front + (start_bare if ns.bare or ns.body == '' else start) + ('' if ns.body.startswith(' ') else space) + ns.body -}}"
WITHOUT_ENDS = """
{%- if image in ns.body or not ns.body.endswith('\\n') -%}
{{- raise_exception('only questions with all images in front can be written') -}}
{%- endif -%}
{{- ns.front + ns.body[:-1] -}}"""
WITHOUT_FRAMES = """
{%- if ns.front or ns.body.count(frame) != ns.body.count(image) -%}
{{- raise_exception('this processor puts tokens around images, and the model was trained without') -}}
{%- endif -%}
{{- (start + ns.body).replace(frame, image) -}}"""

INTO_CHAT = """
{%- for turn in ns.turns -%}
SAID
{%- set ns.chat = ns.chat + [{'role': turn['role'], 'content': [{'type': 'text', 'text': said}] if listed else said}] -%}
{%- endfor -%}
{%- set messages = ns.chat -%}
{{- ns.front }}""".replace("SAID", SAID.strip())


def chat_template(
    cfg: DataConfig, tokenizer: Tokenizer, asking: Asking | None = None, *, processor: str = "", adds_bos: bool = False, space: str = ""
) -> str:
    """The chat template that writes conversations as a model with ``cfg`` was trained to read them.

    Args:
        asking: where the training texts have their images; None: the usual place of the source.
        processor: the class that takes the text, if it adds to it: PaliGemma's adds BOS after the last image
            and a line break at the end, Idefics 3's adds tokens around images.
        adds_bos: the tokenizer puts BOS before every text. (A chat template of the tokenizer itself is not
            changed.)
        space: between BOS and the rest, for tokenizers that begin a text with one, but not after a special
            token.

    Raises:
        ValueError: ``cfg`` does not fit the tokenizer.
    """
    template = build_template(cfg, tokenizer)
    source = tokenizer.chat_template if cfg.template == "chat" else None
    asking = asking or Asking.usual(cfg)
    system = cfg.system or (asking.system if cfg.template in WITH_SYSTEM else "")
    constants: dict[str, Any] = {"image": cfg.image_placeholder, "system": system, "place": _placement(cfg, tokenizer, asking)}
    constants |= {"gap": asking.gap, "between": asking.between}
    constants["numbered"] = cfg.images.number_images
    if source is not None:
        assert isinstance(template, ChatTemplate)
        date = f"{{%- if date_string is not defined -%}}{{%- set date_string = {DATE!r} -%}}{{%- endif -%}}"
        read = _constants(constants | {"listed": template.listed}) + READ.replace("bare=false", "chat=[]") + INTO_CHAT
        asks = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(template.extra, ensure_ascii=False)} }}}}{{% endif %}}"
        whole = source.removesuffix("\n") + asks if template.extra else source
        return (date if "date_string" in source else "") + read.replace("\n", "") + whole
    starts_with_bos = template.own_bos or (template.bos and tokenizer.start_id is not None)
    starts = {"start": (tokenizer.bos or "") if starts_with_bos else "", "start_bare": tokenizer.bos or tokenizer.eos}
    if adds_bos:
        starts = dict.fromkeys(starts, "")
    written = READ + WRITE + (WITHOUT_ENDS if processor == PALIGEMMA else WITHOUT_FRAMES if processor in FRAMED else WHOLE)
    constants |= starts | _parts(cfg, tokenizer) | {"single": not template.turns, "space": space, "frame": FRAME}
    return _constants(constants) + written.replace("\n", "")


def _placement(cfg: DataConfig, tokenizer: Tokenizer, asking: Asking) -> str:
    """The place of images that come before a question: "template", or the one of ``Asking``."""
    pieces = build_template(cfg, tokenizer).pieces(Text("", ""), "") if cfg.template != "chat" else []
    return "template" if any(cfg.image_placeholder in piece.text for piece in pieces) else asking.place


def _parts(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, str | bool | None]:
    """The texts that the template writes around a question and its answer."""
    template = build_template(cfg, tokenizer)

    def written(pieces: list[Piece]) -> str:
        return "".join(tokenizer.eos if piece.eos else piece.text for piece in pieces)

    pieces = template.pieces(Text(PROMPT, ANSWER), "")
    fields = [piece.field for piece in pieces]
    question, answer = fields.index("prompt"), fields.index("answer")
    opening = next((k for k in range(question, answer) if pieces[k].trained), answer)
    user_begin = written(pieces[:question])
    system_begin = system_end = None
    if cfg.template in WITH_SYSTEM:
        whole = template.pieces(Text(PROMPT, ANSWER), SYSTEM)
        system_begin, rest = written(whole[: [piece.field for piece in whole].index("prompt")]).split(SYSTEM)
        system_end = rest.removesuffix(user_begin)
    return {
        "system_begin": system_begin,
        "system_end": system_end,
        "user_begin": user_begin,
        "user_end": written(pieces[question + 1 : opening]),
        "asks": PROMPT in pieces[question].text,
        "answer_begin": written(pieces[opening:answer]),
        "answer_end": written(pieces[answer + 1 :]),
    }


def _constants(values: dict[str, Any]) -> str:
    def literal(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if value is not None else "none"

    return "".join(f"{{%- set {name} = {literal(value)} -%}}" for name, value in values.items())


def render_template(template: str, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """``messages`` up to the answer that is asked for.

    Raises:
        ValueError: the template refuses them.
    """
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    kept = {key: name for key, name in names.items() if name is not None}
    return rendering.render(template, messages, True, **kept)
