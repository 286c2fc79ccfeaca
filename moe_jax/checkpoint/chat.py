"""Chat messages to prompt text, through the checkpoint's own jinja2 template.

Knows no tokens. A template is foreign code: it runs in a sandbox and sees only plain data.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moe_jax.checkpoint.json_file import read_json_object
from moe_jax.checkpoint.tokenizer import Folder

# The names under which templates expect special tokens, as transformers passes them.
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


class _RefusedError(Exception):
    """A template called raise_exception: these messages do not fit the model."""


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which marks what to train on and means nothing here."""

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise _RefusedError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    return environment


class ChatTemplate:
    """A compiled template; the environment is set up as transformers does it."""

    def __init__(self, source: str, origin: str, special_tokens: Mapping[str, str]):
        """Compiles `source`; a syntax error is a ValueError that names `origin`."""
        self._origin = origin
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(
                source,
                globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{origin} is not a valid chat template: line {error.lineno}: {error.message}"
            ) from error

    def render(self, messages: object, add_generation_prompt: bool = True) -> str:
        """The prompt text of a chat.

        Args:
          messages: a list of mappings, each with a str "role" and a str "content"; further keys
            must hold plain JSON values.
          add_generation_prompt: end with the opening of the assistant's next turn.

        Raises:
          ValueError: a message is malformed (index and field are named), the template refuses
            these messages, or it does what the sandbox forbids.
        """
        plain = _plain_messages(messages)
        try:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _RefusedError as error:
            raise ValueError(
                f"the model's chat template refuses these messages: {error}"
            ) from error
        except jinja2.sandbox.SecurityError as error:
            raise ValueError(
                f"{self._origin} tried to leave its sandbox ({error}); do not trust this template"
            ) from error
        # What foreign template code can raise: jinja2's own errors and those of its expressions.
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{self._origin} failed on these messages ({type(error).__name__}: {error}); "
                "check their roles and fields against the model's documentation"
            ) from error


def read_chat_template(folder: Folder) -> ChatTemplate | None:
    """The template of a checkpoint folder; None if it has none.

    It is chat_template.jinja, else "chat_template" in tokenizer_config.json (a string, or a list
    of named templates of which "default" is taken). Raises ValueError for files and fields that
    cannot be read.
    """
    folder = pathlib.Path(folder)
    config_path = folder / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.exists() else {}
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); fetch the file again") from error
        return ChatTemplate(source, str(path), _special_tokens(config, config_path))
    source = _configured_template(config.get("chat_template"), config_path)
    if source is None:
        return None
    return ChatTemplate(
        source, f"chat_template in {config_path}", _special_tokens(config, config_path)
    )


def missing_chat_template(folder: Folder) -> str:
    """What to tell a user who gave chat messages to a model that has no template."""
    return (
        f"this model has no chat template (no chat_template.jinja in {folder} and no "
        "chat_template in its tokenizer_config.json); give the prompt as text, or copy "
        "chat_template.jinja from the model's original folder"
    )


def _configured_template(value: object, path: pathlib.Path) -> str | None:
    if value is None or isinstance(value, str):
        return value
    named: dict[str, str] = {}
    for entry in value if isinstance(value, list) else [value]:
        name, template = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(template, str):
            raise ValueError(
                f"{path}: chat_template must be a string or a list of objects with the strings "
                f'"name" and "template", got {entry!r:.80}'
            )
        named[name] = template
    if "default" not in named:
        raise ValueError(
            f'{path}: no chat_template is named "default" (found {sorted(named)}); '
            "write the one to use to chat_template.jinja beside it"
        )
    return named["default"]


def _special_tokens(config: Mapping[str, object], path: pathlib.Path) -> dict[str, str]:
    """Special tokens by name; each a string in the file or an object with its "content"."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
        elif value is not None:
            raise ValueError(
                f'{path}: {name} must be a string or an object with the string "content", '
                f"got {value!r:.80}"
            )
    return found


def _plain_messages(messages: object) -> list[dict[str, object]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            'chat messages must be a non-empty list like [{"role": "user", "content": "Hello"}], '
            f"got {messages!r:.80}"
        )
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: object) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f'message {index} must be a mapping with "role" and "content", '
            f"got {type(message).__name__}"
        )
    for field in ("role", "content"):
        if field not in message:
            raise ValueError(f"message {index} has no {field!r}; give it as a string")
        if not isinstance(message[field], str):
            raise ValueError(
                f"message {index}: {field!r} must be a string, got {type(message[field]).__name__}"
            )
    # Templates test whether a key is there, and print what it holds: a None would be printed.
    kept = {key: value for key, value in message.items() if value is not None}
    try:
        # Through JSON and back: the template never meets an object that has methods of its own.
        return json.loads(json.dumps(kept))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"message {index} holds a value that is not plain JSON ({error}); "
            "use strings, numbers, lists and mappings"
        ) from error
