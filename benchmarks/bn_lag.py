"""How far the running statistics of batch normalisation lag behind the weights of a run.

    python benchmarks/bn_lag.py runs/d2l-001 [FILE.json]

Judges the weights of the last checkpoint on the test split twice: with the running statistics, as
always, and with statistics taken over the test images alone, batch by batch.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from densely.data import load_data
from densely.runtime import choose_runtime
from densely.training.checkpoint import load_model
from densely.training.run import RunDirectory
from densely.training.scoring import BATCH_SIZE, score, score_of


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    run = RunDirectory.open(Path(sys.argv[1]))
    config, runtime = run.config(), choose_runtime()
    model, info = load_model(run.last)
    model = runtime.place(model)
    data_dir = Path(config.data_dir) if config.data_dir else None
    test = load_data(config.data, data_dir=data_dir, split_seed=config.split_seed).test
    running = score_of(model, test, info.preprocessing, runtime)

    model.train()
    outputs = []
    with torch.no_grad(), runtime.autocast():
        for batch in torch.split(test.images, BATCH_SIZE):
            outputs.append(model(runtime.layout(info.preprocessing(batch))).float())
    own = score(torch.cat(outputs), test.labels)
    result = {
        "epoch": run.rows()[-1].epoch,
        "running_statistics": asdict(running),
        "batch_statistics": asdict(own),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) == 3:
        Path(sys.argv[2]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
