"""docs/reference/cli.md and settings.md: the commands by their own help, and the environment variables."""

from typing import Any

import typer.main

from server.cli import app
from server.settings import PREFIX, SETTINGS, Settings, shown_default
from tools.markdown import page, table

CLI = """\
`unetpp` is the one command. `unetpp COMMAND --help` prints what is below.

- `serve`, `node`, `tune`, `segment` and `compare` need an installation with the extra `cpu` or `gpu`, `node` also `dicom`; `segment` and `compare`
  with `--server` need the extra `client` alone. `train`, `export`, `verify`, `calibrate` and `add-uncertainty` need the
  extra `train`. A command without its extra names it.
- The exit status is 0 on success, 1 on an error, which is printed as one line, and 2 for a wrong option.

"""

SETTINGS_TEXT = """\
The server reads its settings from these environment variables, once, at its start; the options of `unetpp serve` win
over them. [Choose settings](../operate/settings.md) explains which to change first. A variable that begins with `UNETPP_` and is
not in these tables is an error, because it is most likely misspelt. With `UNETPP_AUTH__KEYS_FILE` all paths need a key
except [these](../operate/security.md#paths-without-a-key).

"""


def cli() -> str:
    """The page of the commands."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="unetpp")
    commands = {name: root.get_command(context, name) for name in root.list_commands(context)}  # type: ignore[attr-defined]  # of a group
    rows = (
        (f"[`unetpp {name}`](#unetpp-{name})", command.get_short_help_str(200))
        for name, command in commands.items()
    )
    sections = (_command(name, command, context) for name, command in commands.items())
    return page("Command line", CLI, table(("command", "does"), rows), *sections)


def _command(name: str, command: Any, parent: typer.Context) -> str:
    context = typer.Context(command, info_name=name, parent=parent)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    parts = [f"## unetpp {name}\n\n```text\n{usage}\n```\n\n{text}\n\n"]
    for kind in ("argument", "option"):
        # The names with their value, and the help with the default, as `--help` prints them.
        records = (one.get_help_record(context) for one in command.params if one.param_type_name == kind)
        rows = [(f"`{names}`", text) for names, text in filter(None, records)]
        parts += [table((kind, "meaning"), rows)] if rows else []
    return "".join(parts)


def settings() -> str:
    """The page of the settings."""
    options = _options_of_serve()
    groups: dict[str, list[tuple[str, ...]]] = {"": []}
    for name, field in SETTINGS.items():
        group, _, rest = name.removeprefix(PREFIX).partition("__")
        row = (
            f'<a id="{name.lower()}"></a>`{name}`',
            f"`{shown_default(field.default)}`",
            f"`{options[name]}`" if name in options else "",
            field.description or "",
        )
        groups.setdefault(group.lower() if rest else "", []).append(row)
    parts = []
    for group, rows in groups.items():
        kind = Settings.model_fields[group].annotation if group else None
        text = f"## `UNETPP_{group.upper()}__…`\n\n{kind.__doc__}\n\n" if kind else "## Bundles\n\n"
        parts.append(text + table(("variable", "default", "option of `serve`", "meaning"), rows))
    return page("All settings", SETTINGS_TEXT, *parts)


def _options_of_serve() -> dict[str, str]:
    """The option of `unetpp serve` by the variable that its help names."""
    root = typer.main.get_command(app)
    serve = root.get_command(typer.Context(root), "serve")  # type: ignore[attr-defined]  # of a group
    texts = {one.opts[0]: getattr(one, "help", None) or "" for one in serve.params}
    return {
        text.rpartition("[")[2].rstrip("]."): option for option, text in texts.items() if "[UNETPP" in text
    }
