"""The benchmark's customary prior is the same function as ours, so that the two are worth comparing."""

import torch
import torch.nn.functional as F

from prior.model import GatedLayer, GatedPixelCNN, PriorConfig
from tests.customary import CustomaryPrior


def test_the_customary_prior_with_our_weights_gives_our_logits() -> None:
    torch.manual_seed(0)
    ours = GatedPixelCNN(PriorConfig(width=8), num_codes=16, map_shape=(7, 7)).double()
    customary = CustomaryPrior(PriorConfig(width=8), num_codes=16).double()
    weights = ours.state_dict()
    for name, weight in ours.state_dict().items():
        if name.endswith(".vertical.weight"):
            weights[name] = F.pad(weight, (0, 0, 0, 1), value=9)  # the masked row, of any value
        if name.endswith(".horizontal.weight"):
            weights[name] = F.pad(weight, (0, 1), value=9)
    masks = {name: mask for name, mask in customary.state_dict().items() if name.endswith(".mask")}
    customary.load_state_dict({**weights, **masks})
    maps, labels = torch.randint(16, (5, 7, 7)), torch.arange(5)
    assert len(masks) == 2 * sum(isinstance(module, GatedLayer) for module in ours.modules())
    torch.testing.assert_close(customary(maps, labels), ours(maps, labels))
