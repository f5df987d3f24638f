"""What a compiler or an export was given: densely's operators in it."""

from torch._ops import OpOverload
from torch.fx import GraphModule


class KeepsGraphs:
    """A backend of torch.compile that runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, _inputs: object) -> GraphModule:
        self.graphs.append(graph)
        return graph


def operators(graph: GraphModule) -> set[str]:
    """Names of densely's operators in a graph and in those within it."""
    return {
        node.target.name()
        for each in graph.modules()
        if isinstance(each, GraphModule)
        for node in each.graph.nodes
        if isinstance(node.target, OpOverload) and node.target.namespace == "densely"
    }
