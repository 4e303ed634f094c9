"""A new objective is one module and one line in the registry: it trains, logs, draws, and a card describes it."""

import pathlib
import re
import sys
import textwrap

import pytest
import torch

from modeling_vitreg.cards.card import citations_of
from modeling_vitreg.pretraining.build import make_objective
from modeling_vitreg.pretraining.estimate import estimate
from modeling_vitreg.pretraining.monitoring.curves import draw_curves
from modeling_vitreg.pretraining.objectives import registry
from modeling_vitreg.pretraining.run.recipe import make_recipe


TOY = '''
    import dataclasses

    from torch import nn

    from modeling_vitreg.pretraining.objectives.objective import Objective, Panel


    @dataclasses.dataclass(frozen=True)
    class ToySettings:
        """Settings of the toy."""

        scale: float = 1.0


    class Toy(Objective):
        """Predict the mean colour of an image from its class token."""

        description = "prediction of the mean colour of an image"
        citation = "@misc{toy2026, title = {Toy}}"
        settings_class = ToySettings
        metrics = ("colour_error",)
        panels = (*Objective.panels, Panel("Error of the colour", {"colour_error": "colour"}))
        needs_cls_token = has_single_view = True

        def __init__(self, backbone, crops, *, settings, **common):
            super().__init__(backbone, crops, **common)
            self.backbone, self.settings = backbone, settings
            self.head = nn.Linear(backbone.config.hidden_size, 3)

        @property
        def encoder(self):
            return self.backbone

        @property
        def trained(self):
            return {"backbone": self.backbone, "head": self.head}

        def forward(self, batch, *, step):
            images = batch["global_views"].flatten(0, 1)
            error = self.head(self.backbone(images).cls_token) - images.mean(dim=(2, 3))
            return {"total": self.settings.scale * error.square().mean()}

        def evaluate(self, model, images, targets):
            return {"colour_error": 0.25}
'''
RECIPE = {
    "objective": "toy",
    "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
    "crops": {"num_global": 1, "num_local": 0, "global_size": 16},
    "settings": {"scale": 2},
    "num_steps": 4,
    "batch_size": 4,
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_objective.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.OBJECTIVES, "toy", "toy_objective:Toy")
    yield make_objective(make_recipe(RECIPE)).train()
    sys.modules.pop("toy_objective", None)


def test_a_new_objective_trains_logs_and_draws(toy, drawn, tmp_path):
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.05)
    records = []
    for step in range(8):
        loss = toy({"global_views": torch.full((1, 4, 3, 16, 16), 0.5)}, step=step)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        records.append({"step": step, "total": loss.item(), **toy.evaluate(toy.saved, None, {})})
    assert records[-1]["total"] < records[0]["total"]
    draw_curves(records, tmp_path / "curves.png", panels=toy.panels)
    assert [ax.get_title(loc="left") for ax in drawn[0].axes] == ["Loss", "Error of the colour"]


def test_a_new_objective_has_an_estimate_and_a_sentence_and_a_citation_in_the_card(toy):
    assert estimate(make_recipe(RECIPE), num_processes=1, micro_batch=4).parameters["head"] == 3 * 16 + 3
    assert registry.describe_objective("toy") == "prediction of the mean colour of an image"
    assert "@misc{toy2026, title = {Toy}}" in citations_of(registry.citation_of("toy"))


def test_what_an_objective_does_not_use_is_refused(toy):
    for changes, message in (
        ({"masks.ratio": [0.2, 0.3]}, "none for the objective 'toy'"),
        ({"settings.scael": 1}, "did you mean 'scale'"),
        ({"crops.num_local": 1}, "takes one view"),
        ({"model.has_mask_token": True}, "would not train a mask token"),
        ({"objective": "toi"}, "did you mean 'toy'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_objective(make_recipe(RECIPE).with_changes(changes))


def test_an_unknown_objective_has_no_description_and_no_citation():
    assert registry.describe_objective("of another version") == "of another version"
    assert registry.citation_of("of another version") is None
    assert registry.citation_of(None) is None


def test_names_of_objectives_stand_in_the_registry_alone():
    root = pathlib.Path(__file__).parents[2]
    names = set(registry.OBJECTIVES) - {"depth", "clip"}  # a kind of map, and the older name of max_grad_norm
    literal = re.compile(rf"""["']({"|".join(names)})["']""")
    files = [*(root / "modeling_vitreg" / "pretraining").rglob("*.py"), *(root / "examples").glob("*.py")]
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in files
        if path.name != "registry.py"
        for line in path.read_text().splitlines()
        if literal.search(line) and not line.strip().startswith(("citation = ", "objective: str = "))
    ]
    assert not found
