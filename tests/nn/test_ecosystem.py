"""Stabilized models in what people train with: compiled, exported, saved, averaged, in Lightning, accelerate and HF's Trainer.

The parts that need a package which is not installed are skipped. Row 65 and 67 of the table of bad inputs are here.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from stableopt.nn import METHODS, GroupSort, lipschitz
from stableopt.nn.export import export, plain_state_dict, release
from stableopt.nn.limits import limited_slots
from stableopt.nn.slots import find_slots
from tests.nn.methods import CASES, LIMIT, assert_within, inputs, limited, norm_of
from tests.nn.zoo import ANIMALS, mlp, stabilize

METHOD_OF = [{}, {"budget": "learned"}, {"method": "frobenius"}, {"norm": "linf"}]
COMPILED = [name for name in ANIMALS if "lstm" not in name and "rnn" not in name and "gru" not in name]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), GroupSort(), nn.Linear(8, 2))


def data(n: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return x, (x[:, 0] > 0).long()


def trained(model: nn.Module, x: Tensor, steps: int = 3) -> list[float]:
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------------------- each method, everywhere

every_method = pytest.mark.parametrize(("method", "kind"), CASES)
"""Each method on matrices and on kernels, where it has them."""

each_traced = pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(*case, marks=() if case[1] == "linear" or case[0] in {"gram", "bcop"} else pytest.mark.slow)
        for case in CASES
    ],
)
"""For what torch traces: each method once, and one of them on both; the others in the longer run."""


def moved(method: str, kind: str) -> nn.Sequential:
    """A model after some steps, so that its numbers are those of no beginning."""
    model = limited(method, kind)
    trained(model, inputs())
    return model.zero_grad() or model  # type: ignore[func-returns-value, return-value]


def exact(method: str) -> bool:
    return METHODS[method].by_construction


def settled(method: str, kind: str) -> nn.Sequential:
    """The same, with the vectors of an estimate close to where they do not move any more."""
    model = moved(method, kind)
    with torch.no_grad():
        for _ in range(0 if exact(method) else 300):
            model(inputs())
    return model


@every_method
def test_no_parameter_is_dead(method: str, kind: str) -> None:
    model = moved(method, kind)
    model(inputs()).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
        if "original" in name and kind == "linear":  # what a method ignores of its original, it ignores for all models
            rows = p.grad.flatten(1).any(1) if p.ndim > 1 else p.grad != 0
            assert rows.all(), name


@every_method
def test_a_copy_is_a_model_of_its_own(method: str, kind: str) -> None:
    model, x = moved(method, kind), inputs()
    before, y = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(x)
    clone = copy.deepcopy(model)
    trained(clone, x)
    release(clone)
    assert not torch.equal(clone(x), y)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(x), y, rtol=0, atol=0)


@every_method
@pytest.mark.parametrize("use_buffers", [False, True])
def test_64_the_average_of_a_training_keeps_the_limit(method: str, kind: str, use_buffers: bool) -> None:
    model, x = limited(method, kind), inputs()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
    )
    for _ in range(3):
        trained(model, x, 1)
        average.update_parameters(model)
    assert not torch.equal(average(x), model(x))
    average.eval()
    assert_within(average, norm_of(method))
    assert lipschitz(export(average.module), norm_of(method)).upper <= LIMIT


@every_method
def test_a_state_dict_is_all_there_is(method: str, kind: str) -> None:
    model, x = moved(method, kind), inputs()
    fresh = limited(method, kind)
    missing, unexpected = fresh.load_state_dict(model.state_dict(), strict=True)
    assert not missing
    assert not unexpected
    for one, other in ((fresh, model), (fresh.eval(), model.eval()), (fresh.train(), model.train())):
        torch.testing.assert_close(one(x), other(x), rtol=0, atol=0)
    assert trained(fresh, x) == trained(model, x)


@every_method
def test_50_meta_device_then_to_empty_then_load(method: str, kind: str) -> None:
    source, x = moved(method, kind), inputs()
    with torch.device("meta"):
        empty, later = limited(method, kind), limited(method, kind)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert empty[0 if kind == "linear" else 1].weight.is_meta
    empty.to_empty(device="cpu").load_state_dict(source.state_dict())
    later.load_state_dict(source.state_dict(), assign=True)
    for model in (empty, later):
        torch.testing.assert_close(model.eval()(x), source.eval()(x), rtol=0, atol=0)
        trained(model.train(), x, 1)
        assert lipschitz(export(model), norm_of(method)).upper <= LIMIT


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_49_the_limit_holds_for_the_numbers_of_another_dtype(method: str, kind: str, dtype: torch.dtype) -> None:
    model, x = moved(method, kind).to(dtype), inputs(dtype=dtype)
    for step in range(2):
        if exact(method):
            assert_within(model, norm_of(method))
        assert_within(copy.deepcopy(model).eval(), norm_of(method))
        assert model(x).dtype == dtype
        plain = export(model)
        assert lipschitz(plain, norm_of(method)).upper <= LIMIT
        assert all(p.dtype == dtype for p in plain.parameters())
        if not step:
            trained(model, x, 1)
    wide = model.double()
    assert lipschitz(export(wide), norm_of(method)).upper <= LIMIT
    assert wide(inputs()).dtype == torch.float64


@every_method
def test_68_autocast_leaves_the_weights_in_full_precision(method: str, kind: str) -> None:
    model, x = moved(method, kind).float(), inputs(dtype=torch.float32)
    twin = copy.deepcopy(model)
    for slot, same in zip(find_slots(model), find_slots(twin), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = slot.value
        torch.testing.assert_close(inside, same.value, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


@every_method
@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")  # torch's own derivatives
def test_69_functional_transforms_of_each_method(method: str, kind: str) -> None:
    from torch.func import functional_call, grad, jvp, vmap

    model, x = settled(method, kind), inputs()
    params = {key: p.detach() for key, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).square().sum()

    before = {key: b.clone() for key, b in model.named_buffers()}
    g = grad(loss)(params, x)
    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x[:, None])
    tangent = {key: torch.randn_like(p) for key, p in params.items()}
    value, derivative = jvp(lambda p: loss(p, x), (params,), (tangent,))
    both = vmap(lambda p: functional_call(model, p, (x,)))({key: torch.stack([p, p]) for key, p in params.items()})
    for key, b in model.named_buffers():
        torch.testing.assert_close(b, before[key], rtol=0, atol=0)
    model(x).square().sum().backward()
    near = {"rtol": 1e-9, "atol": 1e-11} if exact(method) else {"rtol": 1e-5, "atol": 1e-5}
    for key, p in model.named_parameters():
        torch.testing.assert_close(g[key], p.grad, **near)  # type: ignore[arg-type]
    torch.testing.assert_close({key: v.sum(0) for key, v in per_sample.items()}, g)
    # forward mode differentiates the vectors of an estimate, reverse mode takes them as constants
    near = near if exact(method) else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(derivative, sum((g[key] * tangent[key]).sum() for key in g), **near)  # type: ignore[arg-type]
    torch.testing.assert_close(value, both[0].square().sum())
    torch.testing.assert_close(both[0], both[1])


@each_traced
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_training_of_each_method(method: str, kind: str, backend: str) -> None:
    torch._dynamo.reset()
    model, x = moved(method, kind), inputs()
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own code
        compiled = trained(torch.compile(twin, fullgraph=True, backend=backend), x)
    assert compiled == pytest.approx(trained(model, x), rel=1e-10 if exact(method) else 0.02)
    assert lipschitz(export(twin), norm_of(method)).upper <= LIMIT


@every_method
def test_two_forwards_of_each_method_before_one_backward(method: str, kind: str) -> None:
    model, x = settled(method, kind), inputs()
    (model(x).square().sum() + model(-x).sin().sum()).backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    model(-x).sin().sum().backward()
    near = {} if exact(method) else {"rtol": 1e-5, "atol": 1e-5}
    for key, p in model.named_parameters():
        torch.testing.assert_close(together[key], p.grad, **near)  # type: ignore[arg-type]


@every_method
def test_65_safetensors_of_each_method(method: str, kind: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = moved(method, kind), inputs()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.save_file(model.state_dict(), str(tmp_path / "state.safetensors"))  # refuses shared memory
    fresh = limited(method, kind)
    safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=0, atol=0)


@each_traced
def test_67_torch_export_of_each_method(method: str, kind: str) -> None:
    model, x = moved(method, kind).float(), inputs(dtype=torch.float32)
    plain = export(model).eval()
    program = torch.export.export(plain, (x,))
    torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    reference = torch.export.export(release(copy.deepcopy(model)).eval(), (x,))
    assert len(program.graph.nodes) == len(reference.graph.nodes)
    if exact(method):  # without export() as well, with the map in the graph
        direct = torch.export.export(model, (x,))
        torch.testing.assert_close(direct.module()(x), model(x), rtol=1e-5, atol=1e-6)
        assert len(direct.graph.nodes) > len(program.graph.nodes)


@every_method
def test_67_onnx_after_export_of_each_method(method: str, kind: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = moved(method, kind).float(), inputs(dtype=torch.float32)
    if kind == "linear":  # the sorting of GroupSort has its own translation
        model[1] = nn.ReLU()
    plain = export(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ each layer, everywhere


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if "1d" in n or "3d" in n else n for n in COMPILED]
)
def test_compiled_training_without_graph_breaks_is_training(name: str) -> None:
    torch._dynamo.reset()
    animal = ANIMALS[name]
    model, x = animal.stabilized(0.7), animal.x()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    expected = trained(model, x)
    assert trained(compiled, x) == pytest.approx(expected, rel=1e-12)
    for slot in find_slots(twin):
        for part in slot.matrices(slot.value):
            assert slot.geometry.proved(part).upper <= 0.7


@pytest.mark.parametrize("options", METHOD_OF, ids=str)
def test_compiled_training_with_every_kind_of_limit(options: dict[str, object]) -> None:
    torch._dynamo.reset()
    model, x = stabilize(mlp(), 1.0, **options), torch.randn(5, 6)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    assert trained(torch.compile(twin, fullgraph=True, backend="eager"), x) == pytest.approx(
        trained(model, x), rel=1e-12
    )
    assert lipschitz(export(twin), str(options.get("norm", "l2"))).upper <= 1.0


@pytest.mark.parametrize("name", ANIMALS)
def test_two_forwards_before_one_backward(name: str) -> None:
    animal = ANIMALS[name]
    model, x = animal.stabilized(0.7), animal.x()
    (model(x).square().sum() + model(x).sin().sum()).backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    model(x).sin().sum().backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, together[key])


def test_checkpointed_activations_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = stabilize(mlp(), 1.0), torch.randn(5, 6, requires_grad=True)
    model(x).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key])


@pytest.mark.parametrize("name", ANIMALS)
def test_65_safetensors_of_the_model_and_of_its_plain_weights(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    animal = ANIMALS[name]
    model, x = animal.stabilized(0.7), animal.x()
    assert all(value.is_contiguous() for value in model.state_dict().values())
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    fresh = animal.stabilized(0.7)
    safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    safetensors.save_file(plain_state_dict(model), str(tmp_path / "plain.safetensors"))
    plain = animal.make()
    plain.load_state_dict(safetensors.load_file(str(tmp_path / "plain.safetensors")))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)


def test_65_safetensors_of_a_learned_budget_has_no_shared_tensor(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = stabilize(mlp(), 1.0, budget="learned")
    safetensors.save_file(model.state_dict(), str(tmp_path / "model.safetensors"))  # refuses tensors that share memory
    fresh = stabilize(mlp(), 1.0, budget="learned")
    fresh.load_state_dict(safetensors.load_file(str(tmp_path / "model.safetensors")))
    x = torch.randn(2, 6)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


def test_share_memory_and_a_checkpoint_of_weights_only(tmp_path: Path) -> None:
    model = stabilize(mlp(), 1.0).share_memory()
    x = torch.randn(2, 6)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = stabilize(mlp(), 1.0)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transposed 1d", "bilinear", "attention"])
def test_67_onnx_after_export_has_the_nodes_of_the_plain_model(name: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    animal = ANIMALS[name]
    if name == "mlp":  # the sorting of GroupSort has its own translation
        model, x = (
            stabilize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), 0.7).float(),
            torch.randn(3, 6).float(),
        )
    else:
        model, x = animal.stabilized(0.7).float(), animal.x().float()
    plain = export(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
        reference = torch.onnx.export(release(copy.deepcopy(model)).eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    assert reference is not None
    assert len(program.model.graph) == len(reference.model.graph)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"budget": "learned"}], ids=str)
def test_lightning_trains_and_restores(options: dict[str, object], tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = stabilize(small().float(), 1.0, **options)  # type: ignore[arg-type]

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    torch.set_default_dtype(torch.float32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(model, loader)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert lipschitz(model.net).upper <= 1.0
    x = data()[0]
    torch.testing.assert_close(loaded.net.cpu()(x), model.net.cpu()(x), rtol=0, atol=0)


def test_65_accelerate_trains_saves_and_restores(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.set_default_dtype(torch.float32)
    x, y = data()
    model = stabilize(small().float(), 1.0, budget="learned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True)
        wrapped, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        for _ in range(3):
            opt.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            opt.step()
        accelerator.save_state(str(tmp_path / "state"))
        accelerator.save_model(wrapped, str(tmp_path / "model"))
        expected = wrapped(x).detach()
        with torch.no_grad():
            for p in wrapped.parameters():
                p.zero_()
        accelerator.load_state(str(tmp_path / "state"))
    torch.testing.assert_close(wrapped(x), expected, rtol=0, atol=0)
    inner = accelerator.unwrap_model(wrapped)
    assert lipschitz(inner).upper <= 1.0
    assert len(list(limited_slots(inner))) == 2
    assert (tmp_path / "model" / "model.safetensors").exists()
    accelerator.free_memory()


def test_65_the_trainer_of_transformers_trains_and_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.set_default_dtype(torch.float32)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = stabilize(small().float(), 1.0)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path), max_steps=4, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
                learning_rate=0.1, logging_strategy="no",
            ),
            train_dataset=rows,  # type: ignore[arg-type]
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert lipschitz(model.net).upper <= 1.0
    safetensors = pytest.importorskip("safetensors.torch")
    fresh = Classifier()
    fresh.load_state_dict(safetensors.load_file(str(tmp_path / "final" / "model.safetensors")))
    torch.testing.assert_close(fresh.net(x), model.net.cpu()(x), rtol=0, atol=0)
