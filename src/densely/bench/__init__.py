"""Speed and memory beside the DenseNets of others, in turns, from one command."""
