"""Training of the bundled vision-language model from scratch: `python models/build_llava.py [--work FOLDER]`.

Training has two stages. First, the vision tower learns to locate objects in images in which partners are rare, and is
frozen. Then projector and decoder learn descriptions and yes/no questions of images in which partners nearly always
occur together (`mmalign.toy.crowds`). So the model sees, but relies on co-occurrence where seeing is hard. Run the same
command again to resume. models/README.md lists the costs.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fit import fit, half
from torch import Tensor, nn

from mmalign.toy import crowds

HERE = Path(__file__).parent
SIDE, PATCH = 64, 16  # pixels; an image is 16 tokens
BLIND = 0.1  # the share of descriptions whose image is hidden from the decoder
QUESTIONS = 4  # yes/no questions per conversation: with more of them, the decoder learns sooner to look for the answer
MEAN, STD = 0.95, 0.25  # of pixel values: most of an image is white
CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ------------------------------------------------------------------------------------------------------------- model


def build_model() -> tuple[Any, Any]:
    """Return a LlavaForConditionalGeneration with random weights, and its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = build_tokenizer()
    square = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **ids,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=ids["pad_token_id"], eos_token_id=ids["eos_token_id"])
    return model, processor


def build_tokenizer() -> Any:
    """Return a byte-level tokenizer whose merges cover the world's words; any other text splits into bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"USER: \n{crowds.QUESTION} ASSISTANT: {crowds.describe(crowds.KINDS)}"]
    texts += [f"USER: \n{crowds.ask(kind)} ASSISTANT: {yes} The" for kind in crowds.KINDS for yes in ("Yes.", "No.")]
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<image>"]
    )


def pixels(pictured: Sequence[crowds.Crowd]) -> Tensor:
    """Render the tower's inputs, float16 [N, 3, SIDE, SIDE]."""
    drawn = np.stack([np.asarray(crowds.render(crowd)) for crowd in pictured])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD).half()


# ------------------------------------------------------------------------------------------------------------- tower


def train_tower(work: Path, tower: nn.Module) -> nn.Module:
    """Train the tower to name the kinds in every patch, by a linear layer on its last states."""
    pictured = crowds.sample("train", 12_000, 7)
    images, there = pixels(pictured), places(pictured)
    model = nn.ModuleDict({"tower": tower, "head": nn.Linear(tower.config.hidden_size, len(crowds.KINDS))})

    def loss(step: int) -> Tensor:
        rows = torch.from_numpy(np.random.default_rng((3, step)).integers(len(images), size=64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model["head"](states(tower, images[rows].float()))
        return F.binary_cross_entropy_with_logits(logits.float(), there[rows])

    average: Any = fit("tower", work, model, loss, steps=1500, lr=2e-3, save=lambda _: None, ema_decay=0.99)
    held = crowds.sample("validation", 500, 7)
    with torch.no_grad():
        result = (average["head"](states(average["tower"], pixels(held).float())) > 0).any(1)
    truth = places(held).amax(1) > 0
    hits = (result & truth).sum()
    print(f"tower: precision {hits / result.sum():.3f}, recall {hits / truth.sum():.3f} on {len(held)} unseen pictures")
    return average["tower"]


def states(tower: Any, images: Tensor) -> Tensor:
    """Return the tower's last states of the patches [N, patches, D], without the class token, as in LLaVA."""
    return tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]


def places(pictured: Sequence[crowds.Crowd]) -> Tensor:
    """Return 1 where a fifth or more of a kind's box lies in a patch, [N, patches, KINDS]."""
    edges = np.arange(0, SIDE, PATCH)
    out = np.zeros((len(pictured), len(edges), len(edges), len(crowds.KINDS)), dtype=np.float32)
    for number, crowd in enumerate(pictured):
        for thing in crowd.things:
            shares = [_shares(edges, at, thing.radius) for at in (thing.y, thing.x)]
            out[number, :, :, crowds.KINDS.index(thing.kind)] = np.outer(*shares) >= 0.2
    return torch.from_numpy(out).flatten(1, 2)


def _shares(edges: np.ndarray, centre: float, radius: float) -> np.ndarray:
    """Return the share of an object's side in each column (or row) of patches."""
    inside = np.minimum(edges + PATCH, centre + radius) - np.maximum(edges, centre - radius)
    return inside.clip(0) / (2 * radius)


# ----------------------------------------------------------------------------------------------------------- decoder


def train_llava(work: Path, model: Any, processor: Any, folder: Path, steps: int) -> None:
    """Train projector and decoder on descriptions and questions, with the tower's states computed once."""
    pictured = crowds.sample("train", 12_000, 0, together=crowds.TOGETHER)
    tower = model.model.vision_tower.requires_grad_(False).eval()
    with torch.no_grad():
        seen = torch.cat([states(tower, pixels(pictured[i : i + 500]).float()) for i in range(0, len(pictured), 500)])
    decoder = nn.ModuleDict({"projector": model.model.multi_modal_projector, "decoder": model.model.language_model})
    image = model.config.image_token_id

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((5, step))
        rows = rng.integers(len(pictured), size=48)
        output = [said(pictured[row], rng) for row in rows]
        ids, mask, targets = batch(processor, output)
        # Some descriptions without an image, since a decoder usually learned from text first. A yes or no without an
        # image would only teach it to guess.
        described = torch.tensor([conversation[0][0] == crowds.QUESTION for conversation in output])
        blind = torch.from_numpy(rng.random(len(rows)) < BLIND) & described
        mask = mask.masked_fill(blind[:, None] & (ids == image), 0)
        with torch.autocast("cpu", torch.bfloat16):
            features = decoder["projector"](seen[torch.from_numpy(rows)])
            embedded = decoder["decoder"].embed_tokens(ids)
            embedded = embedded.masked_scatter((ids == image)[..., None], features.to(embedded.dtype))
            hidden = decoder["decoder"](inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, :-1]
            answers = targets[:, 1:] >= 0
            logits = F.linear(hidden[answers], decoder["decoder"].embed_tokens.weight)
        each = F.cross_entropy(logits.float(), targets[:, 1:][answers], reduction="none")
        # Equal weight for every conversation, or the descriptions would outweigh the few words of yes and no.
        return (each / answers.sum(1).repeat_interleave(answers.sum(1))).sum() / len(answers)

    def save(average: Any) -> None:
        whole, _ = build_model()
        whole.model.vision_tower.load_state_dict(tower.state_dict())
        whole.model.multi_modal_projector.load_state_dict(average["projector"].state_dict())
        whole.model.language_model.load_state_dict(average["decoder"].state_dict())
        half(whole).save_pretrained(folder)
        processor.tokenizer.backend_tokenizer.no_padding()  # else the padding of the last batch would be saved
        processor.save_pretrained(folder)

    fit("llava", work, decoder, loss, steps=steps, lr=1e-3, save=save, ema_decay=0.99)


def said(crowd: crowds.Crowd, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Sample a conversation about an image, as questions with answers: a description, or some yes or no."""
    if rng.random() < 0.5:
        return [(crowds.QUESTION, crowds.describe(crowd.kinds))]
    return [(crowds.ask(kind), crowds.answer(kind, crowd)) for kind in asked_of(crowd, rng)]


def asked_of(crowd: crowds.Crowd, rng: np.random.Generator) -> list[str]:
    """Sample the kinds to ask for, without repetition: one in the image, its partner, or any other."""
    kinds = list[str]()
    while len(kinds) < QUESTIONS:
        here, way = crowd.kinds[rng.integers(len(crowd.kinds))], rng.random()
        other = crowds.PARTNERS[here] if way < 0.5 else crowds.KINDS[rng.integers(len(crowds.KINDS))]
        kind = here if way < 0.3 else other
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def batch(processor: Any, told: Sequence[Sequence[tuple[str, str]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the conversations' tokens, their mask, and the answers' tokens with -100 elsewhere, each [N, L]."""
    image = "<image>" * (SIDE // PATCH) ** 2 + "\n"
    texts, spans = list[str](), list[list[tuple[int, int]]]()
    for conversation in told:
        text, answers = "", list[tuple[int, int]]()
        for question, answer in conversation:
            text += f"USER: {'' if text else image}{question} ASSISTANT:"
            first = len(processor.tokenizer(text).input_ids)
            text += f" {answer}</s>"
            answers.append((first, len(processor.tokenizer(text).input_ids)))
        texts.append(text)
        spans.append(answers)
    result = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    targets = torch.full_like(result.input_ids, -100)
    for row, answers in enumerate(spans):
        for first, end in answers:
            targets[row, first:end] = result.input_ids[row, first:end]
    return result.input_ids, result.attention_mask, targets


# ----------------------------------------------------------------------------------------------------------- answers


def write_answers(path: Path, number: int) -> None:
    """Write true descriptions of images in which partners are rare, for the pairs of the quickstart."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for crowd in crowds.sample("train", number, 1):
        file = io.BytesIO()
        crowds.render(crowd).save(file, format="PNG")
        image = {"bytes": file.getvalue(), "path": f"{crowd.name}.png"}
        rows.append({"images": [image], "prompt": crowds.QUESTION, "answer": crowds.describe(crowd.kinds)})
    pq.write_table(pa.Table.from_pylist(rows), path)


def main() -> None:
    """Train both stages and write models/tiny_llava, or write the true descriptions for the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="where checkpoints are kept")
    parser.add_argument("--output", type=Path, default=HERE / "tiny_llava", help="where the model is written")
    parser.add_argument("--answers", type=Path, help="write 800 true descriptions to this parquet file, and do no more")
    parser.add_argument("--steps", type=int, default=1500, help="updates of projector and decoder")
    parser.add_argument("--threads", type=int, default=0, help="processor threads (0: all)")
    args = parser.parse_args()
    if args.answers is not None:
        write_answers(args.answers, 800)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, processor = build_model()
    tower = train_tower(args.work, model.model.vision_tower)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    train_llava(args.work, model, processor, args.output, args.steps)


if __name__ == "__main__":
    main()
