"""The commands. Nothing heavy is imported before a command needs it, so that help answers at once.

Exit codes: 0 fine, 1 failure, 2 usage or configuration; after saving, 130 for Ctrl-C, 143 for
SIGTERM, 129 for a closed terminal.
"""

import atexit
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import densely
from densely.errors import ConfigError, DenselyError, unknown_name

if TYPE_CHECKING:
    from densely.cli.parser import Parser

    Command = Callable[[Parser, list[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; by default the one that this process is for."""
    if arguments is None:
        atexit.register(gc.freeze)  # or all of torch is searched for garbage, in most of a second
        # Of EXIF that is damaged, which nobody is to mend. Here, where the filters are our own.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may be no text at all
        sys.stdout.reconfigure(errors="backslashreplace")
    prog = f"densely {command}" if command in _MODULES else "densely"
    try:
        if command in ("-h", "--help"):
            print(_overview())
        elif command == "--version":
            print(f"densely {densely.__version__}")
        elif command in _MODULES:
            run = _command(command)
            run(_parser(prog, run), arguments[1:])
        else:
            raise ConfigError(f"{unknown_name('command', command, _MODULES)} (see densely --help)")
    except DenselyError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that may not be read, a full disk
        from densely.whole_file import DISK_ERRORS

        where = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: {where}{error.strerror or error}", file=sys.stderr)
        return 2 if error.filename and error.errno not in DISK_ERRORS else 1
    except (MemoryError, RuntimeError) as error:
        from densely.runtime import ran_out_of_memory

        if not ran_out_of_memory(error):
            raise
        said = str(error).splitlines() or ["free some, or give fewer or smaller images"]
        print(f"{prog}: not enough memory: {said[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _command(name: str) -> "Command":
    command: Command = getattr(import_module(f"densely.cli.{_MODULES[name]}"), name)
    return command


def _parser(prog: str, command: "Command") -> "Parser":
    from densely.cli.parser import Help, Parser

    return Parser(
        prog=prog,
        description=(command.__doc__ or "").strip(),
        allow_abbrev=False,
        formatter_class=Help,
    )


def _overview() -> str:
    lines = [(_command(name).__doc__ or "").strip().splitlines()[0] for name in _MODULES]
    width = max(map(len, _MODULES))
    return "\n".join(
        [
            "usage: densely COMMAND [OPTIONS]",
            "",
            "DenseNets for PyTorch: learn, train, explain and convert them.",
            "",
            "commands:",
            *(f"  {name:{width}}  {line}" for name, line in zip(_MODULES, lines, strict=True)),
            "",
            "begin with:  densely train",
            "then:        densely predict runs/quickstart-001 IMAGE...",
            "each command explains its options:  densely COMMAND --help",
        ]
    )


#: The commands, and where each is: help on one of them waits for no other.
_MODULES = {
    "train": "training",
    "evaluate": "judging",
    "predict": "judging",
    "explain": "explaining",
    "compare": "comparing",
    "convert": "networks",
    "models": "networks",
    "bench": "machine",
    "doctor": "machine",
}
