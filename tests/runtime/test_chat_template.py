"""Chat templates render as in transformers, and a hostile one ends in a typed error, soon."""

from __future__ import annotations

import datetime
import threading
import time
from typing import Any

import pytest

from llama_ext.errors import FormatError, LimitError, OptionError
from llama_ext.runtime.chat_template import TemplateLimits, render_chat_template
from timing import within

USER = {"role": "user", "content": " Hi <there> & 'you' é\n"}
ASSISTANT = {"role": "assistant", "content": " Yo "}
CHAT: list[dict[str, Any]] = [USER, ASSISTANT]

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str, messages: Any = CHAT, **options: Any) -> str:
    return render_chat_template(template, messages, **options)


def test_chatml() -> None:
    assert render(CHATML, add_generation_prompt=True) == (
        "<|im_start|>user\nHi <there> & 'you' é<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_llama2_with_a_system_message() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *CHAT]
    assert render(LLAMA2, messages, variables=TOKENS) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hi <there> & 'you' é [/INST] Yo </s>"
    )


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(OptionError, match="refuses these messages: Conversation roles must alternate"):
        render(LLAMA2, [ASSISTANT, USER], variables=TOKENS)


# Each pair was compared with transformers 5.23's renderer when it was written.
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{{ missing }}|{{ none }}|{{ true }}|{{ 1.5 }}", "|None|True|1.5"),
        ("{{ [1, 'é', none] }}{{ {'a': (1,)} }}", "[1, 'é', None]{'a': (1,)}"),
        ("{{ 'a' ~ 1 ~ [2] }}{{ 'a' + 'b' }}{{ 'ab' * 2 }}{{ [0] * 2 }}", "a1[2]ababab[0, 0]"),
        ("{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ -3 }}", "3 3.5 3 1024 -3"),
        ("{{ '%s-%05.2f' % ('a', 3.14159) }} {{ '{:>4}'.format('x') }}", "a-03.14    x"),
        ("{{ {'z': '<é>', 'a': [1]} | tojson }}", '{"z": "<é>", "a": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages[-1].content }}{{ messages[0]['role'] }}{{ messages[1:] | length }}", " Yo user1"),
        ("{{ messages[0].get('tools') }}{{ 'role' in messages[0] }}", "NoneTrue"),
        (
            "{% for m in messages %}{{ loop.index }}{{ loop.last }}{% if true %}{% break %}{% endif %}{% endfor %}",
            "1False",
        ),
        ("{% for i in range(4) if i is odd %}{{ i }}{% continue %}x{% endfor %}", "13"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(1, y=3) }}", "[12][13]"),
        ("{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}c{% endcall %}", "<c>"),
        ("{% set b %}x{{ 1 }}{% endset %}{{ b }}{% filter upper %}abc{% endfilter %}", "x1ABC"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", " Yo "),
        (
            "{{ 'a,b'.split(',')[-1] }}{{ ' a '.strip() }}{{ 'x'.join(['1', '2']) }}{{ 'aba'.replace('a', 'c') }}",
            "ba1x2cbc",
        ),
        ("{{ '<b>' | e }}{{ '<b>' | safe }}{{ 'a\nb' | indent(2) }}", "&lt;b&gt;<b>a\n  b"),
        (
            "{{ [3, 1] | sort }}{{ {'b': 1} | dictsort }}{{ range(3) | batch(2) | list }}",
            "[1, 3][('b', 1)][[0, 1], [2]]",
        ),
        ("{{ [1, 2] | sum }}{{ [[1], [2]] | sum(start=[]) }}{{ 2.6 | round | int }}", "3[1, 2]3"),
        ("{{ dict(a=1) }}{{ cycler('a', 'b').next() }}{{ 'b' if 1 in [1] else 'c' }}", "{'a': 1}ab"),
        ("{% for k in [1, [2, [3]]] recursive %}{{ loop(k) if k is iterable else k }}{% endfor %}", "123"),
        ("{{ messages is iterable }}{{ messages[0] is mapping }}{{ tools is none }}", "TrueTrueTrue"),
    ],
)
def test_renders_as_transformers_does(template: str, expected: str) -> None:
    assert render(template) == expected


def test_strftime_now_is_the_time_of_rendering() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_keys_whose_value_is_none_are_left_out() -> None:
    assert render("{{ 'content' in messages[0] }}", [{"role": "a", "content": None}]) == "False"


def test_tools_and_documents_reach_the_template() -> None:
    out = render("{{ tools[0].name }}{{ documents[0].title }}", tools=[{"name": "f"}], documents=[{"title": "d"}])
    assert out == "fd"


def test_the_last_message_can_be_left_open() -> None:
    assert render(CHATML, continue_final_message=True).endswith("<|im_start|>assistant\nYo")
    messages = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Yo"}]}]
    assert render("{{ messages[1].content[0].text }}<end>", messages, continue_final_message=True) == "Yo"


def test_what_is_no_text_is_no_template() -> None:
    with pytest.raises(OptionError, match="must be a str, got int"):
        render_chat_template(5, [USER])  # type: ignore[arg-type]


def test_leaving_the_last_message_open_needs_one() -> None:
    with pytest.raises(OptionError, match="no text to continue"):
        render(CHATML, [{"role": "assistant"}], continue_final_message=True)
    with pytest.raises(OptionError, match="leaves out the last message"):
        render("{{ messages[0].content }}", continue_final_message=True)
    with pytest.raises(OptionError, match="pass one"):
        render(CHATML, continue_final_message=True, add_generation_prompt=True)


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(OptionError, match=r"no chat template.*Use generate\(\)"):
        render_chat_template(None, CHAT)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ("hello", "must be a list of dictionaries"),
        ({"role": "user"}, "must be a list of dictionaries"),
        (["hello"], r"messages\[0\] must be a dictionary"),
        ([{"role": object()}], r"messages\[0\]\['role'\]: expected a JSON value.*got object"),
        ([{1: "x"}], "expected a str, got int"),
    ],
)
def test_messages_that_are_not_json_are_refused(messages: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        render(CHATML, messages)


def test_messages_that_contain_themselves_are_refused() -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = message
    with pytest.raises(LimitError, match="nested deeper"):
        render(CHATML, [message])


def test_the_callers_messages_are_not_changed() -> None:
    messages = [dict(USER), dict(ASSISTANT)]
    render(CHATML, messages, continue_final_message=True)
    assert messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for %}", "syntax error in line 1"),
        ("a\n{{ 1 +", "syntax error in line 2"),
        ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a'.encode('idna') }}", "unsafe"),
        ("{{ (5).to_bytes(10**10, 'big') }}", "unsafe"),
        ("{% set ns = namespace() %}{{ ns.__init__.__globals__ }}", "no attribute"),
        ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
    ],
)
def test_a_template_with_an_error_is_a_format_error(template: str, expected: str) -> None:
    with pytest.raises(FormatError, match=expected):
        render(template)


GROW = "{{% set ns = namespace(s={start}) %}}{{% for i in range(100) %}}{{% set ns.s = {step} %}}{{% endfor %}}{{{{ ns.s }}}}"
BIG = "{% set s = 'a' * 1000000 %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "repetition": "{{ 'a' * 10**12 }}",
    "repetition from the left": "{{ 10**12 * 'a' }}",
    "list repetition": "{{ [0] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "nested power": "{{ (2 ** 4000) ** 4000 }}",
    "product of large numbers": "{{ 2 ** 4000 * 2 ** 4000 }}",
    "ljust": "{{ 'a'.ljust(10**11) }}",
    "zfill": "{{ '1'.zfill(10**11) }}",
    "center": "{{ 'a' | center(10**11) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(10**9) }}",
    "percent width": "{{ '%99999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format filter": "{{ '%99999999999d' | format(1) }}",
    "format width": "{{ '{:99999999999}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 99999999999) }}",
    "format many times the same": BIG + "{{ ('{0}' * 1000).format(s) }}",
    "doubling a string": GROW.format(start="'a'", step="ns.s ~ ns.s"),
    "doubling by plus": GROW.format(start="'a'", step="ns.s + ns.s"),
    "doubling a list": GROW.format(start="[]", step="[ns.s, ns.s]"),
    "doubling a tuple": GROW.format(start="()", step="(ns.s, ns.s)"),
    "doubling a dictionary": GROW.format(start="{}", step="dict(a=ns.s, b=ns.s)"),
    "doubling by items": GROW.format(start="{}", step="{'a': ns.s.items(), 'b': ns.s.items()}"),
    "doubling by batch": GROW.format(start="[1]", step="ns.s | batch(4, ns.s) | list"),
    "doubling by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + GROW.format(start="'a'", step="m(ns.s)"),
    "block of text": BIG + "{% set x %}{% for i in range(100000) %}{{ s }}{% endfor %}{% endset %}",
    "literal text in a loop": "{% for i in range(100000) %}" + "y" * 50_000 + "{% endfor %}",
    "literal text in a block": "{% set x %}{% for i in range(100000) %}" + "y" * 50_000 + "{% endfor %}{% endset %}",
    "replace filter": BIG + "{{ s | replace('a', s) }}",
    "replace method": BIG + "{{ s.replace('', s) }}",
    "join method": BIG + "{{ s.join(s) }}",
    "join filter": BIG + "{{ range(100000) | join(s) }}",
    "join of a lazy filter": BIG + "{{ ''.join(range(100000) | map('string') | map('replace', '1', s)) }}",
    "translate": BIG + "{{ s.translate({97: s}) }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "batch": "{{ [1] | batch(10**10, 0) | list }}",
    "indent": "{{ ('\\n' * 1000000) | indent(100000) }}",
    "wordwrap": BIG + "{{ s | wordwrap(1, true, s) }}",
    "tojson indent": "{{ [[1]] | tojson(indent=10**10) }}",
    "round": "{{ 5 | round(-10**9) }}",
    "int of many digits": "{{ ('9' * 100000) | int }}",
    "strftime width": "{{ strftime_now('%999999999d') }}",
    "many large values": "".join(f"{{% set a{i} = 'x' * 4000000 %}}" for i in range(100)),
    "deep list": "{% set ns = namespace(s=[]) %}{% for i in range(100000) %}{% set ns.s = [ns.s] %}{% endfor %}",
    "endless recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "block recursion": "{% block a %}{{ self.a() }}{% endblock %}",
    "deep expression": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "long sum": "{{ 1" + "+1" * 30_000 + " }}",
    "long template": "x" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_wants_too_much_memory_is_a_limit_error_at_once(name: str) -> None:
    with within(0.5), pytest.raises(LimitError):
        render(BOMBS[name])


SLOW = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "branching macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "sum of lists": "{{ ([[1]] * 60000) | sum(start=[]) }}",
    "tests that search": "{% set b = range(100000) | list %}{{ range(100000) | reject('in', b) | list }}",
    "long comparisons": (
        "{% set a = range(50000) | list %}{% set b = a + [] %}"
        "{% for i in range(100000) %}{% if [a, a] == [b, b] %}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_template_that_runs_too_long_is_a_limit_error_in_time(name: str) -> None:
    with within(0.4), pytest.raises(LimitError, match=r"still running after 0\.3 s"):
        render(SLOW[name], limits=TemplateLimits(seconds=0.3))


def test_the_default_time_is_two_seconds() -> None:
    start = time.perf_counter()
    with within(2.1), pytest.raises(LimitError, match="after 2 s"):
        render(SLOW["nested loops"])
    assert time.perf_counter() - start > 1.5


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": role, "content": "word " * 200} for _ in range(500) for role in ("user", "assistant")]
    assert len(render(CHATML, messages)) > 1_000_000


def test_limits_can_be_raised_and_lowered() -> None:
    assert len(render("{{ 'a' * 5000000 }}", limits=TemplateLimits(characters=6_000_000))) == 5_000_000
    with pytest.raises(LimitError, match="the limit is 10"):
        render("{{ 'a' * 11 }}", limits=TemplateLimits(characters=10))
    with pytest.raises(OptionError, match=r"TemplateLimits\.seconds"):
        TemplateLimits(seconds=0)
    assert render("{{ 1 + 2 }}", limits=TemplateLimits(tokens=9)) == "3"
    with pytest.raises(LimitError, match="more than 8 tokens"):
        render("{{ 1 + 2 }}", limits=TemplateLimits(tokens=8))


def test_a_namespace_that_contains_itself_can_be_printed() -> None:
    assert render("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}{{ [ns] }}") == "<Namespace>[<Namespace>]"


def test_threads_do_not_share_a_meter() -> None:
    failures: list[LimitError] = []
    outputs: set[str] = set()

    def work(index: int) -> None:
        for _ in range(20):
            if index % 2:
                outputs.add(render(CHATML))
            else:
                with pytest.raises(LimitError) as caught:
                    render(BOMBS["doubling a string"])
                failures.append(caught.value)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 1
    assert len(failures) == 80
