"""The flow head: what it reports as its mean is the mean of its samples; temperature scales the noise."""

import torch

from bifrost_cli.models.branch.heads import FlowHead


def trained_head():
    """A head that has learned one latent for each of two hidden states, with a little spread."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = FlowHead(2, 4, hidden=64, blocks=2)
    centres = torch.tensor([[2.0, -1.0, 0.0, 1.0], [-2.0, 1.0, 1.0, 0.0]])
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(400):
        which = torch.randint(2, (256,), generator=generator)
        target = centres[which] + 0.1 * torch.randn(256, 4, generator=generator)
        optimizer.zero_grad()
        head.loss(torch.eye(2)[which], target, generator).backward()
        optimizer.step()
    return head, centres


def test_the_mean_is_that_of_the_samples():
    head, centres = trained_head()
    with torch.no_grad():
        noise = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
        samples = torch.stack([head.guided(row.expand(500, 2), None, 1.0, noise).mean(0) for row in torch.eye(2)])
        mean = head.mean(torch.eye(2))
        assert (mean - samples).pow(2).mean() < 0.02
        assert (mean - centres).pow(2).mean() < 0.02
        assert torch.equal(mean, head.mean(torch.eye(2)))


def test_temperature_scales_the_noise():
    head, _ = trained_head()
    noise, hidden = torch.randn(8, 4), torch.eye(2)[torch.zeros(8, dtype=torch.long)]
    with torch.no_grad():
        assert torch.equal(
            head.guided(hidden, None, 1.0, noise, temperature=0.5), head.guided(hidden, None, 1.0, 0.5 * noise)
        )
