"""Chat templates in the forms of public models, over the tiny tokenizers' special tokens."""

from tests.helpers import vlm_models

_TEXT = (
    "{% set ns = namespace(t='') %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "{% set ns.t = ns.t + '<|vision_start|><|image_pad|><|vision_end|>' %}{% else %}{% set ns.t = ns.t + p['text'] %}"
    "{% endif %}{% endfor %}"
)
_SPLIT = (
    "{% set r = '' %}{% set c = ns.t %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}{% endif %}"
)
_TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}" + _TEXT
# Qwen3-VL-Thinking: writes a thinking block into every answer, and opens one in the prompt
THINKING = (
    _TURNS + "{% if m['role'] == 'assistant' %}" + _SPLIT + "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + "
    "c.lstrip('\n') }}{% else %}{{ ns.t }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Qwen3.5: the prompt has an empty block if `enable_thinking` is false
SWITCHED = THINKING.replace(
    "<think>\n{% endif %}",
    "<think>\n{% if not enable_thinking | default(true) %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}",
)
# DeepSeek-R1: cuts the thinking of every answer, and opens it in the prompt
FORGETTING = (
    _TURNS + "{% if m['role'] == 'assistant' %}" + _SPLIT + "{{ c.lstrip('\n') }}{% else %}{{ ns.t }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Gemma 4: the prompt has an empty thinking block that answers lack
EMPTY_THOUGHT = vlm_models.QWEN_CHAT.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
# LLaVA-OneVision: a space after the role, in answers and not in the prompt
SPACED = vlm_models.QWEN_CHAT.replace("m['role'] + '\n'", "m['role'] + (' \n' if m['role'] == 'assistant' else '\n')")
# Gemma 3: trims texts
TRIMMING = vlm_models.QWEN_CHAT.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
# Mistral: roles must alternate, and nothing stands between answer and end token
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{% if loop.index0 % 2 != 0 %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}[INST] {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
# LLaVA-1.5 and Vicuna: a system prompt, no token after an answer, `generation` tags
VICUNA = (
    "A chat between a curious human and an assistant. {% for m in messages %}{% if m['role'] == 'assistant' %}"
    "ASSISTANT: {% for c in m['content'] %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% else %}USER: {% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_FORMS = {
    "thinking": THINKING,
    "switched": SWITCHED,
    "empty thought": EMPTY_THOUGHT,
    "spaced": SPACED,
    "trimming": TRIMMING,
}
LLAVA_FORMS = {"alternating": ALTERNATING, "vicuna": VICUNA}
# Templates that change an answer, for one of its words
CHANGING = {
    "replacing": vlm_models.QWEN_CHAT.replace("{{ part['text'] }}", "{{ part['text'].replace('dog', 'cat') }}"),
    "lower case": vlm_models.QWEN_CHAT.replace("{{ part['text'] }}", "{{ part['text'] | lower }}"),
    "escaping": vlm_models.QWEN_CHAT.replace("{{ part['text'] }}", "{{ part['text'] | e }}"),
    "cutting": vlm_models.QWEN_CHAT.replace("{{ part['text'] }}", "{{ part['text'][:40] }}"),
}
