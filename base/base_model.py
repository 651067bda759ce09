"""What every model can do: count and show its parameters, freeze parts of itself, keep frozen parts as they are."""
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
    """A line of a model's cost: modules by name, of expert `expert` (from 0), or shared by all; `gates`: of routing;
    `training`: a part that training may have for itself."""

    name: str
    modules: tuple[str, ...]
    expert: int | None = None
    gates: bool = False
    training: bool = False


class BaseModel(nn.Module):
    """An `nn.Module` that can be frozen in part and says what it is made of.

    It also is the contract between a backbone and everything that uses it: the attributes and methods below, with what
    they mean for a model that has nothing of the kind. x `[N, 3, H, W]` -> a dict with `output` `[N, C]`, `logits`
    `[N, E, C]`, `feat` `[N, E, D]`.

    A part all of whose parameters are frozen stays in evaluation mode: `train()` leaves it there, so its norm
    statistics and counters don't move and its dropout is off. No training loop has to remember that.

    A class may also have two static methods that are asked before anything is built, with `arch.args.model_name`:
    `preprocess(name)`, what its weights expect of images, and `size_problem(name, size)` (see `TimmModel`).
    """

    num_classes: int               # C
    num_experts: int = 1           # E
    feat_dim: int                  # D
    #: Whether training it is learning which experts an image needs (expert assignment).
    routed = False
    #: Expert assignment: whether evaluation asks later experts only for the images that need them.
    route = False
    #: Expert assignment: every image uses every expert, whose training goes on along with the gates'.
    force_all = False
    #: Names of parameters that are frozen for some epochs only: `thaw` ends that.
    waiting: tuple[str, ...] = ()
    #: Whether norms without parameters keep their statistics, as frozen ones do; and whether `thaw` ends that.
    norms_kept, norms_wait = False, False
    #: Whether every trained parameter takes part in every step (data parallel training must be told where not).
    uses_all_parameters = True
    #: Whether each training step leaves out an expert drawn at random.
    drops_experts = False

    @property
    def batchformer(self) -> nn.Module | None:
        """The BatchFormer block, which records `last_attention` [N, N] where its `record` is set; None without one."""
        return None

    @property
    def nbn_scales(self) -> nn.Parameter | None:
        """NBN's learned scales [E]; None without NBN."""
        return None

    def gather_batches(self) -> None:
        """BatchFormer attends over all ranks' images from now on. Nothing to do without one."""

    def load_pretrained(self, checkpoint: dict[str, Any], name: str, other_classes: bool = False) -> str | None:
        """`pretrained`, where a model has a way of its own to start from a file's weights: returns a line for the log,
        or None to have state_dict keys matched. name: the file's; other_classes: whether it knows other classes."""
        return None

    def heads(self) -> list[nn.Module]:
        """The classifier of each expert, [E]; each maps features `[N, D]` to scaled logits `[N, C]`."""
        raise NotImplementedError

    def used_heads(self) -> list[nn.Module]:
        """The heads that evaluation uses, in the order of `feat`: all but those a config leaves out."""
        return self.heads()

    def cost_parts(self) -> list[CostPart]:
        """What a cost is told by, in the order of the forward pass: modules' names, each module in one part only.

        What is left (scales of norms) is counted for itself.
        """
        heads = {id(head): i for i, head in enumerate(self.heads())}
        parts = [CostPart(name, (name,)) for name, module in self.named_children()
                 if not any(id(part) in heads for part in module.modules())]
        return parts + [CostPart("classifier" if len(heads) == 1 else f"expert {heads[id(module)] + 1}, classifier",
                                 (name,), heads[id(module)])
                        for name, module in self.named_modules() if id(module) in heads]

    def classifier_prefixes(self) -> list[str]:
        """Beginnings of the classifier's parameter and buffer names (heads, their norms and scales)."""
        return []

    def feature_prefixes(self) -> list[str]:
        """Beginnings of the names of what sees features alone: the classifier's, and the gates' of expert assignment.
        With everything else frozen an image's features stay as they are."""
        return self.classifier_prefixes()

    def from_features(self, feats: torch.Tensor) -> dict[str, torch.Tensor]:
        """The dict that `forward` gives, from pooled features `[N, E, D]` as its `feat` has them in evaluation. A model
        with something between features and heads (dropout) does it here too."""
        logits = torch.stack([head(feats[:, i]) for i, head in enumerate(self.used_heads())], 1)
        return {"output": logits.mean(1), "logits": logits, "feat": feats}

    def stage2_prefixes(self) -> list[str]:
        """What a decoupled second stage trains (Kang et al., ICLR 2020): LWS's scales alone where there are any."""
        scales = [name for name, _ in self.named_parameters() if name.endswith(".scales")]
        return scales or self.classifier_prefixes()

    def stage_prefixes(self) -> list[tuple[str, ...]]:
        """Beginnings of parameter names, stage by stage from the stem to the last before the classifier."""
        heads = tuple(self.classifier_prefixes())
        return [(f"{name}.",) for name, child in self.named_children()
                if not f"{name}.".startswith(heads) and any(True for _ in child.parameters())]

    def freeze(self, what: str | Iterable[str] | float | dict) -> None:
        """`trainer.freeze`: "backbone" (everything but classifier and gates), "norms", beginnings of parameters' names,
        or a share of the stages: 0.5 is the first half of `stage_prefixes`, the stem included, rounded down; nothing of
        a network of one stage. What is frozen already stays so.

        With {"until": "epoch 3", "what": ..., "then": ...} what it freezes is `waiting` for `thaw`, but for what "then"
        names. Raises ConfigError where a beginning fits no parameter, a share is less than a stage, and where there
        would be nothing to train or nothing to thaw.
        """
        if isinstance(what, dict):
            self._freeze_for_a_while(freeze_plan(what))
        elif what == "backbone":
            after = tuple(self.feature_prefixes())    # these keep their state: LWS's classifier stays frozen
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
        """Norms by their name or by what they keep (MABN); NBN's scales stand beside its layers."""
        found = {id(p) for layer in self.modules()
                 if ("norm" in type(layer).__name__.lower() and not isinstance(layer, nn.Linear))
                 or hasattr(layer, "running_var")
                 for p in layer.parameters(recurse=False)}
        return [name for name, p in self.named_parameters() if id(p) in found or name.endswith("scale_factor")]

    def _first_stages(self, share: float) -> list[str]:
        """The parameters of that share of the stages, from the stem on; none, with a warning, where there is but one
        stage."""
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
        """The parameters whose names begin so."""
        chosen = []
        for start in [what] if isinstance(what, str) else what:
            # A number ends where its digits do: "blocks.1" isn't the beginning of "blocks.10".
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
        """Train what was `waiting`."""
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
        """The number of learned values, each shared tensor counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the parameters that training leaves alone."""
        return tuple(name for name, p in self.named_parameters() if not p.requires_grad)

    def freeze_except(self, prefixes: Iterable[str]) -> None:
        """Freeze every parameter whose name begins with none of `prefixes`; the others are trained.

        Takes effect at once on the mode too: what is now frozen is in evaluation mode if the model is training.
        Raises ConfigError where a prefix fits no parameter, since then a part would silently stay frozen.
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
        """Training mode for all parts that learn, evaluation mode for those that are frozen whole."""
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
