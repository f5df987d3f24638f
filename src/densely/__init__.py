"""densely: DenseNets for PyTorch, to learn, train, explain and serve them."""

__version__ = "0.1.0"
