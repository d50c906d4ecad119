"""``fuse`` on whole models: which modules stay, which become graphs, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxexpand
from fxexpand import RefusedError, SelectionError, VerificationError, fuse, report
from fxexpand.passes import Fuse
from fxexpand.tracing.graphs import trace
from tests.compare import assert_same
from tests.networks import assert_untouched, perturb, snapshot

EXACT = 1e-10


def conv_norm(inp: int, out: int, size: int = 3, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(inp, out, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(out)]


class Block(nn.Module):
    """Two branches and the identity, and an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.point = (
            nn.Sequential(*conv_norm(channels, channels)),
            nn.Conv2d(channels, channels, 1),
        )
        self.norm, self.act, self.note = nn.BatchNorm2d(channels), nn.ReLU(), "kept"

    def forward(self, x: Tensor) -> Any:
        return self.act(self.wide(x) + self.point(x) + self.norm(x))


class Net(nn.Module):
    """Rows of modules, a block that must be rewired, and a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 6, stride=2), nn.ReLU())
        self.block = Block(6)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward_features(self, x: Tensor) -> Any:
        return self.block(self.stem(x))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.forward_features(x).mean((2, 3))))


def net() -> tuple[Net, Tensor]:
    model = perturb(Net().double()).eval()
    assert isinstance(model, Net)
    return model, torch.randn(2, 3, 9, 8, dtype=torch.float64)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_only_what_is_rewired_becomes_a_graph() -> None:
    model, x = net()
    before = snapshot(model)
    small: Any = fuse(model, x)
    assert type(small) is Net and small is not model
    assert isinstance(small.block, fx.GraphModule) and small.block.note == "kept"  # what code around may read
    assert [type(module) for module in small.stem] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert norms(small) == 0 and isinstance(small.get_submodule("norm"), nn.Identity)
    assert_same(small(x), model(x), EXACT)
    assert_same(small.forward_features(x), model.forward_features(x), EXACT)
    assert_untouched(model, before)
    assert {row.site for row in report(small).changed} == {"stem.0", "block.wide.0", "head"}
    assert all(row.error is not None and row.error < EXACT for row in report(small).changed)
    assert not report(fuse(small, x)).changed


def test_the_result_trains_and_travels() -> None:
    model, x = net()
    small = fuse(model)
    small(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    assert_same(twin(x), model(x), EXACT)
    exported = torch.export.export(small, (x,)).module()
    assert_same(exported(x), model(x), EXACT)


def test_an_expanded_network_folds_in_one_go() -> None:
    model, x = net()
    for recipe in (fxexpand.Chain(2), fxexpand.RepVGG(), fxexpand.Chain(2, batch_norm=True)):
        big = fxexpand.expand(model, recipe, select="stem.0")
        small = fuse(big, x)
        assert norms(small) == 0 and not any("expansion" in name for name in small.state_dict())
        assert small.state_dict().keys() == fuse(model, x).state_dict().keys()
        assert_same(small(x), big(x), EXACT)


def test_the_pass_folds_expanded_layers_and_blocks_of_recipes() -> None:
    model, x = net()
    for recipe in (fxexpand.Chain(2), fxexpand.OREPA()):
        big = fxexpand.expand(model, recipe, select="stem.0")
        result = Fuse()(trace(big))
        assert norms(result.graph_module) == 0
        assert_same(result.graph_module(x), big(x), EXACT)


def test_in_place_where_classes_are_kept() -> None:
    model = perturb(nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Linear(5, 5)).double()).eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = model(x)
    assert fuse(model, x, inplace=True) is model
    assert norms(model) == 0
    assert_same(model(x), expected, EXACT)


def test_a_root_that_would_become_a_graph_is_not_changed_in_place() -> None:
    model = perturb(Block(3).double()).eval()
    before = snapshot(model)
    with pytest.raises(SelectionError, match=r"^Block: .*fuse\(model\)"):
        fuse(model, inplace=True)
    assert_untouched(model, before)
    small: Any = fuse(model)
    assert isinstance(small, fx.GraphModule)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert_same(small(x), model(x), EXACT)


class Routed(nn.Module):
    """No graph: it branches on values. Its parts have graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.entry_norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.backbone = nn.Sequential(*conv_norm(6, 6), nn.ReLU())
        self.heads = nn.ModuleList([nn.Sequential(*conv_norm(6, 2)), Block(6)])

    def forward(self, x: Tensor) -> Any:
        y = self.backbone(self.entry_norm(self.entry(x)))
        return self.heads[0](y) if y.sum() > 0 else self.heads[1](y)


def test_regions_of_what_cannot_be_traced() -> None:
    model = perturb(Routed().double()).eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    small = fuse(model, x)
    assert type(small) is Routed and type(small.entry_norm) is nn.BatchNorm2d
    assert [norms(small.backbone), norms(small.heads)] == [0, 0]
    assert isinstance(small.heads[1], fx.GraphModule)
    assert_same(small(x), model(x), EXACT)
    reasons = {row.site: row.reason for row in report(small).refusals}
    assert reasons.keys() == {"entry", "entry_norm"} and "cannot be traced" in reasons["entry"]
    with pytest.raises(RefusedError, match="entry"):
        fuse(model, x, strict=True)


def test_hooks_stay_and_what_has_them() -> None:
    model, x = net()
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *args: calls.append(1))
    model.block.wide[0].register_forward_hook(lambda *args: calls.append(2))
    small = fuse(model, x)
    calls.clear()
    assert_same(small(x), model(x), EXACT)
    assert sorted(calls) == [1, 1, 2, 2]
    assert norms(small.stem) == 0  # the hook sees what it saw: the output of the whole row
    assert any("hook" in row.reason for row in report(small).refusals if row.site == "block.wide.0")


class Twice(nn.Module):
    """One conv before two different norms, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.tied, self.tie, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.tie.weight = self.tied.weight

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.one(self.conv(x))) * torch.tanh(self.two(self.conv(x)))
        return self.norm(self.tie(torch.relu(self.tied(y))))


def test_shared_modules_get_a_kernel_per_call_and_tied_weights_stay_tied() -> None:
    model = perturb(Twice().double()).eval()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    small = fuse(model, x)
    assert_same(small(x), model(x), EXACT)
    convs = [module for module in small.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 4 and norms(small) == 1
    assert small.get_submodule("tied").weight is small.get_submodule("tie").weight
    assert any("shared" in row.reason for row in report(small).refusals)


def test_train_mode_norms_are_refused_and_nothing_changes() -> None:
    model, x = net()
    small = fuse(model.train())
    assert type(small) is Net and norms(small) == norms(model)
    assert any("eval" in row.reason for row in report(small).refusals)
    torch.manual_seed(0)
    expected = copy.deepcopy(model)(x)
    assert_same(small(x), expected, EXACT)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, _x = net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(RefusedError, match=r"^head .* its weight holds NaN"):
        fuse(model, inplace=True, strict=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("decompose", [False, True])
def test_exported_programs(decompose: bool) -> None:
    modules = (
        *conv_norm(3, 6, stride=2),
        nn.ReLU(),
        *conv_norm(6, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = perturb(nn.Sequential(*modules, nn.Linear(5, 4), nn.Linear(4, 3)).double()).eval()
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    small: Any = fuse(program.run_decompositions() if decompose else program)
    assert "batch_norm" not in small.code and small.code.count("linear") + small.code.count("addmm") <= 4
    assert_same(small(x), model(x), EXACT)


def test_timm_and_torchvision_networks_keep_their_classes() -> None:
    import timm
    import torchvision

    images = torch.randn(2, 3, 64, 64)
    networks = [torchvision.models.resnet18(), timm.create_model("mobilenetv3_small_050")]
    for network in [*networks, torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)]:
        model = perturb(network).eval()
        small = fuse(model, images)
        assert type(small) is type(model)
        kinds = {type(module).__name__ for module in small.modules()}
        assert not {kind for kind in kinds if "BatchNorm" in kind}
        assert_same(small(images), model(images), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_the_meta_device(dtype: torch.dtype) -> None:
    model, _ = net()
    small = fuse(model.to(dtype))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    empty = fuse(model.to("meta"))
    assert norms(empty) == 0 and all(parameter.is_meta for parameter in empty.parameters())


def test_a_model_on_the_meta_device_is_fused_with_inputs_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().to("meta")
    fused = fxexpand.fuse(model, torch.randn(1, 3, 8, 8, device="meta"))
    assert fused(torch.randn(1, 3, 8, 8, device="meta")).shape == (1, 4, 6, 6)
    assert type(fused[1]) is nn.Identity


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_a_view_of_few_dimensions_before_a_scale_is_no_obstacle(shape: tuple[int, ...]) -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (x + 3.0).transpose(1, -1)
            y += y
            return y.mean(0)

    x = torch.randn(shape)
    assert_same(fuse(Turned(), x)(x), Turned()(x), 1e-6)


class FirstToken(nn.Module):
    """The query of VOLO's class attention: of one position, which a view makes use of."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.query = heads, nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        batch, _, channels = x.shape
        return self.query(x[:, :1, :]).reshape(batch, self.heads, 1, channels // self.heads) * 0.5


class TwoTokens(FirstToken):
    """A view that holds for sequences of two positions only, which nothing in the code says."""

    def forward(self, x: Tensor) -> Any:
        return self.query(x).reshape(x.shape[0], 2, self.heads, -1) * 0.5


@pytest.mark.parametrize("kind", [FirstToken, TwoTokens])
def test_a_view_that_holds_for_one_length_only(kind: type[FirstToken]) -> None:
    model, x = kind(3).eval(), torch.randn(4, 2, 12)
    fused = fuse(model, x)
    (row,) = report(fused).rows
    assert row.action == "fused" and row.error is not None and row.error < EXACT
    assert_same(fused(x), model(x), 1e-6)


def test_a_view_that_the_probe_does_not_fit_is_no_error() -> None:
    class FiveTokens(FirstToken):
        def forward(self, x: Tensor) -> Any:
            return self.query(x[:, 1:6, :]).reshape(-1, 5, self.heads, 4) * 0.5

    model, x = FiveTokens(3).eval(), torch.randn(4, 7, 12)
    fused = fuse(model, x)
    assert [(row.action, row.error) for row in report(fused).rows] == [("fused", None)]
    assert_same(fused(x), model(x), 1e-6)


def test_an_empty_tensor_in_a_concatenation_says_nothing_of_its_shape() -> None:
    class Cached(nn.Module):
        """A cache that is empty at first, as torch.tensor([]) is in transformers: of one dimension."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 5)
            self.register_buffer("cache", torch.tensor([]))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.get_buffer("cache"), self.one(x)], -2).transpose(-1, -2)
            z: Tensor = self.two(y.transpose(-1, -2))
            return z

    model = Cached().double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_same(fuse(model)(x), model(x), EXACT)


def test_the_layer_scale_of_torchvision_is_folded_past_its_permutation() -> None:
    from torchvision.models.convnext import CNBlock

    block = CNBlock(6, layer_scale=0.5, stochastic_depth_prob=0.1)
    with torch.no_grad():
        block.layer_scale.copy_(torch.randn(6, 1, 1))
    model = nn.Sequential(nn.Conv2d(3, 6, 2), block).double().eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    small = fuse(model)
    assert_same(small(x), model(x), EXACT)
    assert not any("layer_scale" in name for name in small.state_dict())
    assert any("mul" in row.reason for row in report(small).changed)


def test_a_view_holds_in_whatever_layout_the_new_kernel_leaves_its_result() -> None:
    class Windows(nn.Module):
        """Windows of 2 x 2 as in MaxViT, which reads their number; channels scaled behind a transposition."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
            self.norm, self.mix, self.out = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 5)
            self.scale = nn.Parameter(torch.randn(5, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.stem(x).permute(0, 2, 3, 1))
            b, height, width, c = h.shape
            h = h.view(b, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
            h = h.contiguous().view(-1, 2, 2, c)
            h = torch.relu(self.mix(h)).view(h.shape[0], -1, 6)
            h = self.out(h).transpose(1, 2).contiguous().view(-1, 5, 2, 2)
            scaled: Tensor = h * self.scale
            return scaled

    model = perturb(Windows().double().eval())
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    for small in (fuse(model), fuse(model, x)):
        assert_same(small(x), model(x), EXACT)
        assert norms(small) == 0 and "scale" not in small.state_dict()


def test_a_network_that_returns_nan_by_itself_is_told_so() -> None:
    class Diverged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(-self.layers(x).square() - 1.0)

    with pytest.raises(VerificationError, match="returned NaN for the example inputs before anything"):
        fuse(Diverged(), torch.randn(2, 4))
