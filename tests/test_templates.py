"""Chat templates: written exactly as transformers writes them, and harmless whatever they are."""

# ruff: noqa: E501 (templates are long lines)

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

import tiny
from command import Cli
from featherweight import InputError, sandbox, templates
from featherweight.templates import render

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is ' < & > \" 東京 fine?"},
    {"role": "assistant", "content": "<think>so\n</think>  Yes.\n"},
    {"role": "user", "content": "  And three  "},
    {"role": "assistant", "content": "A film."},
]
GOOD = {
    "ours": tiny.CHAT,
    "ChatML": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "Llama 3": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = strftime_now('%d %b %Y') %}\n{%- endif %}\n"
    "{%- if tools is not none %}{{- raise_exception('no tools here') }}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}{{- 'Today: ' + date_string + '\n\n' + system + eos_token }}\n"
    "{%- for message in messages %}\n    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}\n    {{- '<|' + message.role + '|>' + message.content | trim }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
    "marks what is generated": "{% for m in messages %}\n  {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
    "controls loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 4 %}{% break %}{% endif %}"
    "{{ m|tojson }}{{ m|tojson(indent=2) }}{% endfor %}",
    "remembers": "{% set ns = namespace(last=-1, seen=dict(a=1)) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ ns.last }}{% if '</think>' in m.content and loop.index0 < ns.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{% endfor %}{{ dict.fromkeys('ab') }}",
    "macros": "{%- macro turn(m, open=false) -%}[{{ m.role|upper }}] {{ caller() if caller is defined else m.content|trim|e }}{%- endmacro -%}"
    "{% for m in messages %}{{ turn(m) }}{% call turn(m) %}{{ m.content|length }}{% endcall %}{% endfor %}{{ undefined_name }}{{ '%s-%d'|format('a', 3) }}",
}  # fmt: skip
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "loops for ever": (LOOP, "does not end"),
    "makes the world's longest word": ("{{ ('a' * 10**10)|length }}", "memory"),
    "pads it": ("{{ 'a'.center(10**10) }}", "memory"),
    "formats it": ("{{ '%10000000000d' % 1 }}", "memory"),
    "formats it in another way": ("{{ '{:10000000000d}'.format(1) }}", "memory"),
    "lists it": ("{{ (range(99999)|list * 9999)|join }}", "memory"),
    "computes in one call": ("{{ 10**(10**9) }}", "does not end"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
    "is nested deeper than the parser": ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "calls itself"),
    "writes without end": ("{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}", "writes more than 1,000,"),
    "looks for classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "looks for globals": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "looks for them through a format": ("{{ '{0.__init__.__globals__}'.format(cycler) }}", "unsafe"),
    "looks for them through a map": ("{{ [cycler]|map(attribute='__init__.__globals__')|list }}", "unsafe|Undefined"),
    "hides them in a namespace": ("{% set n = namespace(__x__=1) %}", "underscore"),
    "changes a list": ("{{ messages.append(1) }}", "unsafe|not safely"),
    "reads a file": ("{% include '/etc/passwd' %}", "no loader"),
}


class Words:
    """As much of a tokenizer as a template needs."""

    special_tokens_map: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"}  # noqa: RUF012

    def __init__(self, template: str) -> None:
        self.template = template

    def get_chat_template(self) -> str:
        return self.template


@pytest.mark.parametrize("template", GOOD.values(), ids=GOOD)
def test_a_template_writes_what_it_writes_in_transformers(template: str) -> None:
    tokenizer = tiny.tokenizer(bos=True)
    tokenizer.chat_template = template
    wanted = [(n, opened) for n in range(1, 6) for opened in (False, True)]
    assert render(tokenizer, TALK, wanted) == [
        tokenizer.apply_chat_template(TALK[:n], tokenize=False, add_generation_prompt=opened) for n, opened in wanted
    ]


def test_a_template_finds_what_it_finds_in_transformers_and_nothing_else() -> None:
    theirs, ours = _compile_jinja_template("").environment, sandbox.environment()
    for kind in ("globals", "filters", "tests"):
        assert getattr(ours, kind).keys() == getattr(theirs, kind).keys()
    assert len(ours.extensions) == len(theirs.extensions)
    assert (ours.trim_blocks, ours.lstrip_blocks, ours.autoescape) == (
        theirs.trim_blocks,
        theirs.lstrip_blocks,
        theirs.autoescape,
    )


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(InputError, match=r"chat template refuses this conversation: Roles must alternate$"):
        render(Words(GOOD["Llama 3"]), TALK[2:], [(2, False)])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system does not limit memory")
@pytest.mark.parametrize(("template", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_one_error_soon(template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setattr(templates, "_helper", templates.functools.cache(templates._helper.__wrapped__))
    start = time.monotonic()
    with pytest.raises(InputError, match=said) as caught:
        render(Words(template), TALK, [(5, False)])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30  # a second, and what a busy machine adds
    assert render(Words("{{ messages[0].role }}"), TALK, [(1, False)]) == ["system"]  # the next one is served
    templates._helper(os.getpid()).end()


def test_a_long_conversation_may_be_written_in_full() -> None:
    long = [{"role": "user", "content": "word " * 400_000}]
    [text] = render(Words("{{ messages[0].content }}" * 2), long, [(1, False)])
    assert len(text) == 4_000_000


def test_the_process_of_the_templates_is_told_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setattr(templates, "_helper", templates.functools.cache(templates._helper.__wrapped__))
    render(Words("{{ messages[0].role }}"), TALK, [(1, False)])
    helper = templates._helper(os.getpid())
    if Path("/proc").is_dir():
        assert b"hf_planted" not in Path(f"/proc/{helper.process.pid}/environ").read_bytes()
    helper.end()
    assert helper.process.poll() is not None


def test_the_process_of_the_templates_ends_with_the_program() -> None:
    program = (
        "from featherweight import templates; from test_templates import Words, TALK; import os\n"
        "templates.render(Words('{{ 1 }}'), TALK, [(1, False)])\n"
        "print(templates._helper(os.getpid()).process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False).stdout
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.kill(int(said), 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{int(said)}/stat").is_file() and " Z " in Path(f"/proc/{int(said)}/stat").read_text():
            return  # it has ended, and nobody has asked how: its parent was killed
        time.sleep(0.05)
    raise AssertionError("it goes on")


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_model_with_a_hostile_template_is_refused_in_a_line(
    llama: Path, in_tmp: Path, fw_cli: Cli, verb: str
) -> None:
    import shutil

    shutil.copytree(llama, "model")
    (in_tmp / "model" / "chat_template.jinja").write_text("{{ 'a' * 10**11 }}")
    tiny.write(in_tmp / "talk.jsonl", tiny.requests())
    rest = {"train": ("--data", "talk.jsonl", "--steps", 1), "generate": ("--prompt", "say")}[verb]
    said = fw_cli(verb, "--model", "model", *rest)
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("featherweight: error: ")
    assert "chat template refuses this conversation: it needs too much memory" in said.err
    assert "Traceback" not in said.err


def test_two_forks_have_a_process_each(tmp_path: Path, llama: Path) -> None:
    """A fork that asked its parent's would take the parent's answers."""
    render(Words("{{ 1 }}"), TALK, [(1, False)])
    assert templates._helper(os.getpid()) is templates._helper(os.getpid())
    assert templates._helper(0) is not templates._helper(os.getpid())
    templates._helper(0).end()
