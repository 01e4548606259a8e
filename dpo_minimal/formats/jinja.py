"""Jinja chat templates, as transformers runs them: in a sandbox, with the same helpers.

A template comes from a model's folder, so it is somebody else's program: the sandbox lets it make a
text of its arguments and no more. `strftime_now` is there because templates of Llama 3.1 and 3.2
put the day's date into the system message; as in transformers, their prompts change with the day.
"""

import json
from datetime import datetime

from dpo_minimal import InputError
from dpo_minimal.extras.reading import first_line


def compile_template(source: str):
    """A function render(messages, add_generation_prompt, **special tokens) -> text.

    messages: dicts of role and content. InputError, here or there, without jinja2, for a template
    that cannot be read, and for what it refuses.
    """
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("a chat template needs jinja2: pip install jinja2") from None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, generation_blocks(jinja2.ext)],
    )
    environment.filters["tojson"] = to_json  # Jinja's own escapes for HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise InputError(f"the chat template is not Jinja that can be read ({error})") from None

    def render(messages: list[dict], add_generation_prompt: bool, **tokens) -> str:
        given = dict(tokens, messages=messages, tools=None, documents=None)
        try:
            return template.render(**given, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # it is a program: it may fail in any way
            raise InputError(f"the chat template refuses: {first_line(error)}") from None

    return render


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter `tojson`."""
    options = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators)
    return json.dumps(value, sort_keys=sort_keys, **options)


def raise_exception(message):
    """How a template refuses messages."""
    raise InputError(str(message))


def strftime_now(pattern: str) -> str:
    """The date or time now."""
    return datetime.now().strftime(pattern)


def generation_blocks(ext):
    """An extension for `{% generation %} ... {% endgeneration %}`, which only marks its content."""

    class Generation(ext.Extension):
        """The tag; its content stays as it is."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
