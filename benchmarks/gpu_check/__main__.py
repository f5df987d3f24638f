"""One stage: `python -m gpu_check STAGE OUTDIR`, as benchmarks/gpu_check.sh calls it."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from densely.fused import swap
from gpu_check import at_once, correct, each_kernel, profiles, speed, traffic, trainings, tune
from gpu_check.setting import NETS, Setting
from gpu_check.turns import Turns

STAGES = {
    "all": at_once.run,
    "correct": correct.run,
    "speed": speed.run,
    "profile": profiles.run,
    "kernels": each_kernel.run,
    "traffic": traffic.run,
    "tune": tune.run,
    "chapter": trainings.chapter,
    "cifar": trainings.cifar,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; later work is left")
    parser.add_argument("--nets", default=",".join(NETS), help="some of them, in this order")
    parser.add_argument("--dtypes", default="bfloat16,float32,float16", help="of `correct`")
    parser.add_argument("--kernels", default="triton", help="the set to be forced; auto for none")
    parser.add_argument("--compile", default="default,max-autotune", help="modes; empty for none")
    parser.add_argument("--modes", default="train,inference", help="of `speed`")
    parser.add_argument("--variants", default="", help="of `speed`: these alone, by their names")
    parser.add_argument("--kinds", default="", help="of `tune`: some of them, by their names")
    parser.add_argument("--train", default="", help="more words for `densely train`, in one string")
    parser.add_argument("--turns", type=Path, help="file of processes that share the GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny nets on the CPU: a dry run")
    options = parser.parse_args()
    if unknown := set(options.nets.split(",")) - set(NETS):
        parser.error(f"--nets: {', '.join(unknown)} not among {', '.join(NETS)}")
    variants = tuple(filter(None, options.variants.split(",")))
    known = speed.names(options.compile.split(","))
    if unknown := set(variants) - set(known):
        parser.error(f"--variants: {', '.join(unknown)} not among {', '.join(known)}")
    kinds = tuple(filter(None, options.kinds.split(",")))
    if unknown := set(kinds) - set(tune.KINDS):
        parser.error(f"--kinds: {', '.join(unknown)} not among {', '.join(tune.KINDS)}")
    if not (options.smoke or options.stage == "traffic" or torch.cuda.is_available()):
        parser.error("no CUDA GPU is here; --smoke is a dry run on the CPU")
    if options.smoke:
        torch.set_num_threads(1)  # of a machine that has other work too
        swap.LEAST = 0  # the tiny nets run what large ones do
    options.out.mkdir(parents=True, exist_ok=True)
    return STAGES[options.stage](
        Setting(
            out=options.out,
            nets=tuple(NETS[name] for name in options.nets.split(",")),
            dtypes=tuple(getattr(torch, name) for name in options.dtypes.split(",")),
            kernels=options.kernels,
            compile_modes=tuple(filter(None, options.compile.split(","))),
            modes=tuple(options.modes.split(",")),
            variants=variants,
            kinds=kinds,
            budget_s=options.budget,
            smoke=options.smoke,
            train=tuple(shlex.split(options.train)),
            turns=Turns(options.turns),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
