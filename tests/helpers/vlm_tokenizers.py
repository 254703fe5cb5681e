"""Tokenizers and chat templates of the tiny vision-language models."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
)

WORDS = [
    "USER: What is in this image? Describe it. ASSISTANT: There is a red cube and a green ball on the table.",
    "Is there a dog in the image? Yes, there is. No, there is no dog. Two cats sit on a blue mat near a car.",
]


LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


QWEN_MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


QWEN_TOKENS = (*QWEN_MARKS.values(), "<|im_start|>", "<|im_end|>")


IDEFICS_CHAT = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize + ':' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(
    extra: Sequence[str],
    begin: bool = False,
    end: str = "</s>",
    named: dict[str, str] | None = None,
    merges: bool = True,
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer trained on a few sentences, or, without merges, one whose tokens are bytes.

    `begin` puts <s> before every text, as Llama's does.
    """
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *extra]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 380 if merges else len(special) + len(alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(WORDS * 8, trainer)
    if begin:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        extra_special_tokens=list(extra),
        model_specific_special_tokens=named or {},
    )
