"""The base model: what is particular to Qwen-Image, in one description, and where its components are read from.

Only these modules name a class or a layer of it: transformer/rotary.py (rotary embeddings), model/vae.py (causal
convolutions), model/captioner.py (image processor of Qwen2.5-VL), lora/formats.py (layers as other trainers name them), and
pipeline.py and report/ (the pipeline that users hand over and that model cards show).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SchedulerMixin,
)
from diffusers.utils import logging as diffusers_logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from placeholder.devices import free_bytes
from placeholder.errors import Log
from placeholder.model.download import cached_commit, fetch, split_revision

# Replicate reads progress from log lines that look like a bar; only the training's own may.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

MODEL_VARIABLE = "QWEN_IMAGE_MODEL"


@dataclass(frozen=True)
class Published:
    """A base model of the hub: its commit, and its step-distilled LoRA as owner/name/file@commit (Apache-2.0)."""

    revision: str
    distilled_lora: str


@dataclass(frozen=True)
class Architecture:
    """Everything that is particular to one family of base models; the defaults are Qwen-Image's (arXiv:2508.02324)."""

    name: str = "Qwen-Image"
    # The default first. Seeds and archives give the same images only with the same commit.
    published: Mapping[str, Published] = field(
        default_factory=lambda: {
            "Qwen/Qwen-Image": Published(
                "75e0b4be04f60ec59a75f475837eced720f823b6",
                "lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-8steps-V2.0.safetensors"
                "@813e69cd4c5627f2c7b921667f79690a0e12bd4e",
            ),
            "Qwen/Qwen-Image-2512": Published(
                "25468b98e3276ca6700de15c6628e51b7de54a26",
                "lightx2v/Qwen-Image-2512-Lightning/Qwen-Image-2512-Lightning-8steps-V1.0-bf16.safetensors"
                "@a52649c9d0f6e1a248bff13f0df33bb8a2abdb52",
            ),
        }
    )

    pipeline: type[DiffusionPipeline] = QwenImagePipeline
    transformer: type[ModelMixin] = QwenImageTransformer2DModel
    vae: type[ModelMixin] = AutoencoderKLQwenImage
    text_encoder: type[PreTrainedModel] = Qwen2_5_VLForConditionalGeneration
    tokenizer: type[PreTrainedTokenizerBase] = Qwen2Tokenizer
    scheduler: type[SchedulerMixin] = FlowMatchEulerDiscreteScheduler

    # QwenImagePipeline.prompt_template_encode, prompt_template_encode_start_idx, and max_sequence_length of its __call__.
    prompt_prefix: str = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    )
    prompt_suffix: str = "<|im_end|>\n<|im_start|>assistant\n"
    dropped_tokens: int = 34  # of the prefix, left out of the prompt embeddings
    max_prompt_tokens: int = 512
    pixels_per_token: int = 16  # along one side: 8 pixels a latent, 2 latents a token

    # Attention of both streams. With the feed-forward layers the archive more than doubles, and Cog returns archives as base64.
    lora_target_modules: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    embedding_key: str = "qwen25_7b"  # under which ComfyUI looks for embeddings of this text encoder

    # The scheduler settings for a step-distilled LoRA, from the model card of Qwen-Image's: a fixed shift of 3 at any size, no
    # stretching to shift_terminal.
    distilled_schedule: Mapping[str, Any] = field(
        default_factory=lambda: {
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": math.log(3),
            "max_shift": math.log(3),
            "shift": 1.0,
            "shift_terminal": None,
        }
    )


QWEN_IMAGE = Architecture()
DEFAULT_MODEL = next(iter(QWEN_IMAGE.published))


@dataclass(frozen=True)
class BaseModel:
    """Which base model, and on which device and in which dtype its components run.

    `source`: a folder, or a repository of the hub at `revision` (a commit, tag or branch; None for its main branch).
    """

    source: str
    device: torch.device
    dtype: torch.dtype
    revision: str | None = field(default=None, kw_only=True)

    @classmethod
    def from_environment(cls) -> "BaseModel":
        """Folder, hub id or hub id@revision from QWEN_IMAGE_MODEL; bf16 on CUDA, fp32 on a CPU, which only a small model fits.

        Raises ValueError for a malformed revision, for a GPU without bf16, and where the full-size model has no CUDA GPU.
        """
        source, revision = split_revision(os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)
        published = QWEN_IMAGE.published.get(source)
        if published:
            revision = revision or published.revision
        if torch.cuda.is_available():
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                gpu = torch.cuda.get_device_name()
                raise ValueError(f"{gpu} cannot compute in bfloat16: run on a GPU of compute capability 8 or higher (Ampere)")
            return cls(source, torch.device("cuda"), torch.bfloat16, revision=revision)
        if published:
            raise ValueError(
                f"no CUDA GPU was found and {source} needs one: run on a GPU, or name a small model in {MODEL_VARIABLE}"
            )
        return cls(source, torch.device("cpu"), torch.float32, revision=revision)

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository that is loaded; None for a folder, and before anything was fetched."""
        return cached_commit(self.source, self.revision)

    def free_bytes(self) -> int:
        """Bytes that can still be allocated on the device."""
        return free_bytes(self.device)

    def fetch(self, log: Log) -> None:
        """Download all missing files from the hub in parallel, before the first is read; nothing for a folder."""
        fetch(self.source, log, revision=self.revision)

    def component(self, kind: type, name: str, **options: Any) -> Any:
        """A component of the class `kind` from the base model's subfolder `name`, on the CPU."""
        return kind.from_pretrained(self.source, subfolder=name, **self._pinned(), **options)

    def configuration(self, kind: type, name: str) -> Any:
        """The configuration of a component: a dictionary for a diffusers class, the object for one of transformers."""
        read = kind.load_config if issubclass(kind, ConfigMixin) else kind.config_class.from_pretrained
        return read(self.source, subfolder=name, **self._pinned())

    def _pinned(self) -> dict[str, str]:
        """The fetched commit, so that all components are of one, also where the branch has moved since."""
        revision = self.commit or self.revision
        return {"revision": revision} if revision else {}
