"""The commands. Nothing heavy is imported before a command needs it, so that help answers at once.

Exit codes: 0 fine, 1 failure, 2 usage or configuration; after saving, 130 for Ctrl-C, 143 for
SIGTERM, 129 for a closed terminal.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

import densely
from densely.cli.comparing import compare
from densely.cli.explaining import explain
from densely.cli.judging import evaluate, predict
from densely.cli.machine import bench, doctor
from densely.cli.networks import convert, models
from densely.cli.parser import Parser
from densely.cli.training import train
from densely.errors import ConfigError, DenselyError, unknown_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no text at all
        sys.stdout.reconfigure(errors="backslashreplace")
    prog = f"densely {command}" if command in _COMMANDS else "densely"
    try:
        if command in ("-h", "--help"):
            print(_overview())
        elif command == "--version":
            print(f"densely {densely.__version__}")
        elif command in _COMMANDS:
            _COMMANDS[command](_parser(command), arguments[1:])
        else:
            raise ConfigError(f"{unknown_name('command', command, _COMMANDS)} (see densely --help)")
    except DenselyError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that may not be read, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: {where}{error.strerror or error}", file=sys.stderr)
        return 2 if error.filename else 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(command: str) -> Parser:
    description = (_COMMANDS[command].__doc__ or "").strip()
    return Parser(
        prog=f"densely {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _overview() -> str:
    lines = [(command.__doc__ or "").strip().splitlines()[0] for command in _COMMANDS.values()]
    width = max(map(len, _COMMANDS))
    return "\n".join(
        [
            "usage: densely COMMAND [OPTIONS]",
            "",
            "DenseNets for PyTorch: learn, train, explain and serve them.",
            "",
            "commands:",
            *(f"  {name:{width}}  {line}" for name, line in zip(_COMMANDS, lines, strict=True)),
            "",
            "begin with:  densely train",
            "then:        densely predict runs/quickstart-001 IMAGE...",
            "each command explains its options:  densely COMMAND --help",
        ]
    )


_COMMANDS: dict[str, Callable[[Parser, list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "compare": compare,
    "convert": convert,
    "models": models,
    "bench": bench,
    "doctor": doctor,
}
