"""What is measured: three networks, each at the images that it was made for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Net:
    """A network to measure.

    Args:
        name: as `densely bench --net` takes it.
        model: as `densely.create_model` takes it.
        in_channels: channels of the images.
        image_size: side of the images in pixels.
        num_classes: outputs.
        cpu_batch: images of a step on a CPU, unless told otherwise.
        reference: the variant that ratios are against: what people run who tune nothing.
    """

    name: str
    model: str
    in_channels: int
    image_size: int
    num_classes: int
    cpu_batch: int
    reference: str

    def batch(self, device_type: str) -> int:
        """Images of a step, unless told otherwise."""
        return self.cpu_batch if device_type == "cpu" else 256


NETS = {
    net.name: net
    for net in (
        Net("densenet121", "densenet121", 3, 224, 1000, 8, "torchvision"),
        Net("d2l", "d2l", 1, 96, 10, 64, "plain net"),
        Net("bc_100_12", "densenet_bc_100_12", 3, 32, 10, 64, "plain net"),
    )
}
MODES = ("train", "inference")
