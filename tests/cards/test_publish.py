"""The real client of the Hub against a stand-in: what arrives, what a stranger loads, what a failure leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hub_stand_in import Cut, HubStandIn
from safetensors.torch import load_file, save_file
from transformers import pipeline

from modeling_vitreg import ViTWithRegistersForImageClassification, ViTWithRegistersModel
from modeling_vitreg.cards import record_expected_outputs
from modeling_vitreg.pretraining.objectives.clip import CLIP, CLIPSettings
from modeling_vitreg.pretraining.views.crops import CropSettings


# Publishes what each line of its input says; the network is used here only. Without "check" nothing is loaded.
WORKER = """
import json, sys
from modeling_vitreg.cards import CardError, PublishError, publish
module = sys.modules["modeling_vitreg.cards.upload"]
real = module.check_plan
for line in sys.stdin:
    options, said = json.loads(line), []
    module.check_plan = real if options.pop("check", False) else lambda plan, **kwargs: plan
    try:
        done = publish(**options, say=said.append)
        answer = {"commit": done.commit, "url": done.url, "files": sorted(done.plan.files), "card": done.plan.card}
    except (CardError, PublishError) as error:
        answer = {"error": type(error).__name__, "words": str(error)}
    print(json.dumps(answer | {"said": said}), flush=True)
"""


class Publisher:
    """A process that publishes, with the settings that the client reads when it is imported."""

    def __init__(self, hub, home, **environment):
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=hub.environment(home, **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def begin(self, folder, repo_id="user/name", **options):
        self._process.stdin.write(json.dumps({"folder": str(folder), "repo_id": repo_id, **options}) + "\n")
        self._process.stdin.flush()

    def __call__(self, folder, repo_id="user/name", **options):
        self.begin(folder, repo_id, **options)
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read()
        return json.loads(line)

    def kill(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubStandIn(tmp_path_factory.mktemp("hub"), tokens={"hf_of_user": "user", "hf_other": "other"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def publisher(hub, tmp_path_factory):
    publisher = Publisher(hub, tmp_path_factory.mktemp("home"))
    yield publisher
    publisher.kill()


@pytest.fixture(autouse=True)
def _without_faults(hub):
    hub.cut, hub.delay, hub.refuses_tokens, hub.card_errors, hub.requests, hub.num_bytes = None, 0.0, False, [], [], 0


def _make_model(folder, **settings):
    from conftest import TINY

    from modeling_vitreg import ViTWithRegistersConfig

    model = ViTWithRegistersModel(ViTWithRegistersConfig(**{**TINY, "initializer_range": 0.2, **settings})).eval()
    model.save_pretrained(folder)
    record_expected_outputs(folder, model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its fingerprint, and things that must not travel."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    _make_model(folder)
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / ".env").write_text("SECRET=1")
    (folder / "README.md").write_text("The best model of all, 99.9 %")
    return folder


def _large(hub):
    """Requests that sent the content of a large file."""
    return [request for request in hub.requests if request.startswith("PUT /lfs/")]


def test_a_dry_run_checks_everything_and_sends_nothing(hub, publisher, folder):
    answer = publisher(folder, "user/dry", dry_run=True)
    assert (answer["commit"], hub.requests) == (None, [])
    assert "model.safetensors" in answer["files"] and "user/dry" in answer["card"]


def test_what_is_published_gives_the_same_outputs_to_a_stranger(hub, publisher, folder, tmp_path):
    answer = publisher(folder, "user/name", check=True)
    assert "with the recorded outputs" in answer["said"][0]
    files = hub.files("user/name")
    assert set(files) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "configuration_vitreg.py",
        "expected_outputs.json",
        "image_processing_vitreg.py",
        "model.safetensors",
        "modeling_vitreg.py",
        "positions_vitreg.py",
        "preprocessor_config.json",
        "token_reduction_vitreg.py",
    }
    assert hub.repos["user/name"]["private"]
    assert hub.read("user/name", "model.safetensors") == (folder / "model.safetensors").read_bytes()
    assert len(hub.repos["user/name"]["commits"]) == 2  # the initial one of the Hub, and ours

    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = ViTWithRegistersModel.from_pretrained(folder).eval()(images).last_hidden_state
    save_file({"images": images}, tmp_path / "images.safetensors")
    program = f"""
        import sys
        sys.modules["modeling_vitreg"] = None
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModel
        model = AutoModel.from_pretrained("user/name", trust_remote_code=True, revision="{answer["commit"]}")
        with torch.no_grad():
            output = model(load_file("images.safetensors")["images"])
        save_file({{"tokens": output.last_hidden_state}}, "tokens.safetensors")
    """
    environment = hub.environment(tmp_path / "home")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert torch.equal(load_file(tmp_path / "tokens.safetensors")["tokens"], expected)


def test_publishing_again_sends_no_large_file_and_makes_no_commit(hub, publisher, folder):
    first = publisher(folder, "user/again")
    hub.requests = []
    assert publisher(folder, "user/again")["commit"] == first["commit"]
    assert _large(hub) == [] and not any("/commit/" in request for request in hub.requests)


def test_an_upload_that_was_killed_leaves_nothing_to_see_and_goes_on(hub, publisher, tmp_path):
    # Larger than what the system buffers, so that the process is killed in the middle.
    _make_model(tmp_path / "model", hidden_size=256, intermediate_size=2048, num_hidden_layers=4)
    doomed = Publisher(hub, tmp_path / "home")
    hub.delay = 0.05
    doomed.begin(tmp_path / "model", "user/killed")
    deadline = time.monotonic() + 60
    while hub.num_bytes < 2**18 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 0 < hub.num_bytes < (tmp_path / "model" / "model.safetensors").stat().st_size
    doomed.kill()
    hub.delay = 0.0
    assert set(hub.files("user/killed")) == {".gitattributes"}
    assert "commit" in publisher(tmp_path / "model", "user/killed")
    expected = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert hub.read("user/killed", "model.safetensors") == expected


def test_a_cut_before_the_commit_is_said_and_what_has_arrived_is_not_sent_again(hub, publisher, folder):
    _make_model(folder.parent / "cut", initializer_range=0.3)  # other weights than those that are there already
    hub.cut = Cut("POST .*/commit/")
    answer = publisher(folder.parent / "cut", "user/cut")
    assert answer["error"] == "PublishError" and "broke" in answer["words"] and "same command again" in answer["words"]
    assert len(_large(hub)) == 1 and set(hub.files("user/cut")) == {".gitattributes"}
    hub.cut, hub.requests = None, []
    assert publisher(folder.parent / "cut", "user/cut")["commit"]
    assert _large(hub) == [] and "model.safetensors" in hub.files("user/cut")


def test_a_cut_in_the_middle_of_a_large_file_is_tried_again(hub, publisher, folder):
    _make_model(folder.parent / "hiccup", initializer_range=0.4)
    hub.cut = Cut("PUT /lfs/", after_bytes=1000, times=1)
    assert publisher(folder.parent / "hiccup", "user/hiccup")["commit"]
    assert len(_large(hub)) == 2


def test_a_hub_that_cannot_be_reached_is_said_before_anything_is_loaded(hub, publisher, folder):
    hub.cut = Cut("GET /api/whoami-v2")
    answer = publisher(folder, check=True)
    assert answer["error"] == "PublishError" and "the connection to" in answer["words"]
    assert answer["said"] == []


def test_a_refused_token_is_said_with_what_to_type(hub, publisher, folder):
    hub.refuses_tokens = True
    answer = publisher(folder, "user/refused")
    assert answer["error"] == "PublishError"
    assert "refused the token" in answer["words"] and "hf auth login" in answer["words"]
    assert "hf_of_user" not in answer["words"] and "user/refused" not in hub.repos


def test_a_name_of_somebody_else_is_refused_before_anything_is_sent(hub, publisher, folder):
    answer = publisher(folder, "other/name")
    assert "other/name belongs to other, but the token belongs to user: publish as user/name" in answer["words"]
    assert hub.requests == ["GET /api/whoami-v2"]


def test_a_token_that_may_only_read_is_said(hub, publisher, folder):
    hub.add("user/guarded", {"README.md": b"theirs"})
    hub.repos["user/guarded"]["owner"], hub.repos["user/guarded"]["private"] = "other", False
    answer = publisher(folder, "user/guarded", is_public=True)
    assert "the token may not write to user/guarded" in answer["words"]
    assert hub.read("user/guarded", "README.md") == b"theirs"


def test_private_weights_do_not_go_into_a_public_repository(hub, publisher, folder):
    hub.add("user/open", {"README.md": b"old"}, is_private=False)
    answer = publisher(folder, "user/open")
    assert answer["error"] == "PublishError" and "is public: confirm" in answer["words"]
    assert set(hub.files("user/open")) == {"README.md"}
    assert publisher(folder, "user/open", is_public=True)["commit"]


def test_a_public_repository_is_opened_only_when_everything_is_there(hub, publisher, folder):
    hub.cut = Cut("POST .*/commit/")
    publisher(folder, "user/public", is_public=True)
    assert hub.repos["user/public"]["private"]
    hub.cut = None
    publisher(folder, "user/public", is_public=True)
    assert not hub.repos["user/public"]["private"]


def test_a_branch_is_made_and_main_stays_as_it_was(hub, publisher, folder):
    publisher(folder, "user/branches", revision="step-100")
    assert set(hub.files("user/branches")) == {".gitattributes"}
    assert "model.safetensors" in hub.files("user/branches", "step-100")


def test_shards_and_reports_of_an_earlier_upload_do_not_stay(hub, publisher, folder):
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "reports/evaluation.json", "notes.txt"]
    hub.add("user/stale", dict.fromkeys(old, b"old"))
    publisher(folder, "user/stale")
    assert set(old) & set(hub.files("user/stale")) == {"notes.txt"}


def test_a_gated_licence_keeps_its_gate(hub, publisher, tmp_path):
    from test_cards import conversion_report

    _make_model(tmp_path / "model")
    conversion_report(tmp_path / "model", licence="dinov3-license")
    answer = publisher(tmp_path / "model", "user/gated", is_public=True)
    assert answer["error"] == "CardError" and "--accept-license dinov3-license" in answer["words"]
    publisher(tmp_path / "model", "user/gated", is_public=True, accepts_licence="dinov3-license")
    assert (hub.repos["user/gated"]["private"], hub.repos["user/gated"]["gated"]) == (False, "auto")


def test_no_token_is_said_with_what_to_type(hub, folder, tmp_path):
    publisher = Publisher(hub, tmp_path / "home", token=None)
    answer = publisher(folder)
    publisher.kill()
    assert "there is no token" in answer["words"] and "hf auth login" in answer["words"]
    assert hub.requests == []


def test_an_adapter_is_published_for_a_model_that_others_have(hub, publisher, folder, tmp_path, photograph):
    import peft

    publisher(folder, "user/base")
    model = ViTWithRegistersForImageClassification.from_pretrained(folder, num_labels=5)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["register_tokens", "classifier"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    answer = publisher(tmp_path / "adapter", "user/adapter", licence="mit")
    assert "publish it first" in answer["words"]  # base_model_name_or_path is a folder here

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "user/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    answer = publisher(tmp_path / "adapter", "user/adapter", licence="mit", check=True)
    assert answer.get("commit"), answer
    assert {"README.md", "adapter_model.safetensors", "expected_outputs.json"} <= set(hub.files("user/adapter"))
    assert "base_model_relation: adapter" in answer["card"] and "for `user/base`" in answer["card"]

    photograph.resize((64, 64)).save(tmp_path / "photograph.jpg")
    (program,) = re.findall(r"```python\n(.*?)```", answer["card"], re.DOTALL)
    program = "import sys; sys.modules['modeling_vitreg'] = None\n" + program
    environment = hub.environment(tmp_path / "home")
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "'logits': torch.Size([1, 5])" in run.stdout


def test_a_card_that_the_hub_refuses_is_said_in_its_words(hub, publisher, folder):
    hub.card_errors = ["license is not one of ours"]
    answer = publisher(folder, "user/refused-card")
    assert answer["error"] == "PublishError" and "license is not one of ours" in answer["words"]
    assert _large(hub) == []


def test_a_clip_run_is_published_and_gives_a_stranger_the_same_numbers(hub, publisher, tiny, tmp_path, photograph):
    run, texts = tmp_path / "run", ("a red ball", "a blue cube")
    objective = CLIP(
        ViTWithRegistersModel(tiny(initializer_range=0.2)),
        settings=CLIPSettings(
            words=("a", "red", "ball"), text_width=32, num_text_layers=1, num_text_heads=2, num_tokens=12
        ),
        crops=CropSettings(num_global=1, num_local=0, global_size=32),
        num_steps=1,
    ).eval()
    objective.write(objective.saved, run / "model")
    facts = {"steps": 7, "data": {"name": "scenes", "split": "train"}, "recipe": {"objective": "clip"}}
    (run / "training.json").write_text(json.dumps(facts))
    answer = publisher(run, "user/clip", licence="mit", check=True)
    assert answer.get("commit"), answer
    assert "loads without the package, with the same outputs" in answer["said"][0]
    files = {"dual_encoder_vitreg.py", "tokenizer.json", "preprocessor_config.json", "expected_outputs.json"}
    assert files <= set(hub.files("user/clip"))
    assert "pipeline_tag: zero-shot-image-classification" in answer["card"] and "radford2021clip" in answer["card"]
    assert "A Vision Transformer with 4 registers" in answer["card"] and str(tmp_path) not in answer["card"]

    photograph.resize((64, 64)).save(tmp_path / "photograph.jpg")
    program = f"""
        import json, sys
        sys.modules["modeling_vitreg"] = None
        from transformers import AutoModel, pipeline
        classify = pipeline("zero-shot-image-classification", model="user/clip", trust_remote_code=True)
        found = classify("photograph.jpg", candidate_labels={texts}, hypothesis_template="{{}}")
        model = AutoModel.from_pretrained("user/clip", trust_remote_code=True)
        inputs = classify.tokenizer({texts}, return_tensors="pt", padding=True)
        json.dump([found, model.get_text_features(**inputs).tolist()], open("found.json", "w"))
    """
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, features = json.loads((tmp_path / "found.json").read_text())
    inputs = objective.make_text.tokenizer(texts, return_tensors="pt", padding=True)
    torch.testing.assert_close(torch.tensor(features), objective.model.get_text_features(**inputs))
    classify = pipeline("zero-shot-image-classification", model=str(run / "model"))
    expected = classify(str(tmp_path / "photograph.jpg"), candidate_labels=texts, hypothesis_template="{}")
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


def test_a_training_run_travels_with_its_facts_and_pictures(hub, publisher, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    answer = publisher(run, "user/run")
    assert "training run has not finished" in answer["words"]
    (run / "training.json").write_text(json.dumps({"steps": 7, "data": {"name": "scenes", "split": "train"}}))
    (run / "curves.png").write_bytes(b"\x89PNG\0")
    (run / "state").mkdir()
    answer = publisher(run, "user/run")
    assert {"training/training.json", "training/curves.png", "model.safetensors"} <= set(hub.files("user/run"))
    assert not any("state" in path or ".env" in path for path in hub.files("user/run"))
    assert os.path.basename(str(tmp_path)) not in answer["card"]
