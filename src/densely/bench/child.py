"""The fresh process in which the peak memory of one variant is taken: `python -m` this module.

Takes a `ChildTask` as JSON and prints one JSON line.
"""

import json
import sys
import warnings

import torch

from densely.bench.nets import NETS
from densely.bench.peak import ChildTask, added_to_process
from densely.bench.trial import make_trial
from densely.bench.variants import find
from densely.runtime import keep_freed_memory


def main() -> None:
    """Run the task that the command line names."""
    warnings.simplefilter("ignore")
    task = ChildTask(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    if task.allocator == "keep":
        keep_freed_memory()
    net = NETS[task.net]
    trial = make_trial(find(net, task.variant, task.device), net, task.mode, task.batch)
    print(json.dumps({"peak_bytes": added_to_process(trial)}))


if __name__ == "__main__":
    main()
