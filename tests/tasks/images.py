"""Small pictures, sources of them, and image models built on the spot."""

import numpy as np
from PIL import Image

from lorafactory.sources import quiet

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 210)}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def picture(name, seed, size=(10, 12)):
    """A noisy picture of one colour."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def folders(place, split="", count=12, names=tuple(COLOURS)):
    """A folder a class, `count` pictures in all."""
    for i in range(count):
        name = names[i % len(names)]
        file = place / split / name / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(name, [i, len(split)]).save(file)
    return str(place)


def parquet(place, split, rows, names=None, image="image", label="label"):
    """A hub repository's parquet file of (PIL image or bytes, label) rows; names: of a ClassLabel column."""
    import datasets

    kind = datasets.ClassLabel(names=names) if names else None
    kind = kind or datasets.Value("int64" if isinstance(rows[0][1], int) else "string")
    features = datasets.Features({image: datasets.Image(), label: kind})
    cells = [{"bytes": p, "path": None} if isinstance(p, bytes) else p for p, _ in rows]
    data = datasets.Dataset.from_dict({image: cells, label: [n for _, n in rows]}, features=features)
    place.mkdir(parents=True, exist_ok=True)
    with quiet():
        data.to_parquet(place / f"{split}-00000-of-00001.parquet")
    return str(place)


def save_vit(folder, size=8, **options):
    """A random ViT and its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    config = ViTConfig(image_size=size, patch_size=4, initializer_range=0.2, **{**SIZES, **options})
    with quiet():
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


def save_clip(folder):
    """A random CLIP that reads letters, whole: both towers, tokenizer, image processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz.", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz.")]
    vocabulary = {t: i for i, t in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1, "pad_token_id": len(letters) + 1}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, **ends, **SIZES}
    vision = {"image_size": 8, "patch_size": 4, **SIZES}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    with quiet():
        CLIPModel(config).save_pretrained(folder)
        CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
        size = {"height": 8, "width": 8}
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    return str(folder)
