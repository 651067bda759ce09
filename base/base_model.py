"""What every model can do: count and show its parameters, freeze parts of itself, keep frozen parts as they are."""
from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from utils.errors import ConfigError


class BaseModel(nn.Module):
    """An `nn.Module` that can be frozen in part and says what it is made of.

    A part all of whose parameters are frozen stays in evaluation mode: `train()` leaves it there, so its norm
    statistics and counters don't move and its dropout is off. No training loop has to remember that.
    """

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
        if mode and self.frozen:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
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
