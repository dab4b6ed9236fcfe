"""DINO, CLIP-I and CLIP-T, with tiny models of the real classes; and pictures side by side."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPModel, ViTImageProcessorPil, ViTModel

from pica.experiments.pipelines.diffusion.grid import picture_grid
from pica.experiments.pipelines.diffusion.scores import SubjectScores
from tests.experiments.tiny_diffusion import subject, tiny_tokenizer
from tests.experiments.tiny_vision import write_tiny_vision


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vision(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": 514,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_scores_are_mean_cosines(vit: Path, clip: Path):
    drawn, real = [subject(1), subject(2)], [subject(3), subject(4), subject(5)]
    prompts = ["a sks disc", "a disc with a very long description that does not fit"]
    scores = SubjectScores(str(vit), str(clip))
    found = scores.measure(drawn, prompts, real)
    assert set(found) == {"dino", "clip_i", "clip_t"}
    assert scores.missing == {}

    processor = ViTImageProcessorPil.from_pretrained(vit)
    pixels = [processor(images=pictures, return_tensors="pt")["pixel_values"] for pictures in (drawn, real)]
    model = ViTModel.from_pretrained(vit).eval()
    with torch.no_grad():
        one, other = (model(each).last_hidden_state[:, 0].double() for each in pixels)
    for index in range(2):
        expected = sum(cosine_similarity(one[index], each, dim=0).item() for each in other) / 3
        assert found["dino"][index] == pytest.approx(expected, abs=1e-5)

    both = CLIPModel.from_pretrained(clip).eval()
    tokens = tiny_tokenizer()(prompts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        output = both(pixel_values=pixels[0], input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        theirs = both(pixel_values=pixels[1], input_ids=tokens["input_ids"]).image_embeds
    for index in range(2):
        text = cosine_similarity(output.image_embeds[index], output.text_embeds[index], dim=0).item()
        assert found["clip_t"][index] == pytest.approx(text, abs=1e-5)
        image = sum(cosine_similarity(output.image_embeds[index], each, dim=0).item() for each in theirs) / 3
        assert found["clip_i"][index] == pytest.approx(image, abs=1e-5)


def test_a_picture_is_most_like_itself(vit: Path):
    found = SubjectScores(str(vit), None).measure([subject(1), Image.new("RGB", (32, 32))], ["", ""], [subject(1)])
    assert found["dino"][0] == pytest.approx(1.0, abs=1e-5)
    assert found["dino"][1] < 0.999


def test_what_cannot_be_measured_is_said(tmp_path: Path):
    scores = SubjectScores(str(tmp_path / "nowhere"), None)
    assert scores.measure([subject(1)], ["a"], [subject(2)]) == {}
    assert scores.missing["dino"].startswith(f"model {tmp_path / 'nowhere'} is not available locally")
    assert scores.missing["clip_i"] == scores.missing["clip_t"] == "dreambooth.clip names no model"


def test_a_grid_holds_every_picture_where_it_belongs():
    colours = {"before": ("red", "lime"), "after": ("blue", "yellow")}
    columns = {title: [Image.new("RGB", (64, 64), each) for each in made] for title, made in colours.items()}
    sheet = picture_grid(columns, ["one prompt", "another"], [Image.new("RGB", (64, 64), "black")] * 3)
    tile = 128
    corners = {}
    for colour, value in {
        "red": (255, 0, 0),
        "lime": (0, 255, 0),
        "blue": (0, 0, 255),
        "yellow": (255, 255, 0),
    }.items():
        spots = [(x, y) for y in range(sheet.height) for x in range(sheet.width) if sheet.getpixel((x, y)) == value]
        assert len(spots) == tile * tile
        corners[colour] = spots[0]
    assert corners["red"][1] == corners["blue"][1] < corners["lime"][1] == corners["yellow"][1]
    assert corners["red"][0] == corners["lime"][0] < corners["blue"][0] == corners["yellow"][0]
