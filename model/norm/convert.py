"""Replace the norm layers of any model: one table of norms, one path through the modules."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from logger.log import get_logger
from model.norm.cenconv import CenConv2d
from model.norm.facts import is_norm, read_facts, write_facts
from model.norm.grouped import GroupedBatchNorm2d
from model.norm.mabn import MABN2d
from model.norm.nbn import NormalizedBatchNorm2d
from model.norm.norm_act import NormAct, is_fused, with_activation
from model.norm.plain import GroupNorm2d, InstanceNorm2d, LayerNorm2d, SyncBatchNorm
from model.norm.renorm import BatchRenorm2d
from utils.config.build import lookup
from utils.errors import ConfigError, unknown

log = get_logger("norm")


def _batch_norm(channels, eps: float = 1e-5, momentum: float | None = 0.1, affine=True,
                normalization_batch_size: int | None = None):
    if normalization_batch_size is None:
        return nn.BatchNorm2d(channels, eps=eps, momentum=momentum, affine=affine)
    return GroupedBatchNorm2d(channels, eps, momentum, affine, normalization_batch_size)


def _nbn(channels, eps: float = 1e-5, momentum: float | None = 0.1, affine=True):
    return NormalizedBatchNorm2d(channels, eps=eps, momentum=momentum, affine=affine)


def _sync(channels, eps: float = 1e-5, momentum: float | None = 0.1, affine=True):
    return SyncBatchNorm(channels, eps=eps, momentum=momentum, affine=affine)


def _mabn(channels, B: int | None = None, real_B: int = 32, eps: float = 1e-5, momentum: float = 0.98,
          warmup_iters: int = 100, normalization_batch_size: int | None = None):
    B = B if B is not None else normalization_batch_size or 2
    return MABN2d(channels, B, real_B, eps, momentum, warmup_iters, normalization_batch_size)


def _frozen(channels, eps: float = 1e-5):
    from torchvision.ops import FrozenBatchNorm2d
    return FrozenBatchNorm2d(channels, eps=eps)


class _Norm(NamedTuple):
    """One row of the table."""
    make: Callable[..., nn.Module]             # make(channels, **args)
    carry_momentum: Callable | None = None     # torch's momentum -> this norm's; None: it has no running statistics
    own_args: tuple[tuple[str, Any], ...] = ()  # arguments of the conversion, not of the layer, with their types

    def __call__(self, *args, **more) -> nn.Module:
        return self.make(*args, **more)

    @property
    def __signature__(self) -> inspect.Signature:
        """The layer's arguments (keyword-only except its width), then those of the conversion."""
        width, *takes = inspect.signature(self.make, eval_str=True).parameters.values()
        takes += [width.replace(name=name, default=None, annotation=kind) for name, kind in self.own_args]
        return inspect.Signature([width, *(item.replace(kind=item.KEYWORD_ONLY) for item in takes)])


def _row(type: str, path: str) -> _Norm:
    """A norm's row of the table; for an external class, "module:Class", it is derived from the arguments."""
    found = lookup(NORMS, type, f"{path}.type", "norm")
    if isinstance(found, _Norm):
        return found
    return _Norm(found, (lambda m: m) if "momentum" in inspect.signature(found).parameters else None)


NORMS: dict[str, _Norm] = {
    "BatchNorm2d": _Norm(_batch_norm, lambda m: m),
    "NBN": _Norm(_nbn, lambda m: m, own_args=(("where", str | list[int] | None),)),
    "MABN": _Norm(_mabn, lambda m: 0.98 if m is None else 1 - m, own_args=(("centre", bool),)),
    "BatchRenorm": _Norm(BatchRenorm2d, lambda m: m),
    "GroupNorm": _Norm(GroupNorm2d),
    "InstanceNorm": _Norm(InstanceNorm2d),
    "LayerNorm": _Norm(LayerNorm2d),
    "SyncBatchNorm": _Norm(_sync, lambda m: m),
    "Frozen": _Norm(_frozen),
}


def norm_spec(norm: str | dict, path: str = "norm") -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a norm as given in a config: a name or {"type": name, "args": {...}}. Raises ConfigError for
    anything else; whether the name exists isn't checked."""
    spec = {"type": norm} if isinstance(norm, str) else norm
    if isinstance(spec, dict) and set(spec) <= {"type", "args"} and isinstance(spec.get("type"), str):
        args = {} if spec.get("args") is None else spec["args"]
        if isinstance(args, dict):
            return spec["type"], dict(args)
    raise ConfigError(f'{path}: should be a type name or {{"type": name, "args": {{...}}}}')


def norm_args(type: str, path: str = "norm") -> list[str]:
    """The names of the arguments that `convert_norm(module, type, **args)` accepts. Raises ConfigError for an unknown
    type."""
    return [name for name in list(inspect.signature(_row(type, path)).parameters)[1:] if name != "affine"]


def convert_norm(module: nn.Module, type: str = "BatchNorm2d", *, path: str = "norm",
                 calibration_batch: object = None, **args) -> nn.Module:
    """Convert every norm layer of [N, C, H, W] maps in `module` to `type`, in place; returns the module.

    Batch norms (also frozen and synchronised), NBN, MABN, BatchRenorm, instance and group norms are converted, in any
    `nn.Module`; 1-d norms and `torch.nn.LayerNorm` are left alone. Names stay (`bn1` stays `bn1`); parameters, their
    requires_grad, running statistics, device, dtype and training mode carry over as far as the new norm has them.
    If `module` is itself a norm, the new layer is returned. timm's norms fused with an activation become a `NormAct`,
    whose `norm` is the new layer.

    `type`: a key of `NORMS`, or "module:Class". `args`: its constructor's arguments except the width, for all layers:
    - all: `eps` (default: each layer's own); `momentum` for norms with running statistics, in the new norm's own
      convention (default: the old layer's if that differs from its type's default, else the new type's default).
    - `BatchNorm2d`, `BatchRenorm`, `MABN`: `normalization_batch_size`, to normalise groups of that many images
      separately; `BatchRenorm`: `r_max d_max warmup_iters r_ramp_iters d_ramp_iters`; `GroupNorm`: `num_groups`
      (default 32, reduced to a divisor of the width).
    - `NBN`: `where`: `last` (default for models with stages), `all` (default for others), or a list of stages; all
      other norms become batch norm. `scale_factor` is registered on the submodule that has `nbn_scope`, with one value
      per expert, or else on `module` itself, with one value.
    - `MABN`: `B` (training batch per device; default `normalization_batch_size`, else 2), `real_B` (32),
      `warmup_iters` (100), `centre` (true: convolutions become `CenConv2d` with the same weights, except those with
      single-element filters or with a bias and no norm after them in the same parent: predictors, gates, plain FPN).

    MABN and NBN change what trained weights compute (no mean, centred filters; normalised affine parameters).
    `calibration_batch`: an input of the module; it is run before and after in evaluation mode, and `module.norm_shift`
    is set to {"relative": |after - before| / |before|, "max": largest difference} over all outputs, and logged.

    Raises ConfigError, with `path` as the config key, for an unknown type or argument, or a value out of range.
    """
    norm = _row(type, path)
    for key in args:
        if key not in norm_args(type, path):
            raise unknown(f"{path}.args", key, norm_args(type, path), f"argument of {type}")
    before = None if calibration_batch is None else _outputs(module, calibration_batch)
    own = {key: args.pop(key) for key, _ in norm.own_args if key in args}
    scopes = _nbn_scopes(module, own.get("where"), f"{path}.args.where") if type == "NBN" else None
    scale_owners = {id(m.shared_scale[0]): m.shared_scale[0] for m in module.modules()
                    if isinstance(m, NormalizedBatchNorm2d) and m.shared_scale}

    # Build all new layers first, so that a wrong argument leaves the module as it was.
    inside = None if scopes is None else {id(layer) for scope in scopes[1] for layer in scope}
    new, fused = {}, {}
    for layer in filter(is_norm, module.modules()):
        fused.update({id(layer): layer} if is_fused(layer) else {})
        line = norm if inside is None or id(layer) in inside else NORMS["BatchNorm2d"]
        try:
            new[id(layer)] = _build(layer, line, args)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}.args: {error}") from error
    if scopes is not None:
        _share_scales(*scopes, new)
    new |= {key: with_activation(new[key], layer) for key, layer in fused.items()}
    for owner in scale_owners.values():
        if scopes is None or owner is not scopes[0]:
            del owner.scale_factor
    module = replace_modules(module, new)
    if type != "MABN":
        module = replace_modules(module, {id(m): plain_conv(m) for m in module.modules() if isinstance(m, CenConv2d)})
    elif own.get("centre", True):
        module = replace_modules(module, {id(conv): _centred(conv) for conv in _normed_convs(module)})
    if before is not None:
        _report_shift(module, type, before, _outputs(module, calibration_batch))
    return module


def replace_modules(module: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Replace each child (or `module` itself) by `new[id(child)]`, in place; a shared layer stays shared."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(module), module)


def take_apart(module: nn.Module) -> nn.Module:
    """Convert every batch norm fused with an activation to a `NormAct` around a plain one, in place; returns `module`.
    """
    return replace_modules(module, {id(layer): with_activation(_build(layer, NORMS["BatchNorm2d"], {}), layer)
                                    for layer in module.modules()
                                    if isinstance(layer, nn.BatchNorm2d) and is_fused(layer)})


def _build(layer: nn.Module, norm: _Norm, args: dict) -> nn.Module:
    """The layer that replaces norm `layer`."""
    facts = read_facts(layer)
    args = {"eps": facts.eps, **args}
    if norm.carry_momentum and facts.momentum_chosen:
        args = {"momentum": norm.carry_momentum(facts.momentum), **args}
    if facts.weight is None and "affine" in inspect.signature(norm.make).parameters:
        args["affine"] = False
    new = norm.make(facts.channels, **args)
    like = next((t for t in (facts.weight, facts.var) if t is not None), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    write_facts(facts, new)
    return new.train(layer.training)


# ---- NBN: which layers share which scale ---------------------------------------------------------------------------

def _nbn_scopes(module: nn.Module, where: object, path: str) -> tuple[nn.Module, list[list[nn.Module]]]:
    """(the module that gets `scale_factor`, one list of norm layers per expert)."""
    for owner in module.modules():
        if callable(getattr(owner, "nbn_scope", None)):
            return owner, owner.nbn_scope("last" if where is None else where)
    if where not in (None, "all"):
        raise ConfigError(f"{path}: {where!r} needs a model with stages; for this one use \"all\"")
    return module, [[layer for layer in module.modules() if is_norm(layer)]]


def _share_scales(owner: nn.Module, scopes: list[list[nn.Module]], new: dict[int, nn.Module]) -> None:
    """Register `scale_factor` [E] on `owner`, one learned value per expert, and tell the new layers their index.

    A layer that several experts share uses the first one's scale. Existing scales stay as they are.
    """
    if id(owner) in new:          # the module given is itself the norm, whose scale is then fixed at 1
        return
    present = getattr(owner, "scale_factor", None)
    if present is None or present.shape != (len(scopes),):
        like = next(owner.parameters())
        owner.scale_factor = nn.Parameter(torch.ones(len(scopes), device=like.device, dtype=like.dtype))
    for index, scope in reversed(list(enumerate(scopes))):
        for layer in scope:
            new[id(layer)].share_scale(owner, index)


# ---- MABN: which convolutions are centred ----------------------------------------------------------------------------

def _normed_convs(module: nn.Module) -> Iterator[nn.Conv2d]:
    """The plain convolutions that `centre` applies to; see `convert_norm`."""
    if type(module) is nn.Conv2d and _centrable(module, False):
        yield module
    for parent in module.modules():
        norm_follows = False
        for child in reversed(list(parent.children())):
            norm_follows |= isinstance(child.norm if isinstance(child, NormAct) else child, MABN2d)
            if type(child) is nn.Conv2d and _centrable(child, norm_follows):
                yield child


def _centrable(conv: nn.Conv2d, norm_follows: bool) -> bool:
    return conv.weight[0].numel() > 1 and (conv.bias is None or norm_follows)


def _centred(conv: nn.Conv2d) -> CenConv2d:
    return _like_conv(CenConv2d, conv, conv.weight)


def plain_conv(conv: CenConv2d) -> nn.Conv2d:
    """An ordinary convolution equal to `conv`, with its filters already centred."""
    weight = nn.Parameter(conv.centred_weight().detach(), requires_grad=conv.weight.requires_grad)
    return _like_conv(nn.Conv2d, conv, weight)


def _like_conv(kind: type, conv: nn.Conv2d, weight: nn.Parameter) -> nn.Conv2d:
    new = kind(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
               conv.groups, bias=False, padding_mode=conv.padding_mode, device="meta")
    new.weight, new.bias = weight, conv.bias
    return new.train(conv.training)


# ---- how much the outputs moved --------------------------------------------------------------------------------------

@torch.no_grad()
def _outputs(module: nn.Module, batch: object) -> list[torch.Tensor]:
    """The floating-point tensors in `module`'s output for `batch` in evaluation mode; modes are restored."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        return [t.detach().clone() for t in _tensors(module.eval()(batch)) if t.is_floating_point()]
    finally:
        for m, mode in modes:
            m.training = mode


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _report_shift(module: nn.Module, type: str, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """Set and log `module.norm_shift`; NaN if outputs changed shape (detections) and can't be compared."""
    if [t.shape for t in before] == [t.shape for t in after] and before:
        change = torch.cat([(b - a).flatten().double() for a, b in zip(before, after)])
        size = torch.cat([a.flatten().double() for a in before]).norm().clamp(min=1e-12)
        module.norm_shift = {"relative": (change.norm() / size).item(), "max": change.abs().max().item()}
    else:
        module.norm_shift = {"relative": float("nan"), "max": float("nan")}
    log.info("norm converted to %s: outputs moved by %.3g of their size, %.3g at most", type,
             module.norm_shift["relative"], module.norm_shift["max"])
