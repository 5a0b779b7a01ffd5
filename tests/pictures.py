"""Tiny models of images and text built from configs, with processors and folders of images of the tests' own making."""

import json

import torch
from PIL import Image

LLAVA = (  # the template of LLaVA-1.5's processor: it closes no answer
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOL = (  # that of SmolVLM's: a special token closes every turn
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 220), "white": (250, 250, 250)}


def words_tokenizer(special):
    """A byte-level BPE over these special tokens, with a beginning-of-sequence token in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["What colour is it? red green blue white USER: ASSISTANT: yes no"] * 20, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=list(special)
    )


def text_config(tokenizer, cls="LlamaConfig", **more):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512}
    return getattr(transformers, cls)(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ends, **more)


def tiny_llava(seed=0):
    """(LLaVA with 16 tokens an image, its processor)."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = words_tokenizer(["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, chat_template=LLAVA, **options)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(tokenizer), image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    config.image_seq_length = 16
    return LlavaForConditionalGeneration(config).eval(), processor


def tiny_smolvlm(seed=0):
    """(Idefics3, whose code SmolVLM's is, with tiles, its processor)."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    rows = [f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)]
    tokenizer = words_tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOL)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        text_config=text_config(tokenizer),
        scale_factor=2,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config).eval(), processor


FAMILIES = {"llava": tiny_llava, "smolvlm": tiny_smolvlm}


def model_folder(path, family="llava"):
    """A folder with the model and its processor."""
    model, processor = FAMILIES[family]()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def image_folder(path, sizes=((16, 16), (20, 12), (12, 30), (16, 16))):
    """One image of each colour, of these sizes: red.png, …"""
    path.mkdir(parents=True, exist_ok=True)
    for (colour, value), size in zip(COLOURS.items(), sizes):
        Image.new("RGB", size, value).save(path / f"{colour}.png")
    return path


def llava_items(count=8):
    """Items of LLaVA's JSON about the images of `image_folder`; every fourth is text alone."""
    items = []
    for n in range(count):
        colour = list(COLOURS)[n % len(COLOURS)]
        question = {"from": "human", "value": "Say yes" if n % 4 == 3 else "<image>\nWhat colour is it?"}
        answer = {"from": "gpt", "value": "yes" if n % 4 == 3 else colour}
        items.append({"id": str(n), "conversations": [question, answer]} | ({} if n % 4 == 3 else {"image": f"{colour}.png"}))
    return items


def write_items(path, items):
    path.write_text("\n".join(map(json.dumps, items)) if path.suffix == ".jsonl" else json.dumps(items))
    return path
