"""What predicts the noise of a batch, with its text encoders where these are trained."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .models import Base, Conditions, Tokens


class Denoiser(nn.Module):
    """UNet and, where they are trained, text encoders as one module, so that accelerate wraps and synchronises one."""

    def __init__(self, base: Base, text_encoders_train: bool, autocast: bool = True) -> None:
        super().__init__()
        self.family, self.device_type, self.autocast = base.family, base.device.type, autocast
        self.unet = base.unet
        self.text_encoders = nn.ModuleList(base.text_encoders.values() if text_encoders_train else [])

    def forward(self, noisy: Tensor, t: Tensor, text: Tokens | Conditions, sizes: Tensor) -> Tensor:
        """Prediction (batch, 4, h, w); `text` holds token ids if text encoders are trained, conditions if not."""
        with nullcontext() if self.autocast else torch.autocast(self.device_type, enabled=False):
            conditions = text if isinstance(text, Conditions) else self.family.encode(list(self.text_encoders), text)
            return self.family.predict(self.unet, noisy, t, conditions, sizes)
