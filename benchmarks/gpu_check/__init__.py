"""What a GPU must show: that the fused code is right there, how fast it is, where time goes.

`benchmarks/gpu_check.sh` runs it; it needs PyTorch, Triton and the package, and nothing else.
"""
