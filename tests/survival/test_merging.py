"""Layers merged by others: the output stays and every gate, or the merge is refused before anything changed."""

import copy

import networks
import pytest
import timm
import torch
from networks import Detector, Parallel, distance, fuse_conv_and_bn, images, sites, stronger, with_attention
from timm.models import reparameterize_model
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from convattn import attach, plan
from convattn.errors import AttachError


def randomised(name: str) -> nn.Module:
    """A network of timm with random numbers for each channel, far enough from 0 that no gate is hidden."""
    model = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for key, one in [*model.named_parameters(), *model.named_buffers()]:
            if one.is_floating_point() and max(one.shape, default=1) == one.numel():
                one.uniform_(-0.1, 0.1)
                one.add_(0.0 if key.endswith(("bias", "mean")) else 1.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("at", ["residual", "residual-pre", "residual-post", "shortcut", "block", "stage", "final"])
@pytest.mark.parametrize(
    "name, counts",
    [
        ("repvit_m0_9", {"residual": 26, "stage": 4}),
        ("fastvit_t8", {"residual": 10, "residual-post": 10}),
        ("ghostnetv3_050", {"residual": 2, "block": 16}),
        ("repghostnet_050", {"residual": 16, "block": 16}),
        ("shvit_s1", {}),
        ("efficientvit_m0", {"residual": 38}),
        ("repvgg_a0", {"block": 22}),
        ("mobileone_s0", {"stage": 5}),
        ("efficientvim_m1", {}),
        ("levit_conv_128s", {"residual": 20}),
    ],
)
def test_networks_of_timm(name: str, counts: dict[str, int], at: str) -> None:
    model, x = randomised(name), torch.randn(2, 3, 64, 64)
    if name.startswith(("levit", "efficientvit")):
        x = torch.randn(2, 3, 224, 224)
    merged = reparameterize_model(model)
    with torch.no_grad():
        # what the plain network loses to rounding
        rounding = distance(merged(x), model(x))
        try:
            attach(model, "se", at=at, example=x)
        except AttachError as error:
            assert at not in counts and "The model was not changed." in str(error)
            return
        stronger(model)
        y, names = model(x), sites(model)
        merged = reparameterize_model(model)
        assert sites(merged) == names and len(names) == counts.get(at, len(names))
        z = merged(x)
        assert distance(z, y) <= max(1e-4, 10 * rounding)
        for site in names[:: max(1, len(names) // 4)]:
            with_site = copy.deepcopy(merged)
            with_site.get_submodule(site).attention.strength.zero_()
            assert not torch.equal(with_site(x), z), site


def test_a_unit_is_taken_as_a_whole() -> None:
    found = plan(Detector(), "se", example=images())
    assert [site.name for site in found] == ["model.1.cv2", "model.2.cv2", "model.4.cv2"]


def test_no_gate_stands_inside_of_what_is_merged() -> None:
    model = networks.plain("reparameterised")
    with pytest.raises(AttachError, match=r"stages\.0\.mix \(Parallel\).*would be lost.*not changed"):
        attach(model, "se", at="layer", where="*.mix.large.1", example=images())
    assert sites(model) == []


def test_units_are_merged_where_a_gate_stands_on_them() -> None:
    x = images()
    for at in ("block", "layer"):
        model = networks.plain("reparameterised")
        where = {} if at == "block" else {"where": "stages.*.mix"}
        stronger(attach(model, "se", at=at, example=x, **where))
        with torch.no_grad():
            y = model(x)
            # called at the wrapper, and after that at the layer as well
            for module in model.modules():
                if hasattr(module, "switch_to_deploy"):
                    module.switch_to_deploy()
            assert distance(model(x), y) < 1e-5
            assert len(sites(model)) == 3
            merged = [one for one in model.modules() if isinstance(one, Parallel)]
            assert all(one.merged is not None for one in merged)


def test_weights_are_not_given_past_a_gate() -> None:
    model = networks.plain("reparameterised")
    stronger(attach(model, "se", at="layer", where="stages.0.mix", example=images()))
    x = images()
    y = model(x)
    with pytest.raises(AttachError, match=r"get_equivalent_kernel_bias\(\) of 'stages.0.mix'"):
        model.stages[0].mix.get_equivalent_kernel_bias()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("merge", [fuse_conv_bn_eval, fuse_conv_and_bn])
@pytest.mark.parametrize("where, other", [("layer1.0.bn1", "layer1.0.conv1"), ("layer1.0.conv1", "layer1.0.bn1")])
def test_functions_that_merge_past_a_gate_are_refused(merge, where: str, other: str) -> None:
    model, x = networks.plain("resnet20"), images()
    stronger(attach(model, "se", at="layer", where=where, example=x))
    y = model(x)
    block = model.layer1[0]
    with pytest.raises(AttachError, match=f"would merge '{where}'"):
        merge(block.conv1, block.bn1)
    assert torch.equal(model(x), y) and sites(model) == [where]


def test_a_convolution_that_was_merged_in_a_loop_takes_no_place_before_its_norm() -> None:
    model, x = networks.plain("resnet20"), images()
    stronger(attach(model, "se", at="layer", where="layer1.0.conv1", example=x))
    y, block = model(x), model.layer1[0]
    merged = nn.Conv2d(16, 16, 3, padding=1, bias=True)
    with pytest.raises(AttachError, match="has a bias, as one merged with that norm has"):
        block.conv1 = merged
    assert torch.equal(model(x), y)
    block.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    assert sites(model) == ["layer1.0.conv1"]


def test_a_forward_of_the_layer_is_set_at_the_layer() -> None:
    model, x = Detector().eval(), images()
    stronger(attach(model, "se", example=x))
    with torch.no_grad():
        y = model(x)
        unit = model.model[1].cv2
        unit.conv = fuse_conv_and_bn(unit.conv, unit.bn)
        del unit.bn
        unit.forward = unit.forward_fuse
        assert distance(model(x), y) < 1e-5
        unit.attention.strength.zero_()
        assert distance(model(x), y) > 1e-4


@pytest.mark.parametrize("at", ["residual", "block", "stage"])
def test_detection_code(at: str) -> None:
    model, x = networks.plain("detector"), images()
    with_attention(model, "cbam", at)
    names = sites(model)
    with torch.no_grad():
        y = model(x)
        model.fuse()
        assert sites(model) == names and distance(model(x), y) < 1e-5
        assert not any(
            isinstance(one, nn.BatchNorm2d) for name, one in model.named_modules() if "attention" not in name
        )
