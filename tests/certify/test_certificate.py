"""What certify produces is verified, deterministic, within its limits, and about the map that the model computes."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stableopt.certify import Certificate, certify, fold, load, verifier
from stableopt.certify.files import decode_weights, encode_weights
from stableopt.certify.program import Builder, Value
from stableopt.certify.verifier.files import to_float64
from stableopt.constraints import SpectralBall
from stableopt.errors import CertificateError, UncertifiableError
from stableopt.nn import GradientBlock, GroupSort, constrain, lipschitz, stabilize
from tests.certify.models import DTYPES, models, rich_model
from tests.certify.oracle import operator_matrix


@settings(max_examples=60)
@given(models(), st.sampled_from([None, 1.0, 0.3]))
def test_what_certify_makes_is_verified_and_bounds_the_map(
    case: tuple[nn.Sequential, tuple[int, ...]], target: float | None
) -> None:
    model, shape = case
    cert = certify(model, shape, lipschitz=target)
    result = verifier.check(cert.certificate, lambda _: cert.weights)
    assert result.verified, result.reason
    assert result.lipschitz == cert.lipschitz
    assert target is None or cert.lipschitz <= target
    plain = cert.module().double()
    x, y = torch.randn(8, *shape), torch.randn(8, *shape)
    y[:4] = x[:4] + 1e-4 * y[:4]
    with torch.no_grad():
        change = (plain(x) - plain(y)).flatten(1).norm(dim=1)
    assert bool((change <= cert.lipschitz * (x - y).flatten(1).norm(dim=1) * (1 + 1e-9) + 1e-14).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_module_computes_what_the_model_computes_in_evaluation_mode(dtype: torch.dtype) -> None:
    model, shape = rich_model(dtype)
    model.insert(1, nn.Dropout(0.5))
    cert = certify(model, shape)
    plain = cert.module()
    x = torch.randn(5, *shape, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(x), model.eval()(x), atol=20 * torch.finfo(dtype).eps, rtol=20 * torch.finfo(dtype).eps
        )
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert not any(p.requires_grad for p in plain.parameters())
    assert not plain.training


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_limits_the_stored_numbers_are_the_numbers_of_the_model(dtype: torch.dtype) -> None:
    model, shape = rich_model(dtype)
    stored = safetensors.torch.load(certify(model, shape).weights)  # the reference reader of the format
    for name, value in stored.items():
        assert value.dtype == dtype
        assert value.equal(model.get_parameter(name))
    assert set(stored) == {n for n, _ in model.named_parameters() if not n.endswith("raw_step")}


def test_certifying_changes_nothing_in_the_model() -> None:
    model, shape = rich_model()
    stabilize(model, 1.0)
    model.train()
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    certify(model, shape, lipschitz=0.5)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert random.equal(torch.random.get_rng_state())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_changing_the_model_or_the_module_does_not_change_the_certificate() -> None:
    model, shape = rich_model()
    cert = certify(model, shape)
    weights = cert.weights
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        next(cert.module().parameters()).mul_(2.0)
    assert Certificate(cert.certificate, encode_weights(cert.program.tensors)).weights == weights


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    (model, shape), (again, _) = rich_model(), rich_model()
    first, second = certify(model, shape), certify(again, list(shape))
    assert first.certificate == second.certificate
    assert first.weights == second.weights
    first.save(tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert (loaded.certificate, loaded.weights) == (first.certificate, first.weights)
    torch.testing.assert_close(loaded.module().state_dict(), first.module().state_dict(), rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["model.cert.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [1.0, 0.9, 3.0])
def test_a_stabilized_model_reaches_its_target_in_its_own_dtype(dtype: torch.dtype, target: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        GroupSort(),
        nn.Flatten(),
        nn.Linear(32, 16),
        GroupSort(),
        GradientBlock(16),
        nn.Linear(16, 4),
    )
    stabilize(model.to(dtype), target).eval()
    cert = certify(model, (2, 8))
    assert cert.lipschitz <= target
    assert cert.lipschitz > 0.9 * target
    x = torch.randn(4, 2, 8, dtype=dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        torch.testing.assert_close(cert.module()(x), model(x), atol=tolerance * 4 + 1e-7, rtol=tolerance * 4 + 1e-7)


@pytest.mark.parametrize("by", ["parametrization", "projection"])
def test_the_limit_of_a_constraint_is_kept(by: str) -> None:
    layer = nn.Linear(6, 6)
    nn.init.orthogonal_(layer.weight)
    constrain(layer, "weight", SpectralBall(0.75), by=by)
    cert = certify(layer, (6,))
    assert cert.lipschitz <= 0.75
    assert cert.lipschitz > 0.7499 or by == "parametrization"


def test_the_certificate_is_as_sharp_as_the_rules_of_the_modules() -> None:
    """And sharper for convolutions, whose norm is that for images of the declared size."""
    model, shape = rich_model(torch.float64)
    assert certify(model, shape).lipschitz <= lipschitz(model).upper * (1 + 1e-6)
    dense = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert certify(dense, (5,)).lipschitz == pytest.approx(lipschitz(dense).upper, rel=1e-6)


def test_an_orthogonal_convolution_is_accepted_with_its_own_numbers() -> None:
    layer = stabilize(nn.Conv2d(4, 4, 3, padding=1), 1.0, method="bcop")
    cert = certify(layer, (4, 5, 5))
    assert lipschitz(layer).upper <= 1.0
    assert 0.999 < cert.lipschitz <= 1.0
    [stored] = [value for value in cert.program.tensors.values() if value.ndim == 4]
    torch.testing.assert_close(stored, layer.weight.detach(), rtol=1e-8, atol=0)


def test_one_times_one_is_one() -> None:
    assert certify(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Flatten()), (3,)).lipschitz == 1.0
    block = GradientBlock(4)
    assert certify(nn.Sequential(block, nn.ReLU(), GradientBlock(4, activation="tanh")), (4,)).lipschitz == 1.0


def test_only_the_largest_norms_are_lowered_to_reach_a_target() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(8 * torch.eye(3))
        model[2].weight.copy_(0.5 * torch.eye(3))
    cert = certify(model, (3,), lipschitz=2.0)
    stored = decode_weights(cert.weights)
    assert stored["2.weight"].equal(model[2].weight)
    torch.testing.assert_close(stored["0.weight"], 4 * torch.eye(3), rtol=1e-8, atol=0)
    assert 2.0 * (1 - 1e-8) < cert.lipschitz <= 2.0


def test_a_tied_layer_is_stored_once_and_counted_twice() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.eye(3))
    cert = certify(nn.Sequential(layer, nn.ReLU(), layer), (3,))
    assert cert.lipschitz == pytest.approx(4.0)
    assert len(cert.layers) == 3
    assert sum(v.numel() for v in decode_weights(cert.weights).values()) in {9, 18}


def test_huge_and_tiny_weights_are_certified() -> None:
    for scale in (1e-300, 1e-160, 1e160, 1e300):
        layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(scale * torch.eye(2))
        assert certify(layer, (2,)).lipschitz == pytest.approx(scale)


def test_a_zero_layer_makes_the_constant_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    assert certify(model, (2,)).lipschitz == 0.0


# ----------------------------------------------------------------------------------------------------------- refusals


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


class Halved(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return 0.5 * super().forward(input)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(Strange())), ["'1.0'", "Strange", "multiplied"]),
        (nn.Sequential(Halved(4, 4)), ["'0'", "Halved", "overrides"]),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), ["BatchNorm1d", "running statistics"]),
        (
            nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")),
            ["Conv1d", "reflect"],
        ),
        (nn.Sequential(), ["no layer"]),
        (nn.Sequential(nn.Dropout()), ["no layer"]),
    ],
)
def test_what_has_no_rule_is_refused_with_its_name_and_path(model: nn.Module, words: list[str]) -> None:
    with pytest.raises(UncertifiableError) as refusal:
        certify(model, (4,))
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(2, 2, 3, padding=2, padding_mode="circular"),
    ],
)
def test_settings_without_a_proof_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UncertifiableError, match="pad"):
        certify(layer, (2, 8))


def test_a_forward_hook_is_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UncertifiableError, match="hook"):
        certify(layer, (2,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    for name in ("weight", "bias"):
        model = nn.Sequential(nn.Linear(2, 2))
        with torch.no_grad():
            getattr(model[0], name)[0] = value
        with pytest.raises(ValueError, match=f"0.{name}"):
            certify(model, (2,))


@pytest.mark.parametrize("shape", [(), (0,), (-1,), (2.0,), (True,), 3, "ab", (3,), (2, 3)])
def test_wrong_input_shapes_are_refused(shape: object) -> None:
    with pytest.raises(ValueError, match="shape"):
        certify(nn.Sequential(nn.Linear(2, 2)), shape)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_wrong_targets_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="lipschitz"):
        certify(nn.Linear(2, 2), (2,), lipschitz=target)


def test_a_target_that_no_weight_can_reach_is_refused() -> None:
    with pytest.raises(UncertifiableError, match="no weight"):
        certify(nn.ReLU(), (2,), lipschitz=0.5)


def test_a_rule_of_the_user_is_used() -> None:
    class Mine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    @fold.register(Mine)
    def _(_module: Mine, graph: Builder, value: Value) -> Value:
        value = graph.add("linear", value, weight=torch.eye(value.shape[0]) * 2, bias=None, transposed=False)
        return graph.add("scale", value, factor=-0.5)

    cert = certify(nn.Sequential(nn.Linear(2, 3), Mine()), (2,))
    assert [node["op"] for node in cert.layers] == ["linear", "linear", "scale"]
    assert sorted(decode_weights(cert.weights)) == ["0.bias", "0.weight", "1.weight"]


def test_a_rule_that_computes_something_else_is_refused() -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    @fold.register(Other)
    def _(_module: Other, graph: Builder, value: Value) -> Value:
        return graph.add("scale", value, factor=-0.999999)

    with pytest.raises(UncertifiableError, match="comput"):
        certify(nn.Sequential(nn.Linear(2, 3), Other()), (2,))


# ----------------------------------------------------------------------------------------------------------- files


def test_loading_what_is_missing_or_damaged_is_a_certificate_error(tmp_path: Path) -> None:
    cert = certify(nn.Linear(2, 2), (2,))
    with pytest.raises(CertificateError, match="cannot be read"):
        load(tmp_path)
    weights, path = cert.save(tmp_path)
    weights.write_bytes(cert.weights + b"\0")
    with pytest.raises(CertificateError, match="digest"):
        load(tmp_path)
    cert.save(tmp_path)
    assert load(tmp_path).lipschitz == cert.lipschitz
    path.write_text("{}")
    with pytest.raises(CertificateError, match="rejected"):
        load(tmp_path)


def test_weights_are_written_before_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A death between the two leaves new weights with the old certificate, which does not fit: rejected, not wrong."""
    old, new = certify(nn.Linear(2, 2), (2,)), certify(nn.Linear(3, 3), (3,))
    old.save(tmp_path)
    replaced: list[str] = []
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        replaced.append(target.name)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path)
    assert replaced == ["model.safetensors", "model.cert.json"]
    assert (tmp_path / "model.safetensors").read_bytes() == new.weights
    with pytest.raises(CertificateError, match="digest"):
        load(tmp_path)


def test_files_are_as_readable_as_the_folder_wants(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        weights, path = certify(nn.Linear(1, 1), (1,)).save(tmp_path)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in (weights, path)} == {0o644}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_survive_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randn(3, 2).to(dtype),
        "a": torch.tensor([-0.0, 1e-7]).to(dtype),
        "c": torch.randn(2, 5).to(dtype).T,
    }
    data = encode_weights(tensors)
    assert data == encode_weights(dict(reversed(tensors.items())))
    for read in (decode_weights(data), safetensors.torch.load(data)):
        for name, value in tensors.items():
            assert read[name].dtype == dtype
            assert read[name].shape == value.shape
            assert read[name].contiguous().view(torch.uint8).equal(value.contiguous().view(torch.uint8))
    exact = {name: to_float64(*entry) for name, entry in verifier.parse_weights(data).items()}
    for name, value in tensors.items():
        assert (exact[name] == value.double().numpy()).all()


def test_the_file_says_what_it_claims_and_what_it_does_not() -> None:
    document = json.loads(certify(nn.Linear(2, 2), (2,)).certificate)
    assert set(document) == {"_type", "subject", "predicateType", "predicate"}
    assert document["predicate"]["claims"].keys() == {"proved", "replayable", "attested"}
    assert "accuracy" in document["predicate"]["not_claimed"]
    assert len(document["predicate"]["assumptions"]) == 5
    assert document["predicate"]["schema"] == 2
    assert "created" not in json.dumps(document)


def test_an_affine_conv_net_has_its_true_constant_below_the_claim() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(3, 2, 2, stride=2), nn.Flatten(), nn.Linear(8, 2)
    )
    true = np.linalg.norm(operator_matrix(model, (1, 8, 8)), 2)
    assert true <= certify(model, (1, 8, 8)).lipschitz


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_paddings_are_folded_into_numbers(padding: str) -> None:
    layer = nn.Conv1d(1, 1, 5, dilation=2, padding=padding)
    cert = certify(layer, (1, 12))
    assert cert.layers[0]["padding"] == [4 if padding == "same" else 0]
    x = torch.randn(2, 1, 12)
    with torch.no_grad():
        torch.testing.assert_close(cert.module()(x), layer(x))


def test_a_network_is_deployed_only_in_a_runtime_of_its_certificate() -> None:
    cert = certify(nn.Linear(2, 2), (2,), runtimes=("float32",))
    document = json.loads(cert.certificate)
    assert [entry["name"] for entry in document["predicate"]["runtimes"]] == ["float32"]
    assert document["predicate"]["runtimes"][0]["u_acc"] == (2.0**-24).hex()
    assert cert.deploy("float32").predict(torch.zeros(1, 2)).reasons[0] is not None
    with pytest.raises(CertificateError, match="not made for the runtime 'bfloat16'"):
        cert.deploy("bfloat16")
    with pytest.raises(ValueError, match="float8"):
        certify(nn.Linear(2, 2), (2,), runtimes=("float8",))


def test_a_dissipative_matrix_has_its_logarithmic_norm_claimed() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(
            torch.tensor([[-1.0, 5.0, 0.0], [-5.0, -2.0, 0.0], [0.0, 0.0, -0.5]])
        )  # skew part and -1, -2, -0.5
    [claim] = [claim for claim in certify(layer, (3,)).claims["proved"] if claim["id"] == "lognorm"]
    assert -0.5 < claim["mu"] < -0.5 + 1e-7
    with torch.no_grad():
        layer.weight[2, 2] = 0.5
    assert not [claim for claim in certify(layer, (3,)).claims["proved"] if claim["id"] == "lognorm"]
    assert not [claim for claim in certify(nn.Linear(3, 2), (3,)).claims["proved"] if claim["id"] == "lognorm"]
