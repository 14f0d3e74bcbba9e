"""Which layers of Moondream a LoRA adapter sits on, in every fine-tune here: the text model's."""

TARGETS = r".*\.text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
