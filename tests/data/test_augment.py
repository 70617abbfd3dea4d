"""Random crops and mirror images, against torchvision's."""

import pytest
import torch
from torchvision.transforms.functional import crop, hflip, pad

from fedq.data.augment import CropAndFlip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_crop_and_mirror_image_is_as_frequent_as_the_others():
    image = torch.randn(3, 4, 5)
    got = CropAndFlip(padding=1)(image.expand(3600, -1, -1, -1), generator())
    padded = pad(image, [1])
    crops = [crop(padded, top, left, 4, 5) for top in range(3) for left in range(3)]
    allowed = torch.stack(crops + [hflip(c) for c in crops])
    counts = (got[:, None] == allowed).flatten(2).all(2).sum(0)
    assert counts.sum() == 3600  # no further image
    assert ((counts - 200).abs() < 4 * 14).all()  # four deviations


def test_each_smaller_crop_is_as_frequent_as_the_others():
    image = torch.randn(3, 5, 4)
    got = CropAndFlip(padding=0, size=3)(image.expand(2400, -1, -1, -1), generator())
    crops = [crop(image, top, left, 3, 3) for top in range(3) for left in range(2)]
    counts = (got[:, None] == torch.stack(crops + [hflip(c) for c in crops])).flatten(2).all(2).sum(0)
    assert counts.sum() == 2400  # no further image
    assert ((counts - 200).abs() < 4 * 14).all()  # four deviations


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, 0), (1.0, 20)])
def test_flip_is_a_probability(flip, mirrored):
    x = torch.randn(20, 1, 3, 3)
    got = CropAndFlip(padding=0, flip=flip)(x, generator())
    assert torch.equal(got, hflip(x) if mirrored else x)


def test_the_generator_decides_alone():
    x = torch.randn(50, 3, 8, 8)
    before, expected = x.clone(), CropAndFlip()(x, generator())
    torch.manual_seed(7)
    assert torch.equal(CropAndFlip()(x, generator()), expected)
    assert not torch.equal(CropAndFlip()(x, generator(1)), expected)
    assert torch.equal(x, before)


def test_wrong_arguments_and_inputs_are_named():
    with pytest.raises(ValueError, match="padding must be"):
        CropAndFlip(padding=-1)
    with pytest.raises(ValueError, match="flip must be from 0 to 1"):
        CropAndFlip(flip=1.5)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 9\) have no crop of 9 × 9: set client.augment.size lower"):
        CropAndFlip(padding=0, size=9)(torch.zeros(2, 3, 8, 9), generator())
    with pytest.raises(ValueError, match=r"takes images \(N, C, H, W\), not \(3, 5\)"):
        CropAndFlip()(torch.zeros(3, 5), generator())
