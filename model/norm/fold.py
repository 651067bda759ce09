"""Fold norms into the convolution or linear layer before them: an evaluation copy as fast as without norms."""
from __future__ import annotations

import copy
import inspect
from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn

from model.norm.cenconv import CenConv2d
from model.norm.convert import plain_conv, replace_modules, take_apart
from model.norm.facts import is_frozen_batch_norm, read_facts
from model.norm.grouped import GroupedBatchNorm2d
from model.norm.mabn import MABN2d
from model.norm.nbn import NormalizedBatchNorm2d
from model.norm.plain import SyncBatchNorm
from model.norm.renorm import BatchRenorm2d

# Matched by exact type: a subclass may do more than its parent (normalise and activate, say) and can't be folded.
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm, NormalizedBatchNorm2d,
          GroupedBatchNorm2d, MABN2d, BatchRenorm2d}
_LINEAR_MAPS = {nn.Conv1d, nn.Conv2d, nn.Conv3d, CenConv2d, nn.Linear}       # [out, ...] weights
_PADDED = "Conv2dSame"      # timm's: pads as TensorFlow does, then convolves
_LINEAR_FUNCTIONS = (F.linear, torch._C._nn.linear)


@torch.no_grad()
def fold_norm(module: nn.Module) -> nn.Module:
    """A copy of `module` in evaluation mode with its norms folded away where possible; `module` itself is unchanged.

    Batch norms (1-d to 3-d, frozen, synchronised, timm's fused with an activation), NBN, MABN and BatchRenorm are
    folded into the convolution or linear layer before them and replaced by `nn.Identity`, and each `CenConv2d` becomes
    an `nn.Conv2d` with centred weights. Evaluation outputs are equal up to rounding. Module names stay; `weight`s
    change, and a `bias` is added.

    A norm is folded only if its input is that layer's output, nothing else uses that output, and both are called once.
    This is determined from the traced dataflow (torch.fx), so pre-activation norms, shared layers and layers with hooks
    stay as they are. Parts that can't be traced, or that evaluation doesn't call, are traced separately, assuming that
    their modules are called nowhere else.
    """
    folded = take_apart(copy.deepcopy(module).eval())
    _fold_traced(folded)
    folded = replace_modules(folded, {id(m): plain_conv(m) for m in folded.modules() if isinstance(m, CenConv2d)})
    if not any(isinstance(m, NormalizedBatchNorm2d) for m in folded.modules()):
        for m in folded.modules():          # nothing reads NBN's scales any more
            if isinstance(m._parameters.get("scale_factor"), nn.Parameter):
                del m.scale_factor
    return folded


def _is_linear_map(layer: nn.Module) -> bool:
    return type(layer) in _LINEAR_MAPS or (isinstance(layer, nn.Conv2d) and type(layer).__name__ == _PADDED)


# ---- dataflow ------------------------------------------------------------------------------------------------------

class _Tracer(fx.Tracer):
    """Traces down to norms and torch.nn layers; a module that can't be traced becomes one opaque call."""

    def __init__(self, method: str = "forward"):
        super().__init__()
        self.traced_func_name = method
        self.opaque: list[nn.Module] = []
        self.seen: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return type(m) in _NORMS or _is_linear_map(m) or is_frozen_batch_norm(m) or super().is_leaf_module(m, name)

    def call_module(self, m, forward, args, kwargs):
        before = list(self.graph.nodes)
        self.seen.add(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)[len(before):]):
                self.graph.erase_node(node)
            self.opaque.append(m)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _trace(root: nn.Module, method: str = "forward", **fixed: object) -> tuple[fx.Graph | None, list[nn.Module]]:
    """(the graph of `root`'s method, the modules that it doesn't cover), or (None, root's children) if tracing fails.

    Arguments with defaults are fixed at their defaults, or at the values in `fixed`.
    """
    tracer = _Tracer(method)
    try:
        parameters = inspect.signature(getattr(root, method)).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        graph = tracer.trace(root, defaults | fixed)
        return graph, tracer.opaque + _never_called(root, tracer.seen)
    except Exception:
        return None, list(root.children())


def _never_called(root: nn.Module, seen: set[nn.Module]) -> list[nn.Module]:
    """The largest submodules of `root` that contain no module in `seen`."""
    parts = []
    for child in root.children():
        touched = seen.intersection(child.modules())
        parts += _never_called(child, seen) if touched else [child]
    return parts


def _fold_traced(root: nn.Module) -> None:
    """Fold norms in `root` according to its traced graph, then in the parts that the graph doesn't cover."""
    if type(root) in _NORMS or _is_linear_map(root) or not any(True for _ in root.children()):
        return
    graph, rest = _trace(root)
    if graph is not None:
        _fold_graph(root, graph)
    elif hasattr(root, "trunk") and hasattr(root, "expert_feat"):
        # Our backbones with routing: control flow depends on the gates' outputs, but not within the trunk or an expert.
        halves = [_trace(root, "trunk")] + [_trace(root, "expert_feat", expert=i) for i in range(root.num_experts)]
        for half, _ in halves:
            if half is not None:
                _fold_graph(root, half)
    for part in rest:
        _fold_traced(part)


def _fold_graph(root: nn.Module, graph: fx.Graph) -> None:
    modules = {node: root.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(module) for module in modules.values())
    places = Counter(id(child) for parent in root.modules() for child in parent._modules.values())
    read = [node.target for node in graph.nodes if node.op == "get_attr"]

    def alone(node: fx.Node) -> bool:
        """Whether the module that `node` calls is called once, registered once, free of hooks, and not read from."""
        module = modules[node]
        hooks = module._forward_hooks or module._forward_pre_hooks
        return (calls[id(module)] == 1 and places[id(module)] == 1 and not hooks
                and not any(target.startswith(f"{node.target}.") for target in read))

    for node, norm in modules.items():
        if not (type(norm) in _NORMS or is_frozen_batch_norm(norm)) or norm.running_var is None or not alone(node):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        scale, shift = _affine(norm)
        if source in modules and _is_linear_map(modules[source]) and alone(source):
            into = modules[source]
        elif source.op == "call_function" and source.target in _LINEAR_FUNCTIONS:
            into = _owner_of_weights(root, source)
        else:
            continue
        if into is None or len(into.weight) != len(scale):
            continue
        _scale_outputs(into, scale, shift)
        replace_modules(root, {id(norm): nn.Identity().eval()})


def _owner_of_weights(root: nn.Module, call: fx.Node) -> nn.Module | None:
    """The nn.Linear whose `weight` and `bias` are the arguments of the functional `call`, or None."""
    _, weight, bias = [*call.args, *call.kwargs.values(), None][:3]
    owner = [getattr(node, "target", "").rpartition(".") for node in (weight, bias) if isinstance(node, fx.Node)]
    single = all(node.op == "get_attr" and len(node.users) == 1 for node in (weight, bias) if isinstance(node, fx.Node))
    if not single or not owner or {place for place, _, _ in owner} != {owner[0][0]}:
        return None
    if [name for _, _, name in owner] != ["weight", "bias"]:        # without a bias there is no place for the shift
        return None
    layer = root.get_submodule(owner[0][0])
    return layer if isinstance(layer, nn.Linear) else None


# ---- arithmetic ----------------------------------------------------------------------------------------------------

def _affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), float64 [C] each, so that the norm in evaluation is x * scale + shift."""
    facts = read_facts(norm)
    scale = (facts.var.double() + facts.eps).rsqrt()
    if facts.weight is not None:
        scale = scale * facts.weight.double()
    shift = -facts.mean.double() * scale
    return scale, shift if facts.bias is None else shift + facts.bias.double()


def _scale_outputs(layer: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Change `layer`, in place, so that it returns y * scale + shift where it returned y. scale, shift: float64 [C]."""
    weight = layer.weight if not isinstance(layer, CenConv2d) else layer.centred_weight()
    column = scale.view(-1, *[1] * (weight.dim() - 1))
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter((weight.double() * column).to(weight.dtype), requires_grad=trained)
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=trained)
