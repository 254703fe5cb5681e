"""Tokenizers and processors without networks count and render as those of the whole models do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.families.loading import default_side, load_processor, load_tokenizers, local_folder, recognize
from mmalign.language.chat import Turn
from tests.helpers import Folders, flow_models
from tests.helpers.loading import load_diffusion, load_vlm

LONG = "one two three four five six seven eight nine ten " * 60


@pytest.mark.parametrize("name", [name for name in flow_models.BUILDERS if name != "flux_schnell"])
def test_tokenizers_without_networks_count_alike(name: str, flow_folders: Folders) -> None:
    path = flow_folders(name)
    whole, tokenizers = load_diffusion(path), load_tokenizers(str(path))
    prompts = [LONG[:length] for length in (0, 20, 60, 100, 300, 600, 1200, 2900)]
    counts = [[family.count_truncated([prompt]) for prompt in prompts] for family in (whole, tokenizers)]
    assert counts[0] == counts[1] and counts[0][0] == 0
    networks = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    assert not any(tokenizers.pipeline.components.get(part) for part in networks)


def test_tokenizer_of_the_bundled_pipeline_counts_alike() -> None:
    whole, tokenizers = load_diffusion(Path("models/tiny_sd")), load_tokenizers("models/tiny_sd")
    prompts = [LONG[:length] for length in range(0, 60, 4)]
    counts = [[family.count_truncated([prompt]) for prompt in prompts] for family in (whole, tokenizers)]
    assert counts[0] == counts[1] and set(counts[0]) == {0, 1}


def test_processor_without_network_is_the_model_s(vlm_folders: Folders) -> None:
    path = vlm_folders("llava")
    whole, alone = load_vlm(path).processor, load_processor(str(path))
    assert (alone.max_length, alone.image_token_id) == (whole.max_length, whole.image_token_id)


def test_only_local_models_are_opened(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == str(tmp_path)
    assert local_folder("organisation/no-such-model") is None


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model_index.json", recognize),
        ("config.json", recognize),
        ("unet/config.json", default_side),
        ("vae/config.json", default_side),
    ],
)
@pytest.mark.parametrize("content", ["[]", "3", '"unet"', "null"])
def test_a_configuration_that_is_no_dictionary_is_named(
    name: str, read: Callable[[str], object], content: str, tmp_path: Path
) -> None:
    for file in ("unet/config.json", "vae/config.json", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"model.path: .*{name} holds .* no dictionary; .*; copy the model again"):
        read(str(tmp_path))


TURNS = [Turn("user", "What is here?")]
CHANGING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content[0].text.replace('secret', '') }}{{ eos_token }}{% endfor %}"
)
DIFFERING = (
    "{% for m in messages %}{% if m.role == 'assistant' and 'Yes' in m.content[0].text %}sure {% endif %}"
    "{{ m.role }}: {{ m.content[0].text }}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "responses", "words"),
    [
        (None, ["A dog.", "A cat."], None),
        (CHANGING, ["A dog.", "A cat."], None),
        (CHANGING, ["A dog.", "A secret cat."], "changes a response"),
        (DIFFERING, ["A dog.", "Yes."], "another prompt"),
        (None, ["A dog.", "A </s> cat."], "special token </s>"),
    ],
)
def test_problems_of_a_chat_template_are_named(
    template: str | None, responses: list[str], words: str | None, vlm_folders: Folders
) -> None:
    processor = load_processor(str(vlm_folders("llava")))
    if template is not None:
        processor.processor.chat_template = processor.processor.tokenizer.chat_template = template
    problem = processor.template_problem(TURNS, responses)
    assert problem is None if words is None else words in str(problem)
