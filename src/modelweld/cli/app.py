"""The root command, its global options, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from modelweld import extras, stage_errors
from modelweld.errors import ModelweldError

INTERRUPTED = 130

# The module below modelweld.cli that adds each command: one command's start imports no other's module.
COMMANDS = {
    "init": "project",
    "doctor": "project",
    "schema": "project",
    "pin": "sources",
    "merge": "merge",
    "plan": "merge",
    "methods": "methods",
    "import-mergekit": "merge",
    "stage": "stage",
    "evaluate": "evaluate",
    "report": "evaluate",
    "export": "evaluate",
    "run": "run",
    "rederive": "run",
    "register": "registry",
    "promote": "registry",
    "rollback": "registry",
    "audit": "registry",
    "symmetry": "symmetry",
}

stdout = Console(soft_wrap=True)
stderr = Console(stderr=True, soft_wrap=True)


@dataclass
class Options:
    """What the options before the command's name ask for."""

    json: bool = False
    debug: bool = False


options = Options()

app = typer.Typer(
    name="modelweld",
    help="Merge finetuned models in production: fetch, validate, merge, evaluate, register, and prove it later.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=True,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        stdout.print(f"modelweld {version('modelweld')}")
        raise typer.Exit


@app.callback()
def root(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options that stand before any command."""
    options.json = as_json
    options.debug = debug


def emit(document: Any, text: Any = None) -> None:
    """Print `document` as JSON under --json, else `text` (a string or a rich renderable)."""
    if options.json:
        sys.stdout.write(json.dumps(document, indent=2, sort_keys=True, default=str) + "\n")
    elif text is not None:
        stdout.print(text)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; 0 done, 1 a check said no, 2 bad input, 3 something outside failed, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # `modelweld merge … --json` reads more naturally than `modelweld --json merge …`: both are taken.
    leading = [flag for flag in ("--json", "--debug") if flag in words]
    words = leading + [word for word in words if word not in leading]
    try:
        _import_commands(words)
        app(words)
    except ModelweldError as error:
        _leave(error)
    except ModuleNotFoundError as error:
        if (needed := extras.explain(error)) is None:
            stage_errors.write(error)
            raise
        _leave(needed)
    except Exception as error:
        stage_errors.write(error)
        raise
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            stderr.print("what was finished is kept; the same command goes on from there", style="yellow")
        raise


def _import_commands(words: list[str]) -> None:
    """Import the module of the command that `words` name; without one (--help, a typing error) import all of them."""
    # No option of the root command takes a value, so the first other word is the command.
    named = next((word for word in words if not word.startswith("-")), "")
    modules = [COMMANDS[named]] if named in COMMANDS else dict.fromkeys(COMMANDS.values())
    for module in modules:
        importlib.import_module(f"modelweld.cli.{module}")


def _leave(error: ModelweldError) -> NoReturn:
    """Print the error, write it where the process that started this one reads it, and exit with its code."""
    stage_errors.write(error)
    if options.debug:
        stderr.print_exception()
    _show(error)
    sys.exit(error.exit_code)


def _show(error: ModelweldError) -> None:
    if options.json:
        sys.stdout.write(json.dumps(stage_errors.to_plain(error), indent=2) + "\n")
    stderr.print("[bold red]error:[/]", end=" ")
    stderr.print(str(error), markup=False, highlight=False)
