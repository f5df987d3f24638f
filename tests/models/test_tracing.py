"""Own networks under torch.fx and TorchScript."""

import peers
import pytest
import torch
from torch import fx, nn

import densely
from densely.errors import ShapeError
from densely.models import DenseNet

NETS = {
    "d2l": (1, 32),
    "densenet_bc_22_12": (3, 16),
    "d2l_resnet18": (1, 32),
}


def net_of(name: str, fused: bool = True) -> tuple[nn.Module, torch.Tensor]:
    channels, size = NETS[name]
    options = {} if name == "d2l_resnet18" else {"fused": fused}
    torch.manual_seed(0)
    net = densely.create_model(name, in_channels=channels, num_classes=4, **options)
    return net.eval(), torch.randn(2, channels, size, size)


@pytest.mark.parametrize("name", NETS)
def test_fx_traces_a_network_and_leaves_the_check_out(name: str) -> None:
    net, x = net_of(name)
    traced = fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match="expected"):
        net(x[:, :, 0])


def test_torchvision_takes_features_from_a_network_of_ours() -> None:
    peers.torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    net, x = net_of("densenet_bc_22_12")
    (maps,) = create_feature_extractor(net, ["features.transition1.conv"])(x).values()
    wanted: list[torch.Tensor] = []
    net.features.transition1.register_forward_hook(lambda _, args, out: wanted.append(out))
    net(x)
    torch.testing.assert_close(maps, wanted[0], rtol=1e-4, atol=1e-4)


def test_one_axis_of_an_export_may_be_dynamic() -> None:
    net = DenseNet(block_config=(2, 2), growth_rate=8, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    sizes = ({2: torch.export.Dim("height", min=64, max=640)},)
    exported = torch.export.export(net, (x,), dynamic_shapes=sizes).module()
    taller = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(exported(taller), net(taller), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_the_residual_network_can_be_scripted() -> None:
    net, x = net_of("d2l_resnet18")
    torch.testing.assert_close(torch.jit.script(net)(x), net(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_plain_or_restored_network_can_be_scripted(dims: int) -> None:
    torch.manual_seed(0)
    net = DenseNet(spatial_dims=dims, in_channels=2, block_config=(2, 2), growth_rate=4).eval()
    densely.restore(net)
    x = torch.randn(2, 2, *(32,) * dims)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x), rtol=0, atol=0)
