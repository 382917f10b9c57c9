"""How much of a style did a LoRA learn, and does it still draw what the prompt asks for?

The *style measure* is a logistic regression that learns, from true pictures of two styles, which style a picture
has. It sees statistics of the VAE encoder's feature maps (channel means and deviations, the "style" of Huang and
Belongie, https://arxiv.org/abs/1703.06868), and only pictures that have been through the VAE, so that traces of the
VAE in generated pictures tell it nothing. Its accuracy on true pictures it has not seen says how far to trust it.

The *colour layout* of a picture is a 16 x 16 thumbnail. Its distance to the true picture of the same thing tells
whether the prompt is still followed: a LoRA that draws its training pictures whatever is asked moves away from it.

Images are float tensors of shape [N, 3, H, W] with values in [-1, 1] everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH = 16  # pictures that go through the VAE at once: bounds memory, changes no result
STRENGTH = 0.01  # scikit-learn's C. Small, because there are more features than pictures


# --- pictures through the VAE -----------------------------------------------------------------------------------------


@torch.no_grad()
def pass_through(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode (mean of the posterior, so nothing is random) and decode: [N, 3, H, W] in, the same shape out."""
    return torch.cat([_reconstruct(vae, batch) for batch in _batches(vae, images)])


@torch.no_grad()
def vae_features(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and standard deviation over the picture of every channel after every encoder block: [N, F].

    F is twice the sum of the blocks' widths. The blocks are those that halve the picture and the middle one.
    """
    return torch.cat([_block_statistics(vae, batch) for batch in _batches(vae, images)])


def _batches(vae: AutoencoderKL, images: Tensor) -> list[Tensor]:
    return [batch.to(vae.device, vae.dtype) for batch in images.split(BATCH)]


def _reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    latents = vae.encode(images).latent_dist.mode()
    return vae.decode(latents).sample.float().clamp(-1, 1).cpu()


def _block_statistics(vae: AutoencoderKL, images: Tensor) -> Tensor:
    encoder = vae.encoder
    hidden = encoder.conv_in(images)
    statistics = []
    for block in [*encoder.down_blocks, encoder.mid_block]:
        hidden = block(hidden)
        deviation, mean = torch.std_mean(hidden.float(), dim=(2, 3))
        statistics += [mean, deviation]
    return torch.cat(statistics, dim=1).cpu()


# --- the style measure ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StyleMeasure:
    """Tells a target style from a base style. Made by `StyleMeasure.fit`; the same pictures give the same measure."""

    vae: AutoencoderKL
    classifier: Pipeline

    @classmethod
    def fit(cls, vae: AutoencoderKL, base_pictures: Tensor, target_pictures: Tensor) -> StyleMeasure:
        """Learn from true pictures [N, 3, H, W] and [M, 3, H, W] of concepts that are used for nothing else.

        Give both styles of the same concepts, so that what is drawn tells nothing about how it is drawn.
        """
        if not len(base_pictures) or not len(target_pictures):
            raise UserError(
                "there are no pictures to learn a style from",
                where=f"style measure: {len(base_pictures)} of the base style, {len(target_pictures)} of the target",
                fix="give at least a few pictures of each style",
            )
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
        features = [_true_features(vae, pictures) for pictures in (base_pictures, target_pictures)]
        is_target = np.repeat([0, 1], [len(base_pictures), len(target_pictures)])
        classifier.fit(np.concatenate(features), is_target)
        return cls(vae, classifier)

    def probability(self, images: Tensor) -> np.ndarray:
        """Probability of the target style of each generated picture: [N], each in 0 to 1.

        The pictures come out of the VAE's decoder already; true pictures have to go `pass_through` it first.
        """
        return self.classifier.predict_proba(vae_features(self.vae, images).numpy())[:, 1]

    def accuracy(self, base_pictures: Tensor, target_pictures: Tensor) -> float:
        """Share, 0 to 1, of true pictures that are put in the right style. Use concepts that `fit` has not seen."""
        called_base = self.probability(pass_through(self.vae, base_pictures)) < 0.5
        called_target = self.probability(pass_through(self.vae, target_pictures)) >= 0.5
        return float(np.concatenate([called_base, called_target]).mean())


def _true_features(vae: AutoencoderKL, pictures: Tensor) -> np.ndarray:
    return vae_features(vae, pass_through(vae, pictures)).numpy()


# --- colour layout ----------------------------------------------------------------------------------------------------


def colour_layout(images: Tensor, size: int = 16) -> Tensor:
    """Which colour is where: each picture averaged over size x size equal areas, [N, 3, size, size] in 0 to 1."""
    return F.adaptive_avg_pool2d((images.float() + 1) / 2, size)


def colour_layout_distance(generated: Tensor, true: Tensor) -> Tensor:
    """Distance of each generated picture to the true picture of the same concept: [N].

    The root mean square difference of the layouts, in units of the brightness range: 0 is equal, 1 is white for black.
    """
    difference = colour_layout(generated) - colour_layout(true)
    return difference.square().mean(dim=(1, 2, 3)).sqrt()
