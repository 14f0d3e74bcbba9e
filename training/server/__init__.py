"""Training behind the `/v1/tuning` endpoints: stored finetunes and the LoRA trainer that updates them."""
