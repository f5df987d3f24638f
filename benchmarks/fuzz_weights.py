"""Damaged and malicious files of weights: a clear error each, or the weights, and nothing else.

    python benchmarks/fuzz_weights.py --count 10000 --seed 0 --json results.json

Each file is made from its number and the seed, and loaded in a fork of this process, so that
PyTorch is imported once. The fork may not run code (audit hook, canary), may not take long or much
memory, and must leave the model as it was where it raises. `--only 123` runs one file again and
says what came of it. Exit code 1: at least one fault.
"""

import argparse
import codecs
import contextlib
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import h5py
import torch
from torch import nn

from densely import load_weights
from densely.environment import environment
from densely.errors import DenselyError
from densely.runtime import choose_runtime

sys.path.insert(0, str(Path(__file__).parent))  # for the tests, which load this file by its path

import fuzz_hdf5
import fuzz_headers
import fuzz_pickles
from fuzz_mutations import MUTATIONS, Mutation
from fuzz_seeds import Seed, models, seeds

TABLES = (fuzz_headers, fuzz_pickles, fuzz_hdf5)  # whose import enters their mutations
TIMEOUT_S = 30
#: Of address space beyond what the process has, and of memory in use.
ADDRESSES = 1 << 30
GROWTH = 300 << 20
#: A message of 24 keys and some reasons is shorter.
LONGEST = 4000
#: What loading may not do; of `open` only what writes.
_FORBIDDEN = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "exec", "compile", "import",
              "code.", "pty.", "webbrowser.", "urllib.", "pickle.", "marshal.")  # fmt: skip
_ALLOWED = ("os.listdir", "os.scandir", "import encodings.")


@dataclass
class Outcome:
    """What came of one file; `fault` is None where that was in order."""

    mutation: str
    seed_file: str
    result: str
    message: str
    fault: str | None = None
    growth: int = 0
    seconds: float = 0.0


class Fuzzer:
    """Makes file after file, and loads each in a fork.

    Args:
        seed: of all choices.
        folder: where files are made.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        torch.set_num_threads(1)  # threads do not outlive a fork, and their locks do
        self.seed, self.folder = seed, folder
        self.models = models()
        self.seeds = seeds(folder)
        self.warm_up()
        gc.freeze()  # else each fork copies what its garbage collector looks at

    def warm_up(self) -> None:
        """Load each valid file, and some bad ones, so that nothing is left to be imported."""
        for codec in ("cp437", "latin1", "hex", "punycode", "idna", "utf-16"):
            codecs.lookup(codec)
        for number, seed in enumerate(self.seeds):
            for data in (seed.data, seed.data[:-100], b"", seed.data[:100] + seed.data[140:]):
                path = self.folder / f"warm-{number}{seed.suffix}"
                path.write_bytes(data)
                for model in models().values():
                    with contextlib.suppress(DenselyError):
                        load_weights(model, path)
                path.unlink()

    def choose(self, number: int) -> tuple[Random, Mutation, Seed]:
        random = Random(f"{self.seed}:{number}")
        mutation = MUTATIONS[number % len(MUTATIONS)]
        return random, mutation, random.choice([s for s in self.seeds if mutation.takes(s)])

    def run(self, number: int) -> Outcome:
        """Make a file and load it."""
        random, mutation, seed = self.choose(number)
        case = self.folder / "case"
        case.mkdir()
        path = case / f"file{seed.suffix}"
        try:
            mutation.make(random, seed, path)
            begin = time.perf_counter()
            outcome = self._forked(self.models[seed.target], path, mutation, seed)
            outcome.seconds = time.perf_counter() - begin
            if (case / "canary").exists():
                outcome.fault = "code ran: the canary is there"
            elif not outcome.fault and mutation.expected not in ("either", outcome.result):
                outcome.fault = f"expected '{mutation.expected}'"
            return outcome
        finally:
            shutil.rmtree(case)

    def _forked(self, model: nn.Module, path: Path, mutation: Mutation, seed: Seed) -> Outcome:
        outcome = Outcome(mutation.name, seed.name, "none", "")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                told = json.dumps(_load(model, path)).encode("utf-8", "replace")
            except BaseException:
                told = json.dumps({"fault": traceback.format_exc()[-3000:]}).encode()
            with contextlib.suppress(OSError):
                os.write(writing, told[:60_000])  # fits into the pipe
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            outcome.fault = f"took over {TIMEOUT_S} s" if name == "SIGALRM" else f"crash: {name}"
        else:
            for key, value in json.loads(data).items():
                setattr(outcome, key, value)
        return outcome


def _state(model: nn.Module) -> str:
    """Fingerprint of all that loading may change."""
    found = hashlib.sha256()
    for key, value in model.state_dict().items():
        found.update(key.encode() + value.numpy().tobytes())
    facts = [(name, getattr(m, "eps", 0), m.training) for name, m in model.named_modules()]
    found.update(repr(facts).encode())
    return found.hexdigest()


def _bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0


def _load(model: nn.Module, path: Path) -> dict[str, Any]:
    """In the fork: load the file, watched."""
    before = _state(model)
    seen: list[str] = []
    watching = [False]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching[0]:
            return
        told = f"{event} {arguments[0]!s:.80}" if arguments else event
        writes = event == "open" and (
            "w" in str(arguments[1]) or (isinstance(arguments[2], int) and arguments[2] & 3)
        )
        if writes or (told.startswith(_FORBIDDEN) and not told.startswith(_ALLOWED)):
            seen.append(told)

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _bytes("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(TIMEOUT_S)
    rss = _bytes("VmRSS")
    result, message, fault = "loads", "", None
    watching[0] = True
    try:
        load_weights(model, path)
    except DenselyError as error:
        result, message = "error", str(error)
    except BaseException as error:
        watching[0] = False
        fault = "".join(traceback.format_exception(error))[-3000:]
    watching[0] = False
    signal.alarm(0)
    growth = _bytes("VmHWM") - rss
    if seen:
        fault = f"does what loading may not: {', '.join(seen[:5])}"
    elif fault is None and result == "error":
        fault = _unclear(message, path)
        if _state(model) != before:
            fault = "the model was changed, though it raised"
    if fault is None and growth > GROWTH:
        fault = f"took {growth >> 20} MiB"
    return {"result": result, "message": message[:LONGEST], "fault": fault, "growth": growth}


def _unclear(message: str, path: Path) -> str | None:
    """What is wrong with a message."""
    if len(message) > LONGEST:
        return f"message of {len(message):,} characters"
    if str(path) not in message:
        return "the message does not name the file"
    if "Traceback" in message:
        return "a traceback in the message"
    if not message.replace("\n", "").isprintable():
        return "control characters in the message"
    if len(message) < len(str(path)) + 8:
        return "the message says nothing"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run the file of this number, and print all of it")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(options.seed, Path(folder))
        if options.only is not None:
            outcome = fuzzer.run(options.only)
            print("\n".join(f"{key}: {value}" for key, value in vars(outcome).items()))
            return int(outcome.fault is not None)
        begin = time.perf_counter()
        outcomes = []
        for number in range(options.count):
            outcomes.append(fuzzer.run(number))
            if fault := outcomes[-1].fault:
                what = f"{outcomes[-1].mutation}, {outcomes[-1].seed_file}"
                print(f"FAULT {number} ({what}): {fault}", flush=True)
            if (number + 1) % 500 == 0:
                print(f"{number + 1} files, {time.perf_counter() - begin:.0f} s", flush=True)
        wall_s = time.perf_counter() - begin
    table = summary(outcomes)
    print_table(table)
    faults = [(i, o) for i, o in enumerate(outcomes) if o.fault]
    print(f"{len(outcomes)} files in {wall_s:.0f} s, {len(faults)} faults")
    if options.json:
        result = {
            "command": f"python benchmarks/fuzz_weights.py --count {options.count} "
            f"--seed {options.seed}",
            "environment": environment(choose_runtime("cpu")) | {"command": None},
            "h5py": h5py.version.version,
            "hdf5": h5py.version.hdf5_version,
            "seed": options.seed,
            "count": options.count,
            "wall_s": round(wall_s),
            "slowest_s": round(max(o.seconds for o in outcomes), 2),
            "peak_growth_mib": max(o.growth for o in outcomes) >> 20,
            "mutations": table,
            "faults": [{"number": i, "fault": o.fault, "mutation": o.mutation} for i, o in faults],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(bool(faults))


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """By mutation: files, how many loaded, errors, faults, and the most memory and time."""
    table: dict[str, dict[str, float]] = {}
    for mutation in MUTATIONS:
        these = [o for o in outcomes if o.mutation == mutation.name]
        results = Counter("fault" if o.fault else o.result for o in these)
        if these:
            table[mutation.name] = {
                "files": len(these),
                "error": results["error"],
                "loads": results["loads"],
                "fault": results["fault"],
                "peak_growth_mib": max(o.growth for o in these) >> 20,
                "slowest_s": round(max(o.seconds for o in these), 2),
            }
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    columns = ["files", "error", "loads", "fault", "peak_growth_mib", "slowest_s"]
    print(f"{'mutation':42}" + "".join(f"{column:>16}" for column in columns))
    for name, row in table.items():
        print(f"{name:42}" + "".join(f"{row[column]:>16}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
