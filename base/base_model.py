"""What every model can do: count and list its parameters, freeze parts of itself, and keep frozen parts unchanged."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from base.freezing import Freeze, freeze_plan
from logger.log import get_logger
from utils.errors import ConfigError, closest

log = get_logger()


@dataclass(frozen=True)
class CostPart:
    """One line in the breakdown of a model's cost: the modules that it covers, by name.

    expert: the expert (from 0) that they belong to, or None if shared by all. gates: whether they are routing gates.
    training: whether they may be used in training only (BatchFormer).
    """

    name: str
    modules: tuple[str, ...]
    expert: int | None = None
    gates: bool = False
    training: bool = False


class BaseModel(nn.Module):
    """An `nn.Module` that can be partly frozen and that describes its own parts.

    It is also the contract between a model and all code that uses it: the attributes and methods below, with defaults
    for models that lack the feature. `forward` maps images `[N, 3, H, W]` to a dict with `output` `[N, C]` (the
    experts' mean logits), `logits` `[N, E, C]` (each expert's) and `feat` `[N, E, D]` (pooled features).

    A submodule whose parameters are all frozen stays in evaluation mode even after `train()`: its norm statistics and
    counters don't change and its dropout is off, without any help from the training loop.

    A subclass may also have two static methods, called with `arch.args.model_name` before anything is built:
    `preprocess(name)`, the image preprocessing that its weights expect, and `size_problem(name, size)` (see
    `TimmModel`).
    """

    num_classes: int               # C
    num_experts: int = 1           # E
    feat_dim: int                  # D
    #: Whether training means learning which experts an image needs (expert assignment).
    routed = False
    #: Expert assignment: whether evaluation runs later experts only on the images that need them.
    route = False
    #: Expert assignment: every image uses every expert, and the experts are trained along with the gates.
    force_all = False
    #: Names of the parameters that are frozen only until `thaw` is called.
    waiting: tuple[str, ...] = ()
    #: Whether norms without parameters keep their statistics too, as frozen norms do; and whether `thaw` ends that.
    norms_kept, norms_wait = False, False
    #: Whether every trained parameter takes part in every step (DistributedDataParallel must be told if not).
    uses_all_parameters = True
    #: Whether each training step leaves out an expert drawn at random.
    drops_experts = False

    @property
    def batchformer(self) -> nn.Module | None:
        """The BatchFormer block, or None. While its `record` is set it keeps its attention, `last_attention` [N, N]."""
        return None

    @property
    def nbn_scales(self) -> nn.Parameter | None:
        """NBN's learned scales [E]; None without NBN."""
        return None

    def gather_batches(self) -> None:
        """From now on let BatchFormer attend over the images of all ranks; does nothing without BatchFormer."""

    def load_pretrained(self, checkpoint: dict[str, Any], name: str, other_classes: bool = False) -> str | None:
        """Load the weights of a `pretrained` file in a way of the model's own. Returns a line for the log, or None if
        the model has no such way: state_dict keys are then matched. name: the file's name, for messages; other_classes:
        whether the checkpoint was trained on other classes."""
        return None

    def heads(self) -> list[nn.Module]:
        """The classifier of each expert, [E]; each maps features `[N, D]` to scaled logits `[N, C]`."""
        raise NotImplementedError

    def used_heads(self) -> list[nn.Module]:
        """The heads that evaluation uses, in the order of `feat`: all but those a config leaves out."""
        return self.heads()

    def cost_parts(self) -> list[CostPart]:
        """The parts into which the model's cost is broken down, in the order of the forward pass, without overlap.

        Parameters outside all parts (norms' scales) are counted separately.
        """
        heads = {id(head): i for i, head in enumerate(self.heads())}
        parts = [CostPart(name, (name,)) for name, module in self.named_children()
                 if not any(id(part) in heads for part in module.modules())]
        return parts + [CostPart("classifier" if len(heads) == 1 else f"expert {heads[id(module)] + 1}, classifier",
                                 (name,), heads[id(module)])
                        for name, module in self.named_modules() if id(module) in heads]

    def classifier_prefixes(self) -> list[str]:
        """Prefixes of the classifier's parameter and buffer names (heads, their norms and scales)."""
        return []

    def feature_prefixes(self) -> list[str]:
        """Name prefixes of everything that sees only pooled features: the classifier and, in expert assignment, the
        gates. While all else is frozen an image's features stay the same."""
        return self.classifier_prefixes()

    def from_features(self, feats: torch.Tensor) -> dict[str, torch.Tensor]:
        """The dict that `forward` returns, from pooled features `[N, E, D]` such as its `feat` in evaluation. A model
        with layers between features and heads (dropout) must apply them here too."""
        logits = torch.stack([head(feats[:, i]) for i, head in enumerate(self.used_heads())], 1)
        return {"output": logits.mean(1), "logits": logits, "feat": feats}

    def stage2_prefixes(self) -> list[str]:
        """Name prefixes of what the second stage of decoupled training trains (Kang et al., ICLR 2020): only LWS's
        scales if there are any, else the classifier."""
        scales = [name for name, _ in self.named_parameters() if name.endswith(".scales")]
        return scales or self.classifier_prefixes()

    def stage_prefixes(self) -> list[tuple[str, ...]]:
        """Prefixes of parameter names, a tuple per stage, from the stem to the last stage before the classifier."""
        heads = tuple(self.classifier_prefixes())
        return [(f"{name}.",) for name, child in self.named_children()
                if not f"{name}.".startswith(heads) and any(True for _ in child.parameters())]

    def freeze(self, what: str | Iterable[str] | float | dict) -> None:
        """Freeze what `trainer.freeze` names; what is already frozen stays frozen.

        what: "backbone" (everything but classifier and gates), "norms", a prefix of parameter names or a list of them,
        or a share of the stages, 0 to 1: 0.5 is the first half of `stage_prefixes`, stem included, rounded down (with
        only one stage nothing is frozen). A dict {"until": "epoch 3", "what": ..., "then": ...} freezes "what" only
        until `thaw` (these names are `waiting`) and "then" for good.
        Raises ConfigError if a prefix matches no parameter, a share is below one stage, or nothing is left to train or
        to thaw afterwards.
        """
        if isinstance(what, dict):
            self._freeze_for_a_while(freeze_plan(what))
        elif what == "backbone":
            after = tuple(self.feature_prefixes())    # these are left as they are: LWS's classifier stays frozen
            self._set_trained([name for name, _ in self.named_parameters() if not name.startswith(after)], False)
        elif what == "norms":
            self.norms_kept = True
            self._set_trained(self._norm_parameters(), False)
        elif isinstance(what, float):
            self._set_trained(self._first_stages(what), False)
        else:
            self._set_trained(self._starting_with(what), False)

    def _freeze_for_a_while(self, plan: Freeze) -> None:
        if plan.then is not None:
            self.freeze(plan.then)
        before, kept = self.frozen, self.norms_kept
        self.freeze(plan.what)
        self.norms_wait = self.norms_kept and not kept
        self._set_trained(before, False)
        self.waiting = tuple(name for name in self.frozen if name not in set(before))
        if not self.waiting:
            raise ConfigError("trainer.freeze.until: leaves nothing to thaw: what it names is frozen for the whole "
                              "run (by load_crt, the arch or \"then\"); leave one of them out (`pretrained` takes "
                              "weights and freezes nothing)")
        if not self.num_parameters(trainable_only=True):
            raise ConfigError("trainer.freeze.what: leaves nothing to train until then")

    def _norm_parameters(self) -> list[str]:
        """Names of all norms' parameters. Norms are recognised by class name or running statistics (MABN); NBN's scales
        are parameters outside its norm layers."""
        found = {id(p) for layer in self.modules()
                 if ("norm" in type(layer).__name__.lower() and not isinstance(layer, nn.Linear))
                 or hasattr(layer, "running_var")
                 for p in layer.parameters(recurse=False)}
        return [name for name, p in self.named_parameters() if id(p) in found or name.endswith("scale_factor")]

    def _first_stages(self, share: float) -> list[str]:
        """Names of the parameters in the first `share` of the stages; none, with a warning, if there is only one."""
        stages = self.stage_prefixes()
        if len(stages) < 2:
            log.warning("trainer.freeze: this network is one stage, of which there is no share: %g freezes none of "
                        "it (\"backbone\" freezes all of it)", share)
            return []
        starts = tuple(start for stage in stages[:int(share * len(stages))] for start in stage)
        if not starts:
            raise ConfigError(f"trainer.freeze: that share of {len(stages)} stages is less than one; give at least "
                              f"{math.ceil(100 / len(stages)) / 100}")
        return [name for name, _ in self.named_parameters() if name.startswith(starts)]

    def _starting_with(self, what: str | Iterable[str]) -> list[str]:
        """Names of the parameters that begin with one of the prefixes `what`."""
        chosen = []
        for start in [what] if isinstance(what, str) else what:
            # A number at the end of a prefix must match as a whole: "blocks.1" isn't a prefix of "blocks.10".
            begins = re.compile(re.escape(start) + (r"(?!\d)" if start[-1:].isdigit() else ""))
            found = [name for name, _ in self.named_parameters() if begins.match(name)]
            if not found:
                near = closest(start, [name for name, _ in self.named_parameters()])
                raise ConfigError(f"trainer.freeze: no parameter's name begins with {start!r}; give \"backbone\", "
                                  f"\"norms\" or a list of beginnings like {near or next(iter(self.state_dict()))}")
            chosen += found
        if {name for name, p in self.named_parameters() if p.requires_grad} <= set(chosen):
            raise ConfigError(f"trainer.freeze: {what!r} leaves nothing to train; \"backbone\", not in a list, is "
                              "everything but the classifier")
        return chosen

    def thaw(self) -> None:
        """Unfreeze the `waiting` parameters."""
        self.norms_kept = self.norms_kept and not self.norms_wait
        self._set_trained(self.waiting, True)
        self.waiting = ()

    def _set_trained(self, names: Iterable[str], trained: bool) -> None:
        chosen = set(names)
        for name, parameter in self.named_parameters():
            if name in chosen:
                parameter.requires_grad_(trained)
        self.train(self.training)

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Number of scalar parameters, shared tensors counted once. trainable_only: without the frozen ones."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the frozen parameters (`requires_grad` is False)."""
        return tuple(name for name, p in self.named_parameters() if not p.requires_grad)

    def freeze_except(self, prefixes: Iterable[str]) -> None:
        """Freeze every parameter whose name begins with none of `prefixes`, and unfreeze all others.

        Modules that are now frozen as a whole go to evaluation mode at once, even if the model is in training mode.
        Raises ConfigError if a prefix matches no parameter: a part would silently stay frozen.
        """
        prefixes = tuple(prefixes)
        names = [name for name, _ in self.named_parameters()]
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in names):
                raise ConfigError(f"{type(self).__name__} has no parameter named {prefix}*")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))
        self.train(self.training)

    def train(self, mode: bool = True) -> BaseModel:
        """Set training mode, except for modules whose parameters are all frozen: those go to evaluation mode."""
        super().train(mode)
        if mode and (self.frozen or self.norms_kept):
            for module in self.modules():
                parameters = list(module.parameters())
                kept = self.norms_kept and hasattr(module, "running_var")
                if not any(p.requires_grad for p in parameters) if parameters else kept:
                    module.eval()
        return self

    def summary(self) -> str:
        """The module tree's first two levels with their parameter counts, as text."""
        lines = []
        for prefix, module in self.named_children():
            parts = [(prefix, module)] + [(f"{prefix}.{name}", child) for name, child in module.named_children()]
            for name, part in parts:
                count = sum(p.numel() for p in part.parameters())
                if count:
                    kind = type(part).__name__
                    lines.append(f"  {name:<40} {kind:<24} {count:>12,}")
        total, trained = self.num_parameters(), self.num_parameters(trainable_only=True)
        lines.append(f"  {total:,} parameters ({total / 1e6:.2f} M), {trained:,} of them trained")
        return "\n".join([type(self).__name__, *lines])
