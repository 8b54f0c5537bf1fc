"""SimMIM (arXiv 2111.09886): predict the hidden pixels by one linear layer on the encoder's last map."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import nn

from dsmim.models.build import materialised
from dsmim.models.initialise import DEVIATION


class SimMIM(nn.Module):
    """A masked autoencoder around `encoder`, a network of dsmim without head.

    Its own parameters are created like the encoder's: on the meta device, or filled (see build.py).

    The decoder predicts stride² pixels of encoder.in_chans channels for each position of the encoder's last map.

    target_window: side in pixels (odd) of the sliding window that normalises the target; None: plain pixels.
    Key names: `encoder.*` as in timm, `mask_token`, and `decoder.0` as in microsoft/SimMIM.
    Raises ValueError for an encoder that is not dsmim's own.
    """

    def __init__(self, encoder: nn.Module, target_window: int | None = None):
        super().__init__()
        if not hasattr(encoder, "encode"):
            raise ValueError("task.name: simmim pre-trains dsmim's own networks; one of timm can be fine-tuned only")
        self.encoder = encoder
        self.patch, self.stride = encoder.patch, encoder.stride
        self.target_window = target_window
        with torch.device("meta"):
            self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
            self.decoder = nn.Sequential(
                nn.Conv2d(encoder.num_features, self.stride**2 * encoder.in_chans, kernel_size=1),
                nn.PixelShuffle(self.stride),
            )
        if not any(parameter.is_meta for parameter in encoder.parameters()):
            materialised(self)

    def initialise(self) -> None:
        """Set the first value of the mask token; the encoder and the decoder have their own."""
        trunc_normal_(self.mask_token, std=DEVIATION)  # as microsoft/SimMIM for Swin

    def forward(self, images: torch.Tensor, mask: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Return the mean absolute error over the hidden pixels and all channels.

        images (B, C, H, W), normalised; mask (B, H/patch, W/patch), true or 1 where hidden.
        reduction "mean": a scalar over the whole batch, as the authors compute it (with their 1e-5 in the denominator);
        "image_sum": (B,), the plain sum of each image's absolute errors, for exact evaluation.
        """
        assert reduction in ("mean", "image_sum"), reduction
        hidden = self.hidden_pixels(mask).float()
        error = (self.target(images) - self.reconstruct(images, mask).float()).abs() * hidden  # (B, C, H, W)
        if reduction == "image_sum":
            return error.sum(dim=(1, 2, 3))
        return error.sum() / (hidden.sum() + 1e-5) / images.shape[1]

    def reconstruct(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the prediction of `target` for every pixel, (B, C, H, W).

        Raises ValueError for a mask that does not have the shape of the tokens.
        """
        x = self.encoder.tokens(images)  # (B, h, w, D)
        if mask.shape != x.shape[:3]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the tokens {tuple(x.shape[:3])}")
        weight = mask.unsqueeze(-1).to(x.dtype)  # (B, h, w, 1)
        x = x * (1 - weight) + self.mask_token.unsqueeze(0).to(x.dtype) * weight
        return self.decoder(self.encoder.encode(x))

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Return what is predicted: the images, or the images normalised within a sliding window."""
        images = images.float()
        return images if self.target_window is None else sliding_norm(images, self.target_window)

    def undo_target(self, prediction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return what `target` maps to the prediction, (B, C, H, W): normalised pixels.

        images (B, C, H, W): the originals, normalised. If the target is normalised, the mean and deviation of their
        windows scale the prediction back, so the result shows what the model adds to these.
        """
        if self.target_window is None:
            return prediction
        mean, deviation = sliding_statistics(images.float(), self.target_window)
        return prediction * deviation + mean

    def hidden_pixels(self, mask: torch.Tensor) -> torch.Tensor:
        """Return a token mask (B, h, w) as a pixel mask (B, 1, H, W)."""
        return mask.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2).unsqueeze(1)


def sliding_norm(images: torch.Tensor, window: int) -> torch.Tensor:
    """Normalise every pixel of (B, C, H, W) by the mean and deviation of the window around it, per channel.

    Source: NORM_TARGET in microsoft/Swin-Transformer's SimMIM configurations for Swin V2 (47 pixels).
    """
    mean, deviation = sliding_statistics(images, window)
    return (images - mean) / deviation


def sliding_statistics(images: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean, and square root of the unbiased variance plus 1e-6, of the window around every pixel, per channel.

    images (B, C, H, W); window: side in pixels, odd. At the border the window is cut.
    """
    assert window % 2, window
    count = _window_sum(torch.ones_like(images[:1, :1]), window)  # (1, 1, H, W): pixels inside, fewer at the border
    # First subtract the mean: the variance is a difference of two sums and would lose digits to a large mean.
    centre = images.mean(dim=(2, 3), keepdim=True)
    shifted = images - centre
    mean = _window_sum(shifted, window) / count
    square = _window_sum(shifted**2, window) / count
    variance = ((square - mean**2) * count / (count - 1)).clamp(min=0)
    return mean + centre, (variance + 1e-6).sqrt()


def _window_sum(x: torch.Tensor, window: int) -> torch.Tensor:
    """Return the sum over the window around every pixel, cut at the border: differences of running sums, per dimension.

    The cost does not grow with the window, unlike that of average pooling. Autocast keeps running sums in fp32.
    """
    for dim in (2, 3):
        size, half = x.shape[dim], window // 2
        running = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.cumsum(dim)], dim)
        centre = torch.arange(size, device=x.device)
        above, below = (centre + half + 1).clamp(max=size), (centre - half).clamp(min=0)
        x = running.index_select(dim, above) - running.index_select(dim, below)
    return x
