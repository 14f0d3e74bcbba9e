"""Moondream 2 for transformers 5; importing this package registers the classes with the Auto classes.

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
given = processor.prepare(photo, "query", "Is it dark?")
ids = model.generate(**given, do_sample=True, num_return_sequences=8, max_new_tokens=64)  # one look for all eight
texts = processor.decode_answers(ids[:, given["input_ids"].shape[1] :])
boxes = model.detect(**processor.prepare(photo, "detect", "dog"))
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .checkpoint import CheckpointError
from .configuration_moondream import MoondreamConfig, MoondreamRegionConfig, MoondreamTextConfig, MoondreamVisionConfig
from .image_processing_moondream import MoondreamImageProcessor
from .modeling_moondream import MoondreamForConditionalGeneration, MoondreamModel
from .processing_moondream import MoondreamProcessor, check_tokenizer, load_tokenizer, plain_ids

AutoConfig.register(MoondreamConfig.model_type, MoondreamConfig, exist_ok=True)
AutoModelForImageTextToText.register(MoondreamConfig, MoondreamForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(MoondreamConfig, slow_image_processor_class=MoondreamImageProcessor, exist_ok=True)
AutoProcessor.register(MoondreamConfig, MoondreamProcessor, exist_ok=True)


# The output head sits inside `text` in the original files, and the embedding is a bare parameter there. Named by
# class, because by model type the mapping would be passed over without a word.
def register_names(model: type[MoondreamForConditionalGeneration]) -> None:
    """Lets a class load and save the original names; needed for each subclass."""
    names = [WeightRenaming("model.text.lm_head", "lm_head"), WeightRenaming("text.wte", "text.wte.weight")]
    register_checkpoint_conversion_mapping(model.__name__, names, overwrite=True)


register_names(MoondreamForConditionalGeneration)

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
    "plain_ids",
    "register_names",
]
