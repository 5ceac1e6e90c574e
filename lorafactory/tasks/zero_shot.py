"""CLIP with the text features of the class names as its head (Radford et al. 2021, section 3.1): what it scores before
any training is CLIP's zero-shot answer, and training moves the image side alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPPreTrainedModel, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..errors import UserError


class TextHead(nn.Module):
    """logits = text · P x / |P x|. projection P [e, d] and text [classes, e] (unit rows times CLIP's temperature) are
    buffers: nothing here trains, and no adapter goes here."""

    projection: Tensor
    text: Tensor

    def __init__(self, width: int, embedding: int, classes: int):
        super().__init__()
        self.register_buffer("projection", torch.zeros(embedding, width))
        self.register_buffer("text", torch.zeros(classes, embedding))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(F.linear(x, self.projection), dim=-1), self.text)


class ZeroShotCLIP(CLIPPreTrainedModel):
    """CLIP's vision tower under a TextHead; save_pretrained and from_pretrained keep both."""

    main_input_name = "pixel_values"

    def __init__(self, config: Any):
        super().__init__(config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.head = TextHead(config.vision_config.hidden_size, config.projection_dim, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.head(self.vision_model(pixel_values, **kwargs).pooler_output))


@torch.no_grad()
def load(where: str, prompts: list[str], **options: Any) -> tuple[ZeroShotCLIP, dict[str, Any]]:
    """A CLIP checkpoint, its text side spent on one prompt a class. Raises UserError for any other model, or a prompt
    longer than the text side reads."""
    import transformers

    revision = {k: options[k] for k in ("revision",) if k in options}
    found = transformers.AutoConfig.from_pretrained(where, **revision)
    if not isinstance(found, CLIPConfig):
        raise UserError(f"task.head=zero_shot needs a CLIP, which reads text, too; this is {found.model_type}")
    auto: Any = CLIPModel
    whole, info = auto.from_pretrained(where, **options, output_loading_info=True)
    tokens = transformers.AutoTokenizer.from_pretrained(where, **revision)(prompts, padding=True, return_tensors="pt")
    longest, limit = tokens["input_ids"].shape[1], whole.config.text_config.max_position_embeddings
    if longest > limit:
        raise UserError(f"task.prompt makes {longest} tokens of the longest class name; this CLIP reads {limit}")
    model = ZeroShotCLIP._from_config(whole.config, dtype=whole.dtype)
    model.vision_model = whole.vision_model
    text = F.normalize(whole.eval().get_text_features(**tokens).pooler_output, dim=-1)
    model.head.text.copy_(whole.logit_scale.exp() * text)
    model.head.projection.copy_(whole.visual_projection.weight)
    return model, info
