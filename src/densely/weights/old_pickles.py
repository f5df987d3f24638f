"""Whole models as PyTorch saved them before 1.6, made readable with `weights_only=True`.

Such a file names each class of a module by a persistent id, ("module", class, file, source code),
which `weights_only` refuses although nothing of it is run. Here each such id becomes a call of a
function that densely allows and that gives a stand-in for the class: a global is put before the
tuple, and REDUCE takes the place of BINPERSID. Opcodes are only read and moved, never carried out.
torchxrayvision's published weights are files of this kind.

    MARK "module" class file source TUPLE BINPERSID  ->  GLOBAL MARK ... TUPLE REDUCE
"""

import pickletools
from io import BytesIO

from densely.errors import WeightsError

#: Name of the function that is called in place of an id; it stands for no code of the file's.
STAND_IN = "densely.weights.stand_in"
_GLOBAL = b"cdensely.weights\nstand_in\n"
#: Pickles before the model's own: magic number, version of the format, facts about the machine.
_HEADERS = 3


def without_module_ids(data: bytes) -> bytes:
    """Rewrite a legacy file; one without such ids comes back as it was.

    Raises:
        WeightsError: it is no sequence of pickles.
    """
    stream = BytesIO(data)
    try:
        for _ in range(_HEADERS):
            for _ in pickletools.genops(stream):
                pass
        begin = stream.tell()
        edits = _edits(stream)
    except Exception as error:  # a damaged pickle may raise anything
        raise WeightsError("damaged pickle") from error
    pieces, done = [data[:begin]], begin
    for position, length, text in edits:
        pieces += [data[done:position], text]
        done = position + length
    return b"".join([*pieces, data[done:]])


def _edits(stream: BytesIO) -> list[tuple[int, int, bytes]]:
    """Position, bytes replaced and what replaces them, in order, for the next pickle."""
    edits: list[tuple[int, int, bytes]] = []
    marks: list[tuple[int, list[str]]] = []  # where each open tuple begins, its first value
    words: dict[object, str] = {}  # strings by the number under which they are remembered
    last_text = ""
    closed: tuple[int, list[str]] | None = None
    for opcode, argument, position in pickletools.genops(stream):
        if position is None:
            continue
        name = opcode.name
        if name == "MARK":
            marks.append((position, []))
            continue
        if name == "BINPERSID" and closed is not None and closed[1] == ["module"]:
            edits += [(closed[0], 0, _GLOBAL), (position, 1, b"R")]
        if name in ("BINPUT", "LONG_BINPUT"):
            words[argument] = last_text
            continue
        text = ""
        if name in ("BINUNICODE", "SHORT_BINUNICODE"):
            text = str(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            text = words.get(argument, "")
        last_text = text
        if name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            closed = marks.pop() if marks else None
            if name != "TUPLE":
                closed = None
            continue
        closed = None
        if marks and not marks[-1][1]:
            marks[-1][1].append(text)
    return sorted(edits)
