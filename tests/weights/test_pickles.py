"""What checkpoints hold besides weights passes; what could run, unfold or pretend does not."""

import io
import zipfile
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch

from densely.errors import WeightsError
from densely.weights.pickles import check_pickle


def check(data: bytes) -> None:
    stream = io.BytesIO(data + b"rest")
    check_pickle(stream, ["torch.nn.modules.linear.Linear"])
    assert stream.read() == b"rest"


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as archive:
        return next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 3).state_dict(),
        {"p": torch.nn.Parameter(torch.zeros(2)), "f": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"set": {1, 2}, "size": torch.Size([3]), "device": torch.device("cuda", 1)},
        {"counter": Counter([3, 3]), "dtype": torch.bfloat16, "bytes": b"abc", "none": None},
        OrderedDict(a=(1, (2.5, "x")), b=[True, []], c=set()),
        torch.nn.Linear(2, 3),
        tuple(range(9000)),
    ],
)
def test_what_checkpoints_hold(value: Any) -> None:
    check(saved(value))


def test_an_ordered_dictionary_of_python_2() -> None:
    check(b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x01e](U\x01bK\x02ee\x85R.")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"cos\nsystem\nX\x01\0\0\0a\x85R.", "more than tensors (os.system)"),
        (b"c\x1b[31m\nx" + b"y" * 999 + b"\n.", "more than tensors (?[31m.xyyy"),
        (b"ctorch\nTensor\nJ\0\0\0\x7f\x85R.", "more than tensors (torch.Tensor)"),
        (b"c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R.", "more than tensors"),
        (b"c__builtin__\nset\nctorch\nfloat32\n\x85R.", "calls '__builtin__.set'"),
        (
            b"ccollections\nOrderedDict\n]ctorch\nfloat32\na\x85R.",
            "calls 'collections.OrderedDict'",
        ),
        (b"c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.", "calls '_codecs.encode'"),
        (b"ctorch\nfloat32\n)R.", "calls 'torch.float32'"),
        (b"ctorch\nfloat32\n}b.", "sets the state of 'torch.float32'"),
        (b")" + 20 * b"q\x01h\x01\x86" + b".", "unfolds to more than 10,000"),
        (b"X\x02\0\0\0osX\x06\0\0\0system\x93.", "opcode STACK_GLOBAL"),
        (b"(X\x01\0\0\0aios\nsystem\n.", "opcode INST"),
        (b"(cos\nsystem\nX\x01\0\0\0ao.", "more than tensors (os.system)"),
        (b"(ctorch\nfloat32\nX\x01\0\0\0ao.", "opcode OBJ"),
        (b"\x82\x01)R.", "opcode EXT1"),
        (b"}K\x01a.", "adds to what is no list"),
    ],
)
def test_what_weights_do_not_need(data: bytes, told: str) -> None:
    with pytest.raises(WeightsError) as raised:
        check(data)
    assert told in str(raised.value)
    assert len(str(raised.value)) < 300
    assert str(raised.value).isprintable()
