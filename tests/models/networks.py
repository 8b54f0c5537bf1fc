"""Networks with random weights, and their gradients."""

import torch


def perturbed(model, seed: int = 0):
    """Move every parameter away from its first value, so that residual branches count too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model, images, weight):
    inputs = images.clone().requires_grad_()
    logits = model(inputs)
    names = ["images", *(name for name, _ in model.named_parameters())]
    found = torch.autograd.grad((logits * weight).sum(), [inputs, *model.parameters()])
    return logits, dict(zip(names, found, strict=True))
