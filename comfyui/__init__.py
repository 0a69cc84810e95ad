"""A ComfyUI custom node for the tokens that this package trains: copy or link this folder into ComfyUI/custom_nodes."""

from .node import QwenImagePlaceholderToken

NODE_CLASS_MAPPINGS = {"QwenImagePlaceholderToken": QwenImagePlaceholderToken}
NODE_DISPLAY_NAME_MAPPINGS = {"QwenImagePlaceholderToken": "Qwen-Image placeholder token"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
