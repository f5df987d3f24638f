"""What keeping freed memory in the process is worth: step time and peak memory, with and without.

    python benchmarks/bench_memory_reuse.py

The training step of the chapter's net, batch 256, in turns, each in a process of its own.
Writes benchmarks/results/memory-reuse-cpu.json.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS, STEPS, WARM_UP = 3, 8, 3


def child(keep: bool, precision: str) -> None:
    import torch

    from densely import create_model
    from densely.runtime import choose_runtime, keep_freed_memory

    if keep and not keep_freed_memory():
        sys.exit("keep_freed_memory() has no effect here")
    runtime = choose_runtime("cpu", precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = runtime.place(create_model("d2l"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.rand(256, 1, 96, 96), torch.randint(0, 10, (256,))
    seconds = []
    for _ in range(WARM_UP + STEPS):
        begin = time.perf_counter()
        with runtime.autocast():
            logits = model(runtime.layout(images))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"step_ms": 1000 * statistics.median(seconds[WARM_UP:]), "peak_mb": peak_mb}))


def main() -> None:
    if len(sys.argv) == 3:
        return child(sys.argv[1] == "keep", sys.argv[2])

    from bench_chapter import last_line

    from densely.environment import environment
    from densely.runtime import choose_runtime

    cases = [(keep, precision) for precision in ("bfloat16", "float32") for keep in ("", "keep")]
    found: dict[str, list[dict[str, float]]] = {f"{p} {k}".strip(): [] for k, p in cases}
    for _ in range(ROUNDS):
        for keep, precision in cases:
            values = last_line([sys.executable, __file__, keep, precision])
            found[f"{precision} {keep}".strip()].append(values)
            print(precision, keep, values, flush=True)
    result = {
        "command": "python benchmarks/bench_memory_reuse.py",
        "environment": environment(choose_runtime("cpu")) | {"command": None},
        "cases": {
            name: {
                "step_ms": round(statistics.median(v["step_ms"] for v in values), 1),
                "peak_mb": round(statistics.median(v["peak_mb"] for v in values)),
            }
            for name, values in found.items()
        },
    }
    path = HERE / "results" / "memory-reuse-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
