from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from prior.evaluation import classifier
from prior.evaluation.classifier import Classifier, ClassifierConfig, extract_features, load_classifier
from prior.evaluation.classifier_training import ClassifierTraining, evaluate_classifier
from tests.helpers import CPU, SHIPPED, make_info, make_split, mnist, save_model
from vqvae.errors import InputError, MissingFileError


def make_classifier(shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10, width: int = 4) -> Classifier:
    """A classifier in eval mode whose batch statistics are no longer those of a fresh one."""
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(width), shape, num_classes).train()
    model(torch.randn(16, *shape))
    return model.eval()


@pytest.mark.parametrize(("shape", "num_classes", "batch"), [((1, 28, 28), 1, 500), ((3, 20, 36), 26, 5)])
def test_features_and_probabilities_are_those_of_each_image_alone_and_every_layers_mode_is_restored(
    shape: tuple[int, int, int], num_classes: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", batch)
    model, split = make_classifier(shape, num_classes, width=5), make_split(11, shape, num_classes)
    with torch.no_grad():
        logits = torch.cat([model(image[None].double().div(127.5).sub(1).float()) for image in split.images])
    model.train().trunk[1].eval()
    modes = [module.training for module in model.modules()]
    features, probabilities = extract_features(model, split.images)
    evaluate_classifier(model, split)
    assert [module.training for module in model.modules()] == modes
    assert features.shape == (11, 20)
    torch.testing.assert_close(model.head(features), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(probabilities, logits.exp() / logits.exp().sum(1, keepdim=True), atol=1e-5, rtol=0)


def test_a_loaded_classifier_sees_what_the_saved_one_saw_and_the_shipped_one_knows_the_digits(tmp_path: Path) -> None:
    path, model, images = tmp_path / "c.safetensors", make_classifier((3, 32, 32), 3), make_split(5, (3, 32, 32)).images
    with pytest.raises(MissingFileError, match=r"a classifier checkpoint at .*, found none; .*`train_classifier\(\)`$"):
        load_classifier(path, CPU)
    saved = save_model(path, model.train(), "classifier", make_info((3, 32, 32), 3))
    loaded, header = load_classifier(path, CPU)
    assert (loaded.training, header.fingerprint) == (False, saved.fingerprint)
    assert all(map(torch.equal, extract_features(loaded, images), extract_features(model, images)))
    model, header = load_classifier(SHIPPED / "classifier.safetensors", CPU)  # trained by the defaults
    assert evaluate_classifier(model, mnist().load_test())["cross_entropy"] < 0.003
    defaults = asdict(ClassifierConfig()) | asdict(ClassifierTraining())
    assert all(defaults[name] == value for name, value in header.recipe.items() if name not in ("seed", "data"))
    for width in (0, 513):
        with pytest.raises(InputError, match=f"`width` between 1 and 512, found {width}"):
            ClassifierConfig(width)
