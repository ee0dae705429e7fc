"""What every method has learned, by name: for optimisers, for heads, and for what learns across tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlprompt.errors import HeadError


class Learned(nn.Module):
    """The learnables of a method around a frozen ``backbone``, and the buffers that belong to its head."""

    name: ClassVar[str]
    fitted: tuple[str, ...] = ()
    """Buffers (dotted names) that belong to the head beside its learnables; their shapes may depend on the shots."""

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the named learnable parameters; the backbone's are never among them."""
        return [(name, parameter) for name, parameter in self.named_parameters() if not name.startswith("backbone.")]

    def prompt_tensors(self) -> list[tuple[str, nn.Parameter]]:
        """Return the learnables that are prompts: vectors ``[..., M, W]``.

        Weights of networks are none, nor what objectives or a decomposition learn (its factors stand for no vectors).

        What is learned across tasks (:mod:`vlprompt.meta`) acts on their gradients.
        """
        found = []
        for name, parameter in self.trainable_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            layer = type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, nn.ParameterList)
            layer = layer or name.startswith(("objectives.", "decomposition."))
            if parameter.ndim > 1 and parameter.numel() and not layer:
                found.append((name, parameter))
        return found

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups; an empty list says that there is nothing to train."""
        of_their_own = [(parameters, factor) for parameters, factor in self.rate_factors() if parameters]
        apart = {id(parameter) for parameters, _ in of_their_own for parameter in parameters}
        others = [parameter for _, parameter in self.trainable_parameters() if id(parameter) not in apart]
        groups = [{"params": others, "lr": lr}] if others else []
        return groups + [{"params": parameters, "lr": lr * factor} for parameters, factor in of_their_own]

    def rate_factors(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return learnables with a rate of their own, and the factor that it is of the others'."""
        return []

    # -- keeping ------------------------------------------------------------------------------------------------
    def trained_state(self) -> dict[str, Tensor]:
        """Return copies of the learnables by name, float32 on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._kept().items()}

    def head_state(self) -> dict[str, Tensor]:
        """Return what a head's file holds of the learnables; a method may pack them, and says what is lost."""
        return self.trained_state()

    def load_head_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the learnables from :meth:`head_state` of such a method.

        Raises:
            HeadError: As :meth:`load_trained_state`.
        """
        self.load_trained_state(state)

    def _kept(self) -> dict[str, Tensor]:
        """Return what scoring depends on beside the backbone: learnables, and what was fitted."""
        return dict(self.trainable_parameters()) | {name: self.get_buffer(name) for name in self.fitted}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the learnables from ``state``.

        Raises:
            HeadError: A name is missing or unknown, or a shape differs; nothing has been changed then.
        """
        own = self._kept()
        wrong = [f"{name}: missing" for name in own if name not in state]
        wrong += [f"{name}: not a learnable of {self.name}" for name in state if name not in own]
        wrong += [
            f"{name}: shape {list(state[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in state and not self._takes(name, own[name], state[name])
        ]
        if wrong:
            raise HeadError(f"these tensors do not fit the method {self.name!r}:\n  " + "\n  ".join(wrong))
        for name in self.fitted:
            if state[name].shape != own[name].shape:
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, own[name].new_zeros(state[name].shape))
        with torch.no_grad():
            for name, parameter in self._kept().items():
                parameter.copy_(state[name])

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Take the learned tensors of another head as the start.

        Raises:
            HeadError: They are not the tensors of such a method.
        """
        self.load_head_state(state)

    def _takes(self, name: str, own: Tensor, given: Tensor) -> bool:
        # What is fitted has as many rows as there were shots.
        return given.ndim == own.ndim if name in self.fitted else given.shape == own.shape
