"""Published weights: fetched from a server of the test's own, resumed, verified, or named."""

import dataclasses
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import densely
from densely.data.preprocessing import Preprocessing
from densely.errors import ConfigError, DataError, DenselyError, WeightsError
from densely.models import build_model
from densely.models.densenet import norm_eps
from densely.weights import PRETRAINED, Pretrained, create_model, pretrained, save_weights
from densely.weights.create import published
from densely.weights.pretrained import fetch, find_pretrained

NAME = "densenet_bc_22_12"


class Server:
    """Serves one file, the first `cut` bytes of it at first."""

    def __init__(self, content: bytes) -> None:
        self.content, self.cut, self.asked = content, None, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
                part = server.content[begin:]
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                cut, server.cut = server.cut, None
                self.wfile.write(part[:cut])

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/net.pth"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes, three channels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    save_weights(build_model(NAME, num_classes=7, stem="large"), path, "torchvision_legacy")
    return path


@pytest.fixture
def server(weights: Path) -> Iterator[Server]:
    server = Server(weights.read_bytes())
    yield server
    server.close()


@pytest.fixture
def entry(server: Server, monkeypatch: pytest.MonkeyPatch) -> Pretrained:
    made = Pretrained(
        NAME,
        "mine",
        "the test",
        server.url,
        hashlib.sha256(server.content).hexdigest()[:12],
        "MIT",
        None,
        Preprocessing(224, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop=0.875),
        num_classes=7,
    )
    monkeypatch.setattr(pretrained, "PRETRAINED", (*PRETRAINED, made))
    return made


def test_fetched_once_then_cached(entry: Pretrained, server: Server, tmp_path: Path) -> None:
    path = fetch(entry)
    assert path == tmp_path / "cache" / "densely" / "weights" / "net.pth"
    assert path.read_bytes() == server.content
    assert fetch(entry) == path
    assert server.asked == 1


def test_goes_on_where_it_was_cut(entry: Pretrained, server: Server) -> None:
    server.cut = 1000
    with pytest.raises(DataError, match="cut after 1000"):
        fetch(entry)
    assert fetch(entry).read_bytes() == server.content


def test_another_file_is_not_believed(entry: Pretrained, server: Server) -> None:
    server.content = b"x" + server.content
    with pytest.raises(DataError, match="another SHA256"):
        fetch(entry)


def test_a_damaged_file_in_the_cache_is_fetched_again(entry: Pretrained, server: Server) -> None:
    path = fetch(entry)
    path.write_bytes(b"damaged")
    assert fetch(entry).read_bytes() == server.content


def test_offline_names_file_and_folder(entry: Pretrained, server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(DataError) as error:
        fetch(entry)
    folder = tmp_path / "cache" / "densely" / "weights"
    assert re.search(rf"Put net\.pth .*{entry.sha256}.* into {folder}", str(error.value))
    assert "DENSELY_DATA" in str(error.value)


def test_a_file_put_there_by_hand_is_found(
    entry: Pretrained, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSELY_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "net.pth").write_bytes(server.content)
    assert fetch(entry) == tmp_path / "weights" / "net.pth"
    assert server.asked == 0
    (tmp_path / "weights" / "net.pth").write_bytes(b"other")
    with pytest.raises(WeightsError, match="not the published file"):
        fetch(entry)


def test_without_a_published_digest(entry: Pretrained, server: Server) -> None:
    bare = dataclasses.replace(entry, sha256=None)
    assert fetch(bare).read_bytes() == server.content
    assert fetch(bare).exists()
    assert server.asked == 1


def test_create_model_with_published_weights(entry: Pretrained, weights: Path) -> None:
    tensors = torch.load(weights, weights_only=True)
    model: Any = create_model(NAME, stem="large", weights="mine")
    assert model.num_classes == 7
    assert torch.equal(model.classifier.weight, tensors["classifier.weight"])
    assert torch.equal(model.features.conv0.weight, tensors["features.conv0.weight"])
    assert model.preprocessing == entry.preprocessing
    assert model.training

    grey: Any = densely.create_model(
        NAME, stem="large", weights="mine", num_classes=3, in_channels=1
    )
    assert (grey.num_classes, grey.in_channels) == (3, 1)
    summed = tensors["features.conv0.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(grey.features.conv0.weight, summed)
    assert grey.preprocessing.channels == 1
    assert grey.preprocessing.mean == pytest.approx((0.2,))

    small: Any = create_model(NAME, stem="large", weights="mine", image_size=96)
    assert small.preprocessing.image_size == 96
    pooled: Any = create_model(NAME, stem="large", weights="mine", num_classes=0)
    assert pooled.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, pooled.feature_channels[-1])


def test_create_model_with_a_file(weights: Path, tmp_path: Path) -> None:
    own: Any = create_model(NAME, weights=weights, stem="large")
    assert own.num_classes == 7  # the file's
    assert own.load_report.skipped == ()
    model: Any = create_model(NAME, weights=weights, num_classes=7, stem="large")
    again: Any = create_model(NAME, weights=str(weights), num_classes=2, stem="large")
    assert torch.equal(model.features.conv0.weight, again.features.conv0.weight)
    assert again.classifier.weight.shape[0] == 2
    assert len(again.load_report.skipped) == 2
    with pytest.raises(ConfigError, match="there is no such file"):
        create_model(NAME, weights=str(tmp_path / "none.pth"))
    with pytest.raises(WeightsError, match="stem='large'"):
        create_model(NAME, weights=weights, num_classes=7)


def test_an_epsilon_that_is_asked_for_stays(tmp_path: Path) -> None:
    model = create_model(NAME, norm_eps=1e-3)
    save_weights(model, tmp_path / "x.safetensors")
    of_file: Any = create_model(NAME, weights=tmp_path / "x.safetensors")
    assert norm_eps(of_file) == {1e-3}
    asked: Any = create_model(NAME, weights=tmp_path / "x.safetensors", norm_eps=2e-5)
    assert norm_eps(asked) == {2e-5}
    assert "stays 2e-05, as asked: the source has 0.001" in str(asked.load_report)
    same: Any = create_model(NAME, weights=tmp_path / "x.safetensors", norm_eps=1e-3)
    assert same.load_report.notes == ()


def test_networks_of_other_kinds_take_the_files_classes(tmp_path: Path) -> None:
    save_weights(create_model("d2l_resnet18", num_classes=3), tmp_path / "x.safetensors")
    model: Any = create_model("d2l_resnet18", weights=tmp_path / "x.safetensors")
    assert model.num_classes == 3
    other: Any = create_model("d2l_resnet18", weights=tmp_path / "x.safetensors", num_classes=2)
    assert len(other.load_report.skipped) == 2


@pytest.mark.parametrize("wrong", [True, 3, {"a": torch.zeros(1)}, Path("/"), "/"])
def test_what_are_no_weights(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="weights"):
        create_model(NAME, weights=wrong)


def test_torchvisions_names_for_weights() -> None:
    for tag in ("IMAGENET1K_V1", "DEFAULT"):
        assert find_pretrained("densenet169", tag).tag == "imagenet"


def test_a_files_stem_is_taken_where_the_preset_leaves_it_open(tmp_path: Path) -> None:
    save_weights(build_model("densenet121", num_classes=4), tmp_path / "x.safetensors")
    model: Any = create_model(
        "densenet121", weights=tmp_path / "x.safetensors", num_classes=4, image_size=48
    )
    assert model.features.conv0.weight.shape[-1] == 7


@pytest.mark.parametrize(
    ("name", "tag", "told"),
    [
        ("densenet121", "imagnet", "did you mean imagenet"),
        ("densenet121", "xray_al", "xray_all"),
        ("d2l", "imagenet", "d2l has no published weights; densenet121"),
        ("densenet264", "imagenet", "has no published weights"),
        ("densenet_121", "imagenet", "did you mean densenet121"),
    ],
)
def test_unknown_names(name: str, tag: str, told: str) -> None:
    with pytest.raises(DenselyError, match=told):
        create_model(name, weights=tag)


def test_the_table_is_sound() -> None:
    assert len({(one.model, one.tag) for one in PRETRAINED}) == len(PRETRAINED)
    assert len({one.file_name for one in PRETRAINED}) == len(PRETRAINED)
    for one in PRETRAINED:
        with torch.device("meta"):
            model: Any = build_model(
                one.model,
                num_classes=one.num_classes,
                in_channels=one.preprocessing.channels,
                image_size=one.preprocessing.image_size,
            )
        assert model.classifier.out_features == one.num_classes
        assert one.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}|None", str(one.sha256))
        assert one.licence in ("BSD-3-Clause", "Apache-2.0")
        assert find_pretrained(one.model, one.tag) is one
    assert {one.model for one in PRETRAINED if one.tag == "imagenet"} == {
        "densenet121", "densenet161", "densenet169", "densenet201",
    }  # fmt: skip


def test_only_labels_that_were_trained_are_named() -> None:
    labels = {one.tag: [name for name in one.labels if name] for one in PRETRAINED if one.labels}
    assert {tag: len(names) for tag, names in labels.items()} == {
        "xray_all": 18, "xray_nih": 14, "xray_pc": 15, "xray_chex": 11, "xray_rsna": 2,
        "xray_mimic_nb": 11, "xray_mimic_ch": 11,
    }  # fmt: skip
    assert labels["xray_rsna"] == ["Pneumonia", "Lung Opacity"]
    assert all(len(one.labels) in (0, one.num_classes) for one in PRETRAINED)


def test_a_tag_is_a_tag_where_a_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").mkdir()
    found = published("densenet121", "imagenet")
    assert found is not None
    assert found.tag == "imagenet"
