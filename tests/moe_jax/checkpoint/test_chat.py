import datetime
import json

import pytest
import tokenizers

from moe_jax.checkpoint.chat import ChatTemplate, missing_chat_template, read_chat_template

CHATML = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

INSTRUCT = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ ' [INST] ' + message['content'].strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}
"""

TOOLS = """\
{%- set ns = namespace(count=0) -%}
{%- if tools is not none and tools %}never{% endif -%}
{%- for message in messages -%}
{%- set ns.count = ns.count + 1 -%}
{{ message | tojson }}|{{ message | tojson(indent=2, sort_keys=true) }}|{{ dict(a=1) | tojson }}
{% if ns.count == 2 %}{% break %}{% endif %}
{%- endfor %} {{ strftime_now('%Y') }} {{ unk_token }}
"""

CHAT = [
    {"role": "user", "content": " Hé <b>llo</b> 😀 "},
    {"role": "assistant", "content": 'It\'s "fine" & good.'},
    {"role": "user", "content": "More?"},
]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "chat_template.jinja", {"bos_token": "<s>", "eos_token": "</s>"})


def test_chat_with_generation_prompt():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert template(CHATML).render(messages, add_generation_prompt=False) == expected
    assert template(CHATML).render(messages) == expected + "<|im_start|>assistant\n"


def test_special_tokens_and_blocks_are_trimmed():
    assert template(INSTRUCT).render(CHAT[:2]) == (
        '<s> [INST] Hé <b>llo</b> 😀 [/INST]\n It\'s "fine" & good.</s>\n'
    )


def test_helpers():
    text = template("{{ strftime_now('%Y') }} {{ messages[0] | tojson }}").render(CHAT)
    year, message = text.split(" ", 1)
    assert int(year) == datetime.datetime.now().year
    assert message == json.dumps(CHAT[0], ensure_ascii=False)


def test_further_fields_pass_as_plain_data_and_none_is_dropped():
    source = "{{ messages[0].name }} {{ messages[0].tools is defined }}"
    message = {"role": "user", "content": "", "name": "Ada", "tools": None}
    assert template(source).render([message]) == "Ada False"


def write(folder, source, **config):
    if source is not None:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("source", "configured", "expected"),
    [
        ("file {{ bos_token }}{{ eos_token }}", "config", "file <s></s>"),
        (None, "config", "config"),
        (
            None,
            [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}],
            "d",
        ),
    ],
)
def test_where_the_template_is(tmp_path, source, configured, expected):
    write(
        tmp_path,
        source,
        chat_template=configured,
        bos_token="<s>",
        eos_token={"content": "</s>", "lstrip": False},
        pad_token=None,
    )
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.render(CHAT) == expected


def test_no_template(tmp_path):
    assert read_chat_template(tmp_path) is None
    write(tmp_path, None, bos_token="<s>")
    assert read_chat_template(tmp_path) is None
    message = missing_chat_template(tmp_path)
    assert message.startswith("this model has no chat template")
    assert "give the prompt as text, or copy chat_template.jinja" in message


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"chat_template": 3}, r"tokenizer_config\.json: chat_template must be a string or a list"),
        ({"chat_template": [{"name": "default"}]}, r"the strings \"name\" and \"template\""),
        (
            {"chat_template": [{"name": "rag", "template": "r"}]},
            r"no chat_template is named \"default\" \(found \['rag'\]\)",
        ),
        ({"chat_template": "x", "bos_token": 1}, r"bos_token must be a string or an object"),
        ({"chat_template": "x", "eos_token": {}}, r"eos_token must be a string or an object"),
        (
            {"chat_template": "{% if %}"},
            r"chat_template in .*tokenizer_config\.json is not a valid",
        ),
    ],
)
def test_broken_config(tmp_path, config, text):
    write(tmp_path, None, **config)
    with pytest.raises(ValueError, match=text):
        read_chat_template(tmp_path)


def test_broken_files(tmp_path):
    write(tmp_path, "line one\n{% for %}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a valid .* line 2: "):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], r"non-empty list like .*, got \[\]"),
        ("Hello", r"chat messages must be a non-empty list"),
        ([CHAT[0], "Hello"], r"message 1 must be a mapping with .*, got str"),
        ([{"content": "x"}], r"message 0 has no 'role'"),
        ([CHAT[0], {"role": "user"}], r"message 1 has no 'content'"),
        ([{"role": 1, "content": "x"}], r"message 0: 'role' must be a string, got int"),
        ([{"role": "user", "content": None}], r"message 0: 'content' must be a string"),
        ([{**CHAT[0], "image": object()}], r"message 0 holds a value that is not plain JSON"),
    ],
)
def test_bad_messages(messages, text):
    with pytest.raises(ValueError, match=text):
        template(CHATML).render(messages)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (INSTRUCT, r"template refuses these messages: Conversation roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", r"tried to leave its sandbox"),
        ("{{ lipsum.__globals__['os'].system('true') }}", r"tried to leave its sandbox"),
        ("{{ messages.append(1) }}", r"tried to leave its sandbox"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", r"tried to leave its sandbox"),
        ("{{ missing.field }}", r"chat_template\.jinja failed .*UndefinedError"),
        ("{{ 'a' + 1 }}", r"failed on these messages \(TypeError"),
        ("{{ 1 / 0 }}", r"failed on these messages \(ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", r"failed on these messages \(OverflowError"),
    ],
)
def test_templates_that_fail(source, text):
    with pytest.raises(ValueError, match=text):
        template(source).render(CHAT[1:])


@pytest.mark.golden
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", [CHATML, INSTRUCT, TOOLS], ids=["chatml", "instruct", "tools"])
def test_equals_transformers(tmp_path, source, add_generation_prompt):
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = source
    made.save_pretrained(tmp_path)
    found = read_chat_template(tmp_path)
    assert found is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert found.render(CHAT, add_generation_prompt) == theirs
