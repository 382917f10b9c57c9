"""How much of a style did a LoRA learn, and does it still draw what the prompt asks for?

The *style measure* is a logistic regression that learns, from true pictures of two styles, which style a
picture has. It sees statistics of the VAE encoder's feature maps (channel means and deviations, the "style"
of Huang and Belongie, https://arxiv.org/abs/1703.06868), and only pictures that have been through the VAE,
so that traces of the VAE in generated pictures tell it nothing. Its accuracy on true pictures it has not
seen says how far to trust it.

The *colour layout* of a picture is a 16 x 16 thumbnail. Its distance to the true picture of the same
concept tells whether the prompt is still followed. The true picture is the one in the *target* style, for
the pictures without and with the LoRA alike: a LoRA is asked to leave the base's colours, so distance to
the base's picture would punish just what it is for. A part of the gain is the style's own colours, though;
so the distance to the target pictures of *other* concepts (`wrong_concept_distance`) is the ceiling to
compare with. A LoRA that draws one and the same thing whatever is asked reaches that ceiling.

Images are float tensors of shape [N, 3, H, W] with values in [-1, 1] everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .encoder import batches, colour_layout, encoder_stages, pass_through
from .errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

RETRIEVED = 5  # a drawn picture counts as its concept if the true one is among so many nearest
INVERSE_REGULARISATION = 1.0  # scikit-learn's C: a unit Gaussian prior on the standardised weights


# --- statistics of the encoder ------------------------------------------------------------------------------


@torch.no_grad()
def vae_features(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and standard deviation over the picture of every channel after every encoder block: [N, F].

    F is twice the sum of the blocks' widths. The blocks are the down blocks and the middle one.
    """
    return torch.cat([_block_statistics(vae, batch) for batch in batches(vae, images)])


def _block_statistics(vae: AutoencoderKL, images: Tensor) -> Tensor:
    statistics = []
    for stage in encoder_stages(vae, images):
        deviation, mean = torch.std_mean(stage, dim=(2, 3))
        statistics += [mean, deviation]
    return torch.cat(statistics, dim=1).cpu()


# --- the style measure --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StyleMeasure:
    """Tells a target style from a base style. The same pictures given to `fit` make the same measure."""

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
                where=f"style measure: {len(base_pictures)} base and {len(target_pictures)} target pictures",
                fix="give at least a few pictures of each style",
            )
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=5000))
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
        """Share, 0 to 1, of true pictures put in the right style. Use concepts that `fit` has not seen."""
        called_base = self.probability(pass_through(self.vae, base_pictures)) < 0.5
        called_target = self.probability(pass_through(self.vae, target_pictures)) >= 0.5
        return float(np.concatenate([called_base, called_target]).mean())


def _true_features(vae: AutoencoderKL, pictures: Tensor) -> np.ndarray:
    return vae_features(vae, pass_through(vae, pictures)).numpy()


# --- colour layout ------------------------------------------------------------------------------------------


def light_layout(images: Tensor, size: int = 16) -> Tensor:
    """Where it is lighter and darker than on the average, [N, size * size] of mean 0 and deviation 1.

    Blind to colour and contrast, which a style may change as it likes: what is left is the thing that is drawn.
    """
    light = colour_layout(images, size).mean(1).flatten(1)
    return (light - light.mean(1, keepdim=True)) / light.std(1, keepdim=True).clamp_min(1e-6)


def colour_layout_distance(generated: Tensor, true: Tensor) -> Tensor:
    """Distance of each generated picture to the true picture of the same concept: [N].

    The root mean square difference of the layouts, in units of the brightness range: 0 is equal, 1 is white
    for black.
    """
    difference = colour_layout(generated) - colour_layout(true)
    return difference.square().mean(dim=(1, 2, 3)).sqrt()


def wrong_concept_distance(generated: Tensor, true: Tensor) -> Tensor:
    """Mean distance of each generated picture to the true pictures of all *other* concepts: [N], N >= 2.

    Row i of both is the same concept. The unit is that of `colour_layout_distance`.
    """
    shifts = range(1, len(true))
    return torch.stack([colour_layout_distance(generated, true.roll(shift, 0)) for shift in shifts]).mean(0)


# --- retrieval ----------------------------------------------------------------------------------------------


def retrieval_ranks(drawn: Tensor, gallery: Tensor, own: Sequence[int]) -> Tensor:
    """The rank of each drawn picture's true one among all of a gallery, by distance: [N], 0 is the nearest.

    Takes features, [N, F] and [M, F] (a colour layout, latents, ...); `own[i]` is the row of picture i's concept.
    """
    distances = torch.cdist(drawn.flatten(1), gallery.flatten(1))
    return (distances < distances.gather(1, torch.tensor(own)[:, None])).sum(1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of pictures whose true picture is among the k nearest: top-1, top-5."""
    return (ranks < k).float().mean().item()


# --- what a person reads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StyleScore:
    """A LoRA in numbers, each a mean over the same held-out concepts, seeds and sampler settings."""

    accuracy: float  # of the measure on true held-out pictures, 0 to 1
    probability_base: float  # of the target style without the LoRA, 0 to 1
    probability_lora: float  # the same with it
    layout_base: float  # colour-layout distance to the true target picture without the LoRA, 0 to 1
    layout_lora: float  # the same with it
    layout_wrong: float | None = None  # with the LoRA, to the true pictures of other concepts
    retrieval_base: float | None = (
        None  # share whose true picture is among the nearest by light layout, without the LoRA
    )
    retrieval_lora: float | None = None  # the same with it

    @property
    def style_gain(self) -> float:
        """Rise of the probability of the target style, -1 to 1."""
        return self.probability_lora - self.probability_base

    @property
    def layout_change(self) -> float:
        """Relative change of the layout distance: -0.1 is 10 % nearer to the true pictures than the base."""
        return self.layout_lora / self.layout_base - 1

    def sentences(self) -> list[str]:
        """The score in plain English, one line a fact."""
        nearer = "farther from" if self.layout_change > 0 else "nearer to"
        lines = [
            f"The style measure is right on {self.accuracy:.0%} of true pictures that it has not seen.",
            f"Target style: probability {self.probability_base:.2f} without the LoRA, "
            f"{self.probability_lora:.2f} with it ({self.style_gain:+.2f}).",
            f"Prompt: colour-layout distance to the true picture {self.layout_base:.3f} without the LoRA, "
            f"{self.layout_lora:.3f} with it ({abs(self.layout_change):.0%} {nearer} the true picture).",
        ]
        if self.layout_wrong is not None:
            lines.append(f"For scale: distance to the true pictures of other concepts is {self.layout_wrong:.3f}.")
        if self.retrieval_base is not None and self.retrieval_lora is not None:
            lines.append(
                f"Same things: by light and dark, the concept's own picture is among the {RETRIEVED} nearest for "
                f"{self.retrieval_base:.0%} without the LoRA, {self.retrieval_lora:.0%} with it."
            )
        return lines
