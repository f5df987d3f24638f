"""Which code runs the four steps of a DenseNet. A fused backend plugs in here, and only here.

Accelerated modules look each step up in this file when they run. So far all run plain PyTorch
(`densely.fused.plain`, which also says what each step must equal). A fused step takes the same
arguments and decides by them: device, dtype, modes of the norms.
"""

from densely.fused.plain import dense_block, final, stem, transition

__all__ = ["dense_block", "final", "stem", "transition"]
