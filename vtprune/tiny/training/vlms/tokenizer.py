"""The word-level tokenizer and chat template of the tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TEMPLATE = (
    "<bos> {{% for m in messages %}}{{{{ m['role'] }}}} : {{% if m['content'] is string %}}{{{{ m['content'] }}}} "
    "{{% else %}}{{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image} "
    "{videos}{{% else %}}{{{{ c['text'] }}}} {{% endif %}}{{% endfor %}}{{% endif %}}"
    "{{% if m['role'] == 'assistant' %}}<eos> {{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}assistant :{{% endif %}}"
)


def chat_template(image: str, video: str | None = None) -> str:
    """`<bos> user : IMAGE question assistant :`, with what stands for an image (and a video)."""
    videos = f"{{% elif c['type'] == 'video' %}}{video} " if video else ""
    return _TEMPLATE.format(image=image, videos=videos)


def build_tokenizer(
    words: Sequence[str], image: str, specials: Sequence[str] = (), named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Ids by place in `words`.

    Args:
        image: the placeholder.
        specials: other words that are never split.
        named: further special tokens by the attribute under which a processor looks for them.
    """
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\w+>|\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[image, *specials],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": dict(named)} if named else {}),
    )
