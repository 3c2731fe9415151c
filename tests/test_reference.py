"""The benchmark's reference prior is the same function as the project's, so that the two can be compared."""

import torch
import torch.nn.functional as F

from prior.model import GatedLayer, GatedPixelCNN, PriorConfig
from tests.reference import ReferencePrior


def test_the_reference_prior_with_the_projects_weights_gives_its_logits() -> None:
    torch.manual_seed(0)
    project = GatedPixelCNN(PriorConfig(width=8), num_codes=16, map_shape=(7, 7), num_classes=10).double()
    reference = ReferencePrior(PriorConfig(width=8), num_codes=16).double()
    weights = project.state_dict()
    for name, weight in project.state_dict().items():
        if name.endswith(".vertical.weight"):
            weights[name] = F.pad(weight, (0, 0, 0, 1), value=9)  # the masked row, of any value
        if name.endswith(".horizontal.weight"):
            weights[name] = F.pad(weight, (0, 1), value=9)
    masks = {name: mask for name, mask in reference.state_dict().items() if name.endswith(".mask")}
    reference.load_state_dict({**weights, **masks})
    maps, labels = torch.randint(16, (5, 7, 7)), torch.arange(5)
    assert len(masks) == 2 * sum(isinstance(module, GatedLayer) for module in project.modules())
    torch.testing.assert_close(reference(maps, labels), project(maps, labels))
