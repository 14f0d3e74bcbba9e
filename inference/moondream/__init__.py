"""Moondream 2 for transformers 5. Importing this package registers its classes with the Auto classes.

Example:
    ```python
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.prepare(photo, "query", "Is it dark?")
    ids = model.generate(**inputs, do_sample=True, num_return_sequences=8, max_new_tokens=64)  # encodes the photo once
    texts = processor.decode_answers(ids[:, inputs["input_ids"].shape[1] :])
    boxes = model.detect(**processor.prepare(photo, "detect", "dog"))
    ```
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from .checkpoint import CheckpointError
from .configuration_moondream import MoondreamConfig, MoondreamRegionConfig, MoondreamTextConfig, MoondreamVisionConfig
from .image_processing_moondream import MoondreamImageProcessor
from .modeling_moondream import MoondreamForConditionalGeneration, MoondreamModel, register_key_mapping
from .processing_moondream import MoondreamProcessor, check_tokenizer, encode_plain_text, load_tokenizer

AutoConfig.register(MoondreamConfig.model_type, MoondreamConfig, exist_ok=True)
AutoModelForImageTextToText.register(MoondreamConfig, MoondreamForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(MoondreamConfig, slow_image_processor_class=MoondreamImageProcessor, exist_ok=True)
AutoProcessor.register(MoondreamConfig, MoondreamProcessor, exist_ok=True)


__all__ = [
    "CheckpointError",
    "MoondreamConfig",
    "MoondreamForConditionalGeneration",
    "MoondreamImageProcessor",
    "MoondreamModel",
    "MoondreamProcessor",
    "MoondreamRegionConfig",
    "MoondreamTextConfig",
    "MoondreamVisionConfig",
    "check_tokenizer",
    "load_tokenizer",
    "encode_plain_text",
    "register_key_mapping",
]
