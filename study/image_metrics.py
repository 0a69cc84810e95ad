"""The metrics of subject-driven generation: CLIP-I, DINO and CLIP-T (Ruiz et al. 2023, arXiv:2208.12242, section 4.2)."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"  # the models of that paper
AT_ONCE = 16  # images


class ImageMetrics:
    """Embeddings of images and texts by CLIP and DINO, each a hub id or a folder; all of length 1."""

    def __init__(self, device: torch.device, clip: str = CLIP, dino: str = DINO):
        self.device = device
        self.clip, self.clip_inputs = AutoModel.from_pretrained(clip).to(device).eval(), AutoProcessor.from_pretrained(clip)
        self.dino, self.dino_inputs = (
            AutoModel.from_pretrained(dino).to(device).eval(),
            AutoImageProcessor.from_pretrained(dino),
        )

    @torch.no_grad()
    def clip_images(self, images: list[Image.Image]) -> Tensor:
        """(N, D)."""
        parts = [self.clip_inputs(images=part, return_tensors="pt").to(self.device) for part in _parts(images)]
        return F.normalize(torch.cat([_pooled(self.clip.get_image_features(**part)) for part in parts]), dim=1)

    @torch.no_grad()
    def clip_texts(self, texts: list[str]) -> Tensor:
        """(N, D)."""
        inputs = self.clip_inputs(text=texts, return_tensors="pt", padding=True, truncation=True).to(self.device)
        return F.normalize(_pooled(self.clip.get_text_features(**inputs)), dim=1)

    @torch.no_grad()
    def dino_images(self, images: list[Image.Image]) -> Tensor:
        """(N, D): of the class token."""
        parts = [self.dino_inputs(images=part, return_tensors="pt").to(self.device) for part in _parts(images)]
        return F.normalize(torch.cat([self.dino(**part).last_hidden_state[:, 0] for part in parts]), dim=1)


def _parts(images: list[Image.Image]) -> list[list[Image.Image]]:
    return [images[first : first + AT_ONCE] for first in range(0, len(images), AT_ONCE)]


def _pooled(features: Tensor) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output  # transformers 5 returns an output object
