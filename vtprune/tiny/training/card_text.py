"""The sentences of the model card; numbers are filled in from measurements."""

HEADER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# vtprune {title}

A real `{architecture}`, {origin}, small enough to ship inside a package. It exists so that visual-token pruning can be
tested, compared and demonstrated on a CPU, without downloads, on a model whose accuracy really depends on which tokens
are kept."""

ORIGIN = {
    False: "trained from random weights",
    True: "trained from the weights of the tiny LLaVA beside it",
}

OPENING_NUMBERS = """
* **{scenes[0]} %** of test scene questions (95 % interval {scenes[1]}-{scenes[2]}, {scenes[3]} questions about
  {images} scenes) and **{easy[0]} %** of easy-VQA test questions ({easy[1]}-{easy[2]}, {easy[3]} questions).
* {parameters} parameters, `{file}` {bytes} bytes ({stored}).
* A question counts as right when the whole answer matches, including `<eos>`. Intervals: bootstrap over images.
* Through `processor` + `generate()` with the shipped weights run in fp32: {generated_right} of {generated}
  test questions right, {generated_stopped} answers ended with `<eos>`."""

DATA = """
## Data

Scenes of 128x128 px (`vtprune.tiny.scenes`): 7-10 objects (shapes of 13-17 px, handwritten digits of 20-22 px in a
2 px coloured frame) placed freely among 10-13 pieces of clutter (rings, bars, diamonds and hashes of 8-11 px in purple,
orange, pink and lime) on textured ground. Nothing ever asks about clutter. Kinds of question: `color`, `shape_color`
("which shape is red?"), `digit_frame` ("which digit is in the red frame?"), `obj_loc` ("which object is at the top
left?"), `where`, `exist`, `count` (0-5), `relation` ("is the red star left of the digit 4?"). A quarter of the
pictures in the last phase are easy-VQA (`easy-vqa` package, 64 px, resized).

Splits share nothing: digits are scikit-learn's `load_digits` cut into 1200 / 300 / 297, ground textures 200 / 28 / 28,
scenes are drawn from other random streams. easy-VQA: dev = last 400 training images, test = official test set.
The test split was used once, for the tables below."""

MODEL = {
    "llava": """
## Model

CLIP ViT 4 layers x 128 (4 heads, patch 8, CLS token), two-layer projector, Llama 12 layers x 160 (4 heads, 2 key-value
heads, SwiGLU 320), untied, vocabulary of {words} words, 256 visual tokens. Unusual initialisations: ViT positions start
as a sine-cosine table, the heads of the first two ViT layers start by looking at their neighbours, and the first two
heads of every decoder layer start by copying kind, colour and place of what they look at.""",
    "qwen2_vl": """
## Model

Qwen2-VL tower 4 layers x 128 (4 heads, patch 8, rotary positions in two dimensions, no CLS token), merger of 2x2
patches, Qwen2 decoder 12 layers x 160 (4 heads, 2 key-value heads, SwiGLU 320) with M-RoPE (theta 100, sections 4 / 8 /
8), untied, vocabulary of {words} words. Pictures of any size; those below 144x144 px, as all scenes are, are enlarged
to that: 324 patches, 81 visual tokens. Unusual initialisation: the heads of the first two tower layers start by looking
at their neighbours (constant queries and keys). No video was trained on.""",
    "internvl": """
## Model

InternViT 4 layers x 128 (4 heads, patch 8, CLS token), 144x144 px, pixel shuffle of 2x2 patches, two-layer projector,
Qwen2 decoder 12 layers x 160 (4 heads, 2 key-value heads, SwiGLU 320), untied, vocabulary of {words} words, 81 visual
tokens; one crop a picture.""",
}

_COMMAND = """
## Training

`python -m vtprune.tiny.training --model {model} --out DIR --seed {seed}`; seed {seed}, {hardware}, fp32.
One seed was trained; how much another seed differs is not known.
"""

_FROM_NOTHING = (
    _COMMAND
    + """
1. **ViT** (vision, one core) learns the renderer's labels: kind, colour, third of the image and "is the centre" by
   patch, clutter included; CLS learns which askable objects, colours and pairs are present (never clutter).
2. **Decoder** (symbolic, the other core, at the same time) learns to answer from symbol tokens made of the same labels.
   The first two heads of one layer per kind of question are taught where to look (0-based layer: {reading}).
   Relations are also taught their two steps: the comparison itself (which of the two is higher, which further left)
   must be readable at the input of layer {compare}, yes or no at that of layer {verdict}.
3. **Joint** (both cores): the projector is regressed on the symbol tokens, then everything trains on pictures, first
   with a part of the visual tokens, then with all; the term that teaches where to look fades out over the first half,
   the two terms for relations over the whole phase.
"""
)

_FROM_LLAVA = (
    _COMMAND
    + """
{start} Symbol tokens start as what LLaVA's visual tokens of the same labels are made of (least squares over 96 training
scenes). Labels are by token, that is by 2x2 patches; a token belongs to the object whose centre it holds, or to the one
that covers most of it.

1. **Tower** (vision, one core) learns the renderer's labels: kind, colour{region} and in which of its four patches a
   centre lies, clutter included; {summary} learns which askable objects, colours and pairs are present (never clutter).
2. **Decoder** (symbolic, the other core, at the same time) learns to answer from symbol tokens made of the same labels.
   The first two heads of one layer per kind of question are taught where to look (0-based layer: {reading}).
   Relations are also taught their two steps: the comparison itself (which of the two is higher, which further left)
   must be readable at the input of layer {compare}, yes or no at that of layer {verdict}.{place}
3. **Joint** (both cores): the projector is regressed on the symbol tokens, then everything trains on pictures with all
   visual tokens; the term that teaches where to look fades out over the first half, the two terms for relations over
   the whole phase.
"""
)

_LABELS = """
easy-VQA pictures take part in all phases. Their labels follow from each training picture's own questions and answers
(shape and colour; about one in ten does not tell both) and from its pixels (place).

So the training is not answer-only: labels are used in all phases."""

TRAINING = {
    "llava": _FROM_NOTHING + _LABELS,
    "qwen2_vl": _FROM_LLAVA + _LABELS,
    "internvl": _FROM_LLAVA + _LABELS,
}

# what the texts above fill in
OF_MODEL = {
    "llava": {},
    "qwen2_vl": {
        "start": """Decoder and tower start from the tiny LLaVA's (decoder biases zero; places are rotary here, so the
queries and keys of the first two tower layers start anew).""",
        "region": "",
        "summary": "the mean over patches",
        "place": """
   Tower and symbols know no places. Rotary positions act on queries and keys only, so visual tokens are also taught to
   tell their row and column at the input of layer {place_layer}, here and in the joint phase.""",
    },
    "internvl": {
        "start": """Decoder and tower start from the tiny LLaVA's (tower positions resized, decoder biases zero).""",
        "region": ", third of the image",
        "summary": "CLS",
        "place": "",
    },
}

MEASURING = """
Measured by `python -m vtprune.tiny.training --model {model} --out DIR --phase measure --split {split}`; the tables are
written by `--phase card`. Everything below comes from that one pass."""

CLOSING = """
Rules: random, grid, {query} (last tower layer, mean over heads) and max-min (farthest-point choice by cosine
distance of projected tokens, as in DivPrune) prune before the decoder and keep original positions: {scenes} scenes,
{easy} easy-VQA pictures, many questions per row. The ± of random is half its range over 3 seeds. FastV-like K: layers
1..K see all tokens, the last prompt token's attention in layer K (mean over heads) chooses what stays; oracle: tokens
of the asked objects, centres first. Both are measured one question per row on {row_scenes} scenes and {row_easy}
easy-VQA pictures (the first of the same ones); compare them with the random row measured alike.

## What this model is not

* Not a language model: it knows {words} words and the question patterns above, nothing else.
* Not a stand-in for speed: at this size overheads hide what pruning saves.
* Not evidence that a method wins on large models: the tower is trained on labels, reading depth is taught, and one seed
  is one model.
* Not unbiased between methods: clutter was added so that diversity alone costs accuracy at 1/16 of the tokens."""
