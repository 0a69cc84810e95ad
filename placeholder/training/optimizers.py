"""The optimizers: the LoRA's, chosen by name, and that of the placeholder tokens' embeddings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from placeholder.tokens.vocabulary import row_norms

LORA_WEIGHT_DECAY = 1e-4  # adam_weight_decay of diffusers' DreamBooth LoRA scripts
# Numbers that each optimizer needs for each parameter, in fp32, rounded up: its states, and of a FlatOptimizer the gradients as
# one vector and an update.
STATES = {"adamw": 2, "adamw8bit": 3, "adam8bit": 3, "prodigy": 6}
TOKEN_WARMUP_STEPS = 10
TOKEN_RMS_LIMIT = 1.5  # times the median rms of the vocabulary's rows


class FlatOptimizer:
    """An optimizer of all parameters as one vector, of which they become views.

    For optimizers that loop over parameters in Python and wait for the GPU at each. Prodigy's updates are the same: they are
    elementwise but for the step size, which is of all parameters anyway. 8-bit states are quantized in other blocks.
    """

    def __init__(self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        self.parameters, sizes = parameters, [parameter.numel() for parameter in parameters]
        self.vector = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        for parameter, part in zip(parameters, self.vector.detach().split(sizes), strict=True):
            parameter.data = part.view_as(parameter)
        self.optimizer = make([self.vector])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one group of the optimizer."""
        return self.optimizer.param_groups

    def step(self) -> None:
        """One update from the parameters' gradients; without one it counts as zero."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.vector.grad = torch.cat([gradient.flatten() for gradient in gradients])
        self.optimizer.step()
        self.vector.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the optimizer whose state this is."""
        self.optimizer.load_state_dict(state)


def lora_optimizer(name: str, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer | FlatOptimizer:
    """The optimizer called `name`, one of STATES; prodigy finds its own step size, so it makes no use of `learning_rate`."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=LORA_WEIGHT_DECAY, fused=True)
    if name == "prodigy":
        from prodigyopt import Prodigy

        # lr multiplies the estimated step size: 1.0 takes the estimate as it is (arXiv:2306.06101, algorithm 1).
        options = {"lr": 1.0, "weight_decay": LORA_WEIGHT_DECAY, "use_bias_correction": True, "safeguard_warmup": True}
        return FlatOptimizer(parameters, partial(Prodigy, **options))
    import bitsandbytes.optim

    kinds = {
        "adamw8bit": partial(bitsandbytes.optim.AdamW8bit, lr=learning_rate, weight_decay=LORA_WEIGHT_DECAY),
        "adam8bit": partial(bitsandbytes.optim.Adam8bit, lr=learning_rate),
    }
    return FlatOptimizer(parameters, kinds[name])


class TokenOptimizer:
    """AdamW for the placeholder tokens' embeddings: no weight decay, normalized gradients, a warm-up, a limit on the norm.

    The first gradients of a near-zero embedding are huge, because the encoder's RMSNorm divides by its size: they would fill
    Adam's second moment, so each row's gradient is scaled to norm 1. The limit keeps an embedding from outgrowing the
    vocabulary's: the learning rate, not the data, would set its final norm.
    """

    def __init__(self, rows: nn.Parameter, learning_rate: float, rms_limit: float):
        self.rows = rows  # (R, D)
        self.learning_rate = learning_rate
        self.rms_limit = rms_limit
        self.steps = 0
        self.adamw = torch.optim.AdamW([rows], lr=learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def step(self) -> None:
        """One update from `rows.grad`; nothing where no prompt of the batch held a placeholder."""
        if self.rows.grad is None:
            return
        self.steps += 1
        self.adamw.param_groups[0]["lr"] = self.learning_rate * min(1.0, self.steps / TOKEN_WARMUP_STEPS)
        tiny = torch.finfo(self.rows.dtype).tiny
        self.rows.grad /= self.rows.grad.norm(dim=1, keepdim=True).clamp_min(tiny)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        rms = self.rows.square().mean(dim=1, keepdim=True).sqrt()  # (R, 1)
        self.rows *= (self.rms_limit / rms.clamp_min(tiny)).clamp_max(1.0)

    def state_dict(self) -> dict[str, Any]:
        """The embeddings and all that their next update depends on."""
        return {"rows": self.rows, "steps": self.steps, "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the optimizer whose state this is."""
        self.rows.copy_(state["rows"])
        self.steps = state["steps"]
        self.adamw.load_state_dict(state["adamw"])


def token_rms_limit(vocabulary: Tensor, entries: int) -> float:
    """TOKEN_RMS_LIMIT x the median rms of the first `entries` rows of the embedding matrix (rows, D)."""
    return TOKEN_RMS_LIMIT * row_norms(vocabulary, entries).median().item() / vocabulary.shape[1] ** 0.5
