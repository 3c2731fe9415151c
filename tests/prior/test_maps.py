import torch

from prior.maps import hide_unknown


def test_the_cells_of_unknown_codes_are_grey_and_the_others_are_as_they_were() -> None:
    images, maps = torch.rand(2, 3, 4, 6), torch.tensor([[[0, 5, -1], [-1, 1, 2]], [[0, 0, 0], [0, 0, 0]]])
    hidden = hide_unknown(images, maps)
    assert (hidden[0, :, :2, 4:] == 0.5).all()
    assert (hidden[0, :, 2:, :2] == 0.5).all()
    assert torch.equal(hidden[0, :, :2, :4], images[0, :, :2, :4])
    assert torch.equal(hidden[0, :, 2:, 2:], images[0, :, 2:, 2:])
    assert torch.equal(hidden[1], images[1])
